"""Windows, tails, trunks and branches: against the solvers, plain loops and torch.distributions."""

import math
from dataclasses import replace
from functools import partial

import pytest
import torch
from helpers import (
    Counted,
    GaussianFlow,
    PointwiseVelocity,
    SmallNet,
    TinyTask,
    gradients,
    penalized_loss,
    reverse_sde,
    weights,
)
from hypothesis import given
from hypothesis import strategies as st
from torch.distributions import Normal

from neighbor_grpo import training
from neighbor_grpo.flow import denoised, implied_noise, randn, seeded, time_grid
from neighbor_grpo.grpo import SurrogateStats
from neighbor_grpo.penalties import VelocityPenalty, evaluations
from neighbor_grpo.rivals.gaussian import SDEGRPO
from neighbor_grpo.rivals.mixed import MixGRPO, MixGRPOFlash, MixGRPOFlashStar, TempFlowGRPO, chain, noisy_steps
from neighbor_grpo.rivals.modifiers import ChunkedRatios, GuardedRatios, TimeWeights, base
from neighbor_grpo.rivals.sde import cps
from neighbor_grpo.rollouts import States
from neighbor_grpo.runs.trainer import Trainer
from neighbor_grpo.solvers import solve
from neighbor_grpo.training import Run, TrainSettings

SHAPE = (3, 2, 2)
MIX = MixGRPO(group_size=4, steps=9, trained_steps=3, window_every=1, shift=3.0)
FLASH = MixGRPOFlash(group_size=4, steps=9, trained_steps=3, window_every=1, shift=3.0)
TEMP = TempFlowGRPO(group_size=5, steps=7, shift=3.0)
SMALL = {
    "mix": MIX,
    "random": replace(MIX, window_moves="random"),
    "separate": replace(MIX, shared_noise=False),
    "flash": FLASH,
    "star": MixGRPOFlashStar(group_size=4, steps=9, trained_steps=3),
    "one step": TimeWeights(replace(MIX, trained_steps=1, window_moves="random"), "equal"),
    "mix cps": replace(MIX, sampler="cps"),
    "tempflow": TEMP,
    "tempflow dance": replace(TEMP, sampler="dance"),
    "tempflow cps": GuardedRatios(replace(TEMP, sampler="cps")),
}
every_algorithm = pytest.mark.parametrize("algorithm", SMALL.values(), ids=SMALL)


def streams(groups, *keys):
    "A generator for each group."
    return [seeded(7, *keys, g) for g in range(groups)]


def collect(algorithm, velocity, groups=3, iteration=0, cond=None, dtype=torch.float64):
    "A rollout and the advantages of random rewards."
    noise = randn((groups, *SHAPE), seeded(1), dtype=dtype)
    rollout = algorithm.rollout(velocity, noise, cond, streams(groups, 0), iteration)
    return rollout, algorithm.advantages(randn((groups, algorithm.group_size), seeded(2), dtype=dtype))


def total_loss(algorithm, velocity, rollout, advantages, **more):
    return sum(algorithm.losses(velocity, rollout, advantages, streams(rollout.x.shape[1], 1), **more))


def loss_gradient(algorithm, network, rollout, advantages, **more):
    network.zero_grad()
    total_loss(algorithm, network, rollout, advantages, **more).backward()
    return gradients(network)


def moved_network(seed=0, by=0.03):
    "A network that has left the weights it collected with."
    torch.manual_seed(seed)
    network = SmallNet()
    before = [p.detach().clone() for p in network.parameters()]

    def move():
        with torch.no_grad():
            for p, start in zip(network.parameters(), before, strict=True):
                p.copy_(start + by * torch.randn_like(p))

    return network, move


# --- the window ---


def test_a_window_that_rolls_back_starts_again():
    algorithm = MixGRPO(steps=8, trained_steps=3, window_every=2, window_moves="roll_back")
    lefts = [algorithm.window(i).start for i in range(14)]
    assert lefts == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 0, 0, 1, 1]
    assert all(len(algorithm.window(i)) == 3 and algorithm.window(i).stop <= 7 for i in range(14))
    strides = replace(algorithm, window_stride=3, window_every=1)
    assert [strides.window(i).start for i in range(5)] == [0, 3, 0, 3, 0]
    assert {replace(algorithm, window_moves="frozen").window(i) for i in range(99)} == {range(3)}


def test_random_window_is_uniform_and_depends_on_the_iteration_alone():
    algorithm = MixGRPO(steps=8, trained_steps=3, window_moves="random")
    lefts = torch.tensor([algorithm.window(i).start for i in range(2000)])
    counts = lefts.bincount().double()
    assert len(counts) == 5 and (counts - 400).square().sum() / 400 < 18.5  # chi squared, 4 degrees, p = .001
    torch.manual_seed(5)
    torch.rand(3)
    again = replace(algorithm, group_size=2, window_every=3, noise_level=0.1)
    assert [again.window(i).start for i in range(100)] == lefts[:100].tolist()


@pytest.mark.parametrize("moves", ["progressive", "random", "frozen"])
def test_windows_are_the_same_for_any_number_of_groups(moves):
    algorithm, velocity = replace(MIX, window_moves=moves), PointwiseVelocity()
    for iteration in range(12):
        expected = torch.tensor([k in algorithm.window(iteration) for k in range(9)])
        for groups in (1, 2, 5):
            noise = randn((groups, 2), seeded(groups))
            rollout = algorithm.rollout(velocity, noise, None, streams(groups, iteration), iteration)
            assert torch.equal(rollout.noisy, expected[:, None].expand(9, groups))
            assert torch.equal(noisy_steps(rollout), expected.nonzero().T.expand(groups, 3))


@pytest.mark.parametrize("name", ["random", "tempflow"])
def test_groups_are_the_same_in_any_process(name, monkeypatch):
    seen, plan = [], training.plan
    monkeypatch.setattr(training, "plan", lambda run, rollout, own: seen.append(rollout) or plan(run, rollout, own))
    for iteration in range(3):
        for groups in (range(4), range(2), range(2, 4)):
            run = Run(TinyTask(), SMALL[name], TrainSettings(iterations=3, groups=4))
            run.groups, run.iteration = list(groups), iteration
            run.policy.eval()
            run.step()
        together, *apart = seen[-3:]
        assert torch.equal(torch.cat([r.noisy for r in apart], 1), together.noisy)
        torch.testing.assert_close(torch.cat([r.x for r in apart], 1), together.x)
        assert sum(r.nfe for r in apart) / 2 == pytest.approx(together.nfe)
    assert len(seen) == 9


@given(st.integers(2, 40), st.data())
def test_grid_keeps_its_own_times(steps, data):
    width, ratio = data.draw(st.integers(0, steps - 1)), data.draw(st.floats(0.001, 1))
    algorithm = MixGRPO(steps=steps, trained_steps=width, tail_ratio=ratio, window_moves="random", shift=3.0)
    iteration, full = data.draw(st.integers(0, 500)), time_grid(steps, 3.0)
    ts, end = algorithm.thinned(iteration), algorithm.window(iteration).stop
    assert torch.equal(ts[: end + 1], full[: end + 1]) and ts[-1] == 0
    assert (ts[1:] < ts[:-1]).all() and torch.isin(ts, full).all()
    rest = steps - end
    assert len(ts) - 1 - end == max(1, math.ceil(ratio * rest - 1e-9)) <= rest
    assert torch.equal(replace(algorithm, tail_ratio=1.0).thinned(iteration), full)


def test_a_ratio_is_not_rounded_up_by_its_last_bit():
    assert 0.07 * 100 > 7
    assert len(MixGRPO(steps=101, trained_steps=1, window_moves="frozen", tail_ratio=0.07).thinned(0)) - 1 == 1 + 7
    assert MixGRPOFlash().nfe_old == 4 + math.ceil(0.4 * 21) == 13


# --- rollouts ---


@pytest.mark.parametrize("iteration", [0, 3, 8])
@pytest.mark.parametrize("shared", [True, False])
def test_empty_window_is_the_ode(iteration, shared):
    algorithm, velocity = replace(MIX, trained_steps=0, shared_noise=shared), PointwiseVelocity()
    rollout, advantages = collect(algorithm, velocity, iteration=iteration, dtype=torch.float32)
    with torch.no_grad():
        path = solve(velocity, rollout.x[0].flatten(0, 1), time_grid(9, 3.0), method="euler")
    assert torch.equal(rollout.x.flatten(1, 2), path.x) and torch.equal(rollout.v.flatten(1, 2), path.v)
    assert torch.equal(rollout.ts, path.ts) and rollout.nfe == algorithm.nfe_old == 9 and not rollout.noisy.any()
    assert list(algorithm.losses(velocity, rollout, advantages)) == [] and algorithm.nfe_theta == 0
    assert noisy_steps(rollout).shape == (3, 0)


def test_empty_window_trains_nothing_and_the_loop_survives(tmp_path):
    task, algorithm = TinyTask(), ChunkedRatios(replace(MIX, trained_steps=0), chunk=0)
    settings = TrainSettings(iterations=2, groups=2, updates=2, ema=0.5, kl_weight=0.1)
    before = weights(task.policy)
    trainer = Trainer(task, algorithm, settings, tmp_path).run(progress=False)
    assert torch.equal(weights(task.policy), before)
    assert all(row["nfe_theta"] == 0 and row["grad_norm"] == 0 and row["ratio_max"] is None for row in trainer.rows)
    resumed = Trainer(TinyTask(), algorithm, replace(settings, iterations=3), tmp_path, True).run(progress=False)
    assert resumed.iteration == 3 and torch.equal(weights(resumed.policy), before)


def test_flash_with_ratio_one_is_mixgrpo_with_a_dpm_tail():
    velocity = PointwiseVelocity()
    flash, mix = replace(FLASH, tail_ratio=1.0), replace(MIX, tail_method="dpm++2m")
    for iteration in range(7):
        (a, advantages), (b, _) = (collect(x, velocity, iteration=iteration, dtype=torch.float32) for x in (flash, mix))
        assert torch.equal(a.ts, b.ts) and torch.equal(a.x, b.x) and torch.equal(a.v, b.v) and a.nfe == b.nfe
        losses = [total_loss(x, velocity, r, advantages) for x, r in ((flash, a), (mix, b))]
        assert torch.equal(*losses)
    euler, _ = collect(MIX, velocity, dtype=torch.float32)
    dpm, _ = collect(mix, velocity, dtype=torch.float32)
    assert torch.equal(euler.x[:4], dpm.x[:4]) and (euler.x[-1] - dpm.x[-1]).abs().max() > 1e-4


@pytest.mark.parametrize("name", ["mix", "flash", "star", "separate"])
def test_head_and_tail_are_the_solvers(name):
    algorithm, velocity = SMALL[name], PointwiseVelocity()
    for iteration in range(6):
        rollout, _ = collect(algorithm, velocity, iteration=iteration, dtype=torch.float32)
        window, x = algorithm.window(iteration), rollout.x.flatten(1, 2)
        with torch.no_grad():
            if window.start > 0:
                head = solve(velocity, x[0], rollout.ts[: window.start + 1], method="euler")
                assert torch.equal(x[: window.start + 1], head.x)
            tail = solve(velocity, x[window.stop], rollout.ts[window.stop :], method=algorithm.tail_method)
        assert torch.equal(x[window.stop :], tail.x) and torch.equal(rollout.v.flatten(1, 2)[window.stop :], tail.v)


def flow_diffusion(algorithm, ts, k):
    "Noise scale of Flow-GRPO's step, with the second time of the grid in place of 1."
    return algorithm.noise_level * math.sqrt(ts[k] / (1 - (ts[1] if k == 0 else ts[k])))


@pytest.mark.parametrize("name", ["mix", "flash", "tempflow"])
def test_noisy_steps_equal_an_independent_derivation(name):
    algorithm, velocity = SMALL[name], PointwiseVelocity().double()
    moved = PointwiseVelocity(0.6, -0.2, 0.1).double()
    checked = 0
    for iteration in range(6):
        rollout, _ = collect(algorithm, velocity, groups=4, iteration=iteration)
        ts = rollout.ts.tolist()
        states = algorithm.choose(rollout, streams(4, 1))
        x, t = states.select(rollout.x), states.times(rollout.ts)[0]
        v = moved(x, t)
        log_prob, (mean, std) = algorithm.log_prob(rollout, states, v), algorithm.gaussian(rollout, states, v)
        for i, (k, g, m) in enumerate(zip(*(n.tolist() for n in (states.step, states.prompt, states.member)))):
            expected, spread = reverse_sde(x[i], v[i], ts[k], ts[k + 1], flow_diffusion(algorithm, ts, k))
            assert (mean[i] - expected).abs().max() < 1e-12 and (std[i] - spread).abs().max() < 1e-12
            ends = rollout.x[k + 1, g] if name == "tempflow" else rollout.x[k + 1, g, m : m + 1]
            density = Normal(expected, spread).log_prob(ends).flatten(1).mean(1)
            assert (log_prob[i] - density).abs().max() < 1e-12
            checked += 1
    assert checked == 6 * 4 * (1 if name == "tempflow" else 4 * 3)


@pytest.mark.parametrize("name", ["mix", "flash", "separate"])
def test_window_replays_from_the_groups_own_noise(name):
    algorithm, velocity = SMALL[name], PointwiseVelocity().double()
    for iteration in range(6):
        rollout, _ = collect(algorithm, velocity, iteration=iteration)
        generators, ts = streams(3, 0), rollout.ts.tolist()
        if not algorithm.shared_noise:
            randn((12, *SHAPE), generators, dtype=torch.float64)
        for k in algorithm.window(iteration):
            noise = randn((12, *SHAPE), generators, dtype=torch.float64).unflatten(0, (3, 4))
            mean, std = reverse_sde(rollout.x[k], rollout.v[k], ts[k], ts[k + 1], flow_diffusion(algorithm, ts, k))
            assert (rollout.x[k + 1] - mean - std * noise).abs().max() < 1e-12


@pytest.mark.parametrize(("sampler", "iteration"), [("flow", 1), ("flow", 2), ("dance", 0), ("dance", 1)])
def test_the_mixed_sampler_keeps_the_marginals(sampler, iteration):
    flow, n = GaussianFlow(0.7, 0.5), 16_000
    settings = {"group_size": 2, "steps": 160, "trained_steps": 64, "window_every": 1, "window_stride": 32}
    mixed = MixGRPO(**settings, sampler=sampler, shared_noise=False)
    noise = randn((n // 2, 1), seeded(1), dtype=torch.float64)
    rollouts = [
        algorithm.rollout(flow.velocity, noise, None, seeded(seed), iteration)
        for seed, algorithm in enumerate((mixed, replace(mixed, trained_steps=0)))
    ]
    end = mixed.window(iteration).stop
    assert rollouts[0].noisy.sum() == 64 * n / 2 and end == 64 + 32 * iteration
    for k in (end, 160):
        t = rollouts[0].ts[k].item()
        (mean, std), (ode_mean, ode_std) = ((r.x[k].mean().item(), r.x[k].std().item()) for r in rollouts)
        error = flow.spread(t) / math.sqrt(n)  # of a mean; that of a standard deviation is smaller by sqrt(2)
        assert abs(mean - ode_mean) < 4 * math.sqrt(2) * error and abs(std - ode_std) < 4 * error
        assert abs(mean - (1 - t) * flow.mean) < 4 * error and abs(std - flow.spread(t)) < 4 / math.sqrt(2) * error


@every_algorithm
def test_a_group_computed_alone_is_the_same(algorithm):
    velocity, noise = PointwiseVelocity(), randn((3, *SHAPE), seeded(1))
    for iteration in (0, 4):
        together = algorithm.rollout(velocity, noise, None, streams(3, 0), iteration)
        for g in range(3):
            alone = algorithm.rollout(velocity, noise[g : g + 1], None, streams(3, 0)[g : g + 1], iteration)
            assert torch.equal(alone.x[:, 0], together.x[:, g]) and torch.equal(alone.v[:, 0], together.v[:, g])
            assert torch.equal(alone.noisy[:, 0], together.noisy[:, g])


# --- what it costs, and the ratio ---


@every_algorithm
@pytest.mark.parametrize("kl_weight", [0.0, 0.1])
def test_evaluations_are_those_reported(algorithm, kl_weight):
    penalty, own, samples = VelocityPenalty(kl_weight), base(algorithm), 3 * algorithm.group_size
    for iteration in range(7):
        velocity, reference = Counted(PointwiseVelocity()), Counted(PointwiseVelocity())
        rollout, advantages = collect(algorithm, velocity, iteration=iteration)
        assert velocity.plain == round(samples * rollout.nfe) and velocity.gradient == 0
        if isinstance(own, MixGRPO):
            assert rollout.nfe == len(own.thinned(iteration)) - 1 == len(rollout.v)
            assert iteration > 0 or rollout.nfe == algorithm.nfe_old
        penalties = [(penalty, reference)] if kl_weight else []
        penalized_loss(algorithm, velocity, rollout, advantages, penalties, streams(3, 1))
        trained, asked = evaluations(algorithm, [p for p, _ in penalties])
        assert velocity.gradient == pytest.approx(samples * trained) and trained == algorithm.nfe_theta
        assert (reference.plain, reference.gradient) == (round(samples * asked), 0)
        assert asked == (trained if kl_weight else 0)


@every_algorithm
def test_ratio_is_one_on_policy_in_every_window(algorithm):
    velocity = PointwiseVelocity()
    for iteration in range(7):
        rollout, advantages = collect(algorithm, velocity, iteration=iteration, dtype=torch.float32)
        for on_policy in (True, False):
            stats = SurrogateStats()
            total_loss(algorithm, velocity, rollout, advantages, on_policy=on_policy, surrogate=stats.surrogate)
            summary = stats.summary()
            assert summary["ratio_min"] == summary["ratio_max"] == 1 and summary["clip_fraction"] == 0
    velocity.scales.data += 0.05
    stats = SurrogateStats()
    total_loss(algorithm, velocity, rollout, advantages, surrogate=stats.surrogate)
    assert stats.summary()["ratio_min"] < 1 - 1e-5 and stats.summary()["ratio_max"] > 1 + 1e-5


@every_algorithm
def test_micro_batches_change_nothing_but_the_batch(algorithm):
    network, move = moved_network()
    rollout, advantages = collect(algorithm, network)
    move()
    found, penalties = [], [(VelocityPenalty(0.1), SmallNet())]
    for size in (0, 2):
        network.zero_grad()
        penalized_loss(algorithm, network, rollout, advantages, penalties, streams(3, 1), micro_batch=size).backward()
        found.append(gradients(network))
    assert found[0].abs().max() > 1e-6 and (found[0] - found[1]).abs().max() < 1e-12
    parts = list(algorithm.losses(network, rollout, advantages, streams(3, 1), micro_batch=2))
    assert len(parts) == math.ceil(len(algorithm.choose(rollout, streams(3, 1))) / 2) > 1
    torch.testing.assert_close(sum(parts), total_loss(algorithm, network, rollout, advantages))


@every_algorithm
def test_a_half_precision_policy_keeps_float32_states(algorithm):
    torch.manual_seed(0)
    network = SmallNet(dtype=torch.bfloat16)
    rollout, advantages = collect(algorithm, network, dtype=torch.float32)
    assert rollout.x.dtype == rollout.ts.dtype == torch.float32
    assert total_loss(algorithm, network, rollout, advantages, on_policy=True).dtype == torch.float32


# --- branches ---


def test_branches_share_a_trunk_and_leave_it_together():
    velocity = PointwiseVelocity().double()
    rollout, _ = collect(TEMP, velocity, groups=40)
    assert rollout.noisy.sum(0).eq(1).all() and not rollout.noisy[-1].any()
    ts, noise_streams = rollout.ts, streams(40, 0)
    for g in range(40):
        k = torch.randperm(6, generator=noise_streams[g])[0].item()
        assert rollout.noisy[k, g]
        x = rollout.x[0, g, 0]
        for j in range(7):
            assert torch.equal(rollout.x[j, g], x.expand(5, *SHAPE) if j <= k else rollout.x[j, g])
            v = velocity(rollout.x[j, g], ts[j].expand(5))
            assert torch.equal(rollout.v[j, g], v)
            if j == k:
                mean, std = reverse_sde(rollout.x[j, g], v, *ts[j : j + 2], flow_diffusion(TEMP, ts.tolist(), j))
                noise = randn((5, *SHAPE), noise_streams[g], dtype=torch.float64)
                assert (rollout.x[j + 1, g] - mean - std * noise).abs().max() < 1e-12
                assert torch.pdist(rollout.x[j + 1, g].flatten(1)).min() > 1e-3
            else:
                assert torch.equal(rollout.x[j + 1, g], rollout.x[j, g] + (ts[j + 1] - ts[j]) * v)
            x = rollout.x[j + 1, g, 0]


def test_branching_steps_are_uniform_and_their_mean_cost_is_reported():
    rollout = TEMP.rollout(lambda x, t, c: x, randn((3000, 1), seeded(0)), None, seeded(1))
    counts = rollout.noisy.sum(1).double()
    assert counts[-1] == 0 and (counts[:6] - 500).square().sum() / 500 < 20.5  # chi squared, 5 degrees, p = .001
    k = torch.arange(6.0)
    assert TEMP.nfe_old == pytest.approx(((k + 1) / 5 + 6 - k).mean().item())
    assert rollout.nfe == pytest.approx((((k + 1) / 5 + 6 - k) * counts[:6]).sum().item() / 3000)
    assert rollout.nfe == pytest.approx(TEMP.nfe_old, rel=0.05)


def test_branches_keep_their_conditions():
    cond = {"shift": torch.tensor([0.0, 0.4, -0.2], dtype=torch.float64)}

    def velocity(x, t, c):
        return PointwiseVelocity()(x, t) + c["shift"].reshape(-1, 1, 1, 1)

    rollout, advantages = collect(TEMP, velocity, cond=cond)
    for g in range(3):
        for k in range(7):
            own = {"shift": cond["shift"][g].expand(5)}
            torch.testing.assert_close(rollout.v[k, g], velocity(rollout.x[k, g], rollout.ts[k].expand(5), own))
    stats = SurrogateStats()
    total_loss(TEMP, velocity, rollout, advantages, surrogate=stats.surrogate)
    assert abs(stats.summary()["ratio_max"] - 1) < 1e-12


class Plain(TempFlowGRPO):
    "TempFlow-GRPO as it is usually written: every branch evaluated and scored for itself; weighed from outside."

    log_prob, loss = SDEGRPO.log_prob, SDEGRPO.loss

    def choose(self, rollout, generator=None):
        one = super().choose(rollout, generator)
        members = torch.arange(self.group_size).expand(len(one), -1)
        return States.product(one.step[:, None], members, rollout.x.device)


def pair(guard, time_weight, **settings):
    "TempFlow-GRPO and its plain form, with the same weights of steps."
    own = TempFlowGRPO(**settings, weigh_noise=time_weight == "noise")
    ours, plain = own if own.weigh_noise else TimeWeights(own, time_weight), TimeWeights(Plain(**settings), time_weight)
    return [GuardedRatios(a) if guard else a for a in (ours, plain)]


@pytest.mark.parametrize("clip_range", [1e-4, 0.3])
@pytest.mark.parametrize(
    ("guard", "time_weight", "sampler", "kl_weight"),
    [
        (False, "noise", "flow", 0.0),
        (True, "noise", "flow", 0.0),
        (False, "noise", "flow", 0.3),
        (False, "equal", "cps", 0.0),
    ],
)
def test_one_evaluation_gives_the_gradient_of_all_branches(clip_range, guard, time_weight, sampler, kl_weight):
    pairs = pair(guard, time_weight, group_size=5, steps=7, clip_range=clip_range, sampler=sampler)
    network, move = moved_network()
    rollout, advantages = collect(pairs[0], network)
    torch.manual_seed(3)
    penalties = [(VelocityPenalty(kl_weight), SmallNet())] if kl_weight else []
    for on_policy in (True, False):
        counts, results = [], []
        for algorithm in pairs:
            counted = Counted(network)
            network.zero_grad()
            loss = penalized_loss(algorithm, counted, rollout, advantages, penalties, on_policy=on_policy)
            loss.backward()
            counts.append(counted.gradient)
            results.append(torch.cat([loss.detach()[None], gradients(network)]))
        assert counts == [3, 15]
        assert results[0][1:].abs().max() > 1e-3 and (results[0] - results[1]).abs().max() < 1e-12
        move()


# --- time weights, and samplers ---


def weights_of_steps(algorithm):
    "The weight that the loss gives to each step, asked in all windows."
    found = {}
    for iteration in range(7):
        rollout, advantages = collect(algorithm, PointwiseVelocity(), groups=20, iteration=iteration)
        states = algorithm.choose(rollout, streams(20, 1))

        def surrogate(log_prob, old, gains, clip_range, weight=1.0, entropy=None, states=states):
            for k, w in zip(states.step.tolist(), torch.as_tensor(weight).flatten().tolist(), strict=True):
                assert found.setdefault(k, w) == pytest.approx(w, abs=1e-12)
            return log_prob.sum()

        algorithm.loss(PointwiseVelocity(), rollout, states, advantages, False, surrogate)
    return torch.tensor([found[k] for k in sorted(found)], dtype=torch.float64)


@pytest.mark.parametrize("algorithm", [*(replace(a, window_moves="roll_back") for a in (MIX, FLASH)), TEMP])
@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_time_weights_are_those_of_the_papers(algorithm, shift):
    algorithm, ts = replace(algorithm, shift=shift), time_grid(algorithm.steps, shift).double()
    t, dt = ts[:-2], ts[1:-1] - ts[:-2]
    s = 0.7 * (t / (1 - torch.where(t == 1, ts[1], t))).sqrt()
    pull = (-dt).sqrt() / s + s * (-dt).sqrt() * (1 - t) / (2 * t)  # Flash-GRPO's c(t)
    expected = {"equal": 1 / pull / (1 / pull).mean(), "noise": s * (-dt).sqrt() / (s * (-dt).sqrt()).mean()}
    branches = isinstance(algorithm, TempFlowGRPO)
    bare = replace(algorithm, weigh_noise=False) if branches else algorithm
    for name, weight in expected.items():
        assert (weights_of_steps(TimeWeights(bare, name)) - weight).abs().max() < 1e-12
    if branches:  # which has the second one of itself
        assert (weights_of_steps(algorithm) - expected["noise"]).abs().max() < 1e-12


def test_a_thinner_tail_leaves_the_weights_of_the_window_alone():
    grids = [algorithm.thinned(0) for algorithm in (MIX, FLASH)]
    assert len(grids[1]) < len(grids[0])
    for ours, theirs in zip(*(a.response(ts) for a, ts in zip((MIX, FLASH), grids, strict=True)), strict=True):
        assert torch.equal(ours, theirs)


@given(st.floats(0.01, 1), st.floats(0.05, 1), st.floats(0, 0.99))
def test_precise_sampler_is_cps(noise_level, t, fraction):
    x, v, w = (randn((4, 3), seeded(k), dtype=torch.float64) for k in range(3))
    t_next, rho = fraction * t, math.cos(noise_level * math.pi / 2)
    x0, noise = denoised(x, v, t), implied_noise(x, v, t)
    precise = (1 - t_next) * x0 + t_next * (rho * noise + math.sqrt(1 - rho**2) * w)
    mean, std = cps(x, v, t, t_next, noise_level)
    assert (mean + std * w - precise).abs().max() < 1e-12


def test_chain_is_the_path_in_one_go():
    velocity, x, ts = PointwiseVelocity(), randn((3, 2), seeded(0)), time_grid(6)
    run = partial(solve, velocity, method="euler")
    with torch.no_grad():
        whole, first = run(x, ts), run(x, ts[:3])
        joined = chain(first, run(first.x[-1], ts[2:]))
        single = chain(whole)
    for path in (joined, single):
        assert path.nfe == whole.nfe == 6
        assert all(torch.equal(getattr(path, name), getattr(whole, name)) for name in ("ts", "x", "v"))
