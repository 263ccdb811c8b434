"""Gaussian steps against an independent derivation, and what they leave of the marginals."""

import math
from functools import partial

import pytest
import torch
from helpers import Counted, GaussianFlow, PointwiseVelocity, reverse_sde
from hypothesis import given
from hypothesis import strategies as st
from torch.distributions import Normal

from neighbor_grpo.flow import randn, seeded, time_grid
from neighbor_grpo.rivals.sde import cps, dance_sde, flow_sde, gaussian_log_prob, solve_sde
from neighbor_grpo.solvers import euler_step, solve

late, early = st.floats(0.02, 0.45), st.floats(0.5, 0.98)
STEPS = [flow_sde, dance_sde, cps]


def states(n=4, shape=(2, 3)):
    "States and velocities in float64."
    return [randn((n, *shape), seeded(k), dtype=torch.float64) for k in range(2)]


def assert_same_step(step, expected):
    (mean, std), (expected_mean, expected_std) = step, expected
    assert (mean - expected_mean).abs().max() < 1e-12
    assert (std - expected_std).abs().max() < 1e-12


# --- the steps ---


@given(early, late, st.floats(0, 1.5))
def test_flow_sde_is_the_reverse_sde_with_growing_noise(t, t_next, a):
    x, v = states()
    diffusion = a * math.sqrt(t / (1 - t))
    assert_same_step(flow_sde(x, v, t, t_next, a), reverse_sde(x, v, t, t_next, diffusion))


@given(late, st.floats(0.5, 0.99), st.floats(0, 1.5))
def test_flow_sde_replaces_the_infinite_noise_at_the_start(t_next, t_max, a):
    x, v = states()
    for given_max, used in ((t_max, t_max), (None, t_next)):
        diffusion = a * math.sqrt(1 / (1 - used))
        assert_same_step(flow_sde(x, v, 1.0, t_next, a, given_max), reverse_sde(x, v, 1.0, t_next, diffusion))


def test_flow_sde_uses_the_replacement_at_the_start_only():
    x, v = states()
    assert torch.equal(flow_sde(x, v, 0.8, 0.5, 0.7, 0.95)[0], flow_sde(x, v, 0.8, 0.5, 0.7)[0])


@given(early, late, st.floats(0, 1.5))
def test_dance_sde_is_the_reverse_sde_with_constant_noise(t, t_next, eta):
    x, v = states()
    assert_same_step(dance_sde(x, v, t, t_next, eta), reverse_sde(x, v, t, t_next, eta))


@given(early, st.one_of(st.just(0.0), late), st.floats(0, 0.99))
def test_cps_keeps_the_coefficients(t, t_next, a):
    x, v = states()
    x0, noise = x - t * v, x + (1 - t) * v
    std = t_next * math.sin(a * math.pi / 2)
    kept = t_next * math.cos(a * math.pi / 2)  # sin^2 + cos^2 = 1
    assert_same_step(
        cps(x, v, t, t_next, a), ((1 - t_next) * x0 + kept * noise, torch.tensor(std, dtype=torch.float64))
    )


@given(early, st.one_of(st.just(0.0), late), st.floats(0, 1))
def test_the_sampler_of_precise_is_cps(t, t_next, rho):
    "`x' = (1 - t') x0_hat + t' (rho eps_hat + sqrt(1 - rho^2) w)`: every rho in [0, 1] is a noise level of CPS."
    (x, v), w = states(), randn((4, 2, 3), seeded(5), dtype=torch.float64)
    expected = (1 - t_next) * (x - t * v) + t_next * (rho * (x + (1 - t) * v) + math.sqrt(1 - rho**2) * w)
    mean, std = cps(x, v, t, t_next, math.acos(rho) * 2 / math.pi)
    assert (mean + std * w - expected).abs().max() < 1e-12


@given(early, st.one_of(st.just(0.0), late))
def test_a_step_without_noise_is_an_euler_step(t, t_next):
    x, v = states()
    for step in STEPS:
        assert_same_step(step(x, v, t, t_next, 0.0), (euler_step(x, v, t, t_next), torch.tensor(0.0)))


@pytest.mark.parametrize("step", STEPS)
def test_each_sample_may_have_its_own_time(step):
    x, v = states()
    t, t_next = torch.tensor([1.0, 0.9, 0.7, 0.5]).double(), torch.tensor([0.9, 0.7, 0.5, 0.0]).double()
    mean, std = step(x, v, t, t_next)
    for i in range(4):
        alone = step(x[i : i + 1], v[i : i + 1], t[i].item(), t_next[i].item())
        assert_same_step((mean[i : i + 1], std[i : i + 1]), alone)


# --- densities ---


@given(st.integers(1, 5), st.floats(0.01, 3))
def test_log_prob_is_the_mean_over_a_sample(n, std):
    x, mean = (randn((n, 2, 3), seeded(k), dtype=torch.float64) for k in range(2))
    std = std * (1 + torch.arange(n, dtype=torch.float64)).reshape(n, 1, 1)
    expected = Normal(mean, std.expand_as(mean)).log_prob(x).mean((1, 2))
    assert (gaussian_log_prob(x, mean, std) - expected).abs().max() < 1e-12 * expected.abs().max().clamp_min(1)


def test_log_prob_of_half_precision_is_computed_in_float32():
    x, mean = (randn((3, 8), seeded(k)).bfloat16() for k in range(2))
    log_prob = gaussian_log_prob(x, mean, torch.tensor(0.1).bfloat16())
    assert log_prob.dtype == torch.float32
    torch.testing.assert_close(
        log_prob, gaussian_log_prob(x.float(), mean.float(), torch.tensor(0.1).bfloat16().float())
    )


@given(st.sampled_from(STEPS), early, late, st.floats(0.05, 0.95), st.integers(0, 99))
def test_log_prob_of_a_drawn_step_equals_an_independent_one(step, t, t_next, level, seed):
    x, v = states()
    if step is cps:  # the Euler step, of whose noise part a share is renewed
        kept, std = math.cos(level * math.pi / 2), t_next * math.sin(level * math.pi / 2)
        mean = x + (t_next - t) * v - t_next * (1 - kept) * (x + (1 - t) * v)
    else:
        mean, std = reverse_sde(x, v, t, t_next, level * (math.sqrt(t / (1 - t)) if step is flow_sde else 1))
    drawn = mean + std * randn(x.shape, seeded(2, seed), dtype=torch.float64)
    expected = Normal(mean, std).log_prob(drawn).flatten(1).mean(1)
    assert_same_step(step(x, v, t, t_next, level), (mean, torch.tensor(std, dtype=torch.float64)))
    difference = gaussian_log_prob(drawn, *step(x, v, t, t_next, level)) - expected
    assert difference.abs().max() < 1e-12 * max(1, 1 / std)  # dividing by a small std magnifies a rounding


# --- sampling ---


def marginal_errors(step, steps):
    "Errors of mean and standard deviation at t = 0.1 when a Gaussian flow is sampled from t = 0.9 on."
    flow = GaussianFlow(0.7, 0.5)
    ts = torch.linspace(0.9, 0.1, steps + 1, dtype=torch.float64).tolist()
    mean, variance = (1 - ts[0]) * flow.mean, flow.spread(ts[0]) ** 2
    for t, t_next in zip(ts[:-1], ts[1:], strict=True):
        x = torch.tensor([[mean], [mean + 1]], dtype=torch.float64)  # the step is affine in x: two points tell it all
        at, std = step(x, flow.velocity(x, t), t, t_next)
        mean, variance = at[0].item(), (at[1] - at[0]).item() ** 2 * variance + std.flatten()[0].item() ** 2
    return abs(mean - (1 - ts[-1]) * flow.mean), abs(math.sqrt(variance) - flow.spread(ts[-1]))


@pytest.mark.parametrize("step", [partial(flow_sde, noise_level=0.7), partial(dance_sde, eta=0.6)])
def test_small_steps_keep_the_marginals(step):
    coarse, fine = max(marginal_errors(step, 200)), max(marginal_errors(step, 400))
    assert fine < 2e-3 and 1.7 < coarse / fine < 2.3  # first order


@pytest.mark.parametrize("a", [0.5, 0.8])
def test_the_first_steps_of_flow_sde_leave_an_error_of_order_a_squared(a):
    # Near t = 1 the variance is off by an amount that does not shrink with the step; later steps forget it as T^(-a^2).
    flow, errors = GaussianFlow(0.0, 1.0), []
    for steps in (2**14, 2**15):
        ts = torch.linspace(1, 0, steps + 1, dtype=torch.float64)
        x, t, t_next = torch.ones(steps, 1, dtype=torch.float64), ts[:-1], ts[1:]
        slope, std = flow_sde(x, flow.velocity(x, t), t, t_next, a)
        variance = 1.0
        for g, s in torch.cat([slope, std], 1).tolist():
            variance = g**2 * variance + s**2
        errors.append(abs(math.sqrt(variance) - 1))
    assert abs(math.log2(errors[0] / errors[1]) - a**2) < 0.05


def test_small_steps_of_cps_keep_the_marginals_when_little_noise_is_renewed_in_each():
    # Each step renews a share sin^2 of the noise, so the share per unit of time stays the same when a ~ T^(-1/2).
    coarse, fine = (max(marginal_errors(partial(cps, noise_level=0.8 / math.sqrt(n)), n)) for n in (200, 400))
    assert fine < 2e-3 and 1.7 < coarse / fine < 2.3  # first order
    large = max(max(marginal_errors(partial(cps, noise_level=0.5), n)) for n in (200, 400))
    assert large > 0.02  # of a fixed share there is ever more noise: no limit, whatever the number of steps


@pytest.mark.parametrize("a", [0.1, 0.5, 1.0])
def test_cps_keeps_the_marginals_of_a_point_exactly(a):
    flow = GaussianFlow(0.7, 1e-9)
    for t, t_next in ((1.0, 0.7), (0.6, 0.2)):
        x = (1 - t) * flow.mean + torch.tensor([[0.0], [t]], dtype=torch.float64)
        at, std = cps(x, flow.velocity(x, t), t, t_next, a)
        assert abs(at[0].item() - (1 - t_next) * flow.mean) < 1e-8
        assert abs((at[1] - at[0]).item() ** 2 + std.item() ** 2 - t_next**2) < 1e-8


@pytest.mark.parametrize(
    "step", [partial(flow_sde, noise_level=0.7), partial(dance_sde, eta=0.6), partial(cps, noise_level=0.03)]
)
def test_samples_have_the_marginals_of_the_ode(step):
    flow, count = GaussianFlow(0.7, 0.5), 20_000
    ts = torch.linspace(0.9, 0.1, 301, dtype=torch.float64)
    x = flow.state(randn((count, 1), seeded(0), dtype=torch.float64), 0.9)
    sampled = solve_sde(flow.velocity, x, ts, step, generator=seeded(1)).x[-1]
    solved = solve(flow.velocity, x, ts, method="heun").x[-1]
    assert (sampled - solved).abs().mean() > 0.05  # other samples
    for drawn in (sampled, solved):
        z = (drawn - (1 - 0.1) * flow.mean) / flow.spread(0.1)
        assert abs(z.mean()) < 4 / math.sqrt(count) and abs(z.square().mean() - 1) < 4 * math.sqrt(2 / count)
    together = torch.cat([sampled, solved], 1).sort(0).values.quantile(torch.linspace(0.01, 0.99, 50).double(), 0)
    assert (together[:, 0] - together[:, 1]).abs().max() < 0.05 * flow.spread(0.1)


def test_sampling_replays_from_its_own_noise():
    velocity, ts = PointwiseVelocity().double(), time_grid(4).double()
    x = randn((6, 3), seeded(0), dtype=torch.float64)
    step, generator = partial(dance_sde, eta=0.5), seeded(1)
    with torch.no_grad():
        counted = Counted(velocity)
        path = solve_sde(counted, x, ts, step, generator=seeded(1), noisy=[True, False, True, False])
        assert path.nfe == counted.calls == 4 and torch.equal(path.x[0], x)
        for k in range(4):
            v = velocity(path.x[k], ts[k].expand(6))
            assert torch.equal(path.v[k], v)
            expected = euler_step(path.x[k], v, ts[k], ts[k + 1])
            if k % 2 == 0:
                mean, std = step(path.x[k], v, ts[k], ts[k + 1])
                expected = mean + std * randn(x.shape, generator, dtype=torch.float64)
            assert torch.equal(path.x[k + 1], expected)


def test_sampling_without_noisy_steps_is_the_euler_solver():
    velocity, x = PointwiseVelocity(), randn((6, 3), seeded(0))
    with torch.no_grad():
        quiet = solve_sde(velocity, x, time_grid(5), dance_sde, generator=seeded(1), noisy=[False] * 5)
        assert torch.equal(quiet.x, solve(velocity, x, time_grid(5), method="euler").x)


def test_noise_has_the_stated_spread_and_is_fresh_in_every_step():
    x = torch.zeros(20_000, 1, dtype=torch.float64)

    def still(x, t, cond):
        return torch.zeros_like(x)

    path = solve_sde(
        still, x, torch.tensor([0.8, 0.6, 0.5]), lambda x, v, t, t_next: (x, torch.tensor(0.3)), None, seeded(0)
    )
    first, second = path.x[1] - path.x[0], path.x[2] - path.x[1]
    for increment in (first, second):
        assert abs(increment.std().item() - 0.3) < 0.006 and abs(increment.mean().item()) < 0.008
    assert abs(torch.corrcoef(torch.cat([first, second], 1).T)[0, 1].item()) < 0.03


def test_a_group_sampled_alone_is_the_same():
    velocity, x = PointwiseVelocity(), randn((6, 3), seeded(0))
    with torch.no_grad():
        together = solve_sde(velocity, x, time_grid(5), dance_sde, generator=[seeded(1, g) for g in range(3)])
        alone = solve_sde(velocity, x[2:4], time_grid(5), dance_sde, generator=[seeded(1, 1)])
    assert torch.equal(together.x[:, 2:4], alone.x)
