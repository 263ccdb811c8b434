"""The loop in memory: its metrics, its updates, its penalties, its rewards, and what a task may be."""

import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from helpers import TinyTask, weights
from hypothesis import given
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from neighbor_grpo.flow import seeded
from neighbor_grpo.grpo import SurrogateStats, check_rewards, combine_rewards
from neighbor_grpo.neighbor import NeighborGRPO
from neighbor_grpo.rivals.gaussian import DanceGRPO
from neighbor_grpo.training import Run, TrainSettings, choose_prompts, metrics, score, train

ALGORITHM = NeighborGRPO(group_size=4, steps=3, anchors=2, trained_steps=2)
SETTINGS = TrainSettings(iterations=6, groups=3, updates=2, lr=1e-2, kl_weight=0.05, ema=0.8, eval_every=2)
FIELDS = "iteration reward_mean reward_std nfe_old nfe_theta clip_fraction ratio_min ratio_max entropy grad_norm"


def run(task=None, algorithm=ALGORITHM, callback=None, **settings):
    "A training that leaves nothing on the disk."
    settings = replace(SETTINGS, **settings)
    return train(task or TinyTask(), algorithm, settings, progress=False, callback=callback)


# --- metrics ---


@pytest.mark.parametrize("algorithm", [ALGORITHM, DanceGRPO(group_size=4, steps=4, trained_steps=2)])
def test_metrics_have_exactly_the_documented_fields(algorithm):
    rows = run(algorithm=algorithm).rows
    assert [row["iteration"] for row in rows] == [1, 2, 3, 4, 5, 6]
    for row in rows:
        assert set(row) == {*FIELDS.split(), "seconds"}
        assert row["nfe_old"] == algorithm.nfe_old and row["nfe_theta"] == 2 * algorithm.nfe_theta
        assert (row["entropy"] is None) == isinstance(algorithm, DanceGRPO)
        assert row["ratio_min"] <= 1 <= row["ratio_max"] and 0 <= row["clip_fraction"] <= 1
        assert row["grad_norm"] > 0 and row["seconds"] > 0


def test_a_single_update_is_on_policy():
    for row in run(updates=1).rows:
        assert row["ratio_min"] == row["ratio_max"] == 1 and row["clip_fraction"] == 0


def test_reward_metrics_are_those_of_the_samples():
    seen = []

    class Watched(TinyTask):
        def reward(self, samples, prompts):
            rewards = super().reward(samples, prompts)
            if len(rewards) == 12:  # three groups of four
                seen.append(rewards.view(3, 4))
            return rewards

    for row, rewards in zip(run(task=Watched()).rows, seen, strict=True):
        assert row["reward_mean"] == pytest.approx(rewards.mean().item())
        assert row["reward_std"] == pytest.approx(rewards.std(1, correction=0).mean().item())


def test_evaluations_at_the_start_at_intervals_and_at_the_end():
    trainer = run(iterations=5, eval_every=2)
    assert [row["iteration"] for row in trainer.evals] == [0, 2, 4, 5]
    assert trainer.evals[-1]["reward"] == TinyTask().evaluate(trainer.velocity)["reward"]


# --- optimisation ---


def test_one_seed_one_result():
    first, again, other = (weights(run(seed=seed).policy) for seed in (0, 0, 1))
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_the_result_does_not_depend_on_the_global_generator():
    torch.manual_seed(1)
    task = TinyTask()
    torch.manual_seed(5)
    first = weights(run(task=task).policy)
    task = TinyTask()
    torch.rand(100)
    assert torch.equal(first, weights(run(task=task).policy))


def test_every_iteration_draws_fresh_numbers():
    seen = []

    class Watched(TinyTask):
        def reward(self, samples, prompts):
            if prompts is not None:
                seen.append((samples, torch.initial_seed()))
            return super().reward(samples, prompts)

    run(task=Watched(dropout=0.0), lr=1e-9)  # the policy hardly moves: only the noise can make a difference
    assert len({seed for _, seed in seen}) == len(seen) == 6  # of the global generator, for dropout
    assert torch.pdist(torch.cat([samples for samples, _ in seen])).min() > 1e-3


def test_training_raises_the_held_out_reward():
    trainer = run(task=TinyTask(dropout=0.0), iterations=60, groups=8, updates=1, ema=0.0)
    assert (
        trainer.evals[-1]["reward"] > 0.5 * trainer.evals[0]["reward"]
    )  # rewards are negative: at least half way to 0


def test_the_average_follows_the_weights():
    task = TinyTask()
    expected = weights(task.policy)

    def follow(trainer):
        nonlocal expected
        expected = 0.8 * expected + 0.2 * weights(trainer.policy)
        torch.testing.assert_close(weights(trainer.velocity), expected, atol=1e-6, rtol=1e-5)
        assert not torch.equal(weights(trainer.velocity), weights(trainer.policy))

    assert run(task=task, updates=1, callback=follow).iteration == 6


def test_without_an_average_the_policy_is_evaluated():
    trainer = run(ema=0.0)
    assert trainer.velocity is trainer.policy


@pytest.mark.parametrize("lr_decay", [0, 6, 8])
def test_the_rate_falls_in_a_straight_line(lr_decay):
    rates, look = [], lambda trainer: rates.append(trainer.optimizer.param_groups[0]["lr"])
    run(lr_decay=lr_decay, callback=look)
    left = [1 - i / lr_decay if lr_decay else 1 for i in range(6)]
    assert rates == pytest.approx([SETTINGS.lr * share for share in left])


def test_first_step_has_the_size_of_the_learning_rate():
    task = TinyTask(dropout=0.0)
    before = weights(task.policy)
    trainer = run(task=task, iterations=1, updates=1, lr=3e-3)
    moved = (weights(trainer.policy) - before).abs()  # AdamW's first step is lr * sign(gradient)
    assert moved.max().item() == pytest.approx(3e-3, rel=0.01) and moved.median().item() == pytest.approx(
        3e-3, rel=0.05
    )


def test_long_gradients_are_cut_to_the_allowed_norm():
    norms = []

    def measure(trainer):
        norms.append(torch.cat([p.grad.flatten() for p in trainer.policy.parameters()]).norm().item())

    rows = run(max_grad_norm=1e-3, updates=1, callback=measure).rows
    assert min(row["grad_norm"] for row in rows) > 1e-3  # as it was before the cut
    assert norms == pytest.approx([1e-3] * 6, rel=1e-3)


def test_frozen_weights_stay():
    task = TinyTask()
    task.policy.net[0].requires_grad_(False)
    before = weights(task.policy.net[0])
    trainer = run(task=task)
    assert torch.equal(weights(trainer.policy.net[0]), before)


@pytest.mark.parametrize("penalty", ["kl_weight", "hold_weight"])
def test_a_penalty_holds_the_policy_near_the_reference(penalty):
    start, algorithm = weights(TinyTask().policy), replace(ALGORITHM, trained_steps=1, train_where="first")
    settings = dict(algorithm=algorithm, iterations=30, kl_weight=0.0)
    far, near = (weights(run(**settings | {penalty: w}).policy) - start for w in (0.0, 10.0))
    assert near.norm() < far.norm()


# --- prompts ---


@given(st.integers(1, 12), st.integers(1, 12), st.integers(0, 50))
def test_every_prompt_once_in_each_epoch(total, count, seed):
    stream = torch.cat([choose_prompts(total, count, seed, iteration) for iteration in range(3 * total)])
    for epoch in stream.split(total):
        assert sorted(epoch.tolist()) == list(range(total)) or len(epoch) < total


def test_epochs_and_seeds_are_shuffled_differently():
    orders = {tuple(choose_prompts(50, 50, seed, epoch).tolist()) for seed in range(3) for epoch in range(3)}
    assert len(orders) == 9 and tuple(range(50)) not in orders


# --- guidance ---


def guided_task():
    "A policy that rolls out with other guidance than it is trained with."
    task = TinyTask()
    task.split_guidance = True
    return task


@pytest.mark.parametrize("settings", [dict(updates=2), dict(updates=1, collector="average")])
def test_stored_velocities_of_another_guidance_are_not_compared(settings):
    with pytest.raises(ValueError, match="train_guidance_scale must be that of the rollout unless updates is 1"):
        Run(guided_task(), ALGORITHM, replace(SETTINGS, **settings))
    Run(TinyTask(), ALGORITHM, replace(SETTINGS, **settings))


def test_another_guidance_is_fine_where_the_ratio_starts_at_one():
    assert Run(guided_task(), ALGORITHM, replace(SETTINGS, updates=1)).step()["ratio_max"] == 1


# --- several rewards ---


class TwoRewards(TinyTask):
    "To the right, and a hundred times as much up."

    def __init__(self, *weights):
        super().__init__()
        if weights:
            self.reward_weights = weights

    def reward(self, samples, prompts):
        one = -(samples - 1).square().sum(1)
        return one if prompts is None else torch.stack([samples[:, 0], 100 * samples[:, 1]], 1)


class OneReward(TwoRewards):
    "The first of them alone."

    def reward(self, samples, prompts):
        rewards = super().reward(samples, prompts)
        return rewards if prompts is None else rewards[:, 0]


def test_several_rewards_are_weighted_after_they_were_standardised():
    first = run(task=OneReward())
    both, scaled = run(task=TwoRewards(1.0, 0.0)), run(task=TwoRewards(1.0, 1e-9))
    assert torch.equal(weights(both.policy), weights(first.policy))
    assert [row["reward_mean"] for row in both.rows] == [row["reward_mean"] for row in first.rows]
    torch.testing.assert_close(weights(scaled.policy), weights(first.policy), atol=1e-4, rtol=1e-3)
    assert (weights(run(task=TwoRewards(1.0, 1.0)).policy) - weights(first.policy)).abs().max() > 1e-3


def test_without_weights_all_rewards_count_alike():
    equal = run(task=TwoRewards(0.5, 0.5))
    assert torch.equal(weights(run(task=TwoRewards()).policy), weights(equal.policy))
    samples, prompts = torch.rand(3, 4, 2), torch.arange(3)
    rewards = score(equal.task, samples, prompts)
    assert rewards.shape == (3, 4, 2)
    expected = samples[..., 0] / 2 + 50 * samples[..., 1]
    torch.testing.assert_close(combine_rewards(rewards, equal.task.reward_weights, check_rewards), expected)


@pytest.mark.parametrize(
    ("fault", "fragments"),
    [
        (lambda r: r.index_fill(1, torch.tensor([1]), math.nan), ["rewards", "finite", "nan"]),
        (lambda r: r[:-1], ["rewards", "(11, 2)", "(12,)"]),
    ],
)
def test_a_fault_in_one_of_several_rewards_stops_the_run(fault, fragments):
    class Faulty(TwoRewards):
        def reward(self, samples, prompts):
            rewards = super().reward(samples, prompts)
            return rewards if prompts is None else fault(rewards)

    with pytest.raises(ValueError) as error:
        run(task=Faulty())
    assert all(part in str(error.value) for part in fragments)


def test_weights_must_fit_the_rewards():
    with pytest.raises(ValueError, match="weights must be one for each of 2 rewards, got '3 weights'"):
        run(task=TwoRewards(1.0, 1.0, 1.0))


# --- who collects, and what it is credited with ---


def test_the_average_collects():
    collectors, compared = [], []

    class Noting(NeighborGRPO):
        def follow(self, velocity, *arguments):
            collectors.append(weights(velocity))
            return super().follow(velocity, *arguments)

        def loss(self, velocity, rollout, states, advantages, on_policy, surrogate):
            assert not on_policy
            if not compared:  # before the first update of this iteration
                with torch.no_grad():
                    v = trainer.average.module(*states.inputs(rollout))
                torch.testing.assert_close(states.select(rollout.v), v, atol=1e-6, rtol=0)
            compared.append(states)
            return super().loss(velocity, rollout, states, advantages, on_policy, surrogate)

    algorithm, settings = Noting(**vars(ALGORITHM)), replace(SETTINGS, collector="average")
    trainer = Run(TinyTask(dropout=0.0), algorithm, settings)
    for _ in range(4):
        compared.clear()
        before = weights(trainer.average.module)
        row = trainer.step()
        assert torch.equal(collectors[-1], before) and len(compared) == 2
    assert not torch.equal(collectors[-1], weights(trainer.policy)) and row["ratio_max"] - row["ratio_min"] > 1e-4


def test_shuffled_advantages_stay_in_their_group():
    plain, shuffled = (Run(TinyTask(), ALGORITHM, replace(SETTINGS, shuffle=s)) for s in (False, True))
    rewards = torch.randn(3, 4, generator=seeded(0))
    moved, orders = 0, set()
    for iteration in range(12):
        shuffled.iteration = iteration
        before, after = plain.credit(rewards), shuffled.credit(rewards)
        assert torch.equal(before.sort(1).values, after.sort(1).values)
        assert torch.equal(after, shuffled.credit(rewards))
        moved += (before != after).any(1).sum().item()
        orders |= {tuple(group) for group in (after[:, :, None] == before[:, None]).int().argmax(2).tolist()}
    assert moved > 25 and len(orders) > 12  # of 36; one order in 24 changes nothing


def test_a_shuffled_run_does_not_learn():
    learned, control = (
        run(task=TinyTask(dropout=0.0), iterations=40, groups=8, updates=1, ema=0.0, shuffle=s) for s in (False, True)
    )
    gain, drift = (t.evals[-1]["reward"] - t.evals[0]["reward"] for t in (learned, control))
    assert gain > 0.5 > 5 * abs(drift)


# --- what an algorithm may tell the loop ---


def test_the_iteration_reaches_the_rollout_and_what_it_spent_the_metrics():
    class Spending(NeighborGRPO):
        def follow(self, velocity, start, cond, generator, iteration, reward):
            assert reward(start).shape == (3, 4)
            return replace(super().follow(velocity, start, cond, generator, iteration, reward), nfe=100.5 + iteration)

    algorithm = Spending(group_size=4, steps=3, anchors=2, trained_steps=2)
    assert [row["nfe_old"] for row in run(algorithm=algorithm).rows] == [100.5 + k for k in range(6)]


# --- what a task may be, and what the loop does with a policy alone ---


class SixMembers:
    "A task of somebody who has never seen `Task`."

    shape, prompts = TinyTask.shape, TinyTask.prompts
    conditions, reward, evaluate = TinyTask.conditions, TinyTask.reward, TinyTask.evaluate

    def __init__(self, **options):
        self.policy = TinyTask(**options).policy


def test_an_object_with_the_six_members_trains_as_the_class_does():
    trained, expected = run(task=SixMembers()), run()
    assert torch.equal(weights(trained.policy), weights(expected.policy)) and trained.evals == expected.evals


SIX = ("policy", "shape", "prompts", "conditions", "reward", "evaluate")


@pytest.mark.parametrize("member", SIX)
def test_a_member_that_is_missing_is_named_before_anything_runs(member):
    members = {name: getattr(SixMembers(), name) for name in SIX if name != member}
    with pytest.raises(AttributeError, match=member):
        Run(SimpleNamespace(**members), ALGORITHM, SETTINGS)


def test_a_member_beyond_the_six_is_not_ignored():
    task = SixMembers()
    task.reward_weights = [1.0, 2.0]
    with pytest.raises(ValueError, match="task must be an instance of training.Task.*reward_weights.*'SixMembers'"):
        Run(task, ALGORITHM, SETTINGS)


def test_processes_exchange_what_is_in_the_computers_memory():
    "What is pickled on one GPU would stay on it, where another process cannot put it beside its own."
    asked = []

    def gather(value):
        asked.append(value)
        return [value]

    run = SimpleNamespace(gather=gather, penalties=[], iteration=0)
    with FakeTensorMode():
        stats, values = SurrogateStats(), torch.zeros(4, device="cuda:1")
        stats.surrogate(values, values, values, 0.1)
        rollout = SimpleNamespace(nfe=1.0, x=torch.zeros(2, 1, 2))
        with pytest.raises(DataDependentOutputException):  # mere shapes have no mean
            metrics(run, torch.zeros(1, 2), rollout, [], stats)
    assert [row.device.type for row in asked[-1]] == ["cpu"]
