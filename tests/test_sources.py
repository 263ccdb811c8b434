"""Where a pipeline comes from: folders as people have them open, the rest is refused by name, nothing foreign runs."""

import json
import shutil
import sys
import tracemalloc
import weakref
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import diffusers
import pytest
import torch
from safetensors.torch import load_file
from tiny import tiny_flux, tiny_sana, tiny_sd3, tiny_wan
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from torch.utils.weak import WeakIdKeyDictionary

from neighbor_grpo.cli import main
from neighbor_grpo.models import pipeline as pipelines
from neighbor_grpo.models.flux import FLUX
from neighbor_grpo.models.pipeline import count_cut, encode_prompts, open_pipeline, save_policy
from neighbor_grpo.models.sana import SANA
from neighbor_grpo.models.sd3 import SD3
from neighbor_grpo.models.wan import WAN
from neighbor_grpo.runs.machine import quiet
from neighbor_grpo.tasks import images
from neighbor_grpo.tasks.images import ImagesSettings, ImagesTask, encode_and_drop, open_encoded

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    "Tiny pipelines in the layout of the hub."
    folder = tmp_path_factory.mktemp("sources")
    with quiet():
        tiny_sd3().save_pretrained(folder / "sd3")
        tiny_flux().save_pretrained(folder / "flux")
    return folder


def edited(saved, folder, change):
    "A copy of the SD3 pipeline, changed."
    shutil.copytree(saved / "sd3", folder / "copy")
    change(folder / "copy")
    return folder / "copy"


def index(folder, **parts):
    "Change model_index.json."
    path = folder / "model_index.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | parts))


# --- folders as people have them ---


@pytest.mark.parametrize("kind", ["sd3", "flux"])
@pytest.mark.parametrize("variant", ["fp16", "bf16"])
def test_a_folder_with_one_precision_opens(saved, tmp_path, kind, variant, capfd):
    family = dict(sd3=SD3, flux=FLUX)[kind]
    whole = open_pipeline(family, saved / kind)
    with quiet():
        whole.save_pretrained(tmp_path / "half", variant=variant)
    assert not list((tmp_path / "half").glob("*/model.safetensors"))
    capfd.readouterr()
    half = open_pipeline(family, tmp_path / "half")
    for name, weight in whole.transformer.state_dict().items():
        assert torch.equal(half.transformer.state_dict()[name], weight)
    assert capfd.readouterr() == ("", "")


def test_where_both_precisions_lie_the_full_one_opens(saved, tmp_path):
    def add_half(folder):
        with quiet():
            open_pipeline(SD3, saved / "sd3").save_pretrained(folder, variant="fp16")
        half = folder / "transformer" / "diffusion_pytorch_model.fp16.safetensors"
        shutil.copy(folder / "vae" / "diffusion_pytorch_model.safetensors", half)  # would not fit

    folder = edited(saved, tmp_path, add_half)
    assert pipelines.variant_in(folder, ["transformer", "vae", "text_encoder"]) is None
    open_pipeline(SD3, folder)
    (folder / "vae" / "diffusion_pytorch_model.safetensors").unlink()
    assert pipelines.variant_in(folder, ["transformer", "vae", "text_encoder"]) == "fp16"


@pytest.mark.parametrize(
    ("name", "variant"),
    [
        ("model.safetensors", None),
        ("model.fp16.safetensors", "fp16"),
        ("diffusion_pytorch_model-00001-of-00002.safetensors", None),
        ("diffusion_pytorch_model.fp16-00001-of-00002.safetensors", "fp16"),
        ("diffusion_pytorch_model-00001-of-00002.fp16.safetensors", "fp16"),
    ],
)
def test_names_of_weight_files(name, variant):
    assert pipelines.WEIGHTS.fullmatch(name)[1] == variant


def without_t5(saved, folder):
    "As plain diffusers saves it."
    with quiet():
        pipeline = diffusers.StableDiffusion3Pipeline.from_pretrained(
            saved / "sd3", text_encoder_3=None, tokenizer_3=None
        )
        pipeline.save_pretrained(folder / "no-t5")
    return folder / "no-t5"


def test_sd3_without_t5_is_encoded_as_diffusers_does_it(saved, tmp_path):
    source = without_t5(saved, tmp_path)
    with quiet():
        plain = diffusers.StableDiffusion3Pipeline.from_pretrained(source, text_encoder_3=None, tokenizer_3=None)
        wanted = plain.encode_prompt(["a cat"], None, None, do_classifier_free_guidance=False, max_sequence_length=12)
    told = encode_prompts(SD3, open_pipeline(SD3, source), ["a cat"], 12)
    assert torch.equal(told["embeds"], wanted[0]) and torch.equal(told["pooled"], wanted[2])
    assert not told["embeds"][:, 16:].any() and told["embeds"][:, :16].any()
    settings = ImagesSettings(source=str(source), height=16, width=16, max_sequence_length=12)
    with_file = open_encoded(settings, SD3, ["a cat"], tmp_path / "run", CPU, progress=False)[1]
    assert (with_file["embeds"][:1] - told["embeds"]).abs().max() < 1e-5


@pytest.mark.parametrize("make, family", [(tiny_sd3, SD3), (tiny_sana, SANA), (tiny_wan, WAN)])
def test_a_tokenizer_without_files_is_refused(make, family, tmp_path):
    "transformers would make an almost empty one."
    with quiet():
        make().save_pretrained(tmp_path)
    for file in (tmp_path / "tokenizer").iterdir():
        if file.name != "tokenizer_config.json":
            file.unlink()
    with pytest.raises(ValueError, match="source must be a folder with a"):
        open_pipeline(family, tmp_path)


def test_sd3_without_t5_trains_saves_and_opens(saved, tmp_path, capfd):
    source = without_t5(saved, tmp_path)
    capfd.readouterr()
    tiny = (
        "--height 16 --width 16 --max_sequence_length 12 --groups 2 --group_size 4 --anchors 2 --steps 2 --iterations 1"
    )
    tiny += " --trained_steps 1 --eval_images 2 --eval_steps 2 --precision float32 --quiet --device cpu --lora_rank 0"
    command = [
        "train",
        "sd3",
        "--source",
        str(source),
        *tiny.split(),
        "--lora_alpha",
        "0",
        "--out",
        str(tmp_path / "run"),
    ]
    assert main(command) == 0
    assert capfd.readouterr().err == f"{source} has no T5 encoder: CLIP alone reads the prompts\n"
    assert open_pipeline(SD3, tmp_path / "run" / "trained").text_encoder_3 is None


def test_prompts_are_looked_at_where_there_is_no_t5(saved, tmp_path):
    settings = ImagesSettings(
        source=str(without_t5(saved, tmp_path)),
        height=16,
        width=16,
        max_sequence_length=12,
        device="cpu",
        precision="float32",
        eval_images=2,
        eval_steps=2,
        rewards="compressibility",
    )
    task = ImagesTask(settings, progress=False)
    task.ask({"a cat": {}})
    assert task.look(task.policy).prompts == ["a cat", "a cat"]


def test_what_the_encoders_of_another_pipeline_said_is_not_kept(saved, tmp_path):
    "inputs.json knows which pipeline it was; who goes on with another one deletes it, as the message says."
    settings = ImagesSettings(
        source=str(saved / "sd3"),
        height=16,
        width=16,
        max_sequence_length=12,
        device="cpu",
        precision="float32",
        rewards="compressibility",
    )
    first = ImagesTask(settings, tmp_path / "run", progress=False).cond["embeds"]
    with quiet():
        tiny_sd3(seed=1).save_pretrained(tmp_path / "other")
    other = replace(settings, source=str(tmp_path / "other"))
    with pytest.raises(ValueError, match="delete inputs.json"):
        ImagesTask(other, tmp_path / "run", progress=False)
    (tmp_path / "run" / "inputs.json").unlink()
    second = ImagesTask(other, tmp_path / "run", progress=False).cond["embeds"]
    assert not torch.equal(first, second)


# --- what is refused ---


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda folder: index(folder, scheduler=["plainmod", "Evil"]), r"scheduler from \['plainmod', 'Evil'\]"),
        (lambda folder: index(folder, vae=["os", "system"]), r"vae from \['os', 'system'\]"),
        (lambda folder: index(folder, vae=[None, None]), "without vae, got|must be a whole"),
        (lambda folder: index(folder, text_encoder_2=[None, None]), "without text_encoder_2"),
        (lambda folder: index(folder, vae=["diffusers", "NoSuchThing"]), "NoSuchThing"),
        (lambda folder: (folder / "vae" / "diffusion_pytorch_model.safetensors").unlink(), "vae"),
        (lambda folder: (folder / "transformer" / "diffusion_pytorch_model.safetensors").write_bytes(b"no"), "source"),
    ],
)
def test_what_is_no_pipeline_is_refused_by_name(saved, tmp_path, change, message):
    folder = edited(saved, tmp_path, change)
    with pytest.raises(ValueError, match=message) as caught:
        open_pipeline(SD3, folder)
    assert str(folder) in str(caught.value)


def test_a_foreign_module_is_not_imported(saved, tmp_path, monkeypatch):
    (tmp_path / "plainmod.py").write_text("class Evil: pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    folder = edited(saved, tmp_path, lambda folder: index(folder, scheduler=["plainmod", "Evil"]))
    with pytest.raises(ValueError, match="diffusers and transformers alone"):
        open_pipeline(SD3, folder)
    assert "plainmod" not in sys.modules


@pytest.mark.parametrize("kind", [SD3, FLUX], ids=["sd3", "flux"])
def test_a_single_file_is_refused_with_a_way_out(saved, tmp_path, monkeypatch, kind):
    monkeypatch.chdir(tmp_path)
    Path("models").mkdir()
    shutil.copy(saved / "sd3" / "vae" / "diffusion_pytorch_model.safetensors", "models/sd3.safetensors")
    with pytest.raises(ValueError, match=rf"{kind.pipeline.__name__}.from_single_file\('models/sd3.safetensors'\)"):
        open_pipeline(kind, "models/sd3.safetensors")


@pytest.mark.parametrize("source", ["runs/trainde", "models/sd3", "./sd3", "../sd3", "a/b/c", "models/sd3.safetensors"])
def test_a_mistyped_path_never_asks_the_hub(source, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for method in ("load_config", "from_pretrained", "download"):
        monkeypatch.setattr(diffusers.StableDiffusion3Pipeline, method, lambda *a, **k: pytest.fail("asked"))
    with pytest.raises(ValueError, match="source must be a folder with a StableDiffusion3Pipeline") as caught:
        open_pipeline(SD3, source)
    assert source in str(caught.value)


def test_a_model_of_the_hub_is_first_looked_for_here(monkeypatch, capsys):
    asked = []

    def read(source, dtype, kind, encoders, offline, revision):
        asked.append((offline, revision))
        if offline:
            raise OSError("not here")
        return tiny_sd3()

    monkeypatch.setattr(pipelines, "read_pipeline", read)
    open_pipeline(SD3, "some/model", revision="abc")
    assert asked == [(True, "abc"), (False, "abc")]
    assert capsys.readouterr().err == "some/model is not on this machine: asking the hub\n"


# --- encoding ---


class Encoder(torch.nn.Module):
    "Of one number."

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1, dtype=torch.bfloat16))

    dtype = property(lambda self: self.weight.dtype)


def spoken(pipeline, prompts, length):
    "Embeddings that say which prompt they are of, the size of FLUX's."
    numbers = torch.tensor([float(prompt) for prompt in prompts]).bfloat16()
    return dict(embeds=numbers[:, None, None].expand(-1, length, 4096), pooled=numbers[:, None].expand(-1, 8))


class Living(TorchDispatchMode):
    "Counts the bytes of all tensors that are made while it is on and are not yet gone."

    def __init__(self):
        super().__init__()
        self.known, self.now, self.peak = WeakIdKeyDictionary(), 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **kwargs or {})
        tree_map_only(torch.Tensor, lambda tensor: self.see(tensor.untyped_storage()), out)
        return out

    def see(self, storage):
        if storage not in self.known:
            self.known[storage] = size = storage.nbytes()
            weakref.finalize(storage, self.add, -size)
            self.add(size)

    def add(self, size):
        self.now += size
        self.peak = max(self.peak, self.now)


def most_memory(action):
    "What the action returns, and the bytes that it needs at its peak: of tensors, and of Python's and numpy's objects."
    tracemalloc.start()
    try:
        with Living() as living:
            result = action()
        return result, living.peak + tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_encoding_takes_the_size_of_the_prompts_once(tmp_path):
    """A part of the prompts at a time where they go to a file, and all of them once where they stay in memory. What is
    allocated is counted: the memory of a process is what its allocator gave back, which differs from run to run."""
    family, prompts = SimpleNamespace(encode=spoken), [str(i % 100) for i in range(160)]

    def encode(**options):
        pipeline = SimpleNamespace(components=dict(text_encoder=Encoder(), tokenizer=None))
        return most_memory(lambda: encode_and_drop(family, pipeline, prompts, 128, CPU, False, **options))

    path = tmp_path / "prompts.safetensors"
    _, most = encode(keep=lambda *parts: images.write_encoded(path, "key", *parts))
    size = path.stat().st_size
    assert size > 160 * 128 * 4096 * 2 and most < 0.7 * size
    told, most = encode()
    assert most < 1.5 * size
    written = load_file(path)
    assert written.keys() == told.keys() and all(torch.equal(written[name], told[name]) for name in told)
    assert torch.equal(told["pooled"][:, 0], torch.arange(160).remainder(100).bfloat16())
    assert images.is_kept(path, "key") and not images.is_kept(path, "another")


def test_prompts_that_are_cut_are_counted_in_one_line(saved, tmp_path, capfd):
    long = "a bird " * 400
    pipeline = open_pipeline(SD3, saved / "sd3")
    assert count_cut(pipeline, ["a cat", long, "a red house with a garden"], 12) == {
        "the 16 tokens of CLIP": 2,
        "the 12 tokens of T5": 2,
    }
    settings = ImagesSettings(source=str(saved / "sd3"), height=16, width=16, max_sequence_length=12)
    capfd.readouterr()
    open_encoded(settings, SD3, ["a cat", long], tmp_path / "quiet", CPU, progress=False)
    assert capfd.readouterr() == ("", "")
    open_encoded(settings, SD3, ["a cat", long], tmp_path / "loud", CPU, progress=True)
    lines = [line for line in capfd.readouterr().err.splitlines() if "prompts:" not in line and line.strip()]
    assert lines == ["of 2 prompts, 1 at the 16 tokens of CLIP and 1 at the 12 tokens of T5 are cut"]
    assert count_cut(pipeline, ["a cat"], 12) == {}


def test_diversity_is_left_out_where_no_prompt_comes_twice(saved):
    settings = dict(source=str(saved / "sd3"), height=16, width=16, max_sequence_length=12, eval_steps=2, lora_rank=2)
    few, enough = (ImagesTask(ImagesSettings(**settings, eval_images=n), progress=False) for n in (16, 17))
    assert "diversity" not in few.evaluate(few.base) and enough.evaluate(enough.base)["diversity"] > 0


# --- saving onto a link ---


def test_saving_onto_a_link_replaces_the_link(saved, tmp_path):
    settings = ImagesSettings(source=str(saved / "sd3"), height=16, width=16, max_sequence_length=12, lora_rank=2)
    task = ImagesTask(settings, progress=False)
    (tmp_path / "else").mkdir()
    for name in ("model_index.json", "precious"):
        (tmp_path / "else" / name).write_text("{}")
    target = tmp_path / "trained"
    for leads_to in (tmp_path / "else", tmp_path / "nowhere"):
        if target.exists():
            shutil.rmtree(target)
        target.symlink_to(leads_to)
        for _ in range(3):
            save_policy(task.policy, task.pipeline, target)
            assert [path.name for path in target.iterdir()] == ["pytorch_lora_weights.safetensors"]
            assert not target.is_symlink() and {path.name for path in tmp_path.iterdir()} == {"else", "trained"}
    assert (tmp_path / "else" / "precious").exists()
    shutil.rmtree(target)
    (tmp_path / "else" / "model_index.json").unlink()
    target.symlink_to(tmp_path / "else")
    with pytest.raises(ValueError, match="folder must be new, empty, or one that a policy was saved to"):
        save_policy(task.policy, task.pipeline, target)
