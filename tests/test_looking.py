"""What `evaluate` and `sample` say of runs: the same noise for all, intervals over prompts, no option ignored."""

import json
import math
import shlex
import shutil
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from neighbor_grpo import cli
from neighbor_grpo.cli import main, run_names
from neighbor_grpo.flow import randn, seeded
from neighbor_grpo.lab import looking
from neighbor_grpo.lab.compare import interval
from neighbor_grpo.rewards import signs
from neighbor_grpo.runs.folder import read_rows, write_config
from neighbor_grpo.runs.pictures import Seen

SMALL = "--quiet --iterations 2 --groups 2 --group_size 4 --anchors 2 --eval_every 2"
TOY = f"train toy {SMALL} --pretrain_steps 20 --eval_samples 40"
MINI = (
    f"train sd3 {SMALL} --source miniature --height 32 --width 32 --max_sequence_length 16 --precision float32 "
    "--lora_rank 2 --lora_alpha 0 --guidance_scale 1 --train_guidance_scale 1 --eval_images 6 --eval_steps 2 --steps 2 "
    "--trained_steps 1"
)
PROMPTS = "two red circles\na blue square\na green triangle\n"


def said(capsys, line, status=0):
    "What a command prints; where it fails, its one line of error."
    capsys.readouterr()
    assert main(shlex.split(line)) == status
    out, err = capsys.readouterr()
    assert bool(err) == bool(status), err
    return err if status else out


@pytest.fixture(scope="module")
def toys(tmp_path_factory):
    "Two runs from one base."
    place = tmp_path_factory.mktemp("toys")
    for name, rate in (("a", 1e-2), ("b", 2e-2)):
        assert main(f"{TOY} --lr {rate} --out {place / name}".split()) == 0
    return place


# --- statistics ---


def test_intervals_are_over_prompts_and_differences_are_paired():
    values = torch.tensor([1.0, 3.0, 5.0, 9.0, math.nan, math.nan])
    texts = ["one", "one", "two", "two", "three", "three"]
    before, after = (Seen(dict(reward=values + gain), texts) for gain in (0, 0.5))
    found = looking.summary(after, before, ["reward"])["reward"]
    assert (found["mean"], found["half"]) == pytest.approx(interval([2.5, 7.5])) and found["values"] == 2
    assert found["difference"] == pytest.approx(0.5) and found["difference_half"] == pytest.approx(0)
    alone = Seen(dict(reward=values[:4], spread=2.0), [""] * 4)
    found = looking.summary(alone, None, ["reward"])
    assert found["reward"]["half"] == pytest.approx(interval([1, 3, 5, 9])[1]) and math.isnan(found["spread"]["half"])


# --- signs ---


def test_signs_by_their_formulas():
    images = randn((3, 3, 5, 6), seeded(0)).sigmoid().double()
    y = 0.299 * images[:, 0] + 0.587 * images[:, 1] + 0.114 * images[:, 2]
    inner = y[:, 2:, 1:-1] + y[:, :-2, 1:-1] + y[:, 1:-1, 2:] + y[:, 1:-1, :-2] - 4 * y[:, 1:-1, 1:-1]
    assert torch.allclose(signs.sharpness(images), inner.flatten(1).std(1, correction=0))
    spread = images.max(1).values - images.min(1).values
    assert torch.allclose(signs.saturation(images), spread.mean((1, 2)))
    rms = lambda i, j: (images[i] - images[j]).square().mean().sqrt().float()
    apart = signs.diversity(images, ["a", "a", "a"])
    assert torch.allclose(apart[0], (rms(0, 1) + rms(0, 2)) / 2)
    assert signs.diversity(images, ["a", "b", "a"]).isnan().tolist() == [False, True, False]
    v = randn((4, 2, 3, 2), seeded(1))
    assert torch.allclose(signs.velocity_norm(v)[1], v[:, 1].square().mean().sqrt())


def test_signs_warn_only_while_the_reward_rises():
    before, after = dict(reward=0.0, sharpness=1.0, diversity=1.0), dict(reward=1.0, sharpness=1.6, diversity=0.8)
    assert signs.moved(before, after) == {"sharpness": 1.6}
    assert signs.moved(before, after | dict(reward=-1.0)) == {}
    assert signs.moved(dict(reward=0.0), after) == {}, "a row of an earlier version has no signs"


# --- the toy ---


def test_runs_stand_side_by_side_on_the_same_noise(toys, capsys):
    found = json.loads(said(capsys, f"evaluate {toys}/a {toys}/b --json"))["policies"]
    assert [(row["run"] != "", row["iteration"]) for row in found] == [(False, 0), (True, 2), (True, 2)]
    for row, name in zip(found[1:], "ab"):
        last = read_rows(toys / name / "eval.jsonl")[-1]
        for figure, value in row["figures"].items():
            assert value["mean"] == pytest.approx(last[figure], rel=1e-5)
            assert value["difference"] == pytest.approx(value["mean"] - found[0]["figures"][figure]["mean"], abs=1e-6)
    assert found[1]["figures"] != found[2]["figures"]
    other = json.loads(said(capsys, f"evaluate {toys}/a --json --images 30 --steps 3 --seed 5"))["policies"]
    assert other[0]["samples"] == 30 and other[0]["figures"]["reward"]["half"] > 0


@pytest.mark.parametrize(
    "line, option",
    [
        ("evaluate {} --prompts {}", "--prompts"),
        ("evaluate {} --rewards compressibility", "--rewards"),
        ("sample {} --prompt cat", "--prompt"),
        ("sample {} --count 3", "--count"),
        ("sample {} {}", "--out"),
        ("evaluate {} --images 0", "--images"),
        ("evaluate {} --seed -1", "--seed"),
    ],
)
def test_options_that_a_task_lacks_are_refused_by_name(toys, capsys, line, option):
    (toys / "p.txt").write_text("a cat\n")
    second = toys / "p.txt" if "prompts" in line else toys / "b"
    before = sorted(path for path in toys.rglob("*"))
    assert f"neighbor-grpo: {option} must be" in said(capsys, line.format(toys / "a", second), 1).replace(
        f"{option} is needed: ", f"{option} must be "
    )
    assert sorted(path for path in toys.rglob("*")) == before


def test_nothing_is_written_without_out(toys, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shown = said(capsys, f"evaluate {toys}/a --out table.md")
    assert (tmp_path / "table.md").read_text() == shown and said(capsys, f"evaluate {toys}/a") == shown
    assert [path.name for path in tmp_path.iterdir()] == ["table.md"]
    said(capsys, f"sample {toys}/a {toys}/b --out both.png")
    assert Image.open(tmp_path / "both.png").width > 900


# --- the miniature ---


@pytest.mark.slow
def test_ones_own_prompts_and_judges(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "p.txt").write_text(PROMPTS)
    (tmp_path / "q.txt").write_text("a red circle\ntwo red circles\n")
    assert main(f"{MINI} --prompts p.txt --held_out q.txt --judges 2*compressibility --out run".split()) == 0
    last = read_rows(tmp_path / "run" / "eval.jsonl")[-1]
    wanted = {"sharpness", "saturation", "kilobytes", "velocity_norm", "diversity", "compressibility#2"}
    assert wanted < last.keys() and last["kilobytes"] == pytest.approx(-last["reward"])
    found = json.loads(said(capsys, "evaluate run --json"))["policies"]
    for name, value in found[1]["figures"].items():
        assert value["mean"] == pytest.approx(last[name], rel=1e-5), name
    kinds = {name: value["kind"] for name, value in found[0]["figures"].items()}
    assert kinds["reward"] == "trained on" and kinds["sharpness"] == "sign" and kinds["compressibility#2"] == "held out"
    asked = json.loads(said(capsys, "evaluate run --json --prompts p.txt --images 6 --seed 1"))["policies"]
    assert asked[0]["samples"] == 6 and asked[0]["figures"]["sharpness"]["values"] == 3
    # what is held out in the run, asked for as a prompt of one's own: the same images
    same = json.loads(said(capsys, "evaluate run --json --prompts q.txt"))["policies"]
    for name, value in same[1]["figures"].items():
        assert value["mean"] == pytest.approx(found[1]["figures"][name]["mean"], rel=1e-3), name
    said(capsys, "sample run --prompt 'two red circles' --count 2 --out each")
    assert len(list((tmp_path / "each").glob("*.png"))) == 4
    assert Image.open(next((tmp_path / "each").iterdir())).size == (32, 32)
    assert "folder that is new or empty" in said(capsys, "sample run --prompt cat --out each", 1)


@pytest.mark.slow
def test_scenes_show_their_signs_and_take_captions(tmp_path, capsys):
    line = f"train scenes {SMALL} --trained_steps 1 --steps 3 --eval_images 48 --eval_steps 2 --out {tmp_path / 'run'}"
    assert main(line.split()) == 0
    (tmp_path / "p.txt").write_text(PROMPTS)
    found = json.loads(said(capsys, f"evaluate {tmp_path / 'run'} --json --images 6 --prompts {tmp_path / 'p.txt'}"))
    figures = found["policies"][1]["figures"]
    assert figures["graded"]["kind"] == "trained on" and figures["compressibility"]["kind"] == "held out"
    assert {"sharpness", "velocity_norm", "diversity"} < read_rows(tmp_path / "run" / "eval.jsonl")[-1].keys()
    (tmp_path / "p.txt").write_text("a cat\n")
    assert "prompts must be captions of scenes" in said(
        capsys, f"evaluate {tmp_path / 'run'} --prompts {tmp_path / 'p.txt'}", 1
    )


def test_runs_of_one_name_are_told_apart(toys, tmp_path, capsys):
    shutil.copytree(toys / "b", tmp_path / "a")
    folders = [str(toys / "a"), str(tmp_path / "a")]
    assert run_names(folders) == dict(zip(folders, folders)) and run_names(folders[:1]) == {folders[0]: "a"}
    widths = {}
    for count in (1, 2):
        path = tmp_path / f"{count}.png"
        said(capsys, f"sample {' '.join(folders[:count])} --out {path}")
        widths[count] = Image.open(path).width
    assert widths[2] > 1.3 * widths[1], "one base, two runs"


def test_runs_of_several_bases_are_drawn_beside_them(toys, tmp_path, monkeypatch):
    shown = []
    config = json.loads((toys / "b" / "config.json").read_bytes())
    draw = lambda policies, path: shown.append(policies)
    load_run = lambda folder: (SimpleNamespace(base=folder, draw=draw), 0, dict(iteration=2))
    monkeypatch.setattr(cli, "load_run", load_run)
    other = config | dict(training=config["training"] | dict(seed=1))
    for name, known in dict(b=config, c=other).items():
        (tmp_path / name).mkdir()
        write_config(tmp_path / name, {key: value for key, value in known.items() if key != "sha256"})
    b, c = f"{tmp_path}/b", f"{tmp_path}/c"
    cli.draw_runs([b, c], f"{tmp_path}/both.png")
    after = "after 2 iterations"
    assert shown == [{"before": b, f"b {after}": 0, "c, before": c, f"c {after}": 0}]


@pytest.mark.parametrize("count", [0, -4])
def test_a_count_below_one_is_refused_as_it_was_given(toys, count, capsys):
    assert f"--count must be an integer >= 1, got {count}" in said(capsys, f"sample {toys}/a --count {count}", 1)
