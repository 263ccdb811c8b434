"""Rollouts, trained states and losses of every algorithm, against plain loops and torch.distributions."""

from collections import Counter
from contextlib import suppress
from dataclasses import replace

import pytest
import torch
from helpers import Counted, PointwiseVelocity, SmallNet, gradients, reverse_sde
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.distributions import Normal, kl_divergence

from neighbor_grpo.flow import randn, seeded, time_grid
from neighbor_grpo.grpo import SurrogateStats, group_advantages
from neighbor_grpo.neighbor import NeighborGRPO
from neighbor_grpo.neighbors import neighbor_noise
from neighbor_grpo.reweighting import quasi_norm
from neighbor_grpo.rivals.catalogue import ALGORITHMS
from neighbor_grpo.rivals.gaussian import SDEGRPO, DanceGRPO, FlowGRPO
from neighbor_grpo.rivals.mixed import MixGRPO, TempFlowGRPO
from neighbor_grpo.rollouts import Algorithm, take
from neighbor_grpo.solvers import METHODS, solve, step_response
from neighbor_grpo.tasks.digits import NULL, UNet

SHAPE = (3, 2, 2)
SMALL = {
    "neighbor": NeighborGRPO(group_size=6, steps=4, anchors=3, trained_steps=2, sigma=0.6),
    "flow": FlowGRPO(group_size=6, steps=4, trained_steps=3),
    "dance": DanceGRPO(group_size=6, steps=5, trained_steps=3),
    "mix": ALGORITHMS["mix"](group_size=6, steps=5, trained_steps=2),
    "mix-flash": ALGORITHMS["mix-flash"](group_size=6, steps=5, trained_steps=2),
    "mix-flash-star": ALGORITHMS["mix-flash-star"](group_size=6, steps=5, trained_steps=2),
    "tempflow": ALGORITHMS["tempflow"](group_size=6, steps=4),
    "op": ALGORITHMS["op"](group_size=6, steps=5, trained_steps=3),
    "nft": ALGORITHMS["nft"](group_size=6, steps=4, trained_steps=3),
    "vgrpo": ALGORITHMS["vgrpo"](group_size=6, steps=4, trained_steps=3),
    "tmpo": ALGORITHMS["tmpo"](group_size=6, steps=4, trained_steps=3),
}
assert SMALL.keys() == ALGORITHMS.keys()
every_algorithm = pytest.mark.parametrize("algorithm", SMALL.values(), ids=SMALL)
RATIO = {name: algorithm for name, algorithm in SMALL.items() if type(algorithm).gain is Algorithm.gain}
every_ratio = pytest.mark.parametrize("algorithm", RATIO.values(), ids=RATIO)


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
    states = algorithm.trained_states(rollout, streams(rollout.x.shape[1], 1))
    return list(zip(states.step.tolist(), states.prompt.tolist(), states.member.tolist(), strict=True))


# --- the ratio on policy ---


@every_ratio
@pytest.mark.parametrize("on_policy", [True, False])
def test_ratio_on_policy_is_exactly_one(algorithm, on_policy):
    velocity, stats = PointwiseVelocity(), SurrogateStats()
    rollout, advantages = collect(algorithm, velocity, dtype=torch.float32)
    total_loss(algorithm, velocity, rollout, advantages, on_policy=on_policy, stats=stats)
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
        total_loss(algorithm, network, rollout, advantages, on_policy=on_policy, stats=stats)
        summary = stats.summary()
        assert max(1 - summary["ratio_min"], summary["ratio_max"] - 1) <= bound
        assert summary["clip_fraction"] == 0


@every_ratio
def test_ratio_leaves_one_when_the_weights_move(algorithm):
    velocity, stats = PointwiseVelocity(), SurrogateStats()
    rollout, advantages = collect(algorithm, velocity)
    velocity.scales.data += 0.05
    total_loss(algorithm, velocity, rollout, advantages, stats=stats)
    summary = stats.summary()
    assert summary["ratio_min"] < 1 - 1e-5 and summary["ratio_max"] > 1 + 1e-5 and summary["clip_fraction"] > 0


def test_stored_old_anchor_is_the_solvers_next_state():
    velocity = PointwiseVelocity().double()
    every_step = replace(SMALL["neighbor"], trained_steps=4)  # DPM-Solver++(2M) makes some as Euler steps
    euler, stored = (replace(every_step, old_anchor=choice) for choice in ("euler", "stored"))
    rollout, _ = collect(euler, velocity)
    states = euler.trained_states(rollout, seeded(0))
    candidates = rollout.x[states.step + 1, states.prompt]
    at = rollout.x[states.step + 1, states.prompt, states.member]
    expected = -(candidates - at[:, None]).square().flatten(2).mean(2)
    torch.testing.assert_close(stored.old_log_prob(rollout, states), expected.log_softmax(1))
    assert (euler.old_log_prob(rollout, states) - expected.log_softmax(1)).abs().max() > 1e-5
    for on_policy in (True, False):  # the stored state is not where an Euler step leads, on policy either
        stats = SurrogateStats()
        total_loss(stored, velocity, rollout, torch.zeros(3, 6), on_policy=on_policy, stats=stats)
        assert stats.summary()["ratio_max"] > 1 + 1e-6
    rollout, _ = collect(replace(euler, method="euler"), velocity)
    assert torch.equal(euler.old_log_prob(rollout, states), stored.old_log_prob(rollout, states))


# --- what it costs ---


@pytest.mark.parametrize("kl_weight", [0.0, 0.1])
@pytest.mark.parametrize("algorithm", [*SMALL.values(), *(replace(SMALL["neighbor"], method=m) for m in METHODS)])
def test_evaluations_are_those_reported(algorithm, kl_weight):
    algorithm = replace(algorithm, kl_weight=kl_weight)
    velocity, reference = Counted(PointwiseVelocity()), Counted(PointwiseVelocity())
    rollout, advantages = collect(algorithm, velocity)
    samples = 3 * algorithm.group_size
    assert velocity.plain == round(samples * rollout.nfe, 9) and velocity.gradient == 0
    if not isinstance(algorithm, TempFlowGRPO):  # where a group branches is drawn, and with it the cost
        assert rollout.nfe == algorithm.nfe_old
    total_loss(algorithm, velocity, rollout, advantages, reference=reference)
    assert velocity.plain == round(samples * rollout.nfe, 9)
    assert velocity.gradient == samples * algorithm.nfe_theta
    assert (reference.plain, reference.gradient) == (velocity.gradient if kl_weight else 0, 0)


@pytest.mark.parametrize(("name", "old", "theta"), [("neighbor", 8, 4 / 3), ("flow", 10, 9), ("dance", 25, 14)])
def test_default_costs_are_the_papers(name, old, theta):
    algorithm = ALGORITHMS[name]()
    assert algorithm.nfe_old == old and algorithm.nfe_theta == pytest.approx(theta)


def smallest_batch(algorithm):
    "The smallest micro-batch that an algorithm takes: a state, the steps that share a ratio, or a group."
    for size in range(1, 100):
        with suppress(ValueError):
            return replace(algorithm, micro_batch=size).micro_batch


@every_algorithm
@pytest.mark.parametrize("times", [1, 2, 5, 1000])
def test_micro_batches_change_nothing_but_the_batch(algorithm, times):
    torch.manual_seed(0)
    network = SmallNet()
    algorithm = replace(algorithm, kl_weight=0.1)
    size = times * smallest_batch(algorithm)
    rollout, advantages = collect(algorithm, network)
    nn.init.normal_(network.out.bias, std=0.01)
    more = {"reference": SmallNet()}
    whole = loss_gradient(algorithm, network, rollout, advantages, **more)
    counted = Counted(network)
    parts = list(algorithm.losses(counted, rollout, advantages, streams(3, 1), **more))
    split = replace(algorithm, micro_batch=size)
    assert len(parts) == 1
    assert (loss_gradient(split, network, rollout, advantages, **more) - whole).abs().max() < 1e-12
    counted = Counted(network)
    assert abs(total_loss(split, counted, rollout, advantages, **more) - parts[0]).item() < 1e-12
    count = len(trained(algorithm, rollout))
    assert max(counted.batches) == min(size, count) and counted.calls == -(-count // size)


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
        states = algorithm.trained_states(alone, streams(3, 1)[g : g + 1])
        mine = [(step, member) for step, group, member in chosen if group == g]
        assert mine == list(zip(states.step.tolist(), states.member.tolist(), strict=True))
        # The sums over one row and over three may take another order: a few units in the last place.
        assert (algorithm.advantages(rewards[g : g + 1])[0] - advantages[g]).abs().max() < 1e-5


@every_algorithm
def test_groups_draw_their_own_noise_and_steps(algorithm):
    algorithm = replace(algorithm, steps=9)
    noise = randn((1, *SHAPE), seeded(1)).expand(8, *SHAPE)
    rollout = algorithm.rollout(PointwiseVelocity(), noise, None, streams(8, 0))
    ends = rollout.samples.flatten(2).double()
    assert torch.pdist(ends.flatten(0, 1)).min() > 1e-3
    states = algorithm.trained_states(rollout, streams(8, 1))
    times = {tuple(states.times(rollout.ts)[0][states.prompt == g].tolist()) for g in range(8)}
    together = algorithm.train_where == "first" or isinstance(algorithm, MixGRPO)  # the same steps in every group
    assert (len(times) == 1) == together


@every_algorithm
def test_trained_states_are_members_crossed_with_steps(algorithm):
    rollout, _ = collect(algorithm, PointwiseVelocity(), groups=5)
    chosen = trained(algorithm, rollout)
    members = round(algorithm.nfe_theta * algorithm.group_size / algorithm.trained_steps)
    assert len(set(chosen)) == len(chosen) == 5 * members * algorithm.trained_steps
    for g in range(5):
        steps = Counter(step for step, group, _ in chosen if group == g)
        by_member = Counter(member for _, group, member in chosen if group == g)
        assert set(steps.values()) == {members} and len(steps) == algorithm.trained_steps
        assert set(by_member.values()) == {algorithm.trained_steps} and len(by_member) == members
    last = algorithm.steps - (1 if isinstance(algorithm, NeighborGRPO) else 2)
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
        old = x + dt * rollout.v[k, g, b] if algorithm.old_anchor == "euler" else rollout.x[k + 1, g, b]
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
    old_anchor=st.sampled_from(["euler", "stored"]),
    p=st.floats(0.2, 2),
    rescale=st.booleans(),
    micro_batch=st.integers(0, 9),
)
sde = {"steps": st.integers(4, 6), "trained_steps": st.integers(1, 3), "micro_batch": st.integers(0, 9)}
sde_settings = st.one_of(
    st.builds(FlowGRPO, **shared, **sde, noise_level=st.floats(0.1, 1.2), noisy_last_step=st.booleans()),
    st.builds(DanceGRPO, **shared, **sde, noise_level=st.floats(0.05, 1), shared_noise=st.booleans()),
)


@given(st.one_of(neighbor_settings, sde_settings), st.floats(0, 0.3))
def test_losses_sum_to_the_flat_loss(algorithm, moved):
    torch.manual_seed(0)
    network = SmallNet()
    rollout, advantages = collect(algorithm, network, groups=2)
    with torch.no_grad():
        for p in network.parameters():
            p += moved * torch.randn_like(p)
        flat = flat_neighbor_loss if isinstance(algorithm, NeighborGRPO) else flat_sde_loss
        expected = flat(algorithm, network, rollout, advantages)
    stats = SurrogateStats()
    loss = total_loss(algorithm, network, rollout, advantages, stats=stats)
    assert loss.isfinite() and loss.shape == ()
    torch.testing.assert_close(loss.detach(), expected, atol=1e-9, rtol=1e-7)
    assert loss_gradient(algorithm, network, rollout, advantages).isfinite().all()
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
    states = algorithm.trained_states(rollout, streams(3, 1))

    def value():
        with torch.no_grad():
            v = network(states.of(rollout.x), states.times(rollout.ts)[0])
            return (algorithm.weigh(advantages, states) * algorithm.log_prob(rollout, states, v)).sum().item()

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
    neighbor = NeighborGRPO(p=0.8, rescale=False).advantages(rewards)
    torch.testing.assert_close(neighbor, quasi_norm(standard, 0.8, False), atol=1e-7, rtol=1e-6)
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
    states = algorithm.trained_states(rollout, streams(3, 1))
    v = network(states.of(rollout.x), rollout.ts[states.step])
    log_ratio = algorithm.log_prob(rollout, states, v) - algorithm.old_log_prob(rollout, states)
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
    rollout, advantages = collect(algorithm, network)
    penalised = replace(algorithm, kl_weight=0.7)
    plain = loss_gradient(algorithm, network, rollout, advantages)
    same = loss_gradient(penalised, network, rollout, advantages, reference=network)
    assert (same - plain).abs().max() < 1e-13
    away = loss_gradient(penalised, network, rollout, advantages, reference=reference)

    network.zero_grad()
    terms = []
    for k, g, i in trained(algorithm, rollout):
        ts = rollout.ts if rollout.ts.ndim == 1 else rollout.ts[:, g]
        x, t, t_next = rollout.x[k, g, i][None], ts[k][None], ts[k + 1]
        v, v_ref = network(x, t), reference(x, t).detach()
        if not isinstance(algorithm, SDEGRPO):
            terms.append((v - v_ref).square().mean())
        else:
            (mean, std), (mean_ref, _) = (algorithm.step(x, u, t, t_next, rollout.ts[1]) for u in (v, v_ref))
            terms.append(kl_divergence(Normal(mean, std), Normal(mean_ref, std)).mean())
    (0.7 * torch.stack(terms).mean()).backward()
    assert (away - plain - gradients(network)).abs().max() < 1e-12
    assert all(p.grad is None for p in reference.parameters())


# --- half precision ---


@every_algorithm
def test_a_half_precision_policy_keeps_float32_states(algorithm):
    torch.manual_seed(0)
    network = SmallNet(dtype=torch.bfloat16)
    rollout, advantages = collect(algorithm, network, dtype=torch.float32)
    assert rollout.x.dtype == rollout.ts.dtype == torch.float32
    states = algorithm.trained_states(rollout, seeded(0))
    if hasattr(algorithm, "log_prob"):
        assert algorithm.old_log_prob(rollout, states).dtype == torch.float32
    stats = SurrogateStats()
    loss = total_loss(algorithm, network, rollout, advantages, on_policy=True, stats=stats)
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
                def choose_steps(self, rollout, generator, step=step):
                    return torch.full((rollout.x.shape[1], 1), step)

            chosen = AtStep(**{**vars(algorithm), "train_step": kind})
            grads.append(loss_gradient(chosen, network, rollout, advantages, on_policy=True))
        torch.testing.assert_close(grads[1], grads[0] * factor, rtol=1e-7, atol=1e-12)


def test_the_rollouts_own_step_stands_where_the_rollout_went():
    algorithm = NeighborGRPO(group_size=6, steps=4, anchors=3, trained_steps=2, train_step="rollout")
    network = SmallNet()
    rollout, _ = collect(algorithm, network)
    states = algorithm.trained_states(rollout, streams(3, 1))
    expected = algorithm.leap(rollout, states, states.of(rollout.x[1:]))
    assert torch.equal(algorithm.old_log_prob(rollout, states), expected)


HOLDING = {
    f"{name} {where}": replace(SMALL[name], trained_steps=2, train_where=where, hold_weight=0.7)
    for name in ("neighbor", "flow", "dance", "op", "tmpo")
    for where in ("first", "last")
}
every_holding = pytest.mark.parametrize("algorithm", HOLDING.values(), ids=HOLDING)


@every_holding
@pytest.mark.parametrize("kl_weight", [0.0, 0.1])
def test_holding_adds_the_distance_at_one_other_step_of_each_trained_candidate(algorithm, kl_weight):
    torch.manual_seed(0)
    algorithm = replace(algorithm, kl_weight=kl_weight)
    network, reference = SmallNet(), SmallNet()
    rollout, advantages = collect(algorithm, network)
    more = {"reference": reference}
    plain = loss_gradient(replace(algorithm, hold_weight=0.0), network, rollout, advantages, **more)
    holding = loss_gradient(algorithm, network, rollout, advantages, **more)

    generators = streams(3, 1)
    states = algorithm.trained_states(rollout, generators)
    held = algorithm.held_states(rollout, states, generators)
    candidates = set(zip(states.prompt.tolist(), states.member.tolist(), strict=True))
    assert sorted(zip(held.prompt.tolist(), held.member.tolist(), strict=True)) == sorted(candidates)
    assert not set(held.step.tolist()) & set(states.step.tolist()) and max(held.step) < algorithm.steps
    network.zero_grad()
    terms = []
    for k, g, i in zip(held.step.tolist(), held.prompt.tolist(), held.member.tolist(), strict=True):
        x, t = rollout.x[k, g, i][None], rollout.ts[k][None]
        terms.append((network(x, t) - reference(x, t).detach()).square().mean())
    (0.7 * torch.stack(terms).mean()).backward()
    assert (holding - plain - gradients(network)).abs().max() < 1e-12
    assert all(p.grad is None for p in reference.parameters())


@every_holding
def test_every_other_step_is_held_at_times_and_its_cost_is_reported(algorithm):
    rollout, advantages = collect(algorithm, PointwiseVelocity())
    trained_steps, held = {k for k, _, _ in trained(algorithm, rollout)}, set()
    for seed in range(30):
        velocity, reference, generators = Counted(PointwiseVelocity()), Counted(PointwiseVelocity()), streams(3, seed)
        parts = list(algorithm.losses(velocity, rollout, advantages, generators, reference))
        assert len(parts) == 2 and velocity.gradient == 3 * algorithm.group_size * algorithm.nfe_theta
        passes = 3 * velocity.gradient + reference.plain
        assert passes == pytest.approx(3 * algorithm.group_size * algorithm.nfe_theta * algorithm.gradient_cost)
        generators = streams(3, seed)
        states = algorithm.trained_states(rollout, generators)
        held |= set(algorithm.held_states(rollout, states, generators).step.tolist())
    assert held == set(range(algorithm.steps)) - trained_steps
