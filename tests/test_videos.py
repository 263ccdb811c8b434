"""Videos: rewards, signs and pictures see some of their frames, and what is saved is a video's pipeline."""

import pytest
import torch
from diffusers import WanPipeline
from tiny import tiny_wan

from neighbor_grpo.flow import randn, seeded
from neighbor_grpo.models.pipeline import PipelinePolicy, PipelineSettings, open_pipeline, save_policy
from neighbor_grpo.models.wan import WAN
from neighbor_grpo.rewards.programs import Compressibility
from neighbor_grpo.rewards.signs import signs_of
from neighbor_grpo.runs.machine import quiet
from neighbor_grpo.runs.pictures import image_grid, in_strips
from neighbor_grpo.tasks.images import ImagesSettings, ImagesTask


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("videos")
    with quiet():
        tiny_wan(expand_timesteps=True).save_pretrained(folder / "wan")
    (folder / "prompts.txt").write_text("a cat\na dog\na bird\na fish\n")
    return folder


def make(folder, **more):
    size = dict(height=16, width=32, frames=9, max_sequence_length=12, eval_images=2, eval_steps=2)
    given = dict(source=str(folder / "wan"), prompts=str(folder / "prompts.txt"))
    return ImagesTask(ImagesSettings(**given | size | more), None, 0, False)


def test_rewards_and_signs_are_means_over_the_frames_that_are_seen(folder):
    task = make(folder, seen_frames=2)
    latents = randn((3, *task.shape), seeded(0))
    whole = WAN.decode(task.pipeline, latents)
    assert whole.shape == (3, 9, 3, 16, 32) and task.shape == (4, 5, 4, 8)
    seen = task.decode(latents)
    assert torch.equal(seen, whole[:, [2, 6]])
    texts = [""] * 3
    rewards = torch.stack([Compressibility()(seen[:, frame], texts) for frame in range(2)], 1).mean(1)
    assert torch.equal(task.reward(latents, torch.zeros(3, dtype=torch.long)), rewards) and rewards.std() > 0
    for name, values in signs_of(seen).items():
        assert torch.allclose(values, torch.stack([signs_of(seen[:, frame])[name] for frame in range(2)]).mean(0))


def test_pictures_show_the_frames_side_by_side(folder, tmp_path):
    task = make(folder, seen_frames=3, decode_batch=1)
    images = task.images(task.policy, 2)
    strips = in_strips(images)
    assert images.shape == (2, 3, 3, 16, 32) and strips.shape == (2, 3, 16, 96)
    assert torch.equal(strips[:, :, :, 32:64], images[:, 1]) and image_grid(images, 1).shape == (36, 98, 3)
    task.draw({"base": task.policy}, tmp_path / "samples.png")
    assert (tmp_path / "samples.png").stat().st_size > 1000
    assert task.evaluate(task.policy)["reward"] < 0


def test_a_saved_video_model_keeps_what_its_class_was_told(folder, tmp_path):
    pipeline = open_pipeline(WAN, folder / "wan")
    save_policy(PipelinePolicy(WAN, pipeline.transformer, PipelineSettings()), pipeline, tmp_path / "saved")
    with quiet():
        saved = WanPipeline.from_pretrained(tmp_path / "saved")
    assert saved.config.expand_timesteps and saved.transformer_2 is None


def test_weights_that_stay_in_full_precision_do_not_set_the_precision_of_the_rest(folder):
    "Wan's first weight is one of them."
    pipeline = open_pipeline(WAN, folder / "wan", torch.bfloat16)
    assert next(pipeline.transformer.parameters()).dtype == torch.float32
    policy = PipelinePolicy(WAN, pipeline.transformer, PipelineSettings(lora_rank=2, precision="bfloat16"))
    assert policy.coarse and policy.transformer.scale_shift_table.dtype == torch.float32
    x, told = randn((1, 4, 2, 4, 4), seeded(0)), dict(embeds=randn((1, 5, 32), seeded(1)))
    with torch.no_grad():
        assert policy(x, torch.ones(1), told).dtype == torch.float32


WRONG = {
    "frames": (dict(frames=8), "frames must be 1 more than a multiple of 2, got 8"),
    "height": (dict(height=24), "height must be a multiple of 16, got 24"),
    "seen_frames": (dict(seen_frames=0), "seen_frames must be an integer >= 1, got 0"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_sizes_are_refused(folder, name):
    more, message = WRONG[name]
    with pytest.raises(ValueError, match=message):
        make(folder, **more)


def test_what_makes_pictures_refuses_frames():
    with pytest.raises(ValueError, match="frames must be 1: a StableDiffusion3Pipeline makes pictures, got 5"):
        ImagesTask(ImagesSettings(source="miniature", frames=5, height=32, width=32), None, 0, False)
