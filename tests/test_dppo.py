"""Flow-DPPO's mask against its definition, with torch's own Gaussian divergence, in float64."""

import pytest
import torch
from helpers import SmallNet, gradients
from hypothesis import given
from hypothesis import strategies as st
from test_algorithms import collect, streams
from torch.distributions import Normal, kl_divergence

from neighbor_grpo.grpo import SurrogateStats, surrogate
from neighbor_grpo.neighbor import NeighborGRPO
from neighbor_grpo.rivals.catalogue import make, modified
from neighbor_grpo.rivals.gaussian import FlowGRPO
from neighbor_grpo.rivals.modifiers import MaskedRatios, base

SETTINGS = dict(group_size=4, steps=4, trained_steps=3)


def moved(algorithm, size):
    "A rollout of one network, its advantages, and a network whose weights have moved since."
    torch.manual_seed(0)
    network = SmallNet()
    rollout, advantages = collect(algorithm, network)
    with torch.no_grad():
        for p in network.parameters():
            p += size * torch.randn_like(p)
    return network, rollout, advantages


def by_definition(algorithm, network, rollout, advantages, threshold):
    "Gradient of the mean of `A rho` over the states that are not blocked, and their divergences."
    own, states, terms, divergences = base(algorithm), algorithm.choose(rollout, streams(3, 1)), [], []
    for k, g, i in zip(states.step.tolist(), states.prompt.tolist(), states.member.tolist(), strict=True):
        x, t, t_next = rollout.x[k, g, i][None], rollout.ts[k][None], rollout.ts[k + 1]
        old = Normal(*own.step(x, rollout.v[k, g, i][None], t, t_next, rollout.ts[1]))
        new = Normal(*own.step(x, network(x, t), t, t_next, rollout.ts[1]))
        after, advantage = rollout.x[k + 1, g, i], advantages[g, i]
        ratio = (new.log_prob(after) - old.log_prob(after)).mean().exp()
        divergences.append(kl_divergence(new, old).mean().detach())
        away = (ratio > 1 and advantage > 0) or (ratio < 1 and advantage < 0)
        terms.append(0 * ratio if divergences[-1] >= threshold and away else -advantage * ratio)
    network.zero_grad()
    torch.stack(terms).mean().backward()
    return gradients(network), torch.stack(divergences)


def of_the_class(algorithm, network, rollout, advantages, **more):
    "Gradient of its loss."
    network.zero_grad()
    for loss in algorithm.losses(network, rollout, advantages, streams(3, 1), **more):
        loss.backward()
    return gradients(network)


@pytest.mark.parametrize("sampler", ["flow", "dance", "cps"])
def test_a_gradient_is_blocked_far_away_and_further(sampler):
    algorithm = make("dppo", **SETTINGS, sampler=sampler)
    network, rollout, advantages = moved(algorithm, 0.05)
    divergences = by_definition(algorithm, network, rollout, advantages, 1.0)[1]
    for threshold in (divergences.min() / 2, divergences.median(), 2 * divergences.max()):
        masked, stats = MaskedRatios(base(algorithm), threshold.item() + 1e-12), SurrogateStats()
        found = of_the_class(masked, network, rollout, advantages, surrogate=stats.surrogate)
        expected, _ = by_definition(algorithm, network, rollout, advantages, threshold + 1e-12)
        assert (found - expected).abs().max() < 1e-12 < 1e-4 < expected.abs().max()
        share = (divergences > threshold + 1e-12).double().mean()
        assert stats.summary()["clip_fraction"] == pytest.approx(share.item())


@given(st.floats(-1, 1), st.floats(-2, 2), st.floats(-1e-3, 1e-3), st.booleans())
def test_none_or_zero_is_the_clip_of_a_mask(log_ratio, advantage, fine, beyond):
    value = torch.tensor([log_ratio + fine], dtype=torch.float64, requires_grad=True)
    zero, gain = torch.zeros(1, dtype=torch.float64), torch.tensor([advantage], dtype=torch.float64)
    clip = torch.tensor([0.0 if beyond else torch.inf], dtype=torch.float64)
    surrogate(value, zero, gain, clip).backward()
    ratio = value.detach().exp()
    blocked = beyond and bool((ratio - 1) * gain > 0)
    assert torch.allclose(value.grad, zero if blocked else gain * ratio, rtol=1e-12)


def test_on_policy_the_gradient_is_that_of_flow_grpo():
    algorithm = make("dppo", **SETTINGS, kl_threshold=1e-12)
    network, rollout, advantages = moved(algorithm, 0.0)
    found, plain = (
        of_the_class(a, network, rollout, advantages, on_policy=True) for a in (algorithm, FlowGRPO(**SETTINGS))
    )
    assert torch.equal(found, plain) and plain.abs().max() > 1e-4


def test_other_modifiers_and_policies_see_the_same_mask():
    "A chunk is blocked with all of its steps; the leaping policy has a divergence of its own."
    free, closed = 1e6, 1e-12
    neighbor = NeighborGRPO(group_size=4, steps=4, anchors=2, trained_steps=3, clip_range=0.999)
    for algorithm in (modified(FlowGRPO(**SETTINGS, clip_range=0.999), "guard", "chunks", chunk=3), neighbor):
        network, rollout, advantages = moved(algorithm, 0.05)
        plain = of_the_class(algorithm, network, rollout, advantages)
        assert torch.equal(
            of_the_class(modified(algorithm, "mask", kl_threshold=free), network, rollout, advantages), plain
        )
        blocked = of_the_class(modified(algorithm, "mask", kl_threshold=closed), network, rollout, advantages)
        assert (blocked - plain).abs().max() > 0.1 * plain.abs().max() > 0


def test_bad_thresholds_are_refused():
    for wrong in (0.0, -1.0, float("nan")):
        with pytest.raises(ValueError, match="kl_threshold"):
            make("dppo", kl_threshold=wrong)
