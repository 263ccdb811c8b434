"""Judges score as their authors' code does, from files in their authors' formats, and never invent a reward."""

import html
import io
import json
import math
import pickle
import re
import socket
import subprocess
import sys
import threading
import time
import unicodedata
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import ftfy
import httpx2
import numpy as np
import pytest
import regex
import torch
import transformers
from helpers import PointwiseVelocity, assert_same_outcome
from PIL import Image
from safetensors.torch import load, save
from torch import nn
from torch.nn import functional as F
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from neighbor_grpo.grpo import check_rewards, combine_rewards
from neighbor_grpo.neighbor import NeighborGRPO
from neighbor_grpo.rewards import judges as library
from neighbor_grpo.rewards.judges import Aesthetic, CLIPScore, HPSv21, PickScore, Rewards, make_rewards, parse_rewards
from neighbor_grpo.rewards.programs import Compressibility, Reward, to_pictures
from neighbor_grpo.rewards.remote import RemoteReward, RewardServer, pack_request, unpack_request
from neighbor_grpo.runs.trainer import Trainer
from neighbor_grpo.training import TrainSettings

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)

# --- what is judged ---


def noise(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def paletted(seed=3):
    "A palette picture with one transparent colour."
    picture = Image.fromarray(noise(45, 70, 3, seed=seed)).quantize(16)
    picture.info["transparency"] = 3
    return picture


PICTURES = {
    "odd": Image.fromarray(noise(37, 61, 3)),
    "upright": Image.fromarray(noise(62, 35, 3, seed=1)),
    "line": Image.fromarray(noise(1, 300, 3, seed=2)),
    "column": Image.fromarray(noise(300, 1, 3, seed=2)),
    "dot": Image.new("RGB", (1, 1), (9, 200, 30)),
    "exact": Image.fromarray(noise(224, 224, 3, seed=4)),
    "one more": Image.fromarray(noise(225, 227, 3, seed=5)),
    "palette": paletted(),
    "alpha": Image.fromarray(noise(33, 50, 4, seed=6)),
    "grey": Image.fromarray(noise(40, 23, seed=7)),
    "grey with alpha": Image.fromarray(noise(40, 23, 2, seed=8)),
    "black and white": Image.fromarray(noise(41, 23, seed=9)).convert("1"),
    "inks": Image.fromarray(noise(41, 24, 3, seed=10)).convert("CMYK"),
}
PROMPTS = [
    "a red cat on the mat",
    "A  \u201cred\u201d cat,\n isn't it?\t\u2018Yes\u2019",
    "salt &amp; pepper, &lt;3 &quot;quoted&quot; &amp;amp;lt; &eacute;",
    "emoji \U0001f600\U0001f468\u200d\U0001f469\u200d\U0001f467 and \u732b, \u041a\u043e\u0442 2\u00bd",
    "sch\u00c3\u00b6n \u2013 caf\u00e9 cafe\u0301 \ufb01ne \u1e9e \u03a3\u03a3",
    "the cat in the red hat and the other cats " * 12,
    "",
    "<b> keeps ftfy away from &amp;lt;3 and cafe&#769;",
]
COUNT = len(PICTURES)
LISTED, ASKED = list(PICTURES.values()), (PROMPTS * 2)[:COUNT]
# Where the pictures are not what is tested: without the line and the column, which a judge makes 67,200 pixels long.
FEW = [PICTURES[name] for name in ("upright", "exact", "alpha", "grey", "inks")], PROMPTS[:5]

# --- a tokenizer with CLIP's bytes and some merges, and what the authors do with it ---

MERGES = (
    "t h,th e</w>,r e,re d</w>,c a,ca t</w>,i n,in </w>,a n,an d</w>,o n</w>,' s</w>,& amp,1 2,e r</w>,ca t,cat s</w>"
)
MERGES = [tuple(pair.split(" ")) for pair in MERGES.split(",") if pair != "in </w>"]
plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
BYTES = {b: chr(b) for b in plain} | {b: chr(256 + k) for k, b in enumerate(b for b in range(256) if b not in plain)}
PIECES = list(BYTES.values())
PIECES += (
    [piece + "</w>" for piece in PIECES] + ["amp"] + [a + b for a, b in MERGES] + ["<|startoftext|>", "<|endoftext|>"]
)
IDS = {piece: k for k, piece in enumerate(PIECES)}


def merged(word):
    "Byte-pair encoding: the pair that was learned first is joined first, wherever it stands."
    symbols = [*word[:-1], word[-1] + "</w>"]
    while True:
        pairs = [pair for pair in zip(symbols, symbols[1:]) if pair in MERGES]
        if not pairs:
            return symbols
        best, joined, k = min(pairs, key=MERGES.index), [], 0
        while k < len(symbols):
            both = k + 1 < len(symbols) and (symbols[k], symbols[k + 1]) == best
            joined.append("".join(best) if both else symbols[k])
            k += 2 if both else 1
        symbols = joined


def ids_of(text, length=77):
    "What CLIP's tokenizers make of a cleaned text: start, pieces, end, cut to 77 and padded with zeros."
    ids = [IDS["<|startoftext|>"]]
    for word in regex.findall(r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+", text):
        ids += [IDS[piece] for piece in merged("".join(BYTES[b] for b in word.encode()))]
    ids = [*ids, IDS["<|endoftext|>"]]
    if len(ids) > length:
        ids = [*ids[: length - 1], ids[-1]]
    return ids + [0] * (length - len(ids))


def hps_text(text):
    "The cleaning of open_clip's tokenizer, as hpsv2 1.2.0 brings it."
    text = html.unescape(html.unescape(ftfy.fix_text(text))).strip()
    return regex.sub(r"\s+", " ", text).strip().lower()


def clip_text(text):
    "The cleaning of transformers' CLIP tokenizer."
    text = regex.sub(r"\s+", " ", unicodedata.normalize("NFC", text))
    return "".join(letter.lower() for letter in text)


# --- tiny checkpoints in the authors' formats ---


def tokenizer():
    return transformers.CLIPTokenizer(vocab=IDS, merges=MERGES)


def write_clip(folder, act):
    "A random CLIP as transformers saves it: PickScore, and CLIP itself, are published so."
    small = dict(intermediate_size=40, num_hidden_layers=2, num_attention_heads=2, hidden_act=act)
    text = dict(
        small, hidden_size=24, vocab_size=len(IDS), bos_token_id=len(IDS) - 2, eos_token_id=2
    )  # 2, as published
    vision = dict(small, hidden_size=32, image_size=224, patch_size=56)
    model = transformers.CLIPModel(
        transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=20, logit_scale_init_value=4.6)
    )
    for name, weight in model.named_parameters():
        if name != "logit_scale":
            weight.data += 0.3 * torch.randn_like(weight) / weight.shape[-1] ** 0.5
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)


def open_clip_state(width=160, text_width=128, embed=20, patch=56, side=4, layers=(2, 2), mlp=3, words=None):
    "Random weights of a ViT under open_clip's names, with the head widths of ViT-H/14."
    state = {}

    def put(name, *shape, mean=0.0):
        state[name] = mean + 0.5 * torch.randn(shape) / shape[-1] ** 0.5

    put("visual.class_embedding", width)
    put("visual.positional_embedding", side**2 + 1, width)
    put("visual.conv1.weight", width, 3, patch, patch)
    put("visual.proj", width, embed)
    put("positional_embedding", 77, text_width)
    put("token_embedding.weight", words or len(IDS), text_width)
    put("text_projection", text_width, embed)
    state["token_embedding.weight"] *= 5
    state["logit_scale"] = torch.tensor(4.6)
    for prefix, w, depth in (("visual.", width, layers[0]), ("", text_width, layers[1])):
        for block in (f"{prefix}transformer.resblocks.{k}." for k in range(depth)):
            put(block + "attn.in_proj_weight", 3 * w, w)
            put(block + "attn.in_proj_bias", 3 * w)
            for name, rows, columns in (("attn.out_proj", w, w), ("mlp.c_fc", mlp * w, w), ("mlp.c_proj", w, mlp * w)):
                put(f"{block}{name}.weight", rows, columns)
                put(f"{block}{name}.bias", rows)
            for name in ("ln_1", "ln_2"):
                put(f"{block}{name}.weight", w, mean=1.0)
                put(f"{block}{name}.bias", w)
    for name, w in (("visual.ln_pre", width), ("visual.ln_post", width), ("ln_final", text_width)):
        put(f"{name}.weight", w, mean=1.0)
        put(f"{name}.bias", w)
    return state


class Head(nn.Module):
    "The predictor of LAION's simple_inference.py."

    def __init__(self, width):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(width, 1024),
            nn.Dropout(0.2),
            nn.Linear(1024, 128),
            nn.Dropout(0.2),
            nn.Linear(128, 64),
            nn.Dropout(0.1),
            nn.Linear(64, 16),
            nn.Linear(16, 1),
        )


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    "One folder for each published thing."
    torch.manual_seed(0)
    root = tmp_path_factory.mktemp("judges")
    write_clip(root / "clip", "quick_gelu")
    write_clip(root / "pick", "gelu")
    (root / "hps").mkdir()
    torch.save({"epoch": 3, "state_dict": open_clip_state()}, root / "hps" / "HPS_v2.1_compressed.pt")
    tokenizer().save_pretrained(root / "hps")
    head = {name: 2 * weight for name, weight in Head(20).state_dict().items()}
    torch.save(head, root / "clip" / "sac+logos+ava1-l14-linearMSE.pth")
    return root


@pytest.fixture(scope="module")
def judges(folders):
    return dict(
        clip=CLIPScore(folders / "clip"),
        pickscore=PickScore(folders / "pick"),
        hps=HPSv21(folders / "hps"),
        aesthetic=Aesthetic(folders / "clip"),
        compressibility=Compressibility(),
    )


JUDGES = ["clip", "pickscore", "hps", "aesthetic", "compressibility"]


# --- the authors' own scoring, written again ---


def model_card_score(folder, picture, prompt):
    "PickScore's model card, with the processor of its time, which drops the alpha channel."
    model = transformers.AutoModel.from_pretrained(folder).eval()
    opaque = Image.fromarray(np.array(picture.convert("RGB")))
    images = CLIPImageProcessorPil()(opaque, return_tensors="pt")
    text = transformers.AutoTokenizer.from_pretrained(folder)(
        prompt, padding=True, truncation=True, max_length=77, return_tensors="pt"
    )
    with torch.no_grad():
        image_embs = model.get_image_features(**images).pooler_output
        image_embs = image_embs / torch.norm(image_embs, dim=-1, keepdim=True)
        text_embs = model.get_text_features(**text).pooler_output
        text_embs = text_embs / torch.norm(text_embs, dim=-1, keepdim=True)
    cosine = (text_embs @ image_embs.T)[0, 0]
    return (model.logit_scale.exp() * cosine).item()


def attention_block(state, prefix, x, heads, mask):
    "open_clip's residual attention block, one head at a time."

    def norm(name, x):
        return F.layer_norm(x, x.shape[-1:], state[f"{prefix}{name}.weight"], state[f"{prefix}{name}.bias"])

    def linear(name, x):
        return x @ state[f"{prefix}{name}.weight"].T + state[f"{prefix}{name}.bias"]

    width = x.shape[-1] // heads
    qkv = norm("ln_1", x) @ state[f"{prefix}attn.in_proj_weight"].T + state[f"{prefix}attn.in_proj_bias"]
    out = []
    for h in range(heads):
        q, k, v = (part[:, h * width : (h + 1) * width] for part in qkv.split(x.shape[-1], -1))
        out.append(torch.softmax(q @ k.T / math.sqrt(width) + mask, -1) @ v)
    x = x + linear("attn.out_proj", torch.cat(out, -1))
    return x + linear("mlp.c_proj", F.gelu(linear("mlp.c_fc", norm("ln_2", x))))


def open_clip_image(state, pixels, layers=2):
    width, _, patch, _ = state["visual.conv1.weight"].shape
    x = F.conv2d(pixels[None], state["visual.conv1.weight"], stride=patch)[0].flatten(1).T
    x = torch.cat([state["visual.class_embedding"][None], x]) + state["visual.positional_embedding"]
    x = F.layer_norm(x, (width,), state["visual.ln_pre.weight"], state["visual.ln_pre.bias"])
    for k in range(layers):
        x = attention_block(state, f"visual.transformer.resblocks.{k}.", x, width // 80, 0.0)
    return (
        F.layer_norm(x[0], (width,), state["visual.ln_post.weight"], state["visual.ln_post.bias"])
        @ state["visual.proj"]
    )


def open_clip_text(state, ids, layers=2):
    ids = torch.tensor(ids)
    x = state["token_embedding.weight"][ids] + state["positional_embedding"]
    mask = torch.full((77, 77), -math.inf).triu(1)
    for k in range(layers):
        x = attention_block(state, f"transformer.resblocks.{k}.", x, x.shape[-1] // 64, mask)
    x = F.layer_norm(x, x.shape[-1:], state["ln_final.weight"], state["ln_final.bias"])
    return x[ids.argmax()] @ state["text_projection"]


def normalised(pixels):
    return (pixels - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]


def hps_pixels(picture, size=224):
    "hpsv2's transform: floats, the longest side to `size`, black around it; resized by Pillow, channel by channel."
    channels = np.float32(picture.convert("RGB")).transpose(2, 0, 1) / 255
    height, width = channels.shape[1:]
    scale = size / float(max(height, width))
    if scale != 1.0:
        new = round(height * scale), round(width * scale)
        resized = [Image.fromarray(c).resize(new[::-1], Image.Resampling.BICUBIC) for c in channels]
        pad_h, pad_w = size - new[0], size - new[1]
        sides = ((pad_h // 2, pad_h - pad_h // 2), (pad_w // 2, pad_w - pad_w // 2))
        channels = np.stack([np.pad(np.array(c), sides) for c in resized])
    return normalised(torch.from_numpy(channels))


def hps_score(state, picture, prompt):
    "hpsv2's img_score.py in float32: the cosine, without a scale."
    with torch.no_grad():
        image = F.normalize(open_clip_image(state, hps_pixels(picture)), dim=-1)
        text = F.normalize(open_clip_text(state, ids_of(hps_text(prompt))), dim=-1)
    return (image @ text).item()


def openai_pixels(picture, size=224):
    "The transform of OpenAI's clip, which resizes and crops in the picture's own mode."
    width, height = picture.size
    if width <= height:
        picture = picture.resize((size, int(size * height / width)), Image.Resampling.BICUBIC)
    else:
        picture = picture.resize((int(size * width / height), size), Image.Resampling.BICUBIC)
    width, height = picture.size
    top, left = int(round((height - size) / 2.0)), int(round((width - size) / 2.0))
    picture = picture.crop((left, top, left + size, top + size)).convert("RGB")
    return normalised(torch.from_numpy(np.array(picture).astype(np.float32) / 255).permute(2, 0, 1))


def clip_score(folder, picture, prompt):
    "100 cosines with OpenAI's clip: its transform, and its tokenizer, which cleans as open_clip's does."
    model, ids = transformers.CLIPModel.from_pretrained(folder).eval(), ids_of(hps_text(prompt))
    length = ids.index(IDS["<|endoftext|>"]) + 1  # what follows the end is not seen
    with torch.no_grad():
        image = model.get_image_features(openai_pixels(picture)[None]).pooler_output[0]
        text = model.get_text_features(torch.tensor([ids[:length]])).pooler_output[0]
    return 100 * F.cosine_similarity(image, text, dim=0).item()


def aesthetic_score(folder, picture):
    "LAION's simple_inference.py."
    clip = transformers.CLIPModel.from_pretrained(folder).eval()
    head = Head(20)
    head.load_state_dict(torch.load(folder / "sac+logos+ava1-l14-linearMSE.pth"))
    head.eval()
    with torch.no_grad():
        features = clip.get_image_features(openai_pixels(picture)[None]).pooler_output.numpy()
        lengths = np.linalg.norm(features, 2, -1, keepdims=True)
        lengths[lengths == 0] = 1
        return head.layers(torch.from_numpy(features / lengths)).item()


def assert_close(found, expected):
    assert found.dtype == torch.float32 and found.device.type == "cpu" and found.isfinite().all()
    assert found.std() > 1e-3  # the pictures are told apart
    assert (found - torch.tensor(expected)).abs().max() < 1e-5, found - torch.tensor(expected)


def test_pickscore_is_the_model_cards(folders, judges):
    expected = [model_card_score(folders / "pick", *pair) for pair in zip(LISTED, ASKED)]
    assert_close(judges["pickscore"](LISTED, ASKED) / 99.5, [e / 99.5 for e in expected])
    assert judges["pickscore"].factor == pytest.approx(math.exp(4.6), rel=1e-6)


def test_clip_score_is_a_hundred_cosines(folders, judges):
    expected = [clip_score(folders / "clip", *pair) for pair in zip(LISTED, ASKED)]
    assert_close(judges["clip"](LISTED, ASKED) / 100, [score / 100 for score in expected])


def test_hps_is_the_authors_loop(folders, judges):
    "But for the column: where the result is one pixel wide, torch's antialiased resizing on the CPU is plainly wrong."
    state = torch.load(folders / "hps" / "HPS_v2.1_compressed.pt")["state_dict"]
    cases = [pair for pair in zip(LISTED, ASKED) if pair[0] is not PICTURES["column"]]
    assert_close(judges["hps"](*zip(*cases)), [hps_score(state, *case) for case in cases])
    assert len(cases) == COUNT - 1 and judges["hps"]([PICTURES["column"]], ["a"]).isfinite()


def test_aesthetic_is_the_authors_loop(folders, judges):
    assert_close(judges["aesthetic"](LISTED, ASKED), [aesthetic_score(folders / "clip", picture) for picture in LISTED])


@pytest.mark.parametrize("prompt", PROMPTS, ids=range(len(PROMPTS)))
def test_tokens_are_the_authors(judges, prompt):
    "Also exactly, since a random network may not mind one token."
    for name, clean in (("hps", hps_text), ("clip", hps_text), ("pickscore", clip_text)):
        judge = judges[name]
        found = judge.tokenizer(judge.clean(prompt), truncation=True, max_length=77).input_ids
        expected = ids_of(clean(prompt))
        assert found + [0] * (77 - len(found)) == expected
    assert len(judges["hps"].tokenizer(PROMPTS[5], truncation=True, max_length=77).input_ids) == 77
    assert len(ids_of(hps_text(PROMPTS[5]), 10**6)) > 77


def test_prompts_differ_by_what_they_mean(judges):
    "Entities, broken encodings, quotes and capitals make no difference to HPS; words do."
    same = ["\u201cSch\u00f6n\u201d &amp;amp; red", '"sch\u00f6n" & RED', '  "sch\u00c3\u00b6n"\n &amp; red ']
    scores = judges["hps"]([PICTURES["odd"]] * 4, [*same, '"sch\u00f6n" and red'])
    # Rows of one product of matrices, which may be computed in different ways: rounding of cosines.
    assert (scores[:3] - scores[0]).abs().max() < 1e-5 < 1e-3 < (scores[3] - scores[0]).abs()


# --- what goes in and comes out ---


@pytest.mark.parametrize("name", JUDGES)
def test_a_tensor_and_its_file_score_the_same(judges, name):
    images = torch.rand(3, 3, 37, 61)
    files = []
    for image in images:
        pixels = (image * 255).round().byte().permute(1, 2, 0).numpy()
        Image.fromarray(pixels).save(file := io.BytesIO(), "PNG")
        files.append(Image.open(file))
    expected = judges[name](files, PROMPTS[:3])
    for given in (images, images.double(), images.to(memory_format=torch.channels_last), images.requires_grad_()):
        found = judges[name](given, PROMPTS[:3])
        assert torch.equal(found, expected) and not found.requires_grad


@pytest.mark.parametrize("name", JUDGES)
def test_pictures_are_judged_one_by_one(judges, name):
    "Neither the others in the batch nor the size of the batch matters; nothing global changes."
    state = torch.get_rng_state()
    judge, together = judges[name], judges[name](LISTED, ASKED)
    alone = torch.cat([judge([picture], [prompt]) for picture, prompt in zip(LISTED, ASKED)])
    assert (together - alone).abs().max() < 1e-4
    order = list(reversed(range(COUNT)))
    back = judge([LISTED[k] for k in order], [ASKED[k] for k in order])
    assert (back.flip(0) - together).abs().max() < 1e-4
    assert torch.equal(judge(LISTED, ASKED), together) and torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    "kind, folder", [(CLIPScore, "clip"), (PickScore, "pick"), (HPSv21, "hps"), (Aesthetic, "clip")]
)
def test_batches_and_precision(folders, kind, folder):
    whole = kind(folders / folder)(*FEW)
    assert (kind(folders / folder, batch=2)(*FEW) - whole).abs().max() < 1e-4
    half = kind(folders / folder, dtype=torch.bfloat16)
    assert {weight.dtype for weight in half.model.parameters()} == {torch.bfloat16}
    found = half(*FEW)
    assert found.dtype == torch.float32 and torch.allclose(found, whole, atol=0.1 * whole.abs().max().item())
    assert not half.model.training and not any(weight.requires_grad for weight in half.model.parameters())


def test_rounding_is_that_of_a_saved_picture():
    values = torch.tensor([0.0, 0.4, 0.6, 1.0, 127.4, 254.6, 255.0]) / 255
    (picture,) = to_pictures(values.expand(1, 3, 1, 7))
    assert np.array(picture)[0, :, 0].tolist() == [0, 0, 1, 1, 127, 255, 255]


def test_wide_picture_that_fits_is_padded(judges):
    "hpsv2 leaves a picture alone whose longer side is right already, and then its network fails."
    pixels = library.padded_view(Image.fromarray(noise(10, 28, 3)), 28)
    assert pixels.shape == (3, 28, 28)
    assert torch.equal(pixels[:, 9:19], torch.from_numpy(noise(10, 28, 3)).permute(2, 0, 1) / 255)
    assert pixels[:, :9].abs().max() == pixels[:, 19:].abs().max() == 0
    thin = library.padded_view(Image.fromarray(noise(1, 3000, 3)), 28)
    assert thin.shape == (3, 28, 28) and judges["hps"]([Image.fromarray(noise(1, 3000, 3))], ["a"]).isfinite()


def test_compressibility_is_the_size_of_the_file(tmp_path):
    for quality in (95, 30):
        expected = []
        for name, picture in PICTURES.items():
            picture.convert("RGB").save(tmp_path / f"{name}.jpg", format="JPEG", quality=quality)
            expected.append(-(tmp_path / f"{name}.jpg").stat().st_size / 1000)
        assert torch.equal(Compressibility(quality)(LISTED, ASKED), torch.tensor(expected))
    assert torch.equal(Compressibility()(LISTED, ASKED), Compressibility(95)(LISTED, ASKED))


class Lazy(Reward):
    def __init__(self, scores):
        self.scores = scores

    def score(self, pictures, prompts):
        return self.scores


@pytest.mark.parametrize("scores", [[1.0], [1.0, math.nan], [math.inf, 1.0], [[1.0, 2.0]], [1e39, 1.0], 3.0])
def test_wrong_scores_are_refused(scores):
    with pytest.raises(ValueError, match="rewards must be"):
        Lazy(scores)(LISTED[:2], PROMPTS[:2])


# --- opening ---


def test_missing_things_are_named(folders, tmp_path):
    (tmp_path / "empty").mkdir()
    missing = [
        (lambda: HPSv21(tmp_path / "empty"), "HPS_v2.1_compressed.pt", "hf download xswu/HPSv2 HPS_v2.1_compressed.pt"),
        (lambda: HPSv21(tmp_path / "no.pt"), "HPS_v2.1_compressed.pt", str(tmp_path / "no.pt")),
        (lambda: PickScore(tmp_path / "empty"), "CLIP model", "hf download yuvalkirstain/PickScore_v1"),
        (lambda: CLIPScore(tmp_path / "none"), str(tmp_path / "none"), "hf download openai/clip-vit-large-patch14"),
        (lambda: Aesthetic(folders / "pick"), "sac+logos+ava1-l14-linearMSE.pth", "improved-aesthetic-predictor"),
    ]
    for call, *fragments in missing:
        with pytest.raises(ValueError) as error:
            call()
        message = str(error.value)
        assert message.startswith("source must hold") and all(f in message for f in fragments), message
        assert "\n" not in message and len(message) < 700


def test_the_cache_is_asked_before_the_hub(monkeypatch):
    asked = []

    def cached_file(source, file, local_files_only):
        asked.append((source, file, local_files_only))
        raise OSError("no connection\nto the hub")

    monkeypatch.setattr(transformers.utils, "cached_file", cached_file)
    with pytest.raises(ValueError) as error:
        HPSv21()
    assert asked == [("xswu/HPSv2", "HPS_v2.1_compressed.pt", offline) for offline in (True, False)]
    message = str(error.value)
    assert "'xswu/HPSv2'" in message and "cache" in message and "no connection to the hub" in message


@pytest.mark.parametrize("kind, folder", [(PickScore, "pick"), (HPSv21, "hps"), (CLIPScore, "clip")])
def test_tokenizer_comes_from_the_hub_where_the_folder_has_none(folders, tmp_path, monkeypatch, kind, folder):
    for file in (folders / folder).iterdir():
        if "tokenizer" not in file.name:
            (tmp_path / file.name).symlink_to(file)
    asked = []

    def from_pretrained(source, local_files_only):
        asked.append((source, local_files_only))
        return tokenizer()

    monkeypatch.setattr(transformers.CLIPTokenizer, "from_pretrained", from_pretrained)
    found = kind(tmp_path)(*FEW)
    assert asked == [(kind.TOKENIZER, True)]
    monkeypatch.undo()
    assert torch.equal(found, kind(folders / folder)(*FEW))


@pytest.mark.parametrize("kind, folder", [(PickScore, "pick"), (HPSv21, "hps"), (CLIPScore, "clip")])
def test_a_tokenizer_without_files_is_refused(folders, tmp_path, monkeypatch, kind, folder):
    "Where none is found, transformers makes one that knows two tokens: every prompt would be the same."
    for file in (folders / folder).iterdir():
        if "tokenizer" not in file.name:
            (tmp_path / file.name).symlink_to(file)
    empty, asked = transformers.CLIPTokenizer(), []
    assert len(empty) == 2

    def from_pretrained(source, local_files_only):
        asked.append((source, local_files_only))
        return empty

    monkeypatch.setattr(transformers.CLIPTokenizer, "from_pretrained", from_pretrained)
    with pytest.raises(ValueError, match="a CLIP tokenizer.*2 of .* tokens"):
        kind(tmp_path)
    assert asked == [(kind.TOKENIZER, offline) for offline in (True, False)]


@pytest.mark.parametrize("named, wanted", [(None, ["their/clip"]), ("some/clip", ["some/clip", "their/clip"])])
def test_a_name_on_the_hub_is_asked_for_its_tokenizer_but_not_that_of_the_authors(folders, monkeypatch, named, wanted):
    "The authors' repositories hold weights alone."
    asked = []

    def from_pretrained(source, local_files_only):
        asked.append(source)
        if source != "their/clip":
            raise OSError("no such file")
        return tokenizer()

    model = PickScore(folders / "pick").model
    monkeypatch.setattr(PickScore, "HUB", "their/judge")
    monkeypatch.setattr(PickScore, "TOKENIZER", "their/clip")
    monkeypatch.setattr(PickScore, "load", lambda self, source, offline: model)
    monkeypatch.setattr(transformers.CLIPTokenizer, "from_pretrained", from_pretrained)
    PickScore(named)
    assert [*dict.fromkeys(asked)] == wanted


def test_files_can_be_named_themselves(folders, judges, monkeypatch):
    assert torch.equal(HPSv21(folders / "hps" / HPSv21.FILE)(*FEW), judges["hps"](*FEW))
    head = folders / "clip" / Aesthetic.HEAD
    monkeypatch.setattr(Aesthetic, "HUB", str(folders / "clip"))
    for judge in (Aesthetic(head), Aesthetic(folders / "clip", head=head), Aesthetic(head=folders / "clip")):
        assert torch.equal(judge(*FEW), judges["aesthetic"](*FEW))
    monkeypatch.chdir(folders / "clip")
    assert torch.equal(Aesthetic()(*FEW), judges["aesthetic"](*FEW))


def damaged(folders, folder, change):
    state = torch.load(folders / "hps" / HPSv21.FILE)["state_dict"]
    change(state)
    torch.save({"state_dict": state}, folder / HPSv21.FILE)
    tokenizer().save_pretrained(folder)
    return folder


def test_incomplete_weights_are_refused(folders, tmp_path):
    "transformers would fill the gaps with random numbers."
    name = "visual.transformer.resblocks.1.ln_2.bias"
    changes = dict(
        lost=lambda s: s.pop(name),
        new=lambda s: s.update(extra=torch.zeros(2)),
        short=lambda s: s.update({name: s[name][:5]}),
        empty=lambda s: s.clear(),
    )
    for kind, change in changes.items():
        (tmp_path / kind).mkdir()
        with pytest.raises(ValueError, match="source must"):
            HPSv21(damaged(folders, tmp_path / kind, change))
    weights = load((folders / "pick" / "model.safetensors").read_bytes())
    weights.pop("visual_projection.weight")
    (tmp_path / "config.json").write_bytes((folders / "pick" / "config.json").read_bytes())
    (tmp_path / "model.safetensors").write_bytes(save(weights, {"format": "pt"}))
    tokenizer().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="visual_projection"):
        PickScore(tmp_path)


class Trap:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("write", [torch.save, lambda thing, path: path.write_bytes(pickle.dumps(thing))])
def test_no_code_is_run_from_a_checkpoint(tmp_path, folders, write):
    write({"state_dict": Trap(tmp_path / "sprung")}, tmp_path / HPSv21.FILE)
    with pytest.raises(ValueError, match="source must hold"):
        HPSv21(tmp_path)
    write({"layers.0.weight": Trap(tmp_path / "sprung")}, tmp_path / Aesthetic.HEAD)
    with pytest.raises(ValueError, match="source must hold"):
        Aesthetic(folders / "clip", head=tmp_path)
    assert not (tmp_path / "sprung").exists()


def test_older_files_of_torch_are_read(folders, judges, tmp_path):
    state = torch.load(folders / "clip" / Aesthetic.HEAD)
    torch.save(state, tmp_path / Aesthetic.HEAD, _use_new_zipfile_serialization=False)
    found = Aesthetic(folders / "clip", head=tmp_path)(*FEW)
    assert torch.equal(found, judges["aesthetic"](*FEW))


def test_head_of_another_width_is_refused(folders, tmp_path):
    torch.save(Head(21).state_dict(), tmp_path / Aesthetic.HEAD)
    with pytest.raises(ValueError, match="head must be one for CLIP's 20"):
        Aesthetic(folders / "clip", head=tmp_path)


def test_without_ftfy(folders, monkeypatch):
    monkeypatch.setitem(sys.modules, "ftfy", None)
    with pytest.raises(ImportError, match=re.escape("pip install 'neighbor_grpo[rewards]'")):
        HPSv21(folders / "hps")


def test_opening_is_silent(folders, capfd):
    HPSv21(folders / "hps"), PickScore(folders / "pick")
    printed = capfd.readouterr()
    assert printed.out == printed.err == ""


def test_the_published_size_fits():
    "Weights of ViT-H/14, without numbers: the configuration of open_clip's ViT-H-14.json, and a place for each."
    with torch.device("meta"):
        state = open_clip_state(1280, 1024, 1024, 14, 16, (32, 24), 4, 49408)
        config = library.open_clip_config(state)
        model = transformers.CLIPModel(config)
    vision, text = config.vision_config, config.text_config
    assert (vision.num_attention_heads, vision.num_hidden_layers, vision.intermediate_size) == (16, 32, 5120)
    assert (vision.image_size, vision.patch_size, vision.hidden_act) == (224, 14, "gelu")
    assert (text.num_attention_heads, text.num_hidden_layers, text.intermediate_size) == (16, 24, 4096)
    assert (text.max_position_embeddings, text.eos_token_id, text.hidden_act) == (77, 49407, "gelu")
    assert config.projection_dim == 1024 and sum(weight.numel() for weight in state.values()) == 986_109_441
    renamed = {name: weight.shape for name, weight in library.from_open_clip(state).items()}
    assert renamed == {name: weight.shape for name, weight in model.state_dict().items()}


# --- several ---


def test_a_list_of_rewards():
    text = "hps, 0.5*pickscore@some/folder ,-1e-2*clip,remote@http://judge:8000/a?b=c*d@e"
    assert parse_rewards(text) == [
        (1.0, "hps", None),
        (0.5, "pickscore", "some/folder"),
        (-0.01, "clip", None),
        (1.0, "remote", "http://judge:8000/a?b=c*d@e"),
    ]


def test_opened_with_their_sources(folders, judges):
    spec = f"0.25*hps@{folders}/hps,aesthetic@{folders}/clip,-2*compressibility,remote@http://judge:1"
    (*local, remote), weights = make_rewards(spec, dtype=torch.float64)
    assert [type(reward) for reward in local] == [HPSv21, Aesthetic, Compressibility] and remote.url == "http://judge:1"
    assert weights == [0.25, 1.0, -2.0, 1.0]
    assert local[0].model.dtype == local[1].model.dtype == torch.float64
    assert (local[0](*FEW) - judges["hps"](*FEW)).abs().max() < 1e-5


def test_together(judges):
    three, weights = [judges["hps"], judges["compressibility"], judges["pickscore"]], [1.0, 0.5, -0.2]
    columns = Rewards(three, weights)(LISTED[:4], ASKED[:4])
    assert torch.equal(columns, torch.stack([judge(LISTED[:4], ASKED[:4]) for judge in three], 1))
    total = Rewards(three, weights, total=True)(LISTED[:4], ASKED[:4])
    expected = combine_rewards(columns[None], weights, check_rewards)[0]
    assert total.shape == (4,) and torch.allclose(total, expected)
    assert Rewards(three).weights == [1 / 3] * 3
    single = Rewards([judges["compressibility"]], [-1.0])
    assert torch.equal(single(LISTED, ASKED), -judges["compressibility"](LISTED, ASKED))


# --- somewhere else ---


class Brightness(Reward):
    "A judge that also looks at the prompt, in numbers that need all bits of a float32."

    def score(self, pictures, prompts):
        return [np.array(i.convert("RGB")).mean() / 77 + len(p) / 3 for i, p in zip(pictures, prompts)]


brightness = Brightness()


def test_a_request_arrives_as_it_was_sent():
    pictures, prompts, _, request = unpack_request(pack_request(LISTED, ASKED, "7"))
    assert prompts == ASKED and request == "7"
    for sent, arrived in zip(LISTED, pictures):
        assert (np.array(sent.convert("RGB")) == np.array(arrived)).all()


def test_remote_equals_local(judges):
    images = torch.rand(5, 3, 20, 24)
    for judge in (brightness, judges["hps"], judges["compressibility"]):
        with RewardServer(judge) as server:
            remote = RemoteReward(server.url)
            for given, prompts in ((images, PROMPTS[:5]), (LISTED[:6], PROMPTS[:6])):
                rounding = 1e-5 if judge is judges["hps"] else 0  # a thread may share its products with others
                assert (remote(given, prompts) - judge(given, prompts)).abs().max() <= rounding


class FaultyServer(ThreadingHTTPServer):
    "Commits one fault after another, and then answers properly."

    daemon_threads = True

    def __init__(self, faults):
        super().__init__(("127.0.0.1", 0), FaultyHandler)
        self.faults, self.proper, self.seen = list(faults), RewardServer(brightness), []
        self.url = f"http://127.0.0.1:{self.server_port:d}"
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.shutdown()
        self.server_close()
        self.proper.close()

    def handle_error(self, *_):
        pass


def changed(content, **more):
    return json.dumps(content | more).encode()


FAULTS = {
    "hangs up": None,
    "is slow": 1.0,
    "is busy": (503, lambda c: b"busy"),
    "has too many": (429, lambda c: b""),
    "sends elsewhere": (302, lambda c: b""),
    "accepts": (202, lambda c: changed(c)),
    "says nothing": (200, lambda c: b""),
    "says null": (200, lambda c: b"null"),
    "says a list": (200, lambda c: b"[1, 2, 3]"),
    "talks HTML": (200, lambda c: b"<html>hello</html>"),
    "stops in the middle": (200, lambda c: changed(c)[:-9]),
    "promises more": (200, lambda c: changed(c), 7),
    "answers another": (200, lambda c: changed(c, request="another")),
    "leaves out the number": (200, lambda c: changed({"rewards": c["rewards"]})),
    "leaves out the rewards": (200, lambda c: changed({"request": c["request"]})),
    "one too few": (200, lambda c: changed(c, rewards=c["rewards"][1:])),
    "one too many": (200, lambda c: changed(c, rewards=c["rewards"] * 2)),
    "none": (200, lambda c: changed(c, rewards=[])),
    "a number": (200, lambda c: changed(c, rewards=3.0)),
    "nested": (200, lambda c: changed(c, rewards=[[r] for r in c["rewards"]])),
    "not a number": (200, lambda c: changed(c, rewards=[math.nan] * len(c["rewards"]))),
    "too large": (200, lambda c: changed(c, rewards=[1e300] * len(c["rewards"]))),
    "far too large": (200, lambda c: changed(c, rewards=[10**400] * len(c["rewards"]))),
    "letters": (200, lambda c: changed(c, rewards=["1.0"] * len(c["rewards"]))),
    "truths": (200, lambda c: changed(c, rewards=[True] * len(c["rewards"]))),
    "gaps": (200, lambda c: changed(c, rewards=[None] * len(c["rewards"]))),
    "bytes": (200, lambda c: b"\xff\xfe\x00"),
    "depths": (200, lambda c: b"[" * 10**5),
}


class FaultyHandler(BaseHTTPRequestHandler):
    def do_POST(self):
        status, content = self.server.proper.answer(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.seen.append(content.get("request"))
        fault = self.server.faults.pop(0) if self.server.faults else (status, changed)
        if fault is None:
            return self.connection.shutdown(socket.SHUT_RDWR)
        if isinstance(fault, float):
            time.sleep(fault)
            fault = (status, changed)
        status, distort, *missing = fault
        body = distort(content)
        self.send_response(status)
        self.send_header("Content-Length", str(len(body) + sum(missing)))
        self.send_header("Location", "/elsewhere")
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


@pytest.mark.parametrize("fault", FAULTS)
def test_every_fault_is_tried_again(fault):
    images = torch.rand(3, 3, 8, 8)
    with FaultyServer([FAULTS[fault]]) as server:
        found = RemoteReward(server.url, timeout=0.4, patience=20)(images, PROMPTS[:3])
        assert torch.equal(found, brightness(images, PROMPTS[:3]))
        assert len(server.seen) == 2 and server.seen[0] == server.seen[1]
    with FaultyServer([FAULTS[fault]] * 50) as server:
        with pytest.raises(RuntimeError, match=f"no reward from {server.url} in 0.2 s: "):
            RemoteReward(server.url, timeout=0.1, patience=0.2)(images, PROMPTS[:3])


def test_refused_connections_are_tried_again():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    remote, images = RemoteReward(f"http://127.0.0.1:{port:d}", patience=20), torch.rand(2, 3, 8, 8)
    servers = []
    start = threading.Timer(0.5, lambda: servers.append(RewardServer(brightness, port=port).__enter__()))
    start.start()
    assert torch.equal(remote(images, PROMPTS[:2]), brightness(images, PROMPTS[:2]))
    servers[0].__exit__()


def test_a_wrong_request_is_not_repeated():
    images = torch.rand(2, 3, 8, 8)
    for status in (400, 401, 404, 413):
        with FaultyServer([(status, lambda c: b"that is\nnot right")] * 3) as server:
            with pytest.raises(RuntimeError, match=f"status {status}: that is not right"):
                RemoteReward(server.url)(images, PROMPTS[:2])
            assert len(server.seen) == 1
    with RewardServer(brightness, limit=1000) as server:
        with pytest.raises(RuntimeError, match="413.*1000 bytes"):
            RemoteReward(server.url)(torch.rand(2, 3, 900, 900), PROMPTS[:2])


def test_a_slow_judge_is_asked_once():
    "The second attempt waits for what the first one started, and does not start again."
    calls, images = [], torch.rand(2, 3, 8, 8)

    def slow(pictures, prompts):
        calls.append(len(pictures))
        time.sleep(0.8)
        return brightness(pictures, prompts)

    with RewardServer(slow) as server:
        found = RemoteReward(server.url, timeout=0.3, patience=20)(images, PROMPTS[:2])
        assert torch.equal(found, brightness(images, PROMPTS[:2])) and calls == [2]
        RemoteReward(server.url, timeout=5)(images, PROMPTS[:2])  # another request, with another number
        assert calls == [2, 2]


def test_one_request_at_a_time():
    busy, images = [], torch.rand(2, 3, 8, 8)

    def judge(pictures, prompts):
        busy.append(1)
        alone = len(busy) == 1
        time.sleep(0.05)
        busy.pop()
        return [1.0 if alone else -1.0] * len(pictures)

    with RewardServer(judge) as server:
        found = []
        threads = [
            threading.Thread(target=lambda: found.append(RemoteReward(server.url)(images, PROMPTS[:2])))
            for _ in range(6)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(found) == 6 and torch.stack(found).min() == 1


@pytest.mark.parametrize(
    "judge, line",
    [
        (lambda pictures, prompts: 1 / 0, "ZeroDivisionError: division by zero"),
        (
            lambda pictures, prompts: [math.nan] * len(pictures),
            "rewards must be finite, got '[nan, nan] among 2 values'",
        ),
        (lambda pictures, prompts: [1.0], "rewards must be of shape (2,)"),
    ],
)
def test_errors_of_the_judge_come_back(judge, line):
    with RewardServer(judge) as server:
        with pytest.raises(RuntimeError, match="status 500: .*" + re.escape(line)):
            RemoteReward(server.url, patience=0.01)(LISTED[:2], PROMPTS[:2])


def test_the_server_survives_strangers():
    with RewardServer(brightness) as server:
        packed = pack_request(LISTED[:2], PROMPTS[:3], "1"), pack_request([], [], "1")
        for body in (b"", b"hello", pickle.dumps("hello"), *packed):
            status, content = server.answer(body)
            assert status == 400 and list(content) == ["error"] and "\n" not in content["error"]
        floats = save({"0": torch.rand(4, 4, 3)}, dict(prompts='["a"]', request="1"))
        assert server.answer(floats)[0] == 400
        session = httpx2.Client(trust_env=False)
        assert session.post(server.url, content=b"hello", timeout=5).status_code == 400
        assert session.get(server.url + "/elsewhere", timeout=5).status_code == 501
        assert session.post(server.url, content=iter([b"a"]), timeout=5).status_code == 411
        assert server.socket.getsockname()[0] == "127.0.0.1"
        assert RemoteReward(server.url)(LISTED[:2], PROMPTS[:2]).shape == (2,)


# --- training on it ---


class PaintTask:
    "Eight by eight pixels, judged as pictures."

    shape, prompts = (3, 8, 8), 3

    def __init__(self, judge):
        self.policy, self.judge = PointwiseVelocity(), judge

    def conditions(self, prompts):
        return None

    def reward(self, samples, prompts):
        return self.judge((0.5 + samples / 4).clamp(0, 1), [PROMPTS[k] for k in prompts.tolist()])

    def evaluate(self, velocity):
        return {"reward": velocity.scales.sum().item()}


def train(judge, folder, callback=None, resume=False):
    settings = TrainSettings(iterations=8, groups=2, lr=0.05, eval_every=4, checkpoint_every=4)
    algorithm = NeighborGRPO(group_size=4, steps=4, trained_steps=2, anchors=2)
    return Trainer(PaintTask(judge), algorithm, settings, folder, resume=resume).run(progress=False, callback=callback)


def test_training_through_faults_is_bit_identical(tmp_path):
    train(brightness, tmp_path / "home")
    faults = [fault for fault in FAULTS.values() for fault in (fault, (200, changed))][: 2 * len(FAULTS)]
    with FaultyServer(faults) as server:
        train(RemoteReward(server.url, timeout=0.4, patience=60), tmp_path / "away")
        assert len(server.seen) > 8
    assert_same_outcome(tmp_path / "away", tmp_path / "home")


SERVE = """
import sys
from neighbor_grpo.rewards.programs import Compressibility
from neighbor_grpo.rewards.remote import RewardServer
assert "transformers" not in sys.modules  # may be another version there, or none
server = RewardServer(Compressibility(), port=int(sys.argv[1]))
print(server.server_port, flush=True)
server.serve_forever()
"""


def start_server(port=0):
    return subprocess.Popen([sys.executable, "-c", SERVE, str(port)], stdout=subprocess.PIPE, text=True)


def test_training_while_the_server_is_killed_is_bit_identical(tmp_path, root, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(root))
    process = start_server()
    train(Compressibility(), tmp_path / "home")
    port, running = int(process.stdout.readline()), [process]

    def kill(trainer):
        if trainer.iteration == 3:
            running[0].kill()
            running[0].wait()
            running.append(start_server(port))

    try:
        train(RemoteReward(f"http://127.0.0.1:{port:d}", patience=120), tmp_path / "away", kill)
    finally:
        for process in running:
            process.kill()
            process.communicate()
    assert_same_outcome(tmp_path / "away", tmp_path / "home")


def test_a_run_that_gave_up_can_go_on(tmp_path):
    "The judge stays away longer than patience: the run stops with one error, and later ends as if nothing had been."
    train(brightness, tmp_path / "home")
    server = RewardServer(brightness)
    with server:
        judge = RemoteReward(server.url, timeout=1, patience=0.3)
        stop = lambda trainer: server.__exit__() if trainer.iteration == 5 else None
        with pytest.raises(RuntimeError, match="no reward from"):
            train(judge, tmp_path / "away", stop)
    assert len((tmp_path / "away" / "metrics.jsonl").read_text().splitlines()) == 5
    with RewardServer(brightness) as again:
        trainer = train(RemoteReward(again.url), tmp_path / "away", resume=True)
    assert trainer.iteration == 8
    assert_same_outcome(tmp_path / "away", tmp_path / "home")
