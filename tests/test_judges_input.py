"""What judges are given: sources that are paths never ask the hub."""

import pytest
import transformers

from neighbor_grpo import rewards as library
from neighbor_grpo.rewards import CLIPScore, is_path

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
