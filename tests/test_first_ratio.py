"The ratio starts at exactly 1 in every update, whatever the micro-batches, also where a velocity depends on its batch."

from dataclasses import replace

import pytest
import torch
from tiny import tiny_sd3
from torch import nn

from neighbor_grpo.flow import randn, seeded
from neighbor_grpo.models.pipeline import PipelinePolicy, PipelineSettings
from neighbor_grpo.models.sd3 import SD3
from neighbor_grpo.neighbor import NeighborGRPO
from neighbor_grpo.rivals.catalogue import ALGORITHMS, make, modified
from neighbor_grpo.runs.trainer import Trainer
from neighbor_grpo.training import Task, TrainSettings, retrace


class Rounding(nn.Module):
    "A velocity that depends on the size of its batch, as in half precision, and on whether a gradient is taken."

    def __init__(self, coarse=True, size=0.01):
        super().__init__()
        torch.manual_seed(0)
        self.net, self.coarse, self.size = nn.Linear(2, 2), coarse, size
        self.rows = {True: 0, False: 0}  # evaluated with gradient, and without; a second evaluation counts as both

    def forward(self, x, t, cond):
        self.rows[torch.is_grad_enabled()] += len(x)
        error = self.size * (4 / len(x) + torch.is_grad_enabled())
        return self.net(x) * t[:, None] + error * x.sin()


class Points(Task):
    "Points further to the right are better."

    shape, prompts = (2,), 5

    def __init__(self, policy):
        self.policy, self.coarse = policy, policy.coarse

    def conditions(self, prompts):
        return None

    def reward(self, samples, prompts):
        return samples[..., 0]

    def evaluate(self, velocity):
        return {"reward": 0.0}


STILL = TrainSettings(iterations=1, groups=3, updates=3, lr=1e-30)  # no weight moves
SHORT = {"flow": dict(steps=5, trained_steps=3), **dict.fromkeys(("dance", "branch"), dict(steps=6, trained_steps=3))}
NEIGHBOR, FLOW, DANCE = (make(name, group_size=4, **SHORT.get(name, {})) for name in ("neighbor", "flow", "dance"))
FIRST = replace(NEIGHBOR, train_where="first")
HELD = dict(hold_weight=0.1)
KINDS = {
    name: (make(name, group_size=4, **SHORT.get(name, {})), {}) for name, kind in ALGORITHMS.items() if kind().has_ratio
} | {
    "neighbor from its own step": (replace(NEIGHBOR, leap_from="rollout"), {}),
    "neighbor guarded and held": (modified(FIRST, "guard"), HELD),
    "flow in chunks": (modified(FLOW, "chunks", chunk=0), {}),
    "dance guarded and near": (modified(DANCE, "guard"), dict(kl_weight=0.1)),
    "neighbor weighted": (modified(NEIGHBOR, "weights"), {}),
}


def first_row(kind, policy, settings=STILL, micro=1):
    "Metrics of one iteration, in micro-batches of one state, or of those that are judged together."
    algorithm, more = kind
    settings = replace(settings, micro_batch=micro * algorithm.together, **more)
    return Trainer(Points(policy), algorithm, settings).step()


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_the_ratio_of_a_policy_that_has_not_moved_is_one_in_every_update(kind):
    for settings in (STILL, replace(STILL, ema=0.5, collector="average")):
        row = first_row(kind, Rounding(), settings)
        assert row["ratio_min"] == row["ratio_max"] == 1 and row["clip_fraction"] == 0
    row = first_row(kind, Rounding(coarse=False))
    assert row["ratio_max"] - row["ratio_min"] > 1e-6, "stored velocities would not do"


@pytest.mark.parametrize("name", [name for name, kind in ALGORITHMS.items() if not kind().has_ratio])
def test_what_has_no_ratio_costs_nothing_more(name):
    kind = make(name, group_size=4), {}
    row, other = (first_row(kind, Rounding(coarse), micro=0) for coarse in (True, False))
    assert row["nfe_old"] == other["nfe_old"]


def test_the_evaluations_are_counted():
    "Two anchors, two steps: four states of four candidates, again for two of three updates; all for an average."
    kind = replace(NEIGHBOR, anchors=2, trained_steps=2), {}
    average = replace(STILL, ema=0.5, collector="average")
    for settings, more in ((STILL, 2), (average, 3), (replace(STILL, updates=1), 0)):
        policy = Rounding()
        row, plain = first_row(kind, policy, settings), first_row(kind, Rounding(coarse=False), settings)
        assert row["nfe_old"] == plain["nfe_old"] + more == 8 + more
        assert row["nfe_theta"] == settings.updates
        if settings.collector == "policy":
            assert policy.rows == {True: 12 * (settings.updates + more), False: 12 * 8}


def test_asking_again_changes_nothing_but_rounding():
    "The same states are trained: without batch effects the runs agree, up to float32."
    ends = []
    for coarse in (True, False):
        policy = Rounding(coarse, size=0.0)
        settings = TrainSettings(iterations=1, groups=3, updates=3, lr=1e-3)
        first_row((replace(FIRST, clip_range=0.5), HELD), policy, settings)
        ends.append(policy.net.weight.detach())
    # three steps of AdamW at 1e-3, whose direction may turn only where a gradient is all but zero
    assert (ends[0] - ends[1]).abs().max() < 3e-4 and (ends[0] - Rounding().net.weight).abs().max() > 1e-3


def test_replayed_candidates_keep_the_velocities_they_came_with():
    algorithm = make("op", group_size=4)
    rollout = algorithm.rollout(Rounding(), randn((2, 2), seeded(1)), generator=seeded(2))
    replayed = torch.tensor([[True, False, False, False], [False, False, True, True]])
    trained = algorithm.choose(rollout, seeded(3))
    after = retrace(Rounding(), replace(rollout, replayed=replayed), trained, 5)
    changed = (after.v != rollout.v).flatten(3).any(3)
    steps = trained.step.unique()
    assert torch.equal(changed[steps].any(0), ~replayed) and changed.sum() == len(steps) * (~replayed).sum()


@pytest.mark.parametrize("rank", [0, 2], ids=["all", "lora"])
def test_half_precision_of_a_real_transformer(rank):
    "bfloat16: exactly 1 in the second update; and a policy knows whether it rounds coarsely."
    pipeline = tiny_sd3()
    shapes = pipeline.transformer.config
    embeds, pooled = (
        randn((1, 12, shapes.joint_attention_dim), seeded(0)),
        randn((1, shapes.pooled_projection_dim), seeded(1)),
    )
    cond = dict(embeds=embeds, pooled=pooled)
    policy = PipelinePolicy(SD3, pipeline.transformer, PipelineSettings(lora_rank=rank, precision="bfloat16"))

    class Latents(Points):
        shape = (shapes.in_channels, 8, 8)

        def conditions(self, prompts):
            return {name: value.expand(len(prompts), *value.shape[1:]) for name, value in cond.items()}

        def reward(self, samples, prompts):
            return samples.flatten(1).mean(1)

    algorithm = NeighborGRPO(group_size=4, steps=3, trained_steps=2, anchors=2, temperature=0.01)
    row = Trainer(Latents(policy), algorithm, replace(STILL, groups=2, updates=2, micro_batch=1)).step()
    assert policy.coarse and row["ratio_min"] == row["ratio_max"] == 1
    policy.settings = replace(policy.settings, precision="float32")
    assert policy.coarse == (rank > 0), "adapters on weights in bfloat16"
