"""Rollouts, trained states and losses of every algorithm, against plain loops and torch.distributions."""

import copy
from collections import Counter
from copy import deepcopy
from dataclasses import fields, replace
from inspect import getsource

import pytest
import torch
from helpers import Counted, PointwiseVelocity, SmallNet, gradients, reverse_sde
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.distributions import Normal, kl_divergence

from neighbor_grpo.anchors import sample_anchors, sample_subsets
from neighbor_grpo.flow import randn, seeded, time_grid
from neighbor_grpo.grpo import SurrogateStats, clipped_surrogate, group_advantages, surrogate
from neighbor_grpo.leaping import leaping_log_probs
from neighbor_grpo.neighbor import NeighborGRPO
from neighbor_grpo.neighbors import neighbor_noise
from neighbor_grpo.penalties import HoldPenalty, evaluations
from neighbor_grpo.reweighting import quasi_norm
from neighbor_grpo.rivals.catalogue import ALGORITHMS, make
from neighbor_grpo.rivals.gaussian import SDEGRPO, DanceGRPO, FlowGRPO
from neighbor_grpo.rivals.mixed import MixGRPO, TempFlowGRPO
from neighbor_grpo.rivals.modifiers import Modifier, base
from neighbor_grpo.rivals.pairs import FDFO
from neighbor_grpo.rollouts import States, take
from neighbor_grpo.solvers import METHODS, solve, step_response
from neighbor_grpo.tasks.digits import NULL, UNet
from neighbor_grpo.training import GROUP_KEY, Run, Task, TrainSettings, iterate, penalties_of

SHAPE = (3, 2, 2)
SMALL = {
    "neighbor": NeighborGRPO(group_size=6, steps=4, anchors=3, trained_steps=2, sigma=0.6),
    "flow": FlowGRPO(group_size=6, steps=4, trained_steps=3),
    "dance": DanceGRPO(group_size=6, steps=5, trained_steps=3),
    "mix": make("mix", group_size=6, steps=5, trained_steps=2),
    "mix-flash": make("mix-flash", group_size=6, steps=5, trained_steps=2),
    "mix-flash-star": make("mix-flash-star", group_size=6, steps=5, trained_steps=2),
    "tempflow": make("tempflow", group_size=6, steps=4),
    "branch": make("branch", group_size=6, steps=5, trained_steps=3, split_every=1),
    "dppo": make("dppo", group_size=6, steps=4, trained_steps=3),
    "op": make("op", group_size=6, steps=5, trained_steps=3),
    "nft": make("nft", group_size=6, steps=4, trained_steps=3),
    "vgrpo": make("vgrpo", group_size=6, steps=4, trained_steps=3),
    "awm": make("awm", group_size=6, steps=4, trained_steps=3, clip_range=0.02),
    "dgpo": make("dgpo", group_size=6, steps=4, trained_steps=3, beta=1.0),
    "ram": make("ram", group_size=6, steps=4, trained_steps=3),
    "tmpo": make("tmpo", group_size=6, steps=4, trained_steps=3),
    "fdfo": make("fdfo", group_size=6, steps=4, trained_steps=2),
}
assert SMALL.keys() == ALGORITHMS.keys()
every_algorithm = pytest.mark.parametrize("algorithm", SMALL.values(), ids=SMALL)
RATIO = {name: algorithm for name, algorithm in SMALL.items() if algorithm.has_ratio}
every_ratio = pytest.mark.parametrize("algorithm", RATIO.values(), ids=RATIO)


def changed(algorithm, **settings):
    "With other settings, inside all modifiers."
    if isinstance(algorithm, Modifier):
        return replace(algorithm, algorithm=changed(algorithm.algorithm, **settings))
    return replace(algorithm, **settings)


def streams(groups, *keys):
    "A generator for each group."
    return [seeded(7, *keys, g) for g in range(groups)]


def collect(algorithm, velocity, groups=3, cond=None, dtype=torch.float64, shape=SHAPE):
    "A rollout and the advantages of random rewards."
    rollout = algorithm.rollout(velocity, randn((groups, *shape), seeded(1), dtype=dtype), cond, streams(groups, 0))
    rewards = randn((groups, algorithm.group_size), seeded(2), dtype=dtype)
    return rollout, algorithm.advantages(rewards)


def total_loss(algorithm, velocity, rollout, advantages, **more):
    return sum(algorithm.losses(velocity, rollout, advantages, streams(rollout.x.shape[1], 1), **more))


def loss_gradient(algorithm, network, rollout, advantages, **more):
    network.zero_grad()
    for loss in algorithm.losses(network, rollout, advantages, streams(rollout.x.shape[1], 1), **more):
        loss.backward()
    return gradients(network)


def trained(algorithm, rollout):
    "What `losses` trains under `streams(groups, 1)`, as a list of (step, group, member)."
    return listed(algorithm.choose(rollout, streams(rollout.x.shape[1], 1)))


def listed(states):
    return list(zip(states.step.tolist(), states.prompt.tolist(), states.member.tolist(), strict=True))


class Watching:
    "The surrogate, which keeps what it is told."

    def __init__(self):
        self.told = []

    def __call__(self, log_prob, old, gains, clip_range, weight=1.0, entropy=None):
        self.told.append((log_prob, old, weight * gains))
        return surrogate(log_prob, old, gains, clip_range, weight)


def compared(algorithm, velocity, rollout, on_policy=False):
    "Log-probabilities, or ratios, of all trained states: under the velocity, and under the old policy; their gains."
    watching = Watching()
    advantages = torch.zeros(rollout.x.shape[1:3], dtype=rollout.x.dtype)
    total_loss(algorithm, velocity, rollout, advantages, on_policy=on_policy, surrogate=watching)
    return watching.told[0]


class Given(Task):
    "A network, three prompts and rewards that say nothing."

    shape, prompts = SHAPE, 3

    def __init__(self, policy, other=None):
        self.policy, self.other = policy, other

    def conditions(self, prompts):
        return None

    def reward(self, samples, prompts):
        return samples.flatten(1).sin().sum(1)

    def reference(self):
        return self.other


class OneUpdate(Run):
    "An iteration that leaves the gradient where it can be looked at, and the weights as they are."

    def __init__(self, algorithm, policy, reference=None, **settings):
        super().__init__(Given(policy, reference), algorithm, TrainSettings(groups=3, **settings))
        iterate(self)

    def descend(self):
        self.gradient = gradients(self.policy)
        return 0.0


def collected(algorithm):
    "Generators of `OneUpdate`'s groups and the noises that they have drawn."
    generators = [seeded(0, GROUP_KEY, 0, group) for group in range(3)]
    return generators, randn((3, *SHAPE), generators)


class Asked(PointwiseVelocity):
    "Counts the samples that it is asked about, with and without gradient."

    def __init__(self):
        super().__init__()
        self.rows, self.batches = {True: 0, False: 0}, []

    def forward(self, x, t, cond=None):
        self.rows[torch.is_grad_enabled()] += len(x)
        if torch.is_grad_enabled():
            self.batches.append(len(x))
        return super().forward(x, t, cond)


# --- the ratio on policy ---


@every_ratio
@pytest.mark.parametrize("on_policy", [True, False])
def test_ratio_on_policy_is_exactly_one(algorithm, on_policy):
    velocity, stats = PointwiseVelocity(), SurrogateStats()
    rollout, advantages = collect(algorithm, velocity, dtype=torch.float32)
    total_loss(algorithm, velocity, rollout, advantages, on_policy=on_policy, surrogate=stats.surrogate)
    summary = stats.summary()
    assert summary["ratio_min"] == summary["ratio_max"] == 1 and summary["clip_fraction"] == 0


@every_ratio
def test_ratio_on_policy_of_a_real_network(algorithm):
    torch.manual_seed(0)
    network = UNet()
    nn.init.normal_(network.out.weight, std=0.05)
    conditions = torch.full((3,), NULL)
    rollout, advantages = collect(algorithm, network, cond=conditions, dtype=torch.float32, shape=(1, 8, 8))
    for on_policy, bound in ((True, 0), (False, 1e-6)):  # another batch composition rounds differently
        stats = SurrogateStats()
        total_loss(algorithm, network, rollout, advantages, on_policy=on_policy, surrogate=stats.surrogate)
        summary = stats.summary()
        assert max(1 - summary["ratio_min"], summary["ratio_max"] - 1) <= bound
        assert summary["clip_fraction"] == 0


@every_ratio
def test_ratio_leaves_one_when_the_weights_move(algorithm):
    velocity, stats = PointwiseVelocity(), SurrogateStats()
    rollout, advantages = collect(algorithm, velocity)
    velocity.scales.data += 0.05
    total_loss(algorithm, velocity, rollout, advantages, surrogate=stats.surrogate)
    summary = stats.summary()
    assert summary["ratio_min"] < 1 - 1e-5 and summary["ratio_max"] > 1 + 1e-5 and summary["clip_fraction"] > 0


def test_stored_old_anchor_is_the_solvers_next_state():
    velocity = PointwiseVelocity().double()
    every_step = replace(SMALL["neighbor"], trained_steps=4)  # DPM-Solver++(2M) makes some as Euler steps
    euler, stored = (replace(every_step, leap_from=choice) for choice in ("euler", "stored"))
    rollout, _ = collect(euler, velocity)
    states = euler.choose(rollout, streams(3, 1))
    candidates = rollout.x[states.step + 1, states.prompt]
    at = rollout.x[states.step + 1, states.prompt, states.member]
    expected = -(candidates - at[:, None]).square().flatten(2).mean(2)
    torch.testing.assert_close(compared(stored, velocity, rollout)[1], expected.log_softmax(1))
    assert (compared(euler, velocity, rollout)[1] - expected.log_softmax(1)).abs().max() > 1e-5
    for on_policy in (True, False):  # the stored state is not where an Euler step leads, on policy either
        stats = SurrogateStats()
        total_loss(stored, velocity, rollout, torch.zeros(3, 6), on_policy=on_policy, surrogate=stats.surrogate)
        assert stats.summary()["ratio_max"] > 1 + 1e-6
    rollout, _ = collect(replace(euler, method="euler"), velocity)
    assert torch.equal(compared(euler, velocity, rollout)[1], compared(stored, velocity, rollout)[1])


# --- what it costs ---


@pytest.mark.parametrize("kl_weight", [0.0, 0.1])
@pytest.mark.parametrize("algorithm", [*SMALL.values(), *(replace(SMALL["neighbor"], method=m) for m in METHODS)])
def test_evaluations_are_those_reported(algorithm, kl_weight):
    policy, reference = Asked(), Asked()
    generators, noise = collected(algorithm)
    nfe = algorithm.rollout(PointwiseVelocity(), noise, None, generators).nfe
    run, samples = OneUpdate(algorithm, policy, reference, kl_weight=kl_weight), 3 * algorithm.group_size
    assert policy.rows[False] == round(samples * nfe, 9)
    if not isinstance(algorithm, TempFlowGRPO):  # where a group branches is drawn, and with it the cost
        assert nfe == algorithm.nfe_old
    assert policy.rows[True] == samples * algorithm.nfe_theta
    times = (kl_weight > 0) + algorithm.frozen_reference
    assert reference.rows == {True: 0, False: policy.rows[True] * times}
    asked = (policy.rows[True], reference.rows[False])
    assert asked == tuple(samples * count for count in evaluations(algorithm, run.penalties))


@pytest.mark.parametrize(("name", "old", "theta"), [("neighbor", 8, 4 / 3), ("flow", 10, 9), ("dance", 25, 14)])
def test_default_costs_are_the_papers(name, old, theta):
    algorithm = ALGORITHMS[name]()
    assert algorithm.nfe_old == old and algorithm.nfe_theta == pytest.approx(theta)


@every_algorithm
@pytest.mark.parametrize("times", [1, 2, 5, 1000])
def test_micro_batches_change_nothing_but_the_batch(algorithm, times):
    torch.manual_seed(0)
    network, size = SmallNet(), times * algorithm.together
    rollout, advantages = collect(algorithm, network)
    nn.init.normal_(network.out.bias, std=0.01)
    whole = loss_gradient(algorithm, network, rollout, advantages)
    assert (loss_gradient(algorithm, network, rollout, advantages, micro_batch=size) - whole).abs().max() < 1e-12
    one, parts = Counted(network), Counted(network)
    (loss,) = algorithm.losses(one, rollout, advantages, streams(3, 1))
    split = total_loss(algorithm, parts, rollout, advantages, micro_batch=size)
    assert abs(split - loss).item() < 1e-12
    count = len(trained(algorithm, rollout))
    assert max(parts.batches) == min(size, count) and parts.calls == -(-count // size)


@every_algorithm
def test_micro_batches_change_nothing_in_the_loop(algorithm):
    torch.manual_seed(0)
    network, reference, asked = SmallNet(), SmallNet(), Asked()
    whole, parts = (
        OneUpdate(algorithm, network, reference, kl_weight=0.1, micro_batch=size).gradient
        for size in (0, algorithm.together)
    )
    assert (whole - parts).abs().max() < 1e-12 * whole.abs().max().clamp_min(1)
    OneUpdate(algorithm, asked, Asked(), kl_weight=0.1, micro_batch=algorithm.together)
    assert set(asked.batches) == {algorithm.together}


# --- groups ---


class Shifted(nn.Module):
    "A pointwise velocity that the condition shifts."

    def __init__(self):
        super().__init__()
        self.inner = PointwiseVelocity()

    def forward(self, x, t, cond):
        return self.inner(x, t) + cond["shift"].to(x).reshape(-1, 1, 1, 1)


@every_algorithm
def test_a_group_computed_alone_is_the_same(algorithm):
    velocity, cond = Shifted(), {"shift": torch.tensor([0.0, 0.4, -0.2])}
    noise, rewards = randn((3, *SHAPE), seeded(1)), randn((3, 6), seeded(2))
    together = algorithm.rollout(velocity, noise, cond, streams(3, 0))
    chosen = trained(algorithm, together)
    advantages = algorithm.advantages(rewards)
    for g in range(3):
        own = {"shift": cond["shift"][g : g + 1]}
        alone = algorithm.rollout(velocity, noise[g : g + 1], own, streams(3, 0)[g : g + 1])
        assert torch.equal(alone.x[:, 0], together.x[:, g]) and torch.equal(alone.v[:, 0], together.v[:, g])
        states = algorithm.choose(alone, streams(3, 1)[g : g + 1])
        mine = [(step, member) for step, group, member in chosen if group == g]
        assert mine == list(zip(states.step.tolist(), states.member.tolist(), strict=True))
        # The sums over one row and over three may take another order: a few units in the last place.
        assert (algorithm.advantages(rewards[g : g + 1])[0] - advantages[g]).abs().max() < 1e-5


@every_algorithm
def test_groups_draw_their_own_noise_and_steps(algorithm):
    algorithm = changed(algorithm, steps=9)
    noise = randn((1, *SHAPE), seeded(1)).expand(8, *SHAPE)
    rollout = algorithm.rollout(PointwiseVelocity(), noise, None, streams(8, 0))
    ends = rollout.samples.flatten(2).double()
    assert torch.pdist(ends.flatten(0, 1)).min() > 1e-3
    states = algorithm.choose(rollout, streams(8, 1))
    times = {tuple(states.times(rollout.ts)[0][states.prompt == g].tolist()) for g in range(8)}
    own = base(algorithm)
    together = getattr(own, "train_where", "random") == "first" or isinstance(own, MixGRPO)  # for every group the same
    assert (len(times) == 1) == together


@pytest.mark.parametrize("name", [name for name in SMALL if name != "branch"])  # which trains the nodes of a tree
def test_trained_states_are_members_crossed_with_steps(name):
    algorithm = SMALL[name]
    rollout, _ = collect(algorithm, PointwiseVelocity(), groups=5)
    chosen = trained(algorithm, rollout)
    members = round(algorithm.nfe_theta * algorithm.group_size / algorithm.trained_steps)
    assert len(set(chosen)) == len(chosen) == 5 * members * algorithm.trained_steps
    for g in range(5):
        steps = Counter(step for step, group, _ in chosen if group == g)
        by_member = Counter(member for _, group, member in chosen if group == g)
        assert set(steps.values()) == {members} and len(steps) == algorithm.trained_steps
        assert set(by_member.values()) == {algorithm.trained_steps} and len(by_member) == members
    last = algorithm.steps - (1 if isinstance(algorithm, (NeighborGRPO, FDFO)) else 2)
    assert max(step for step, _, _ in chosen) <= last


@pytest.mark.parametrize(("where", "steps"), [("first", {0, 1, 2}), ("last", {4, 5, 6})])
def test_first_and_last_steps(where, steps):
    algorithm = NeighborGRPO(group_size=5, steps=7, trained_steps=3, anchors=2, train_where=where)
    rollout, _ = collect(algorithm, PointwiseVelocity())
    chosen = trained(algorithm, rollout)
    assert all({s for s, group, _ in chosen if group == g} == steps for g in range(3))


def test_random_steps_reach_every_step():
    algorithm = replace(SMALL["neighbor"], steps=7)
    rollout, _ = collect(algorithm, PointwiseVelocity(), groups=60)
    assert {step for step, _, _ in trained(algorithm, rollout)} == set(range(7))


# --- rollouts ---


def test_neighbor_rollout_is_the_solver_on_neighbouring_noise():
    algorithm, velocity = replace(SMALL["neighbor"], shift=3.0), PointwiseVelocity()
    noise = randn((3, *SHAPE), seeded(1))
    rollout = algorithm.rollout(velocity, noise, None, streams(3, 0))
    start = neighbor_noise(noise, 6, 0.6, streams(3, 0))
    assert torch.equal(rollout.x[0], start) and torch.equal(rollout.ts, time_grid(4, 3.0))
    with torch.no_grad():
        path = solve(velocity, start.flatten(0, 1), time_grid(4, 3.0))
    assert torch.equal(rollout.x.flatten(1, 2), path.x) and torch.equal(rollout.v.flatten(1, 2), path.v)
    assert torch.equal(rollout.samples, rollout.x[-1]) and not rollout.x.requires_grad


def test_dance_shares_the_initial_noise_and_flow_does_not():
    noise = randn((3, *SHAPE), seeded(1))
    dance, flow = (SMALL[k].rollout(PointwiseVelocity(), noise, None, streams(3, 0)) for k in ("dance", "flow"))
    assert torch.equal(dance.x[0], noise[:, None].expand(3, 6, *SHAPE))
    assert torch.pdist(flow.x[0].flatten(0, 1).flatten(1)).min() > 0.1


@pytest.mark.parametrize(("name", "noisy"), [("flow", True), ("dance", False)])
def test_the_last_step(name, noisy):
    rollout, _ = collect(SMALL[name], PointwiseVelocity())
    t, t_next = rollout.ts[-2:]
    euler = rollout.x[-2] + (t_next - t) * rollout.v[-1]
    assert ((rollout.x[-1] - euler).abs().max() > 0.01) == noisy


def test_prompts_keep_their_conditions():
    seen = []

    def velocity(x, t, cond):
        seen.append(cond)
        return torch.zeros_like(x)

    algorithm = SMALL["neighbor"]
    cond = {"text": torch.tensor([[1.0], [2.0], [3.0]]), "more": (torch.tensor([10, 20, 30]), None)}
    rollout, advantages = collect(algorithm, velocity, cond=cond)
    assert seen[0]["text"].flatten().tolist() == [1.0] * 6 + [2.0] * 6 + [3.0] * 6
    seen.clear()
    total_loss(algorithm, velocity, rollout, advantages)
    groups = [g for _, g, _ in trained(algorithm, rollout)]
    assert seen[0]["text"].flatten().tolist() == [g + 1 for g in groups]
    assert seen[0]["more"][0].tolist() == [10 * (g + 1) for g in groups] and seen[0]["more"][1] is None


def test_take_keeps_the_structure():
    x, rows = torch.arange(6).reshape(3, 2), torch.tensor([2, 0, 2])
    taken = take({"a": [x, (x, None)]}, rows)
    assert isinstance(taken["a"], list) and isinstance(taken["a"][1], tuple) and taken["a"][1][1] is None
    assert torch.equal(taken["a"][0], x[rows]) and torch.equal(taken["a"][1][0], x[rows])
    assert take(None, rows) is None


# --- losses ---


def flat_neighbor_loss(algorithm, velocity, rollout, advantages):
    "The objective as nested loops over groups, anchors and steps."
    terms = []
    for k, g, b in trained(algorithm, rollout):
        candidates, dt = rollout.x[k + 1, g], rollout.ts[k + 1] - rollout.ts[k]
        x = rollout.x[k, g, b]
        new = x + dt * velocity(x[None], rollout.ts[k][None])[0]
        old = x + dt * rollout.v[k, g, b] if algorithm.leap_from == "euler" else rollout.x[k + 1, g, b]
        logits = []
        for anchor in (new, old):
            square = (candidates - anchor).square().flatten(1)
            distance = square.mean(1) if algorithm.reduction == "mean" else square.sum(1)
            logits.append((-distance / algorithm.temperature).log_softmax(0))
        ratio, c = (logits[0] - logits[1]).exp(), algorithm.clip_range
        terms.append(torch.minimum(ratio * advantages[g], ratio.clamp(1 - c, 1 + c) * advantages[g]).sum())
    return -torch.stack(terms).mean()


def flat_sde_loss(algorithm, velocity, rollout, advantages):
    "The objective as nested loops, with torch.distributions' densities."
    terms = []
    for k, g, i in trained(algorithm, rollout):
        x, t, t_next = rollout.x[k, g, i], rollout.ts[k], rollout.ts[k + 1]
        if isinstance(algorithm, FlowGRPO):
            diffusion = algorithm.noise_level * (t / (1 - (rollout.ts[1] if k == 0 else t))).sqrt()
        else:
            diffusion = algorithm.noise_level
        log_probs = []
        for v in (velocity(x[None], t[None])[0], rollout.v[k, g, i]):
            mean, std = reverse_sde(x, v, t, t_next, diffusion)
            log_probs.append(Normal(mean, std).log_prob(rollout.x[k + 1, g, i]).mean())
        ratio, c, a = (log_probs[0] - log_probs[1]).exp(), algorithm.clip_range, advantages[g, i]
        terms.append(torch.minimum(ratio * a, ratio.clamp(1 - c, 1 + c) * a))
    return -torch.stack(terms).mean()


shared = {
    "group_size": st.integers(4, 7),
    "clip_range": st.sampled_from([1e-4, 0.02, 0.3]),
    "shift": st.sampled_from([1.0, 3.0]),
}
neighbor_settings = st.builds(
    NeighborGRPO,
    **shared,
    steps=st.integers(3, 6),
    sigma=st.floats(0.05, 1),
    anchors=st.integers(1, 4),
    trained_steps=st.integers(1, 3),
    train_where=st.sampled_from(["random", "first", "last"]),
    method=st.sampled_from(METHODS),
    temperature=st.floats(0.05, 20),
    reduction=st.sampled_from(["mean", "sum"]),
    leap_from=st.sampled_from(["euler", "stored"]),
    p=st.floats(0.2, 2),
)
sde = {"steps": st.integers(4, 6), "trained_steps": st.integers(1, 3)}
sde_settings = st.one_of(
    st.builds(FlowGRPO, **shared, **sde, noise_level=st.floats(0.1, 1.2), noisy_last_step=st.booleans()),
    st.builds(DanceGRPO, **shared, **sde, noise_level=st.floats(0.05, 1), shared_noise=st.booleans()),
)


@given(st.one_of(neighbor_settings, sde_settings), st.floats(0, 0.3), st.integers(0, 9))
def test_losses_sum_to_the_flat_loss(algorithm, moved, micro_batch):
    torch.manual_seed(0)
    network = SmallNet()
    rollout, advantages = collect(algorithm, network, groups=2)
    with torch.no_grad():
        for p in network.parameters():
            p += moved * torch.randn_like(p)
        flat = flat_neighbor_loss if isinstance(algorithm, NeighborGRPO) else flat_sde_loss
        expected = flat(algorithm, network, rollout, advantages)
    stats = SurrogateStats()
    more = {"micro_batch": micro_batch}
    loss = total_loss(algorithm, network, rollout, advantages, surrogate=stats.surrogate, **more)
    assert loss.isfinite() and loss.shape == ()
    torch.testing.assert_close(loss.detach(), expected, atol=1e-9, rtol=1e-7)
    assert loss_gradient(algorithm, network, rollout, advantages, **more).isfinite().all()
    summary = stats.summary()
    assert 0 <= summary["ratio_min"] <= summary["ratio_max"] and 0 <= summary["clip_fraction"] <= 1


@pytest.mark.parametrize("temperature", [0.05, 1.0, 30.0])
def test_on_policy_update_is_the_pull_of_the_candidates(temperature):
    torch.manual_seed(0)
    network, algorithm = SmallNet(), replace(SMALL["neighbor"], temperature=temperature)
    rollout, advantages = collect(algorithm, network)
    gradient = loss_gradient(algorithm, network, rollout, advantages, on_policy=True)
    network.zero_grad()
    terms = []
    for k, g, b in trained(algorithm, rollout):
        x = rollout.x[k, g, b]
        anchor = x + (rollout.ts[k + 1] - rollout.ts[k]) * network(x[None], rollout.ts[k][None])[0]
        pull = (advantages[g].reshape(-1, 1, 1, 1) * rollout.x[k + 1, g]).sum(0)
        terms.append(2 / temperature * (pull * anchor).mean())
    (-torch.stack(terms).mean()).backward()
    expected = gradients(network)
    assert expected.abs().max() > 1e-3 / temperature
    assert (gradient - expected).abs().max() < 1e-10


@every_ratio
def test_a_small_step_down_the_loss_makes_good_candidates_likelier(algorithm):
    torch.manual_seed(0)
    network = SmallNet()
    rollout, advantages = collect(algorithm, network)

    def value():
        watching = Watching()
        with torch.no_grad():
            total_loss(algorithm, network, rollout, advantages, surrogate=watching)
        log_prob, _, gains = watching.told[0]
        return (gains * log_prob).sum().item()

    before, gradient = value(), loss_gradient(algorithm, network, rollout, advantages)
    step = 1e-4 * gradient / gradient.norm()
    nn.utils.vector_to_parameters(nn.utils.parameters_to_vector(network.parameters()) - step, network.parameters())
    assert value() > before


@every_ratio
def test_zero_advantages_give_a_zero_gradient(algorithm):
    torch.manual_seed(0)
    network = SmallNet()
    rollout, _ = collect(algorithm, network)
    advantages = algorithm.advantages(torch.full((3, 6), 0.3))
    assert torch.equal(advantages, torch.zeros(3, 6))
    assert loss_gradient(algorithm, network, rollout, advantages).abs().max() == 0


def test_advantages_of_each_algorithm():
    rewards = torch.eye(12)[:2].double() * 100
    standard = group_advantages(rewards)
    neighbor = NeighborGRPO(p=0.8).advantages(rewards)
    torch.testing.assert_close(neighbor, quasi_norm(standard, 0.8), atol=1e-7, rtol=1e-6)
    clipped = replace(SMALL["flow"], group_size=12, advantage_clip=2.0).advantages(rewards)
    assert torch.equal(clipped, standard.clamp(-2, 2)) and clipped.max() == 2


@every_algorithm
def test_noise_in_a_flat_group_is_not_blown_up(algorithm):
    rewards = 0.5 + 1e-9 * randn((1, 6), seeded(0), dtype=torch.float64)  # far below the floor of the spread
    advantages = algorithm.advantages(rewards)
    assert 0 < advantages.abs().max() < 3e-3


def test_clipped_states_have_no_gradient():
    torch.manual_seed(0)
    network, algorithm = SmallNet(), replace(SMALL["flow"], clip_range=1e-4)
    rollout, _ = collect(algorithm, network)
    with torch.no_grad():
        network.out.bias += 0.5
    states = algorithm.choose(rollout, streams(3, 1))
    pair = network(*states.inputs(rollout)), states.select(rollout.v)
    log_prob, old = (algorithm.log_prob(rollout, states, v) for v in pair)
    log_ratio = log_prob - old
    outward = torch.zeros(3, 6, dtype=torch.float64)  # every advantage rewards the move that has already been made
    moves = torch.zeros(3, 6, dtype=torch.float64).index_put((states.prompt, states.member), log_ratio.detach(), True)
    agree = torch.ones(3, 6, dtype=torch.bool)
    for s, g, i in zip(log_ratio, states.prompt.tolist(), states.member.tolist(), strict=True):
        agree[g, i] &= bool((s > 0) == (moves[g, i] > 0))
    outward[agree] = moves[agree].sign()
    assert agree.sum() >= 3
    assert loss_gradient(algorithm, network, rollout, outward).abs().max() == 0
    assert loss_gradient(algorithm, network, rollout, -outward).abs().max() > 0


# --- the reference ---


@every_algorithm
def test_penalty_is_zero_at_the_reference_and_adds_its_gradient_elsewhere(algorithm):
    torch.manual_seed(0)
    network, reference = SmallNet(), SmallNet()
    plain, apart = (OneUpdate(algorithm, network, near).gradient for near in (copy.deepcopy(network), reference))
    same = OneUpdate(algorithm, network, copy.deepcopy(network), kl_weight=0.7).gradient
    assert (same - plain).abs().max() < 1e-13
    away = OneUpdate(algorithm, network, reference, kl_weight=0.7).gradient

    generators, noise = collected(algorithm)
    rollout = algorithm.rollout(network, noise, None, generators)
    network.zero_grad()
    terms = []
    for k, g, i in listed(algorithm.choose(rollout, generators)):
        ts = (rollout.ts if rollout.ts.ndim == 1 else rollout.ts[:, g]).double()
        x, t, t_next = rollout.x[k, g, i][None].double(), ts[k][None], ts[k + 1]
        v, v_ref = network(x, t), reference(x, t).detach()
        if not isinstance(base(algorithm), SDEGRPO):
            terms.append((v - v_ref).square().mean())
        else:
            (mean, std), (mean_ref, _) = (base(algorithm).step(x, u, t, t_next, ts[1]) for u in (v, v_ref))
            terms.append(kl_divergence(Normal(mean, std), Normal(mean_ref, std)).mean())
    (0.7 * torch.stack(terms).mean()).backward()
    expected = gradients(network)
    # The loop weighs the divergence of a step in the float32 of its times, which are not exact either.
    assert (away - apart - expected).abs().max() < 1e-5 * expected.abs().max()
    assert all(p.grad is None for p in reference.parameters())


# --- half precision ---


@every_algorithm
def test_a_half_precision_policy_keeps_float32_states(algorithm):
    torch.manual_seed(0)
    network = SmallNet(dtype=torch.bfloat16)
    rollout, advantages = collect(algorithm, network, dtype=torch.float32)
    assert rollout.x.dtype == rollout.ts.dtype == torch.float32
    if algorithm.has_ratio:
        assert compared(algorithm, network, rollout)[1].dtype == torch.float32
    stats = SurrogateStats()
    loss = total_loss(algorithm, network, rollout, advantages, on_policy=True, surrogate=stats.surrogate)
    assert loss.dtype == torch.float32 and stats.summary()["ratio_max"] in (1, None)
    gradient = loss_gradient(algorithm, network, rollout, advantages)
    assert gradient.dtype == torch.bfloat16 and gradient.isfinite().all() and gradient.abs().max() > 0


@every_algorithm
def test_half_precision_noise_is_widened(algorithm):
    rollout, _ = collect(algorithm, SmallNet(dtype=torch.bfloat16), dtype=torch.bfloat16)
    assert rollout.x.dtype == torch.float32


# --- the step that is trained ---


@pytest.mark.parametrize("method", ["euler", "dpm++2m", "ab2"])
def test_the_rollouts_own_step_only_rescales_the_gradient_of_each_step(method):
    network = SmallNet()
    for step, factor in enumerate((-step_response(time_grid(4), method) / 0.25).tolist()):
        algorithm = NeighborGRPO(group_size=6, steps=4, anchors=3, trained_steps=1, method=method, sigma=0.6)
        rollout, advantages = collect(algorithm, network)
        grads = []
        for kind in ("euler", "rollout"):

            class AtStep(NeighborGRPO):
                def choose(self, rollout, generator, step=step):
                    members = sample_anchors(3, self.group_size, self.anchors, generator)
                    return States.product(torch.full((3, 1), step), members, rollout.x.device)

            chosen = AtStep(**{**vars(algorithm), "leap_from": kind})
            grads.append(loss_gradient(chosen, network, rollout, advantages, on_policy=True))
        torch.testing.assert_close(grads[1], grads[0] * factor, rtol=1e-7, atol=1e-12)


def test_the_rollouts_own_step_stands_where_the_rollout_went():
    algorithm = NeighborGRPO(group_size=6, steps=4, anchors=3, trained_steps=2, leap_from="rollout")
    network = SmallNet()
    rollout, _ = collect(algorithm, network)
    states = algorithm.choose(rollout, streams(3, 1))
    expected = algorithm.leap(rollout, states, states.select(rollout.x[1:]))
    assert torch.equal(compared(algorithm, SmallNet(), rollout)[1], expected)


HOLDING = {
    f"{name} {where}": changed(SMALL[name], trained_steps=2, train_where=where)
    for name in ("neighbor", "flow", "dance", "op", "tmpo")
    for where in ("first", "last")
}
every_holding = pytest.mark.parametrize("algorithm", HOLDING.values(), ids=HOLDING)


@every_holding
@pytest.mark.parametrize("kl_weight", [0.0, 0.1])
def test_holding_adds_the_distance_at_one_other_step_of_each_trained_candidate(algorithm, kl_weight):
    torch.manual_seed(0)
    network, reference = SmallNet(), SmallNet()
    plain = OneUpdate(algorithm, network, reference, kl_weight=kl_weight).gradient
    holding = OneUpdate(algorithm, network, reference, kl_weight=kl_weight, hold_weight=0.7).gradient

    generators, noise = collected(algorithm)
    rollout = algorithm.rollout(network, noise, None, generators)
    states = algorithm.choose(rollout, generators)
    held = HoldPenalty(0.7).choose(algorithm, rollout, states, generators)
    candidates = set(zip(states.prompt.tolist(), states.member.tolist(), strict=True))
    assert sorted(zip(held.prompt.tolist(), held.member.tolist(), strict=True)) == sorted(candidates)
    assert not set(held.step.tolist()) & set(states.step.tolist()) and max(held.step) < algorithm.steps
    network.zero_grad()
    terms = []
    for k, g, i in listed(held):
        x, t = rollout.x[k, g, i][None], rollout.ts[k][None]
        terms.append((network(x, t) - reference(x, t).detach()).square().mean())
    (0.7 * torch.stack(terms).mean()).backward()
    assert (holding - plain - gradients(network)).abs().max() < 1e-12
    assert all(p.grad is None for p in reference.parameters())


@every_holding
def test_every_other_step_is_held_at_times_and_its_cost_is_reported(algorithm):
    policy, reference = Asked(), Asked()
    run, samples = OneUpdate(algorithm, policy, reference, hold_weight=0.7), 3 * algorithm.group_size
    asked = (policy.rows[True], reference.rows[False])
    assert asked == tuple(samples * count for count in evaluations(algorithm, run.penalties))
    assert asked == (samples * algorithm.nfe_theta * 1.5, samples * algorithm.nfe_theta / 2)  # one beside two
    assert len(policy.batches) == 2

    rollout, _ = collect(algorithm, PointwiseVelocity())
    (penalty,), held = penalties_of(run.settings), set()
    for seed in range(30):
        states = algorithm.choose(rollout, streams(3, seed))
        held |= set(penalty.choose(algorithm, rollout, states, streams(3, seed)).step.tolist())
    trained_steps = {k for k, _, _ in trained(algorithm, rollout)}
    assert held == set(range(algorithm.steps)) - trained_steps


# --- the page ---


def test_neighbor_grpo_has_few_settings_and_a_short_class():
    assert len(fields(NeighborGRPO)) <= 14
    lines = [line for line in getsource(NeighborGRPO).splitlines() if line.strip() and line.strip()[0] not in '#"`']
    assert len(lines) <= 120


def test_the_class_has_the_gradient_of_the_pages_flat_cell():
    "The method as the page writes it down, with its own words, against the class."
    groups, size, steps, anchors, trained_steps, sigma, p, tau, c = 3, 12, 8, 4, 4, 0.3, 0.8, 1.0, 1e-4
    torch.manual_seed(0)
    network, noise, g = SmallNet(), randn((groups, *SHAPE), seeded(1), dtype=torch.float64), seeded(2)
    start = neighbor_noise(noise, size, sigma, g)
    with torch.no_grad():
        path = solve(network, start.flatten(0, 1), time_grid(steps), method="dpm++2m")
    ts, x, v_old = path.ts, path.x.unflatten(1, (groups, size)), path.v.unflatten(1, (groups, size))
    rewards = x[-1].flatten(2).sin().sum(2)
    advantages = group_advantages(rewards)
    advantages = quasi_norm(advantages, p) * advantages.square().mean(1, keepdim=True).sqrt()
    before = deepcopy(network)
    with torch.no_grad():  # off policy, so that the clip acts
        network.out.bias += 0.01
    members, chosen = sample_anchors(groups, size, anchors, g), sample_subsets(groups, steps, trained_steps, g)
    network.zero_grad()
    for q in range(groups):
        for i in members[q]:
            for k in chosen[q]:
                here, dt = x[k, q, i][None], ts[k + 1] - ts[k]
                ends = (here + dt * network(here, ts[k].expand(1)), here + dt * v_old[k, q, i][None])
                new, old = (leaping_log_probs(x[k + 1, q][None], end, tau) for end in ends)
                loss = -clipped_surrogate(new, old, advantages[q], c).sum() / (groups * anchors * trained_steps)
                loss.backward()
    expected = gradients(network)

    algorithm, generator = NeighborGRPO(), seeded(2)
    rollout = algorithm.rollout(before, noise, None, generator)
    network.zero_grad()
    for loss in algorithm.losses(network, rollout, algorithm.advantages(rewards), generator):
        loss.backward()
    assert expected.abs().max() > 1e-6 and (gradients(network) - expected).abs().max() < 1e-12
