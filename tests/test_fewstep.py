"Distances between denoised estimates, rollouts of the reference, and the targets of the distillation."

from dataclasses import replace

import pytest
import torch
from helpers import GaussianFlow, PointwiseVelocity, TinyTask, weights

from neighbor_grpo.flow import randn, seeded, time_grid
from neighbor_grpo.grpo import SurrogateStats
from neighbor_grpo.neighbor import NeighborGRPO
from neighbor_grpo.solvers import solve
from neighbor_grpo.training import TrainSettings, train

ALGORITHM = NeighborGRPO(group_size=6, steps=4, anchors=3, trained_steps=4, leap_from="denoised", method="euler")


def rollout_of(algorithm, dim=5):
    "A float64 rollout of a small velocity, the advantages of random rewards, and all of its chosen states."
    velocity = PointwiseVelocity().double()
    rollout = algorithm.rollout(velocity, randn((2, dim), seeded(0), dtype=torch.float64), generator=seeded(1))
    advantages = algorithm.advantages(randn((2, algorithm.group_size), seeded(2), dtype=torch.float64))
    return velocity, rollout, advantages, algorithm.choose(rollout, seeded(3))


@pytest.mark.parametrize("temperature, reduction", [(1.0, "mean"), (0.3, "sum")])
def test_the_pull_between_denoised_estimates(temperature, reduction):
    "On policy, `dL/dv = (2 t / tau) sum_i A_i x0_hat_i` for every state: the softmax cancels, t is the lever."
    algorithm = replace(ALGORITHM, temperature=temperature, reduction=reduction)
    velocity, rollout, advantages, states = rollout_of(algorithm)
    seen = []

    def watched(x, t, cond):
        seen.append(velocity(x, t, cond).detach().requires_grad_())
        return seen[-1]

    stats = SurrogateStats()
    algorithm.loss(watched, rollout, states, advantages, on_policy=True, surrogate=stats.surrogate).backward()
    assert stats.summary()["ratio_min"] == stats.summary()["ratio_max"] == 1
    size = 5 if reduction == "mean" else 1
    for k, q, gradient in zip(states.step, states.prompt, seen[0].grad, strict=True):
        t = rollout.ts[k].double()
        x0 = rollout.x[k, q] - t * rollout.v[k, q]
        pull = 2 * t / temperature / size * (advantages[q][:, None] * x0).sum(0)
        assert torch.allclose(gradient, pull, rtol=0, atol=1e-12) and pull.abs().max() > 1e-3


def test_denoised_distances_off_policy_and_at_the_last_step():
    "The ratio of two softmaxes, written out; where the next time is 0, both kinds of distance are the same."
    velocity, rollout, advantages, states = rollout_of(ALGORITHM)
    other = PointwiseVelocity(0.7, -0.2, 0.1).double()
    last = ALGORITHM.loss(other, rollout, states, advantages)
    total = 0.0
    for k, q, i in zip(states.step, states.prompt, states.member, strict=True):
        t, x = rollout.ts[k].double(), rollout.x[k, q]
        x0 = x - t * rollout.v[k, q]
        new, old = (x[i] - t * v for v in (other(x[i][None], t[None])[0], rollout.v[k, q, i]))
        log_ratio = [(-(x0 - end).square().mean(1)).log_softmax(0) for end in (new, old)]
        ratio, c = (log_ratio[0] - log_ratio[1]).exp(), ALGORITHM.clip_range
        total = total - torch.minimum(advantages[q] * ratio, advantages[q] * ratio.clamp(1 - c, 1 + c)).sum()
    assert torch.allclose(last, total, rtol=0, atol=1e-12)
    ends = {}
    for kind in ("denoised", "euler"):
        algorithm = replace(ALGORITHM, trained_steps=1, train_where="last", leap_from=kind)
        chosen = algorithm.choose(rollout, seeded(4))
        ends[kind] = algorithm.leap(rollout, chosen, algorithm.step(rollout, chosen, chosen.select(rollout.v)))
    assert torch.allclose(ends["denoised"], ends["euler"], rtol=0, atol=1e-12)
    move, noise = ALGORITHM.response(rollout.ts)
    assert torch.equal(move, rollout.ts[:-1]) and (noise == 1).all()


SEMI = TrainSettings(iterations=7, groups=3, lr=1e-2, collector="reference", buffer=2, eval_every=7)


def test_the_reference_rolls_out_again_and_again():
    algorithm, runs = replace(ALGORITHM, leap_from="euler"), {}
    for buffer in (0, 2):
        runs[buffer] = train(TinyTask(dropout=0.0), algorithm, replace(SEMI, buffer=buffer), progress=False).rows
    means = [row["reward_mean"] for row in runs[2]]
    assert means == [means[0], means[1]] * 3 + [means[0]] and means[0] != means[1]
    first = [[row["reward_mean"] for row in rows[:2]] for rows in runs.values()]
    assert first[0] == first[1] and len({row["reward_mean"] for row in runs[0]}) == 7
    assert runs[2][0]["ratio_max"] == pytest.approx(1, abs=1e-6)  # the first update still is at the reference
    assert abs(runs[2][-1]["ratio_max"] - 1) > 1e-4 < runs[2][-1]["clip_fraction"]


def test_what_was_replayed_is_the_references():
    "The rollouts are those of the weights before training, whatever the policy has become."
    task, seen = TinyTask(dropout=0.0), []
    before = weights(task.policy)
    run = train(task, ALGORITHM, SEMI, progress=False, callback=lambda run: seen.append(run.collector))
    assert not torch.equal(before, weights(run.policy)) and torch.equal(before, weights(run.collector))
    assert {*map(id, seen)} == {id(run.reference)}


def test_settings_of_the_collector_that_cannot_be():
    with pytest.raises(ValueError, match="buffer must be 0 unless the collector is 'reference', got 3"):
        TrainSettings(buffer=3)
    with pytest.raises(ValueError, match="buffer must be an integer >= 0, got -1"):
        TrainSettings(collector="reference", buffer=-1)


def test_a_student_that_hits_its_targets_stands_where_the_teacher_does():
    from neighbor_grpo.lab.fewstep import piece_targets, teacher_pieces

    flow, ts = GaussianFlow(), time_grid(4).double()
    noise = randn((3, 2), seeded(0), dtype=torch.float64)
    path = solve(flow.velocity, noise, time_grid(16))
    pieces = teacher_pieces(flow.velocity, noise, None, 4, 16, batch=2)
    for at, part in enumerate((path.x[:-4:4], path.x[4::4])):
        assert torch.allclose(pieces[at], part, rtol=0, atol=1e-12)
    row, along = torch.arange(3), torch.zeros(3, dtype=torch.float64)
    for k in range(4):
        piece = torch.full((3,), k)
        x, t, v = piece_targets(pieces, ts, piece, row, along)
        assert torch.allclose(t, ts[k]) and torch.allclose(x + (ts[k + 1] - t)[:, None] * v, path.x[4 * k + 4])
        half, t_half, same = piece_targets(pieces, ts, piece, row, along + 0.5)
        assert torch.equal(same, v) and torch.allclose(half, pieces[:, k].mean(0), atol=1e-14)
        assert torch.allclose(t_half, (ts[k] + ts[k + 1]) / 2)


def test_own_pieces_begin_at_the_students_steps_and_end_where_the_teacher_goes():
    from neighbor_grpo.lab.fewstep import teacher_pieces

    flow, ts = GaussianFlow(), time_grid(16).double()
    noise, student = randn((3, 2), seeded(0), dtype=torch.float64), PointwiseVelocity().double()
    begin, end = teacher_pieces(flow.velocity, noise, None, 4, 16, student=student)
    own = solve(student, noise, time_grid(4), method="euler")
    for k in range(4):
        assert torch.allclose(begin[k], own.x[k], rtol=0, atol=1e-12)
        there = solve(flow.velocity, own.x[k], ts[4 * k : 4 * k + 5]).x[-1]
        assert torch.allclose(end[k], there, rtol=0, atol=1e-12) and (end[k] - own.x[k + 1]).abs().max() > 0.01


@pytest.mark.slow
def test_the_packaged_student_opens_in_plain_diffusers_and_trains():
    "Plain diffusers draws what our Euler steps draw, about as well as the card says, and the task trains it."
    from diffusers import StableDiffusion3Pipeline

    from neighbor_grpo.lab.fewstep import policy_of
    from neighbor_grpo.models.miniature import ScenesSettings, ScenesTask, cycle, draw_images
    from neighbor_grpo.models.pipeline import PACKAGED
    from neighbor_grpo.tasks.scenes import split_captions, verify

    captions = cycle(split_captions("count")["held"], 96)
    plain = StableDiffusion3Pipeline.from_pretrained(PACKAGED["miniature-4"]).to(torch.float32)
    plain.set_progress_bar_config(disable=True)
    noise = randn((96, 8, 8, 8), seeded(0, 9))
    asked = dict(height=32, width=32, guidance_scale=1, max_sequence_length=10, sigmas=[1.0, 0.75, 0.5, 0.25])
    theirs = plain([str(caption) for caption in captions], latents=noise, output_type="pt", **asked).images
    ours = draw_images(*policy_of("miniature-4"), captions, 4, 0, "euler")
    assert (theirs - ours).abs().max() < 1e-3
    assert 0.17 < verify(theirs, captions)[0].mean() < 0.6  # .35 on its card; four deviations of 96 images
    task = ScenesTask(ScenesSettings(source="miniature-4", eval_images=48, eval_steps=1, eval_method="euler"))
    algorithm = replace(ALGORITHM, group_size=4, anchors=2, trained_steps=2, train_where="first", sigma=0.15)
    settings = TrainSettings(iterations=2, groups=2, lr=3e-4, hold_weight=0.03, eval_every=2)
    before = weights(task.policy)
    run = train(task, algorithm, settings, progress=False)
    assert all(row["ratio_min"] == row["ratio_max"] == 1 for row in run.rows)
    assert not torch.equal(before, weights(run.policy))


@pytest.mark.slow
def test_a_distillation_leaves_all_but_the_transformer_as_it_was(tmp_path):
    from neighbor_grpo.lab.fewstep import DistillSettings, distill
    from neighbor_grpo.models.pipeline import MINIATURE

    tiny = dict(paths=8, updates=2, watch_every=2, watch_images=4, teacher_steps=8)
    distill(tmp_path / "one", DistillSettings(**tiny), progress=False)
    distill(tmp_path / "two", DistillSettings(student=str(tmp_path / "one"), own=True, **tiny), progress=False)
    for file in sorted(MINIATURE.glob("*/*.safetensors")):
        same = file.read_bytes() == (tmp_path / "two" / file.relative_to(MINIATURE)).read_bytes()
        assert same == (file.parent.name != "transformer"), file
    card = (tmp_path / "two" / "README.md").read_text(encoding="utf-8")
    assert "| own | False | True |" in card and "| student |  | one |" in card
