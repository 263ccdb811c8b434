"""FLUX: the pipeline's own images, packing, the shift of time, adapters, the reference, saving and opening again."""

import copy

import pytest
import torch
from diffusers import FluxPipeline
from hypothesis import given
from hypothesis import strategies as st
from tiny import tiny_flux

from neighbor_grpo.flow import randn, seeded, time_grid
from neighbor_grpo.models.flux import FLUX, pack_latents, unpack_latents
from neighbor_grpo.models.pipeline import (
    ADAPTER,
    PipelinePolicy,
    PipelineSettings,
    decode,
    encode_prompts,
    open_pipeline,
    save_policy,
)
from neighbor_grpo.models.sd3 import SD3
from neighbor_grpo.rollouts import take
from neighbor_grpo.runs.machine import quiet
from neighbor_grpo.solvers import solve

PROMPTS, STEPS = ["a cat", "two dogs", "a red bird"], 5
KINDS = pytest.mark.parametrize("rank", [0, 4], ids=["full", "lora"])


def make(pipeline, rank=0, **more):
    settings = PipelineSettings(**(dict(lora_rank=rank, lora_alpha=3) if rank else {}), **more)
    return PipelinePolicy(FLUX, copy.deepcopy(pipeline.transformer), settings)


def move(policy):
    "As if it had been trained: every trained weight a little elsewhere."
    generator = seeded(1)
    for weight in policy.parameters():
        if weight.requires_grad:
            weight.data += 0.1 * torch.randn(weight.shape, generator=generator)
    return policy


def call(pipeline, noise, guidance_scale=1.0, **size):
    "Images as a user of diffusers makes them."
    options = dict(guidance_scale=guidance_scale, max_sequence_length=12, output_type="pt", height=16, width=16) | size
    return pipeline(PROMPTS, num_inference_steps=STEPS, latents=pack_latents(noise), **options).images


@torch.no_grad()
def sample(policy, pipeline, noise, height=16, width=16):
    "The same images with our parts."
    ts, cond = time_grid(STEPS, FLUX.shift(pipeline, height, width)), conditions(pipeline)
    return decode(pipeline, solve(policy, noise, ts, cond, "euler").x[-1])


def conditions(pipeline):
    return encode_prompts(FLUX, pipeline, PROMPTS, 12)


@KINDS
@pytest.mark.parametrize("guidance_scale", [1.0, 3.5])
@pytest.mark.parametrize("told", [True, False], ids=["dev", "schnell"])
def test_images_are_the_pipelines_own(rank, guidance_scale, told):
    pipeline, noise = tiny_flux(dynamic=told, guidance=told), randn((3, 4, 8, 8), seeded(0))
    policy = make(pipeline, rank, guidance_scale=guidance_scale)
    expected = call(pipeline, noise, guidance_scale)
    assert (sample(policy, pipeline, noise) - expected).abs().max() < 1e-5
    assert (sample(move(policy), pipeline, noise) - expected).abs().max() > 1e-3, "a policy that moved gives others"
    pipeline.transformer = policy.transformer
    assert (sample(policy, pipeline, noise) - call(pipeline, noise, guidance_scale)).abs().max() < 1e-5


def test_guidance_matters_where_it_is_told():
    noise = randn((3, 4, 8, 8), seeded(0))
    for told in (True, False):
        pipeline = tiny_flux(guidance=told)
        low, high = (sample(make(pipeline, guidance_scale=scale), pipeline, noise) for scale in (1.0, 3.5))
        assert torch.equal(low, high) != told


@pytest.mark.parametrize(("height", "width"), [(16, 24), (32, 12)])
def test_images_that_are_not_square(height, width):
    pipeline = tiny_flux()
    noise = randn((3, *FLUX.latent_shape(pipeline, height, width)), seeded(0))
    images = sample(make(pipeline), pipeline, noise, height, width)
    assert images.shape == (3, 3, height, width)
    assert (images - call(pipeline, noise, height=height, width=width)).abs().max() < 1e-5


@given(n=st.integers(1, 3), c=st.integers(1, 5), h=st.integers(1, 6), w=st.integers(1, 6))
def test_packing_is_the_pipelines_and_can_be_undone(n, c, h, w):
    x = torch.randn(n, c, 2 * h, 2 * w)
    assert torch.equal(pack_latents(x), FluxPipeline._pack_latents(x, n, c, 2 * h, 2 * w))
    assert torch.equal(unpack_latents(pack_latents(x), 2 * h, 2 * w), x)


@pytest.mark.parametrize("size", [16, 64, 256])
@pytest.mark.parametrize("steps", [1, 4, 28])
def test_time_grid_is_the_pipelines(size, steps):
    pipeline = tiny_flux()
    noise = randn((1, *FLUX.latent_shape(pipeline, size, size)), seeded(0))
    pipeline.transformer.forward = lambda hidden_states, **more: (torch.zeros_like(hidden_states),)
    options = dict(height=size, width=size, output_type="latent")
    pipeline("a cat", num_inference_steps=steps, latents=pack_latents(noise), **options)
    assert (time_grid(steps, FLUX.shift(pipeline, size, size)) - pipeline.scheduler.sigmas).abs().max() < 1e-6


def test_a_scheduler_with_another_shift_is_refused():
    pipeline = tiny_flux()
    pipeline.scheduler.register_to_config(time_shift_type="linear")
    with pytest.raises(ValueError, match="pipeline.scheduler must be an exponential one .* got 'a linear shift'"):
        FLUX.shift(pipeline, 16, 16)


@pytest.mark.parametrize(("height", "width"), [(18, 16), (16, 0), (2, 16)])
def test_sizes_that_do_not_fit_are_refused(height, width):
    with pytest.raises(ValueError, match="(height|width) must be a multiple of 4"):
        FLUX.latent_shape(tiny_flux(), height, width)


def test_the_reference_is_the_base():
    pipeline = tiny_flux()
    policy = make(pipeline, 4, guidance_scale=3.5, train_guidance_scale=2.0)
    x, t, cond = randn((3, 4, 8, 8), seeded(0)), torch.tensor([0.2, 0.5, 0.9]), conditions(pipeline)
    with torch.no_grad():
        base = make(pipeline, guidance_scale=2.0)(x, t, cond)
        moved = move(policy)(x, t, cond)
        # A layer that can have adapters takes another product of matrices: rounding of numbers of order one.
        assert (policy.reference()(x, t, cond) - base).abs().max() < 1e-5 < 1e-3 < (moved - base).abs().max()
        assert torch.equal(policy(x, t, cond), moved)


def test_adapters_reach_both_kinds_of_blocks():
    names = {name for name, weight in make(tiny_flux(), 4).named_parameters() if weight.requires_grad}
    assert all(f".{ADAPTER}." in name for name in names)
    for block, count in (
        ("transformer.transformer_blocks.0.attn.", 8),
        ("transformer.single_transformer_blocks.0.attn.", 3),
    ):
        assert sum(name.startswith(block) and "lora_A" in name for name in names) == count


def test_batches_change_nothing_but_rounding():
    pipeline = tiny_flux()
    x, t, cond = randn((3, 4, 8, 8), seeded(0)), torch.tensor([0.2, 0.5, 0.9]), conditions(pipeline)
    calls = []
    policy = make(pipeline, batch=2)
    policy.transformer.register_forward_hook(lambda module, args, output: calls.append(len(args[0])))
    with torch.no_grad():
        parts = policy(x, t, cond)
    assert calls == [2, 1]
    whole = policy(x, t, cond)
    assert calls == [2, 1, 3], "with a gradient, the algorithm says how many at once"
    assert (parts - whole).abs().max() < 1e-5


def test_bfloat16_is_near():
    pipeline = tiny_flux()
    x, t, cond = randn((3, 4, 8, 8), seeded(0)), torch.tensor([0.2, 0.5, 0.9]), conditions(pipeline)
    for rank in (0, 4):
        policy = make(pipeline, rank, precision="bfloat16")
        exact, near = make(pipeline, rank)(x, t, cond), policy(x, t, cond)
        assert near.dtype == torch.float32 and {w.dtype for w in policy.parameters() if w.requires_grad} == {
            torch.float32
        }
        assert 1e-4 < (near - exact).norm() / exact.norm() < 3e-2
        near.square().mean().backward()
        assert all(w.grad.isfinite().all() for w in policy.parameters() if w.grad is not None)


@KINDS
def test_saved_policies_open_in_plain_diffusers(rank, tmp_path):
    pipeline, noise = tiny_flux(), randn((3, 4, 8, 8), seeded(0))
    pipeline.save_pretrained(tmp_path / "base")
    policy = move(make(pipeline, rank, guidance_scale=3.5))
    save_policy(policy, pipeline, tmp_path / "trained")
    with quiet():
        plain = FluxPipeline.from_pretrained(tmp_path / ("base" if rank else "trained"))
        if rank:
            plain.load_lora_weights(tmp_path / "trained")
    plain.set_progress_bar_config(disable=True)
    assert (call(plain, noise, 3.5) - sample(policy, pipeline, noise)).abs().max() < 1e-5


def test_a_pipeline_of_another_family_is_refused(tmp_path):
    tiny_flux().save_pretrained(tmp_path / "flux")
    with pytest.raises(ValueError, match="a folder with a StableDiffusion3Pipeline, .* a FluxPipeline"):
        open_pipeline(SD3, tmp_path / "flux")
    opened = open_pipeline(FLUX, tmp_path / "flux", encoders=False)
    assert opened.text_encoder is None and opened.tokenizer_2 is None and opened.transformer is not None


def test_rows_belong_together():
    "Each state has its own time and prompt."
    pipeline = tiny_flux()
    x, t, cond = randn((3, 4, 8, 8), seeded(0)), torch.tensor([0.2, 0.5, 0.9]), conditions(pipeline)
    policy = make(pipeline, guidance_scale=3.5)
    order = torch.tensor([2, 0, 1])
    with torch.no_grad():
        straight, turned = policy(x, t, cond), policy(x[order], t[order], take(cond, order))
    assert (straight[order] - turned).abs().max() < 1e-5 and (straight - turned).abs().max() > 1e-3
