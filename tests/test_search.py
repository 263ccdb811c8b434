"A search: what a trial is worth, spaces that fit their algorithms, a kill that changes nothing, words that are wrong."

import csv
import json
import math
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Literal

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from neighbor_grpo.cli import main, read_command, read_study
from neighbor_grpo.lab.compare import Study, Variant, read_at, read_bound
from neighbor_grpo.lab.search import (
    SPACES,
    Range,
    Search,
    changed,
    default_space,
    nearest,
    settings_from,
    settings_in,
    within,
)
from neighbor_grpo.neighbor import NeighborGRPO
from neighbor_grpo.rivals.catalogue import ALGORITHMS, make
from neighbor_grpo.rivals.gaussian import FlowGRPO
from neighbor_grpo.runs.folder import write_config
from neighbor_grpo.tasks.toy2d import ToySettings, ToyTask
from neighbor_grpo.training import TrainSettings

BOUNDS = tuple(map(read_bound, ("frechet <= 40", "diversity >= start")))
SIDE = Variant("side", NeighborGRPO(), TrainSettings(groups=4))
STUDY = Study((SIDE,), partial(ToyTask, ToySettings()), (0, 1), dict(evaluations=1000.0), 0.8, bounds=BOUNDS)
START = dict(evaluations=0.0, iterations=0, reward=0.1, frechet=300.0, diversity=0.5)
SEARCH = Search(STUDY, default_space(SIDE))


def run(*rows, ended=""):
    evals = [START | dict(zip(("evaluations", "reward", "frechet", "diversity"), row)) for row in rows]
    return dict(evals=[START, *evals], ended=ended, seconds=1.0)


rows = st.tuples(
    st.floats(1, 1000),
    st.floats(-5, 5),
    st.sampled_from([math.nan, 39.0, 40.0]) | st.floats(0, 400),
    st.none() | st.floats(0, 1),
)
runs = st.lists(rows, max_size=4).map(lambda found: run(*sorted(found, key=lambda row: row[0])))


def holds(row):
    return None not in row.values() and row["reward"] >= 0.8 and row["frechet"] <= 40 and row["diversity"] >= 0.5


@given(st.tuples(runs, runs), st.tuples(runs, runs))
@settings(deadline=None)
def test_what_holds_everything_is_cheaper_than_what_does_not(one, other):
    def cost(pair):
        at = [next((row["evaluations"] for row in run["evals"] if holds(row)), None) for run in pair]
        return math.inf if None in at else sum(at) / 2

    a, b = SEARCH.value(one), SEARCH.value(other)
    assert (a <= 1) == (cost(one) < math.inf) and 0 <= a <= 2
    if cost(one) < cost(other):
        assert a < b


def test_what_does_not_hold_is_ordered_by_how_far_it_got():
    far, nearer = run((100, 0.4, 40, 0.5)), run((900, 0.4, 40, 0.5), (1000, 0.7, 40, 0.5))
    rich = run((10, 0.9, 100, 0.9))
    assert SEARCH.value([nearer] * 2) == 1 + 0.125 / 1.125  # .1 of .8 is missing
    assert SEARCH.value([rich] * 2) == 1 + 1.5 / 2.5  # 60 more than 40
    assert SEARCH.value([nearer] * 2) < SEARCH.value([nearer, far]) < SEARCH.value([far] * 2)
    assert SEARCH.value([run((10, math.nan, 1, 1))] * 2) == SEARCH.value([run()] * 2) < 2


def test_a_figure_at_the_budget_is_high_where_the_bounds_hold_there():
    best = replace(SEARCH, figure="reward")
    high, low, lost = run((1000, 7.0, 40, 0.5)), run((1000, -1.0, 40, 0.5)), run((1, 9, 1, 1), (1000, 9, 50, 0.5))
    values = [best.value([one] * 2) for one in (high, low, lost)]
    assert values == sorted(values) and values[:2] == [-7 / 8, 0.5] and values[2] == 1.2
    assert best.value([run((500, 9, 1, 1), ended="ValueError: gradient")] * 2) == 2


@pytest.mark.parametrize("name", ALGORITHMS)
def test_every_algorithm_has_six_rows_that_fit(name):
    side = Variant(name, make(name), TrainSettings())
    space, has = default_space(side), settings_in(side)
    assert len(space) == 6 and "lr" in space
    assert name not in SPACES or SPACES[name] is space
    for row, values in space.items():
        for value in (values.low, values.high) if isinstance(values, Range) else values:
            given = value if isinstance(value, dict) else {row: value}
            longer = dict(steps=30) if row == "trained_steps" else {}
            longer |= dict(trained_steps=1) if row == "steps" else {}
            try:
                found = settings_in(changed(side, longer | given))
            except ValueError:
                assert name not in SPACES  # a guess may be refused: it is drawn again
                continue
            assert all(found[key] == new for key, new in given.items())
            assert all(found[key] == old for key, old in has.items() if key not in {"iterations", *longer, *given})
        assert nearest(values, has, row) is not None


def test_a_run_is_as_long_as_its_budget():
    decaying = changed(SIDE, dict(lr_decay=5, updates=2, kl_weight=0.1))
    each = 4 * 12 * (8 + 2 * 4 * 4 / 3)  # an evaluation with gradient is three, one of the reference one
    found = within(decaying, 7.5 * each).settings
    assert (found.iterations, found.lr_decay) == (7, 7)
    with pytest.raises(ValueError, match="at least"):
        within(decaying, 0.5 * each)


def test_a_draw_that_no_run_could_take_is_refused():
    with pytest.raises(ValueError, match="hold_weight must be 0 unless"):  # every step is trained
        within(changed(SIDE, dict(hold_weight=0.1, steps=4, trained_steps=4)), 1e5)


WRONG = [
    ("search toy --out new --seeds 0 --variants neighbor", "budgets", "{}", "evaluations"),
    ("--space lr", "--space", "'lr'", "NAME: LOW to HIGH"),
    ("--space lr:[", "--space", "'lr:['", "NAME: LOW to HIGH"),
    ("--space 'lr: 1 to 0'", "space", "[1, 0]", "the lower one first"),
    ("--space 'lr: 0 to 1 log'", "space", "[0, 1]", "above 0"),
    ("--space 'speed: [1, 2]'", "space", "['speed']", "sigma"),
    ("--space 'seed: [1, 2]'", "space", "['seed']", "sigma"),
    ("--bounds 'reward > 3'", "--bounds", "'reward > 3'", "FIGURE <= LIMIT"),
    ("--bounds 'reward >= nan'", "--bounds", "'reward >= nan'", "FIGURE <= LIMIT"),
    ("--trials 0", "trials", "0", ">= 1"),
    ("--apart 1", "apart", "1.0", "> 1"),
    ("--workers 0", "--jobs", "0", ">= 1"),
    ("compare toy --out new --seeds 0 --iterations 5 --configs best.yaml", "--configs", "'best.yaml'", "FILE"),
]


@pytest.mark.parametrize("case", WRONG, ids=lambda case: case[0])
def test_wrong_words_name_the_argument(case, tmp_path, monkeypatch, capsys):
    import shlex

    line, *fragments = case
    base = "" if line.split()[0] in ("search", "compare") else "search toy --out new --seeds 0 --variants neighbor "
    line = base + line + (" --evaluations 1e4" if base else "")
    monkeypatch.chdir(tmp_path)
    assert main(shlex.split(line)) == 1
    printed = capsys.readouterr()
    assert len(printed.err.splitlines()) == 1 and list(tmp_path.iterdir()) == []
    assert all(fragment in printed.err for fragment in fragments), printed.err


LINE = "search toy --variants neighbor --seeds 0 1 --evaluations 12000 --target 0.6 --trials 5 --quiet --workers 1"
LINE += " --pretrain_steps 200"


def search(out, **options):
    line = [sys.executable, "-m", "neighbor_grpo.cli", *LINE.split()[:-2], "--common", " ".join(LINE.split()[-2:])]
    return subprocess.Popen([*line, "--out", str(out)], stdout=subprocess.DEVNULL, **options)


def test_a_refused_search_leaves_the_folder_as_it_was(tmp_path, monkeypatch, capsys):
    def pretend(each, out, *rest):
        (out / "table.md").write_text("")

    monkeypatch.setattr("neighbor_grpo.lab.search.run_search", pretend)
    line = ["search", "toy", "--variants", "neighbor", "--seeds", "0", "--evaluations", "1e4", "--out", str(tmp_path)]
    assert main(line) == 0
    before = (tmp_path / "study.json").read_bytes()
    assert main([*line, "--target", "0.5"]) == 1 and "target must be 0.9" in capsys.readouterr().err
    write_config(tmp_path, dict(variants={}))  # as that of a comparison
    assert main(line) == 1 and "--out" in capsys.readouterr().err
    assert (tmp_path / "study.json").read_bytes() == before


def trials(out):
    with open(out / "neighbor" / "trials.csv", newline="") as file:
        found = list(csv.DictReader(file))
    return [{key: value for key, value in row.items() if key not in ("trial", "seconds")} for row in found]


@pytest.mark.slow
def test_a_killed_search_goes_on_as_if_nothing_had_been(tmp_path):
    assert search(tmp_path / "whole").wait() == 0
    journal = tmp_path / "killed" / "neighbor" / "journal.log"
    for done in (1, 4):  # in the first trial, and in the third
        process = search(tmp_path / "killed")
        while not journal.exists() or journal.read_text().count('"seconds"') < done:
            assert process.poll() is None
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        process.wait()
    with open(journal, "a") as file:
        file.write('{"op_code":')  # torn by a power cut
    assert search(tmp_path / "killed").wait() == 0
    assert trials(tmp_path / "killed") == trials(tmp_path / "whole")

    best = tmp_path / "whole" / "neighbor" / "best.yaml"
    said = yaml.safe_load(best.read_text())
    _, (_, algorithm, loop), _ = read_command(["--recipe", str(best)])
    for part in (algorithm, loop):
        assert all(vars(part)[f.name] == said[f.name] for f in fields(part) if f.name in said)
    again = ["toy", "--configs", str(best), "--seeds", "7", "--evaluations", "1e4", "--out", str(tmp_path / "new")]
    study, values = read_study(again)
    assert [v.name for v in study.variants] == ["neighbor"] and json.dumps(values.variants)
    assert study.variants[0].algorithm == algorithm
    assert replace(study.variants[0].settings, iterations=loop.iterations) == loop
    assert study.about["task"]["pretrain_steps"] == 200 and Path(best).parent.name == "neighbor"


def test_a_run_ends_where_all_holds_or_when_it_has_passed_by():
    near, lost = (100, 0.9, 44, 0.5), (301, 0.9, 90, 0.5)
    assert SEARCH.over(run((100, 0.8, 40, 0.5))["evals"])
    assert not SEARCH.over(run(near, (300, 0.9, 90, 0.5))["evals"]) and SEARCH.over(run(near, lost)["evals"])
    assert not SEARCH.over(run(near, (301, 0.7, 90, 0.5))["evals"]) and not SEARCH.over(run((9, None, 1, 1))["evals"])
    assert not replace(SEARCH, figure="reward").over(run(near, lost)["evals"])


def test_a_comparison_reads_the_target_where_the_bounds_hold():
    rows = [dict(reward=0.9, evaluations=1, held=0), dict(reward=0.7, evaluations=2, held=1)]
    assert read_at(rows, "reward", 0.8) is None and read_at(rows, "evaluations", 1) is rows[0]
    assert read_at([*rows, dict(reward=0.8, evaluations=3, held=1)], "reward", 0.8)["evaluations"] == 3


def test_an_algorithm_that_nobody_knows_has_a_space_of_its_own_settings():
    @dataclass(frozen=True)
    class Mine(FlowGRPO):
        strength: float = 2.0
        mode: Literal["one", "two"] = "one"

    space = default_space(Variant("mine", Mine(), TrainSettings()))
    assert [*space] == ["lr", "updates", "steps", "trained_steps", "strength", "mode"]
    assert space["strength"] == Range(0.5, 8.0, log=True) and space["mode"] == ("one", "two")
    assert space["steps"] == (5, 10, 20)


def test_the_same_words_compare_recipes_again(tmp_path):
    (tmp_path / "best.yaml").write_text("{task: toy, algorithm: dance, lr: 0.002, iterations: 9, seed: 3}")
    words = ["toy", "--seeds", "7", "--evaluations", "1e4", "--out", str(tmp_path), "--configs"]
    for _ in range(2):  # the second time, study.json has the variant already
        study, values = read_study([*words, f"{tmp_path}/best.yaml", f"other: {tmp_path}/best.yaml"])
        assert [side.name for side in study.variants] == [tmp_path.name, "other"]
        assert {side.settings.lr for side in study.variants} == {0.002}
        said = {name: values[name] for name in ("task", "variants", "seeds", "evaluations", "bounds")}
        (tmp_path / "study.json").write_text(json.dumps(said))


def test_choices_are_taken_as_they_are_said_and_drawn_numbers_are_short():
    space = dict(lr=(0.123456, 1e-3), sigma=Range(0.1, 0.99999), steps=Range(2, 9))
    found = settings_from(space, dict(lr=0.123456, sigma=0.299999, steps=3))
    assert found == dict(lr=0.123456, sigma=0.3, steps=3)
    assert settings_from(space, dict(sigma=0.99998)) == dict(sigma=0.99999)  # not beyond the range
