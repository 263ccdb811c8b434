"""A file outside the package adds an algorithm, a modifier, a task, a reward, a family; its runs are like any other."""

import json
import pickle
import subprocess
import sys
import time
from importlib.metadata import EntryPoint
from unittest.mock import patch

import pytest
import torch
from diffusers import AuraFlowPipeline
from tiny import tiny_auraflow

from neighbor_grpo.cli import TASKS, Entry, main, read_command
from neighbor_grpo.models.pipeline import PipelinePolicy, PipelineSettings, decode, encode_prompts
from neighbor_grpo.rewards.judges import REWARDS
from neighbor_grpo.rivals.catalogue import ALGORITHMS, MODIFIERS
from neighbor_grpo.runs import plugins
from neighbor_grpo.runs.folder import Checkpoints, read_rows
from neighbor_grpo.runs.machine import quiet
from neighbor_grpo.solvers import solve
from neighbor_grpo.tasks.images import FAMILIES
from neighbor_grpo.tasks.toy2d import ToySettings, ToyTask

PLUGIN = """
from dataclasses import dataclass

import torch
from torch import nn

from neighbor_grpo.cli import TASKS, Entry
from neighbor_grpo.neighbor import NeighborGRPO
from neighbor_grpo.rewards.judges import REWARDS, make_rewards
from neighbor_grpo.rewards.programs import Reward
from neighbor_grpo.rivals.catalogue import ALGORITHMS
from neighbor_grpo.toyflows import VelocityMLP
from neighbor_grpo.training import Task


@dataclass(frozen=True)
class Stepped(NeighborGRPO):
    "Sees rewards in steps."
    levels: int = 4
    "Steps between 0 and 1."

    def advantages(self, rewards, *more):
        return super().advantages((rewards * self.levels).round(), *more)


class Redness(Reward):
    "How much more red than blue an image has, where it has most."
    def score(self, pictures, prompts):
        most = [[channel.getextrema()[1] for channel in picture.split()] for picture in pictures]
        red, _, blue = torch.tensor(most).T
        return (red - blue) / 255


class Flat(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = VelocityMLP(12, 16, 1)

    def forward(self, x, t, cond=None):
        return self.inner(x.flatten(1), t, None).view_as(x)


@dataclass(frozen=True)
class PatchSettings:
    "Patches of two by two pixels."
    rewards: str = "redness"
    "Names of rewards."


class PatchTask(Task):
    "Noise that learns to be red."
    shape, prompts = (3, 2, 2), 1

    def __init__(self, settings, folder=None, seed=0, progress=True):
        torch.manual_seed(seed)
        self.policy, self.base = Flat(), Flat()
        self.judges = make_rewards(settings.rewards)[0]

    def conditions(self, prompts):
        return None

    def reward(self, samples, prompts):
        return sum(judge(samples.sigmoid(), [""] * len(samples)) for judge in self.judges)

    def evaluate(self, velocity):
        return dict(reward=float(next(velocity.parameters()).detach().mean()))


ALGORITHMS["stepped"] = Stepped
TASKS["patch"] = Entry(PatchTask, PatchSettings, "patches that become red; seconds on a CPU")
REWARDS["redness"] = Redness
"""
FAMILY = """
from diffusers import AuraFlowPipeline

from neighbor_grpo.models.pipeline import Family
from neighbor_grpo.tasks.images import FAMILIES


class AuraFlow(Family):
    "One text encoder, and nothing for the whole prompt."
    pipeline, guidance = AuraFlowPipeline, "classifier_free"
    blocks = ("joint_transformer_blocks", "single_transformer_blocks")

    def encode(self, pipeline, prompts, max_sequence_length):
        embeds, *_ = pipeline.encode_prompt(
            prompts, do_classifier_free_guidance=False, device=pipeline.text_encoder.device,
            max_sequence_length=max_sequence_length)
        return dict(embeds=embeds)

    def latent_shape(self, pipeline, height, width):
        scale = pipeline.vae_scale_factor
        return pipeline.transformer.config.in_channels, height // scale, width // scale

    def velocity(self, transformer, x, t, cond, scale):
        return transformer(x, cond["embeds"], t, return_dict=False)[0]


FAMILIES["mine"] = AuraFlow()
"""
LIGHT = """
from dataclasses import dataclass

from neighbor_grpo.rivals.catalogue import ALGORITHMS, MODIFIERS
from neighbor_grpo.rivals.gaussian import FlowGRPO
from neighbor_grpo.rivals.modifiers import Modifier


@dataclass(frozen=True)
class Louder(FlowGRPO):
    "Flow-GRPO with more noise."
    noise_level: float = 0.9


@dataclass(frozen=True)
class Clipped(Modifier):
    "Advantages have a limit."
    limit: float = 2.0
    "The limit, > 0."

    def advantages(self, rewards, *more):
        return self.algorithm.advantages(rewards, *more).clamp(-self.limit, self.limit)


ALGORITHMS["louder"] = Louder
MODIFIERS["clipped"] = Clipped
"""
SMALL = "--group_size 4 --steps 4 --trained_steps 2 --anchors 2 --groups 2 --quiet".split()


TOY = ["train", "toy", "--algorithm", "louder", "--pretrain_steps", "2", "--eval_samples", "9", "--iterations", "2"]
TOY += ["--group_size", "4", "--groups", "2", "--quiet"]


@pytest.fixture
def mine(tmp_path):
    "A plugin, outside the package."
    path = tmp_path / "mine.py"
    path.write_text(LIGHT)
    return path


@pytest.fixture(autouse=True)
def forgotten():
    "What a plugin adds to this process is gone after each test."
    known = (TASKS, ALGORITHMS, MODIFIERS, REWARDS, FAMILIES, plugins.LOADED, plugins.GIVEN)
    patches = [patch.dict(entries) for entries in known]
    for each in patches:
        each.start()
    yield
    for each in patches:
        each.stop()
    forget()


def forget():
    "As a new process, which has imported no plugin."
    plugins.LOADED.clear()
    for names in (ALGORITHMS, MODIFIERS):
        for name in [name for name, kind in names.items() if kind.__module__.startswith("neighbor_grpo_plugin_")]:
            del names[name]
    for name in [name for name in sys.modules if name.startswith("neighbor_grpo_plugin_")]:
        del sys.modules[name]


def shell(*words, wait=True):
    "A command, in a process of its own."
    command = [sys.executable, "-m", "neighbor_grpo.cli", *map(str, words)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    if not wait:
        return process
    out, errors = process.communicate()
    assert process.returncode == 0, errors
    return out


def said(words, capsys):
    "The one line of a command that fails."
    capsys.readouterr()
    assert main([*map(str, words)]) == 1
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    return lines[0]


@pytest.mark.parametrize("task", ["patch", pytest.param("images", marks=pytest.mark.slow)])
def test_a_run_of_a_plugin_is_trained_killed_resumed_and_evaluated(task, tmp_path):
    plugin, out, more, rewards = tmp_path / "whole.py", tmp_path / "run", [], "redness"
    plugin.write_text(PLUGIN + FAMILY * (task == "images"))
    if task == "images":
        with quiet():
            tiny_auraflow().save_pretrained(tmp_path / "auraflow")
        rewards = "2*redness,compressibility"
        more = f"--source {tmp_path}/auraflow --rewards {rewards} --height 16 --width 16 --lora_rank 4".split()
        more += "--guidance_scale 2 --train_prompts 4 --max_sequence_length 12 --eval_images 4 --eval_steps 2".split()
    words = ["train", task, "--algorithm", "stepped", "--levels", 3, *SMALL, *more, "--out", out, "--plugin", plugin]
    process = shell(*words, "--iterations", 100_000, "--checkpoint_every", 2, wait=False)
    checkpoints = Checkpoints(out / "checkpoints")
    while len(checkpoints.numbers()) < 2 and process.poll() is None:
        time.sleep(0.02)
    process.kill()
    assert process.wait() not in (0, 1), process.stderr.read()  # it was killed
    last = checkpoints.numbers()[-1]
    shell("train", "--out", out, "--resume", "--iterations", last + 3, "--plugin", plugin)
    assert [row["iteration"] for row in read_rows(out / "metrics.jsonl")] == [*range(1, last + 4)]
    table = shell("evaluate", out, f"--plugin={plugin}").splitlines()
    assert f"at {last + 3}" in table[0] and table[2].split()[1] == "reward"
    assert ("redness" in "".join(table).split()) == (task == "images")
    config = json.loads((out / "config.json").read_text())
    assert [config[name] for name in ("task_name", "algorithm_name")] == [task, "Stepped"]
    assert config["algorithm"]["levels"] == 3 and config["task"]["rewards"] == rewards
    assert [*config["plugins"]] == ["whole.py"] and str(tmp_path) not in json.dumps(config["plugins"])
    if task == "images":  # of a kind that only the plugin knows
        shell("save", out, "--out", tmp_path / "saved", "--plugin", plugin)
        with quiet():
            plain = AuraFlowPipeline.from_pretrained(tmp_path / "auraflow")
            plain.load_lora_weights(tmp_path / "saved")
        assert any(weight.abs().max() > 0 for name, weight in plain.transformer.named_parameters() if "lora_B" in name)


@pytest.mark.parametrize("scale", [1.0, 9.0])
def test_a_family_of_a_plugin_samples_as_diffusers_does(scale, tmp_path):
    "The whole way from texts to an image, with guidance and without."
    (tmp_path / "family.py").write_text(PLUGIN + FAMILY)
    plugins.load_plugin(tmp_path / "family.py")
    pipeline, family, texts = tiny_auraflow(), FAMILIES["mine"], ["a cat", "two dogs"]
    told, empty = (encode_prompts(family, pipeline, some, 12) for some in (texts, [""]))
    noise = torch.randn(2, *family.latent_shape(pipeline, 16, 16))
    with quiet():
        sizes = dict(height=16, width=16, max_sequence_length=12, num_inference_steps=4)
        wanted = pipeline(texts, latents=noise, guidance_scale=scale, output_type="pt", **sizes).images
    policy = PipelinePolicy(family, pipeline.transformer, PipelineSettings(guidance_scale=scale), empty)
    ts = pipeline.scheduler.sigmas  # of the call: the scheduler's own grid
    with torch.no_grad():
        found = decode(pipeline, solve(policy, noise, ts, told, "euler").x[-1])
    assert wanted.std() > 0.01 and torch.allclose(found, wanted, atol=1e-5)


def test_a_run_needs_its_plugins_again(mine, tmp_path, capsys):
    out = tmp_path / "run"
    assert main([*TOY, "--with", "clipped", "--limit", "1.5", "--out", str(out), "--plugin", str(mine)]) == 0
    assert json.loads((out / "config.json").read_text())["modifiers"] == {"clipped": {"limit": 1.5}}
    commands = [["evaluate", out], ["sample", out], ["save", out], ["train", "--out", out, "--resume"]]
    commands += [["train", "--recipe", out / "config.json", "--out", tmp_path / "other"]]
    for command in commands:
        text = said(command, capsys)
        assert "used with --plugin mine.py: a run folder names its plugins, and never runs them itself" in text
    assert main(["evaluate", str(out), "--plugin", str(mine)]) == 0
    assert main(["train", "--out", str(out), "--resume", "--quiet", "--plugin", str(mine)]) == 0


def test_a_plugin_that_changed_is_refused(mine, tmp_path, capsys):
    out = tmp_path / "run"
    assert main([*TOY, "--out", str(out), "--plugin", str(mine)]) == 0
    mine.write_text(LIGHT + "# changed")
    forget()
    for command in (["evaluate", out], ["train", "--out", out, "--resume"]):
        text = said([*command, "--plugin", mine], capsys)
        assert "its content has changed" in text and "mine.py" in text


def test_a_run_folder_runs_nothing(mine, tmp_path, capsys):
    "Not even a file of the right name and content that lies in it."
    out, ran = tmp_path / "run", tmp_path / "ran"
    mine.write_text(LIGHT + f"\nopen({str(ran)!r}, 'a').write('once ')\n")
    assert main([*TOY, "--out", str(out), "--plugin", str(mine)]) == 0
    mine.rename(out / "mine.py")
    forget()
    said(["evaluate", out], capsys)
    assert ran.read_text() == "once "


def test_what_was_made_without_a_plugin_takes_one(mine, tmp_path):
    plain = [word if word != "louder" else "flow" for word in TOY]
    assert main([*plain, "--out", str(tmp_path / "run")]) == 0
    assert "plugins" not in json.loads((tmp_path / "run/config.json").read_text())
    assert main(["train", "--out", str(tmp_path / "run"), "--resume", "--quiet", "--plugin", str(mine)]) == 0


def test_a_comparison_of_a_plugin(mine, tmp_path, capsys):
    "Its runs are processes of their own, which do not have the plugin yet."
    out = tmp_path / "study"
    common = "--groups 2 --group_size 4 --steps 4 --trained_steps 2 --pretrain_steps 2 --eval_samples 9"
    words = ["compare", "toy", "--variants", "louder", "flow", "--seeds", "0", "--iterations", "2", "--common", common]
    assert main([*words, "--jobs", "1", "--quiet", "--out", str(out), "--plugin", str(mine)]) == 0
    assert "louder" in (out / "table.md").read_text()
    assert "used with --plugin mine.py" in said(["compare", "--out", out], capsys)


WRONG = {
    "nothing.py": (None, "--plugin must be a Python file"),
    "text.txt": ("", "--plugin must be a Python file"),
    "broken.py": ("1 / 0", "broken.py cannot be imported: ZeroDivisionError: division by zero"),
    "odd.py": ("def", "odd.py cannot be imported: SyntaxError"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_files(name, tmp_path, capsys):
    content, message = WRONG[name]
    if content is not None:
        (tmp_path / name).write_text(content)
    text = said(["train", "toy", "--out", tmp_path / "run", "--plugin", tmp_path / name], capsys)
    assert message in text and name in text
    assert not (tmp_path / "run").exists()
    assert "must be a Python file" in said(["evaluate", tmp_path, "--plugin"], capsys)


def test_a_plugin_is_imported_once_and_travels(mine, tmp_path):
    ran = tmp_path / "ran"
    mine.write_text(LIGHT + f"\nopen({str(ran)!r}, 'a').write('once ')\n")
    plugins.give_plugins([mine, mine])
    plugins.give_plugins([mine])
    assert pickle.loads(pickle.dumps(plugins.GIVEN["mine.py"])) is plugins.LOADED["mine.py"]
    assert ran.read_text() == "once "
    _, (_, algorithm, _), _ = read_command("toy --algorithm louder --with clipped".split())
    assert type(algorithm.algorithm).__module__ == "neighbor_grpo_plugin_mine"
    (tmp_path / "more").mkdir()
    (tmp_path / "more/mine.py").write_text("")
    with pytest.raises(ValueError, match="loaded already"):
        plugins.give_plugins([tmp_path / "more/mine.py"])


def test_a_task_is_a_class_or_its_place():
    TASKS["again"] = Entry(ToyTask, ToySettings, "the toy by another name")
    name, (task, _, settings), _ = read_command(["again", "--target", "3"])
    assert (name, type(task), task.target, settings.iterations) == ("again", ToySettings, 3, 100)


def test_an_installed_package_needs_no_option(monkeypatch):
    (point,) = [EntryPoint("mine", "json.decoder", "neighbor_grpo.plugins")]
    asked = []
    monkeypatch.setattr(plugins, "entry_points", lambda group: asked.append(group) or [point])
    assert plugins.load_installed.__wrapped__() == ["mine"] and asked == ["neighbor_grpo.plugins"]
    monkeypatch.setattr(plugins, "entry_points", lambda group: [EntryPoint("mine", "no.such.module", group)])
    with pytest.raises(ValueError, match=r"plugin mine \(no.such.module\) cannot be imported: ModuleNotFoundError"):
        plugins.load_installed.__wrapped__()
