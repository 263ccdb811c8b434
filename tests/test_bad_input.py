"""Wrong calls and wrong command lines: each error names the argument, its value and what is allowed."""

import math
from pathlib import Path

import pytest
import torch
from helpers import PointwiseVelocity, TinyTask
from tiny import tiny_sd3

from neighbor_grpo.anchors import distance_spread, sample_anchors, sample_subsets
from neighbor_grpo.cli import main
from neighbor_grpo.flow import denoised, interpolate, randn, seeded, time_grid
from neighbor_grpo.grpo import clipped_surrogate, combine_rewards, group_advantages
from neighbor_grpo.lab.benchmark import CostTask, measure
from neighbor_grpo.leaping import leaping_log_probs
from neighbor_grpo.models.miniature import PretrainSettings, ScenesSettings, ScenesTask, pretrain
from neighbor_grpo.models.pipeline import PipelinePolicy, PipelineSettings, decode, encode_prompts, open_pipeline
from neighbor_grpo.models.sd3 import SD3
from neighbor_grpo.neighbor import NeighborGRPO
from neighbor_grpo.neighbors import neighbor_noise
from neighbor_grpo.rewards.judges import CLIPScore, Rewards, parse_rewards
from neighbor_grpo.rewards.programs import Compressibility, check_scores, to_pictures
from neighbor_grpo.rewards.remote import RemoteReward
from neighbor_grpo.reweighting import quasi_norm
from neighbor_grpo.rivals.catalogue import make, modified
from neighbor_grpo.rivals.forward import VGRPO, DiffusionNFT, forward_times
from neighbor_grpo.rivals.gaussian import DanceGRPO, FlowGRPO
from neighbor_grpo.rivals.mixed import BranchGRPO, MixGRPO, MixGRPOFlash, TempFlowGRPO
from neighbor_grpo.rivals.modifiers import (
    ChunkedRatios,
    GuardedRatios,
    Previews,
    ShapedAdvantages,
    TimeWeights,
    chunk_means,
    equal_pull,
    extremes,
    shape_advantages,
)
from neighbor_grpo.rivals.sde import cps, dance_sde, flow_sde, solve_sde
from neighbor_grpo.rivals.trajectories import TMPO, Replay
from neighbor_grpo.rollouts import take
from neighbor_grpo.runs.folder import Checkpoints, read_config
from neighbor_grpo.runs.tracking import tracker_names
from neighbor_grpo.runs.trainer import Trainer
from neighbor_grpo.solvers import solve
from neighbor_grpo.tasks.digits import DigitsSettings
from neighbor_grpo.tasks.scenes import Caption, Thing, all_captions, draw_layout, find, split_captions, verify
from neighbor_grpo.tasks.toy2d import ToySettings
from neighbor_grpo.training import Run, TrainSettings

x, group = torch.zeros(3, 2), torch.zeros(3, 4, 2)


def tiny_policy(settings=PipelineSettings()):
    return PipelinePolicy(SD3, tiny_sd3().transformer, settings)


velocity = PointwiseVelocity()
small = NeighborGRPO(group_size=4, steps=3, anchors=2, trained_steps=2)


def losses(algorithm=small, advantages=None, **more):
    rollout = algorithm.rollout(velocity, x, None, seeded(0))
    return list(algorithm.losses(velocity, rollout, torch.zeros(3, 4) if advantages is None else advantages, **more))


def run(algorithm, **settings):
    return Run(TinyTask(), algorithm, TrainSettings(**settings))


def frozen_task():
    task = TinyTask()
    task.policy.requires_grad_(False)
    return task


# What is called, and the fragments of the error.
CALLS = [
    (lambda: time_grid(0), "steps", "0", "an integer >= 1"),
    (lambda: time_grid(2.5), "steps", "2.5", "an integer >= 1"),
    (lambda: time_grid(8, 0.0), "shift", "0.0", "> 0"),
    (lambda: time_grid(8, math.nan), "shift", "nan", "> 0"),
    (lambda: seeded(-1), "seed", "-1", ">= 0"),
    (lambda: seeded(1.5), "seed", "1.5", "an integer"),
    (lambda: seeded(0, 3, -2), "key", "-2", ">= 0"),
    (lambda: randn((3, 2), [seeded(0), seeded(1)]), "generator", "2 generators", "3 rows"),
    (lambda: randn((3, 2), []), "generator", "0 generators", "3 rows"),
    (lambda: interpolate(x, x, torch.zeros(2)), "t", "(2,)", "(3,)"),
    (lambda: denoised(x, x, torch.zeros(3, 1)), "t", "(3, 1)", "(3,)"),
    (lambda: solve(velocity, x, time_grid(3), method="rk4"), "method", "'rk4'", "euler, heun, dpm++2m, ab2"),
    (lambda: solve(velocity, x, torch.tensor([0.0, 1.0])), "ts", "[0.0, 1.0]", "descending"),
    (lambda: solve(velocity, x, torch.tensor([1.0])), "ts", "[1.0]", "at least two"),
    (lambda: solve(velocity, x, torch.tensor([1.5, 0.0])), "ts", "1.5", "[0, 1]"),
    (lambda: solve(velocity, x, torch.tensor([1.0, math.nan, 0.0])), "ts", "nan", "descending"),
    (lambda: solve(lambda x, t, c: x[:2], x, time_grid(3)), "velocity", "(2, 2)", "(3, 2)"),
    (lambda: solve_sde(velocity, x, time_grid(3), dance_sde, noisy=[True]), "noisy", "1 ", "3"),
    (lambda: solve_sde(velocity, x, torch.tensor([0.0, 1.0]), dance_sde), "ts", "[0.0, 1.0]", "descending"),
    (lambda: flow_sde(x, x, 0.5, 0.4, -0.7), "noise_level", "-0.7", ">= 0"),
    (lambda: dance_sde(x, x, 0.5, 0.4, -0.3), "eta", "-0.3", ">= 0"),
    (lambda: cps(x, x, 0.5, 0.4, 1.5), "noise_level", "1.5", "[0, 1]"),
    (lambda: group_advantages(torch.zeros(4)), "rewards", "(4,)", "(P, G)"),
    (lambda: group_advantages(torch.zeros(4, 1)), "rewards", "(4, 1)", "G >= 2"),
    (lambda: group_advantages(torch.tensor([[0.0, math.inf]])), "rewards", "inf", "finite"),
    (lambda: combine_rewards(torch.zeros(4)), "rewards", "(4,)", "(P, G)"),
    (lambda: combine_rewards(torch.zeros(2, 3, 1), [1, 2]), "weights", "2 weights", "1 reward"),
    (lambda: clipped_surrogate(x, x, 1.0, 0.0), "clip_range", "0.0", "(0, 1)"),
    (lambda: neighbor_noise(x, 4, 0.0), "sigma", "0.0", "(0, 1]"),
    (lambda: neighbor_noise(x, 4, 1.2), "sigma", "1.2", "(0, 1]"),
    (lambda: neighbor_noise(x, 0), "group_size", "0", ">= 1"),
    (lambda: neighbor_noise(x, 4, 0.3, [seeded(0)]), "generator", "1 generators", "3"),
    (lambda: leaping_log_probs(group, x, 0.0), "temperature", "0.0", "> 0"),
    (lambda: leaping_log_probs(group, x, math.inf), "temperature", "inf", "finite"),
    (lambda: leaping_log_probs(group, x, 1.0, "max"), "reduction", "'max'", "'mean' or 'sum'"),
    (lambda: leaping_log_probs(group, x[:2]), "anchor", "(2, 2)", "(3, 4, 2)"),
    (lambda: sample_anchors(3, 4, 5), "anchors", "5", "[1, 4]"),
    (lambda: sample_anchors(3, 4, 0), "anchors", "0", "[1, 4]"),
    (lambda: sample_subsets(3, 4, 2, [seeded(0)]), "generator", "1 generators", "3"),
    (lambda: distance_spread(x), "candidates", "(3, 2)", "(P, G, *shape)"),
    (lambda: quasi_norm(x, 0.0), "p", "0.0", "(0, 2]"),
    (lambda: quasi_norm(x, 2.5), "p", "2.5", "(0, 2]"),
    (lambda: quasi_norm(torch.zeros(3)), "advantages", "(3,)", "(P, G)"),
    (lambda: take("a cat", torch.tensor([0])), "cond", "str", "tensor"),
    (lambda: NeighborGRPO(group_size=1), "group_size", "1", ">= 2"),
    (lambda: NeighborGRPO(group_size=12.0), "group_size", "12.0", "an integer"),
    (lambda: NeighborGRPO(anchors=13), "anchors", "13", "[1, 12]"),
    (lambda: NeighborGRPO(trained_steps=9), "trained_steps", "9", "[1, 8]"),
    (lambda: NeighborGRPO(steps=0, trained_steps=0), "steps", "0", "an integer >= 1"),
    (lambda: NeighborGRPO(method="rk4"), "method", "'rk4'", "euler, heun, dpm++2m, ab2"),
    (lambda: NeighborGRPO(train_where="middle"), "train_where", "'middle'", "random, first, last"),
    (lambda: NeighborGRPO(sigma=math.nan), "sigma", "nan", "finite"),
    (lambda: NeighborGRPO(temperature=0.0), "temperature", "0.0", "> 0"),
    (lambda: NeighborGRPO(p=3.0), "p", "3.0", "(0, 2]"),
    (lambda: FlowGRPO(shared_noise="yes"), "shared_noise", "'yes'", "True or False"),
    (lambda: NeighborGRPO(clip_range=1.0), "clip_range", "1.0", "(0, 1)"),
    (lambda: TrainSettings(kl_weight=-0.1), "kl_weight", "-0.1", ">= 0"),
    (lambda: TrainSettings(hold_weight=-0.1), "hold_weight", "-0.1", ">= 0"),
    (lambda: run(small, hold_weight=0.1), "hold_weight", "0.1", "0 unless only the first or last steps are trained"),
    (lambda: run(VGRPO(), hold_weight=0.1), "hold_weight", "0.1", "0 unless only the first or last steps are trained"),
    (
        lambda: run(Previews(DiffusionNFT()), hold_weight=0.1),
        "hold_weight",
        "0.1",
        "0 unless only the first or last steps are trained",
    ),
    (lambda: TrainSettings(micro_batch=-1), "micro_batch", "-1", ">= 0"),
    (lambda: FlowGRPO(trained_steps=10), "trained_steps", "10", "[1, 9]"),
    (lambda: FlowGRPO(noise_level=0.0), "noise_level", "0.0", "> 0"),
    (lambda: DanceGRPO(noise_level=0.0), "noise_level", "0.0", "> 0"),
    (
        lambda: NeighborGRPO(method="heun", leap_from="rollout"),
        "leap_from",
        "'rollout'",
        "another than 'rollout' with Heun",
    ),
    (lambda: NeighborGRPO(leap_from="home"), "leap_from", "'home'", "euler, stored, rollout"),
    (lambda: DanceGRPO(advantage_clip=0.0), "advantage_clip", "0.0", "> 0"),
    (lambda: losses(advantages=torch.zeros(4, 3)), "advantages", "(4, 3)", "(3, 4)"),
    (lambda: TrainSettings(iterations=0), "iterations", "0", ">= 1"),
    (lambda: TrainSettings(lr_decay=-1), "lr_decay", "-1", ">= 0"),
    (lambda: TrainSettings(iterations=11, lr_decay=10), "iterations", "11", "at most 10, the lr_decay"),
    (lambda: TrainSettings(groups=2.5), "groups", "2.5", "an integer"),
    (lambda: TrainSettings(updates=0), "updates", "0", ">= 1"),
    (lambda: TrainSettings(lr=0.0), "lr", "0.0", "> 0"),
    (lambda: TrainSettings(lr="fast"), "lr", "'fast'", "a finite number"),
    (lambda: TrainSettings(max_grad_norm=math.inf), "max_grad_norm", "inf", "finite"),
    (lambda: TrainSettings(weight_decay=-1.0), "weight_decay", "-1.0", ">= 0"),
    (lambda: TrainSettings(ema=1.0), "ema", "1.0", "[0, 1)"),
    (lambda: TrainSettings(seed=-1), "seed", "-1", ">= 0"),
    (lambda: TrainSettings(keep=0), "keep", "0", ">= 1"),
    (lambda: Trainer(frozen_task(), small), "task.policy", "ShiftedMLP", "require a gradient"),
    (lambda: ToySettings(target=8), "target", "8", "0 ... 7"),
    (lambda: ToySettings(width=0.0), "width", "0.0", "> 0"),
    (lambda: ToySettings(eval_samples=0), "eval_samples", "0", ">= 1"),
    (lambda: DigitsSettings(reward="colour"), "reward", "'colour'", "class"),
    (lambda: DigitsSettings(target=10), "target", "10", "0 ... 9"),
    (lambda: DigitsSettings(eval_samples=10), "eval_samples", "10", ">= 64"),
    (lambda: CostTask("sd3"), "network", "'sd3'", "'digits' or 'toy'"),
    (lambda: measure([small], iterations=0), "iterations", "0", ">= 1"),
    (lambda: Replay(NeighborGRPO(), replay=12), "replay", "12", "[0, 11]"),
    (lambda: Replay(NeighborGRPO(), memory_size=0), "memory_size", "0", ">= 1"),
    (lambda: make("op", memory_age=0), "memory_age", "0", ">= 1"),
    (lambda: run(make("op"), micro_batch=12), "micro_batch", "12", "a multiple of 5"),
    (lambda: TMPO(beta=0.0), "beta", "0.0", "> 0"),
    (lambda: TMPO(match="ratio"), "match", "'ratio'", "balance, cross"),
    (lambda: ChunkedRatios(TMPO(), 5), "ChunkedRatios", "around TMPO", "an algorithm with ratios"),
    (lambda: TimeWeights(TMPO()), "TimeWeights", "around TMPO", "an algorithm with ratios"),
    (lambda: run(TMPO(), micro_batch=12), "micro_batch", "12", "a multiple of 60"),
    (lambda: MixGRPO(trained_steps=26), "trained_steps", "26", "[0, 25]"),
    (lambda: MixGRPO(window_every=0), "window_every", "0", ">= 1"),
    (lambda: MixGRPO(window_stride=0), "window_stride", "0", ">= 1"),
    (lambda: MixGRPO(window_moves="away"), "window_moves", "'away'", "progressive, roll_back, random, frozen"),
    (lambda: MixGRPO(tail_method="heun"), "tail_method", "'heun'", "euler, dpm++2m"),
    (lambda: MixGRPOFlash(tail_ratio=0.0), "tail_ratio", "0.0", "(0, 1]"),
    (lambda: MixGRPO(noisy_last_step=True), "noisy_last_step", "True", "False"),
    (lambda: TempFlowGRPO(train_where="first"), "train_where", "'first'", "'random'"),
    (lambda: TempFlowGRPO(trained_steps=2), "trained_steps", "2", "1, the step"),
    (lambda: TempFlowGRPO(shared_noise=False), "shared_noise", "False", "True"),
    (lambda: BranchGRPO(shared_noise=False), "shared_noise", "False", "True: a tree has one root"),
    (lambda: BranchGRPO(train_where="random"), "train_where", "'random'", "first, last"),
    (lambda: BranchGRPO(split_every=0), "split_every", "0", "an integer >= 1"),
    (lambda: BranchGRPO(split_scale=0.0), "split_scale", "0.0", "> 0"),
    (lambda: ChunkedRatios(BranchGRPO()), "ChunkedRatios", "around BranchGRPO", "steps of their own"),
    (lambda: shape_advantages(torch.rand(2, 3), -0.5), "power", "-0.5", ">= 0"),
    (lambda: shape_advantages(torch.rand(2, 3), 0.0, "all"), "scale", "'all'", "'group' or 'batch'"),
    (lambda: chunk_means(x, torch.arange(3), 2, 1), "values", "3 rows", "multiple of 2"),
    (lambda: chunk_means(group, torch.arange(3), 3, 2), "chunk", "2", "a divisor of 3"),
    (lambda: equal_pull(torch.tensor([0.5, 0.0])), "reach", "[0.5, 0.0]", "positive and finite"),
    (lambda: extremes(torch.rand(2, 3), 4), "count", "4", "[2, 3]"),
    (lambda: extremes(torch.rand(2, 3), 1), "count", "1", "[2, 3]"),
    (lambda: ShapedAdvantages(NeighborGRPO(), -1.0), "advantage_power", "-1.0", ">= 0"),
    (lambda: ShapedAdvantages(NeighborGRPO(), 0.5, "all"), "advantage_scale", "'all'", "group, batch"),
    (lambda: ChunkedRatios(NeighborGRPO(), 3), "chunk", "3", "a divisor of 4"),
    (lambda: ChunkedRatios(NeighborGRPO(), -1), "chunk", "-1", "a divisor of 4"),
    (lambda: ChunkedRatios(NeighborGRPO(), 2.0), "chunk", "2.0", "an integer"),
    (lambda: run(ChunkedRatios(NeighborGRPO(), 2), micro_batch=6), "micro_batch", "6", "a multiple of 4"),
    (lambda: GuardedRatios(ChunkedRatios(FlowGRPO(), 3)), "GuardedRatios", "around ChunkedRatios", "chunks go outside"),
    (lambda: TimeWeights(NeighborGRPO(), "noise"), "time_weight", "'noise'", "'equal' for steps without noise"),
    (lambda: Previews(NeighborGRPO(), 11), "scouts", "11", ">= 12"),
    (lambda: Previews(NeighborGRPO(), 12, 0), "steps", "0", "an integer >= 1"),
    (lambda: Previews(DanceGRPO()), "Previews", "around DanceGRPO", "whose candidates start apart"),
    (lambda: Previews(NeighborGRPO()).rollout(velocity, x), "reward", "is needed", "for previews"),
    (
        lambda: modified(FlowGRPO(), "guards"),
        "modifiers",
        "['guards']",
        "weights, mask, guard, chunks, gdpo, slas, previews, replay",
    ),
    (lambda: modified(FlowGRPO(), "guard", chunk=3), "settings", "['chunk']", "those of the modifiers"),
    (lambda: make("ppo"), "name", "'ppo'", "neighbor, flow, dance"),
    (lambda: FlowGRPO(sampler="ode"), "sampler", "'ode'", "flow, dance, cps"),
    (lambda: FlowGRPO(sampler="cps", noise_level=1.1), "noise_level", "1.1", "at most 1"),
    (lambda: TrainSettings(collector="average"), "collector", "'average'", "'policy' or 'reference' when ema is 0"),
    (lambda: TrainSettings(shuffle=1), "shuffle", "1", "True or False"),
    (lambda: read_config("nowhere", "--out"), "--out", "nowhere", "a run folder"),
    (lambda: forward_times(2, 0), "count", "0", "an integer >= 1"),
    (lambda: forward_times(2, 3, generator=[seeded(0)]), "generator", "1 generators", "2"),
    (lambda: GuardedRatios(DiffusionNFT()), "GuardedRatios", "around DiffusionNFT", "ratios of its solver's steps"),
    (lambda: ChunkedRatios(VGRPO()), "ChunkedRatios", "around VGRPO", "ratios of its solver's steps"),
    (lambda: DiffusionNFT(beta=0.0), "beta", "0.0", "> 0"),
    (lambda: VGRPO(one_ratio=1), "one_ratio", "1", "True or False"),
    (lambda: run(VGRPO(), micro_batch=6), "micro_batch", "6", "a multiple of 4"),
    (lambda: VGRPO(soft_clip=0.0), "soft_clip", "0.0", "> 0"),
    (lambda: PipelineSettings(lora_rank=-1), "lora_rank", "-1", ">= 0"),
    (lambda: PipelineSettings(lora_rank=4.0), "lora_rank", "4.0", "an integer"),
    (lambda: PipelineSettings(lora_alpha=8), "lora_alpha", "8", "unset where lora_rank is 0"),
    (lambda: PipelineSettings(lora_dual=True), "lora_dual", "True", "unset where lora_rank is 0"),
    (lambda: PipelineSettings(guidance_scale=0.0), "guidance_scale", "0.0", ">= 1"),
    (lambda: PipelineSettings(train_guidance_scale=math.nan), "train_guidance_scale", "nan", "a finite number"),
    (lambda: PipelineSettings(gradient_checkpointing=1), "gradient_checkpointing", "1", "True or False"),
    (
        lambda: tiny_policy(PipelineSettings(guidance_scale=2.0)),
        "negative",
        "is needed",
        "negative prompt",
    ),
    (lambda: tiny_policy(PipelineSettings(4, lora_dual=True)), "lora_dual", "True", "no dual"),
    (lambda: tiny_policy()(x, x, dict(embeds=x[:2], pooled=x)), "cond", "2 rows", "of 3 rows"),
    (lambda: open_pipeline(SD3, "/nowhere/at/all"), "source", "'/nowhere/at/all'", "a folder with"),
    (lambda: encode_prompts(SD3, tiny_sd3(), "a cat"), "prompts", "'a cat'", "a list"),
    (lambda: encode_prompts(SD3, tiny_sd3(), []), "prompts", "[]", "at least one"),
    (lambda: encode_prompts(SD3, tiny_sd3(), ["a cat", None]), "prompts", "None", "text"),
    (lambda: encode_prompts(SD3, tiny_sd3(), ["a cat"], 513), "max_sequence_length", "513", "[1, 512]"),
    (lambda: decode(tiny_sd3(), torch.zeros(1, 3, 8, 8)), "latents", "(1, 3, 8, 8)", "(N, 4, h, w)"),
    (lambda: SD3.latent_shape(tiny_sd3(), 16, 18), "width", "18", "a multiple of 4"),
    (lambda: SD3.latent_shape(tiny_sd3(), 36, 16), "height", "36", "at most 32"),
    (lambda: Thing("pink", "circle"), "colour", "'pink'", "red, green"),
    (lambda: Thing("red", "star"), "shape", "'star'", "circle, square, triangle"),
    (lambda: Thing("red", "circle", 5), "count", "5", "1, 2, 3 or 4"),
    (lambda: Caption(Thing("red", "circle"), "beside", Thing("blue", "circle")), "relation", "'beside'", "left of"),
    (lambda: Caption(Thing("red", "circle"), "above"), "second", "is needed", "a thing where a relation is"),
    (lambda: Caption(Thing("red", "circle", 2), "above", Thing("blue", "circle")), "count", "2", "1 in a relation"),
    (lambda: all_captions("pairs"), "kind", "'pairs'", "'single', 'count' or 'relation'"),
    (lambda: split_captions("single"), "kind", "'single'", "'count' or 'relation'"),
    (lambda: draw_layout([]), "captions", "[]", "at least one"),
    (lambda: find(torch.zeros(3, 32, 32)), "images", "(3, 32, 32)", "(N, 3, H, W)"),
    (lambda: find(torch.zeros(0, 3, 32, 32)), "images", "(0, 3, 32, 32)", "N >= 1"),
    (lambda: verify(torch.zeros(2, 3, 32, 32), all_captions("single")), "captions", "18", "2, one for each"),
    (lambda: PretrainSettings(scenes=0), "scenes", "0", "an integer >= 1"),
    (lambda: PretrainSettings(guidance_steps=0), "guidance_steps", "0", "an integer >= 1"),
    (lambda: PretrainSettings(watch_images=2.5), "watch_images", "2.5", "an integer"),
    (lambda: PretrainSettings(guidance=0.5), "guidance", "0.5", ">= 1"),
    (lambda: PretrainSettings(seed=-1), "seed", "-1", ">= 0"),
    (lambda: pretrain(Path(__file__).parent), "folder", "tests'", "new or empty"),
    (lambda: ScenesSettings(rewarded="single"), "rewarded", "'single'", "count, relation"),
    (lambda: ScenesSettings(reward="mean"), "reward", "'mean'", "graded, strict"),
    (lambda: ScenesSettings(eval_images=47), "eval_images", "47", ">= 48"),
    (lambda: ScenesSettings(eval_steps=0), "eval_steps", "0", ">= 1"),
    (lambda: ScenesSettings(lora_rank=-1), "lora_rank", "-1", ">= 0"),
    (lambda: ScenesTask(ScenesSettings(source="nowhere")), "source", "nowhere'", "a folder with"),
    (lambda: to_pictures(torch.zeros(3, 8, 8)), "images", "(3, 8, 8)", "(N, 3, H, W)"),
    (lambda: to_pictures(torch.zeros(1, 3, 8, 8, dtype=torch.uint8)), "images", "torch.uint8", "floats"),
    (lambda: to_pictures(torch.full((1, 3, 2, 2), 1.5)), "images", "1.5", "in [0, 1]"),
    (lambda: to_pictures(torch.full((1, 3, 2, 2), math.nan)), "images", "nan", "in [0, 1]"),
    (lambda: to_pictures(torch.zeros(0, 3, 2, 2)), "images", "(0, 3, 2, 2)", "N >= 1"),
    (lambda: to_pictures([]), "images", "[]", "at least one"),
    (lambda: to_pictures(["a.png"]), "images", "a.png", "PIL image"),
    (lambda: Compressibility(0), "quality", "0", "from 1 to 100"),
    (lambda: Compressibility(95.0), "quality", "95.0", "an integer"),
    (lambda: Compressibility()(torch.zeros(2, 3, 4, 4), ["a"]), "prompts", "1 texts", "each of 2 images"),
    (lambda: Compressibility()(torch.zeros(1, 3, 4, 4), "a"), "prompts", "'a'", "a list of texts"),
    (lambda: Compressibility()(torch.zeros(1, 3, 4, 4), [None]), "prompts", "None", "a list of texts"),
    (lambda: check_scores([1.0, math.nan], 2), "rewards", "nan", "finite"),
    (lambda: check_scores([1.0, 2.0], 1), "rewards", "(2,)", "one a picture"),
    (lambda: CLIPScore("nowhere"), "source", "'nowhere'", "a CLIP model"),
    (lambda: CLIPScore(batch=0), "batch", "0", "an integer >= 1"),
    (lambda: parse_rewards("clip, hsp"), "rewards", "'hsp'", "among compressibility, clip, pickscore, hps"),
    (lambda: parse_rewards("hps,,clip"), "rewards", "''", "[WEIGHT*]NAME[@SOURCE]"),
    (lambda: parse_rewards("0*hps"), "rewards", "'0*hps'", "not 0"),
    (lambda: parse_rewards("nan*hps"), "rewards", "'nan*hps'", "finite"),
    (lambda: parse_rewards("much*hps"), "rewards", "'much*hps'", "finite numbers"),
    (lambda: parse_rewards("remote"), "rewards", "'remote'", "remote@URL"),
    (lambda: parse_rewards("compressibility@90"), "rewards", "'compressibility@90'", "without a source"),
    (lambda: Rewards([]), "rewards", "[]", "at least one"),
    (lambda: Rewards([Compressibility()], [1.0, 2.0]), "weights", "2 weights", "each of 1 rewards"),
    (lambda: RemoteReward("judge:8000"), "url", "'judge:8000'", "http://machine:8000"),
    (lambda: RemoteReward("http://judge", timeout=0), "timeout", "0", "> 0"),
    (lambda: RemoteReward("http://judge", patience=math.nan), "patience", "nan", "> 0"),
    (lambda: tracker_names("tensorboard, mlflow"), "trackers", "'mlflow'", "tensorboard, wandb, trackio"),
]


@pytest.mark.parametrize("case", CALLS, ids=lambda case: "-".join(case[1:3]))
def test_wrong_call(case):
    call, name, value, allowed = case
    with pytest.raises(ValueError) as error:
        call()
    message = str(error.value)
    assert message.startswith(name) and value in message and allowed in message, message


def test_missing_checkpoint_names_the_folder(tmp_path):
    with pytest.raises(ValueError, match="folder") as error:
        Checkpoints(tmp_path / "none").load()
    assert str(tmp_path / "none") in str(error.value)


# A command line, and the fragments of the one line on standard error.
COMMAND_LINES = [
    ("fly", "command", "'fly'", "train, evaluate, sample, report, save, compare, search, bench, pretrain, distill"),
    ("train sculptures", "task", "'sculptures'", "digits, toy"),
    ("train toy --algorithm ppo", "--algorithm", "'ppo'", "neighbor, flow, dance"),
    ("train toy --groups none", "groups", "none", "int"),
    ("train toy --groups 0", "groups", "0", ">= 1"),
    ("train toy --groups 2.5", "groups", "2.5", "int"),
    ("train toy --lr -1", "lr", "-1", "> 0"),
    ("train toy --lr nan", "lr", "nan", "float"),
    ("train toy --sigma 1.5", "sigma", "1.5", "(0, 1]"),
    ("train toy --anchors 13", "anchors", "13", "[1, 12]"),
    ("train toy --trained_steps 9", "trained_steps", "9", "[1, 8]"),
    ("train toy --method rk4", "method", "rk4", "heun"),
    ("train toy --shuffle maybe", "shuffle", "maybe", "bool"),
    ("train toy --no-such 3", "unrecognized", "--no-such", "3"),
    ("train toy --pretrain_steps 1 --iterations 1 --sigm 0.3", "unrecognized", "--sigm", "0.3"),
    ("train toy --pretrain_steps 1 --iterations 1 --algo dance", "unrecognized", "--algo", "dance"),
    ("train toy --algorithm flow --sigma 0.3", "unrecognized", "--sigma", "0.3"),
    ("train toy extra", "unrecognized", "extra", ""),
    ("train toy --iterations", "--iterations", "expected one argument", ""),
    ("train toy --target 9", "target", "9", "0 ... 7"),
    ("train digits --reward colour", "reward", "colour", "ink"),
    ("train digits --eval_samples 3", "eval_samples", "3", ">= 64"),
    ("train toy --resume", "--out", "is needed", "--resume"),
    ("train toy --resume --out nowhere", "out", "'nowhere'", "config.json"),
    ("evaluate", "required", "dir", ""),
    ("evaluate nowhere", "DIR", "'nowhere'", "config.json"),
    ("sample nowhere", "DIR", "'nowhere'", "config.json"),
    ("pretrain", "--out", "is needed", "a new folder"),
    ("pretrain --out new --steps 0", "steps", "0", ">= 1"),
    ("pretrain --out new --scenes many", "--scenes", "many", "int"),
    ("pretrain --out new --step 5", "unrecognized", "--step", "5"),
    ("bench --network sd3", "--network", "'sd3'", "digits"),
    ("bench --iterations 0", "iterations", "0", ">= 1"),
    ("bench --groups 0", "groups", "0", ">= 1"),
    ("compare", "--out", "is needed", "folder"),
    ("compare --out new", "--variants", "is needed", "ALGORITHM"),
    ("compare toy --out new --variants neighbor --iterations 5", "--seeds", "is needed", "0 1 2"),
    ("compare toy --out new --seeds 0 --variants neighbor", "budgets", "{}", "iterations, evaluations, seconds"),
    ("compare toy --out new --seeds 0 --variants ppo --iterations 5", "--variants", "'ppo'", "neighbor, flow"),
    ("compare toy --out new --seeds 0 --variants a/b:dance --iterations 5", "--variants", "'a/b:dance'", "folder"),
    (
        "compare toy --out new --seeds 0 --variants dance dance --iterations 5",
        "variants",
        "'dance'",
        "none of them twice",
    ),
    ("compare toy --out new --seeds 1 1 --variants dance --iterations 5", "seeds", "[1, 1]", "none of them twice"),
    ("compare toy --out new --seeds -1 --variants dance --iterations 5", "seeds", "-1", ">= 0"),
    ("compare toy --out new --seeds 0 --variants dance --iterations 0", "iterations", "0", "> 0"),
    ("compare toy --out new --seeds 0 --variants dance --iterations 2.5", "iterations", "2.5", "int"),
    ("compare toy --out new --seeds 0 --variants dance --seconds nan", "--seconds", "nan", "float"),
    ("compare toy --out new --seeds 0 --variants dance --seconds 1 --target 0", "target", "0", "> 0"),
    ("compare toy --out new --seeds 0 --variants dance --seconds 1 --common=--sigma=1", "variant dance", "--sigma", ""),
    ("compare toy --out new --seeds 0 --variants dance --seconds 1 --common=--lr=0", "variant dance", "lr", "> 0"),
    ("compare toy --out new --seeds 0 --variants dance --seconds 1 --common=--seed=3", "--variants", "dance", "--seed"),
    ("compare toy --out new --seeds 0 --variants dance --seconds 1 --jobs 0", "--jobs", "0", ">= 1"),
    ("compare toy --out new --seeds 0 --variants dance --iter 5", "unrecognized", "--iter", "5"),
    ("compare moon --out new --seeds 0 --variants dance --iterations 5", "--task", "'moon'", "digits"),
    ("compare --study nowhere.yaml", "--study", "'nowhere.yaml'", "a file"),
]


@pytest.mark.parametrize("case", COMMAND_LINES, ids=lambda case: case[0])
def test_wrong_command_line(case, tmp_path, monkeypatch, capsys):
    line, *fragments = case
    monkeypatch.chdir(tmp_path)
    assert main(line.split()) not in (0, None)
    printed = capsys.readouterr()
    assert len(printed.err.splitlines()) == 1 and printed.out == ""
    assert printed.err.startswith("neighbor-grpo: ")
    assert all(fragment in printed.err for fragment in fragments), printed.err
    assert list(tmp_path.iterdir()) == []
