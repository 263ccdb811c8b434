"""Modifiers against plain loops in float64; at neutral settings, and nested, they leave what they do not change."""

from dataclasses import fields, replace

import pytest
import torch
from helpers import Counted, PointwiseVelocity, SmallNet, TinyTask, reverse_sde, weights
from hypothesis import given
from hypothesis import strategies as st
from test_algorithms import (
    SHAPE,
    SMALL,
    Watching,
    collect,
    every_algorithm,
    loss_gradient,
    streams,
    total_loss,
    trained,
)
from torch.distributions import Normal

from neighbor_grpo.flow import randn, seeded, time_grid
from neighbor_grpo.grpo import SurrogateStats
from neighbor_grpo.neighbor import NeighborGRPO
from neighbor_grpo.rivals.catalogue import ALGORITHMS, MODIFIERS, make, modified, modifiers_of
from neighbor_grpo.rivals.forward import ForwardProcess
from neighbor_grpo.rivals.gaussian import SDEGRPO, DanceGRPO, FlowGRPO
from neighbor_grpo.rivals.mixed import BranchGRPO
from neighbor_grpo.rivals.modifiers import (
    ChunkedRatios,
    GuardedRatios,
    Modifier,
    Previews,
    ShapedAdvantages,
    TimeWeights,
    base,
    chunk_means,
    equal_pull,
    extremes,
    guarded,
    shape_advantages,
)
from neighbor_grpo.rivals.pairs import FDFO
from neighbor_grpo.rivals.trajectories import Replay
from neighbor_grpo.runs.trainer import Trainer
from neighbor_grpo.solvers import solve
from neighbor_grpo.training import TrainSettings

SETTINGS = TrainSettings(iterations=2, groups=3, updates=2, lr=1e-2)


def with_options(algorithm, guard=False, chunk=1, time_weight="none"):
    "An algorithm with modifiers around it, only those that are on."
    if time_weight != "none":
        algorithm = TimeWeights(algorithm, time_weight)
    algorithm = GuardedRatios(algorithm) if guard else algorithm
    return algorithm if chunk == 1 else ChunkedRatios(algorithm, chunk)


# --- neutral settings, and what is passed on ---


class Plain(Modifier):
    "A modifier that changes nothing."

    fits = ShapedAdvantages.fits


def neutral(algorithm):
    "Modifiers that change nothing."
    if isinstance(algorithm, FDFO):  # whose rewards nothing standardizes
        return Replay(Plain(algorithm), replay=0)
    around = ShapedAdvantages(Plain(algorithm), 0.0, "group")
    if base(algorithm) is not algorithm or isinstance(algorithm, BranchGRPO):
        return around  # OP-GRPO has chunks and replay already, a tree takes neither
    stepwise = isinstance(algorithm, (NeighborGRPO, SDEGRPO)) and algorithm.has_ratio
    return Replay(ChunkedRatios(around, 1) if stepwise else around, replay=0)


@every_algorithm
def test_modifiers_at_neutral_settings_change_no_bit_of_a_run(algorithm):
    outcomes = []
    for version in (algorithm, neutral(algorithm)):
        trainer = Trainer(TinyTask(dropout=0.0), version, SETTINGS).run(progress=False)
        rows = [{k: v for k, v in row.items() if k != "seconds"} for row in trainer.rows]
        outcomes.append((weights(trainer.policy), rows))
    assert torch.equal(outcomes[0][0], outcomes[1][0]) and outcomes[0][1] == outcomes[1][1]
    assert not torch.equal(outcomes[0][0], weights(TinyTask(dropout=0.0).policy))


@every_algorithm
def test_a_modifier_passes_on_what_it_does_not_change(algorithm):
    around, ts = Plain(algorithm), time_grid(4)
    for name in (
        "group_size",
        "shift",
        "grid",
        "has_ratio",
        "together",
        "nfe_old",
        "nfe_theta",
        "steps",
        "trained_steps",
    ):
        assert getattr(around, name) == getattr(algorithm, name)
    (rollout, advantages), (inner, same) = (collect(a, PointwiseVelocity()) for a in (around, algorithm))
    assert torch.equal(rollout.x, inner.x) and torch.equal(advantages, same)
    assert trained(around, rollout) == trained(algorithm, rollout)
    if hasattr(algorithm, "response"):
        assert all(map(torch.equal, around.response(ts), algorithm.response(ts)))
        assert around.untrained == algorithm.untrained
    late = replace(SMALL["neighbor"], shift=None)
    assert ChunkedRatios(Plain(late)).fitted(lambda steps: 3.0) == ChunkedRatios(Plain(replace(late, shift=3.0)))


def test_modifiers_are_known_by_name_and_always_in_one_order():
    settings = {"chunk": 3, "scouts": 30, "advantage_power": 0.2}
    built = modified(FlowGRPO(), *reversed(MODIFIERS), **settings)
    names = "lean weights mask guard chunks gdpo slas previews replay".split()
    assert list(modifiers_of(built)) == list(MODIFIERS) == names
    found = {name: value for own in modifiers_of(built).values() for name, value in own.items()}
    assert {name: found[name] for name in settings} == settings and base(built) == FlowGRPO()
    assert modified(NeighborGRPO()) == NeighborGRPO() and modifiers_of(NeighborGRPO()) == {}
    assert modifiers_of(make("op", replay=2)) == {
        "chunks": {"chunk": 0},
        "replay": {"replay": 2, "memory_size": 8, "memory_age": 10},
    }
    names = [f.name for kind in MODIFIERS.values() for f in fields(kind) if f.name != "algorithm"]
    assert len(set(names)) == len(names), "a setting has one owner"


# --- the loss with modifiers, as nested loops ---

BASES = {
    "neighbor": NeighborGRPO(group_size=4, steps=5, anchors=2, trained_steps=4, shift=3.0, temperature=0.3),
    "flow": FlowGRPO(group_size=4, steps=6, trained_steps=4, shift=3.0),
    "dance": DanceGRPO(group_size=4, steps=6, trained_steps=4, shift=3.0),
    "cps": SDEGRPO(group_size=4, steps=6, trained_steps=4, shift=3.0, sampler="cps", noise_level=0.4),
}


def gaussian(algorithm, rollout, k, x, v):
    "Mean and standard deviation of a step, derived anew."
    t, t_next = rollout.ts[k], rollout.ts[k + 1]
    if algorithm.sampler == "cps":
        angle = torch.tensor(algorithm.noise_level * torch.pi / 2, dtype=torch.float64)
        return x + (t_next - t) * v - t_next * (1 - angle.cos()) * (x + (1 - t) * v), t_next * angle.sin()
    scale = (t / (1 - (rollout.ts[1] if k == 0 else t))).sqrt() if algorithm.sampler == "flow" else 1.0
    return reverse_sde(x, v, t, t_next, algorithm.noise_level * scale)


def one_state(algorithm, velocity, rollout, k, g, i):
    "Log-ratios of a trained state, their negative mean under the old policy, and the step's noise."
    x, pair = rollout.x[k, g, i], (velocity(rollout.x[k, g, i][None], rollout.ts[k][None])[0], rollout.v[k, g, i])
    if isinstance(algorithm, NeighborGRPO):
        ends = [x + (rollout.ts[k + 1] - rollout.ts[k]) * v for v in pair]
        distances = [(rollout.x[k + 1, g] - end).square().flatten(1).mean(1) / algorithm.temperature for end in ends]
        new, old = ((-d).softmax(0) for d in distances)
        return (new / old).log(), (old * (old / new).log()).sum(), 1.0
    (mean, std), (mean_old, _) = (gaussian(algorithm, rollout, k, x, v) for v in pair)
    after = rollout.x[k + 1, g, i]
    ratio = (Normal(mean, std).log_prob(after) - Normal(mean_old, std).log_prob(after)).mean()
    return ratio[None], ((mean - mean_old) / std).square().mean() / 2, std


def pulls(algorithm, rollout, time_weight):
    "What `time_weight` multiplies the loss of each step by, from derivatives."
    last = algorithm.steps if isinstance(algorithm, NeighborGRPO) else algorithm.steps - 1
    reach, noise = [], []
    for k in range(last):
        x, v = torch.tensor(0.3).double(), torch.zeros((), dtype=torch.float64, requires_grad=True)
        with torch.enable_grad():
            if isinstance(algorithm, NeighborGRPO):
                mean, std = (rollout.ts[k + 1] - rollout.ts[k]) * v, 1.0
            else:
                mean, std = gaussian(algorithm, rollout, k, x, v)
        slope = torch.autograd.grad(mean, v)[0].abs()
        reach.append((slope / std).item())
        noise.append(float(std))
    table = {"none": [1.0] * last, "equal": [1 / r for r in reach], "noise": noise}[time_weight]
    return [w * last / sum(table) for w in table]


def flat_loss(algorithm, velocity, rollout, advantages, guard=False, chunk=1, time_weight="none"):
    "The whole objective, chunk by chunk."
    by_candidate, weight, terms = {}, pulls(algorithm, rollout, time_weight), []
    states = trained(algorithm, rollout)
    for k, g, i in sorted(states):
        by_candidate.setdefault((g, i), []).append(k)
    for (g, i), steps in by_candidate.items():
        size = chunk or len(steps)
        for first in range(0, len(steps), size):
            ratios, sizes = [], []
            for k in steps[first : first + size]:
                ratio, drift, std = one_state(algorithm, velocity, rollout, k, g, i)
                w = weight[k]
                if guard:
                    ratio, w = (ratio + drift) * std, w / (rollout.ts[k] - rollout.ts[k + 1])
                ratios.append(w * ratio)
                sizes.append(w)
            ratio = (sum(ratios) / sum(sizes)).exp()
            a = sum(sizes) * (advantages[g] if isinstance(algorithm, NeighborGRPO) else advantages[g, i])
            c = algorithm.clip_range
            terms.append(torch.minimum(ratio * a, ratio.clamp(1 - c, 1 + c) * a).sum())
    return -sum(terms) / len(states)


options = st.fixed_dictionaries(
    {
        "guard": st.booleans(),
        "chunk": st.sampled_from([0, 1, 2, 4]),
        "time_weight": st.sampled_from(["none", "equal", "noise"]),
    }
)
settings = st.fixed_dictionaries(
    {
        "clip_range": st.sampled_from([1e-4, 0.02, 0.3]),
        "train_where": st.sampled_from(["random", "first", "last"]),
    }
)


@given(st.sampled_from(sorted(BASES)), options, settings, st.sampled_from([0, 4, 12]), st.floats(0, 0.2))
def test_losses_with_modifiers_are_the_flat_loss(name, chosen, changed, micro_batch, moved):
    if name == "neighbor" and chosen["time_weight"] == "noise":
        chosen = {**chosen, "time_weight": "equal"}
    plain = replace(BASES[name], **changed)
    algorithm = with_options(plain, **chosen)
    torch.manual_seed(0)
    network = SmallNet()
    rollout, advantages = collect(algorithm, network, groups=1)
    with torch.no_grad():
        for p in network.parameters():
            p += moved * torch.randn_like(p)
        expected = flat_loss(plain, network, rollout, advantages, **chosen)
    loss = total_loss(algorithm, network, rollout, advantages, micro_batch=micro_batch)
    torch.testing.assert_close(loss.detach(), expected, atol=1e-9, rtol=1e-7)


@pytest.mark.parametrize("name", BASES)
@pytest.mark.parametrize("option", [{"guard": True}, {"time_weight": "equal"}, {"chunk": 0, "guard": True}])
def test_micro_batches_change_nothing_with_modifiers(name, option):
    network = SmallNet()
    algorithm = with_options(BASES[name], **option)
    rollout, advantages = collect(algorithm, network)
    whole = loss_gradient(algorithm, network, rollout, advantages)
    parts = loss_gradient(algorithm, network, rollout, advantages, micro_batch=8)
    assert (whole - parts).abs().max() < 1e-12 < whole.abs().max()


@pytest.mark.parametrize("name", BASES)
@pytest.mark.parametrize("time_weight", ["none", "equal"])
@pytest.mark.parametrize("guard", [False, True])
def test_chunks_keep_the_gradient_on_policy(name, time_weight, guard):
    network, plain = SmallNet(), with_options(BASES[name], guard, 1, time_weight)
    rollout, advantages = collect(plain, network)
    single, whole = (
        loss_gradient(a, network, rollout, advantages, on_policy=True) for a in (plain, ChunkedRatios(plain, 0))
    )
    assert (single - whole).abs().max() < 1e-12 * single.abs().max().clamp_min(1)


@pytest.mark.parametrize("name", BASES)
def test_below_chunks_the_order_of_modifiers_does_not_matter(name):
    network, gradients = SmallNet(), []
    rollout, _ = collect(BASES[name], network)
    rewards = randn((3, 4), seeded(5), dtype=torch.float64)
    network = SmallNet()
    for algorithm in (
        ChunkedRatios(GuardedRatios(TimeWeights(ShapedAdvantages(BASES[name])))),
        ShapedAdvantages(ChunkedRatios(TimeWeights(GuardedRatios(BASES[name])))),
    ):
        gradients.append(loss_gradient(algorithm, network, rollout, algorithm.advantages(rewards)))
    assert (gradients[0] - gradients[1]).abs().max() < 1e-12 * gradients[0].abs().max() > 0


@pytest.mark.parametrize("around", [GuardedRatios, TimeWeights])
def test_what_looks_at_single_ratios_stands_inside_chunks(around):
    with pytest.raises(ValueError, match=rf"^{around.__name__} must be around ratios of single steps"):
        around(ShapedAdvantages(ChunkedRatios(BASES["flow"])))


# --- the guard ---


@pytest.mark.parametrize("name", BASES)
@pytest.mark.parametrize("chunk", [1, 2])
def test_guarded_ratio_is_exactly_one_on_policy(name, chunk):
    velocity, algorithm = PointwiseVelocity(), with_options(BASES[name], True, chunk)
    rollout, advantages = collect(algorithm, velocity, dtype=torch.float32)
    for on_policy in (True, False):
        stats = SurrogateStats()
        total_loss(algorithm, velocity, rollout, advantages, on_policy=on_policy, surrogate=stats.surrogate)
        assert stats.summary()["ratio_min"] == stats.summary()["ratio_max"] == 1


@pytest.mark.parametrize("leap_from", ["euler", "stored"])
@pytest.mark.parametrize("on_policy", [True, False])
def test_guarded_leap_has_mean_zero_under_the_old_policy(leap_from, on_policy):
    plain = replace(BASES["neighbor"], leap_from=leap_from, clip_range=0.9)
    rollout, _ = collect(plain, SmallNet())
    network, told = SmallNet(), []
    for algorithm in (plain, GuardedRatios(plain)):
        watching = Watching()
        total_loss(algorithm, network, rollout, torch.zeros(3, 4), on_policy=on_policy, surrogate=watching)
        told += watching.told
    (_, old, _), (log_ratio, zero, _) = told
    assert not zero.any() and (old.exp() * log_ratio).sum(1).abs().max() < 1e-14
    assert (log_ratio.abs().max() > 1e-4) == (not on_policy or leap_from == "stored")


@given(st.integers(1, 300), st.floats(0.05, 2), st.floats(0.01, 1))
def test_mean_of_a_gaussian_log_ratio_is_minus_the_divergence(dimensions, std, size):
    change = size * randn((dimensions,), seeded(0), dtype=torch.float64)
    nodes = torch.tensor([-(3**0.5), 0, 3**0.5], dtype=torch.float64)  # Gauss-Hermite, exact for the quadratic
    share = torch.tensor([1 / 6, 2 / 3, 1 / 6], dtype=torch.float64)
    new, old = Normal(change[:, None], std), Normal(torch.zeros(1).double(), std)
    mean = (share * (new.log_prob(std * nodes) - old.log_prob(std * nodes))).sum(1).mean()
    drift = (change / std).square().mean() / 2
    assert abs(guarded(mean, drift, std)) < 1e-12 * (1 + drift)


# --- chunks ---


@given(st.integers(1, 4), st.sampled_from([(1, 1), (4, 2), (6, 3), (6, 6), (5, 1)]), st.integers(0, 99))
def test_chunks_are_means_of_consecutive_steps(candidates, sizes, seed):
    count, chunk = sizes
    g = seeded(seed)
    steps = torch.cat([torch.randperm(20, generator=g)[:count] for _ in range(candidates)])
    values = torch.randn(candidates * count, 2, generator=g, dtype=torch.float64)
    expected = []
    for c in range(candidates):
        rows = sorted(range(c * count, (c + 1) * count), key=lambda r: steps[r].item())
        expected += [sum(values[r] for r in rows[k : k + chunk]) / chunk for k in range(0, count, chunk)]
    torch.testing.assert_close(chunk_means(values, steps, count, chunk), torch.stack(expected), atol=1e-12, rtol=0)


# --- advantages ---


@given(st.integers(1, 4), st.integers(2, 7), st.floats(0, 2), st.sampled_from(["group", "batch"]), st.integers(0, 99))
def test_advantages_are_shaped_one_by_one(groups, size, power, scale, seed):
    rewards = 3 + 2 * randn((groups, size), seeded(seed), dtype=torch.float64)
    apart = [[r - sum(row) / size for r in row] for row in rewards.tolist()]
    every = (sum(d * d for row in apart for d in row) / groups / size) ** 0.5
    expected = []
    for row in apart:
        std = (sum(d * d for d in row) / size) ** 0.5 if scale == "group" else every
        expected.append([(1 if d > 0 else -1) * (abs(d) / (std + 1e-6)) ** (1 + power) for d in row])
    expected = torch.tensor(expected, dtype=torch.float64)
    torch.testing.assert_close(shape_advantages(rewards, power, scale), expected, rtol=1e-9, atol=1e-9)


@every_algorithm
def test_shaped_advantages_of_several_rewards_add_up(algorithm):
    rewards = randn((3, algorithm.group_size, 2), seeded(0), dtype=torch.float64)
    parts = [shape_advantages(rewards[..., k], 0.5, "batch") for k in range(2)]
    expected = algorithm.advantages(rewards[..., 0], None, lambda _: 0.3 * parts[0] + 2.0 * parts[1])
    found = ShapedAdvantages(algorithm, 0.5, "batch").advantages(rewards, [0.3, 2.0])
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


# --- weights of steps ---


@given(st.integers(3, 12), st.floats(0.5, 5), st.floats(0.1, 1.2))
def test_reach_of_a_flow_step_is_the_papers(steps, shift, a):
    ts = time_grid(steps, shift).double()
    t, dt = ts[:-2], ts[1:-1] - ts[:-2]
    s = a * (t / (1 - torch.where(t == 1, ts[1], t))).sqrt()
    c = (-dt).sqrt() / s + s * (-dt).sqrt() * (1 - t) / (2 * t)
    algorithm = FlowGRPO(steps=steps, trained_steps=1, noise_level=a, shift=shift)
    move, std = algorithm.response(ts)
    torch.testing.assert_close(move / std, c, rtol=1e-12, atol=0)
    weights = equal_pull(move / std)
    assert weights.mean().item() == pytest.approx(1) and (weights * c).std() < 1e-12


def test_weights_reproduce_a_published_table():
    # 1 / c(t) for the first of 20 steps with shift 3, as the authors of Flash-GRPO keep it; their noise is linear in t
    u = 1 - torch.arange(21, dtype=torch.float64) / 20
    ts = 3 * u / (1 + 2 * u)
    t, dt = ts[:-1], ts[1:] - ts[:-1]
    s = ts[1] * t
    c = (-dt).sqrt() / s + s * (-dt).sqrt() * (1 - t) / (2 * t)
    table = torch.tensor([7.4770, 7.0414, 6.6112, 6.1867, 5.7682, 5.3559, 4.9502, 4.5513, 4.1596, 3.7754]).double()
    torch.testing.assert_close(equal_pull(c[:10]), table / table.mean(), rtol=2e-3, atol=0)


@pytest.mark.parametrize("name", BASES)
@pytest.mark.parametrize("option", [{"guard": True}, {"time_weight": "equal"}, {"chunk": 2, "guard": True}])
def test_groups_with_grids_of_their_own(name, option):
    network, algorithm = SmallNet(), with_options(BASES[name], **option)
    rollout, advantages = collect(algorithm, network, groups=2)
    network = SmallNet()
    common = total_loss(algorithm, network, rollout, advantages)
    same = replace(rollout, ts=rollout.ts[:, None].expand(-1, 2))
    torch.testing.assert_close(total_loss(algorithm, network, same, advantages), common)
    ts = torch.stack([rollout.ts, rollout.ts**2], 1)
    both, each = algorithm.response(ts), [algorithm.response(ts[:, g]) for g in range(2)]
    for g in range(2):
        for together, alone in zip(both, each[g], strict=True):
            torch.testing.assert_close(together[:, g], alone)


# --- scouts ---


@given(st.integers(1, 4), st.integers(2, 9), st.integers(0, 99))
def test_extremes_are_the_best_and_the_worst(groups, most, seed):
    rewards = randn((groups, most), seeded(seed))
    for count in range(2, most + 1):
        for row, kept in zip(rewards.tolist(), extremes(rewards, count).tolist(), strict=True):
            order = sorted(range(most), key=lambda i: -row[i])
            assert kept == order[: count - count // 2] + order[most - count // 2 :]


def nearness(samples):
    return -(samples - 1).flatten(2).square().sum(2)


SCOUTING = {name: a for name, a in SMALL.items() if not getattr(base(a), "shared_noise", False)}


@pytest.mark.parametrize("name", SCOUTING)
def test_scouts_keep_the_best_and_worst_starts(name):
    plain = SCOUTING[name]
    algorithm, velocity = Previews(plain, 15, 3), Counted(PointwiseVelocity())
    noise = randn((3, *SHAPE), seeded(1))
    rollout = algorithm.rollout(velocity, noise, None, streams(3, 0), 0, nearness)
    assert velocity.plain == round(rollout.nfe * 3 * algorithm.group_size)
    assert rollout.nfe == algorithm.nfe_old == plain.nfe_old + 15 * 3 / 6

    with torch.no_grad():
        start = algorithm.starts(noise, 15, streams(3, 0))
        previews = solve(PointwiseVelocity(), start.flatten(0, 1), time_grid(3), method="euler").x[-1]
        previews = previews.unflatten(0, (3, 15))
    for g, rewards in enumerate(nearness(previews)):
        order = rewards.argsort(descending=True).tolist()
        chosen = start[g, order[:3] + order[-3:]]
        if isinstance(plain, ForwardProcess):  # keeps no trajectory, only where it ended
            with torch.no_grad():
                ends = solve(PointwiseVelocity(), chosen, time_grid(plain.steps), method=plain.method).x[-1]
            assert torch.equal(rollout.samples[g], ends)
        else:
            assert torch.equal(rollout.x[0, g], chosen)
    alone = algorithm.rollout(PointwiseVelocity(), noise[1:2], None, [seeded(7, 0, 1)], 0, nearness)
    assert torch.equal(alone.x[:, 0], rollout.x[:, 1])  # a group keeps its scouts, whoever else is there


def test_scouts_see_the_condition_of_their_group():
    seen = []

    def velocity(x, t, cond):
        seen.append(cond.tolist())
        return torch.zeros_like(x)

    algorithm = Previews(SMALL["neighbor"], 7, 1)
    algorithm.rollout(velocity, torch.zeros(2, *SHAPE), torch.tensor([4.0, 5.0]), seeded(0), 0, nearness)
    assert seen[0] == [4.0] * 7 + [5.0] * 7 and seen[1] == [4.0] * 6 + [5.0] * 6


def test_metrics_count_the_scouts():
    algorithm = Previews(NeighborGRPO(group_size=4, steps=3, anchors=2, trained_steps=2), 8)
    rows = Trainer(TinyTask(), algorithm, SETTINGS).run(progress=False).rows
    assert [row["nfe_old"] for row in rows] == [3 + 8 * 2 / 4] * 2


@pytest.mark.parametrize("name", ALGORITHMS)
def test_a_shift_that_is_the_tasks_suits_every_modifier(name):
    "It is None until a task is known."
    for modifier in MODIFIERS:
        more = dict(chunk=0) if modifier == "chunks" else {}
        plain, open_shift = make(name), make(name, shift=None)
        try:
            modified(plain, modifier, **more)
        except ValueError:
            continue
        assert modified(open_shift, modifier, **more).shift is None
