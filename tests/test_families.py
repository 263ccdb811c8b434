"""What a family brings beyond its image: adapters, blocks, the reference, saving, prompts on disk, its name."""

import copy
import json

import pytest
import torch
from families import CASES, LENGTH, PROMPTS
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny import tiny_auraflow, tiny_flux, tiny_flux2
from torch import nn

from neighbor_grpo.cli import DEFAULTS, defaults_of, main, read_command
from neighbor_grpo.flow import Shift, time_grid
from neighbor_grpo.models import pipeline as pipelines
from neighbor_grpo.models.pipeline import ADAPTER, Family, count_cut, encode_prompts, open_pipeline, save_policy
from neighbor_grpo.runs.folder import read_rows
from neighbor_grpo.runs.machine import quiet
from neighbor_grpo.runs.pictures import View
from neighbor_grpo.tasks import images
from neighbor_grpo.tasks.images import FAMILIES, ImagesSettings, ImagesTask, collect, family_of, write_encoded

FIRST = [*{case.family.pipeline.__name__: name for name, case in reversed(CASES.items())}.values()]  # of each family
OTHERS = [name for name in FIRST if not name.startswith(("sd3", "flux-"))]  # those have files of their own


def states(case, pipeline):
    "Two states with their times and prompts."
    return case.noise(pipeline, case.sizes[0]), torch.tensor([0.3, 0.8]), case.conditions(pipeline)[0]


@pytest.mark.slow
@pytest.mark.parametrize("name", OTHERS)
def test_adapters_reach_every_block_and_the_reference_is_the_base(name):
    case = CASES[name]
    pipeline = case.make()
    inputs = states(case, pipeline)
    plain = case.policy(copy.copy(pipeline), guidance_scale=case.guided, train_guidance_scale=case.guided)
    with torch.no_grad():
        base = plain(*inputs)
    pipeline.transformer = copy.deepcopy(pipeline.transformer)
    settings = dict(lora_rank=4, guidance_scale=case.guided, train_guidance_scale=case.guided)
    policy = case.policy(pipeline, moved=True, **settings)
    inside = {id(weight) for block in policy.blocks for weight in block.parameters()}
    lists = [part for part in pipeline.transformer.children() if isinstance(part, nn.ModuleList)]
    assert inside == {id(weight) for part in lists for weight in part.parameters()}
    for block in policy.blocks:
        assert sum(ADAPTER in key for key, weight in block.named_parameters() if weight.requires_grad) >= 2
    with torch.no_grad():
        moved, off = policy(*inputs), policy.reference()(*inputs)
    assert (off - base).abs().max() < 1e-4 < 1e-3 < (moved - base).abs().max()


@pytest.mark.slow
@pytest.mark.parametrize("name", OTHERS)
def test_gradient_checkpointing_keeps_the_gradient(name):
    case, found = CASES[name], []
    for again in (False, True):
        pipeline = case.make()
        settings = dict(guidance_scale=case.guided, train_guidance_scale=case.guided, gradient_checkpointing=again)
        policy = case.policy(pipeline, **settings)
        policy(*states(case, pipeline)).square().mean().backward()
        grads = [w.grad for w in policy.parameters() if w.grad is not None]
        found.append(torch.cat([grad.flatten() for grad in grads]))
    assert found[0].norm() > 0 and (found[1] - found[0]).norm() < 1e-4 * found[0].norm()


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 4], ids=["full", "lora"])
@pytest.mark.parametrize("name", OTHERS)
def test_the_plain_pipeline_draws_the_same_with_what_was_saved(name, rank, tmp_path):
    "Alpha is twice the rank, so that the scaled weights of the file are the adapters' to the last bit."
    case = CASES[name]
    with quiet():
        case.make().save_pretrained(tmp_path / "base")
    pipeline = open_pipeline(case.family, tmp_path / "base")
    noise = case.noise(pipeline, case.sizes[0])
    before = case.draw(pipeline, noise, case.guided, case.sizes[0], 2)
    policy = case.policy(pipeline, moved=True, lora_rank=rank)
    save_policy(policy, pipeline, tmp_path / "trained")
    trained = case.draw(pipeline, noise, case.guided, case.sizes[0], 2)
    plain = open_pipeline(case.family, tmp_path / ("base" if rank else "trained"))
    if rank:
        plain.load_lora_weights(tmp_path / "trained")
    assert torch.equal(case.draw(plain, noise, case.guided, case.sizes[0], 2), trained)
    assert (trained - before).abs().max() > 1e-3


def drawn(count):
    "What encoders may say: numbers, a mask, and token numbers."
    generator = torch.Generator().manual_seed(0)
    told = dict(embeds=torch.randn(count, 3, 2, generator=generator), ids=torch.arange(5 * count).view(count, 5))
    return told | dict(mask=torch.rand(count, 3, generator=generator) < 0.5)


def test_any_encoded_prompts_come_back_from_disk(tmp_path):
    "Masks and numbers of tokens keep their type where the rest is rounded."
    told, path = drawn(7), tmp_path / "prompts.safetensors"

    def parts():
        return ({name: value[i : i + 3] for name, value in told.items()} for i in (0, 3, 6))

    write_encoded(path, "key", parts(), 7, torch.bfloat16)
    for found in (load_file(path), collect(parts(), 7, torch.bfloat16)):
        assert found.keys() == told.keys() and torch.equal(found["embeds"], told["embeds"].bfloat16())
        assert torch.equal(found["mask"], told["mask"]) and torch.equal(found["ids"], told["ids"])


@pytest.mark.parametrize("name", [name for name in OTHERS if name.startswith(("flux2", "qwen", "z"))])
def test_prompts_that_are_cut_are_counted_with_what_is_written_around_them(name):
    "So many tokens are the last that fit: from the next on, more tokens change nothing."
    case = CASES[name]
    pipeline = case.make()
    read = case.family.as_read(pipeline, ["a cat"])
    length = len(pipeline.tokenizer(read[0]).input_ids)
    assert not count_cut(pipeline, read, length) and count_cut(pipeline, read, length - 1)
    short, fits, longer = (
        encode_prompts(case.family, pipeline, ["a cat"], n)["embeds"][0] for n in (-1 + length, length, length + 1)
    )
    assert fits.shape == (length, short.shape[1]) and torch.allclose(short, fits[:-1], atol=1e-5)
    assert torch.allclose(longer[:-1], fits, atol=1e-5) and fits[-1].abs().max() > 0.01


def test_a_family_that_returns_no_dict_is_refused():
    class Old(Family):
        def encode(self, pipeline, prompts, max_sequence_length):
            return torch.zeros(1, 2), torch.zeros(1, 2)

    with pytest.raises(ValueError, match="Old.encode must be a method that returns a dict of tensors, got 'tuple'"):
        encode_prompts(Old(), None, ["a cat"], 12)


@pytest.mark.parametrize("steps", [1, 2, 8])
def test_a_terminal_is_where_the_last_step_begins(steps):
    shift = Shift(2.5)
    shift.terminal = 0.02
    ts, plain = time_grid(steps, shift), time_grid(steps, 2.5)
    assert ts[0] == 1 and ts[-1] == 0 and (steps == 1 or abs(ts[-2] - 0.02) < 1e-6)
    assert torch.equal(time_grid(steps, Shift(2.5)), plain) and (ts.diff() < 0).all()
    copied = copy.deepcopy(shift)
    assert copied == 2.5 and copied.terminal == 0.02 and json.dumps(shift) == "2.5"


@pytest.mark.parametrize("name", FIRST)
def test_the_family_is_found_by_the_class_of_the_pipeline(name, tmp_path):
    family = CASES[name].family
    index = {"_class_name": family.pipeline.__name__, "_diffusers_version": "0.41.0"}
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    assert FAMILIES[family_of(str(tmp_path))] is family
    _, (settings, algorithm, _), values = read_command(["images", "--source", str(tmp_path)])
    assert family.settings.items() <= vars(settings).items() and algorithm.shift is None
    assert read_command(["images", "--source", str(tmp_path), "--lora_rank", "5"])[1][0].lora_rank == 5


def test_images_takes_what_the_tasks_of_their_names_take(tmp_path):
    for name in ("sd3", "flux"):
        assert FAMILIES[name].settings.items() <= DEFAULTS[name].items()
        (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": FAMILIES[name].pipeline.__name__}))
        for algorithm in ("neighbor", "flow"):
            assert defaults_of("images", algorithm, str(tmp_path)) == defaults_of(name, algorithm)


def test_a_name_on_the_hub_costs_its_index_alone(monkeypatch, capfd):
    asked = []

    def load_config(source, **options):
        asked.append((source, options["local_files_only"], options["revision"]))
        if options["local_files_only"]:
            raise OSError("not here")
        return {"_class_name": "QwenImagePipeline"}

    monkeypatch.setattr(pipelines.DiffusionPipeline, "load_config", load_config)
    monkeypatch.setattr(pipelines.DiffusionPipeline, "from_pretrained", None)
    assert family_of("Qwen/Qwen-Image", "abc") == "qwen"
    assert asked == [("Qwen/Qwen-Image", True, "abc"), ("Qwen/Qwen-Image", False, "abc")]


def test_an_unknown_class_is_refused_with_the_known_ones(tmp_path):
    with quiet():
        tiny_auraflow().save_pretrained(tmp_path)
    with pytest.raises(ValueError) as error:
        ImagesTask(ImagesSettings(source=str(tmp_path)), progress=False)
    text = str(error.value)
    assert all(family.pipeline.__name__ in text for family in FAMILIES.values())
    assert "Bring your own" in text and text.endswith(f"got '{tmp_path}, a AuraFlowPipeline'")


@pytest.mark.parametrize("make", [lambda: tiny_flux(guidance=False), lambda: tiny_flux2(True)], ids=["flux", "flux2"])
def test_a_distilled_pipeline_is_trained_without_guidance(make, tmp_path, capfd):
    with quiet():
        make().save_pretrained(tmp_path / "base")
    settings = ImagesSettings(
        source=str(tmp_path / "base"), height=16, width=16, max_sequence_length=24, train_prompts=2, eval_images=2,
        guidance_scale=4.0, train_guidance_scale=3.0, device="cpu",
    )  # fmt: skip
    task = ImagesTask(settings, tmp_path / "run", progress=True)
    assert "has no guidance: it is distilled" in capfd.readouterr().err
    assert not task.split_guidance and task.policy.settings.guidance_scale == 1
    ImagesTask(settings, tmp_path / "run", progress=False)
    assert "distilled" not in capfd.readouterr().err
    noise, rows = torch.randn(2, *task.shape), torch.tensor([0, 1])
    calls = []
    task.policy.transformer.register_forward_hook(lambda *call: calls.append(1))
    with torch.no_grad():
        task.policy(noise, torch.tensor([0.2, 0.7]), task.conditions(rows))
    assert calls == [1] and task.policy.blocks


def test_prompts_that_an_older_version_encoded_open(tmp_path, monkeypatch):
    "A file with two tensors, known by the prompts and the empty one: nobody is asked again."
    with quiet():
        CASES["sd3"].make().save_pretrained(tmp_path / "base")
    settings = ImagesSettings(source=str(tmp_path / "base"), height=16, width=16, max_sequence_length=LENGTH)
    family = CASES["sd3"].family
    told = encode_prompts(family, open_pipeline(family, tmp_path / "base"), [*PROMPTS, ""], LENGTH)
    key = images.fingerprint(settings, [*PROMPTS, ""])
    (tmp_path / "run").mkdir()
    save_file(told, tmp_path / "run/prompts.safetensors", {"key": key})
    monkeypatch.setattr(images, "encode_and_drop", None)
    found = images.open_encoded(settings, family, PROMPTS, tmp_path / "run", torch.device("cpu"), False)[1]
    assert all(torch.equal(found[name], told[name]) for name in told)
    with safe_open(tmp_path / "run/prompts.safetensors", "pt") as file:
        assert file.metadata() == {"key": key}


RUN = (
    "--height 16 --width 16 --max_sequence_length 24 --groups 2 --group_size 4 --anchors 2 --steps 4 --trained_steps 2"
)
RUN += " --eval_images 2 --eval_steps 2 --train_prompts 3 --precision float32 --device cpu --lora_rank 4 --quiet"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sd3.5-turbo", "flux-schnell", "flux2-klein", "qwen"])
def test_a_run_of_images_is_trained_resumed_evaluated_sampled_and_saved(name, tmp_path, capsys):
    "By the command, in four steps, and with the guidance that the pipeline has."
    case, out = CASES[name], tmp_path / "run"
    with quiet():
        case.make().save_pretrained(tmp_path / "base")
    words = ["train", "images", "--source", str(tmp_path / "base"), *RUN.split(), "--iterations", "1"]
    words += ["--guidance_scale", str(case.guided), "--train_guidance_scale", str(case.guided)]
    assert main([*words, "--out", str(out)]) == 0
    assert main(["train", "--out", str(out), "--resume", "--iterations", "2", "--quiet"]) == 0
    assert [row["iteration"] for row in read_rows(out / "metrics.jsonl")] == [1, 2]
    assert json.loads((out / "config.json").read_text())["task_name"] == "images"
    for command in ("evaluate", "sample", "save"):
        assert main([command, str(out)]) == 0, capsys.readouterr().err
    plain = open_pipeline(case.family, tmp_path / "base")
    plain.load_lora_weights(next(out.glob("trained-*")))
    pipeline = open_pipeline(case.family, tmp_path / "base")
    noise = case.noise(pipeline, case.sizes[0])
    base, trained = (case.draw(each, noise, case.guided, case.sizes[0], 4) for each in (pipeline, plain))
    assert 0 < (trained - base).abs().max() < 0.1


def test_images_of_other_steps_have_the_times_of_those(monkeypatch):
    "The shift of FLUX.2 knows the steps; an evaluation has its own number, `sample --steps` another."
    asked = []
    velocity = lambda x, t, cond: asked.append(t[0].item()) or x
    task = ImagesTask.__new__(ImagesTask)
    more = dict(prompts=1, held=1, shape=(1, 2, 2), device="cpu", texts=["", ""], shift=5.0)
    vars(task).update(more, settings=ImagesSettings(source="miniature", eval_steps=5))
    monkeypatch.setattr(ImagesTask, "shift_at", lambda self, steps: float(steps))
    monkeypatch.setattr(ImagesTask, "conditions", lambda self, prompts: {})
    monkeypatch.setattr(ImagesTask, "decode", lambda self, latents: latents)
    for view, steps in ((View(), 5), (View(steps=3), 3)):
        asked.clear()
        task.solved(velocity, [0], view)
        assert asked == time_grid(steps, float(steps)).tolist()[:-1]
