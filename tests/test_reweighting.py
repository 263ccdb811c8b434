"""The group-wise quasi-norm: what it changes and what it leaves alone."""

import math

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from neighbor_grpo.flow import randn, seeded
from neighbor_grpo.grpo import group_advantages
from neighbor_grpo.reweighting import quasi_norm

exponents = st.floats(0.1, 2)
groups = st.tuples(st.integers(1, 4), st.integers(2, 12)).flatmap(
    lambda size: arrays("float64", size, elements=st.floats(-10, 10))
)


def rms(a):
    return a.square().mean(1).sqrt()


def standardized(rewards):
    rewards = torch.tensor(rewards)
    assume(rewards.std(1, correction=0).min() > 0.1)
    return group_advantages(rewards)


@given(groups, exponents, st.booleans())
def test_weights_are_the_formula(rewards, p, rescale):
    advantages = standardized(rewards)
    size = advantages.shape[1]
    for group, weights in zip(advantages, quasi_norm(advantages, p, rescale), strict=True):
        norm = sum(abs(a) ** p for a in group.tolist()) ** (1 / p)
        expected = group / norm * (math.sqrt(size) if rescale else 1)
        torch.testing.assert_close(weights, expected, atol=1e-6, rtol=1e-4)


@given(groups, exponents, st.floats(1e-6, 1e6))
def test_weights_ignore_the_scale_of_the_advantages(rewards, p, scale):
    advantages = standardized(rewards)
    torch.testing.assert_close(quasi_norm(scale * advantages, p), quasi_norm(advantages, p), atol=1e-9, rtol=1e-9)


@given(groups, exponents, st.floats(0.2, 50))
def test_weights_ignore_the_scale_of_the_rewards(rewards, p, scale):
    advantages = standardized(rewards)
    scaled = group_advantages(scale * torch.tensor(rewards))
    torch.testing.assert_close(quasi_norm(scaled, p), quasi_norm(advantages, p), atol=1e-4, rtol=0)


@given(groups, exponents)
def test_weights_keep_signs_order_and_zero_mean(rewards, p):
    advantages = standardized(rewards)
    weights = quasi_norm(advantages, p)
    assert torch.equal(weights.sign(), advantages.sign())
    assert weights.gather(1, advantages.argsort(1)).diff().min() >= -1e-12
    assert weights.sum(1).abs().max() < 1e-9


@given(groups)
def test_p_2_with_rescaling_changes_nothing(rewards):
    advantages = standardized(rewards)
    torch.testing.assert_close(quasi_norm(advantages, 2.0, True), advantages, atol=1e-4, rtol=1e-4)


@given(groups, exponents)
def test_rescaling_is_a_factor(rewards, p):
    advantages = standardized(rewards)
    factor = math.sqrt(advantages.shape[1])
    torch.testing.assert_close(quasi_norm(advantages, p, True), factor * quasi_norm(advantages, p, False))


@given(groups, exponents)
def test_no_group_grows(rewards, p):
    assert rms(quasi_norm(standardized(rewards), p)).max() <= 1 + 1e-9


def shapes(size=12):
    "Groups whose rewards are split half and half, normally spread, and with one winner."
    half = torch.tensor([1.0, -1.0]).repeat(size // 2)
    normal = torch.special.ndtri((torch.arange(size) + 0.5) / size)
    winner = torch.eye(size)[0]
    return group_advantages(torch.stack([half, normal, winner]).double(), eps=1e-12)


def test_clear_winners_keep_more_weight():
    half, normal, winner = rms(quasi_norm(shapes(), 0.8)).tolist()
    assert half < normal < winner
    assert half == pytest.approx(12**-0.75, abs=1e-6)  # 1 / 12^(1/p) * sqrt(12)
    norm = (math.sqrt(11) ** 0.8 + 11 * (1 / math.sqrt(11)) ** 0.8) ** (1 / 0.8)
    assert winner == pytest.approx(math.sqrt(12) / norm, abs=1e-6) and winner == pytest.approx(0.31, abs=0.005)


def test_the_order_of_shapes_turns_with_p():
    for p in (0.5, 0.8, 1.0, 1.5):
        half, normal, winner = rms(quasi_norm(shapes(), p)).tolist()
        assert half < normal < winner
    torch.testing.assert_close(rms(quasi_norm(shapes(), 2.0)), torch.ones(3).double())


@pytest.mark.parametrize("p", [0.05, 0.8, 2.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_group_of_zeros_stays_zero(p, dtype):
    advantages = torch.cat([torch.zeros(1, 6, dtype=dtype), randn((1, 6), seeded(0), dtype=dtype)])
    weights = quasi_norm(advantages, p)
    assert torch.equal(weights[0], torch.zeros(6, dtype=dtype)) and weights.isfinite().all()


@given(st.floats(1e-3, 0.1), st.integers(2, 64))
def test_small_exponents_do_not_overflow(p, size):
    weights = quasi_norm(group_advantages(randn((3, size), seeded(0))), p)
    assert weights.isfinite().all()


def test_half_and_half_is_the_lightest_group_and_winner_and_loser_the_heaviest():
    z = randn((50_000, 12), seeded(3), dtype=torch.float64)
    power = 20 * torch.rand(len(z), 1, generator=seeded(4), dtype=torch.float64)
    odd = group_advantages(z.sign() * z.abs() ** power, eps=0)  # from nearly binary to nearly one-hot
    for p in (0.4, 0.8, 1.0):
        sizes = rms(quasi_norm(odd, p))
        assert 12 ** (0.5 - 1 / p) - 1e-9 < sizes.min() and sizes.max() < 2 ** (0.5 - 1 / p) + 1e-9


# --- shape against size ---


def climb(p, scale, optimizer, lr, iterations=200, seeds=16):
    "A Gaussian bandit with one weight, shared by a prompt that passes x > 0 and one with the reward exp(-3 x)."
    weight = torch.zeros(seeds, dtype=torch.float64, requires_grad=True)
    generator, optimizer = seeded(5), optimizer([weight], lr)
    for _ in range(iterations):
        noise = randn((2, seeds, 12), generator, dtype=torch.float64)
        x = weight.detach()[:, None] + noise
        advantages = group_advantages(torch.cat([(x[0] > 0).double(), (-3 * x[1]).exp()]))
        pull = scale * quasi_norm(advantages, p) * noise.flatten(0, 1)
        weight.grad = -pull.mean(1).view(2, seeds).mean(0)
        optimizer.step()
    return weight.detach()


def test_the_exponent_decides_where_to_and_the_size_how_fast():
    sgd = torch.optim.SGD
    equal, lower, matched = (climb(p, scale, sgd, 0.05).mean() for p, scale in ((2, 1), (0.8, 1), (0.8, 4.5)))
    assert equal > 0.2 and lower < -0.1 and matched < 2 * lower


def test_adamw_sees_the_shape_and_not_the_size():
    adam = torch.optim.AdamW
    equal, lower, matched = (climb(p, scale, adam, 0.01) for p, scale in ((2, 1), (0.8, 1), (0.8, 4.5)))
    assert (lower - matched).abs().max() < 1e-3
    assert equal.mean() > 0 > lower.mean()
