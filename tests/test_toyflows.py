"""The closed form that other checks rest on: against the score of its density, by autograd."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from neighbor_grpo.flow import implied_noise, randn, seeded
from neighbor_grpo.toyflows import flow_matching_loss, mixture_velocity

MEANS = torch.tensor([[-1.0, 0.5], [1.0, 0.0], [0.2, -2.0]], dtype=torch.float64)


def log_density(x, t, w0):
    "Of data mixed with noise, up to a constant."
    variance = (1 - t) ** 2 * w0**2 + t**2
    return (-(x[:, None] - (1 - t) * MEANS).square().sum(2) / (2 * variance)).logsumexp(1)


@given(st.floats(0.05, 0.95), st.floats(0.1, 1.0))
def test_the_noise_that_the_velocity_implies_is_the_score(t, w0):
    x = randn((50, 2), seeded(0), dtype=torch.float64).requires_grad_()
    (score,) = torch.autograd.grad(log_density(x, t, w0).sum(), x)
    with torch.no_grad():
        implied = implied_noise(x, mixture_velocity(x, t, means=MEANS, w0=w0), t)
    torch.testing.assert_close(-implied / t, score, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("w0", [0.2, 0.7])
def test_its_loss_is_the_least_that_is_possible(w0):
    mean, n = torch.tensor([[1.5, -0.5]]), 200_000
    x0 = mean + w0 * randn((n, 2), seeded(0))

    def exact(x, t, cond):
        return mixture_velocity(x, t, means=mean, w0=w0)

    # The mean square of one draw has a standard deviation below 1.3: six standard errors of the mean.
    loss = flow_matching_loss(exact, x0, generator=seeded(1)).item()
    assert abs(loss - math.pi / 2 * w0) < 6 * 1.3 / math.sqrt(n)
