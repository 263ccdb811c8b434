"What is no number is refused as a reward in one clear error, before a weight moves."

import pytest
import torch
from helpers import TinyTask, weights

from neighbor_grpo.neighbor import NeighborGRPO
from neighbor_grpo.runs.trainer import Trainer
from neighbor_grpo.training import TrainSettings


@pytest.mark.parametrize("odd", [None, "good", ["a", "b"], [1 + 2j] * 8], ids=["none", "text", "texts", "complex"])
def test_a_reward_that_is_no_number_is_refused(odd):
    task = TinyTask()
    trainer = Trainer(task, NeighborGRPO(group_size=4, steps=2, anchors=1, trained_steps=1), TrainSettings(groups=2))
    task.reward, before = lambda samples, prompts: odd, weights(task.policy)
    with pytest.raises(ValueError, match="rewards .*real numbers"):
        trainer.step()
    assert torch.equal(weights(task.policy), before)
