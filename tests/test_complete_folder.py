"""A run folder is complete: it goes on from any place, and what it was given from outside may not change unseen."""

import json
import os
import shutil
from functools import partial

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import tiny_sd3

from neighbor_grpo.cli import main
from neighbor_grpo.lab import compare
from neighbor_grpo.models import pipeline as pipelines
from neighbor_grpo.models.miniature import ScenesSettings, ScenesTask
from neighbor_grpo.models.pipeline import MINIATURE, check_source, read_inputs, write_inputs
from neighbor_grpo.models.sd3 import SD3
from neighbor_grpo.neighbor import NeighborGRPO
from neighbor_grpo.runs.folder import read_rows
from neighbor_grpo.runs.machine import quiet
from neighbor_grpo.tasks import images
from neighbor_grpo.tasks.images import ImagesSettings, ImagesTask
from neighbor_grpo.training import TrainSettings

TEXTS = ["a cat", "two dogs", "a red bird", "a tree", "a house", "a fish"]
TINY = (
    "train sd3 --height 16 --width 16 --max_sequence_length 12 --groups 2 --group_size 2 --anchors 1 --steps 2"
    " --trained_steps 1 --eval_images 4 --eval_steps 2 --precision float32 --device cpu --lora_rank 2 --lora_alpha 2"
    " --checkpoint_every 1 --eval_every 1 --iterations 1 --source pipe --out run"
).split()


@pytest.fixture
def place(tmp_path, monkeypatch):
    "A working directory with a pipeline and two files of prompts."
    place = tmp_path / "place"
    with quiet():
        tiny_sd3().save_pretrained(place / "pipe")
    (place / "p.txt").write_text("\n".join(TEXTS))
    (place / "h.txt").write_text("a boat\na door\n")
    monkeypatch.chdir(place)
    return place


def train(*more):
    assert main([*TINY, "--quiet", *more]) == 0


def fails(capsys, line):
    "The line on standard error of a command that does not do its job."
    capsys.readouterr()
    assert main(line.split()) == 1
    (error,) = capsys.readouterr().err.splitlines()
    return error


# --- from any place ---


def test_a_run_goes_on_from_any_directory(place, tmp_path, monkeypatch, capsys):
    train("--prompts", "p.txt", "--held_out", "h.txt")
    task = json.loads((place / "run" / "config.json").read_text())["task"]
    assert [task[name] for name in ("source", "prompts", "held_out")] == [
        str(place / n) for n in ("pipe", "p.txt", "h.txt")
    ]
    (tmp_path / "else").mkdir()
    monkeypatch.chdir(tmp_path / "else")
    capsys.readouterr()
    for command in ("evaluate ../place/run", "sample ../place/run", "save ../place/run"):
        assert main(command.split()) == 0
    assert main("train --resume --iterations 2 --quiet --out ../place/run".split()) == 0
    assert [row["iteration"] for row in read_rows(place / "run" / "eval.jsonl")] == [0, 1, 2]
    assert list((tmp_path / "else").iterdir()) == []


def test_a_moved_folder_stands_on_its_own(place, tmp_path, capsys):
    "The files of prompts are gone, and the run is elsewhere: it goes on as the one that stayed."
    train("--prompts", "p.txt")
    shutil.copytree(place / "run", tmp_path / "moved")
    assert main("train --resume --iterations 2 --quiet --out run".split()) == 0
    kept = json.loads((tmp_path / "moved" / "prompts.json").read_text())
    assert kept["train"] == TEXTS[:5] and kept["held_out"] == TEXTS[5:]
    for name in ("p.txt", "h.txt"):
        (place / name).unlink()
    assert main(f"train --resume --iterations 2 --quiet --out {tmp_path / 'moved'}".split()) == 0
    assert read_rows(tmp_path / "moved" / "eval.jsonl") == read_rows(place / "run" / "eval.jsonl")
    assert main(["evaluate", str(tmp_path / "moved")]) == 0
    assert "prompts must be the file that the run began with, which is gone" in fails(capsys, "evaluate run")


def test_the_packages_own_prompts_are_copied(place, monkeypatch):
    train()
    kept = json.loads((place / "run" / "prompts.json").read_text())
    assert len(kept["train"]) == 64 and len(kept["held_out"]) == 16
    monkeypatch.setattr(images, "OWN", place / "nowhere")  # another version of the package
    assert main(["evaluate", "run"]) == 0


def test_paths_hold_in_any_directory(place):
    settings = ImagesSettings(
        source="pipe", prompts="p.txt", rewards="0.5*clip@pipe,remote@http://judge:1,clip@open/clip"
    )
    assert settings.source == str(place / "pipe") and settings.prompts == str(place / "p.txt")
    assert settings.rewards == f"0.5*clip@{place / 'pipe'},remote@http://judge:1,clip@open/clip"
    hub = ImagesSettings(source="stabilityai/stable-diffusion-3.5-medium")
    assert hub.source == "stabilityai/stable-diffusion-3.5-medium" and hub.prompts == hub.held_out == ""
    assert ScenesSettings(source="pipe").source == str(place / "pipe") and ScenesSettings().source == ""


def test_the_same_files_may_lie_elsewhere(place, tmp_path, capsys):
    train("--prompts", "p.txt")
    (place / "pipe").rename(tmp_path / "weights")
    (place / "p.txt").rename(tmp_path / "q.txt")
    resume = f"train --resume --iterations 2 --quiet --out run --prompts {tmp_path / 'q.txt'}"
    assert str(place / "pipe") in fails(capsys, resume)
    assert main(f"{resume} --source {tmp_path / 'weights'}".split()) == 0
    assert main(["evaluate", "run"]) == 0
    error = fails(capsys, f"train --resume --iterations 3 --quiet --out run --prompts {place / 'h.txt'}")
    assert "prompts must be the file that the run began with, which changed since" in error


def test_all_runs_of_a_comparison_have_the_same_prompts(place):
    "Those of the first moment, whenever a run begins."
    settings = ImagesSettings(source="pipe", prompts="p.txt", height=16, width=16, max_sequence_length=12)
    first = ImagesTask(settings, place / "study" / "pretrained" / "0", progress=False)
    (place / "p.txt").rename(place / "away.txt")
    tasks = []

    def make_task(folder, seed, progress):
        tasks.append(ImagesTask(settings, folder, progress=False))
        raise InterruptedError

    side = compare.Variant("a", NeighborGRPO(), TrainSettings())
    study = compare.Study((side,), make_task, (0,), dict(iterations=1))
    with pytest.raises(InterruptedError):
        compare.train_run(None, study, "a-seed0", 1.0, place / "study")
    assert tasks[0].texts == first.texts and torch.equal(tasks[0].cond["embeds"], first.cond["embeds"])


# --- what changes under a run ---


def test_prompts_that_changed_are_refused_by_name(place, capsys):
    train("--prompts", "p.txt", "--held_out", "h.txt")
    for name, setting in dict(zip(("p.txt", "h.txt"), images.GIVEN, strict=True)).items():
        before = (place / name).read_text()
        for content in ("two dogs\n", "\n".join([*TEXTS, "a sun"]), None):
            (place / name).unlink() if content is None else (place / name).write_text(content)
            error = fails(capsys, "train --resume --iterations 2 --quiet --out run")
            assert f"{setting} must be the file that the run began with" in error and str(place / name) in error
            assert "prompts.json" in error and "inputs.json" in error
            (place / name).write_text(before)
    assert main("train --resume --iterations 2 --quiet --out run".split()) == 0


def test_the_copy_is_used_where_the_user_says_so(place):
    "As the message advises."
    train("--prompts", "p.txt")
    copy = (place / "run" / "prompts.json").read_bytes()
    (place / "p.txt").write_text("a sun\na moon\n")
    (place / "run" / "inputs.json").unlink()
    for iterations in "23":
        assert main(f"train --resume --iterations {iterations} --quiet --out run".split()) == 0
    assert (place / "run" / "prompts.json").read_bytes() == copy


def test_weights_that_changed_are_refused_by_name(place, tmp_path, capsys):
    train()
    path = place / "pipe" / "transformer" / "diffusion_pytorch_model.safetensors"
    other = {name: value + 0.01 for name, value in load_file(path).items()}
    original, before = path.read_bytes(), path.stat()
    for keep_times in (False, True):
        save_file(other, path, metadata=dict(format="pt"))
        assert path.stat().st_size == before.st_size
        if keep_times:
            os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
        for command in ("train --resume --iterations 2 --quiet --out run", "evaluate run", "save run"):
            error = fails(capsys, command)
            assert f"{place / 'pipe'} with another transformer/diffusion_pytorch_model.safetensors" in error
        path.write_bytes(original)
    assert main("train --resume --iterations 2 --quiet --out run".split()) == 0


def test_known_files_are_not_read_again(place, monkeypatch):
    write_inputs(place / "run", str(place / "pipe"))
    read, real = [], pipelines.checksum
    monkeypatch.setattr(pipelines, "checksum", lambda path: read.append(path.name) or real(path))
    check_source(str(place / "pipe"), read_inputs(place / "run"))
    assert read == []
    (place / "pipe" / "vae" / "config.json").touch()
    check_source(str(place / "pipe"), read_inputs(place / "run"))
    assert read == ["config.json"]


def test_only_files_that_are_opened_count(place):
    with quiet():
        pipelines.open_pipeline(SD3, place / "pipe").save_pretrained(place / "half", variant="fp16")
    shutil.copy(
        place / "half" / "vae" / "diffusion_pytorch_model.fp16.safetensors", place / "pipe" / "vae"
    )  # beside the full one
    (place / "pipe" / "vae" / "diffusion_pytorch_model.bin").write_bytes(b"a pickle")
    found = pipelines.fingerprints(place / "pipe", {})
    assert {"model_index.json", "transformer/diffusion_pytorch_model.safetensors", "tokenizer_3/tokenizer.json"} <= set(
        found
    )
    assert not [name for name in found if "fp16" in name or name.endswith(".bin")]
    assert "vae/diffusion_pytorch_model.fp16.safetensors" in pipelines.fingerprints(place / "half", {})


def test_another_scenes_pipeline_is_refused(tmp_path):
    for source in ("", str(MINIATURE)):
        ScenesTask(ScenesSettings(eval_images=48, source=source), tmp_path / "run", progress=False)
    shutil.copytree(MINIATURE, tmp_path / "pipe")
    (tmp_path / "pipe" / "scheduler" / "scheduler_config.json").open("a").write("\n")
    with pytest.raises(ValueError, match="with another scheduler/scheduler_config.json"):
        ScenesTask(ScenesSettings(eval_images=48, source=str(tmp_path / "pipe")), tmp_path / "run", progress=False)


def test_a_model_of_the_hub_stays_at_its_revision(place, monkeypatch):
    "Whatever the newest one is by then."
    opened, pipeline = [], pipelines.open_pipeline(SD3, place / "pipe")
    cached = place / "hub" / "snapshots" / "c0ffee" / "model_index.json"
    monkeypatch.setattr(pipelines, "try_to_load_from_cache", lambda source, name: str(cached))

    def read(source, dtype, kind, encoders, offline, revision):
        opened.append((source, revision))
        return SD3.pipeline(**pipeline.components)

    monkeypatch.setattr(pipelines, "read_pipeline", read)
    settings = ImagesSettings(source="some/model", height=16, width=16, max_sequence_length=12)
    make = partial(ImagesTask, folder=place / "run", progress=False, family="sd3")
    make(settings)
    make(settings).open()
    assert set(opened[:1]) == {("some/model", None)} and set(opened[1:]) == {("some/model", "c0ffee")}
    other = ImagesSettings(source="some/other", height=16, width=16, max_sequence_length=12)
    with pytest.raises(ValueError, match="source must be some/model, as when the run began"):
        make(other)


def test_damage_is_refused_by_name(place, capsys):
    train("--prompts", "p.txt")
    for path in (place / "run" / "prompts.json", place / "run" / "inputs.json"):
        content = path.read_bytes()
        for damaged in (content[:-9], b"", content.replace(b"a", b"b", 1)):
            path.write_bytes(damaged)
            assert str(path) in fails(capsys, f"evaluate {place / 'run'}")
        path.write_bytes(content)


# --- what is said ---


def test_a_file_that_gives_prompts_to_evaluation_says_so(place, capsys):
    train("--prompts", "p.txt")
    assert "held out" not in capsys.readouterr().err
    settings = dict(source="pipe", prompts="p.txt", height=16, width=16, max_sequence_length=12)
    ImagesTask(ImagesSettings(**settings), place / "new")
    said = [line for line in capsys.readouterr().err.splitlines() if "held out" in line]
    wanted = "5 prompts to train on; its last 1 are held out for evaluation, unless --held_out names a file"
    assert said == [f"{place / 'p.txt'}: {wanted}"]
    ImagesTask(ImagesSettings(**settings), place / "new")
    ImagesTask(ImagesSettings(**settings, held_out="h.txt"), place / "other")
    assert "held out" not in capsys.readouterr().err


def test_equal_runs_side_by_side_leave_equal_documents(place):
    "What a folder says of its run does not depend on its own name."
    for name in ("run", "again"):
        train("--prompts", "p.txt", "--out", name)
    for name in ("config.json", "prompts.json", "inputs.json", "checkpoints/000001/state.json"):
        assert (place / "run" / name).read_bytes() == (place / "again" / name).read_bytes(), name
