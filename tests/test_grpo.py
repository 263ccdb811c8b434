"""Group advantages, several rewards as one, and the clipped surrogate."""

import math

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from neighbor_grpo.grpo import SurrogateStats, check_rewards, clipped_surrogate, combine_rewards, group_advantages
from neighbor_grpo.rivals.modifiers import shape_advantages

sizes = st.tuples(st.integers(1, 4), st.integers(2, 9))
rewards = sizes.flatmap(lambda size: arrays("float64", size, elements=st.floats(-100, 100))).map(torch.tensor)


def spread(rewards):
    return rewards.std(1, correction=0)


# --- advantages ---


@given(rewards)
def test_advantages_have_zero_mean_and_unit_spread(rewards):
    assume(spread(rewards).min() > 0.1)
    advantages = group_advantages(rewards)
    torch.testing.assert_close(advantages.mean(1), torch.zeros(len(rewards)).double(), atol=1e-10, rtol=0)
    torch.testing.assert_close(spread(advantages), torch.ones(len(rewards)).double(), atol=2e-5, rtol=0)


@given(rewards, st.floats(0.5, 20), st.floats(-50, 50))
def test_advantages_ignore_scale_and_offset(rewards, scale, offset):
    assume(spread(rewards).min() > 0.1)
    torch.testing.assert_close(group_advantages(scale * rewards + offset), group_advantages(rewards), atol=1e-4, rtol=0)


@given(rewards, st.integers(-100, 110))
def test_advantages_of_very_small_and_very_large_rewards_are_those_of_ordinary_ones(rewards, exponent):
    assume(spread(rewards).min() > 0.1)
    ordinary = rewards.float()
    torch.testing.assert_close(
        group_advantages(ordinary * 2.0**exponent), group_advantages(ordinary), atol=1e-4, rtol=0
    )


@pytest.mark.parametrize("scale", ["group", "batch"])
def test_advantages_stay_finite_up_to_the_largest_float(scale):
    rewards = torch.tensor([[3.4e38, -3.4e38, 0.0], [0.0, 1e-3, 1e38]])
    expected = shape_advantages(rewards / 2.0**100, scale=scale)
    assert torch.isfinite(expected).all() and expected.abs().max() > 1
    torch.testing.assert_close(shape_advantages(rewards, scale=scale), expected, atol=1e-5, rtol=0)


@given(rewards)
def test_advantages_are_an_affine_map_within_each_group(rewards):
    for group, advantages in zip(rewards, group_advantages(rewards), strict=True):
        exponent = torch.frexp(group.abs().max()).exponent.clamp(-126, 0).item()
        expected = (group - group.mean()) / (group.std(correction=0) + 1e-6 * 2.0**exponent)
        torch.testing.assert_close(advantages, expected, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("value", [0.0, 0.1, 1 / 3, -7.3e5, 1e-30])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_group_of_equal_rewards_gets_exactly_nothing(value, dtype):
    assert torch.equal(group_advantages(torch.full((2, 7), value, dtype=dtype)), torch.zeros(2, 7, dtype=dtype))


def test_groups_do_not_see_each_other():
    a, b = torch.rand(1, 6), 100 * torch.rand(1, 6)
    together, alone = group_advantages(torch.cat([a, b])), torch.cat([group_advantages(a), group_advantages(b)])
    # The sums over one row and over two may take another order: a few units in the last place of numbers below 3.
    assert (together - alone).abs().max() < 1e-5


@pytest.mark.parametrize("given", [torch.tensor([[0, 1, 5]]), torch.tensor([[0.0, 1.0, 5.0]]).bfloat16()])
def test_integers_and_half_precision_become_float32(given):
    advantages = group_advantages(given)
    assert advantages.dtype == torch.float32
    torch.testing.assert_close(advantages, group_advantages(torch.tensor([[0.0, 1.0, 5.0]])))


# --- several rewards ---


def test_combination_weighs_standardised_rewards():
    a, b = torch.rand(3, 5), 1000 * torch.rand(3, 5)
    expected = 0.2 * group_advantages(a) + 0.7 * group_advantages(b)
    both = torch.stack([a, b], 2)
    torch.testing.assert_close(combine_rewards(both, [0.2, 0.7]), expected)
    torch.testing.assert_close(combine_rewards(both), (group_advantages(a) + group_advantages(b)) / 2)
    assert torch.equal(combine_rewards(a), group_advantages(a))


def test_combination_of_raw_rewards_is_a_weighted_sum():
    a, b = torch.rand(3, 5), torch.rand(3, 5)
    torch.testing.assert_close(combine_rewards(torch.stack([a, b], 2), [1, 3], check_rewards), a + 3 * b)


@given(st.floats(0.5, 100))
def test_standardised_combination_ignores_the_scale_of_a_reward(scale):
    a, b = torch.rand(3, 5).double(), torch.rand(3, 5).double()
    scaled, plain = torch.stack([a, scale * b], 2), torch.stack([a, b], 2)
    torch.testing.assert_close(combine_rewards(scaled), combine_rewards(plain), atol=1e-3, rtol=0)


# --- the clipped surrogate ---

log_ratios = st.floats(-1, 1)


@given(log_ratios, st.floats(-3, 3), st.floats(0.01, 0.9))
def test_surrogate_is_the_pessimistic_bound(log_ratio, advantage, c):
    log_prob, old = torch.tensor([log_ratio - 2, -2], dtype=torch.float64)
    value = clipped_surrogate(log_prob, old, advantage, c).item()
    ratio = math.exp(log_ratio)
    clipped = min(max(ratio, 1 - c), 1 + c)
    assert value == pytest.approx(min(advantage * ratio, advantage * clipped), abs=1e-12)


@given(log_ratios, st.floats(-3, 3), st.floats(0.01, 0.9))
def test_gradient_stops_where_the_step_went_far_enough(log_ratio, advantage, c):
    ratio = math.exp(log_ratio)
    assume(abs(advantage) > 1e-3 and min(abs(ratio - 1 + c), abs(ratio - 1 - c)) > 1e-6)
    log_prob = torch.tensor(log_ratio, dtype=torch.float64, requires_grad=True)
    clipped_surrogate(log_prob, torch.zeros(()).double(), advantage, c).backward()
    enough = ratio > 1 + c if advantage > 0 else ratio < 1 - c
    assert log_prob.grad.item() == pytest.approx(0 if enough else advantage * ratio, abs=1e-12)


def test_on_policy_value_and_gradient_are_the_advantages():
    advantages = torch.tensor([-1.0, 0.0, 2.0])
    log_prob = torch.tensor([-3.0, -1e4, 0.2], requires_grad=True)
    value = clipped_surrogate(log_prob, log_prob.detach(), advantages, 1e-4)
    value.sum().backward()
    assert torch.equal(value, advantages) and torch.equal(log_prob.grad, advantages)


def test_stats_summarise_all_micro_batches():
    stats, old = SurrogateStats(), torch.zeros(4)
    stats.surrogate(torch.tensor([0.0, 0.05, -0.05, 0.3]), old, old, 0.1, entropy=torch.tensor([1.0, 2.0]))
    stats.surrogate(torch.tensor([0.0, 0.0, -0.4, 0.3]), old, old, 0.1, entropy=torch.tensor([3.0, 4.0]))
    expected = {"ratio_min": math.exp(-0.4), "ratio_max": math.exp(0.3), "clip_fraction": 3 / 8, "entropy": 2.5}
    assert stats.summary() == pytest.approx(expected)


def test_stats_of_a_policy_without_entropy():
    stats = SurrogateStats()
    stats.surrogate(torch.zeros(3), torch.zeros(3), torch.zeros(3), 0.1)
    assert stats.summary() == {"ratio_min": 1.0, "ratio_max": 1.0, "clip_fraction": 0.0, "entropy": None}


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_stats_do_not_depend_on_how_states_are_split(size):
    log_prob, old, gains = torch.tensor([0.0, 0.3, 0.0, 0.0, 0.3]), torch.zeros(5), torch.zeros(5)
    stats = SurrogateStats()
    for rows in torch.arange(5).split(size):
        stats.surrogate(log_prob[rows], old[rows], gains[rows], 0.1, entropy=1 + rows.float())
    summary = stats.summary()
    assert summary["clip_fraction"] == pytest.approx(2 / 5) and summary["entropy"] == pytest.approx(3)
