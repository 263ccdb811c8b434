"""Videos that `sample` writes to a folder are strips, and animations with the same frames in the same order."""

import numpy as np
import torch
from PIL import Image, ImageSequence

from neighbor_grpo.flow import randn, seeded
from neighbor_grpo.lab.looking import Look, write_images
from neighbor_grpo.rewards.programs import to_pictures
from neighbor_grpo.runs.pictures import Seen


def look(images):
    return Look("after 3", {}, Seen({}, ["a cat"] * len(images), images))


def test_a_video_is_animated_without_loss(tmp_path):
    videos = randn((2, 5, 3, 16, 24), seeded(0)).sigmoid()
    write_images([look(videos)], tmp_path)
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".png", ".png", ".webp", ".webp"]
    for video, path in zip(videos, sorted(tmp_path.glob("*.webp"))):
        with Image.open(path) as moving:
            found = [np.array(frame.convert("RGB")) for frame in ImageSequence.Iterator(moving)]
            assert moving.info["loop"] == 0
        expected = [np.array(picture) for picture in to_pictures(video)]
        assert len(found) == 5 and all(map(np.array_equal, found, expected))


def test_pictures_are_not_animated(tmp_path):
    write_images([look(torch.rand(2, 3, 8, 8))], tmp_path)
    assert {path.suffix for path in tmp_path.iterdir()} == {".png"}
