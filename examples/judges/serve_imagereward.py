"""ImageReward behind an address: python serve_imagereward.py [CHECKPOINT], then --rewards remote@http://machine:8000"""

import sys

import ImageReward

from neighbor_grpo.rewards.remote import RewardServer

model = ImageReward.load(*(sys.argv[1:] or ["ImageReward-v1.0"]))


def judge(pictures, prompts):
    return [model.score(prompt, picture) for picture, prompt in zip(pictures, prompts)]


RewardServer(judge, host="0.0.0.0", port=8000, names=["ImageReward"]).serve_forever()
