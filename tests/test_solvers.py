"""Deterministic solvers: against diffusers' schedulers, closed forms and their orders of convergence."""

import math

import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler, FlowMatchHeunDiscreteScheduler
from helpers import Counted, GaussianFlow
from hypothesis import given
from hypothesis import strategies as st

from neighbor_grpo.flow import randn, seeded, time_grid
from neighbor_grpo.solvers import METHODS, ab2_step, dpm2m_step, euler_step, solve, step_response
from neighbor_grpo.toyflows import VelocityMLP

# --- diffusers ---


def euler_scheduler():
    return FlowMatchEulerDiscreteScheduler(shift=3.0)


def heun_scheduler():
    return FlowMatchHeunDiscreteScheduler(shift=3.0)


def dpm_scheduler():
    return DPMSolverMultistepScheduler(
        prediction_type="flow_prediction",
        use_flow_sigmas=True,
        flow_shift=3.0,
        algorithm_type="dpmsolver++",
        solver_type="midpoint",
        solver_order=2,
    )


SCHEDULERS = {"euler": euler_scheduler, "heun": heun_scheduler, "dpm++2m": dpm_scheduler}


def run_scheduler(scheduler, velocity, x):
    "The state after each call of a diffusers scheduler that is given the velocity at its sigmas, not its timesteps."
    states = [x]
    for k, timestep in enumerate(scheduler.timesteps):
        v = velocity(x, scheduler.sigmas[k].expand(len(x)), None)
        x = scheduler.step(v, timestep, x).prev_sample
        states.append(x)
    return states


def network_and_noise():
    torch.manual_seed(0)
    network = VelocityMLP(4, 32, 2).requires_grad_(False)
    for p in network.parameters():
        p *= 1.5  # a velocity that bends
    return network, randn((6, 4), seeded(2))


@pytest.mark.parametrize("steps", [2, 3, 8, 25])
@pytest.mark.parametrize("grid", ["theirs", "ours"])
@pytest.mark.parametrize("method", SCHEDULERS)
def test_solver_equals_diffusers(method, grid, steps):
    scheduler, (network, x) = SCHEDULERS[method](), network_and_noise()
    scheduler.set_timesteps(steps)
    calls = 2 if method == "heun" else 1  # of a step; Heun's scheduler lists its inner times twice
    if grid == "ours":
        ts = time_grid(steps, 3.0)
        scheduler.sigmas = torch.cat([ts[:1], ts[1:-1].repeat_interleave(calls), ts[-1:]])
    ts = torch.cat([scheduler.sigmas[::calls][:steps], torch.zeros(1)])
    states = run_scheduler(scheduler, network, x)
    theirs = torch.stack(states[::calls][:steps] + states[-1:])
    ours = solve(network, x, ts, method=method).x
    assert theirs.shape == ours.shape and (theirs[-1] - x).abs().max() > 0.1
    assert (ours - theirs).abs().max() < 1e-5


# --- closed forms ---


def end_error(method, steps, start=0.95, end=0.2):
    "Error at t = end of a trajectory that starts exactly, in float64."
    flow, z = GaussianFlow(), torch.tensor([[-1.3, 0.2], [0.5, 2.1]], dtype=torch.float64)
    ts = torch.linspace(start, end, steps + 1, dtype=torch.float64)
    path = solve(flow.velocity, flow.state(z, start), ts, method=method)
    return (path.x[-1] - flow.state(z, end)).abs().max().item()


@pytest.mark.parametrize(("method", "order"), [("euler", 1), ("heun", 2), ("dpm++2m", 2), ("ab2", 2)])
def test_order_of_convergence(method, order):
    errors = {steps: end_error(method, steps) for steps in (32, 64, 128)}
    for steps in (32, 64):
        assert abs(math.log2(errors[steps] / errors[2 * steps]) - order) < 0.15
    assert errors[128] < (3e-3 if order == 1 else 1e-4)


@pytest.mark.parametrize("method", METHODS)
def test_straight_lines_are_exact(method):
    x0, noise = (randn((5, 3), seeded(k), dtype=torch.float64) for k in range(2))
    path = solve(lambda x, t, cond: noise - x0, noise, time_grid(7, 2.0), method=method)
    torch.testing.assert_close(path.x[-1], x0, atol=1e-12, rtol=0)


@given(t_prev=st.floats(0.7, 0.99), t=st.floats(0.3, 0.69), t_next=st.floats(0.01, 0.29))
def test_dpm2m_is_exact_where_the_estimate_is_linear_in_log_snr(t_prev, t, t_next):
    def log_snr(t):
        return math.log((1 - t) / t)

    x = torch.tensor([[0.4]], dtype=torch.float64)

    def at(s):
        return torch.tensor([[log_snr(s)]], dtype=torch.float64)

    middle = log_snr(t) + (log_snr(t_next) - log_snr(t)) / 2  # where "midpoint" evaluates the extrapolated estimate
    expected = t_next / t * x + (1 - t_next / t) * middle
    step = dpm2m_step(x, (x - at(t)) / t, at(t_prev), t_prev, t, t_next)
    torch.testing.assert_close(step, expected, atol=1e-11, rtol=1e-11)


@given(t_prev=st.floats(0.7, 1), t=st.floats(0.3, 0.69), t_next=st.floats(0, 0.29))
def test_ab2_is_exact_for_velocities_linear_in_time(t_prev, t, t_next):
    x = torch.tensor([[0.4]], dtype=torch.float64)

    def v(s):
        return torch.tensor([[2 * s - 0.5]], dtype=torch.float64)

    expected = x + (t_next**2 - 0.5 * t_next) - (t**2 - 0.5 * t)
    torch.testing.assert_close(ab2_step(x, v(t), v(t_prev), t_prev, t, t_next), expected, atol=1e-13, rtol=0)


# --- what a trajectory holds ---


@pytest.mark.parametrize("method", METHODS)
def test_trajectory_holds_states_velocities_and_their_count(method):
    network, x = network_and_noise()
    counted, ts = Counted(network), time_grid(6, 3.0)
    path = solve(counted, x, ts, method=method)
    assert path.x.shape == (7, 6, 4) and path.v.shape == (6, 6, 4) and torch.equal(path.ts, ts)
    assert torch.equal(path.x[0], x)
    assert path.nfe == counted.calls == (11 if method == "heun" else 6)
    for k in range(6):
        assert torch.equal(path.v[k], network(path.x[k], ts[k].expand(6)))


@pytest.mark.parametrize("method", METHODS)
def test_first_step_from_noise_and_last_step_to_data(method):
    network, x = network_and_noise()
    path = solve(network, x, time_grid(6), method=method)
    first = euler_step(path.x[0], path.v[0], path.ts[0], path.ts[1])
    last = euler_step(path.x[-2], path.v[-1], path.ts[-2], path.ts[-1])
    assert torch.equal(path.x[1], first) == (method != "heun")
    assert torch.equal(path.x[-1], last) == (method != "ab2")


@pytest.mark.parametrize("method", METHODS)
def test_condition_dtype_and_rows_pass_through(method):
    flow, cond, seen = GaussianFlow(), object(), []

    def velocity(x, t, c):
        seen.append(c)
        return flow.velocity(x, t)

    x = randn((4, 2, 3), seeded(0), dtype=torch.float64)
    path = solve(velocity, x, time_grid(5), cond, method)
    assert path.x.dtype == path.ts.dtype == torch.float64 and all(c is cond for c in seen)
    for i in range(4):  # nothing leaks from one sample into another
        torch.testing.assert_close(solve(flow.velocity, x[i : i + 1], time_grid(5), None, method).x[:, 0], path.x[:, i])


def test_euler_step_takes_a_time_for_each_sample():
    x, v = (randn((5, 2, 3), seeded(k), dtype=torch.float64) for k in range(2))
    t, t_next = torch.linspace(0.6, 1, 5), torch.linspace(0.1, 0.5, 5)
    single = [euler_step(x[i : i + 1], v[i : i + 1], t[i].item(), t_next[i].item()) for i in range(5)]
    assert torch.equal(euler_step(x, v, t, t_next), torch.cat(single))


@given(st.integers(1, 12), st.floats(0.3, 5), st.sampled_from(METHODS))
def test_a_point_mass_is_reached_exactly(steps, shift, method):
    point = torch.tensor([[0.3, -0.8]], dtype=torch.float64)
    noise = randn((4, 2), seeded(1), dtype=torch.float64)
    path = solve(lambda x, t, cond: (x - point) / t[:, None], noise, time_grid(steps, shift), method=method)
    torch.testing.assert_close(path.x[-1], point.expand(4, 2), atol=1e-12, rtol=0)


# --- what a step makes of its velocity ---


@pytest.mark.parametrize("method", ["euler", "dpm++2m", "ab2"])
@given(steps=st.integers(1, 9), shift=st.floats(0.5, 4))
def test_response_is_the_derivative_of_the_step(method, steps, shift):
    ts = time_grid(steps, shift).double()
    v = torch.zeros(steps, dtype=torch.float64, requires_grad=True)
    at = {t: k for k, t in enumerate(ts.tolist())}
    path = solve(lambda x, t, cond: v[at[t[0].item()]].expand_as(x), torch.zeros(1, 1).double(), ts, method=method)
    derivative = torch.stack([torch.autograd.grad(x.sum(), v, retain_graph=True)[0] for x in path.x[1:]]).diagonal()
    torch.testing.assert_close(step_response(ts, method), derivative, rtol=1e-9, atol=1e-9)
