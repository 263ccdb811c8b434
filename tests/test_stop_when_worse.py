"""A run that ends because a held-out figure falls while the reward rises: only then, for good, and as resumed."""

import json

import pytest
from helpers import PointwiseVelocity, assert_same_outcome

from neighbor_grpo.cli import main
from neighbor_grpo.neighbor import NeighborGRPO
from neighbor_grpo.runs.folder import read_config, read_rows
from neighbor_grpo.runs.trainer import Trainer, why_over
from neighbor_grpo.training import Task, TrainSettings


class Scripted(Task):
    "Held-out figures by a script: what they are at evaluation number k."

    shape, prompts = (2,), 1

    def __init__(self, figures):
        self.policy, self.figures = PointwiseVelocity(), figures

    def conditions(self, prompts):
        return None

    def reward(self, samples, prompts):
        return samples[:, 0]

    def evaluate(self, velocity):
        reward, judge = self.figures.pop(0)
        return dict(reward=reward, judge=judge)


RISES = [(0.1, 0.9), (0.2, 0.8), (0.3, 0.85), (0.4, 0.7), (0.5, 0.6), (0.6, 0.5), (0.7, 0.4)]


def trainer(out, figures, resume=False, **more):
    settings = dict(iterations=6, groups=1, eval_every=1, checkpoint_every=100, stop_figure="judge") | more
    algorithm = NeighborGRPO(group_size=4, steps=3, anchors=2, trained_steps=1)
    return Trainer(Scripted(list(figures)), algorithm, TrainSettings(**settings), out, resume)


def rows(*values):
    return [dict(iteration=i, reward=r, judge=j) for i, (r, j) in enumerate(values)]


@pytest.mark.parametrize(
    "evals, over",
    [
        (RISES[3:6], True),
        (RISES[1:4], False),  # the judge rose once
        ([(0.4, 0.7), (0.4, 0.6), (0.6, 0.5)], False),  # the reward did not rise
        ([(0.4, 0.7), (0.5, None), (0.6, 0.5)], False),
        (RISES[4:6], False),  # too few
        (RISES[:2] + RISES[3:6], True),
    ],
)
def test_when_a_run_is_over(evals, over):
    assert bool(why_over(rows(*evals), 2, "judge")) == over
    assert why_over(rows(*evals), 0, "judge") == ""


def test_it_ends_keeps_its_reason_and_goes_on_only_when_told(tmp_path):
    out, whole = tmp_path / "run", tmp_path / "whole"
    run = trainer(out, RISES, stop_when_worse=2).run(progress=False)
    assert run.iteration == 4 and [row["iteration"] for row in read_rows(out / "eval.jsonl")] == [0, 1, 2, 3, 4]
    reason = "judge fell from 0.85 to 0.6 over the last 2 evaluations, while the reward rose from 0.3 to 0.5"
    assert run.over == reason and (out / "ended.txt").read_text() == f"{reason}\n"
    again = trainer(out, [], resume=True, stop_when_worse=2).run(progress=False)  # nothing left to evaluate
    assert (again.iteration, again.over) == (4, reason)
    told = trainer(out, RISES[5:], resume=True, stop_when_worse=0).run(progress=False)
    assert (told.iteration, told.over) == (6, "") and not (out / "ended.txt").exists()
    trainer(whole, RISES).run(progress=False)
    assert_same_outcome(out, whole)


def test_figures_are_known_by_name(tmp_path):
    with pytest.raises(ValueError, match="stop_figure must be one of judge, got 'sharpness'"):
        trainer(None, RISES, stop_when_worse=2, stop_figure="sharpness").run(progress=False)
    with pytest.raises(ValueError, match="stop_when_worse must be an integer >= 0, got -1"):
        TrainSettings(stop_when_worse=-1)


def test_the_command_says_why_and_a_run_of_an_earlier_version_goes_on(tmp_path, capsys):
    line = "--quiet --groups 2 --group_size 4 --anchors 2 --eval_every 2 --lr 1e-2 --out"
    first = f"train toy --pretrain_steps 200 --eval_samples 100 --iterations 12 {line} {tmp_path / 'run'}"
    assert main([*first.split(), "--stop_when_worse", "1", "--stop_figure", "spread"]) == 0
    said = capsys.readouterr().out
    assert "spread fell from" in said and "--resume --stop_when_worse 0" in said
    ended = read_rows(tmp_path / "run" / "eval.jsonl")[-1]["iteration"]
    assert ended < 12
    assert main(f"train --out {tmp_path / 'run'} --resume --quiet".split()) == 0
    assert f"ended at iteration {ended}: spread fell" in capsys.readouterr().out
    config = read_config(tmp_path / "run")
    for name in ("stop_when_worse", "stop_figure"):
        del config["training"][name]  # as before there was such a setting
    (tmp_path / "run" / "config.json").write_text(json.dumps(config))
    assert main(f"train --out {tmp_path / 'run'} --resume --quiet".split()) == 0
    assert read_rows(tmp_path / "run" / "eval.jsonl")[-1]["iteration"] == 12
