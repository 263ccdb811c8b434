"""ImageReward behind an address: python serve_imagereward.py [CHECKPOINT], then --rewards remote@http://machine:8000

It answers this machine alone. `HOST=0.0.0.0` opens it to others, who need its `NEIGHBOR_GRPO_TOKEN` where it has one.
"""

import os
import sys

import ImageReward

from neighbor_grpo.rewards.remote import RewardServer

model = ImageReward.load(*(sys.argv[1:] or ["ImageReward-v1.0"]))


def judge(pictures, prompts):
    return [model.score(prompt, picture) for picture, prompt in zip(pictures, prompts)]


RewardServer(judge, host=os.environ.get("HOST", "127.0.0.1"), port=8000, names=["ImageReward"]).serve_forever()
