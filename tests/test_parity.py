"""Our encoding, velocity, guidance, solver, grid and decoding make the image that each family's pipeline makes."""

import pytest
import torch
from families import CASES

from neighbor_grpo.flow import time_grid
from neighbor_grpo.models.pipeline import PipelinePolicy, PipelineSettings
from neighbor_grpo.solvers import solve

STEPS = 3


@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_images_are_the_pipelines_own(name):
    "On the scheduler's own times, which are also those that the family's shift gives: guided and not, for two sizes."
    case = CASES[name]
    pipeline = case.make()
    cond, negative = case.conditions(pipeline)
    for scale in sorted({1.0, case.guided}):
        policy = PipelinePolicy(case.family, pipeline.transformer, PipelineSettings(guidance_scale=scale), negative)
        for size in case.sizes:
            noise = case.noise(pipeline, size)
            expected = case.draw(pipeline, noise, scale, size, STEPS)
            ts = pipeline.scheduler.sigmas
            found = case.family.decode(pipeline, solve(policy, noise, ts, cond, "euler").x[-1])
            assert found.shape == expected.shape and expected.std() > 0.01
            assert (found - expected).abs().max() < 1e-4, (scale, size)
            ours = time_grid(STEPS, case.family.shift(pipeline, *size[:2], STEPS), case.grid)
            assert (ours - ts).abs().max() < 1e-6, (scale, size)
            assert found[0].sub(found[1]).abs().max() > 1e-3, "each prompt has its own image"
