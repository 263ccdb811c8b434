"""The miniature: tokenizers, pretraining, the packaged pipeline, and the task that trains it."""

import copy
import itertools
import json
import math
import os
import re
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
import yaml
from diffusers import AutoencoderKL, SD3Transformer2DModel, StableDiffusion3Pipeline
from helpers import assert_same_outcome, weights
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import CLIPTextModelWithProjection, CLIPTokenizer, T5EncoderModel

from neighbor_grpo.flow import randn, seeded, time_grid
from neighbor_grpo.models import miniature
from neighbor_grpo.models.miniature import (
    KINDS,
    LENGTH,
    PretrainSettings,
    ScenesSettings,
    ScenesTask,
    accuracies,
    clip_vocabulary,
    cycle,
    draw_images,
    draw_scenes,
    encode_scenes,
    make_pipeline,
    make_tokenizers,
    model_card,
    networks_of,
    pretrain,
    pretraining_captions,
    scene_loss,
    spell,
    train_transformer,
    train_vae,
    wilson,
    with_networks,
    within,
)
from neighbor_grpo.models.pipeline import MINIATURE, PipelinePolicy, decode, encode_prompts, open_pipeline
from neighbor_grpo.models.sd3 import SD3
from neighbor_grpo.neighbor import NeighborGRPO
from neighbor_grpo.rewards.signs import SIGNS
from neighbor_grpo.rivals.gaussian import DanceGRPO, FlowGRPO
from neighbor_grpo.runs.folder import read_rows
from neighbor_grpo.runs.machine import quiet
from neighbor_grpo.runs.trainer import Trainer
from neighbor_grpo.solvers import solve
from neighbor_grpo.tasks.scenes import all_captions, draw_layout, render, split_captions, verify, words
from neighbor_grpo.training import TrainSettings

PACKAGED = pytest.mark.skipif(not MINIATURE.exists(), reason="the package has no pretrained pipeline yet")
CAPTIONS = [caption for kind in ("single", "count", "relation") for caption in all_captions(kind)]
UNSEEN = {caption for kind in ("count", "relation") for caption in split_captions(kind)["unseen"]}
TINY = PretrainSettings(
    scenes=64, vae_steps=2, decoder_steps=2, steps=2, guidance_steps=1, watch_every=2, watch_images=4
)
RANKS = pytest.mark.parametrize("rank", [0, 4], ids=["full", "lora"])
NETWORKS = ("transformer", "text_encoder", "text_encoder_2", "text_encoder_3")


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    "A miniature with random weights, in a folder."
    folder = tmp_path_factory.mktemp("source") / "random"
    with quiet():
        make_pipeline(5).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    "What a pretraining of a few steps leaves."
    folder = tmp_path_factory.mktemp("tiny") / "new" / "pipeline"
    return folder, pretrain(folder, TINY, progress=False)


def plain_python(code, *arguments, cwd):
    "Run code in a process that has no way to this package."
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    code += "\nimport sys\nassert not [name for name in sys.modules if name.startswith('neighbor_grpo')]"
    command = [sys.executable, "-c", "import torch\ntorch.set_num_threads(1)\n" + code, *map(str, arguments)]
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# --- tokenizers ---


def test_every_word_is_one_known_token_of_its_own():
    clip, t5 = make_tokenizers()
    for tokenizer, around in ((clip, 2), (t5, 1)):
        ids = [tokenizer(word).input_ids for word in words()]
        assert {len(row) for row in ids} == {1 + around}
        tokens = {row[around - 1] for row in ids}
        special = {tokenizer.unk_token_id, tokenizer.pad_token_id, tokenizer.eos_token_id}
        assert len(tokens) == len(words()) and not tokens & special


def test_every_caption_fits_and_is_read_word_by_word():
    clip, t5 = make_tokenizers()
    texts = [str(caption) for caption in CAPTIONS]
    assert max(len(row) for row in clip(texts).input_ids) == LENGTH
    for tokenizer, around in ((clip, 2), (t5, 1)):
        rows = tokenizer(texts).input_ids
        assert [len(row) - around for row in rows] == [len(text.split()) for text in texts]
        assert len({tuple(row) for row in rows}) == len(texts)
        assert max(map(len, rows)) <= LENGTH == tokenizer.model_max_length


def clip_tokenizer(vocabulary, merges):
    return CLIPTokenizer(vocab=vocabulary, merges=merges, unk_token="<|endoftext|>")


WORDS = st.lists(st.text("abc", min_size=1, max_size=7), min_size=1, max_size=12, unique=True)


@settings(max_examples=60)
@given(WORDS, st.lists(st.text("abc", min_size=1, max_size=9), max_size=5))
def test_merges_leave_any_words_whole_and_spell_the_rest_alike(whole, others):
    vocabulary, merges = clip_vocabulary(whole)
    assert sorted(vocabulary.values()) == list(range(len(vocabulary))) and len(set(merges)) == len(merges)
    assert {piece for merge in merges for piece in (*merge, "".join(merge))} <= vocabulary.keys()
    tokenizer = clip_tokenizer(vocabulary, merges)
    for word in whole:
        assert tokenizer.tokenize(word) == spell(word, merges) == [word + "</w>"]
    for word in others:
        if set(word) <= set("".join(whole)):
            assert tokenizer.tokenize(word) == spell(word, merges)


# --- the pipeline ---


def test_the_parts_are_real_classes_of_the_promised_size():
    pipeline = make_pipeline()
    kinds = (SD3Transformer2DModel, CLIPTextModelWithProjection, CLIPTextModelWithProjection, T5EncoderModel)
    parts = {name: getattr(pipeline, name) for name in NETWORKS}
    assert type(pipeline) is StableDiffusion3Pipeline and type(pipeline.vae) is AutoencoderKL
    assert tuple(type(part) for part in parts.values()) == kinds
    networks = [*parts.values(), pipeline.vae]
    assert 3.4e6 < sum(weight.numel() for part in networks for weight in part.parameters()) < 3.6e6
    assert not any(part.training for part in networks)


def test_first_weights_follow_from_the_seed():
    one, same, other = (make_pipeline(seed) for seed in (0, 0, 1))
    for name in (*NETWORKS, "vae"):
        first = weights(getattr(one, name))
        assert torch.equal(first, weights(getattr(same, name)))
        assert not torch.equal(first, weights(getattr(other, name)))


def call(pipeline, noise, captions):
    "Images as a user of diffusers makes them."
    return pipeline(
        captions,
        num_inference_steps=3,
        sigmas=[1.0, 2 / 3, 1 / 3],
        latents=noise,
        guidance_scale=1.0,
        max_sequence_length=LENGTH,
        output_type="pt",
    ).images


def test_it_is_saved_and_opened_with_its_tokenizers(source):
    built, opened, noise = make_pipeline(5), open_pipeline(SD3, source), randn((2, 8, 8, 8), seeded(0))
    built.set_progress_bar_config(disable=True)
    texts = ["three green triangles", "a red circle left of a blue square"]
    # Opened weights need no gradient, so layers take other products of matrices: rounding of pixels in [0, 1].
    assert (call(built, noise, texts) - call(opened, noise, texts)).abs().max() < 1e-5
    assert opened.tokenizer(texts).input_ids == built.tokenizer(texts).input_ids
    assert opened.tokenizer_3(texts).input_ids == built.tokenizer_3(texts).input_ids


def test_every_word_changes_what_the_transformer_is_told(source):
    pipeline = open_pipeline(SD3, source)
    texts = ["two red circles", "two red squares", "two blue circles", "four red circles"]
    told = encode_prompts(SD3, pipeline, texts, LENGTH)
    for value in told.values():
        assert torch.pdist(value.flatten(1)).min() > 1e-3


# --- the pretraining ---


def test_pretraining_captions_have_their_shares_and_never_the_unseen(generator):
    captions = pretraining_captions(4000, generator)
    shares = {kind: sum(c.kind == kind for c in captions) / 4000 for kind in ("single", "count", "relation")}
    for kind, share in dict(single=0.25, count=0.25, relation=0.5).items():
        assert abs(shares[kind] - share) < 4 * math.sqrt(share * (1 - share) / 4000)
    assert not UNSEEN & set(captions)
    assert {c for c in captions if c.kind != "relation"} == {c for c in CAPTIONS if c.kind != "relation"} - UNSEEN


def test_scenes_show_what_their_captions_say():
    images, captions = draw_scenes(100, seeded(0))
    assert images.shape == (100, 3, 32, 32) and images.dtype == torch.uint8 and len(captions) == 100
    assert verify(images / 255, captions)[0].mean() >= 0.98
    again, same = draw_scenes(100, seeded(0))
    assert torch.equal(images, again) and captions == same


def test_the_autoencoder_learns():
    vae, images = make_pipeline().vae, draw_scenes(64, seeded(0))[0]
    x = images[:16] / 127.5 - 1
    with torch.no_grad():
        before = (vae.decode(vae.encode(x).latent_dist.mean).sample - x).square().mean()
    train_vae(vae, images, 20, seed=3, progress=False)
    with torch.no_grad():
        after = (vae.decode(vae.encode(x).latent_dist.mean).sample - x).square().mean()
    assert after < 0.3 * before
    assert not vae.training and not any(weight.requires_grad for weight in vae.parameters())


def test_the_autoencoder_follows_from_its_seed_alone():
    images, found = draw_scenes(64, seeded(0))[0], []
    for seed, global_seed in ((3, 0), (3, 1), (4, 0)):
        vae = make_pipeline().vae
        torch.manual_seed(global_seed)
        train_vae(vae, images, 2, seed=seed, progress=False)
        found.append(weights(vae))
    assert torch.equal(found[0], found[1]) and not torch.equal(found[0], found[2])


def test_the_decoder_alone_leaves_the_encoder_as_it_was():
    vae, images = make_pipeline().vae, draw_scenes(64, seeded(0))[0]
    before = {name: weight.clone() for name, weight in vae.state_dict().items()}
    train_vae(vae, images, 2, seed=0, encoder=False, progress=False)
    after = vae.state_dict()
    assert all(torch.equal(after[name], before[name]) == name.startswith("encoder.") for name in before)


def test_latents_are_standard_and_decode_as_the_pipeline_does():
    pipeline, images = make_pipeline(), draw_scenes(64, seeded(0))[0]
    latents = encode_scenes(pipeline.vae, images)
    assert latents.shape == (64, 8, 8, 8) and latents.dtype == torch.float32
    assert abs(latents.mean()) < 1e-5 and abs(latents.std() - 1) < 1e-5
    with torch.no_grad():
        direct = pipeline.vae.decode(pipeline.vae.encode(images / 127.5 - 1).latent_dist.mean).sample / 2 + 0.5
    assert torch.allclose(decode(pipeline, latents), direct.clamp(0, 1), atol=1e-5)


def pretrain_transformer(seed=0, global_seed=0, steps=9, **more):
    "A few steps on latents that say nothing but their captions; returns the pipeline, the last average and the rows."
    pipeline, rows, averages = make_pipeline(), [], []
    latents = torch.randn(8, 1, 1, 1, generator=seeded(0)).expand(8, 8, 8, 8).contiguous()
    texts, draws = [str(caption) for caption in all_captions("count")[:8]], seeded(seed)
    torch.manual_seed(global_seed)

    def watch(step, loss, networks):
        rows.append((step, loss))
        averages.append(networks)

    loss_of = lambda: scene_loss(pipeline, latents, texts, draws, **more)
    train_transformer(networks_of(pipeline), loss_of, steps, 1e-3, watch, watch_every=4, progress=False)
    return pipeline, averages[-1], rows


def test_the_transformer_and_the_text_encoders_learn_together(monkeypatch):
    texts, encode = [], SD3.encode
    monkeypatch.setattr(SD3, "encode", lambda p, batch, length: (texts.extend(batch), encode(p, batch, length))[1])
    pipeline, average, rows = pretrain_transformer()
    assert [step for step, _ in rows] == [4, 8, 9] and rows[-1][1] < 0.9 * rows[0][1]
    fresh = make_pipeline()
    for name in NETWORKS:
        start, now = weights(getattr(fresh, name)), weights(getattr(pipeline, name))
        assert not torch.equal(start, now) and torch.equal(now, weights(average[name]))
        assert not any(weight.requires_grad for weight in getattr(pipeline, name).parameters())
    assert torch.equal(weights(pipeline.vae), weights(fresh.vae))
    dropped = texts.count("") / len(texts)
    assert abs(dropped - 0.1) < 4 * math.sqrt(0.09 / len(texts)) and set(texts) - {""} <= {str(c) for c in CAPTIONS}


def test_the_pretraining_follows_from_its_seed_alone():
    one, same, other = (
        weights(pretrain_transformer(*seeds, steps=2)[1]["transformer"]) for seeds in ((0, 0), (0, 1), (1, 0))
    )
    assert torch.equal(one, same) and not torch.equal(one, other)


def test_a_teacher_is_copied_with_its_guidance():
    pipeline, latents, texts = make_pipeline(0), torch.randn(8, 8, 8, 8), [str(c) for c in all_captions("count")[:8]]
    for weight in pipeline.transformer.parameters():
        torch.nn.init.normal_(weight, std=0.3)  # fresh ones hardly hear their captions
    teacher = with_networks(make_pipeline(1), copy.deepcopy(networks_of(pipeline)))
    loss = lambda scale: scene_loss(pipeline, latents, texts, seeded(3), teacher, scale)
    with torch.no_grad():
        gaps = [loss(scale) for scale in (0.0, 2.0, 3.0)]
        # Teacher and pupil take other products of matrices where one needs a gradient: squares of rounding.
        assert loss(1.0) < 1e-8 * gaps[0]
        asked, never = loss(2.0), scene_loss(pipeline, latents, [""] * 8, seeded(3), teacher, 2.0)
    assert (
        gaps[0] > 0
        and math.isclose(gaps[0], gaps[1], rel_tol=1e-4)
        and math.isclose(gaps[2], 4 * gaps[1], rel_tol=1e-4)
    )
    assert asked > 0 and never < 1e-10, "without a caption there is nothing to exaggerate"
    loss(2.0).backward()
    assert all(weight.grad is None for network in networks_of(teacher).values() for weight in network.parameters())


def test_the_second_stage_learns_from_the_first(tmp_path, monkeypatch):
    given, loss_of = [], scene_loss
    monkeypatch.setattr(miniature, "scene_loss", lambda *args: (given.append(args), loss_of(*args))[1])
    pretrain(tmp_path / "new", TINY, progress=False)
    teachers, scales = [args[4] for args in given], {args[5] for args in given}
    assert teachers[:2] == [None, None] and teachers[2] is not None and scales == {TINY.guidance}
    taught, student = weights(teachers[2].transformer), weights(given[2][0].transformer)
    assert not torch.equal(taught, student) and (taught - student).abs().max() < 2e-3, "it started as its teacher"


# --- what it leaves ---


def assert_stored_in_half_precision(folder):
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert {path.suffix for path in files} == {".safetensors", ".json", ".jsonl", ".md"}
    tensors = [value for path in files if path.suffix == ".safetensors" for value in load_file(path).values()]
    floating = {value.dtype for value in tensors if value.is_floating_point()}
    assert floating == {torch.float16} and sum(path.stat().st_size for path in files) <= 10_000_000


def test_pretraining_leaves_a_pipeline_a_log_and_a_card(tiny):
    folder, opened = tiny
    assert_stored_in_half_precision(folder)
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]
    assert opened.transformer.dtype == torch.float32 and not opened.transformer.training
    first, autoencoder, *rows = read_rows(folder / "log.jsonl")
    assert first["settings"] == vars(TINY)
    assert autoencoder.keys() == {"decibel", "verified", "seconds"} and autoencoder["decibel"] > 0
    assert [(row["stage"], row["step"]) for row in rows] == [("flow", 2), ("guidance", 3)]
    assert all(row.keys() == {"stage", "step", "loss", "seconds", *KINDS} for row in rows)
    assert all(0 <= row[kind] <= 1 for row in rows for kind in KINDS)
    assert rows[0]["seconds"] <= rows[1]["seconds"]


def test_a_second_run_goes_on_from_the_first(tiny, tmp_path):
    folder, _ = tiny
    steps = replace(TINY, source=str(folder), steps=4, watch_every=4, seed=1)
    opened, log = pretrain(tmp_path / "more", steps, progress=False), read_rows(folder / "log.jsonl")
    now = read_rows(tmp_path / "more" / "log.jsonl")
    assert now[: len(log)] == log and now[len(log)]["settings"] == vars(steps) | {"source": folder.name}
    assert [(row["stage"], row["step"]) for row in now[len(log) + 1 :]] == [("flow", 7), ("guidance", 8)]
    assert all(a["seconds"] <= b["seconds"] for a, b in itertools.pairwise(now))
    before = open_pipeline(SD3, folder)
    assert torch.equal(weights(opened.vae), weights(before.vae)), "it keeps its autoencoder"
    change = (weights(opened.transformer) - weights(before.transformer)).abs()
    assert 0 < change.max() < 5e-3, "it started where the first one ended"
    texts = [path.read_text(encoding="utf-8") for path in (tmp_path / "more").rglob("*.json*")]
    assert not any(str(folder.parent) in text for text in texts), "no path of this machine is told"
    card = (tmp_path / "more" / "README.md").read_text(encoding="utf-8")
    assert "| setting | run 1 | run 2 |" in card and f"| source |  | {folder.name} |" in card and "128 scenes" in card


def test_the_average_is_what_is_stored(tmp_path, monkeypatch):
    kept, judge = [], accuracies
    monkeypatch.setattr(
        miniature, "accuracies", lambda p, n: (kept.append(copy.deepcopy(networks_of(p))), judge(p, n))[1]
    )
    opened = pretrain(tmp_path / "new", TINY, progress=False)
    for name in NETWORKS:
        assert torch.equal(weights(getattr(opened, name)), weights(kept[-1][name]).half().float())


def test_a_folder_with_something_in_it_is_left_alone(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="folder must be new or empty"):
        pretrain(tmp_path, TINY, progress=False)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_the_card_says_how_to_open_it_and_that_works(tiny):
    folder, _ = tiny
    card = (folder / "README.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    assert code.count("\n") == 6
    code = code.replace("FOLDER", str(folder)).replace("pipeline(", "image = pipeline(")
    plain_python(code + "\nassert image.size == (32, 32)", cwd=folder)


def test_the_card_is_complete(tiny):
    log = read_rows(tiny[0] / "log.jsonl")
    log[-1] |= dict(single=0.75, relation_unseen=0.0)
    card = model_card(log)
    _, front, text = card.split("---\n", 2)
    assert yaml.safe_load(front) == dict(license="apache-2.0", library_name="diffusers", pipeline_tag="text-to-image")
    headings = re.findall(r"^## (.+)$", text, re.MULTILINE)
    assert headings == ["Use", "Data", "Recipe", "Accuracy", "What it cannot do", "Licence"]
    assert all(f"| {name} | {value} |" in text for name, value in vars(TINY).items())
    assert "| one shape | 0.75 | 0.30 to 0.95 |" in text and "64 scenes drawn by a program" in text
    assert len(re.findall(r"^\| .+ \| \d\.\d\d \| \d\.\d\d to \d\.\d\d \|$", text, re.MULTILINE)) == len(KINDS)
    assert all(word in text for word in words()) and "{" not in text


@given(st.integers(1, 500).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_wilsons_interval_holds_what_does_not_surprise(case):
    hits, n = case
    share = hits / n
    low, high = wilson(share, n)
    assert 0 <= low <= share + 1e-12 and share - 1e-12 <= high <= 1 and high - low > 0
    for end in (low, high):
        if 1e-9 < end < 1 - 1e-9:
            assert abs(share - end) == pytest.approx(1.959963985 * math.sqrt(end * (1 - end) / n), rel=1e-6)


# --- the packaged pipeline ---


@PACKAGED
def test_the_packaged_pipeline_is_small_safe_and_clean():
    assert_stored_in_half_precision(MINIATURE)
    for path in MINIATURE.rglob("*.json"):
        config = json.loads(path.read_text(encoding="utf-8"))
        assert "/" not in str(config.get("_name_or_path", "")), f"{path} names a folder"
    assert "## Licence" in (MINIATURE / "README.md").read_text(encoding="utf-8")


@PACKAGED
def test_the_packaged_pipeline_has_these_shapes_and_tokens():
    opened, built = open_pipeline(SD3, MINIATURE), make_pipeline()
    for name in (*NETWORKS, "vae"):
        shapes = [{n: w.shape for n, w in getattr(p, name).state_dict().items()} for p in (opened, built)]
        assert shapes[0] == shapes[1]
    texts = [str(caption) for caption in CAPTIONS]
    for name in ("tokenizer", "tokenizer_2", "tokenizer_3"):
        assert getattr(opened, name)(texts).input_ids == getattr(built, name)(texts).input_ids


@PACKAGED
def test_the_packaged_autoencoder_keeps_what_is_verified():
    pipeline, (images, captions) = open_pipeline(SD3, MINIATURE), draw_scenes(200, seeded(11))
    with torch.no_grad():
        z = pipeline.vae.encode(images / 127.5 - 1).latent_dist.mean
    latents = (z - pipeline.vae.config.shift_factor) * pipeline.vae.config.scaling_factor
    assert abs(latents.mean()) < 0.1 and abs(latents.std() - 1) < 0.1
    assert verify(decode(pipeline, latents), captions)[0].mean() >= 0.95


@PACKAGED
def test_the_packaged_accuracies_are_those_of_the_log_and_leave_room():
    last, n = read_rows(MINIATURE / "log.jsonl")[-1], 48
    for kind, share in accuracies(open_pipeline(SD3, MINIATURE), n).items():
        assert abs(share - last[kind]) <= 4 * math.sqrt(last[kind] * (1 - last[kind]) / n) + 1 / n, kind
    assert last["single"] >= 0.7
    assert 0.4 <= last["count"] <= 0.8 and 0.4 <= last["relation"] <= 0.8, "competent, with room"


# --- images and figures ---


def test_images_come_from_fixed_noise_in_any_company(source):
    pipeline = open_pipeline(SD3, source)
    policy, captions = PipelinePolicy(SD3, pipeline.transformer).requires_grad_(False), all_captions("count")
    images = draw_images(pipeline, policy, captions[:6], steps=2)
    torch.rand(3)
    assert images.shape == (6, 3, 32, 32) and torch.equal(images, draw_images(pipeline, policy, captions[:6], steps=2))
    assert torch.allclose(draw_images(pipeline, policy, captions[:3], steps=2), images[:3], atol=1e-5)
    assert not torch.allclose(images, draw_images(pipeline, policy, captions[:6], steps=2, seed=1), atol=1e-2)
    noise, texts = randn((6, 8, 8, 8), seeded(0, 9)), [str(c) for c in captions[:6]]
    cond = encode_prompts(SD3, pipeline, texts, LENGTH)
    expected = decode(pipeline, solve(policy, noise, time_grid(2), cond).x[-1])
    assert torch.allclose(images, expected, atol=1e-5)


@given(st.integers(1, 60), st.integers(1, 200))
def test_a_cycle_takes_captions_equally_often(total, count):
    chosen = cycle(CAPTIONS[:total], count)
    often = [chosen.count(caption) for caption in CAPTIONS[:total]]
    assert sum(often) == len(chosen) == count and max(often) - min(often) <= 1
    assert cycle(CAPTIONS[:total], count + 5)[:count] == chosen


def test_accuracies_are_the_verifiers_on_the_right_captions(source, monkeypatch):
    seen = []
    rendered = lambda p, v, captions, **solver: render(draw_layout(captions, seeded(2)))
    monkeypatch.setattr(miniature, "draw_images", rendered)
    monkeypatch.setattr(miniature, "verify", lambda x, captions: (seen.append(captions), verify(x, captions))[1])
    figures = accuracies(open_pipeline(SD3, source), 30)
    assert list(figures) == list(KINDS) and min(figures.values()) >= 0.9
    for name, captions in zip(figures, seen, strict=True):
        assert {c.kind for c in captions} == {name.removesuffix("_unseen")} and len(captions) == 30
        assert set(captions) <= UNSEEN if name.endswith("_unseen") else not set(captions) & UNSEEN


def test_diversity_is_that_of_rendered_scenes_at_best():
    repeated, once = cycle(all_captions("single"), 54), cycle(all_captions("relation"), 54)
    for captions in (repeated, once):
        rendered = render(draw_layout(captions, seeded(5)))
        assert within(rendered, captions) == pytest.approx(1, abs=0.2)
        assert within(0.5 * rendered + 0.25, captions) == pytest.approx(0.5 * within(rendered, captions))
    first = [repeated.index(caption) for caption in repeated]
    same = render(draw_layout(repeated, seeded(5)))[first]
    assert within(same, repeated) == 0, "alike within a caption, different between captions"


# --- the task ---


class Bright(ScenesTask):
    "Rewards something that random weights can change."

    def reward(self, samples, prompts):
        return decode(self.pipeline, samples).mean((1, 2, 3))

    def evaluate(self, velocity):
        return dict(reward=self.sample(velocity, self.captions[:8]).mean().item())


def make_task(source, kind=Bright, **more):
    options = dict(source=str(source), eval_images=48, eval_steps=1) | more
    return kind(ScenesSettings(**options), progress=False)


def move(policy, scale=0.05):
    "As if it had been trained."
    for weight in policy.parameters():
        if weight.requires_grad:
            weight.data += scale * torch.randn(weight.shape, generator=seeded(1))
    return policy


@pytest.mark.parametrize("rewarded", ["count", "relation"])
def test_what_is_trained_held_out_and_watched(rewarded, source):
    task = make_task(source, rewarded=rewarded, eval_images=100)
    split, other = split_captions(rewarded), {"count": "relation", "relation": "count"}[rewarded]
    assert task.captions == split["train"] and task.prompts == len(split["train"]) and task.shape == (8, 8, 8)
    assert list(task.watched) == ["reward", "train", "unseen", "single", "other"]
    assert all(len(captions) == 100 for captions in task.watched.values())
    assert set(task.watched["reward"]) <= set(split["held"]) and set(task.watched["unseen"]) <= set(split["unseen"])
    assert set(task.watched["train"]) <= set(split["train"]) and not UNSEEN & set(task.watched["other"])
    assert {c.kind for c in task.watched["other"]} == {other} and {c.kind for c in task.watched["single"]} == {"single"}


def test_conditions_are_the_encoded_captions_of_the_prompts(source):
    task, prompts = make_task(source), torch.tensor([5, 0, 5])
    expected = encode_prompts(SD3, task.pipeline, [str(task.captions[i]) for i in prompts], LENGTH)
    found = task.conditions(prompts)
    assert found.keys() == expected.keys() and all(torch.allclose(found[k], expected[k], atol=1e-5) for k in found)
    assert found["embeds"].shape == (3, 2 * LENGTH, 96)


@pytest.mark.parametrize("reward", ["graded", "strict"])
def test_the_reward_is_the_verifiers_of_what_is_decoded(reward, source, monkeypatch):
    task, prompts = make_task(source, ScenesTask, reward=reward), torch.arange(27).repeat(2)
    captions = [task.captions[i] for i in prompts]
    images = render(draw_layout(captions, seeded(3)))
    images[27:] = images[27:].roll(1, 0)  # of the caption before
    seen = []
    monkeypatch.setattr(miniature, "decode", lambda pipeline, latents, batch: (seen.append(latents), images)[1])
    samples = randn((54, 8, 8, 8), seeded(0))
    found = task.reward(samples, prompts)
    assert torch.equal(seen[0], samples)
    assert torch.equal(found, verify(images, captions)[reward == "graded"])
    assert found[:27].mean() > 0.95 and found[27:].mean() < 0.5
    monkeypatch.undo()
    assert torch.equal(
        task.reward(samples, prompts), verify(decode(task.pipeline, samples), captions)[reward == "graded"]
    )


def test_an_evaluation_has_its_figures_and_repeats_itself(source):
    task = make_task(source, ScenesTask)
    figures = task.evaluate(task.base)
    known = {"reward", "train", "unseen", "single", "other", "radius", "diversity"}
    assert figures.keys() == known | SIGNS.keys()
    torch.rand(3)
    assert task.evaluate(task.policy) == figures, "the policy starts as the base"
    assert all(math.isfinite(value) for value in figures.values())
    images = task.sample(task.base, task.watched["unseen"])
    assert figures["unseen"] == verify(images, task.watched["unseen"])[0].mean().item()


def test_empty_images_have_figures_too(source, monkeypatch):
    task = make_task(source, ScenesTask, rewarded="relation")
    empty = lambda pipeline, velocity, captions, *more: (torch.full((len(captions), 3, 32, 32), 0.1), torch.zeros(1))
    monkeypatch.setattr(miniature, "solve_images", empty)
    figures = task.evaluate(task.base)
    assert figures.pop("kilobytes") > 0 and set(figures.values()) == {0.0}


def test_pictures_are_saved(source, tmp_path):
    task = make_task(source)
    task.draw({"before": task.base, "after": task.policy}, tmp_path / "samples.png")
    assert (tmp_path / "samples.png").read_bytes().startswith(b"\x89PNG")


@RANKS
def test_the_reference_is_a_copy_or_free(rank, source):
    task = make_task(source, lora_rank=rank)
    reference = task.policy.reference()
    cond, noise, t = task.conditions(torch.tensor([0, 1])), randn((2, 8, 8, 8), seeded(0)), torch.tensor([0.3, 0.8])
    move(task.policy)
    with torch.no_grad():
        base, now = task.base(noise, t, cond), task.policy(noise, t, cond)
        assert torch.equal(reference(noise, t, cond), base) and not torch.allclose(now, base, atol=1e-3)
    own = sum(weight.numel() for weight in reference.parameters())
    assert own == (0 if rank else 3_002_464)


SHORT = dict(group_size=4, steps=2, trained_steps=1)
KL_WEIGHTS = {NeighborGRPO(**SHORT, anchors=2): 0.1, FlowGRPO(**SHORT): 0.0, DanceGRPO(**SHORT): 0.0}
ALGORITHMS = [*KL_WEIGHTS]


@pytest.mark.parametrize("algorithm", ALGORITHMS, ids=lambda a: type(a).__name__)
@RANKS
def test_one_iteration_moves_the_policy_and_not_the_base(rank, algorithm, source):
    task = make_task(source, lora_rank=rank)
    base, start = weights(task.base), weights(task.policy)
    settings = TrainSettings(iterations=1, groups=2, lr=1e-3, ema=0.5, kl_weight=KL_WEIGHTS[algorithm])
    row = Trainer(task, algorithm, settings).step()
    assert (
        row["reward_std"] > 0
        and row["grad_norm"] > 0
        and all(math.isfinite(value) for value in row.values() if value is not None)
    )
    assert torch.equal(weights(task.base), base) and not torch.equal(weights(task.policy), start)
    frozen = [weight for weight in task.policy.parameters() if not weight.requires_grad]
    assert bool(frozen) == bool(rank)
    assert not any(weight.requires_grad for weight in task.base.parameters())


@RANKS
def test_stopped_and_resumed_it_ends_with_the_same_bits(rank, source, tmp_path):
    run = TrainSettings(iterations=2, groups=2, lr=1e-3, ema=0.5, kl_weight=0.1, eval_every=2, checkpoint_every=1)

    def train(folder, iterations, resume=False):
        task = make_task(source, lora_rank=rank)
        settings = TrainSettings(**vars(run) | dict(iterations=iterations))
        return Trainer(task, ALGORITHMS[0], settings, folder, resume)

    train(tmp_path / "whole", 2).run(progress=False)
    interrupted = train(tmp_path / "parts", 2)
    interrupted.evaluate()
    interrupted.step()
    interrupted.save()
    train(tmp_path / "parts", 2, resume=True).run(progress=False)
    assert_same_outcome(tmp_path / "parts", tmp_path / "whole")
    size = (tmp_path / "parts" / "checkpoints" / "000002" / "policy.safetensors").stat().st_size
    assert size < 1e6 if rank else size > 1e7, "a checkpoint holds what is trained"
    reference = tmp_path / "parts" / "reference.safetensors"
    assert reference.stat().st_size < 1000 if rank else reference.stat().st_size > 1e7


OPENED = """
import sys
from diffusers import StableDiffusion3Pipeline
from safetensors.torch import load_file, save_file
base, folder = sys.argv[1:]
noise = load_file(folder + "/noise.safetensors")["noise"]
images = {}
for kind in ("full", "lora"):
    pipeline = StableDiffusion3Pipeline.from_pretrained(base if kind == "lora" else folder + "/full")
    if kind == "lora": pipeline.load_lora_weights(folder + "/lora")
    images[kind] = pipeline(["two red circles", "four blue squares"], num_inference_steps=3, sigmas=[1.0, 2 / 3, 1 / 3],
                            latents=noise, guidance_scale=1.0, max_sequence_length=10, output_type="pt").images
save_file(images, folder + "/images.safetensors")
"""


def test_what_was_saved_opens_without_this_package(source, tmp_path):
    noise, expected = randn((2, 8, 8, 8), seeded(0)), {}
    save_file({"noise": noise}, tmp_path / "noise.safetensors")
    for kind, rank in (("full", 0), ("lora", 4)):
        task = make_task(source, lora_rank=rank)
        policy = move(copy.deepcopy(task.policy))
        task.save(policy, tmp_path / kind)
        cond = encode_prompts(SD3, task.pipeline, ["two red circles", "four blue squares"], LENGTH)
        with torch.no_grad():
            samples, before = (solve(p, noise, time_grid(3), cond, "euler").x[-1] for p in (policy, task.base))
        expected[kind] = decode(task.pipeline, samples)
        assert (expected[kind] - decode(task.pipeline, before)).abs().max() > 1e-2
    plain_python(OPENED, source, tmp_path, cwd=tmp_path)
    found = load_file(tmp_path / "images.safetensors")
    assert found.keys() == expected.keys()
    assert all((found[kind] - expected[kind]).abs().max() < 1e-5 for kind in found)


@PACKAGED
def test_graded_rewards_tell_images_of_one_caption_apart():
    found = {}
    for reward in ("graded", "strict"):
        task, prompts = make_task(MINIATURE, ScenesTask, reward=reward), torch.arange(8).repeat_interleave(6)
        noise = randn((48, *task.shape), seeded(0))
        with torch.no_grad():
            samples = solve(task.base, noise, time_grid(6, task.shift), task.conditions(prompts)).x[-1]
        found[reward] = task.reward(samples, prompts).view(8, 6)
    assert torch.equal(found["graded"] > 1 - 1e-6, found["strict"] == 1)
    assert (found["graded"].std(1) > 0.01).sum() >= max(6, (found["strict"].std(1) > 0).sum())
