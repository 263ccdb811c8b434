"""The families of models, for tests that hold for each: a tiny random pipeline, and how diffusers draws with it."""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from tiny import tiny_flux, tiny_flux2, tiny_qwen, tiny_sana, tiny_sd3, tiny_wan, tiny_zimage

from neighbor_grpo.flow import randn, seeded
from neighbor_grpo.models.flux import FLUX, pack_latents
from neighbor_grpo.models.flux2 import FLUX2
from neighbor_grpo.models.pipeline import Family, PipelinePolicy, PipelineSettings, encode_prompts
from neighbor_grpo.models.qwen import QWEN
from neighbor_grpo.models.sana import SANA
from neighbor_grpo.models.sd3 import SD3
from neighbor_grpo.models.wan import WAN
from neighbor_grpo.models.zimage import ZIMAGE
from neighbor_grpo.runs.machine import quiet

PROMPTS, LENGTH = ["a cat", "two dogs"], 30


@dataclass(frozen=True)
class Case:
    "One kind of pipeline."

    family: Family
    make: Callable
    guided: float = 4.0  # a scale of guidance; 1 where it has none
    words: Callable = lambda scale: dict(guidance_scale=scale)  # how the pipeline is told of it
    given: Callable = lambda noise: noise  # latents as the pipeline takes them
    sizes: tuple = ((16, 16), (16, 24))  # of images in pixels, one of them not square; of videos, and their frames
    grid: str = "even"  # of `time_grid`: "scheduler" where the pipeline leaves the times to its scheduler
    more: dict = field(default_factory=dict)  # what else the pipeline is called with

    def draw(self, pipeline, noise, scale, size, steps=4):
        "What a user of diffusers gets, float32 in [0, 1]."
        names = ("height", "width", "num_frames")
        words = self.words(scale) | dict(zip(names, size)) | dict(max_sequence_length=LENGTH) | self.more
        with quiet():
            output = pipeline(
                prompt=[*PROMPTS], latents=self.given(noise), num_inference_steps=steps, output_type="pt", **words
            )
        return output[0] if isinstance(output, tuple) else next(iter(output.values()))

    def noise(self, pipeline, size):
        "Standard normal latents for the prompts."
        return randn((len(PROMPTS), *self.family.latent_shape(pipeline, *size)), seeded(0))

    def conditions(self, pipeline):
        "The prompts, and the negative one, as the transformer takes them."
        return tuple(encode_prompts(self.family, pipeline, texts, LENGTH) for texts in (PROMPTS, None))

    def policy(self, pipeline, moved=False, **settings):
        "A policy around the pipeline's transformer; `moved`: as if it had been trained."
        negative = self.conditions(pipeline)[1]
        policy = PipelinePolicy(self.family, pipeline.transformer, PipelineSettings(**settings), negative)
        for weight in policy.parameters() if moved else ():
            if weight.requires_grad:
                weight.data += 0.1 * torch.randn(weight.shape, generator=seeded(1))
        return policy


def true_cfg(scale):
    "Qwen-Image's guidance, against a space."
    return dict(true_cfg_scale=scale, negative_prompt=[" "] * len(PROMPTS))


def one_less(scale):
    "Z-Image's guidance, where none is 0."
    return dict(guidance_scale=scale - 1)


def by_euler(pipeline):
    "The pipeline with a scheduler that takes one evaluation for each step of its own grid."
    pipeline.scheduler = FlowMatchEulerDiscreteScheduler(shift=pipeline.scheduler.config.flow_shift)
    return pipeline


VIDEOS = dict(grid="scheduler", sizes=((16, 16, 3), (16, 32, 5)))
CASES = {
    "sd3": Case(SD3, tiny_sd3, grid="scheduler"),
    "sd3.5": Case(SD3, lambda: tiny_sd3(dual=True), grid="scheduler"),
    "sd3.5-turbo": Case(SD3, lambda: tiny_sd3(dual=True), 1.0, grid="scheduler"),
    "flux-dev": Case(FLUX, tiny_flux, given=pack_latents),
    "flux-schnell": Case(FLUX, lambda: tiny_flux(dynamic=False, guidance=False), 1.0, given=pack_latents),
    "flux2-klein-base": Case(FLUX2, tiny_flux2),
    "flux2-klein": Case(FLUX2, lambda: tiny_flux2(distilled=True), 1.0),
    "qwen": Case(QWEN, tiny_qwen, words=true_cfg, given=pack_latents),
    "zimage": Case(ZIMAGE, tiny_zimage, words=one_less),
    "zimage-dynamic": Case(ZIMAGE, lambda: tiny_zimage(dynamic=True), words=one_less),
    "sana": Case(
        SANA,
        lambda: by_euler(tiny_sana()),
        sizes=((32, 32), (32, 64)),
        grid="scheduler",
        more=dict(use_resolution_binning=False),
    ),
    "wan": Case(WAN, lambda: by_euler(tiny_wan()), **VIDEOS),
    "wan2.2-small": Case(WAN, lambda: by_euler(tiny_wan(expand_timesteps=True)), **VIDEOS),
}
