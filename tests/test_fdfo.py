"""FDFO against its definition in float64, and what it has in common with Neighbor GRPO."""

import math
from dataclasses import replace

import pytest
import torch
from helpers import SmallNet, gradients
from hypothesis import given
from hypothesis import strategies as st
from test_algorithms import SHAPE, streams

from neighbor_grpo.flow import randn, seeded
from neighbor_grpo.neighbor import NeighborGRPO
from neighbor_grpo.rivals.pairs import FDFO
from neighbor_grpo.rollouts import States, everyone

PAIRS = FDFO(steps=4, trained_steps=4)
NEAR = NeighborGRPO(group_size=2, anchors=2, steps=4, trained_steps=4)


def rolled(algorithm=PAIRS, groups=3):
    "A rollout of a network, and rewards of its samples."
    torch.manual_seed(0)
    network = SmallNet()
    noise = randn((groups, *SHAPE), seeded(1), dtype=torch.float64)
    rollout = algorithm.rollout(network, noise, None, streams(groups, 0))
    return network, rollout, randn((groups, algorithm.group_size), seeded(2), dtype=torch.float64)


def at_step(algorithm, rollout, k, advantages):
    "The gradient with respect to the velocity of every candidate at one step, `(P, G, *shape)`."
    states = States.product(torch.full((rollout.x.shape[1], 1), k), everyone(rollout), "cpu")
    v = states.select(rollout.v).clone().requires_grad_()
    loss = algorithm.loss(lambda x, t, cond: v, rollout, states, advantages, on_policy=True)
    return torch.autograd.grad(loss, v)[0].unflatten(0, rollout.x.shape[1:3])


@pytest.mark.parametrize("updates", [0, 1])
def test_a_pair_is_pulled_along_the_difference_of_its_samples_times_that_of_its_rewards(updates):
    "As plain loops over the weights of a network, also after they have moved: there is no ratio."
    network, rollout, rewards = rolled()
    with torch.no_grad():
        network.out.bias += 0.1 * updates
    advantages, dimensions = PAIRS.advantages(rewards), math.prod(SHAPE)
    network.zero_grad()
    for loss in PAIRS.losses(network, rollout, advantages, streams(3, 1), on_policy=not updates):
        loss.backward()
    found = gradients(network)
    network.zero_grad()
    for g in range(3):
        pull = (rollout.x[4, g, 0] - rollout.x[4, g, 1]) * (rewards[g, 0] - rewards[g, 1]) / 2
        for k in range(4):
            for i in range(2):
                v = network(rollout.x[k, g, i][None], rollout.ts[k][None])[0]
                ((v * pull).sum() / dimensions / (3 * 4 * 2)).backward()
    assert (found - gradients(network)).abs().max() < 1e-12 < 1e-4 < found.abs().max()


def test_a_step_downhill_brings_the_better_sample_nearer():
    _, rollout, rewards = rolled()
    better = rewards.argmax(1)
    for k in range(4):
        step = -at_step(PAIRS, rollout, k, PAIRS.advantages(rewards))
        t = rollout.ts[k]
        for g in range(3):
            good, bad = rollout.samples[g, better[g]], rollout.samples[g, 1 - better[g]]
            moved = -t * step[g]  # of x0_hat = x - t v
            assert ((moved * (good - bad)).flatten(1).sum(1) > 0).all()


@given(st.floats(0.01, 1.0), st.integers(0, 99))
def test_its_churn_is_the_neighborhood(sigma, seed):
    "Noise is added until the deviation is 1 + gamma, and scaled back; the same numbers as Neighbor GRPO's."
    center = randn((2, *SHAPE), seeded(seed), dtype=torch.float64)
    if sigma < 1:
        gamma = 1 / math.sqrt(1 - sigma**2) - 1
        delta = randn((4, *SHAPE), seeded(7), dtype=torch.float64).unflatten(0, (2, 2))
        churned = (center[:, None] + math.sqrt((1 + gamma) ** 2 - 1) * delta) / (1 + gamma)
        assert (replace(PAIRS, sigma=sigma).starts(center, 2, seeded(7)) - churned).abs().max() < 1e-9
    own, other = (replace(a, sigma=sigma).starts(center, 2, seeded(7)) for a in (PAIRS, NEAR))
    assert torch.equal(own, other)


@pytest.mark.parametrize("method", ["euler", "dpm++2m"])
def test_the_pull_is_neighbor_grpos_at_the_last_step_and_along_the_next_states_before(method):
    """On policy, `2 (t - t') / tau` times the sum of `A_i x_t'`, where FDFO has `A_i x_0`: at the end the same, up to
    the weight of a pair."""
    _, rollout, rewards = rolled(replace(PAIRS, method=method))
    own, signs = PAIRS.advantages(rewards), NEAR.advantages(rewards)
    assert torch.allclose(signs.sign(), own.sign()) and signs.abs().std() < 1e-3 < own.abs().std()
    for k in range(4):
        dt = rollout.ts[k] - rollout.ts[k + 1]
        found, expected = at_step(NEAR, rollout, k, signs), at_step(PAIRS, rollout, k, own)
        gap = (rollout.x[k + 1, :, 0] - rollout.x[k + 1, :, 1]).flatten(1)
        pull = 2 * dt * signs[:, :1] * gap / gap.shape[1]
        assert (found.flatten(2) - pull[:, None]).abs().max() < 1e-7
        weight = (own / signs)[:, :1, None, None, None] / (2 * dt)
        if k == 3:
            assert torch.allclose(weight * found, expected, atol=1e-7)
        else:
            assert (weight * found - expected).abs().max() > 1e-3


def test_of_a_larger_group_all_pairs_pull():
    _, rollout, rewards = rolled(replace(PAIRS, group_size=5))
    found = at_step(PAIRS, rollout, 1, PAIRS.advantages(rewards))
    x = rollout.samples
    each = sum(
        (x[:, i] - x[:, j]) * (rewards[:, i] - rewards[:, j])[:, None, None, None] for i in range(5) for j in range(i)
    )
    assert (found - each[:, None] / 5 / math.prod(SHAPE)).abs().max() < 1e-12


def test_rewards_keep_their_unit_and_several_are_added_up():
    rewards = randn((3, 2, 2), seeded(3), dtype=torch.float64)
    half = (rewards[:, 0] - rewards[:, 1]) / 2
    total = half[:, 0] * 0.3 + half[:, 1] * 2
    assert torch.allclose(PAIRS.advantages(rewards, [0.3, 2.0]), torch.stack([total, -total], 1), atol=1e-12)
    assert PAIRS.advantages(torch.full((2, 2), 0.1)).abs().max() == 0
    assert torch.allclose(PAIRS.advantages(rewards[..., 0] * 50 + 7), 50 * PAIRS.advantages(rewards[..., 0]))


def test_bad_settings_are_refused():
    for wrong in (dict(sigma=0.0), dict(sigma=1.1), dict(trained_steps=9), dict(trained_steps=0), dict(group_size=1)):
        with pytest.raises(ValueError, match=[*wrong][0]):
            FDFO(**wrong)
