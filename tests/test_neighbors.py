"""Neighbours are standard normal, correlated with their base and with each other, and drawn per group."""

import math

import pytest
import torch
from helpers import correlation
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import kstest

from neighbor_grpo.flow import randn, seeded
from neighbor_grpo.neighbors import neighbor_noise

SIGMAS = [0.05, 0.3, 0.7, 1.0]


def draw(sigma, groups=100, size=5, numbers=400):
    base = randn((groups, numbers), seeded(0), dtype=torch.float64)
    return base, neighbor_noise(base, size, sigma, seeded(1))


@pytest.mark.parametrize("sigma", SIGMAS)
def test_every_neighbour_is_standard_normal(sigma):
    _, noise = draw(sigma)
    for member in noise.unbind(1):  # 40,000 numbers: bounds of about four standard errors
        assert abs(member.mean().item()) < 0.02
        assert abs(member.var().item() - 1) < 0.03
        assert kstest(member.flatten().numpy(), "norm").statistic < 0.012


@pytest.mark.parametrize("sigma", SIGMAS)
def test_correlation_with_the_base(sigma):
    base, noise = draw(sigma)
    for member in noise.unbind(1):
        assert abs(correlation(member, base) - math.sqrt(1 - sigma**2)) < 0.02


@pytest.mark.parametrize("sigma", SIGMAS)
def test_correlation_between_neighbours(sigma):
    _, noise = draw(sigma)
    for i in range(1, 5):
        assert abs(correlation(noise[:, 0], noise[:, i]) - (1 - sigma**2)) < 0.02


def test_groups_are_independent():
    _, noise = draw(0.3)
    assert abs(correlation(noise[:-1], noise[1:])) < 0.01


@given(st.integers(1, 4), st.integers(1, 6), st.floats(0.01, 1))
def test_a_group_drawn_alone_is_the_same(groups, size, sigma):
    base = randn((groups, 2, 3), seeded(0))
    together = neighbor_noise(base, size, sigma, [seeded(1, g) for g in range(groups)])
    assert together.shape == (groups, size, 2, 3)
    for g in range(groups):
        assert torch.equal(neighbor_noise(base[g : g + 1], size, sigma, seeded(1, g))[0], together[g])


@given(st.floats(0.01, 1))
def test_neighbours_scale_one_direction(sigma):
    base = randn((2, 7), seeded(0), dtype=torch.float64)

    def direction(s):
        return (neighbor_noise(base, 3, s, seeded(1)) - math.sqrt(1 - s**2) * base[:, None]) / s

    torch.testing.assert_close(direction(sigma), direction(1.0), atol=1e-10, rtol=0)


def test_dtype_of_the_base_is_kept():
    assert draw(0.3)[1].dtype == torch.float64
    assert neighbor_noise(torch.zeros(2, 3), 4, 0.3, seeded(0)).dtype == torch.float32
