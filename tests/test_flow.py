"""Conventions, random numbers, the flow-matching loss and its training."""

import pytest
import torch
from helpers import weights
from hypothesis import given
from hypothesis import strategies as st

from neighbor_grpo.flow import (
    denoised,
    expand_time,
    implied_noise,
    interpolate,
    randn,
    seeded,
    time_grid,
    velocity_target,
)
from neighbor_grpo.toyflows import (
    TimeEmbedding,
    VelocityMLP,
    eight_gaussians,
    flow_matching_loss,
    one_cycle,
    train_flow,
)

shifts = st.floats(0.2, 8)
times = st.floats(0, 1)


def pair(n=5, shape=(3, 4)):
    "Data and noise in float64."
    generator = seeded(1)
    return [randn((n, *shape), generator, dtype=torch.float64) for _ in range(2)]


# --- times ---


@given(st.integers(1, 60), shifts)
def test_time_grid_descends_from_one_to_zero(steps, shift):
    ts = time_grid(steps, shift)
    assert ts.shape == (steps + 1,) and ts.dtype == torch.float32
    assert ts[0] == 1 and ts[-1] == 0
    assert (ts[1:] < ts[:-1]).all()


@given(st.integers(1, 60), shifts)
def test_time_grid_is_the_shift_formula(steps, shift):
    expected = [shift * t / (1 + (shift - 1) * t) for t in (1 - k / steps for k in range(steps + 1))]
    torch.testing.assert_close(time_grid(steps, shift), torch.tensor(expected), atol=1e-6, rtol=0)


@given(shifts)
def test_shifts_up_and_down_mirror_each_other(shift):
    torch.testing.assert_close(time_grid(9, shift), 1 - time_grid(9, 1 / shift).flip(0), atol=1e-6, rtol=0)


def test_expand_time_broadcasts_over_samples():
    x = torch.zeros(5, 3, 4, dtype=torch.float64)
    assert expand_time(0.5, x).shape == (1, 1, 1)
    assert expand_time(torch.rand(5), x).shape == (5, 1, 1)
    assert expand_time(torch.rand(5), x).dtype == torch.float64


# --- the path and its velocity ---


def test_path_ends_at_data_and_noise():
    x0, noise = pair()
    assert torch.equal(interpolate(x0, noise, 0.0), x0)
    assert torch.equal(interpolate(x0, noise, 1.0), noise)


def test_velocity_is_the_derivative_of_the_path():
    x0, noise = pair()
    t = torch.full((5,), 0.3, dtype=torch.float64)
    _, slope = torch.func.jvp(lambda t: interpolate(x0, noise, t), (t,), (torch.ones_like(t),))
    torch.testing.assert_close(slope, velocity_target(x0, noise), atol=1e-14, rtol=0)


@given(times)
def test_data_and_noise_are_recovered_from_the_velocity(t):
    x0, noise = pair()
    x, v = interpolate(x0, noise, t), velocity_target(x0, noise)
    torch.testing.assert_close(denoised(x, v, t), x0, atol=1e-14, rtol=0)
    torch.testing.assert_close(implied_noise(x, v, t), noise, atol=1e-14, rtol=0)


@pytest.mark.parametrize("function", [interpolate, denoised, implied_noise])
def test_each_sample_may_have_its_own_time(function):
    a, b = pair()
    t = torch.rand(5, dtype=torch.float64)
    single = torch.cat([function(a[i : i + 1], b[i : i + 1], t[i].item()) for i in range(5)])
    assert torch.equal(function(a, b, t), single)


# --- random numbers ---


def test_seeded_depends_on_its_keys_alone():
    first = randn((4,), seeded(3, 1, 4))
    torch.manual_seed(99)
    seeded(3, 1, 5)
    torch.rand(10)
    assert torch.equal(first, randn((4,), seeded(3, 1, 4)))


def test_seeded_gives_every_key_its_own_stream():
    keys = [(0,), (1,), (0, 0), (0, 1), (1, 0), (0, 0, 0), (0, 0, 1), (0, 1, 0), (2**40, 7)]
    numbers = [tuple(randn((4,), seeded(*key)).tolist()) for key in keys]
    assert len(set(numbers)) == len(keys)


def test_seeded_leaves_the_global_generator_alone():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    randn((7,), seeded(0))
    assert torch.equal(torch.rand(3), expected)


@given(st.integers(1, 5), st.integers(1, 4))
def test_a_list_of_generators_gives_each_group_its_own_rows(groups, each):
    together = randn((groups * each, 3), [seeded(0, g) for g in range(groups)])
    alone = [randn((each, 3), seeded(0, g)) for g in range(groups)]
    assert torch.equal(together, torch.cat(alone))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_randn_draws_standard_normals(dtype):
    x = randn((200, 500), seeded(0), dtype=dtype)
    assert x.dtype == dtype
    assert abs(x.mean().item()) < 0.015 and abs(x.var().item() - 1) < 0.02


# --- learning a flow ---


def test_loss_is_zero_for_the_exact_velocity_to_one_point():
    point = torch.tensor([[0.5, -1.0]]).expand(64, 2)

    def exact(x, t, cond):
        return (x - point) / t[:, None]  # the only straight line through x_t and the point

    assert flow_matching_loss(exact, point, generator=seeded(0)).item() < 1e-6


def test_loss_is_the_mean_square_over_all_numbers():
    x0, _ = pair()

    def constant(x, t, cond):
        return torch.full_like(x, 0.25)

    noise = randn(x0.shape, seeded(7))
    expected = (0.25 - (noise - x0)).square().mean()
    torch.testing.assert_close(flow_matching_loss(constant, x0, generator=seeded(7)), expected)


def test_loss_passes_the_condition_and_covers_all_times():
    seen = []

    def velocity(x, t, cond):
        seen.append((t, cond))
        return x

    x0, cond = torch.zeros(4000, 2), object()
    flow_matching_loss(velocity, x0, cond, seeded(0))
    (t, passed), quantiles = seen[0], torch.tensor([0.1, 0.5, 0.9])
    assert passed is cond and t.shape == (4000,)
    torch.testing.assert_close(t.quantile(quantiles), quantiles, atol=0.03, rtol=0)


def test_network_is_smooth_in_time_and_ignores_the_condition():
    network, x = VelocityMLP(3, 16, 2), torch.randn(4, 3)
    t = torch.full((4,), 0.5)
    v = network(x, t)
    assert v.shape == x.shape and torch.equal(v, network(x, t, object()))
    assert (network(x, t + 1e-4) - v).abs().max() < 0.01 < (network(x, t + 0.4) - v).abs().max()


def test_time_embedding_tells_times_apart():
    embedding = TimeEmbedding(8)
    e = embedding(torch.tensor([0.0, 0.01, 0.5, 1.0]))
    assert e.shape == (4, 8) and torch.pdist(e).min() > 1e-3
    assert "frequencies" not in embedding.state_dict()


def train_small(seed, ema=0.9, steps=200):
    torch.manual_seed(0)
    network = VelocityMLP(2, 32, 2)
    average, losses = train_flow(
        network, lambda g: (eight_gaussians(64, g), None), steps, seed=seed, ema=ema, progress=False
    )
    return network, average, losses


def test_training_lowers_the_loss_and_repeats_itself():
    _, average, losses = train_small(0)
    assert len(losses) == 200 and not average.training
    assert sum(losses[-30:]) < 0.85 * sum(losses[:30])
    assert torch.equal(weights(average), weights(train_small(0)[1]))
    assert not torch.equal(weights(average), weights(train_small(1)[1]))


def test_average_without_memory_is_the_last_network():
    network, average, _ = train_small(0, ema=0.0, steps=5)
    torch.testing.assert_close(weights(average), weights(network), atol=1e-7, rtol=1e-6)


@pytest.mark.parametrize("steps", [1, 2, 10, 20, 40])
@pytest.mark.parametrize("rise", [0.1, 0.05])
def test_the_rate_rises_and_falls_once(steps, rise):
    optimizer = torch.optim.AdamW([torch.zeros(1, requires_grad=True)])
    schedule, rates = one_cycle(optimizer, 1e-3, steps, rise), []
    for step in range(steps):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        if step < steps - 1:
            schedule.step()
    top = rates.index(max(rates))
    assert rates[: top + 1] == sorted(rates[: top + 1]) and rates[top:] == sorted(rates[top:], reverse=True)
    assert 0 < rates[-1] <= max(rates) <= 1e-3 * (1 + 1e-9) and (steps < 10 or rates[-1] < 1e-6 < 5e-4 < max(rates))


def test_eight_gaussians_lie_on_a_circle():
    x = eight_gaussians(8000, seeded(0), radius=2.0, std=0.15)
    angle = torch.atan2(x[:, 1], x[:, 0]) / (torch.pi / 4)
    mode = angle.round().long() % 8
    assert (mode.bincount(minlength=8) / 8000 - 1 / 8).abs().max() < 0.02
    for k in range(8):
        members = x[mode == k]
        mean = 2 * torch.tensor([torch.tensor(k * torch.pi / 4).cos(), torch.tensor(k * torch.pi / 4).sin()])
        torch.testing.assert_close(members.mean(0), mean, atol=0.03, rtol=0)
        assert (members.std(0) - 0.15).abs().max() < 0.02
