"""HPSv3 behind an address: python serve_hpsv3.py [CHECKPOINT], then --rewards remote@http://machine:8000

It answers this machine alone. `HOST=0.0.0.0` opens it to others, who need its `NEIGHBOR_GRPO_TOKEN` where it has one.
"""

import os
import sys

import torch
from hpsv3 import HPSv3RewardInferencer

from neighbor_grpo.rewards.remote import RewardServer

model = HPSv3RewardInferencer(checkpoint_path=(sys.argv[1:] or [None])[0], device="cuda")


@torch.no_grad()
def judge(pictures, prompts):
    "The mean of each score; the second number of the model is its spread."
    pairs = zip(pictures, prompts)
    return [model.reward(image_paths=[picture], prompts=[prompt])[0][0].item() for picture, prompt in pairs]


RewardServer(judge, host=os.environ.get("HOST", "127.0.0.1"), port=8000, names=["HPSv3"]).serve_forever()
