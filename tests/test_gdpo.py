"""GDPO's advantages against its formula in float64, around algorithms that standardize otherwise or not at all."""

import pytest
import torch

from neighbor_grpo.flow import randn, seeded
from neighbor_grpo.neighbor import NeighborGRPO
from neighbor_grpo.reweighting import quasi_norm
from neighbor_grpo.rivals.catalogue import modified
from neighbor_grpo.rivals.forward import DiffusionNFT
from neighbor_grpo.rivals.gaussian import FlowGRPO
from neighbor_grpo.rivals.modifiers import BatchAdvantages, ShapedAdvantages, shape_advantages
from neighbor_grpo.rivals.pairs import FDFO
from neighbor_grpo.rivals.trajectories import TMPO


def test_the_weighted_sum_of_standardized_rewards_is_standardized_over_the_batch():
    rewards = randn((3, 8, 2), seeded(0), dtype=torch.float64) * torch.tensor([1.0, 50.0]) + 3
    rewards[0, :, 1] = rewards[0, :, 0]  # the sums of this group are larger than those of the others
    weights = [1.0, 0.3]
    each = (rewards - rewards.mean(1, keepdim=True)) / rewards.std(1, correction=0, keepdim=True)
    total = (each * torch.tensor(weights, dtype=torch.float64)).sum(2)
    expected = (total - total.mean()) / total.std(correction=0)
    close = dict(atol=1e-5, rtol=0)  # eps is 1e-6, beside deviations of about 1
    torch.testing.assert_close(modified(FlowGRPO(), "gdpo").advantages(rewards, weights), expected, **close)
    assert (FlowGRPO().advantages(rewards, weights) - expected).abs().max() > 0.01
    neighbor = NeighborGRPO(group_size=8)
    size = total.square().mean(1, keepdim=True).sqrt()
    shaped = quasi_norm(total, neighbor.p) * size / total.std(correction=0)
    torch.testing.assert_close(modified(neighbor, "gdpo").advantages(rewards, weights), shaped, **close)
    assert modified(DiffusionNFT(), "gdpo").advantages(rewards, weights).shape == (3, 8)


REWARDS = randn((3, 8, 2), seeded(1), dtype=torch.float64) * torch.tensor([1.0, 1000.0])


def test_rewards_that_the_algorithm_leaves_alone_are_standardized_too():
    found = modified(FDFO(group_size=8), "gdpo").advantages(REWARDS, [1.0, 1.0])
    torch.testing.assert_close(found, modified(FlowGRPO(), "gdpo").advantages(REWARDS, [1.0, 1.0]))
    with pytest.raises(ValueError, match="standardise must be True"):
        modified(TMPO(standardise=False), "gdpo").advantages(REWARDS, [1.0, 1.0])


def test_the_sum_of_shaped_rewards_is_what_is_standardized():
    algorithm = FlowGRPO(advantage_clip=100.0)
    found = modified(algorithm, "slas", "gdpo").advantages(REWARDS, [1.0, 1.0])
    total = sum(shape_advantages(r, 0.5, "batch") for r in REWARDS.unbind(2))
    torch.testing.assert_close(found, (total - total.mean()) / (total.std(correction=0) + 1e-6))
    with pytest.raises(ValueError, match="around ShapedAdvantages.*inside of it|inside of it.*around ShapedAdvantages"):
        BatchAdvantages(ShapedAdvantages(algorithm))
