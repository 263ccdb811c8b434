"""BranchGRPO's tree against one grown node by node, sets of leaves, and the sum over all leaves' paths."""

import math
from dataclasses import replace

import pytest
import torch
from helpers import Counted, PointwiseVelocity, SmallNet, gradients, reverse_sde
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.distributions import Normal

from neighbor_grpo.flow import randn, seeded, time_grid
from neighbor_grpo.penalties import VelocityPenalty
from neighbor_grpo.rivals.mixed import BranchGRPO
from neighbor_grpo.rivals.modifiers import ShapedAdvantages
from neighbor_grpo.rollouts import Watched

SHAPE = (3, 2, 2)
SMALL = BranchGRPO(group_size=12, steps=7, trained_steps=5, split_every=2)
TREES = {  # children at each step
    "12 leaves": (SMALL, [3, 1, 2, 1, 2, 1, 1]),
    "a prime": (replace(SMALL, group_size=5), [5, 1, 1, 1, 1, 1, 1]),
    "16 leaves, the last splits together": (replace(SMALL, group_size=16, split_every=3), [2, 1, 1, 2, 1, 4, 1]),
    "every step": (replace(SMALL, split_every=1, train_where="last", split_scale=1.0), [3, 2, 2, 1, 1, 1, 1]),
    "two steps": (replace(SMALL, steps=2, trained_steps=1), [12, 1]),
}
every_tree = pytest.mark.parametrize(("algorithm", "children"), TREES.values(), ids=TREES)
trees = st.builds(
    lambda size, steps, every, where, data: BranchGRPO(
        group_size=size, steps=steps, split_every=every, train_where=where, trained_steps=1 + data % (steps - 1)
    ),
    st.integers(2, 36), st.integers(2, 9), st.integers(1, 4), st.sampled_from(["first", "last"]), st.integers(0, 99),
)  # fmt: skip


def streams(groups, *keys):
    "A generator for each group."
    return [seeded(7, *keys, g) for g in range(groups)]


def collect(algorithm, velocity, groups=2, shape=SHAPE):
    "A rollout in float64, and rewards of its leaves."
    noise = randn((groups, *shape), seeded(1), dtype=torch.float64)
    rewards = randn((groups, algorithm.group_size), seeded(2), dtype=torch.float64)
    return algorithm.rollout(velocity, noise, None, streams(groups, 0)), rewards


def alike(states):
    "(G, G): which leaves of a group stand at the very same state."
    return (states[:, None] == states[None]).flatten(2).all(2)


def nodes_of(states):
    "The leaves below each node of a depth, as sets, found by their states alone."
    return {frozenset(row.nonzero()[:, 0].tolist()) for row in alike(states)}


def brute_advantages(algorithm, rollout, rewards):
    "(T, P, G): of the node behind each step, by the definition."
    found = torch.zeros(rollout.v.shape[:3], dtype=torch.float64)
    for k, g in torch.cartesian_prod(torch.arange(len(found)), torch.arange(len(rewards))).tolist():
        nodes = sorted(map(sorted, nodes_of(rollout.x[k + 1, g])))
        values = [sum(rewards[g, i].item() for i in node) / len(node) for node in nodes]
        mean = sum(values) / len(values)
        spread = math.sqrt(sum((value - mean) ** 2 for value in values) / (len(values) - 1))
        for node, value in zip(nodes, values, strict=True):
            found[k, g, node] = max(-algorithm.advantage_clip, min(algorithm.advantage_clip, (value - mean) / spread))
    return found


def trained_steps(algorithm):
    "The K first or last steps, but for the very last one."
    steps, count = range(algorithm.steps - 1), algorithm.trained_steps
    return steps[:count] if algorithm.train_where == "first" else steps[-count:]


def loss_gradient(algorithm, network, rollout, advantages, **more):
    network.zero_grad()
    for loss in algorithm.losses(network, rollout, advantages, streams(2, 1), **more):
        loss.backward()
    return gradients(network)


# --- the rollout ---


@every_tree
def test_the_rollout_is_a_tree_grown_node_by_node(algorithm, children):
    velocity = PointwiseVelocity(0.5, -0.4, 0.3).double()
    rollout, _ = collect(algorithm, velocity)
    ts = time_grid(algorithm.steps, 3.0).double().tolist()
    for g, generator in enumerate(streams(2, 0)):
        nodes, seen = [rollout.x[0, g, 0]], []
        for t, t_next, count in zip(ts[:-1], ts[1:], children, strict=True):
            grown = []
            for x in nodes:
                v = velocity(x[None], torch.tensor([t])).detach()[0]
                mean, std = reverse_sde(x, v, t, t_next, 0.3)
                ends = [x + (t_next - t) * v] if t_next == 0 else [mean] * count
                grown += [(end, std * (algorithm.split_scale if count > 1 else 1)) for end in ends]
            noise = 0 * torch.stack([end for end, _ in grown])
            if t_next > 0:
                noise = torch.randn(noise.shape, generator=generator, dtype=torch.float64)
            nodes = [end + std * z for (end, std), z in zip(grown, noise, strict=True)]
            seen.append(nodes)
        for k, nodes in enumerate(seen):
            wanted = torch.stack([x for x in nodes for _ in range(algorithm.group_size // len(nodes))])
            assert (rollout.x[k + 1, g] - wanted).abs().max() < 1e-12
    assert len(nodes) == algorithm.group_size and rollout.noisy.sum() == 2 * (algorithm.steps - 1)


@given(trees)
def test_leaves_share_their_prefix_and_nothing_is_asked_twice(algorithm):
    velocity = Counted(PointwiseVelocity())
    rollout, rewards = collect(algorithm, velocity, shape=(2,))
    below, asked = [], 0
    for k in range(algorithm.steps):
        for g in range(2):
            nodes, after = nodes_of(rollout.x[k, g]), nodes_of(rollout.x[k + 1, g])
            assert {len(node) for node in nodes} == {algorithm.group_size // algorithm.nodes[k]}
            assert all(any(new <= node for node in nodes) for new in after)  # no two paths meet again
            assert all((rollout.v[k, g, [*node]] == rollout.v[k, g, min(node)]).all() for node in nodes)
            asked += len(nodes)
        below.append(len(nodes))
    assert len(after) == algorithm.group_size and below[0] == 1
    assert velocity.plain == asked == round(2 * algorithm.group_size * rollout.nfe) and velocity.calls == len(below)
    assert rollout.nfe == algorithm.nfe_old

    (loss,) = algorithm.losses(velocity, rollout, algorithm.advantages(rewards))
    steps, states = trained_steps(algorithm), algorithm.choose(rollout)
    assert loss.requires_grad and velocity.gradient == 2 * sum(below[k] for k in steps) == len(states)
    assert algorithm.nfe_theta * algorithm.group_size * 2 == pytest.approx(velocity.gradient)
    chosen = set(zip(states.step.tolist(), states.prompt.tolist(), states.member.tolist(), strict=True))
    assert chosen == {(k, g, min(node)) for k in steps for g in range(2) for node in nodes_of(rollout.x[k, g])}


# --- the credit ---


@every_tree
def test_rewards_are_fused_upward_and_standardized_among_the_nodes_of_a_depth(algorithm, children):
    rollout, rewards = collect(algorithm, PointwiseVelocity().double())
    wanted = brute_advantages(algorithm, rollout, 40 + 5 * rewards)
    found = algorithm.fused(algorithm.advantages(40 + 5 * rewards))
    assert (found - wanted).abs().max() < 1e-5  # of what is added to each of two deviations
    assert wanted.std() > 0.5


def test_the_advantages_of_nodes_are_clipped_after_the_fusion():
    clipped, rewards = replace(SMALL, advantage_clip=0.5), randn((2, 12), seeded(2), dtype=torch.float64)
    whole = SMALL.fused(SMALL.advantages(rewards))
    assert torch.equal(clipped.fused(clipped.advantages(rewards)), whole.clamp(-0.5, 0.5)) and whole.max() > 1


def test_a_modifier_of_the_spread_acts_and_noise_in_a_flat_group_does_not():
    rewards = randn((3, 12), seeded(0), dtype=torch.float64) * torch.tensor([[1.0], [0.1], [1e-9]])
    batch = ShapedAdvantages(SMALL, advantage_power=0.0)
    plain, scaled = (SMALL.fused(a.advantages(rewards + 0.5)) for a in (SMALL, batch))
    ratio = (scaled / plain).mean((0, 2))
    assert ratio[0] > 1.2 and 0.07 < ratio[1] / ratio[0] < 0.2
    assert 0 < plain[:, 2].abs().max() < 1e-2 and plain[:, :2].abs().amax((0, 2)).min() > 1


# --- the gradient ---


class Linear(nn.Module):
    "`v = W x`, the same at all times."

    def __init__(self):
        super().__init__()
        self.matrix = nn.Parameter(randn((3, 3), seeded(9), dtype=torch.float64) / 2)

    def forward(self, x, t, cond=None):
        return x @ self.matrix.T


def path_gradient(algorithm, network, before, rollout, rewards):
    "All steps of all leaves' paths, each scored for itself; a step that n leaves share counts 1 / n of each."
    advantages, total, count = brute_advantages(algorithm, rollout, rewards), 0, 0
    ts, clip = rollout.ts.tolist(), algorithm.clip_range
    for k in trained_steps(algorithm):
        for g in range(2):
            share = 1 / alike(rollout.x[k + 1, g]).sum(1)
            x, ends = rollout.x[k, g], rollout.x[k + 1, g]
            new, old = (
                Normal(*reverse_sde(x, net(x, torch.full((len(x),), ts[k]).double()), ts[k], ts[k + 1], 0.3))
                .log_prob(ends).flatten(1).mean(1) for net in (network, before)
            )  # fmt: skip
            ratio, gain = (new - old.detach()).exp(), advantages[k, g]
            total = total + (share * torch.minimum(gain * ratio, gain * ratio.clamp(1 - clip, 1 + clip))).sum()
            count += share.sum()
    network.zero_grad()
    (-total / count).backward()
    return gradients(network)


@every_tree
@pytest.mark.parametrize("clip_range", [1e-3, 0.3])
def test_the_gradient_is_that_of_all_paths_on_policy_and_off(algorithm, children, clip_range):
    torch.manual_seed(0)
    algorithm, network, before = replace(algorithm, clip_range=clip_range), SmallNet(), SmallNet()
    before.load_state_dict(network.state_dict())
    rollout, rewards = collect(algorithm, network)
    advantages = algorithm.advantages(rewards)
    for by in (0.0, 0.03):
        with torch.no_grad():
            for p in network.parameters():
                p += by * torch.randn_like(p)
        wanted = path_gradient(algorithm, network, before, rollout, rewards)
        for micro in (0, 5):
            found = loss_gradient(algorithm, network, rollout, advantages, on_policy=by == 0, micro_batch=micro)
            assert (found - wanted).abs().max() < 2e-5 * wanted.abs().max()  # the deviations' small addition
        assert wanted.abs().max() > 1e-4


def test_the_gradient_on_policy_in_closed_form():
    "Of a linear velocity v = W x: the mean over the steps to all nodes of A dmu/dv (x' - mu) / (D std^2) x^T."
    network = Linear()
    rollout, rewards = collect(SMALL, network, shape=(3,))
    advantages, ts, wanted, edges = brute_advantages(SMALL, rollout, rewards), rollout.ts.tolist(), 0, 0
    for k in range(5):
        dt = ts[k + 1] - ts[k]
        move = dt * (1 + 0.3**2 / 2 * (1 - ts[k]) / ts[k])  # of the mean, with the velocity
        for g in range(2):
            for node in nodes_of(rollout.x[k + 1, g]):
                i = min(node)
                x, end, v = rollout.x[k, g, i], rollout.x[k + 1, g, i], rollout.v[k, g, i]
                mean = x + dt * v + 0.3**2 / 2 * dt * (x + (1 - ts[k]) * v) / ts[k]
                pull = advantages[k, g, i] * move * (end - mean) / (-dt * 0.3**2) / 3
                wanted, edges = wanted - torch.outer(pull, x), edges + 1
    found = loss_gradient(SMALL, network, rollout, SMALL.advantages(rewards), on_policy=True).view(3, 3)
    assert (found - wanted / edges).abs().max() < 1e-5 * wanted.abs().max() / edges


def test_a_penalty_sees_each_node_once():
    network, reference = SmallNet(), SmallNet()
    rollout, rewards = collect(SMALL, network)
    states, counted = SMALL.choose(rollout), Counted(reference)
    watched = Watched(network)
    SMALL.loss(watched, rollout, states, SMALL.advantages(rewards), True)
    weights = SMALL.distance_weights(rollout, states)
    VelocityPenalty(1.0).distance(watched, counted, weights)
    assert counted.plain == len(states) == len(weights) == round(24 * SMALL.nfe_theta)
