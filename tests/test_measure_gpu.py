"""The tool that measures a GPU, on the processor at a tiny size: its parts, what it keeps, and what it survives."""

import json
import math
import os
import subprocess
import sys
import time
from dataclasses import fields
from pathlib import Path
from unittest import mock

import pytest
import torch

import measure_gpu
from neighbor_grpo.cli import read_command
from neighbor_grpo.lab import benchmark, cost
from neighbor_grpo.lab.benchmark import StreamTime, summaries, timed_rounds
from neighbor_grpo.lab.cost import (
    RandomTask,
    gpu_markdown,
    gpu_tables,
    gradient_fits,
    largest_fit,
    operations,
)
from neighbor_grpo.models.pipeline import PipelineSettings
from neighbor_grpo.neighbor import NeighborGRPO
from neighbor_grpo.rivals.gaussian import DanceGRPO

ROOT = Path(__file__).resolve().parent.parent
KINDS = ["NeighborGRPO", "TempFlowGRPO", "FlowGRPO", "DiffusionNFT", "DanceGRPO"]
PARTS = ["check", "512", "512-fewer", "qwen-image", "24gb", "flux", "states-512", "512-compiled"]
COMMAND = ["--device", "cpu", "--tiny", "--minutes", "60", "--parts", *PARTS]


def strict(path):
    "A JSON file without what only Python understands."

    def refuse(name):
        raise ValueError(name)

    return json.loads(path.read_text(encoding="utf-8"), parse_constant=refuse)


def one(folder, ending):
    (path,) = folder.glob(f"*{ending}")
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    "One part of each kind, measured here."
    folder = tmp_path_factory.mktemp("gpu") / "new"
    with mock.patch.dict(os.environ):
        measure_gpu.main(["--out", str(folder), *COMMAND])
    return folder


def test_every_part_leaves_its_result(folder):
    table = strict(one(folder, ".json"))
    assert table["card"].startswith("CPU") and table["versions"]["torch"] == torch.__version__
    parts = table["parts"]
    assert {name: part["status"] for name, part in parts.items()} == dict.fromkeys(PARTS, "done")
    assert [row["algorithm"] for row in parts["512"]["rows"]] == KINDS
    for name in ("512-fewer", "qwen-image", "24gb", "flux", "512-compiled"):
        assert [row["algorithm"] for row in parts[name]["rows"]] == ["NeighborGRPO"]
    rows = [row for part in parts.values() for row in part["rows"]]
    assert all(row["timed"] >= 1 and row["seconds"] > 0 and row["rate"] > 0 and row["decoding"] < 1 for row in rows)
    decoded = {name for name, part in parts.items() if part["rows"] and part["rows"][0]["decoding"] > 0}
    assert decoded == {"512", "512-fewer", "24gb", "flux", "512-compiled"}
    assert all(0 < row["outside"] < 1 and 0 <= row["optimizer"] < 1 and row["memory"] is None for row in rows)
    assert parts["check"]["values"]["identical"] and parts["states-512"]["values"] == {"with": 5, "without": 5}
    assert parts["states-512"]["note"] == "5 or more without checkpointing, 5 or more with checkpointing"


def test_page_shows_every_table(folder, tmp_path):
    shown = gpu_tables(folder)
    assert shown + "\n" == one(folder, ".md").read_text(encoding="utf-8")
    assert shown.count("| 512 |") == 5 and "the same bits" in shown and strict(one(folder, ".json"))["card"] in shown
    assert gpu_tables(tmp_path) == gpu_tables(tmp_path / "none")
    assert gpu_tables(tmp_path).startswith("No table has been measured")
    page = json.loads((ROOT / "nbs" / "lab/cost.ipynb").read_text(encoding="utf-8"))
    assert 'Markdown(gpu_tables("../results/gpu"))' in ["".join(cell["source"]) for cell in page["cells"]]


def test_rate_is_held_against_the_data_sheet():
    row = dict(algorithm="A", cost=20, seconds=2.0, timed=3, memory=10.0, rate=494.5)
    part = dict(rows=[row], about="what", status="done", note="")
    table = dict(memory=80, driver="1", cuda="13", versions={}, date="2026-01-01", parts=dict(first=part))
    assert "| 50.0% |" in gpu_markdown(table | dict(card="NVIDIA H100 80GB HBM3"))
    assert "| 65.4% |" in gpu_markdown(table | dict(card="NVIDIA H100 PCIe"))
    assert gpu_markdown(table | dict(card="Another")).splitlines()[4].endswith("| 494 | - |")


def test_command_goes_on_with_what_is_missing(folder):
    path = one(folder, ".json")
    table = strict(path)
    part = table["parts"]["512"]
    del part["rows"][1:]
    part["status"], part["rows"][0]["seconds"] = "partly done", 12345.0
    table["parts"]["flux"]["note"] = "kept"
    path.write_text(json.dumps(table), encoding="utf-8")
    with mock.patch.dict(os.environ):
        measure_gpu.main(["--out", str(folder), *COMMAND])
    parts = strict(path)["parts"]
    assert [row["algorithm"] for row in parts["512"]["rows"]] == KINDS and parts["512"]["status"] == "done"
    assert parts["512"]["rows"][0]["seconds"] == 12345.0 and parts["flux"]["note"] == "kept"


def test_table_of_another_machine_is_refused(tmp_path):
    path = tmp_path / "card.json"
    path.write_text(json.dumps(dict(card="A", driver="1", parts={})), encoding="utf-8")
    assert measure_gpu.opened(path, dict(card="A", driver="1"))["parts"] == {}
    with pytest.raises(SystemExit, match="driver was 1 there, is 2 now"):
        measure_gpu.opened(path, dict(card="A", driver="2"))


def dies(channel):
    channel.send(dict(rows=[1]))
    os._exit(3)


def hangs(channel):
    channel.send(dict(rows=[1]))
    time.sleep(600)


def test_one_part_takes_no_other_along():
    with mock.patch.dict(os.environ):
        context = measure_gpu.start_processes(tiny=True)
        for target, seconds, status in [(dies, 300, "crashed with exit code 3"), (hangs, 10, "out of time")]:
            kept = []  # the first one waited until the libraries were there, so the second begins at once
            found = measure_gpu.ask(context, target, seconds=seconds, keep=kept.append)
            assert found == dict(rows=[1], status=status) and kept


class Channel(list):
    send = list.append


@pytest.mark.parametrize(
    ("error", "status", "note"),
    [
        (torch.OutOfMemoryError("too much\nof it"), "out of memory", "OutOfMemoryError: too much"),
        (ValueError("x"), "failed", "ValueError: x"),
    ],
)
def test_error_becomes_a_status(error, status, note, monkeypatch):
    def run(device, seconds, report, known):
        report(rows=[1])
        raise error

    part = measure_gpu.Part("name", "about", run, 1, 0, {})
    monkeypatch.setattr(measure_gpu, "parts", lambda tiny: [part])
    channel = Channel()
    measure_gpu.work(channel, True, "name", "cpu", 0.0, set())
    assert channel == [dict(rows=[1]), dict(status=status, note=note)]


def test_without_time_a_part_is_skipped_and_its_old_rows_stay(monkeypatch):
    monkeypatch.setattr(measure_gpu, "ask", None)  # no process may start
    part = measure_gpu.Part("name", "about", None, 100, 30, {})
    for old in ({}, dict(name=dict(rows=[dict(algorithm="A")], status="partly done"))):
        table = dict(parts=dict(old))
        found = measure_gpu.measure(None, part, table, None, 29, lambda table: None)
        assert table["parts"]["name"] is found and found["status"] == ("partly done" if old else "skipped")


def test_every_part_is_possible():
    "At full size nothing is run here, but its settings are checked."
    names = [part.name for part in measure_gpu.parts()]
    assert names == [part.name for part in measure_gpu.parts(tiny=True)] and len(set(names)) == len(names)
    for part in measure_gpu.parts():
        values = dict(part.settings)
        if part.run is measure_gpu.recipe:
            values |= measure_gpu.recipe_values(values["name"])
        PipelineSettings(**{f.name: values[f.name] for f in fields(PipelineSettings) if f.name in values})
        for algorithm in measure_gpu.algorithms(small=False):
            assert values.get("micro_batch", 0) % algorithm.together == 0
        assert values.get("model", "tiny") in cost.MODELS and part.least < part.limit <= 540


def test_a_recipe_is_measured_as_it_is_trained():
    for part in measure_gpu.parts():
        if part.run is measure_gpu.recipe:
            values = measure_gpu.recipe_values(part.settings["name"])
            task, algorithm, _ = read_command([values["task"], "--recipe", part.settings["name"]])[1][:3]
            for own, default in ((algorithm, NeighborGRPO()), (task, PipelineSettings())):
                names = [field.name for field in fields(default) if field.name != "shift"]  # the task's here and there
                assert [getattr(own, n) for n in names] == [values.get(n, getattr(default, n)) for n in names]


def test_rise_has_to_be_clear():
    noise = torch.randn(16, generator=torch.Generator().manual_seed(0))
    before = torch.zeros(16)
    assert measure_gpu.learns(before, 1 + 0.1 * noise)[2] and not measure_gpu.learns(before, -1 + 0.1 * noise)[2]
    assert not measure_gpu.learns(before, noise - noise.mean())[2]


@pytest.mark.parametrize("limit", [0, 1, 2, 3, 7, 8, 100])
@pytest.mark.parametrize("most", [1, 8, 64])
def test_largest_that_fits(limit, most):
    tried = []
    assert largest_fit(lambda n: tried.append(n) or n <= limit, most) == min(limit, most)
    assert max(tried) <= most and len(set(tried)) == len(tried)


def test_too_many_states_do_not_fit(monkeypatch):
    task = RandomTask("tiny", 32, 32, PipelineSettings(lora_rank=2))
    call = task.policy.call

    def with_room_for_three(x, *rest, **more):
        if len(x) > 3:
            raise torch.OutOfMemoryError("full")
        return call(x, *rest, **more)

    monkeypatch.setattr(task.policy, "call", with_room_for_three)
    assert largest_fit(lambda count: gradient_fits(task, count)) == 3
    assert all(weight.grad is None for weight in task.policy.parameters())


def test_no_iteration_starts_that_would_end_too_late(monkeypatch):
    "A second for each forward-equivalent: 12 and 67 a turn, one turn to warm up if a fifth of the time allows it."
    now = [0.0]
    monkeypatch.setattr(benchmark.time, "perf_counter", lambda: now[0])

    def run(trainer):
        seconds = benchmark.forward_equivalents(trainer.algorithm)
        now[0] += seconds
        return dict(seconds=seconds)

    trainers = [mock.Mock(algorithm=NeighborGRPO()), mock.Mock(algorithm=DanceGRPO())]
    for seconds, counts in ((math.inf, [3, 3]), (91, [1, 1]), (90, [3, 0]), (24, [1, 0]), (23, [0, 0])):
        now[0], reports = 0.0, []
        tell = lambda found, to=reports: to.append(sum(map(len, found)))
        found = timed_rounds(trainers, run, 3, seconds, tell, False)
        assert [len(rows) for rows in found] == counts and reports == list(range(1, sum(counts) + 1))


def test_rate_counts_all_evaluations():
    algorithm = NeighborGRPO()  # 8 without gradient and 4/3 with, for each of 12
    work = operations(algorithm, dict(forward=3.0, both=9.0), groups=2)
    assert work == pytest.approx(2 * 12 * (8 * 3 + 4 / 3 * 9))


def test_summaries_are_medians_and_factors_of_each_round():
    "The factor is not that of the medians; an algorithm without a timed iteration has no row."
    algorithms = [NeighborGRPO(), DanceGRPO(), DanceGRPO(steps=15)]
    found = [[dict(seconds=s) for s in (1.0, 2.0, 9.0)], [dict(seconds=s) for s in (3.0, 10.0, 9.0)], []]
    first, second = summaries(algorithms, found)
    assert (first["seconds"], first["timed"], first["times"], first["limit"]) == (2, 3, 1, 1)
    assert (second["seconds"], second["times"]) == (9, 3) and second["limit"] == pytest.approx(67 / 12)


def test_time_of_a_stream_waits_only_when_it_is_read(monkeypatch):
    class Event:
        clock, waits = 0.0, 0

        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            Event.clock += 500
            self.at = Event.clock

        def synchronize(self):
            Event.waits += 1

        def elapsed_time(self, later):
            return later.at - self.at

    monkeypatch.setattr(benchmark.torch.cuda, "Event", Event)
    network = torch.nn.Linear(2, 2)
    clock = benchmark.NetworkClock(network, StreamTime)
    network(torch.ones(1, 2)).sum().backward()
    clock.close()
    assert Event.waits == 0
    assert clock.seconds == 0.5 + 1.0  # forwards one mark later, backwards two: each weight sets one


def test_tool_starts_without_large_libraries():
    code = "import sys, measure_gpu; sys.exit(bool({'torch', 'numpy', 'yaml', 'neighbor_grpo'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT / "tools").returncode == 0


@pytest.mark.parametrize(
    ("line", "message"), [("--out x --parts 512 513", "got '513'"), ("--device cpu", "--out must be a folder")]
)
def test_wrong_calls(line, message, capsys):
    with pytest.raises(SystemExit):
        measure_gpu.main(line.split())
    assert message in capsys.readouterr().err
