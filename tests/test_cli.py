"""The command line end to end: what it prints, what it leaves, what it says it can do."""

import ast
import dataclasses
import inspect
import json
import re
import shlex
import shutil
import signal
import subprocess
import sys
import typing
from contextlib import suppress

import pytest
import torch

from neighbor_grpo.cli import TASKS, brought_along, defaults_of, main, read_command, settings_of
from neighbor_grpo.rivals.catalogue import ALGORITHMS, BROUGHT_ALONG, own_fields
from neighbor_grpo.runs.folder import Checkpoints, read_rows

TOY = "train toy --quiet --pretrain_steps 60 --eval_samples 100 --iterations 12 --groups 2 --group_size 4 --anchors 2"
PNG = b"\x89PNG"


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    "A short toy run, made by the command line in another process: its folder and what was printed."
    folder = tmp_path_factory.mktemp("cli")
    code = "import sys; from neighbor_grpo.cli import main; sys.exit(main())"
    command = [sys.executable, "-c", code, *TOY.split(), "--ema", "0.5"]
    process = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300)
    assert process.returncode == 0, process.stderr
    assert [path.name for path in folder.iterdir()] == ["runs"]  # nothing is written outside the run folder
    return folder / "runs" / "toy-neighbor-seed0", process


def test_train_leaves_a_complete_run_folder(run_folder):
    folder, process = run_folder
    names = {path.name for path in folder.iterdir()}
    expected = {".lock", "config.json", "metrics.jsonl", "eval.jsonl", "checkpoints", "reward.png", "samples.png"}
    assert names == {*expected, "base.safetensors"}
    assert process.stdout.splitlines()[-1] == "run folder: runs/toy-neighbor-seed0"
    assert [row["iteration"] for row in read_rows(folder / "metrics.jsonl")] == list(range(1, 13))
    assert [row["iteration"] for row in read_rows(folder / "eval.jsonl")] == [0, 10, 12]
    assert Checkpoints(folder / "checkpoints").numbers() == [10, 12]
    assert all((folder / name).read_bytes().startswith(PNG) for name in ("reward.png", "samples.png"))


def test_config_repeats_the_run(run_folder):
    config = json.loads((run_folder[0] / "config.json").read_text())
    assert config["task_name"] == "toy" and config["task"]["pretrain_steps"] == 60
    assert config["algorithm_name"] == "NeighborGRPO" and config["algorithm"]["anchors"] == 2
    assert config["training"]["groups"] == 2 and config["training"]["ema"] == 0.5
    assert set(config["versions"]) == {"neighbor_grpo", "torch", "python"}


def test_train_prints_figures_before_and_after(run_folder):
    folder, process = run_folder
    evals = read_rows(folder / "eval.jsonl")
    header, before, after = process.stdout.splitlines()[-4:-1]
    assert header.split() == ["reward", "share", "spread"]
    for line, name, row in ((before, "before", evals[0]), (after, "after", evals[-1])):
        assert line.split() == [name, *(f"{row[key]:.4g}" for key in header.split())]


def test_evaluate_prints_the_figures_of_the_newest_checkpoint(run_folder, capsys):
    folder, _ = run_folder
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    assert main(["evaluate", str(folder)]) == 0
    header, _, *lines = capsys.readouterr().out.splitlines()
    last = read_rows(folder / "eval.jsonl")[-1]
    assert [word.strip() for word in header.split("|")[3:6]] == ["before", "at 12", "difference"]
    cells = [[word.strip() for word in line.split("|")] for line in lines]
    assert {row[1]: row[4].split()[0] for row in cells} == {
        key: f"{last[key]:.3g}" for key in ("reward", "share", "spread")
    }
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before


def test_sample_draws_into_the_run_folder(run_folder, capsys):
    folder, _ = run_folder
    assert main(["sample", str(folder)]) == 0
    path = folder / "samples-000012.png"
    assert capsys.readouterr().out.strip() == str(path) and path.read_bytes().startswith(PNG)
    path.unlink()


def test_a_second_run_takes_the_next_free_folder(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    short = f"{TOY} --iterations 1 --pretrain_steps 5".split()
    assert [main(short), main(short)] == [0, 0]
    assert sorted(path.name for path in (tmp_path / "runs").iterdir()) == ["toy-neighbor-seed0", "toy-neighbor-seed0-2"]
    assert capsys.readouterr().out.count("run folder: ") == 2


def test_resume_goes_on_to_more_iterations(run_folder, tmp_path, capsys):
    short, out = f"{TOY} --ema 0.5 --out {tmp_path / 'run'}", tmp_path / "run"
    assert main([*short.replace("--iterations 12", "--iterations 10").split()]) == 0
    assert main([*short.split(), "--resume"]) == 0
    timeless = [
        [{k: v for k, v in row.items() if k != "seconds"} for row in read_rows(folder / "metrics.jsonl")]
        for folder in (out, run_folder[0])
    ]
    assert timeless[0] == timeless[1]
    assert read_rows(out / "eval.jsonl") == read_rows(run_folder[0] / "eval.jsonl")


def test_a_taken_folder_is_refused_and_left_alone(run_folder, capsys):
    folder, _ = run_folder
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    assert main([*TOY.split(), "--out", str(folder)]) != 0
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1 and str(folder) in error and "resume" in error
    assert main([*TOY.split(), "--out", str(folder), "--resume", "--lr", "0.5"]) != 0
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1 and all(part in error for part in ("lr", "0.5", "0.001"))
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before


def test_a_recipe_or_preset_beside_resume_is_not_ignored(run_folder, tmp_path, capsys):
    folder, other = run_folder[0], tmp_path / "other.yaml"
    resume = ["train", "--out", str(folder), "--resume", "--quiet"]
    other.write_text("{task: toy, lr: 0.5}")
    for more, parts in (["--recipe", str(other)], ["lr", "0.5", "0.001"]), (["--preset", "paper"], ["--preset"]):
        assert main([*resume, *more]) != 0
        error = capsys.readouterr().err
        assert all(part in error for part in parts)
    own = folder / "config.json"
    assert read_command([*resume[1:], "--recipe", str(own)])[:2] == read_command(resume[1:])[:2]


@pytest.mark.parametrize("algorithm", ["flow", "dance"])
def test_every_algorithm_trains(algorithm, tmp_path, capsys):
    out = tmp_path / algorithm
    line = f"train toy --algorithm {algorithm} --quiet --pretrain_steps 5 --eval_samples 50 --iterations 2 --out {out}"
    assert main(line.split()) == 0
    assert json.loads((out / "config.json").read_text())["algorithm_name"] == ALGORITHMS[algorithm].__name__


def test_bench_prints_a_table(capsys):
    assert main("bench --network toy --iterations 1 --groups 1".split()) == 0
    header, rule, *rows = capsys.readouterr().out.strip().splitlines()
    assert header.startswith("| algorithm |") and set(rule) <= set("|- ")
    cells = [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]
    assert [row[0] for row in cells] == ["NeighborGRPO", "FlowGRPO", "DanceGRPO"]
    assert [row[1] for row in cells] == ["8", "10", "25"] and [row[2] for row in cells] == ["1.33", "9", "14"]
    assert [row[3] for row in cells] == ["12", "37", "67"]  # forward-equivalents
    assert len({len(row) for row in cells}) == 1 and all(float(row[4]) > 0 for row in cells)


PRETRAIN = (
    "pretrain --scenes 64 --vae_steps 2 --decoder_steps 2 --steps 1 --guidance_steps 1 --watch_images 4 --quiet --out"
)


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    "A pipeline of two steps of everything, and what was printed."
    folder = tmp_path_factory.mktemp("pretrain")
    code = "import sys; from neighbor_grpo.cli import main; sys.exit(main())"
    command = [sys.executable, "-c", code, *PRETRAIN.split(), "new/scenes"]
    process = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300)
    assert process.returncode == 0 and process.stderr == "", process.stderr
    assert [path.name for path in folder.iterdir()] == ["new"]
    return folder / "new" / "scenes", process.stdout.splitlines()


def test_pretrain_leaves_a_pipeline_with_its_log_and_model_card(pretrained):
    folder, printed = pretrained
    names = {path.name for path in folder.iterdir()}
    assert {"model_index.json", "transformer", "vae", "tokenizer_3", "log.jsonl", "README.md"} <= names
    first, autoencoder, flow, last = read_rows(folder / "log.jsonl")
    assert first["settings"]["vae_steps"] == 2 and autoencoder["decibel"] > 0 and (flow["step"], last["step"]) == (1, 2)
    header, row, where = printed
    assert header.split() == ["single", "count", "count_unseen", "relation", "relation_unseen"]
    assert row.split() == ["accuracy", *(f"{last[name]:.4g}" for name in header.split())]
    assert where == "pipeline: new/scenes"
    card = (folder / "README.md").read_text()
    assert "| watch_images | 4 |" in card and "| scenes | 64 |" in card


def test_pretrain_refuses_a_folder_with_something_in_it(pretrained, capsys):
    folder, _ = pretrained
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    assert main([*PRETRAIN.split(), str(folder)]) == 1
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1 and str(folder) in error and "new or empty" in error
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before


# --- help ---


def field_docs(settings):
    "The docstring below each field of a dataclass and of those that it inherits from, the nearest first."
    docs = {}
    for cls in reversed([c for c in settings.__mro__ if dataclasses.is_dataclass(c)]):
        body = ast.parse(inspect.getsource(cls)).body[0].body
        for field, doc in zip(body, body[1:], strict=False):
            if isinstance(field, ast.AnnAssign) and isinstance(doc, ast.Expr):
                docs[field.target.id] = ast.literal_eval(doc.value)
    return docs


def solid(text):
    "Without white space, which help breaks lines with."
    return re.sub(r"\s+", "", text)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("task", TASKS)
def test_help_shows_every_setting_with_its_default_and_meaning(task, algorithm, capsys):
    with suppress(SystemExit):
        assert main(["train", task, "--algorithm", algorithm, "--help", "all"]) == 0
    _, *options = re.split(r"^  --", capsys.readouterr().out, flags=re.MULTILINE)
    options = {option.split()[0]: option for option in options}
    defaults = {name: value for own in BROUGHT_ALONG.get(algorithm, {}).values() for name, value in own.items()}
    defaults |= defaults_of(task, algorithm)
    for settings in settings_of(task, algorithm, brought_along(algorithm)).values():
        docs = field_docs(settings)
        for field in own_fields(settings):
            default = defaults.get(field.name, field.default)
            assert solid(docs[field.name]) in solid(options[field.name]), field.name
            line = re.compile(rf"default:\s+{re.escape(str(default))}[\s)]", re.IGNORECASE)
            assert default in ("", None) or line.search(options[field.name] + " "), field.name
            hint = typing.get_type_hints(settings)[field.name]
            choices = typing.get_args(hint) if typing.get_origin(hint) is typing.Literal else ()
            assert all(choice in options[field.name] for choice in choices), field.name


def test_help_of_pretrain_shows_every_setting_with_its_default_and_meaning(capsys):
    from neighbor_grpo.models.miniature import PretrainSettings

    with suppress(SystemExit):
        assert main(["pretrain", "--help"]) == 0
    printed = capsys.readouterr().out
    docs = field_docs(PretrainSettings)
    for field in dataclasses.fields(PretrainSettings):
        assert solid(docs[field.name]) in solid(printed), field.name
        shown = re.search(rf"default:\s+{re.escape(str(field.default))}[\s)]", printed)
        assert field.default == "" or shown, field.name


def test_overview_names_every_command(capsys):
    assert main(["--help"]) == 0
    printed = capsys.readouterr().out
    commands = ("train", "evaluate", "sample", "compare", "bench", "pretrain")
    assert all(re.search(rf"^  {command} .+\.$", printed, re.MULTILINE) for command in commands)


def test_no_command_is_not_success(capsys):
    assert main([]) != 0
    assert "usage" in "".join(capsys.readouterr())


# --- what goes wrong on the way ---


def test_interrupted_by_hand(tmp_path, monkeypatch, capsys):
    def interrupt(trainer, *arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr("neighbor_grpo.runs.trainer.Trainer.run", interrupt)
    assert main([*TOY.split(), "--out", str(tmp_path / "my run")]) == 130
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1
    again = shlex.split(error.partition("go on with: ")[2])
    assert again == ["neighbor-grpo", "train", "--out", str(tmp_path / "my run"), "--resume"]


def test_a_failing_reward_ends_in_one_line(tmp_path, monkeypatch, capsys):
    def fail(task, samples, prompts=None):
        raise ConnectionError("the reward server\nis gone")

    monkeypatch.setattr("neighbor_grpo.tasks.toy2d.ToyTask.reward", fail)
    assert main([*TOY.split(), "--out", str(tmp_path / "run")]) == 1
    assert capsys.readouterr().err == "neighbor-grpo: ConnectionError: the reward server is gone\n"


def test_a_damaged_checkpoint_ends_in_one_line(run_folder, tmp_path, capsys):
    shutil.copytree(run_folder[0], tmp_path / "run")
    (tmp_path / "run" / "checkpoints" / "000012" / "policy.safetensors").write_bytes(b"nothing")
    for command in (
        ["evaluate", str(tmp_path / "run")],
        [*TOY.split(), "--ema", "0.5", "--resume", "--out", str(tmp_path / "run")],
    ):
        assert main(command) == 1
        error = capsys.readouterr().err
        assert len(error.splitlines()) == 1 and "000012" in error


def test_serve_answers_until_it_is_stopped(tmp_path):
    from neighbor_grpo.rewards.programs import Compressibility
    from neighbor_grpo.rewards.remote import RemoteReward

    code = "import sys; from neighbor_grpo.cli import main; sys.exit(main())"
    command = [sys.executable, "-c", code, *"serve --rewards compressibility,0.5*compressibility --port 0".split()]
    process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        url = process.stdout.readline().split()[-1]
        pictures = torch.rand(3, 3, 16, 20, generator=torch.Generator().manual_seed(0))
        answer = RemoteReward(url, patience=30)(pictures, ["a", "b", "c"])
        assert torch.allclose(answer, 1.5 * Compressibility()(pictures, ["a", "b", "c"]))
    finally:
        process.terminate()
        status = process.wait(30)
    assert status == 128 + signal.SIGTERM and list(tmp_path.iterdir()) == []
