"A pretraining that is killed goes on where it was, bit by bit: the toy's, the digits' and the miniature's."

import copy
import json
from contextlib import suppress

import pytest
import torch
from safetensors.torch import load_file

from neighbor_grpo import training
from neighbor_grpo.models import miniature
from neighbor_grpo.models.miniature import PretrainSettings, pretrain
from neighbor_grpo.models.pipeline import MINIATURE
from neighbor_grpo.runs.folder import read_rows
from neighbor_grpo.runs.state import Snapshot, snapshot_of
from neighbor_grpo.tasks.digits import DigitsSettings, DigitsTask
from neighbor_grpo.tasks.toy2d import ToySettings, ToyTask
from neighbor_grpo.toyflows import VelocityMLP, eight_gaussians, train_flow

DATA = lambda generator: (eight_gaussians(32, generator), None)
TASKS = {"toy": (ToyTask, ToySettings(pretrain_steps=9)), "digits": (DigitsTask, DigitsSettings(pretrain_steps=4))}


@pytest.fixture
def kill(monkeypatch):
    "Let every training write its state after each step, and end the so-many-th of all steps in its middle."
    steps = []

    def at(number):
        steps.clear()
        save = Snapshot.save

        def counted(self, done, now=False, **parts):
            save(self, done, now=True, **parts)
            steps.append(done)
            if len(steps) == number:
                raise KeyboardInterrupt

        monkeypatch.setattr(Snapshot, "save", counted)

    yield at
    monkeypatch.undo()


def network():
    torch.manual_seed(0)
    return VelocityMLP(width=16, depth=1)


@pytest.mark.parametrize("step", [1, 2, 7, 11])
def test_a_flow_goes_on_with_the_same_bits(step, tmp_path, kill, monkeypatch):
    "Weights, average, moments, schedule with its momentum, generator and losses."
    whole, losses = train_flow(network(), DATA, 12, progress=False)
    kill(step)
    with pytest.raises(KeyboardInterrupt):
        train_flow(network(), DATA, 12, progress=False, snapshot=Snapshot(tmp_path, "base"))
    monkeypatch.undo()
    seen, batches = [], lambda generator: seen.append(None) or DATA(generator)
    again, later = train_flow(network(), batches, 12, progress=False, snapshot=Snapshot(tmp_path, "base"))
    assert later == losses and len(seen) == 12 - step
    assert all(torch.equal(a, b) for a, b in zip(again.state_dict().values(), whole.state_dict().values()))


def test_a_snapshot_is_written_when_it_is_time_and_no_folder_means_none(tmp_path, monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(training.time, "monotonic", lambda: clock[0])
    snapshot, parts = Snapshot(tmp_path, "base", every=30), dict(network=network())
    clock[0] = 29
    snapshot.save(1, **parts)
    assert not list(tmp_path.iterdir()) and snapshot.restore(**parts) == 0
    for now, done in ((30, 2), (31, 3)):
        clock[0] = now
        snapshot.save(done, **parts)
        assert snapshot.restore(**parts) == 2
    assert [path.name for path in tmp_path.iterdir()] == [".base.progress"] and snapshot_of(None, "base") is None


def test_a_damaged_snapshot_is_refused_by_name(tmp_path):
    (tmp_path / ".base.progress").write_bytes(b"half of it")
    with pytest.raises(ValueError, match=r"\.base\.progress is damaged: .*; remove it to train from the start"):
        train_flow(network(), DATA, 3, progress=False, snapshot=Snapshot(tmp_path, "base"))


@pytest.mark.parametrize("name", TASKS)
def test_a_task_goes_on_with_its_pretraining(name, tmp_path, kill, monkeypatch):
    task, settings = TASKS[name]
    monkeypatch.setattr("neighbor_grpo.tasks.digits.train_classifier", lambda network, *data, **more: network)
    whole = task(settings, tmp_path / "whole", progress=False)
    kill(3)
    with pytest.raises(KeyboardInterrupt):
        task(settings, tmp_path / "killed", progress=False)
    assert (tmp_path / "killed" / ".base.progress").exists()
    monkeypatch.undo()
    again = task(settings, tmp_path / "killed", progress=False)
    assert {path.name for path in (tmp_path / "killed").iterdir()} == {p.name for p in (tmp_path / "whole").iterdir()}
    for a, b in zip(again.base.state_dict().values(), whole.base.state_dict().values()):
        assert torch.equal(a, b)


# --- the miniature ---

TINY = PretrainSettings(
    scenes=64, vae_steps=3, decoder_steps=2, steps=3, guidance_steps=2, watch_images=2, watch_every=2
)


def contents(folder):
    "Tensors and rows of a pipeline, without the clock."
    tensors = {
        f"{path.parent.name}/{path.name}/{name}": value
        for path in folder.rglob("*.safetensors")
        for name, value in load_file(path).items()
    }
    rows = [{key: value for key, value in row.items() if key != "seconds"} for row in read_rows(folder / "log.jsonl")]
    return tensors, rows


@pytest.fixture(scope="module", autouse=True)
def quick():
    "The accuracies of a row take most of the time; a figure of all weights takes their place."

    def figures(pipeline, images):
        total = sum(weight.double().abs().sum().item() for weight in pipeline.transformer.parameters())
        return dict.fromkeys(miniature.KINDS, total)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(miniature, "accuracies", figures)
        patch.setattr(miniature, "wilson", lambda share, count: (0.0, 1.0))
        yield


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole") / "tiny"
    pretrain(folder, TINY, progress=False)
    return folder


@pytest.mark.parametrize("step", [2, 7, *(pytest.param(step, marks=pytest.mark.slow) for step in (3, 5, 9))])
def test_the_miniature_goes_on_with_the_same_bits(step, whole, tmp_path, kill, monkeypatch):
    "Killed within and at the end of each of its four trainings."
    folder = tmp_path / "killed"
    kill(step)
    with pytest.raises(KeyboardInterrupt):
        pretrain(folder, TINY, progress=False)
    with pytest.raises(ValueError, match="steps must be 3, as in the run that is resumed, got 4"):
        pretrain(folder, PretrainSettings(**vars(TINY) | dict(steps=4)), progress=False)
    monkeypatch.undo()
    steps, save = [], Snapshot.save
    counted = lambda self, done, **more: steps.append(done) or save(self, done, **more)
    monkeypatch.setattr(Snapshot, "save", counted)
    pretrain(folder, TINY, progress=False)
    (tensors, rows), (expected, lines) = contents(folder), contents(whole)
    assert len(steps) == 10 - step and rows == lines
    assert tensors.keys() == expected.keys() and all(torch.equal(tensors[name], expected[name]) for name in tensors)
    assert (folder / "README.md").read_text() == (whole / "README.md").read_text()
    assert not (folder / miniature.PROGRESS).exists()


def test_a_folder_with_something_else_is_left_alone(whole, tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    for folder in (tmp_path, whole):
        with pytest.raises(ValueError, match="folder must be new or empty, or of a pretraining that was killed"):
            pretrain(folder, TINY, progress=False)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_the_log_is_whole_after_a_kill_between_two_rows(tmp_path):
    "A row that was cut off is written again, one that is there is not; seconds go on."
    path, earlier = tmp_path / "log.jsonl", [dict(step=1, seconds=5)]
    log = miniature.open_log(path, earlier)
    log(step=2)
    path.write_text(path.read_text() + '{"step": 3, "sec')
    log = miniature.open_log(path, earlier)
    for step in (1, 2, 3):
        log(step=step)
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 1, 3] and rows[-1]["seconds"] >= 5


def test_what_is_tied_is_written_and_put_back(tmp_path):
    "As the text encoders' tables are."
    first = torch.nn.ModuleDict(dict(a=torch.nn.Linear(2, 2), b=torch.nn.Linear(2, 2)))
    first["b"].weight = first["a"].weight
    second = copy.deepcopy(first)
    torch.nn.init.zeros_(second["a"].weight)
    Snapshot(tmp_path, "tied").save(1, now=True, networks=first)
    Snapshot(tmp_path, "tied").restore(networks=second)
    assert torch.equal(second["b"].weight, first["a"].weight) and second["a"].weight is second["b"].weight


def test_a_pretraining_does_not_go_on_from_what_has_no_log(tmp_path):
    "Its card would be missed at the end; the folder is as free as before."
    with pytest.raises(ValueError, match=r"source must be .* log.jsonl"):
        pretrain(tmp_path / "new", PretrainSettings(source=str(tmp_path)), progress=False)
    with pytest.raises(ValueError, match=r"source must be .* log.jsonl"):
        pretrain(tmp_path / "new", PretrainSettings(source=str(tmp_path / "other")), progress=False)


@pytest.mark.parametrize("source", ["miniature", str(MINIATURE)])
def test_a_pretraining_goes_on_from_the_packaged_pipeline_by_either_name(source, tmp_path, monkeypatch):
    opened = []
    monkeypatch.setattr(miniature, "open_pipeline", lambda family, source: opened.append(source))
    monkeypatch.setattr(miniature, "draw_scenes", lambda *args: None)
    with suppress(TypeError):  # there are no scenes
        miniature.make_miniature(tmp_path, PretrainSettings(source=source), False)
    rows = read_rows(tmp_path / "log.jsonl")
    assert opened == [source] and any("decibel" in row for row in rows)
