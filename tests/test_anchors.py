"""Which candidates are trained, and how equidistant a group is."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from neighbor_grpo.anchors import distance_spread, sample_anchors, sample_subsets
from neighbor_grpo.flow import randn, seeded
from neighbor_grpo.leaping import leaping_log_probs
from neighbor_grpo.neighbors import neighbor_noise

sizes = st.integers(1, 12).flatmap(lambda total: st.tuples(st.just(total), st.integers(1, total)))


@given(sizes, st.integers(1, 5), st.integers(0, 100))
def test_anchors_are_distinct_members_of_each_group(size, groups, seed):
    members, count = size
    chosen = sample_anchors(groups, members, count, seeded(seed))
    assert chosen.shape == (groups, count) and chosen.dtype == torch.int64
    assert all(len(set(row)) == count and 0 <= min(row) and max(row) < members for row in chosen.tolist())


@given(st.integers(1, 5), st.integers(0, 100))
def test_a_group_chosen_alone_is_the_same(groups, seed):
    together = sample_anchors(groups, 12, 4, [seeded(seed, g) for g in range(groups)])
    for g in range(groups):
        assert torch.equal(sample_anchors(1, 12, 4, [seeded(seed, g)])[0], together[g])


def test_every_member_and_every_pair_is_equally_likely():
    rows = sample_subsets(6000, 6, 2, seeded(0))
    counts = torch.zeros(6, 6).index_put((rows[:, 0], rows[:, 1]), torch.ones(6000), accumulate=True)
    assert counts.diagonal().sum() == 0
    expected = 6000 / 30  # ordered pairs; a standard deviation is 14
    off_diagonal = counts[~torch.eye(6, dtype=torch.bool)]
    assert (off_diagonal - expected).abs().max() < 60


def test_groups_choose_independently():
    rows = sample_subsets(4000, 5, 1, seeded(0)).flatten()
    repeated = (rows[1:] == rows[:-1]).float().mean().item()
    assert abs(repeated - 1 / 5) < 0.03


# --- near-equidistance ---


def test_a_regular_simplex_has_no_spread():
    simplex = torch.eye(5, dtype=torch.float64)[None]
    assert distance_spread(simplex).item() < 1e-12


def test_spread_by_hand():
    line = torch.tensor([[[0.0], [1.0], [3.0]]], dtype=torch.float64)  # squared distances 1, 4, 9
    mean = 14 / 3
    expected = math.sqrt(((1 - mean) ** 2 + (4 - mean) ** 2 + (9 - mean) ** 2) / 3) / mean
    assert distance_spread(line).item() == pytest.approx(expected)


@given(st.floats(0.01, 100), st.floats(-5, 5))
def test_spread_ignores_scale_and_offset(scale, offset):
    x = randn((2, 5, 3), seeded(0), dtype=torch.float64)
    torch.testing.assert_close(distance_spread(scale * x + offset), distance_spread(x), atol=1e-8, rtol=1e-8)


@pytest.mark.parametrize("dimension", [16, 64, 784, 4096])
def test_spread_falls_with_dimension(dimension):
    spread = distance_spread(randn((40, 12, dimension), seeded(0))).mean().item()
    assert spread == pytest.approx(math.sqrt(2 / dimension), rel=0.12)


def test_groups_in_the_plane_are_not_equidistant():
    assert distance_spread(randn((40, 12, 2), seeded(0))).mean().item() > 0.8


def test_identical_candidates_give_no_nan():
    assert torch.equal(distance_spread(torch.ones(2, 4, 3)), torch.zeros(2))


@pytest.mark.parametrize("time", [1.0, 0.5, 0.0])
def test_along_a_flow_the_effective_dimension_counts(time):
    eigenvalues = 1 / torch.arange(1, 401, dtype=torch.float64)
    scales = ((1 - time) ** 2 * eigenvalues + time**2).sqrt()  # of the linear flow onto this Gaussian
    effective = scales.square().sum() ** 2 / scales.pow(4).sum()
    groups = neighbor_noise(randn((200, 400), seeded(0), dtype=torch.float64), 12, 0.3, seeded(1)) * scales
    formula = (2 / effective * (1 - 1 / 11)).sqrt().item()
    assert distance_spread(groups).mean().item() == pytest.approx(formula, rel=0.08)


# --- off policy ---


@pytest.mark.parametrize("dimension", [2, 64, 4096])
def test_one_number_is_all_that_distinguishes_anchors(dimension):
    "After the same move of all anchors, their log-ratios differ by log Z_b, and in high dimension by little."
    shares = []
    for seed in range(50):
        base = randn((1, dimension), seeded(seed, 0), dtype=torch.float64)
        group = neighbor_noise(base, 12, 0.3, seeded(seed, 1))[0]
        temperature = torch.pdist(group).square().mean().item() / dimension
        move = 1e-3 * randn((dimension,), seeded(seed, 2), dtype=torch.float64)
        new, old = (leaping_log_probs(group.expand(12, -1, -1), at, temperature) for at in (group + move, group))
        normalizer = (new - old).mean(1, keepdim=True)
        common = new - old - normalizer
        assert (common - common[0]).abs().max() < 1e-12
        shares.append((normalizer.std() / common[0].std()).item())
    if dimension == 2:
        assert sum(shares) / 50 > 0.3
    if dimension == 4096:  # what is left is the anchor's own weight
        assert sum(shares) / 50 == pytest.approx((1 - math.exp(-1)) / (1 + 11 * math.exp(-1)), abs=0.005)
