"""The two time grids: against diffusers, in every algorithm's rollout, and where the command line chooses which."""

from dataclasses import replace

import pytest
import torch

from neighbor_grpo.cli import read_command
from neighbor_grpo.flow import randn, seeded, time_grid
from neighbor_grpo.rivals.catalogue import ALGORITHMS
from neighbor_grpo.rivals.forward import ForwardProcess
from neighbor_grpo.rivals.mixed import TempFlowGRPO
from neighbor_grpo.rivals.modifiers import Previews

# What pipelines of SD3.5 take in ten steps where nobody passes them sigmas.
SD35 = [1, 0.9601, 0.9133, 0.8577, 0.7904, 0.7073, 0.6022, 0.4649, 0.2780, 0.0089, 0]


@pytest.mark.parametrize("shift", [1.0, 3.0, 6.5])
@pytest.mark.parametrize("steps", [1, 2, 6, 10, 28, 40])
def test_schedulers_grid_is_that_of_diffusers(steps, shift):
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(num_inference_steps=steps)
    assert (time_grid(steps, shift, "scheduler") - scheduler.sigmas).abs().max() < 1e-6
    if steps > 1:
        assert (time_grid(steps, shift) - scheduler.sigmas).abs().max() > 1e-3


def test_ten_times_of_sd35():
    assert (time_grid(10, 3.0, "scheduler") - torch.tensor(SD35)).abs().max() < 6e-5


def test_unknown_grid_is_refused():
    with pytest.raises(ValueError, match=r"^grid must be one of even, scheduler, got 'karras'$"):
        time_grid(8, 3.0, "karras")


@pytest.mark.parametrize("name", ALGORITHMS)
def test_rollouts_and_previews_take_the_grid(name):
    own, seen = replace(ALGORITHMS[name](), shift=3.0, grid="scheduler"), set()
    algorithm = own if getattr(own, "shared_noise", False) else Previews(own, scouts=24, scout_steps=3)

    def velocity(x, t, cond):
        seen.update(t.tolist())
        return -x

    score = lambda x: x[..., 0]
    rollout = algorithm.rollout(velocity, randn((1, 2), seeded(0)), None, [seeded(1)], 0, score)
    full = time_grid(own.steps, 3.0, "scheduler")
    if isinstance(own, ForwardProcess):  # their trained times are drawn anew
        assert set(full[:-1].tolist()) <= seen
    else:
        assert torch.isin(rollout.ts, full).all() and rollout.ts[1] == full[1]  # tails may be thinned
    if algorithm is not own:
        assert set(time_grid(3, 3.0, "scheduler")[:-1].tolist()) <= seen


@pytest.mark.parametrize(
    ("arguments", "grid"),
    [
        ("sd3 --algorithm flow", "scheduler"),
        ("sd3 --algorithm tempflow", "scheduler"),
        ("sd3 --algorithm nft", "scheduler"),
        ("sd3 --algorithm op", "scheduler"),
        ("sd3 --algorithm dance", "even"),
        ("sd3", "even"),
        ("flux --algorithm flow", "even"),
        ("digits --algorithm flow", "even"),
        ("--recipe sd3.5-medium", "even"),
        ("--recipe sd3.5-medium --algorithm flow", "scheduler"),
        ("--recipe sd3.5-medium --algorithm flow --grid even", "even"),
    ],
)
def test_command_takes_the_grid_of_the_authors(arguments, grid):
    pytest.importorskip("diffusers")
    assert read_command(arguments.split())[1][1].grid == grid


def test_the_factor_of_tempflows_code_is_one_over_the_mean_noise():
    means = {grid: TempFlowGRPO().response(time_grid(10, 3.0, grid))[1].mean().item() for grid in ("even", "scheduler")}
    assert 1 / means["scheduler"] == pytest.approx(2.2522, abs=2e-4)
    assert 1 / means["even"] == pytest.approx(2.2414, abs=2e-4)
