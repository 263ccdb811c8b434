"""The gradient of the clipped surrogate of Gaussian steps is a weighted sum of distances."""

import pytest
import torch

from neighbor_grpo.flow import randn, seeded
from neighbor_grpo.grpo import clipped_surrogate, group_advantages
from neighbor_grpo.rivals.sde import gaussian_log_prob

G, STD = 12, 0.27


def group(dimension):
    "The old mean, candidates around it, advantages."
    mean = randn((1, dimension), seeded(0), dtype=torch.float64)
    candidates = mean + STD * randn((G, dimension), seeded(1), dtype=torch.float64)
    rewards = randn((1, G), seeded(2), dtype=torch.float64)
    return mean, candidates, group_advantages(rewards)[0]


def force(mean, old, candidates, advantages, clip_range):
    "Gradient of the surrogate, of the true density, in the mean."
    mean, D = mean.clone().requires_grad_(), candidates.shape[1]
    std = torch.full((1, 1), STD, dtype=torch.float64)
    log_prob, before = (D * gaussian_log_prob(candidates, m.expand(G, D), std) for m in (mean, old))
    surrogate = clipped_surrogate(log_prob, before, advantages, clip_range).sum()
    return torch.autograd.grad(surrogate, mean)[0][0], (log_prob - before).exp().detach()


@pytest.mark.parametrize("dimension", [1, 2, 64])
def test_on_policy_the_force_is_made_of_the_candidates_alone(dimension):
    mean, candidates, advantages = group(dimension)
    found, _ = force(mean, mean, candidates, advantages, 0.2)
    expected = advantages @ candidates / STD**2
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


def test_off_policy_the_ratio_weighs_and_the_clip_lets_go():
    old, candidates, advantages = group(2)
    mean, c = old + 0.2 * STD, 0.2
    found, ratio = force(mean, old, candidates, advantages, c)
    gone = (advantages > 0) & (ratio > 1 + c) | (advantages < 0) & (ratio < 1 - c)
    assert 0 < gone.sum() < G
    weights = torch.where(gone, 0, ratio * advantages)
    expected = weights @ (candidates - mean) / STD**2
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
