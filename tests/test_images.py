"""The task of the large models on tiny pipelines: prompts, devices, every algorithm, saving, recipes."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import diffusers
import pytest
import torch
from helpers import STRAYED, strayed
from test_algorithms import SMALL
from tiny import tiny_flux, tiny_sd3

from neighbor_grpo.cli import main, read_command, read_recipe, recipes
from neighbor_grpo.flow import randn, seeded, time_grid
from neighbor_grpo.models import pipeline as pipelines
from neighbor_grpo.models.pipeline import encode_prompts, open_pipeline
from neighbor_grpo.models.sd3 import SD3
from neighbor_grpo.neighbor import NeighborGRPO
from neighbor_grpo.rivals.catalogue import ALGORITHMS
from neighbor_grpo.rivals.modifiers import Modifier
from neighbor_grpo.runs.folder import Checkpoints, read_rows
from neighbor_grpo.runs.machine import choose_device, quiet
from neighbor_grpo.runs.state import trained_state
from neighbor_grpo.runs.trainer import Trainer
from neighbor_grpo.solvers import solve
from neighbor_grpo.tasks import images
from neighbor_grpo.tasks.images import ImagesSettings, ImagesTask, open_encoded, split_prompts
from neighbor_grpo.tasks.prompts import read_prompts
from neighbor_grpo.training import TrainSettings

PROMPTS = ["a cat", "two dogs", "a red bird", "a tree", "a house"]
PIPELINES = {"sd3": lambda: tiny_sd3(False), "sd35": lambda: tiny_sd3(True), "flux": tiny_flux}
KINDS = pytest.mark.parametrize("rank", [0, 4], ids=["full", "lora"])
EACH = pytest.mark.parametrize("kind", PIPELINES)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    "The pipelines in the layout of the hub, with enough contrast for a reward to see, and a file of prompts."
    folder = tmp_path_factory.mktemp("pipelines")
    for kind, make in PIPELINES.items():
        pipeline = make()
        with torch.no_grad():
            pipeline.vae.decoder.conv_out.weight *= 6
            for name, weight in pipeline.transformer.named_parameters():
                weight *= 5 if name.startswith("proj_out") else 1
        with quiet():
            pipeline.save_pretrained(folder / kind)
    (folder / "prompts.txt").write_text("\n".join(PROMPTS))
    return folder


def settings_of(folder, kind, rank=0, **more):
    size = dict(height=16, width=16, max_sequence_length=12, eval_images=32, eval_steps=4)
    return ImagesSettings(
        **size | dict(source=str(folder / kind), prompts=str(folder / "prompts.txt"), lora_rank=rank) | more
    )


def make(folder, kind, rank=0, out=None, seed=0, **more):
    family = "flux" if kind == "flux" else "sd3"
    return ImagesTask(settings_of(folder, kind, rank, **more), out, seed, False, family)


# --- training ---


# Every algorithm with adapters and without, and with every pipeline: any two of the three meet, as in all 66 triples.
PAIRS = [(kind, (0, 4)[(row + column) % 2], name) for row, name in enumerate(ALGORITHMS)
         for column, kind in enumerate(PIPELINES)]  # fmt: skip


def unshifted(algorithm):
    "It takes the time shift of its task, below all modifiers."
    if isinstance(algorithm, Modifier):
        return replace(algorithm, algorithm=unshifted(algorithm.algorithm))
    return replace(algorithm, shift=None)


@pytest.mark.parametrize(("kind", "rank", "name"), PAIRS)
def test_every_algorithm_trains(folder, kind, rank, name):
    task = make(folder, kind, rank, eval_images=2)
    before = {key: value.clone() for key, value in trained_state(task.policy).items()}
    settings = TrainSettings(iterations=4, groups=1, lr=1e-3, eval_every=4)
    trainer = Trainer(task, unshifted(SMALL[name]), settings).run(progress=False)
    assert [row["iteration"] for row in trainer.rows] == [1, 2, 3, 4] and task.shift == trainer.algorithm.shift
    after = trained_state(task.policy)
    assert all(value.isfinite().all() for value in after.values())
    assert any((after[key] != before[key]).any() for key in before)


@EACH
@KINDS
def test_the_reward_rises(folder, kind, rank):
    "On average over three seeds: a single run is chaotic, and another rounding makes it another run."
    algorithm, gains = NeighborGRPO(group_size=12, steps=4, anchors=2, trained_steps=2, shift=None), []
    for seed in range(3):
        settings = TrainSettings(iterations=20, groups=4, lr=0.1 if rank else 3e-3, eval_every=20, seed=seed)
        first, last = Trainer(make(folder, kind, rank, seed=seed), algorithm, settings).run(progress=False).evals
        gains.append(last["reward"] - first["reward"])
    assert sum(gains) > 0, gains  # 0.015 to 0.06 each


@EACH
def test_adapters_off_are_the_base(folder, kind):
    task = make(folder, kind, 4, guidance_scale=2.0, train_guidance_scale=1.5)
    full = make(folder, kind, 0, guidance_scale=2.0, train_guidance_scale=1.5)
    x, t, cond = randn((4, 4, 8, 8), seeded(0)), torch.tensor([0.1, 0.4, 0.7, 1.0]), task.conditions(torch.arange(4))
    with torch.no_grad():
        for weight in task.policy.parameters():
            weight += 0.1 * torch.randn(weight.shape) * weight.requires_grad
        apart = lambda one, other: (one(x, t, cond) - other(x, t, cond)).abs().max()
        # Layers that are trained and layers that are not take other products of matrices: rounding of velocities.
        rounding = 1e-5 * max(1, full.base(x, t, cond).abs().max())
        assert apart(task.base, full.base) < rounding and apart(task.base, full.policy) < rounding
        assert apart(task.policy, full.policy) > 1e-3
        full.policy.transformer.proj_out.weight.zero_()
        assert apart(task.base, full.base) < rounding, "the base of a full policy is read again"


@EACH
@KINDS
def test_saved_policies_give_the_same_images_in_plain_diffusers(folder, kind, rank, tmp_path):
    task = make(folder, kind, rank)
    with torch.no_grad():
        for weight in task.policy.parameters():
            weight += 0.1 * torch.randn(weight.shape) * weight.requires_grad
    task.save(task.policy, tmp_path / "trained")
    with quiet():
        source = folder / kind if rank else tmp_path / "trained"
        plain = getattr(diffusers, task.family.pipeline.__name__).from_pretrained(source)
        if rank:
            plain.load_lora_weights(tmp_path / "trained")
    plain.set_progress_bar_config(disable=True)
    noise, ts = randn((2, 4, 8, 8), seeded(0)), time_grid(4, task.shift)
    with torch.no_grad():
        ours = task.decode(solve(task.policy, noise, ts, task.conditions(torch.arange(2)), "euler").x[-1])
    tokens = plain._pack_latents(noise, *noise.shape) if kind == "flux" else noise
    sigmas = torch.linspace(1, 0.25, 4).tolist()
    theirs = plain(task.texts[:2], num_inference_steps=4, sigmas=sigmas, latents=tokens, guidance_scale=1.0, height=16,
                   width=16, max_sequence_length=12, output_type="pt").images  # fmt: skip
    assert (ours - theirs).abs().max() < 1e-5
    with torch.no_grad():  # and the network itself is the same to the last bit
        transformer, cond = task.policy.transformer, task.conditions(torch.arange(2))
        task.policy.transformer = plain.transformer
        again = task.decode(solve(task.policy, noise, ts, cond, "euler").x[-1])
        task.policy.transformer = transformer
    assert torch.equal(ours, again)


def test_average_and_resume(folder, tmp_path):
    "A run that was stopped and one that was not: the same weights and figures."
    algorithm = NeighborGRPO(group_size=4, steps=3, anchors=2, trained_steps=2)
    settings = TrainSettings(iterations=4, groups=2, lr=1e-2, kl_weight=0.1, ema=0.5, eval_every=2, checkpoint_every=2)

    def run(out, iterations, resume=False):
        task = make(folder, "sd35", 4, tmp_path / out, eval_images=4)
        return Trainer(task, algorithm, replace(settings, iterations=iterations), tmp_path / out, resume).run(
            progress=False
        )

    whole = run("whole", 4)
    run("parts", 2)
    parts = run("parts", 4, resume=True)
    for key, value in trained_state(whole.velocity).items():
        assert torch.equal(value, trained_state(parts.velocity)[key])
    assert whole.evals == parts.evals


def test_rewards_are_weighted_and_named(folder):
    task = make(folder, "sd3", rewards="compressibility,0.5*compressibility", eval_images=4)
    row = task.evaluate(task.policy)
    assert row["reward"] == pytest.approx(1.5 * row["compressibility"]) and task.reward_weights == [1.0, 0.5]
    samples = randn((2, 4, 8, 8), seeded(0))
    assert task.reward(samples, torch.arange(2)).shape == (2, 2)
    total = make(folder, "sd3", rewards="compressibility,0.5*compressibility", combine="rewards")
    assert total.reward(samples, torch.arange(2)).shape == (2,) and total.reward_weights is None


def test_each_image_has_its_own_noise(folder):
    task = make(folder, "sd3", eval_images=4)
    together, alone = task.sample(task.policy, [0, 3]), task.sample(task.policy, [3])
    assert (together[0][1] - alone[0][0]).abs().max() < 1e-5 and together[1][1] == alone[1][0]
    assert task.images(task.policy, 2).shape == (2, 3, 16, 16)


def test_diversity_is_of_images_of_the_same_prompt(folder):
    task = make(folder, "sd3", held_out=str(folder / "prompts.txt"), prompts="", eval_images=6)
    found, _ = task.sample(task.policy, [0, 5])
    assert task.held == 5 and (found[0] - found[1]).abs().max() > 1e-2, "the same prompt, another noise"
    assert task.evaluate(task.policy)["diversity"] == pytest.approx((found[0] - found[1]).square().mean().sqrt().item())


# --- prompts ---


def test_encoders_are_asked_once_and_leave(folder, tmp_path, monkeypatch):
    settings, cpu = settings_of(folder, "sd3"), torch.device("cpu")
    first, cond = open_encoded(settings, images.SD3, PROMPTS, tmp_path, cpu, progress=False)
    assert first.text_encoder is None and first.tokenizer_3 is None
    exact = encode_prompts(SD3, open_pipeline(SD3, folder / "sd3"), PROMPTS, 12)
    assert all((cond[key][:-1] - exact[key]).abs().max() < 1e-5 for key in exact)
    asked = []
    ask = images.encode_and_drop
    monkeypatch.setattr(images, "encode_and_drop", lambda *a, **k: asked.append(a) or ask(*a, **k))
    second, same = open_encoded(settings, images.SD3, PROMPTS, tmp_path, cpu, progress=False)
    assert not asked and second.text_encoder is None and all(torch.equal(same[key], cond[key]) for key in cond)
    for other in (replace(settings, max_sequence_length=13), replace(settings, precision="bfloat16")):
        open_encoded(other, images.SD3, PROMPTS, tmp_path, cpu, progress=False)
    open_encoded(settings, images.SD3, PROMPTS[1:], tmp_path, cpu, progress=False)
    assert len(asked) == 3


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.txt", "\ufeffa cat\r\n\r\n  two \t dogs\r\na cat\r\n"),
        ("a.json", json.dumps(["a cat", {"prompt": "two dogs", "image_path": ["1.jpg"]}, {"caption": "a cat"}])),
        ("a.jsonl", '{"tag": "x", "include": [{"class": "cat"}], "prompt": "a cat"}\n\n{"prompt": "two dogs"}\n'),
        ("a.csv", 'id,prompt\n1,"a cat"\n2,two dogs\n'),
        ("a.tsv", "caption\tn\na cat\t1\ntwo dogs\t2\n"),
    ],
)
def test_prompt_files(name, text, tmp_path):
    (tmp_path / name).write_text(text, encoding="utf-8", newline="")
    assert read_prompts(tmp_path / name) == ["a cat", "two dogs"]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.txt", "\n \n", "a file with at least one prompt"),
        ("a.json", "{", "prompts must be a .json file"),
        ("a.json", '{"prompt": "a cat"}', "a file with a list"),
        ("a.jsonl", '{"tag": 1}', "under prompt, caption, text"),
        ("a.csv", "name\na cat\n", "under prompt, caption, text"),
        ("a.parquet", "", "a file that ends in"),
    ],
)
def test_prompt_files_that_are_none(name, text, message, tmp_path):
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=message):
        read_prompts(tmp_path / name)


def test_held_out_prompts_are_never_trained(tmp_path):
    for settings in (ImagesSettings(), ImagesSettings(prompts=str(images.OWN / "train.txt"))):
        train, held, _ = split_prompts(settings)
        assert train and held and not set(train) & set(held)
    (tmp_path / "a.txt").write_text("a\nb\nc\n")
    (tmp_path / "b.txt").write_text("b\n")
    both = ImagesSettings(prompts=str(tmp_path / "a.txt"), held_out=str(tmp_path / "b.txt"))
    assert split_prompts(both)[:2] == (["a", "c"], ["b"])
    assert split_prompts(replace(both, train_prompts=1))[:2] == (["a"], ["b"])
    (tmp_path / "c.txt").write_text("b\n")
    for settings in (replace(both, prompts=str(tmp_path / "c.txt")), ImagesSettings(prompts=str(tmp_path / "c.txt"))):
        with pytest.raises(ValueError, match="prompts must be a file"):
            split_prompts(settings)


# --- what is missing ---


def test_a_gpu_that_is_too_small(monkeypatch):
    monkeypatch.setattr(torch, "empty", lambda *a, **k: SimpleNamespace(device=torch.device("cuda", 0)))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (15_900_000_000, 16_000_000_000))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Small 16")
    with pytest.raises(ValueError, match="60 GB of free memory is needed, Small 16 has 15.9: end what else uses it"):
        choose_device("cuda:0", 60)
    assert choose_device("cuda:0", 12).type == "cuda"


@pytest.mark.parametrize(
    ("error", "advice"),
    [
        (pipelines.GatedRepoError, "accept its license at https://huggingface.co/some/model, then run: hf auth login"),
        (pipelines.RepositoryNotFoundError, "none of this name, or it takes a token"),
        (pipelines.LocalEntryNotFoundError, "the hub does not answer; where it does, run: hf download some/model"),
    ],
)
def test_models_that_the_hub_does_not_give(error, advice, monkeypatch):
    def load_config(*arguments, **options):
        try:
            raise error.__new__(error)
        except error as e:
            raise OSError("a long story\nof many lines") from e

    monkeypatch.setattr(diffusers.StableDiffusion3Pipeline, "load_config", load_config)
    with pytest.raises(ValueError, match=advice) as caught:
        open_pipeline(SD3, "some/model")
    assert "\n" not in str(caught.value)


def fails(capsys, *argv):
    "The one line that a command says."
    assert main(list(argv)) == 1
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    return lines[0]


def test_commands_say_what_to_do_and_leave_nothing(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert "a GPU with 60 GB of free memory is needed" in fails(capsys, "train", "--recipe", "sd3.5-medium")
    assert "source is needed: a folder with a StableDiffusion3Pipeline" in fails(capsys, "train", "sd3")
    nowhere = ("train", "--recipe", "sd3.5-medium", "--min_memory", "0", "--rewards", "compressibility")
    assert "source must be" in fails(capsys, *nowhere, "--source", "nowhere at all")
    assert "prompts must be a file" in fails(capsys, *nowhere, "--prompts", "nowhere.txt")
    assert "HPS_v2.1_compressed.pt" in fails(
        capsys, *nowhere[:5], "--rewards", f"hps@{tmp_path}", "--source", str(folder / "sd35")
    )
    assert "a FluxPipeline" in fails(capsys, *nowhere, "--source", str(folder / "flux"))
    assert "--recipe must be" in fails(capsys, "train", "--recipe", "sd4")
    assert list(tmp_path.rglob("*")) in ([], [tmp_path / "runs"]), "folders in which nothing began are given back"


# --- recipes and the command line ---


@pytest.mark.parametrize("name", recipes())
def test_recipes_are_whole(name):
    task, (settings, algorithm, loop), _ = read_command(["--recipe", name])
    recipe = read_recipe(name)
    assert task == recipe["task"] and type(algorithm) is ALGORITHMS[recipe["algorithm"]]
    for key in recipe.keys() - {"task", "algorithm", "with"}:
        found = [part for part in (settings, algorithm, loop) if hasattr(part, key)]
        assert len(found) == 1 and getattr(found[0], key) == recipe[key]


def test_a_recipe_with_another_algorithm_keeps_what_is_not_its_own(tmp_path):
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("task: toy\nalgorithm: neighbor\nsteps: 5\nsigma: 0.4\nmicro_batch: 7\nlr: 0.005\n")
    _, (_, algorithm, loop), _ = read_command(["--recipe", str(recipe), "--algorithm", "dance"])
    assert (algorithm.steps, loop.micro_batch, loop.lr) == (ALGORITHMS["dance"]().steps, 7, 0.005)
    _, (_, algorithm, loop), _ = read_command(["--recipe", str(recipe), "--sigma", "0.2"])
    assert (algorithm.steps, algorithm.sigma, loop.lr) == (5, 0.2, 0.005)
    for wrong, message in (("sigmaa: 1", "names of settings"), ("task: faces", "task among"), ("- 1", "a mapping")):
        recipe.write_text(wrong)
        with pytest.raises(ValueError, match=message):
            read_command(["--recipe", str(recipe)])


def test_train_evaluate_sample_and_resume(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny.yaml").write_text(
        f"task: flux\nsource: {folder / 'flux'}\nprompts: {folder / 'prompts.txt'}\nheight: 16\nwidth: 16\n"
        "max_sequence_length: 12\neval_images: 8\neval_steps: 3\ngroup_size: 4\nsteps: 3\nanchors: 2\n"
        "trained_steps: 2\ngroups: 2\nlora_rank: 2\nlora_alpha: 0\neval_every: 2\ncheckpoint_every: 1\n"
    )
    assert main("train --recipe tiny.yaml --iterations 2 --out run --quiet".split()) == 0
    assert main("train --out run --resume --iterations 3 --quiet".split()) == 0
    assert main("evaluate run".split()) == 0 and main("sample run".split()) == 0
    assert capsys.readouterr().err == ""
    kept = {path.name for path in (tmp_path / "run").iterdir()}
    assert {"prompts.safetensors", "samples.png", "samples-000003.png", "trained", "reward.png"} <= kept
    assert [path.name for path in (tmp_path / "run" / "trained").iterdir()] == ["pytorch_lora_weights.safetensors"]


# --- several processes ---


def launch(cwd, processes, line, **environment):
    "A command in processes of torchrun; what they printed."
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    inherited = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(images.__file__).parents[2])}
    started = [*command, "-m", "neighbor_grpo.cli", *line.split()]
    done = subprocess.run(started, cwd=cwd, env=inherited | environment, capture_output=True, text=True)
    return done.returncode, done.stdout, done.stderr


SHORT = (
    "--height 16 --width 16 --max_sequence_length 12 --eval_images 7 --eval_steps 3 --decode_batch 2 --group_size 4 "
    "--steps 3 --anchors 2 --trained_steps 2 --groups 2 --lora_rank 2 --lora_alpha 0 --precision float32 --eval_every 2"
    " --iterations 3 --guidance_scale 1.5 --train_guidance_scale 1.5 --kl_weight 0.1 --quiet --out run"
)


@pytest.mark.parametrize("split", [False, True], ids=["whole", "split"])
def test_two_processes_of_the_command_equal_one(folder, tmp_path, monkeypatch, split, capsys):
    line = f"train sd3 --source {folder / 'sd35'} --prompts {folder / 'prompts.txt'} {SHORT}"
    fsdp = dict(ACCELERATE_USE_FSDP="true", FSDP_VERSION="2", ACCELERATE_USE_CPU="true") if split else {}
    status, said, errors = launch(tmp_path, 2, line + " --trackers tensorboard", **fsdp)
    assert status == 0, errors
    assert said.count("run folder: run") == 1
    one = tmp_path / "one"
    one.mkdir()
    monkeypatch.chdir(one)
    assert main(line.split()) == 0
    start = trained_state(make(folder, "sd35", 2, lora_alpha=0).policy)
    flat = lambda tensors: torch.cat([tensors[key].flatten() for key in start])
    for name in ("policy", "ema"):
        ours, theirs = (Checkpoints(path / "run" / "checkpoints").load()[0][name] for path in (tmp_path, one))
        assert ours.keys() == theirs.keys() == start.keys()
        assert strayed(flat(ours), flat(theirs), flat(start)) < STRAYED
    ours, theirs = (read_rows(path / "run" / "eval.jsonl") for path in (tmp_path, one))
    assert [row["iteration"] for row in ours] == [0, 2, 3]
    for row, expected in zip(ours, theirs, strict=True):
        assert row == pytest.approx(expected, abs=2e-3)  # a JPEG may turn on a rounding of one pixel
    assert list((tmp_path / "run" / "logs").rglob("events.out.tfevents*"))
    assert (tmp_path / "run" / "trained").exists() != split  # split weights are saved by another command
    monkeypatch.chdir(tmp_path)
    assert main(["save", "run"]) == 0 and (tmp_path / "run" / "trained-000003").is_dir()
    capsys.readouterr()


def test_processes_need_a_folder_that_all_know(tmp_path):
    status, _, errors = launch(tmp_path, 2, "train toy --iterations 1 --quiet")
    assert status != 0 and "--out is needed: a folder that all processes know" in errors
    assert list(tmp_path.iterdir()) == []
