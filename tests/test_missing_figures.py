"""Figures that are no number, as a run has them that diverged: bounds, searches, signs, reports and tables go on."""

import math
from dataclasses import replace

import pytest
import torch

from neighbor_grpo.lab import report
from neighbor_grpo.lab.benchmark import as_markdown, summaries
from neighbor_grpo.lab.compare import Bound, Study, Variant
from neighbor_grpo.lab.looking import Look
from neighbor_grpo.lab.search import Range, Search
from neighbor_grpo.neighbor import NeighborGRPO
from neighbor_grpo.rewards.signs import moved
from neighbor_grpo.rivals.gaussian import DanceGRPO
from neighbor_grpo.runs.pictures import Seen
from neighbor_grpo.tasks.digits import frechet_distance
from neighbor_grpo.training import TrainSettings

START = dict(iterations=0, evaluations=0.0, reward=0.1, spread=1.0)
STUDY = Study((Variant("a", NeighborGRPO(), TrainSettings()),), None, (0,), dict(evaluations=100.0))
SEARCH = Search(STUDY, dict(lr=Range(1e-4, 1e-2)), figure="spread")


def run(spread):
    return dict(evals=[START, START | dict(evaluations=90.0, spread=spread)], ended="", seconds=1.0)


def test_a_search_for_a_figure_that_is_none_goes_on():
    assert SEARCH.value([run(0.1)]) < 1 < SEARCH.value([run(0.1), run(None)]) < SEARCH.value([run(None)]) == 2
    assert replace(SEARCH, figure="").value([run(None)]) < 2  # it does not ask for the spread


@pytest.mark.parametrize("nothing", [None, math.nan])
def test_a_bound_on_what_was_none_before_training_does_not_hold(nothing):
    assert Bound("spread", True, None).missing(dict(spread=2.0), dict(spread=nothing)) == math.inf
    assert Bound("spread", True, 3.0).missing(dict(spread=2.0), dict(spread=nothing)) == 0


@pytest.mark.parametrize("ends", [(None, 1.0), (0.5, None)])
def test_a_report_of_a_run_that_diverged(ends):
    before, after = (dict(iteration=k, reward=reward, sharpness=1.0 + k) for k, reward in enumerate(ends))
    assert moved(before, after) == {} != moved(before | dict(reward=0.0), after | dict(reward=1.0))
    look = Look("at 1", {}, Seen({}, []), "run", 1)
    assert report.warnings_of(report.Story("run", {}, [], [before, after]), look) == []


def test_a_table_without_time_for_its_first_algorithm():
    (row,) = summaries([DanceGRPO(), NeighborGRPO()], [[], [dict(seconds=2.0)]])
    assert row["seconds"] == 2 and math.isnan(row["times"]) and row["limit"] == pytest.approx(12 / 67)
    assert "| - |" in as_markdown([row])


def test_too_few_samples_have_no_frechet_distance():
    few, many = torch.randn(4, 4), torch.randn(40, 4)
    assert all(map(math.isnan, (frechet_distance(few, many), frechet_distance(many, few))))
    assert frechet_distance(many, many) < 1e-6
