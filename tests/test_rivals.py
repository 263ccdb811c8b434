"""Replay: what is replaced, what is remembered and how it survives. Matching: values and gradients against loops."""

import copy
from contextlib import suppress
from dataclasses import dataclass, fields, replace

import pytest
import torch
from helpers import PointwiseVelocity, SmallNet, TinyTask, assert_same_outcome, gradients
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.distributions import Normal

from neighbor_grpo.flow import randn, seeded
from neighbor_grpo.grpo import SurrogateStats, group_advantages
from neighbor_grpo.rivals.catalogue import (
    ALGORITHMS,
    BROUGHT_ALONG,
    MODIFIERS,
    make,
    modified,
    modifiers_of,
    own_fields,
)
from neighbor_grpo.rivals.gaussian import FlowGRPO
from neighbor_grpo.rivals.modifiers import Modifier, base
from neighbor_grpo.rivals.trajectories import TMPO, Replay, best_of_each
from neighbor_grpo.rollouts import Algorithm
from neighbor_grpo.runs.trainer import Trainer
from neighbor_grpo.tables import field_docs
from neighbor_grpo.training import Run, TrainSettings, plan

SHAPE = (3, 2, 2)
SETTINGS = {"group_size": 6, "steps": 5, "trained_steps": 3}
OP = make("op", **SETTINGS, replay=2, memory_size=3, memory_age=2)
MATCH = TMPO(**SETTINGS)
every_name = pytest.mark.parametrize("name", ALGORITHMS)


def streams(groups, *keys):
    return [seeded(7, *keys, g) for g in range(groups)]


def collect(algorithm, velocity, groups=3, key=0):
    noise = randn((groups, *SHAPE), seeded(key, 1), dtype=torch.float64)
    return algorithm.rollout(velocity, noise, None, streams(groups, key))


def rewards_of(groups=3, key=0, size=6):
    return randn((groups, size), seeded(key, 2), dtype=torch.float64)


def remembered(algorithm=OP, prompts=(4, 1, 4), key=0, iteration=0, memory=None):
    "The memory after one iteration."
    rollout = collect(algorithm, PointwiseVelocity(), len(prompts), key)
    news = algorithm.recall(rollout, rewards_of(len(prompts), key), torch.tensor(prompts), {}, None)[2]
    return algorithm.remember(memory or {}, [news], iteration)


# --- what is replayed ---


def test_an_empty_memory_changes_nothing():
    rollout, rewards = collect(OP, PointwiseVelocity()), rewards_of()
    mixed, mixed_rewards, news = OP.recall(rollout, rewards, torch.tensor([0, 1, 2]), {}, streams(3, 9))
    assert mixed.replayed is None and torch.equal(mixed.x, rollout.x) and torch.equal(mixed.v, rollout.v)
    assert torch.equal(mixed_rewards, rewards) and len(news["prompt"]) == 9


@given(st.lists(st.integers(0, 4), min_size=1, max_size=4), st.integers(1, 5), st.booleans())
def test_remembered_trajectories_replace_those_nearest_to_the_mean(prompts, replay, several):
    algorithm, memory = replace(OP, replay=replay), remembered()
    rollout, rewards = collect(algorithm, PointwiseVelocity(), len(prompts), 1), rewards_of(len(prompts), 1)
    if several:
        rewards = torch.stack([rewards, rewards], 2)
        memory = memory | {"reward": torch.stack([memory["reward"]] * 2, 1)}
    before = rollout.x.clone()
    numbers = torch.tensor(prompts)
    mixed, mixed_rewards, _ = algorithm.recall(rollout, rewards, numbers, memory, streams(len(prompts), 9))
    assert torch.equal(rollout.x, before)  # what was collected is left alone
    assert (mixed.replayed is None) == (not {1, 4} & set(prompts)) and mixed.nfe == rollout.nfe
    for g, prompt in enumerate(prompts):
        score = rewards[g] if not several else rewards[g, :, 0]
        known = [i for i in range(len(memory["prompt"])) if memory["prompt"][i] == prompt]
        count = min(replay, len(known))
        order = sorted(range(6), key=lambda i, s=score: abs(s[i] - s.mean()))
        used = []
        for place, i in enumerate(order):
            if place >= count:
                assert torch.equal(mixed.x[:, g, i], rollout.x[:, g, i])
                assert torch.equal(mixed_rewards[g, i], rewards[g, i])
                continue
            row = next(r for r in known if torch.equal(memory["x"][r], mixed.x[:, g, i]))
            assert torch.equal(memory["v"][row], mixed.v[:, g, i])
            assert torch.equal(memory["reward"][row], mixed_rewards[g, i])
            used.append(row)
        assert len(set(used)) == count  # none twice
        if mixed.replayed is not None:
            assert mixed.replayed[g].nonzero()[:, 0].tolist() == sorted(order[:count])


def test_the_draw_is_the_groups_own():
    memory, rollout = remembered(replace(OP, memory_size=12)), collect(OP, PointwiseVelocity(), 3, 1)
    rewards, prompts = rewards_of(3, 1), torch.tensor([4, 4, 1])
    together = OP.recall(rollout, rewards, prompts, memory, streams(3, 9))[0]
    for g in range(3):
        part = replace(rollout, x=rollout.x[:, g : g + 1], v=rollout.v[:, g : g + 1])
        alone = OP.recall(part, rewards[g : g + 1], prompts[g : g + 1], memory, streams(3, 9)[g : g + 1])[0]
        assert torch.equal(alone.x[:, 0], together.x[:, g])


def test_the_ratio_of_a_replayed_trajectory_is_to_the_policy_that_made_it():
    torch.manual_seed(0)
    network = SmallNet()
    first = collect(OP, network)
    memory = OP.remember({}, [OP.recall(first, rewards_of(), torch.tensor([0, 1, 2]), {}, None)[2]], 0)
    old = copy.deepcopy(network)
    nn.init.normal_(network.out.bias, std=0.1)
    rollout, rewards = collect(OP, network, key=1), rewards_of(key=1)
    mixed, rewards, _ = OP.recall(rollout, rewards, torch.tensor([0, 1, 2]), memory, streams(3, 9))
    stats, advantages = SurrogateStats(), OP.advantages(rewards)
    loss = sum(OP.losses(network, mixed, advantages, streams(3, 1), on_policy=False, surrogate=stats.surrogate))
    expected, ratios = [], []
    for g in range(3):
        for i in range(6):
            replayed = not torch.equal(mixed.x[:, g, i], rollout.x[:, g, i])
            log_ratio = 0
            for k in range(3):  # the first three of five steps
                x, t, t_next = mixed.x[k, g, i][None], mixed.ts[k][None], mixed.ts[k + 1]
                log_probs = []
                for policy in (network, old if replayed else network):
                    mean, std = base(OP).step(x, policy(x, t).detach(), t, t_next, mixed.ts[1])
                    log_probs.append(Normal(mean, std).log_prob(mixed.x[k + 1, g, i]).mean())
                log_ratio += (log_probs[0] - log_probs[1]) / 3
            ratio, a, c = log_ratio.exp(), advantages[g, i], base(OP).clip_range
            expected.append(torch.minimum(ratio * a, ratio.clamp(1 - c, 1 + c) * a))
            ratios.append(ratio.item())
    assert sum(abs(r - 1) > 1e-4 for r in ratios) == 6 and sum(abs(r - 1) < 1e-9 for r in ratios) == 12
    assert loss.item() == pytest.approx(-torch.stack(expected).mean().item(), abs=1e-10)
    summary = stats.summary()
    assert (summary["ratio_min"], summary["ratio_max"]) == pytest.approx((min(ratios), max(ratios)), abs=1e-9)


def test_without_replay_and_truncation_it_is_flow_grpo():
    neutral = make("op", replay=0, chunk=1, trained_steps=9, train_where="random")
    runs = [
        Trainer(TinyTask(), a, TrainSettings(iterations=3, groups=2)).run(progress=False) for a in (neutral, FlowGRPO())
    ]
    states = [run.policy.state_dict() for run in runs]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert runs[0].memory == {}


# --- what is remembered ---


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 5)), max_size=30), st.integers(1, 4))
def test_best_of_each(rows, count):
    prompts, scores = torch.tensor([r[0] for r in rows]).long(), torch.tensor([r[1] for r in rows]).float()
    expected = []
    for prompt in sorted(set(prompts.tolist())):
        mine = [i for i in range(len(rows)) if rows[i][0] == prompt]
        expected += sorted(mine, key=lambda i: -rows[i][1])[:count]
    assert best_of_each(prompts, scores, count).tolist() == expected


def test_memory_holds_the_best_of_each_prompt_and_lets_the_old_go():
    memory, kept = {}, {prompt: [] for prompt in range(4)}
    for iteration in range(5):
        rollout, rewards = collect(OP, PointwiseVelocity(), 3, iteration), rewards_of(3, iteration)
        prompts = torch.tensor([iteration % 2, 3, 3])
        news = OP.recall(rollout, rewards, prompts, memory, streams(3, 9, iteration))[2]
        memory = OP.remember(memory, [news], iteration)
        for g in range(3):
            kept[prompts[g].item()] += [(rewards[g, i].item(), rollout.x[:, g, i], iteration) for i in range(6)]
        for prompt, known in kept.items():
            recent = [k for k in known if iteration - k[2] < OP.memory_age]  # may be replayed once more
            kept[prompt] = best = sorted(recent, key=lambda k: -k[0])[:3]
            mine = memory["prompt"] == prompt
            assert memory["reward"][mine].tolist() == [k[0] for k in best]
            assert all(torch.equal(x, k[1]) for x, k in zip(memory["x"][mine], best, strict=True))
            assert memory["iteration"][mine].tolist() == [k[2] for k in best]
    assert (memory["iteration"] == 3).any() and set(memory["prompt"].tolist()) == {0, 1, 3}
    assert all(values.is_contiguous() and values.device.type == "cpu" for values in memory.values())


def test_memory_does_not_depend_on_the_number_of_processes():
    whole, parts = remembered(prompts=(4, 1, 4, 2)), {}
    for key in (1, 2):
        rollout, rewards = collect(OP, PointwiseVelocity(), 4, key), rewards_of(4, key).round()  # with ties
        prompts = torch.tensor([4, 2, 4, 0])
        news = [OP.recall(rollout, rewards, prompts, whole, streams(4, 9))[2]]
        for size in (1, 2):
            split = []
            for start in range(0, 4, size):
                part = slice(start, start + size)
                own = replace(rollout, x=rollout.x[:, part], v=rollout.v[:, part])
                split.append(OP.recall(own, rewards[part], prompts[part], whole, streams(4, 9)[part])[2])
            parts[size] = OP.remember(whole, split, key)
        whole = OP.remember(whole, news, key)
        for other in parts.values():
            assert whole.keys() == other.keys() and all(torch.equal(whole[name], other[name]) for name in whole)


def test_a_run_that_was_killed_goes_on_with_the_same_memory(tmp_path):
    settings = TrainSettings(iterations=7, groups=4, updates=2, ema=0.8, checkpoint_every=3, eval_every=3)
    algorithm = make("op", group_size=4, steps=4, trained_steps=2, replay=2, memory_size=3, memory_age=3)

    def start(folder, resume=False, stop=None):
        def callback(trainer):
            if trainer.iteration == stop:
                raise KeyboardInterrupt

        return Trainer(TinyTask(), algorithm, settings, folder, resume).run(progress=False, callback=callback)

    whole = start(tmp_path / "whole")
    assert set(whole.memory["prompt"].tolist()) == set(range(5))  # all prompts of the task
    for stop in (2, 5):
        with suppress(KeyboardInterrupt):
            start(tmp_path / "broken", resume=stop > 2, stop=stop)
    start(tmp_path / "broken", resume=True)
    assert_same_outcome(tmp_path / "broken", tmp_path / "whole")
    plain = Trainer(TinyTask(), replace(algorithm, replay=0), settings).run(progress=False)
    assert any(a["ratio_max"] != b["ratio_max"] for a, b in zip(whole.rows, plain.rows, strict=True))  # it did replay


# --- matching ---


def flat_match(algorithm, velocity, rollout, advantages):
    "The objective of all groups as nested loops."
    steps = algorithm.choose(rollout, streams(rollout.x.shape[1], 1)).step.unique().tolist()
    total = 0
    for g in range(rollout.x.shape[1]):
        path = []
        for i in range(algorithm.group_size):
            log_prob = 0
            for k in steps:
                x, t, t_next = rollout.x[k, g, i][None], rollout.ts[k][None], rollout.ts[k + 1]
                mean, std = algorithm.step(x, velocity(x, t), t, t_next, rollout.ts[1])
                log_prob = log_prob + Normal(mean[0], std).log_prob(rollout.x[k + 1, g, i]).mean()
            path.append(log_prob)
        p, q = torch.stack(path).softmax(0), advantages[g].softmax(0)
        if algorithm.match == "cross":
            total = total + algorithm.group_size * (q * p.log()).sum()
        else:
            total = total - (p.log() - q.log()).square().sum() / 2
    return -total / (rollout.x.shape[1] * algorithm.group_size)  # a mean over the trajectories


@pytest.mark.parametrize("match", ["balance", "cross"])
@pytest.mark.parametrize("settings", [{}, {"sampler": "flow", "shared_noise": False}, {"beta": 15.0}])
def test_matching_against_loops(match, settings):
    torch.manual_seed(0)
    algorithm, network = replace(MATCH, match=match, train_where="first", **settings), SmallNet()
    rollout = collect(algorithm, network)
    nn.init.normal_(network.out.bias, std=0.05)
    advantages = algorithm.advantages(rewards_of())
    expected = flat_match(algorithm, network, rollout, advantages)
    expected.backward()
    gradient = gradients(network)
    for size in (0, 18, 36):
        network.zero_grad()
        parts = list(algorithm.losses(network, rollout, advantages, micro_batch=size))
        sum(parts).backward()
        assert len(parts) == (3 if size == 18 else 2 if size == 36 else 1)
        assert sum(parts).item() == pytest.approx(expected.item(), abs=1e-10)
        assert (gradients(network) - gradient).abs().max() < 1e-11


@pytest.mark.parametrize(("match", "coefficient"), [("cross", lambda p, q: 3 * 6 * (q - p)), ("balance", None)])
def test_the_pull_on_a_trajectory(match, coefficient):
    if coefficient is None:  # derivative of the squared differences of log-softmaxes

        def coefficient(p, q):
            residual = p.log() - q.log()
            return 3 * (p * residual.sum(1, keepdim=True) - residual)  # K, as the loss divides by K times the leaves

    algorithm = replace(MATCH, match=match)
    rollout, logits = collect(algorithm, PointwiseVelocity()), algorithm.advantages(rewards_of())
    states = algorithm.choose(rollout, streams(3, 1))
    v = states.select(rollout.v).requires_grad_(True)
    path = algorithm.log_prob(rollout, states, v)
    p = path.detach().view(3, 6, 3).sum(2).softmax(1)
    value = -algorithm.loss(lambda x, t, cond: v, rollout, states, logits)
    (pull,) = torch.autograd.grad(value, v, retain_graph=True)
    weight = coefficient(p, logits.softmax(1))[states.prompt, states.member]
    (expected,) = torch.autograd.grad((weight * path).sum(), v)
    torch.testing.assert_close(pull, expected)
    torch.testing.assert_close(weight.view(3, 6, 3)[..., 0].sum(1), torch.zeros(3, dtype=torch.float64))


def test_matched_groups_feel_nothing():
    for match in ("balance", "cross"):
        algorithm = replace(MATCH, match=match)
        rollout = collect(algorithm, PointwiseVelocity())
        states = algorithm.choose(rollout, streams(3, 1))
        v = states.select(rollout.v).requires_grad_(True)
        path = algorithm.log_prob(rollout, states, v).view(3, 6, 3).sum(2).detach()
        algorithm.loss(lambda x, t, cond, v=v: v, rollout, states, path).backward()
        assert v.grad.abs().max() < 1e-12


def test_logits_of_the_target():
    rewards, other = rewards_of(), rewards_of(key=1)
    standard, raw = replace(MATCH, beta=3.0), replace(MATCH, beta=3.0, standardise=False)
    centred = rewards - rewards.mean(1, keepdim=True)
    torch.testing.assert_close(standard.advantages(rewards), 3 * group_advantages(rewards))
    torch.testing.assert_close(raw.advantages(rewards), 3 * centred)
    both, weights = torch.stack([rewards, other], 2), [0.25, 2.0]
    together = 0.25 * rewards + 2 * other
    torch.testing.assert_close(raw.advantages(both, weights), 3 * (together - together.mean(1, keepdim=True)))
    expected = 3 * (0.25 * group_advantages(rewards) + 2 * group_advantages(other)).clamp(-5, 5)
    torch.testing.assert_close(standard.advantages(both, weights), expected)
    for algorithm in (standard, raw):
        assert torch.equal(algorithm.advantages(torch.full((2, 6), 0.3)), torch.zeros(2, 6))


def test_a_run_of_matching_reports_no_ratio():
    run = Trainer(TinyTask(), MATCH, TrainSettings(iterations=1, groups=2)).run(progress=False)
    assert all(run.rows[0][name] is None for name in ("ratio_min", "ratio_max", "clip_fraction"))


# --- the catalogue ---


def test_the_catalogue_holds_every_algorithm_once():
    assert len(set(ALGORITHMS.values())) == len(ALGORITHMS)
    for name, algorithm in ALGORITHMS.items():
        assert issubclass(algorithm, Algorithm) and name == name.lower() and "arXiv" in algorithm.__doc__
        assert isinstance(algorithm(), Algorithm) and all(f.default is not None for f in fields(algorithm))


ORDERS = [("weights", "chunks", "slas"), ("slas", "chunks", "weights"), ("chunks", "slas", "weights")]


@pytest.mark.parametrize("names", ORDERS)
def test_modifiers_nest_in_one_order_around_what_is_there(names):
    inside_out = ["weights", "chunks", "slas"]
    settings = {"chunks": {"chunk": 3}, "weights": {"time_weight": "noise"}}
    algorithm = modified(FlowGRPO(), *names, chunk=3, time_weight="noise")
    around, one_by_one = modifiers_of(algorithm), FlowGRPO()
    assert [*around] == inside_out and base(algorithm) == FlowGRPO()
    assert {name: around[name] for name in settings} == settings
    for name in names:
        one_by_one = modified(one_by_one, name, **settings.get(name, {}))
    assert one_by_one == algorithm
    assert modified(algorithm, chunk=9) == modified(FlowGRPO(), *names, chunk=9, time_weight="noise")


def test_weights_go_inside_the_chunk_that_an_algorithm_brings_along():
    algorithm = modified(OP, "weights")
    rollout = collect(algorithm, PointwiseVelocity())
    loss = sum(algorithm.losses(PointwiseVelocity(0.6, -0.2, 0.1), rollout, algorithm.advantages(rewards_of())))
    assert loss.isfinite() and [*modifiers_of(algorithm)] == ["weights", "chunks", "replay"]


@every_name
def test_an_algorithm_comes_back_from_its_name_and_modifiers(name):
    algorithm = make(name)
    around = modifiers_of(algorithm)
    assert type(base(algorithm)) is ALGORITHMS[name] and [*around] == [*BROUGHT_ALONG.get(name, {})]
    settings = {key: value for own in around.values() for key, value in own.items()}
    assert modified(base(algorithm), *around, **settings) == algorithm


REFUSED = [
    (lambda: make("grpo"), "name", "neighbor, flow"),
    (lambda: make("flow", chunk=3), "settings", "'chunk'"),
    (lambda: make("op", time_weight="equal"), "settings", "memory_age"),
    (lambda: modified(FlowGRPO(), "gaurd"), "modifiers", "guard, chunks"),
    (lambda: modified(FlowGRPO(), "guard", "chunks", chunks=3), "settings", "'chunks'"),
    (lambda: modified(FlowGRPO(), scouts=3), "settings", "'scouts'"),
    (lambda: modified(Nameless(FlowGRPO()), "guard"), "modifiers", "Nameless"),
]


@dataclass(frozen=True)
class Nameless(Modifier):
    "A modifier that has no name in the catalogue."

    fits = Replay.fits


@pytest.mark.parametrize("case", REFUSED, ids=range(len(REFUSED)))
def test_wrong_names_and_settings_are_refused_by_name(case):
    attempt, name, shown = case
    with pytest.raises(ValueError) as error:
        attempt()
    assert str(error.value).startswith(name) and shown in str(error.value)


def test_a_modifier_without_a_name_goes_by_that_of_its_class():
    assert modifiers_of(Nameless(OP)) == modifiers_of(OP) | {"Nameless": {}}


@pytest.mark.parametrize("kind", MODIFIERS.values())
def test_every_setting_of_a_modifier_has_a_docstring_and_an_owner(kind):
    names = {field.name for field in own_fields(kind)}
    assert names <= field_docs(kind).keys()
    others = [field.name for other in MODIFIERS.values() if other is not kind for field in own_fields(other)]
    assert not names & {*others}  # settings are found by their names alone


@every_name
def test_only_what_draws_every_step_at_the_same_times_is_replayed(name):
    algorithm = base(make(name, group_size=6))
    if name in ("flow", "dance", "dppo", "op", "tmpo"):
        assert Replay(algorithm).replay == 3
        return
    with pytest.raises(ValueError, match="Replay") as error:
        Replay(algorithm)
    assert Replay(algorithm, 0).replay == 0  # which changes nothing
    assert type(algorithm).__name__ in str(error.value) and "draws every step" in str(error.value)


# --- what the loop does with a memory ---


def test_the_first_update_on_replayed_trajectories_is_not_on_policy():
    run = Run(TinyTask(), OP, TrainSettings(groups=3, updates=2))
    noise, cond = randn((3, 2), seeded(1)), run.task.conditions(torch.arange(3))
    rollout = OP.rollout(run.policy.eval(), noise, cond, streams(3))
    replayed = replace(rollout, v=rollout.v + 1, replayed=torch.eye(3, 6, dtype=torch.bool))
    assert [update.on_policy for update in plan(run, rollout, streams(3))] == [True, False]
    assert [update.on_policy for update in plan(run, replayed, streams(3))] == [False, False]
    run.task.coarse = True
    updates = plan(run, replayed, streams(3))
    assert [(update.on_policy, update.again) for update in updates] == [(False, True)] * 2
    before, states = updates[0].rollout, updates[0].trained  # all but the replayed velocities are computed again
    old = states.of_candidates(replayed.replayed)
    assert torch.equal(states.select(before.v)[old], states.select(replayed.v)[old])
    torch.testing.assert_close(states.select(before.v)[~old], states.select(rollout.v)[~old])
