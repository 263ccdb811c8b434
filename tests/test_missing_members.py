"""What a task or an algorithm lacks is named when it is first needed."""

from dataclasses import dataclass

import pytest
import torch

from neighbor_grpo.rivals.gaussian import FlowGRPO
from neighbor_grpo.rollouts import Algorithm
from neighbor_grpo.toyflows import VelocityMLP
from neighbor_grpo.training import Task, TrainSettings, train

MEMBERS = {
    "conditions": lambda self, prompts: None,
    "reward": lambda self, samples, prompts: samples[:, 0],
    "evaluate": lambda self, velocity: dict(reward=0.0),
}
NAMES = ["policy", "shape", "prompts", *MEMBERS]


@pytest.mark.parametrize("bases", [(Task,), ()], ids=["Task", "any object"])
@pytest.mark.parametrize("missing", NAMES)
def test_a_task(missing, bases):
    members = MEMBERS | dict(policy=VelocityMLP(2, 8, 1), shape=(2,), prompts=1)
    kind = type("Mine", bases, {name: value for name, value in members.items() if name != missing})
    algorithm = FlowGRPO(group_size=2, steps=3, trained_steps=1)
    with pytest.raises((AttributeError, NotImplementedError), match=rf"Mine.* {missing}|Mine.*'{missing}'"):
        train(kind(), algorithm, TrainSettings(iterations=1, groups=1), progress=False)


@dataclass(frozen=True)
class Empty(Algorithm):
    "Has none of the five methods."

    group_size: int = 2


CALLS = {
    "starts": (torch.zeros(1, 2), 2, None),
    "follow": (None, torch.zeros(1, 2, 2), None, None, 0, None),
    "advantages": (torch.zeros(1, 2),),
    "choose": (None, None),
    "loss": (None, None, None, None),
}


@pytest.mark.parametrize("name", CALLS)
def test_an_algorithm(name):
    with pytest.raises(NotImplementedError, match=f"Empty needs {name}"):
        getattr(Empty(), name)(*CALLS[name])


def whole(**members):
    members = MEMBERS | dict(policy=VelocityMLP(2, 8, 1), shape=(2,), prompts=1) | members
    return type("Whole", (Task,), members)()


def test_held_out_figures_have_a_reward():
    task, algorithm = (
        whole(evaluate=lambda self, velocity: dict(score=0.0)),
        FlowGRPO(group_size=2, steps=3, trained_steps=1),
    )
    with pytest.raises(ValueError, match=r"task.evaluate must be figures with 'reward' among them, got \['score'\]"):
        train(task, algorithm, TrainSettings(iterations=1, groups=1), progress=False)


def test_an_algorithm_is_an_instance():
    with pytest.raises(ValueError, match="^algorithm must be an `Algorithm`, made, got <class"):
        train(whole(), FlowGRPO, progress=False)
