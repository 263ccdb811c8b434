"""NormGuard, the penalty on velocities that are longer than the reference's, against plain loops in float64."""

import math

import pytest
import torch
from helpers import SmallNet, gradients
from hypothesis import given
from hypothesis import strategies as st
from test_algorithms import SMALL, Asked, OneUpdate, collected, listed

from neighbor_grpo.lab.compare import Variant, cost
from neighbor_grpo.penalties import NormPenalty, VelocityPenalty, evaluations
from neighbor_grpo.rollouts import Watched
from neighbor_grpo.training import TrainSettings

some = pytest.mark.parametrize("name", ["neighbor", "flow", "nft"])


def added(penalty, v, wanted, weights=1.0):
    "What a penalty adds to the loss where the policy answers `v` and the reference `wanted`, and its gradient."
    v = v.clone().requires_grad_()
    policy = Watched(lambda *inputs: v)
    policy(None, None)
    loss = penalty.distance(policy, lambda *inputs: wanted, weights)
    return loss.detach(), torch.autograd.grad(loss, v)[0]


@some
def test_only_velocities_longer_than_the_references_are_penalized(name):
    algorithm = SMALL[name]
    torch.manual_seed(0)
    network, reference = SmallNet(), SmallNet()
    plain, guarded = (OneUpdate(algorithm, network, reference, norm_weight=w).gradient for w in (0.0, 0.7))

    generators, noise = collected(algorithm)
    rollout = algorithm.rollout(network, noise, None, generators)
    network.zero_grad()
    terms = []
    for k, g, i in listed(algorithm.choose(rollout, generators)):
        ts = (rollout.ts if rollout.ts.ndim == 1 else rollout.ts[:, g]).double()
        v, v_ref = (net(rollout.x[k, g, i][None].double(), ts[k][None]).flatten() for net in (network, reference))
        lengths = [math.sqrt(sum(n.item() ** 2 for n in u)) for u in (v, v_ref)]
        if lengths[0] > lengths[1]:
            size = sum(n * n for n in v) ** 0.5
            terms.append((size - lengths[1]) ** 2 / len(v))
        else:
            terms.append(0 * v.sum())
    longer = [term.item() > 0 for term in terms]
    assert any(longer) and not all(longer)
    (0.7 * sum(terms) / len(terms)).backward()
    assert (guarded - plain - gradients(network)).abs().max() < 1e-12 < (guarded - plain).abs().max()


@given(st.integers(0, 999), st.floats(0, 3), st.integers(1, 7))
def test_along_the_references_velocity_it_is_the_distance_and_elsewhere_less(seed, factor, size):
    draw = torch.Generator().manual_seed(seed)
    v, wanted = torch.randn(2, 5, size, 2, dtype=torch.float64, generator=draw)
    guard, keep = NormPenalty(0.3), VelocityPenalty(0.3)
    assert added(guard, v, wanted)[0] <= added(keep, v, wanted)[0] + 1e-12  # the triangle inequality
    along, expected = (added(penalty, factor * wanted, wanted) for penalty in (guard, keep))
    for own, theirs in zip(along, expected):
        torch.testing.assert_close(own, theirs if factor > 1 else torch.zeros_like(theirs), atol=1e-12, rtol=1e-9)


def test_a_policy_that_stands_still_has_a_finite_gradient_and_nothing_weighs_a_length():
    still = torch.zeros(2, 3)
    assert torch.equal(added(NormPenalty(1.0), still, still)[1], still)
    v = torch.full((2, 4), 2.0)
    assert added(NormPenalty(1.0), v, v / 2, torch.tensor([5.0, 7.0]))[0] == added(NormPenalty(1.0), v, v / 2)[0] == 2


@some
def test_its_evaluations_are_those_reported_and_those_that_a_comparison_counts(name):
    algorithm, policy, reference = SMALL[name], Asked(), Asked()
    run, samples = OneUpdate(algorithm, policy, reference, norm_weight=0.1), 3 * SMALL[name].group_size
    asked = (policy.rows[True], reference.rows[False])
    assert asked == tuple(samples * count for count in evaluations(algorithm, run.penalties)) and asked[1] > 0
    variant = Variant(name, algorithm, TrainSettings(groups=3, norm_weight=0.1))
    row = dict(nfe_old=algorithm.nfe_old, nfe_theta=algorithm.nfe_theta)
    assert cost(row, variant) == pytest.approx(policy.rows[False] + 3 * asked[0] + asked[1])


def test_a_weight_below_0_is_refused_by_name():
    with pytest.raises(ValueError, match="norm_weight must be >= 0, got -0.1"):
        TrainSettings(norm_weight=-0.1)
