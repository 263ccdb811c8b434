"""Comparisons: readings against hand-made examples, costs against counts, and kills that change nothing."""

import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from filelock import FileLock
from helpers import TinyTask
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from neighbor_grpo.cli import main
from neighbor_grpo.lab import compare
from neighbor_grpo.lab.compare import Study, Variant, against, cost, interval, positions, progress_of, read_at, table
from neighbor_grpo.neighbor import NeighborGRPO
from neighbor_grpo.rivals.catalogue import ALGORITHMS, make
from neighbor_grpo.runs.trainer import Trainer
from neighbor_grpo.training import TrainSettings

SMALL = Variant("small", NeighborGRPO(group_size=4, anchors=2, steps=3, trained_steps=2), TrainSettings(groups=2))


# --- what is charged ---


@pytest.mark.parametrize(
    "settings",
    [
        TrainSettings(groups=2),
        TrainSettings(groups=2, updates=2),
        TrainSettings(groups=2, ema=0.9, collector="average"),
    ],
    ids=["plain", "two updates", "average"],
)
@pytest.mark.parametrize("kl_weight", [0.0, 0.1])
@pytest.mark.parametrize("name", ALGORITHMS)
def test_every_evaluation_is_charged(name, kl_weight, settings):
    variant = Variant(name, make(name), replace(settings, kl_weight=kl_weight))
    trainer, counts = Trainer(TinyTask(dropout=0.0), variant.algorithm, variant.settings), {True: 0, False: 0}
    average = trainer.average.module if trainer.average else None
    for network in filter(None, (trainer.policy, trainer.reference, average)):
        network.register_forward_hook(
            lambda _, inputs, output: counts.update(
                {torch.is_grad_enabled(): counts[torch.is_grad_enabled()] + len(output)}
            )
        )
    for _ in range(3):
        counts.update({True: 0, False: 0})
        assert cost(trainer.step(), variant) == counts[False] + 3 * counts[True]


def test_costs_add_up_without_rounding():
    rows = [dict(nfe_old=8.0, nfe_theta=4 / 3)] * 30
    variant = Variant("paper", NeighborGRPO(), TrainSettings(groups=10))
    at = positions(rows, variant, rate=0.5)
    assert [p["evaluations"] for p in at] == [1440 * i for i in range(31)]
    assert at[7] == dict(iterations=7, evaluations=7 * 1440, seconds=7 * 720)
    penalty = replace(variant, settings=replace(variant.settings, kl_weight=0.1))
    assert positions(rows, penalty, 0.5)[1]["evaluations"] == 1600
    assert positions([], variant, 0.5) == [dict(iterations=0, evaluations=0, seconds=0)]


def test_a_run_is_as_far_as_on_its_slowest_axis():
    at = [dict(iterations=i, evaluations=30.0 * i, seconds=0.1 * i) for i in range(13)]
    evals = [dict(iteration=0), dict(iteration=10)]  # what came after the last evaluation does not count
    assert progress_of(at, evals, dict(iterations=20, evaluations=400, seconds=10)) == 0.1
    assert progress_of(at, evals, dict(iterations=5, evaluations=100)) == 2
    assert progress_of(at, evals[:1], dict(iterations=5)) == progress_of(at[:1], [], dict(iterations=5)) == 0


# --- readings, by hand ---


def run_of(variant, seed, *points):
    "Evaluations `(iterations, cost, reward)` as rows; a forward-equivalent takes 10 ms."
    return [
        dict(variant=variant, seed=seed, iterations=i, evaluations=c, seconds=0.01 * c, reward=r) for i, c, r in points
    ]


ROWS = [
    *run_of("a", 0, (0, 0.0, 0.1), (10, 100.0, 0.5), (20, 200.0, 0.9), (30, 300.0, 0.8)),
    *run_of("b", 0, (0, 0.0, 0.1), (10, 400.0, 0.7), (20, 800.0, 0.95)),
    *run_of("a", 1, (0, 0.0, 0.2), (10, 100.0, 0.6), (20, 200.0, 0.7), (30, 300.0, 0.8)),
    *run_of("b", 1, (0, 0.0, 0.2), (10, 400.0, 0.9), (20, 800.0, 0.95)),
]


def test_a_run_is_read_within_its_budget_and_never_between_evaluations():
    run = ROWS[:4]
    assert [read_at(run, "iterations", n)["iterations"] for n in (1, 10, 19, 20, 1000)] == [0, 10, 10, 20, 30]
    assert read_at(run, "evaluations", 299.9)["reward"] == 0.9
    assert read_at(run, "seconds", 1.5)["iterations"] == 10
    assert read_at(run, "reward", 0.5)["iterations"] == 10  # at or above
    assert read_at(run, "reward", 0.85)["iterations"] == 20  # the first, although it falls again
    assert read_at(run, "reward", 0.91) is None


def test_table_equals_the_hand_made_one():
    lines = {(line["reading"], line["variant"]): line for line in table(ROWS, dict(evaluations=450, seconds=2), 0.75)}
    assert list(lines) == [(r, v) for r in ("evaluations", "seconds", "reward") for v in "ab"]
    assert lines["evaluations", "a"]["reward"] == pytest.approx(0.8) and lines["evaluations", "a"]["iterations"] == 30
    assert lines["evaluations", "b"]["reward"] == pytest.approx(0.8) and lines["evaluations", "b"]["iterations"] == 10
    assert lines["seconds", "a"]["evaluations"] == 200 and lines["seconds", "b"]["evaluations"] == 0
    assert lines["reward", "a"]["evaluations"] == 250 and lines["reward", "b"]["evaluations"] == 600
    half = stats.t.ppf(0.975, 1) * abs(0.7 - 0.9) / 2  # of two values: standard deviation d / sqrt 2, over sqrt 2
    assert lines["evaluations", "b"]["reward_interval"] == pytest.approx(half)
    assert all((line["reached"], line["seeds"], line["limit"] > 0) == (2, 2, True) for line in lines.values())


def test_seeds_that_never_reach_the_target_are_counted():
    lines = {line["variant"]: line for line in table(ROWS, {}, 0.85)}
    assert (lines["a"]["reached"], lines["a"]["seeds"], lines["a"]["evaluations"]) == (1, 2, 200)
    assert math.isnan(lines["a"]["evaluations_interval"])
    none = table(ROWS, {}, 0.99)[0]
    assert none["reached"] == 0 and math.isnan(none["reward"]) and math.isnan(none["seconds"])
    text = compare.to_markdown(table(ROWS, {}, 0.85))
    assert "| a | 1 of 2 | 20 | 200 | 2 | 0.9 |" in text
    text = compare.to_markdown(table(ROWS, dict(seconds=4), 0.99), against(ROWS, dict(seconds=4), 0.99))
    assert "| b | even: +0 (-1.27 to 1.27) | never both |" in text


def test_variants_are_held_against_the_first_seed_by_seed():
    budget, target = against(ROWS, dict(iterations=10), 0.6)
    differences = (0.7 - 0.5, 0.9 - 0.6)
    low, high = stats.t.interval(0.95, 1, np.mean(differences), stats.sem(differences))
    assert (budget["variant"], budget["first"], budget["pairs"]) == ("b", "a", 2)
    assert (budget["mean"], budget["low"], budget["high"]) == pytest.approx((0.25, low, high))
    logs = np.log([400 / 200, 400 / 100])
    low, high = np.exp(stats.t.interval(0.95, 1, logs.mean(), stats.sem(logs)))
    assert (target["mean"], target["low"], target["high"]) == pytest.approx((8**0.5, low, high))
    assert against(ROWS, {}, 0.85)[0]["pairs"] == 1  # only seed 0 has both
    lonely = [row for row in ROWS if row["variant"] == "a" or row["seed"] == 1]
    assert against(lonely, dict(iterations=10), 0.5)[0]["pairs"] == 1


@given(st.lists(st.floats(-1e3, 1e3), min_size=2, max_size=9), st.floats(0.5, 0.99))
def test_interval_is_that_of_scipy(values, level):
    mean, half = interval(values, level)
    assert mean == pytest.approx(np.mean(values), abs=1e-9)
    if np.std(values) > 1e-9:
        expected = stats.t.interval(level, len(values) - 1, np.mean(values), stats.sem(values))
        assert (mean - half, mean + half) == pytest.approx(expected)


def test_interval_of_one_value_or_none():
    assert interval([3.0])[0] == 3 and math.isnan(interval([3.0])[1])
    assert all(map(math.isnan, interval([])))


names = st.text(st.characters(codec="utf-8", exclude_characters="\r", exclude_categories=["Cs"]), min_size=1)
floats = st.floats(allow_infinity=False)


@given(st.lists(st.tuples(names, st.integers(0, 10**6), floats), min_size=1, max_size=5))
def test_csv_gives_back_what_it_got(tmp_path_factory, rows):
    path = tmp_path_factory.mktemp("csv") / "rows.csv"
    rows = [dict(variant=v, seed=s, reward=r) for v, s, r in rows]
    compare.write_csv(path, rows)
    assert repr(compare.read_csv(path)) == repr(rows)


def test_pictures_of_one_seed_and_of_many_variants(tmp_path):
    many = [dict(row, variant=f"{row['variant']}{i}") for i in range(9) for row in ROWS if row["seed"] == 0]
    compare.plot_curves(many, path=tmp_path / "curves.png")
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


# --- processes; the functions are called in others, which import this file ---


def hand_in(report, value):
    report(value)


def stumble(report):
    report(1)
    raise ConnectionError("the reward server is gone")


def die(report):
    os.kill(os.getpid(), signal.SIGKILL)


def overlap(report, folder):
    "Reports how many are at work at once."
    mine = folder / str(os.getpid())
    mine.touch()
    time.sleep(0.1)
    report(len(list(folder.iterdir())))
    mine.unlink()


def tiny_task(folder, seed, progress):
    "A task that fails for seed 1."
    if seed == 1:
        raise ConnectionError("the reward server is gone")
    return TinyTask(seed)


def test_processes_fail_alone(tmp_path):
    heard = {}
    work = {f"good {i}": (hand_in, i) for i in range(4)} | {"stumbles": (stumble,), "dies": (die,)}
    failures = compare.in_processes(work, 2, lambda name, news: heard.update({name: news}))
    assert failures == {"stumbles": "ConnectionError: the reward server is gone", "dies": "ended with status -9"}
    assert heard == {**{f"good {i}": i for i in range(4)}, "stumbles": 1}
    assert compare.in_processes({}, 2) == {}
    counts = []
    compare.in_processes({str(i): (overlap, tmp_path) for i in range(6)}, 2, lambda name, count: counts.append(count))
    assert len(counts) == 6 and max(counts) <= 2


def test_a_failing_seed_is_named(tmp_path):
    study = Study((SMALL,), tiny_task, (0, 1), dict(iterations=10))
    with pytest.raises(RuntimeError, match="pretraining for seed 1: ConnectionError: the reward server is gone"):
        compare.run_study(study, tmp_path / "study", progress=False)


def test_a_failing_run_is_named_and_the_others_are_reported(tmp_path):
    fails = replace(SMALL, name="fails", settings=replace(SMALL.settings, lr=1e30))
    study = Study((SMALL, fails), tiny_task, (0,), dict(iterations=10))
    (tmp_path / "timing.json").write_text(json.dumps({n: dict(seconds=1, evaluations=100) for n in ("small", "fails")}))
    failed = compare.run_study(study, tmp_path, progress=False)
    assert list(failed) == ["fails-seed0"] and "finite" in failed["fails-seed0"]
    assert {row["variant"] for row in compare.read_csv(tmp_path / "curves.csv")} == {"small"}


def test_a_study_may_grow_but_not_change(tmp_path):
    study = Study((SMALL,), tiny_task, (0,), dict(iterations=10), about=dict(task=dict(width=1.0)))
    compare.claim(study, tmp_path)
    more = (SMALL, replace(SMALL, name="more"))
    compare.claim(replace(study, variants=more, seeds=(0, 2), budgets=dict(seconds=9), target=0.5), tmp_path)
    before = (tmp_path / "config.json").read_text()
    other = replace(SMALL, algorithm=replace(SMALL.algorithm, sigma=0.5))
    with pytest.raises(ValueError, match="variant small: sigma must be 0.3.* got 0.5"):
        compare.claim(replace(study, variants=(other,)), tmp_path)
    with pytest.raises(ValueError, match="width must be 1.0.* got 2.0"):
        compare.claim(replace(study, about=dict(task=dict(width=2.0))), tmp_path)
    assert (tmp_path / "config.json").read_text() == before
    run = tmp_path / "run"
    Trainer(TinyTask(), SMALL.algorithm, SMALL.settings, run)
    with pytest.raises(ValueError, match="out must be .*comparison"):
        compare.claim(study, run)


def test_a_run_that_might_end_early_is_not_compared():
    "It would never reach its budget, and the comparison never end."
    with pytest.raises(ValueError, match="stop_when_worse must be 0"):
        replace(SMALL, settings=replace(SMALL.settings, stop_when_worse=2))


def test_two_at_once_are_refused(tmp_path):
    study = Study((SMALL,), tiny_task, (0,), dict(iterations=10))
    compare.claim(study, tmp_path)
    with FileLock(tmp_path / ".lock"):
        with pytest.raises(ValueError, match="is in use: another process is working in it"):
            compare.run_study(study, tmp_path, progress=False)


# --- the command, killed ---

LINE = """compare toy --quiet --seeds 0 1 --iterations 12 --seconds 4 --target 0.3 --variants
    |neighbor --anchors 2|few: dance --steps 4 --trained_steps 2|replay: op --trained_steps 2|
    --common|--pretrain_steps 60 --eval_samples 100 --eval_every 4 --checkpoint_every 3 --groups 2 --group_size 4|"""
PARTS = LINE.split("|")
COMMAND = [*PARTS[0].split(), *PARTS[1:4], *PARTS[4].split(), PARTS[5]]
# Seconds that nobody measured: some variants have to go beyond the 12 iterations, others not.
TIMING = {"neighbor": dict(seconds=0.2, evaluations=96), "few": dict(seconds=0.5, evaluations=80),
          "replay": dict(seconds=0.4, evaluations=100)}  # fmt: skip
RESULTS = ("curves.csv", "table.csv", "against.csv", "table.md")

# Imports the library once, and makes a process of its own for each command line, whose workers are forks. An event is
# an iteration that begins or ends, or a piece of a checkpoint that is written; at a given one, somebody is killed.
HOST = """
import json, multiprocessing, os, signal, sys, time
import safetensors.torch, torch
import torch._dynamo
from neighbor_grpo import cli, training
from neighbor_grpo.lab import compare
from neighbor_grpo.runs import folder

def event():
    with count.get_lock():
        count.value += 1
        if count.value != at: return
    if what == "worker": os.kill(os.getpid(), signal.SIGKILL)
    if what == "parent":
        os.kill(os.getppid(), signal.SIGKILL)
        time.sleep(60)  # in the middle of something long, which must not be finished
    if what == "keyboard": os.killpg(os.getpgid(0), signal.SIGINT)

def save_in_pieces(tensors, path):
    whole = safetensors.torch.save(tensors)
    with open(path, "wb") as file:
        for start in range(0, len(whole), len(whole) // 3 + 1):
            event()
            file.write(whole[start : start + len(whole) // 3 + 1])
            file.flush()

def step(trainer, step=training.Trainer.step):
    event()
    row = step(trainer)
    event()
    return row

folder.save_file, training.Trainer.step = save_in_pieces, step
get_context = multiprocessing.get_context
multiprocessing.get_context = lambda name: get_context("fork")
os.fsync = lambda handle: None  # nobody cuts the power
compare.plot_curves = lambda *arguments, **options: None
torch.set_num_threads(1)
signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background of a shell begins with it ignored
for line in sys.stdin:
    argv, what, at = json.loads(line)
    count = multiprocessing.Value("i", 0)
    pid = os.fork()
    if pid == 0:
        os.setpgid(0, 0)
        os.dup2(2, 1)
        os._exit(cli.main(argv))
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    print(pid, status, flush=True)
"""


class Host:
    "Runs command lines as processes, in which somebody may be killed, and tells their group and exit status."

    def __init__(self, errors):
        self.process = subprocess.Popen([sys.executable, "-c", HOST], stdin=-1, stdout=-1, stderr=errors, text=True)

    def run(self, argv, what=None, at=0):
        self.process.stdin.write(json.dumps([argv, what, at]) + "\n")
        self.process.stdin.flush()
        group, status = map(int, self.process.stdout.readline().split())
        wait_for(lambda: not left(group), 10)  # no orphans
        return status


@pytest.fixture(scope="module")
def host(tmp_path_factory):
    with open(tmp_path_factory.mktemp("host") / "errors.txt", "w+") as errors:
        host = Host(errors)
        host.errors = errors
        yield host
        host.process.stdin.close()
        assert host.process.wait(60) == 0


@pytest.fixture(scope="module")
def whole(host, tmp_path_factory):
    "The folder of a comparison that nothing stopped."
    folder = tmp_path_factory.mktemp("whole")
    (folder / "timing.json").write_text(json.dumps(TIMING))
    assert host.run([*COMMAND, "--out", str(folder)]) == 0
    return folder


def wait_for(happened, seconds=60):
    end = time.monotonic() + seconds
    while not happened():
        if time.monotonic() > end:
            raise TimeoutError("the comparison does not get on")
        time.sleep(0.002)


def rows_in(folder):
    return sum(path.read_bytes().count(b"\n") for path in folder.glob("runs/*/metrics.jsonl"))


def left(group):
    "Whether any process of the group is left."
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


def same_results(folder, expected):
    return [name for name in RESULTS if (folder / name).read_bytes() != (expected / name).read_bytes()]


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in (4, 5))])
def test_interrupted_five_times_at_random(seed, host, whole, tmp_path):
    chance, folder, statuses = random.Random(seed), tmp_path / "cut", []
    folder.mkdir()
    (folder / "timing.json").write_text(json.dumps(TIMING))
    command, again = [*COMMAND, "--out", str(folder)], ["compare", "--quiet", "--out", str(folder)]
    kinds = [*chance.sample(["parent", "parent", "keyboard"], 3), "worker", "worker"]
    for number, what in enumerate(kinds):
        at = chance.randrange(1, 80 if number < 4 else 6)  # a killed worker leaves its run, and no other, to be done
        statuses.append((what, host.run(again if number % 2 else command, what, at)))
    expected = {"parent": -signal.SIGKILL, "worker": 1, "keyboard": 130}
    assert statuses == [(what, expected[what]) for what, _ in statuses]
    assert host.run(again) == 0
    assert not same_results(folder, whole)


def test_a_killed_worker_takes_nobody_along(host, whole, tmp_path):
    folder = tmp_path / "cut"
    folder.mkdir()
    (folder / "timing.json").write_text(json.dumps(TIMING))
    assert host.run([*COMMAND, "--out", str(folder)], "worker", 40) == 1
    assert len({(row["variant"], row["seed"]) for row in compare.read_csv(folder / "curves.csv")}) == 5
    host.errors.seek(0)
    last = host.errors.read().splitlines()[-1]
    assert "1 of 6 runs failed" in last and "status -9" in last and f"compare --out {folder}" in last


def test_an_ordinary_comparison_is_killed_and_continued(whole, tmp_path):
    folder = tmp_path / "cut"
    shutil.copytree(whole / "pretrained", folder / "pretrained")
    (folder / "timing.json").write_text(json.dumps(TIMING))
    code = "import sys; from neighbor_grpo.cli import main; sys.exit(main())"
    command = [sys.executable, "-c", code, *COMMAND, "--out", str(folder)]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    wait_for(lambda: rows_in(folder) >= 20)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    unfinished = rows_in(folder)
    assert main(["compare", "--quiet", "--out", str(folder)]) == 0
    assert rows_in(folder) > unfinished and not same_results(folder, whole)


def test_a_finished_run_is_not_done_again(whole, tmp_path, capsys):
    folder = tmp_path / "copy"
    shutil.copytree(whole, folder)
    (folder / "table.md").unlink()

    def state():
        return {path: (path.stat().st_mtime_ns, path.stat().st_ino) for path in sorted((folder / "runs").rglob("*"))}

    before = state()
    assert main(["compare", "--out", str(folder), "--quiet"]) == 0
    assert state() == before and not same_results(folder, whole)
    assert capsys.readouterr().out == (folder / "table.md").read_text() + f"folder: {folder}\n"


def test_more_of_everything_continues_what_there_is(host, whole, tmp_path):
    grown, fresh = tmp_path / "grown", tmp_path / "fresh"
    shutil.copytree(whole, grown)
    fresh.mkdir()
    (fresh / "timing.json").write_text(json.dumps(TIMING))
    longer = ["--iterations", "17", "--seeds", "0", "1", "2"]
    for argv in (["compare", "--quiet", "--out", str(grown), *longer], [*COMMAND, "--out", str(fresh), *longer]):
        assert host.run(argv) == 0
    assert not same_results(grown, fresh) and same_results(grown, whole)
    assert (
        max(row["iterations"] for row in compare.read_csv(grown / "curves.csv")) >= 20
    )  # the next evaluation after 17


def test_a_comparison_leaves_a_complete_folder(whole):
    folder = whole
    expected = {"config.json", "study.json", "timing.json", "pretrained", "runs", *RESULTS}
    assert {path.name for path in folder.iterdir()} - {".lock"} == expected
    runs = sorted(path.name for path in (folder / "runs").iterdir())
    assert runs == sorted(f"{name}-seed{seed}" for name in TIMING for seed in (0, 1))
    rows = compare.read_csv(folder / "curves.csv")
    assert list(rows[0]) == ["variant", "seed", "iterations", "evaluations", "seconds", "reward", "share", "spread"]
    for seed in (0, 1):  # one start for all variants of a seed
        starts = {tuple(row.values())[2:] for row in rows if row["seed"] == seed and row["iterations"] == 0}
        assert len(starts) == 1
        bases = {path.read_bytes() for path in folder.glob(f"runs/*-seed{seed}/base.safetensors")}
        assert bases == {(folder / "pretrained" / str(seed) / "base.safetensors").read_bytes()}
    table = compare.read_csv(folder / "table.csv")
    assert [line["reading"] for line in table[::3]] == ["iterations", "seconds", "reward"]
    assert all(line["iterations"] == 12 for line in table[:3])
    assert all(line["seconds"] <= 4 for line in table[3:6])


def test_a_run_of_a_comparison_is_an_ordinary_run(whole, tmp_path, capsys):
    run, copy = whole / "runs" / "few-seed1", tmp_path / "run"
    shutil.copytree(run, copy)
    assert main(["evaluate", str(copy)]) == 0
    config = json.loads((run / "config.json").read_text())
    assert config["algorithm_name"] == "DanceGRPO" and config["training"]["seed"] == 1
    newest = max(int(path.name) for path in (run / "checkpoints").iterdir())
    assert config["training"]["iterations"] == newest
    alone = f"train toy --algorithm dance --steps 4 --trained_steps 2 --seed 1 --iterations {newest} --quiet"
    assert main([*alone.split(), *PARTS[5].split(), "--out", str(tmp_path / "alone")]) == 0
    evals = [(folder / "eval.jsonl").read_text() for folder in (run, tmp_path / "alone")]
    assert evals[0] == evals[1]


def test_a_study_from_a_file(tmp_path, capsys):
    from neighbor_grpo.cli import read_study

    path = tmp_path / "study.yaml"
    path.write_text("""
task: toy
common: --groups 4 --lr 5e-4
variants:
  plain: neighbor
  wide +: neighbor --sigma 0.6 --lr 1e-3
seeds: [3, 4]
evaluations: 1e5
""")
    study, values = read_study(["--study", str(path), "--out", "DIR", "--seconds", "2.5"])
    plain, wide = study.variants
    assert (plain.name, plain.settings.lr, plain.settings.groups) == ("plain", 5e-4, 4)
    assert (wide.name, wide.settings.lr, wide.algorithm.sigma) == ("wide +", 1e-3, 0.6)
    assert study.seeds == (3, 4) and study.budgets == dict(evaluations=1e5, seconds=2.5) and study.target == 0.9
    assert read_study(["toy", "--study", str(path), "--out", "DIR", "--seeds", "7"])[0].seeds == (7,)
    for text, fragment in (("sedes: [1]", "sedes"), ("- toy", "mapping"), ("seeds: many", "seeds"), ("a: [", "YAML")):
        path.write_text(text)
        assert main(["compare", "--study", str(path), "--out", str(tmp_path / "out")]) == 1
        error = capsys.readouterr().err
        assert len(error.splitlines()) == 1 and fragment in error, error
    assert not (tmp_path / "out").exists()
