"""What judges are given: sources, pictures of more than 8 bits, prompts to clean, and names of their own."""

import ftfy
import numpy as np
import pytest
import torch
import transformers
from PIL import Image

from neighbor_grpo.rewards import judges as library
from neighbor_grpo.rewards.judges import CLIPScore, HPSv21, PickScore, reward_names
from neighbor_grpo.rewards.programs import Compressibility, to_pictures
from neighbor_grpo.rewards.remote import RemoteReward, RewardServer
from neighbor_grpo.runs.machine import is_path

# --- sources ---


@pytest.mark.parametrize(
    "source",
    "models/clpi modles/clip runs/trainde Checkpoints/clip ./clip ../clip ~/clip /models/clip C:\\clip C:/clip "
    "a/b/c clip mine/clip mine/nothing some/clip.safetensors some/ org/.hidden".split(),
)
def test_a_path_never_asks_the_hub(source, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine").mkdir()
    monkeypatch.setattr(library, "load_clip", lambda *_: pytest.fail("something was loaded"))
    assert is_path(source)
    with pytest.raises(ValueError, match="no such file or folder"):
        CLIPScore(source)
    assert not capsys.readouterr().err


@pytest.mark.parametrize(
    "source",
    "openai/clip-vit-large-patch14 stabilityai/stable-diffusion-3.5-medium black-forest-labs/FLUX.1-dev "
    "laion/CLIP-ViT-H-14-laion2B-s32B-b79K yuvalkirstain/PickScore_v1 xswu/HPSv2".split(),
)
def test_a_name_asks_the_cache_then_the_hub_and_says_so(source, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    asked = []

    def load_clip(source, dtype, offline):
        asked.append((source, offline))
        raise OSError("not here")

    monkeypatch.setattr(library, "load_clip", load_clip)
    monkeypatch.setattr(transformers.utils.hub.constants, "HF_HUB_OFFLINE", False)
    assert not is_path(source)
    with pytest.raises(ValueError, match="nor in the hub's cache"):
        CLIPScore(source)
    assert asked == [(source, True), (source, False)]
    assert capsys.readouterr().err == f"{source} is not on this machine: asking the hub\n"


# --- pictures of more than 8 bits ---

GREY = np.arange(256).reshape(16, 16)
DEEP = {
    "16 bits": (GREY * 257).astype(np.uint16),
    "16 bits, big end first": (GREY * 257).astype(">u2"),
    "32 bits": (GREY * 257).astype(np.int32),
    "32 bits, as many as 8": GREY.astype(np.int32),
    "floats to 1": (GREY / 255).astype(np.float32),
    "floats to 255": GREY.astype(np.float32),
    "floats to 65535": (GREY * 257).astype(np.float32),
}


@pytest.mark.parametrize("kind", DEEP)
def test_deep_pictures_are_judged_as_what_they_show(kind):
    deep, plain = Image.fromarray(DEEP[kind]), Image.fromarray(GREY.astype(np.uint8))
    assert deep.mode not in ("L", "RGB")
    (found,) = to_pictures([deep])
    assert found.mode == "L" and np.array_equal(np.array(found), GREY)
    judge = Compressibility()
    with RewardServer(judge) as server:
        for scores in (judge([deep], ["a"]), RemoteReward(server.url)([deep], ["a"])):
            assert torch.equal(scores, judge([plain], ["a"]))


def test_a_dark_picture_of_16_bits_stays_dark(tmp_path):
    Image.fromarray(np.full((4, 4), 200, np.uint16)).save(tmp_path / "dark.png")
    (found,) = to_pictures([Image.open(tmp_path / "dark.png")])
    assert np.array(found.convert("RGB")).max() == 1


@pytest.mark.parametrize("values", [[-1.0, 0.5], [0.0, np.nan], [0.0, 65536.0], [0.0, np.inf]])
def test_what_is_no_brightness_is_refused(values):
    with pytest.raises(ValueError, match="images must be gray values within"):
        to_pictures([Image.fromarray(np.float32([values]))])


# --- prompts ---


def test_who_cleans_prompts(monkeypatch):
    "CLIPScore and HPS as their authors' code does, PickScore not at all."
    written = "  A  \u201cred\u201d cat &amp;amp; sch\u00c3\u00b6n &lt;3\n"
    for kind, expected in (
        (CLIPScore, 'a "red" cat & sch\u00f6n <3'),
        (HPSv21, 'a "red" cat & sch\u00f6n <3'),
        (PickScore, written),
    ):
        judge = kind.__new__(kind)
        judge.fix = ftfy.fix_text
        assert judge.clean(written) == expected
    assert CLIPScore.view is library.openai_view and PickScore.view is library.transformers_view


# --- names ---


@pytest.mark.parametrize(
    "text, names",
    [
        ("hps", ["hps"]),
        ("hps,0.5*clip@models/a", ["hps", "clip"]),
        ("clip,clip@models/a,-1*clip@models/b/", ["clip", "clip@a", "clip@b"]),
        ("clip@x/a,clip@y/a,clip@z/a", ["clip@a", "clip@a#2", "clip@a#3"]),
        ("hps,2*hps", ["hps", "hps#2"]),
        ("remote@http://a:1,remote@https://b/score/", ["remote@a:1", "remote@b/score"]),
    ],
)
def test_rewards_of_one_kind_keep_their_names(text, names):
    assert reward_names(text) == names


def test_spaces_around_a_source_do_not_keep_it_from_its_place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models").mkdir()
    for text in ("clip@models , hps", "clip@ models,hps"):
        assert library.absolute_rewards(text).split(",")[0] == f"clip@{tmp_path / 'models'}"
