"One and two steps: the gradient of a linear velocity in closed form, and refusals that name the argument."

import pytest
import torch
from helpers import TinyTask, weights
from torch import nn

from neighbor_grpo.cli import given_back
from neighbor_grpo.flow import randn, seeded
from neighbor_grpo.neighbor import NeighborGRPO
from neighbor_grpo.rivals.catalogue import ALGORITHMS
from neighbor_grpo.rivals.forward import DiffusionNFT
from neighbor_grpo.rivals.gaussian import FlowGRPO
from neighbor_grpo.rivals.mixed import MixGRPO
from neighbor_grpo.training import Run, TrainSettings, train

SMALL = dict(group_size=5)
ONE = dict(steps=1, trained_steps=1, **SMALL)
TWO = dict(steps=2, trained_steps=1, **SMALL)
TRAINED = {
    "neighbor, one": NeighborGRPO(anchors=2, method="euler", **ONE),
    "neighbor, one, dpm++2m": NeighborGRPO(anchors=2, **ONE),
    "neighbor, one, stored": NeighborGRPO(anchors=2, leap_from="stored", **ONE),
    "neighbor, one, rollout": NeighborGRPO(anchors=2, leap_from="rollout", **ONE),
    "neighbor, one, denoised": NeighborGRPO(anchors=2, leap_from="denoised", **ONE),
    "neighbor, two": NeighborGRPO(anchors=2, method="euler", train_where="first", **TWO),
    "neighbor, two, last": NeighborGRPO(anchors=2, method="euler", train_where="last", **TWO),
    "nft, one": DiffusionNFT(steps=1, trained_steps=3, method="euler", **SMALL),
    "nft, two": DiffusionNFT(steps=2, trained_steps=3, method="euler", **SMALL),
    "flow, two": FlowGRPO(noisy_last_step=False, **TWO),
    "mix, one": MixGRPO(shared_noise=False, **ONE),
    "mix, two": MixGRPO(window_moves="frozen", **TWO),
}


class Linear(nn.Module):
    "`v = W x`, the same at all times."

    def __init__(self, dim=3):
        super().__init__()
        self.matrix = nn.Parameter(randn((dim, dim), seeded(9), dtype=torch.float64) / 2)

    def forward(self, x, t, cond=None):
        return x @ self.matrix.T


def pull(algorithm, rollout, advantages, k, group, member):
    "Gradient of the loss of one state with respect to its velocity, on policy, as the formulas have it."
    x, end, t, t_next = rollout.x[k, group, member], rollout.x[k + 1, group], rollout.ts[k], rollout.ts[k + 1]
    dim, advantage = len(x), advantages[group, member]
    if rollout.ts.ndim > 1:
        t, t_next = t[group], t_next[group]
    if isinstance(algorithm, NeighborGRPO):  # (2 / tau D) (t_k - t_{k+1}) sum_i A_i x_{k+1}^(i)
        return 2 / dim * (t - t_next) * (advantages[group][:, None] * end).sum(0)
    v = rollout.v[k, group, member]
    if isinstance(algorithm, DiffusionNFT):  # -2 t A (x0_hat - x0) / (D mean |x0_hat - x0|)
        error = x - t * v - rollout.samples[group, member]
        return -2 / dim * t * advantage * error / error.abs().mean()
    # Flow-GRPO: -A (x' - mu) / (D std^2) dmu/dv; alpha^2 t / (1 - t) with t_1 for t where t = 1
    g2 = 0.7**2 * t / (1 - (rollout.ts[1] if t == 1 else t))
    move = (t_next - t) * (1 + g2 * (1 - t) / (2 * t))
    mean, variance = x * (1 + g2 / (2 * t) * (t_next - t)) + v * move, g2 * (t - t_next)
    return -advantage * move * (end[member] - mean) / variance / dim


@pytest.mark.parametrize("name", TRAINED)
def test_the_gradient_in_closed_form(name):
    "Of a linear velocity, from one or two steps: the mean over the states of pull times state."
    algorithm, velocity = TRAINED[name], Linear()
    noise = randn((2, 3), seeded(0), dtype=torch.float64)
    rollout = algorithm.rollout(velocity, noise, generator=seeded(1))
    assert len(rollout.x) == (4 if "nft" in name else algorithm.steps + 1)
    advantages = algorithm.advantages(randn((2, 5), seeded(2), dtype=torch.float64))
    chosen, expected = algorithm.choose(rollout, seeded(3)), 0
    for state in zip(chosen.step, chosen.prompt, chosen.member, strict=True):
        expected = expected + torch.outer(pull(algorithm, rollout, advantages, *state), rollout.x[state]) / len(chosen)
    for on_policy in (True, False):
        velocity.zero_grad()
        for loss in algorithm.losses(velocity, rollout, advantages, seeded(3), on_policy):
            loss.backward()
        assert torch.allclose(velocity.matrix.grad, expected, rtol=0, atol=1e-10), on_policy
    assert expected.abs().max() > 1e-3


@pytest.mark.parametrize("name", TRAINED)
def test_a_run_of_one_and_two_steps_moves_the_weights(name):
    task = TinyTask(dropout=0.0)
    before = weights(task.policy)
    run = train(task, TRAINED[name], TrainSettings(iterations=2, groups=3, lr=1e-2, eval_every=2), progress=False)
    assert not torch.equal(before, weights(run.policy)) and all(row["grad_norm"] > 0 for row in run.rows)


@pytest.mark.parametrize("name", ALGORITHMS)
def test_one_step_is_trained_or_refused_by_the_name_of_the_steps(name):
    kind, last = ALGORITHMS[name], ("flow", "dance", "mix-flash-star", "tempflow", "branch", "dppo", "op", "tmpo")
    if name not in last:
        assert kind(steps=1, trained_steps=1).steps == 1
        return
    for more in ({}, dict(trained_steps=1)):
        with pytest.raises(ValueError, match="^steps must be an integer >= 2: the last step is not trained, got 1$"):
            kind(steps=1, **more)
    with pytest.raises(ValueError, match="^steps must be an integer, got '1'$"):
        kind(steps="1")


def test_with_every_step_trained_there_is_none_to_hold():
    algorithm = NeighborGRPO(train_where="first", anchors=2, **ONE)
    with pytest.raises(ValueError, match="hold_weight must be 0 unless .* trained, not all of them, got 0.03"):
        Run(TinyTask(), algorithm, TrainSettings(hold_weight=0.03))


def test_a_refused_run_gives_its_folder_back(tmp_path):
    "Also where its pipeline has been marked; what took time to make stays."
    for name, stays in (("inputs.json", False), ("velocity.safetensors", True)):
        out = tmp_path / name
        with pytest.raises(ValueError, match="^refused$"), given_back(out, True):
            out.mkdir()
            for file in ("config.json", ".lock", name):
                (out / file).write_text("{}")
            raise ValueError("refused")
        assert out.exists() == stays
