"""The surrogate leaping policy: a softmax over distances, and its gradient on and off policy."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from neighbor_grpo.flow import randn, seeded
from neighbor_grpo.grpo import clipped_surrogate, group_advantages
from neighbor_grpo.leaping import leaping_entropy, leaping_log_probs, squared_distances
from neighbor_grpo.neighbors import neighbor_noise

temperatures = st.floats(0.01, 100)
reductions = st.sampled_from(["mean", "sum"])


def setting(m=3, g=6, shape=(2, 5), dtype=torch.float64):
    return randn((m, g, *shape), seeded(0), dtype=dtype), randn((m, *shape), seeded(1), dtype=dtype)


# --- the policy ---


@given(temperatures, reductions)
def test_log_probs_are_a_softmax_of_distances(temperature, reduction):
    candidates, anchor = setting()
    for m in range(3):
        square = [(c - anchor[m]).square() for c in candidates[m]]
        distances = [s.mean() if reduction == "mean" else s.sum() for s in square]
        logits = torch.stack([-d / temperature for d in distances])
        expected = logits - logits.logsumexp(0)
        torch.testing.assert_close(leaping_log_probs(candidates, anchor, temperature, reduction)[m], expected)


@given(temperatures, reductions)
def test_probabilities_sum_to_one(temperature, reduction):
    total = leaping_log_probs(*setting(), temperature, reduction).exp().sum(1)
    torch.testing.assert_close(total, torch.ones(3).double(), atol=1e-12, rtol=0)


@given(st.floats(-10, 10))
def test_only_relative_positions_count(offset):
    candidates, anchor = setting()
    moved = leaping_log_probs(candidates + offset, anchor + offset)
    torch.testing.assert_close(moved, leaping_log_probs(candidates, anchor), atol=1e-11, rtol=0)


@given(temperatures)
def test_mean_and_sum_differ_by_a_temperature(temperature):
    candidates, anchor = setting()  # 10 numbers a sample
    mean, total = (
        leaping_log_probs(candidates, anchor, tau, r) for tau, r in ((temperature, "mean"), (10 * temperature, "sum"))
    )
    torch.testing.assert_close(mean, total)


def test_nearest_candidate_is_likeliest():
    candidates, anchor = setting()
    nearest = squared_distances(candidates, anchor).argmin(1)
    assert torch.equal(leaping_log_probs(candidates, anchor).argmax(1), nearest)


def test_sharp_policies_at_image_size_stay_finite():
    candidates, anchor = setting(2, 12, (3, 64, 64), torch.float32)
    log_probs = leaping_log_probs(candidates, anchor, 1.0, "sum")  # distances of about 25,000
    assert log_probs.isfinite().all() and log_probs.min() < -100
    assert leaping_entropy(log_probs).isfinite().all()


def test_half_precision_is_computed_in_float32():
    candidates, anchor = setting(dtype=torch.float32)
    half = leaping_log_probs(candidates.bfloat16(), anchor.bfloat16())
    assert half.dtype == torch.float32
    assert torch.equal(half, leaping_log_probs(candidates.bfloat16().float(), anchor.bfloat16().float()))


def test_entropy_between_one_hot_and_uniform():
    uniform = torch.full((1, 8), -math.log(8)).double()
    one_hot = torch.tensor([[0.0, -800.0, -900.0]]).double()
    assert leaping_entropy(uniform).item() == pytest.approx(math.log(8))
    assert leaping_entropy(one_hot).item() == pytest.approx(0, abs=1e-12)
    entropies = [leaping_entropy(leaping_log_probs(*setting(), tau)).mean() for tau in (0.01, 0.1, 1, 10, 1000)]
    assert entropies == sorted(entropies) and entropies[-1] == pytest.approx(math.log(6), abs=1e-3)


# --- gradients ---


def surrogate_gradient(candidates, anchor, old_anchor, advantages, temperature, reduction, clip_range=0.2):
    "Gradient of the clipped surrogate with respect to the anchor."
    anchor = anchor.clone().requires_grad_(True)
    log_prob = leaping_log_probs(candidates, anchor, temperature, reduction)
    old = leaping_log_probs(candidates, old_anchor, temperature, reduction)
    clipped_surrogate(log_prob, old, advantages, clip_range).sum().backward()
    return anchor.grad


@pytest.mark.parametrize("included", [True, False], ids=["anchor among candidates", "anchor outside"])
@pytest.mark.parametrize("which", [0, 1, 2])
@pytest.mark.parametrize("temperature", [0.03, 1.0, 40.0])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_on_policy_gradient_is_the_pull_of_the_candidates(reduction, temperature, which, included):
    candidates, outside = setting()
    anchor = candidates[:, which] if included else outside + which
    advantages = group_advantages(randn((3, 6), seeded(2), dtype=torch.float64))
    gradient = surrogate_gradient(candidates, anchor, anchor, advantages, temperature, reduction)
    scale = temperature * (10 if reduction == "mean" else 1)
    pull = 2 / scale * (advantages[:, :, None, None] * candidates).sum(1)
    assert (gradient - pull).abs().max() < 1e-10 * max(1, 1 / scale)


def test_on_policy_gradient_is_that_of_the_weighted_distances():
    candidates, anchor = setting()
    advantages = group_advantages(randn((3, 6), seeded(2), dtype=torch.float64))
    moving = anchor.clone().requires_grad_(True)
    (-(advantages * squared_distances(candidates, moving, "sum")).sum()).backward()
    gradient = surrogate_gradient(candidates, anchor, anchor, advantages, 1.0, "sum")
    assert (gradient - moving.grad).abs().max() < 1e-10


def test_without_zero_mean_the_policy_matters():
    candidates, anchor = setting()
    advantages = randn((3, 6), seeded(2), dtype=torch.float64) + 1
    gradient = surrogate_gradient(candidates, anchor, anchor, advantages, 1.0, "sum")
    assert (gradient - 2 * (advantages[:, :, None, None] * candidates).sum(1)).abs().max() > 0.1


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_off_policy_gradient_pulls_from_the_policys_mean(temperature):
    candidates, anchor = setting()
    old_anchor = anchor + 0.01 * randn(anchor.shape, seeded(3), dtype=torch.float64)
    advantages = group_advantages(randn((3, 6), seeded(2), dtype=torch.float64))
    log_prob, old = (leaping_log_probs(candidates, a, temperature, "sum") for a in (anchor, old_anchor))
    weight = (advantages * (log_prob - old).exp())[:, :, None, None]
    middle = (log_prob.exp()[:, :, None, None] * candidates).sum(1, keepdim=True)
    expected = 2 / temperature * (weight * (candidates - middle)).sum(1)
    gradient = surrogate_gradient(candidates, anchor, old_anchor, advantages, temperature, "sum", clip_range=0.9)
    assert (gradient - expected).abs().max() < 1e-10


def test_one_hot_policies_still_have_the_whole_gradient():
    candidates, anchor = setting(1, 4, (3, 16, 16), torch.float32)
    advantages = torch.tensor([[1.0, -1.0, 1.0, -1.0]])
    gradient = surrogate_gradient(candidates, anchor, anchor, advantages, 1.0, "sum")
    pull = 2 * (advantages[:, :, None, None, None] * candidates).sum(1)
    torch.testing.assert_close(gradient, pull, atol=1e-3, rtol=0)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_the_default_clip_needs_the_mean(reduction):
    "At image size: the error of a ratio in float32, and how far a clip of 1e-4 lets the anchor move."
    clip_range, size = 1e-4, 65_536
    group = neighbor_noise(randn((1, size), seeded(2)), 12, 0.3, seeded(3))
    advantages = group_advantages(randn((1, 12), seeded(16)))
    pull = (advantages[..., None] * group).sum(1)
    step = 1e-6 * pull / pull.square().mean().sqrt()  # near the resolution of float32 in every coordinate

    def log_ratio(dtype):
        x, z, s = group.to(dtype), group[:, 0].to(dtype), step.to(dtype)
        return leaping_log_probs(x, z + s, 1.0, reduction) - leaping_log_probs(x, z, 1.0, reduction)

    exact = log_ratio(torch.float64)
    error = (log_ratio(torch.float32).double().exp() - exact.exp()).abs().max()
    silent = torch.where(advantages > 0, exact > clip_range, exact < -clip_range).sum()
    if reduction == "mean":
        assert error < clip_range / 10 and silent == 0
    else:
        assert error > clip_range and silent >= 6


# --- why the pull goes uphill ---


@pytest.mark.parametrize("seed", range(3))
def test_the_mean_pull_is_the_gradient_times_the_shape_of_the_neighborhood(seed):
    groups, size, dim, sigma = 20_000, 12, 3, 0.3
    # a linear solver: from the noise to t', and from the noise to the sample
    to_state, to_sample = randn((2, dim, dim), seeded(seed), dtype=torch.float64)
    slope = to_sample.T @ randn((dim,), seeded(seed, 1), dtype=torch.float64)  # of the reward, in the noise
    uphill = torch.linalg.solve(to_state.T, slope)  # of the reward, in the state
    noise = neighbor_noise(randn((groups, dim), seeded(4), dtype=torch.float64), size, sigma, seeded(5))
    states, advantages = noise @ to_state.T, group_advantages(noise @ slope)
    pulls = surrogate_gradient(states, states[:, 0], states[:, 0], advantages, 1.0, "sum")
    deviation = math.sqrt(2 / size) * math.exp(math.lgamma(size / 2) - math.lgamma((size - 1) / 2))
    formula = 2 * size * deviation * sigma / slope.norm() * to_state @ slope
    assert ((pulls.mean(0) - formula).abs() < 5 * pulls.std(0) / math.sqrt(groups)).all()
    assert pulls.mean(0) @ uphill > 0
