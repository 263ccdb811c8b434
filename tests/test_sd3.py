"""Stable Diffusion 3: the pipeline's own images, LoRA and full, guidance, the reference, saving and opening again."""

import copy
import json
import math
import os
import subprocess
import sys

import diffusers
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    StableDiffusion3Pipeline,
    UniPCMultistepScheduler,
)
from safetensors.torch import load_file, save_file
from tiny import tiny_sd3
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from neighbor_grpo.flow import randn, seeded, time_grid
from neighbor_grpo.models.pipeline import (
    ADAPTER,
    PipelinePolicy,
    PipelineSettings,
    adapters_off,
    decode,
    encode_prompts,
    fixed_shift,
    open_pipeline,
    save_policy,
)
from neighbor_grpo.models.sd3 import SD3
from neighbor_grpo.neighbor import NeighborGRPO
from neighbor_grpo.penalties import VelocityPenalty
from neighbor_grpo.rollouts import Watched, take
from neighbor_grpo.runs.machine import quiet
from neighbor_grpo.solvers import solve

PROMPTS, STEPS = ["a cat", "two dogs", "a red bird"], 5
BOTH = pytest.mark.parametrize("dual", [False, True], ids=["sd3", "sd35"])
KINDS = pytest.mark.parametrize("rank", [0, 4], ids=["full", "lora"])


def settings_of(dual, rank, **more):
    "Alpha differs from the rank and from twice the rank, so that a wrong scale is seen."
    return PipelineSettings(**(dict(lora_rank=rank, lora_alpha=3, lora_dual=dual) if rank else {}), **more)


def make(pipeline, dual=False, rank=0, moved=False, **more):
    negative = encode_prompts(SD3, pipeline, [""], 12)
    policy = PipelinePolicy(SD3, copy.deepcopy(pipeline.transformer), settings_of(dual, rank, **more), negative)
    return move(policy) if moved else policy


def move(policy, scale=0.1, seed=1):
    "As if it had been trained: every trained weight a little elsewhere."
    generator = seeded(seed)
    for weight in trained(policy).values():
        weight.data += scale * torch.randn(weight.shape, generator=generator)
    return policy


def trained(module):
    return {name: weight for name, weight in module.named_parameters() if weight.requires_grad}


def inputs(pipeline, count=3, seed=0):
    "States, times and conditions."
    cond = take(encode_prompts(SD3, pipeline, PROMPTS, 12), torch.arange(count) % 3)
    generator = seeded(seed)
    return randn((count, 4, 8, 8), generator), torch.rand(count, generator=generator), cond


def call(pipeline, noise, guidance_scale=1.0, **more):
    "Images as a user of diffusers makes them."
    options = dict(guidance_scale=guidance_scale, max_sequence_length=12, output_type="pt") | more
    sigmas = torch.linspace(1, 1 / STEPS, STEPS).tolist()
    return pipeline(PROMPTS, num_inference_steps=STEPS, sigmas=sigmas, latents=noise, **options).images


@torch.no_grad()
def sample(policy, pipeline, noise):
    "The same images with our parts."
    ts = time_grid(STEPS, fixed_shift(pipeline))
    return decode(pipeline, solve(policy, noise, ts, encode_prompts(SD3, pipeline, PROMPTS, 12), "euler").x[-1])


# Of velocities of order one. Layers with and without a gradient take different products of matrices, of 100 terms.
ROUNDING = 1e-5


def apart(a, b):
    return (a - b).abs().max().item()


class Spy(nn.Module):
    "A transformer that remembers what it was given."

    def __init__(self, transformer):
        super().__init__()
        self.calls = []
        transformer.register_forward_hook(lambda module, args, output: self.calls.append(args))


# --- the pipeline's own images ---


@BOTH
@KINDS
@pytest.mark.parametrize("guidance_scale", [1.0, 2.5])
def test_images_are_the_pipelines_own(dual, rank, guidance_scale):
    pipeline, noise = tiny_sd3(dual), randn((3, 4, 8, 8), seeded(0))
    policy = make(pipeline, dual, rank, guidance_scale=guidance_scale)
    expected = call(pipeline, noise, guidance_scale)
    assert (sample(policy, pipeline, noise) - expected).abs().max() < 1e-5
    assert (sample(move(policy), pipeline, noise) - expected).abs().max() > 1e-3, "a policy that moved gives others"
    pipeline.transformer = policy.transformer
    assert (sample(policy, pipeline, noise) - call(pipeline, noise, guidance_scale)).abs().max() < 1e-5


@pytest.mark.parametrize("shift", [1.0, 3.0, 7.5])
@pytest.mark.parametrize("steps", [1, 2, 5, 28])
def test_time_grid_is_the_schedulers(shift, steps):
    pipeline = tiny_sd3(shift=shift)
    pipeline.scheduler.set_timesteps(sigmas=torch.linspace(1, 1 / steps, steps).tolist())
    assert fixed_shift(pipeline) == shift
    assert (time_grid(steps, fixed_shift(pipeline)) - pipeline.scheduler.sigmas).abs().max() < 1e-6


FLOW = dict(use_flow_sigmas=True, prediction_type="flow_prediction")


@pytest.mark.parametrize(
    "scheduler",
    [
        FlowMatchHeunDiscreteScheduler(shift=2.0),
        DPMSolverMultistepScheduler(flow_shift=2.0, **FLOW),
        UniPCMultistepScheduler(flow_shift=2.0, **FLOW),
    ],
    ids=lambda scheduler: type(scheduler).__name__,
)
def test_shift_of_other_schedulers(scheduler):
    pipeline = tiny_sd3()
    pipeline.scheduler = scheduler
    assert fixed_shift(pipeline) == 2.0


class Shifted(FlowMatchEulerDiscreteScheduler):
    "Its shift was changed where saving does not see it."

    def __init__(self):
        super().__init__(shift=3.0)
        self.set_shift(2.0)


@pytest.mark.parametrize(
    "scheduler, reason",
    [
        (lambda old: FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True), "use_dynamic_shifting"),
        (lambda old: FlowMatchEulerDiscreteScheduler(use_karras_sigmas=True), "use_karras_sigmas"),
        (lambda old: FlowMatchEulerDiscreteScheduler(shift_terminal=0.1), "shift_terminal"),
        (lambda old: FlowMatchEulerDiscreteScheduler(stochastic_sampling=True), "stochastic_sampling"),
        (lambda old: DDIMScheduler(), "flow matching"),
        (lambda old: DPMSolverMultistepScheduler(), "flow matching"),
        (lambda old: DPMSolverMultistepScheduler.from_config(old.config, **FLOW), "1.0 and 3.0"),
        (lambda old: Shifted(), "2.0 and 3.0"),
    ],
)
def test_a_scheduler_without_one_shift_is_refused(scheduler, reason):
    pipeline = tiny_sd3()
    pipeline.scheduler = scheduler(pipeline.scheduler)
    with pytest.raises(ValueError, match="pipeline.scheduler must be") as error:
        fixed_shift(pipeline)
    assert reason in str(error.value)


# --- prompts and images ---


def test_prompts_are_encoded_as_by_the_pipeline():
    pipeline = tiny_sd3()
    pipeline.text_encoder_3.requires_grad_(True)
    found = encode_prompts(SD3, pipeline, PROMPTS, 13)
    embeds, _, pooled, _ = pipeline.encode_prompt(PROMPTS, None, None, max_sequence_length=13)
    assert (found["embeds"] - embeds).abs().max() < 1e-5 and torch.equal(found["pooled"], pooled)
    assert found["embeds"].shape == (3, 16 + 13, 32) and found["pooled"].shape == (3, 24)
    assert not found["embeds"].requires_grad and embeds.requires_grad


@pytest.mark.parametrize("batch", [1, 2, 3, 64])
def test_the_batch_size_of_encoding_does_not_matter(batch):
    pipeline = tiny_sd3()
    found, expected = encode_prompts(SD3, pipeline, PROMPTS, 12, batch), encode_prompts(SD3, pipeline, PROMPTS, 12)
    assert all((found[name] - expected[name]).abs().max() < 1e-5 for name in ("embeds", "pooled"))


def test_embeddings_are_float32_whatever_the_encoders():
    pipeline = tiny_sd3()
    for part in (pipeline.text_encoder, pipeline.text_encoder_2, pipeline.text_encoder_3):
        part.to(torch.bfloat16)
    assert {value.dtype for value in encode_prompts(SD3, pipeline, PROMPTS, 12).values()} == {torch.float32}


def test_a_pipeline_without_t5_encodes_too():
    pipeline = tiny_sd3()
    pipeline.text_encoder_3 = pipeline.tokenizer_3 = None
    found = encode_prompts(SD3, pipeline, PROMPTS, 12)["embeds"]
    assert found.shape == (3, 28, 32) and (found[:, 16:] == 0).all()


@pytest.mark.parametrize("batch", [1, 2, 64])
def test_images_are_decoded_as_by_the_pipeline(batch):
    pipeline, noise = tiny_sd3(), randn((3, 4, 8, 8), seeded(0))
    latents = call(pipeline, noise, output_type="latent")
    images = decode(pipeline, latents.requires_grad_(), batch)
    assert (images - call(pipeline, noise)).abs().max() < 1e-6
    assert images.shape == (3, 3, 16, 16) and images.min() >= 0 and images.max() <= 1 and not images.requires_grad


def test_images_are_float32_whatever_the_autoencoder():
    pipeline, latents = tiny_sd3(), randn((2, 4, 8, 8), seeded(0))
    expected = decode(pipeline, latents)
    pipeline.vae.to(torch.bfloat16)
    images = decode(pipeline, latents)
    assert images.dtype == torch.float32 and 0 < (images - expected).abs().max() < 0.05


@pytest.mark.parametrize("height, width", [(16, 16), (4, 32), (8, 12)])
def test_latent_shape_is_that_of_the_pipeline(height, width):
    pipeline = tiny_sd3()
    options = dict(num_inference_steps=1, height=height, width=width, max_sequence_length=12, output_type="latent")
    assert SD3.latent_shape(pipeline, height, width) == tuple(pipeline("a cat", **options).images.shape[1:])


# --- opening ---


@pytest.fixture(scope="session")
def saved(tmp_path_factory):
    "A folder for each kind of tiny pipeline."
    folders = {dual: tmp_path_factory.mktemp("sd35" if dual else "sd3") / "base" for dual in (False, True)}
    with quiet():
        for dual, folder in folders.items():
            tiny_sd3(dual).save_pretrained(folder)
    return folders


def edited(saved, tmp_path, change):
    "A copy of a saved pipeline with something changed."
    import shutil

    folder = tmp_path / "copy"
    shutil.copytree(saved[False], folder)
    change(folder)
    return folder


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_opened_pipeline_is_ready(saved, dtype, capfd):
    pipeline = open_pipeline(SD3, saved[True], dtype)
    parts = [part for part in pipeline.components.values() if isinstance(part, nn.Module)]
    assert len(parts) == 5 and not any(part.training for part in parts)
    assert {weight.dtype for part in parts for weight in part.parameters()} == {dtype}
    assert not any(weight.requires_grad for part in parts for weight in part.parameters())
    if dtype == torch.float32:
        noise = randn((3, 4, 8, 8), seeded(0))
        assert torch.equal(call(pipeline, noise), call(tiny_sd3(True), noise))
    assert capfd.readouterr() == ("", "")


def test_progress_bars_are_as_before(saved):
    logs = [diffusers.utils.logging, sys.modules["transformers"].utils.logging]
    for enabled in (True, False, True):
        for log in logs:
            (log.enable_progress_bar if enabled else log.disable_progress_bar)()
        open_pipeline(SD3, saved[False])
        assert [log.is_progress_bar_enabled() for log in logs] == [enabled] * 2


def rename_class(folder):
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps(index | {"_class_name": "FluxPipeline"}))


def pickle_only(folder):
    weights = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    torch.save(load_file(weights), weights.with_suffix(".bin"))
    weights.unlink()


@pytest.mark.parametrize(
    "change, fragment",
    [
        (rename_class, "a FluxPipeline"),
        (pickle_only, "safetensors"),
        (lambda folder: (folder / "model_index.json").unlink(), "model_index.json"),
        (lambda folder: (folder / "model_index.json").write_text("{"), "model_index.json"),
    ],
)
def test_what_is_no_pipeline_is_refused(saved, tmp_path, change, fragment):
    folder = edited(saved, tmp_path, change)
    with pytest.raises(ValueError, match="source must be a folder with a StableDiffusion3Pipeline") as error:
        open_pipeline(SD3, folder)
    assert fragment in str(error.value) and str(folder) in str(error.value)


# --- the velocity ---


@BOTH
@KINDS
def test_velocity_is_the_transformers_at_a_thousand_times_t(dual, rank):
    pipeline = tiny_sd3(dual)
    policy = make(pipeline, dual, rank)
    x, t, cond = inputs(pipeline)
    expected = pipeline.transformer(x, cond["embeds"], cond["pooled"], 1000 * t).sample
    assert apart(policy(x, t, cond), expected) < ROUNDING < 1e-3 < apart(policy(x, t / 2, cond), expected)


@KINDS
def test_each_row_has_its_own_time_and_prompt(rank):
    pipeline = tiny_sd3()
    policy, (x, t, cond) = make(pipeline, rank=rank, moved=True, train_guidance_scale=2.0), inputs(pipeline, 5)
    together = policy(x, t, cond)
    for i in range(5):
        rows = torch.tensor([i])
        assert (policy(x[rows], t[rows], take(cond, rows)) - together[rows]).abs().max() < 1e-5


def test_states_stay_float32_beside_a_bfloat16_network(saved):
    pipeline, half = open_pipeline(SD3, saved[False]), open_pipeline(SD3, saved[False], torch.bfloat16)
    policy = PipelinePolicy(SD3, half.transformer, PipelineSettings(lora_rank=4))
    spy = Spy(policy.transformer)
    x, t, cond = inputs(pipeline)
    v = policy(x, t, cond)
    expected = make(pipeline)(x, t, cond)
    assert v.dtype == torch.float32 and 1e-4 < ((v - expected).norm() / expected.norm()).item() < 0.02
    given_x, embeds, pooled, time = spy.calls[0]
    assert given_x.dtype == embeds.dtype == pooled.dtype == torch.bfloat16
    assert torch.equal(time, 1000 * t), "times lose nothing"
    path = solve(policy, x, time_grid(4), cond)
    assert path.x.dtype == path.v.dtype == torch.float32
    assert {weight.dtype for weight in trained(policy).values()} == {torch.float32}
    assert {weight.dtype for weight in policy.parameters() if not weight.requires_grad} == {torch.bfloat16}
    v.square().mean().backward()
    assert all(weight.grad.dtype == torch.float32 for weight in trained(policy).values())


def test_all_weights_are_trained_in_float32(saved):
    policy = PipelinePolicy(SD3, open_pipeline(SD3, saved[False], torch.bfloat16).transformer)
    weights = list(policy.parameters())
    assert {weight.dtype for weight in weights} == {torch.float32} and all(weight.requires_grad for weight in weights)


# --- guidance ---


@pytest.mark.parametrize("scale, other", [(1.0, 1.0), (1.0, 3.0), (2.5, 1.0), (2.5, 2.5), (2.5, 3.0)])
def test_evaluations_are_paid_for_only_where_there_is_guidance(scale, other):
    pipeline = tiny_sd3()
    policy = make(pipeline, guidance_scale=scale, train_guidance_scale=other)
    spy = Spy(policy.transformer)
    x, t, cond = inputs(pipeline)
    policy(x, t, cond)
    with torch.no_grad():
        policy(x, t, cond)
    assert [len(args[0]) for args in spy.calls] == [3 if other == 1 else 6, 3 if scale == 1 else 6]
    assert policy.split_guidance == (scale != other)


def test_guidance_extrapolates_from_the_empty_prompt():
    pipeline = tiny_sd3()
    policy = make(pipeline, guidance_scale=2.5, train_guidance_scale=4.0)
    x, t, cond = inputs(pipeline)
    empty = take(encode_prompts(SD3, pipeline, [""], 12), torch.zeros(3, dtype=torch.long))
    plain = make(pipeline)
    v, v_empty = plain(x, t, cond), plain(x, t, empty)
    with torch.no_grad():
        rollout = policy(x, t, cond)
    assert (policy(x, t, cond) - (v_empty + 4.0 * (v - v_empty))).abs().max() < 1e-5
    assert (rollout - (v_empty + 2.5 * (v - v_empty))).abs().max() < 1e-5
    assert (policy(x, t, empty) - v_empty).abs().max() < 1e-5, "nothing to extrapolate"


@KINDS
def test_the_reference_has_the_guidance_of_the_trained_steps(rank):
    pipeline = tiny_sd3()
    policy = make(pipeline, rank=rank, guidance_scale=2.5, train_guidance_scale=4.0)
    reference, (x, t, cond) = policy.reference(), inputs(pipeline)
    expected = policy(x, t, cond)
    with torch.no_grad():
        assert apart(reference(x, t, cond), expected) < ROUNDING < 1e-3 < apart(policy(x, t, cond), expected)


def test_the_empty_prompt_is_no_part_of_the_weights():
    pipeline = tiny_sd3()
    policy = make(pipeline, guidance_scale=2.0)
    assert policy.state_dict().keys() == make(pipeline).state_dict().keys()
    assert set(dict(policy.named_buffers())) >= {"negative_embeds", "negative_pooled"}


# --- adapters ---

FIRST = "to_q to_k to_v to_out.0 add_q_proj add_k_proj add_v_proj to_add_out".split()
LAST = "to_q to_k to_v to_out.0 add_q_proj add_k_proj add_v_proj".split()


@pytest.mark.parametrize("attn2", [False, True])
def test_adapters_are_on_the_projections_of_the_attention(attn2):
    pipeline = tiny_sd3(dual=True)
    policy = PipelinePolicy(SD3, copy.deepcopy(pipeline.transformer), PipelineSettings(lora_rank=4, lora_dual=attn2))
    places = [f"0.attn.{name}" for name in FIRST] + [f"1.attn.{name}" for name in LAST]
    places += [f"0.attn2.{name}" for name in FIRST[:4]] if attn2 else []
    expected = {
        f"transformer.transformer_blocks.{place}.lora_{part}.{ADAPTER}.weight" for place in places for part in "AB"
    }
    assert trained(policy).keys() == expected
    assert policy.transformer.peft_config[ADAPTER].lora_alpha == 8, "twice the rank unless said otherwise"


def base_weights(policy):
    return {
        name.replace(".base_layer", ""): weight.clone()
        for name, weight in policy.transformer.state_dict().items()
        if ADAPTER not in name
    }


def test_training_adapters_leaves_the_base_alone():
    pipeline = tiny_sd3(dual=True)
    policy = make(pipeline, True, 4)
    x, t, cond = inputs(pipeline)
    optimizer = torch.optim.AdamW(policy.parameters(), 0.1)
    for _ in range(3):
        optimizer.zero_grad()
        policy(x, t, cond).square().mean().backward()
        optimizer.step()
    before, after = pipeline.transformer.state_dict(), base_weights(policy)
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    idle = {name.split(".lora_")[0] for name, weight in trained(policy).items() if weight.grad.abs().max() == 0}
    assert idle == {"transformer.transformer_blocks.1.attn.add_q_proj"}, "what the last text tokens ask for is dropped"


def test_first_weights_depend_on_their_seed_alone():
    pipeline = tiny_sd3()

    def first(global_seed, seed):
        torch.manual_seed(global_seed)
        state = torch.get_rng_state()
        policy = PipelinePolicy(SD3, copy.deepcopy(pipeline.transformer), PipelineSettings(lora_rank=4), seed=seed)
        assert torch.equal(torch.get_rng_state(), state), "drew from the global numbers"
        return torch.cat([weight.flatten() for weight in trained(policy).values()])

    assert torch.equal(first(0, 5), first(1, 5)) and not torch.equal(first(0, 5), first(0, 6))


@BOTH
def test_a_reference_without_adapters_is_the_base_bit_for_bit(dual):
    pipeline = tiny_sd3(dual)
    policy = make(pipeline, dual, 4)
    reference = policy.reference()
    x, t, cond = inputs(pipeline)
    move(policy)
    with torch.no_grad():
        base = pipeline.transformer(x, cond["embeds"], cond["pooled"], 1000 * t).sample
        before = policy(x, t, cond)
        assert torch.equal(reference(x, t, cond), base) and not torch.equal(before, base)
        assert torch.equal(policy(x, t, cond), before)
    assert not reference.state_dict() and not list(reference.parameters())


def test_adapters_come_back_after_an_error():
    pipeline = tiny_sd3()
    policy = make(pipeline, rank=4, moved=True)
    reference, (x, t, cond) = policy.reference(), inputs(pipeline)
    with torch.no_grad():
        before = policy(x, t, cond)
        with pytest.raises(RuntimeError):
            reference(x, t, dict(embeds=cond["embeds"][..., :5], pooled=cond["pooled"]))
        assert torch.equal(policy(x, t, cond), before)
    assert len(trained(policy)) == 30


def test_turning_adapters_off_changes_nothing_about_what_is_trained():
    policy = make(tiny_sd3(), rank=4)
    frozen = next(iter(trained(policy).values())).requires_grad_(False)
    names = trained(policy).keys()
    with adapters_off(policy.transformer):
        pass
    assert trained(policy).keys() == names and not frozen.requires_grad


def test_the_gradient_is_the_same_if_the_reference_is_asked_in_between():
    pipeline = tiny_sd3(dual=True)
    policy = make(pipeline, True, 4, moved=True)
    x, t, cond = inputs(pipeline)
    with torch.no_grad():
        target = make(pipeline)(x, t, cond)

    def gradient(between):
        policy.zero_grad()
        v = policy(x, t, cond)
        if between:
            with torch.no_grad():
                v_reference = policy.reference()(x, t, cond)
        (v - (v_reference if between else target)).square().mean().backward()
        return torch.cat([weight.grad.flatten() for weight in trained(policy).values()])

    between, apart_from_it = gradient(True), gradient(False)
    assert (between - apart_from_it).norm() < 1e-4 * between.norm()  # a mean of differences that are not small


def test_a_full_reference_does_not_follow_the_policy():
    pipeline = tiny_sd3()
    policy = make(pipeline)
    reference, (x, t, cond) = policy.reference(), inputs(pipeline)
    before = policy(x, t, cond)
    move(policy)
    assert apart(reference(x, t, cond), before) < ROUNDING < 1e-3 < apart(policy(x, t, cond), before)
    assert not trained(reference)
    assert reference.state_dict().keys() == policy.state_dict().keys()


# --- copies ---


@KINDS
def test_a_copy_is_trained_apart(rank):
    pipeline = tiny_sd3(dual=True)
    policy = make(pipeline, True, rank, moved=True, guidance_scale=2.0)
    twin, (x, t, cond) = copy.deepcopy(policy), inputs(pipeline)
    with torch.no_grad():
        before = policy(x, t, cond)
        assert torch.equal(twin(x, t, cond), before) and trained(twin).keys() == trained(policy).keys()
        move(twin, seed=2)
        assert torch.equal(policy(x, t, cond), before) and not torch.equal(twin(x, t, cond), before)
    shared = {weight.data_ptr() for weight in policy.parameters()} & {w.data_ptr() for w in twin.parameters()}
    assert len(shared) == len(list(policy.parameters())) - len(trained(policy)), "what is frozen is shared, no more"


def test_casting_a_copy_leaves_the_original():
    policy = make(tiny_sd3(), rank=4)
    copy.deepcopy(policy).double()
    assert {weight.dtype for weight in policy.parameters()} == {torch.float32}


@KINDS
def test_an_average_of_the_weights_is_one(rank):
    pipeline = tiny_sd3()
    policy = make(pipeline, rank=rank)
    average = AveragedModel(policy, multi_avg_fn=get_ema_multi_avg_fn(0.75))
    average.n_averaged += 1
    start = {name: weight.detach().clone() for name, weight in policy.named_parameters()}
    move(policy)
    average.update_parameters(policy)
    changed = trained(policy).keys()
    for name, weight in average.module.named_parameters():
        now = dict(policy.named_parameters())[name]
        expected = 0.75 * start[name] + 0.25 * now if name in changed else start[name]
        assert torch.allclose(weight, expected, atol=1e-6) and (name in changed or torch.equal(weight, start[name]))
        assert name in changed or torch.equal(now, start[name])


# --- the gradient ---


@BOTH
@KINDS
def test_gradient_checkpointing_gives_the_same_gradient(dual, rank):
    pipeline = tiny_sd3(dual)
    x, t, cond = inputs(pipeline)
    found = []
    for checkpointing in (False, True):
        policy = make(pipeline, dual, rank, moved=True, gradient_checkpointing=checkpointing)
        policy(x, t, cond).square().mean().backward()
        found.append(torch.cat([weight.grad.flatten() for weight in trained(policy).values()]))
        assert policy.transformer.is_gradient_checkpointing == checkpointing
    assert found[0].norm() > 0 and (found[0] - found[1]).norm() < 1e-6 * found[0].norm()


@KINDS
@pytest.mark.parametrize("micro_batch", [0, 4])
def test_a_step_of_the_algorithm_lowers_its_loss(rank, micro_batch):
    "One step against the gradient, on the real classes and with a reference, lowers the loss."
    pipeline = tiny_sd3(dual=True)
    policy = make(pipeline, True, rank, moved=True)
    algorithm = NeighborGRPO(group_size=4, steps=3, trained_steps=2, anchors=2, shift=3.0)
    penalty = VelocityPenalty(0.1)
    cond, noise = encode_prompts(SD3, pipeline, PROMPTS, 12), randn((3, 4, 8, 8), seeded(0))
    rollout = algorithm.rollout(policy, noise, cond, seeded(1))
    rewards = decode(pipeline, rollout.samples.flatten(0, 1)).mean((1, 2, 3)).unflatten(0, (3, 4))
    reference = policy.reference()
    move(policy, 0.02, seed=3)

    def losses():
        watched = Watched(policy)
        advantages, count = algorithm.advantages(rewards), len(algorithm.choose(rollout, seeded(2)))
        for part in algorithm.losses(watched, rollout, advantages, seeded(2), micro_batch=micro_batch):
            yield part + penalty.distance(watched, reference, 1.0) / count

    def loss():
        return sum(part if micro_batch == 0 else part.detach() for part in losses())

    for part in losses():
        part.backward()
    gradient = {name: weight.grad.clone() for name, weight in trained(policy).items()}
    norm = math.sqrt(sum(g.square().sum().item() for g in gradient.values()))
    assert norm > 0 and math.isfinite(norm)
    before = loss().item()
    for name, weight in trained(policy).items():
        weight.data -= 1e-3 / norm * gradient[name]
    assert loss().item() < before


# --- saving ---

PLAIN = """
import sys
import torch
from diffusers import StableDiffusion3Pipeline
from safetensors.torch import load_file, save_file
torch.set_num_threads(1)
noise = load_file(sys.argv[1] + "/noise.safetensors")["noise"]
images = {}
for name in sys.argv[2:]:
    base, kind = name.split("-")
    folder = f"{sys.argv[1]}/{name}"
    pipeline = StableDiffusion3Pipeline.from_pretrained(folder if kind == "full" else f"{sys.argv[1]}/{base}")
    if kind == "lora": pipeline.load_lora_weights(folder)
    for scale in (1.0, 2.5):
        images[f"{name}-{scale}"] = pipeline(
            ["a cat", "two dogs", "a red bird"], num_inference_steps=5, sigmas=torch.linspace(1, 0.2, 5).tolist(),
            latents=noise, guidance_scale=scale, max_sequence_length=12, output_type="pt").images
assert not [name for name in sys.modules if name.startswith("neighbor_grpo")]
save_file(images, sys.argv[1] + "/images.safetensors")
"""


def test_what_was_saved_opens_without_this_package(tmp_path):
    "Full and LoRA, SD3 and SD3.5, with and without guidance: the same images in another process."
    noise, expected, names = randn((3, 4, 8, 8), seeded(0)), {}, []
    save_file({"noise": noise}, tmp_path / "noise.safetensors")
    for base, dual in (("sd3", False), ("sd35", True)):
        pipeline = tiny_sd3(dual)
        with quiet():
            pipeline.save_pretrained(tmp_path / base)
        for kind, rank in (("full", 0), ("lora", 4)):
            policy = make(pipeline, dual, rank, moved=True)
            save_policy(policy, pipeline, tmp_path / f"{base}-{kind}")
            names.append(f"{base}-{kind}")
            for scale in (1.0, 2.5):
                guided = make(pipeline, dual, rank, guidance_scale=scale)
                guided.load_state_dict(policy.state_dict())
                expected[f"{names[-1]}-{scale}"] = sample(guided, pipeline, noise)
                assert (expected[f"{names[-1]}-{scale}"] - call(pipeline, noise, scale)).abs().max() > 1e-3
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    command = [sys.executable, "-c", PLAIN, str(tmp_path), *names]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = load_file(tmp_path / "images.safetensors")
    assert found.keys() == expected.keys() and len(found) == 8
    assert {name: (found[name] - expected[name]).abs().max() < 1e-5 for name in found} == dict.fromkeys(found, True)


@KINDS
def test_only_safetensors_are_written_and_nothing_is_left_behind(tmp_path, rank):
    pipeline = tiny_sd3()
    for _ in range(2):  # the second replaces the first
        policy = make(pipeline, rank=rank, moved=True)
        save_policy(policy, pipeline, tmp_path / "runs" / "policy")
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["policy"]
    files = {path.suffix for path in (tmp_path / "runs" / "policy").rglob("*") if path.is_file()}
    assert files == {".safetensors"} if rank else files == {".safetensors", ".json"}


def test_a_saved_transformer_is_float32_as_trained_and_the_rest_as_it_was(saved, tmp_path):
    pipeline = open_pipeline(SD3, saved[True], torch.bfloat16)
    policy = move(PipelinePolicy(SD3, copy.deepcopy(pipeline.transformer)))
    save_policy(policy, pipeline, tmp_path / "policy")
    found = load_file(tmp_path / "policy" / "transformer" / "diffusion_pytorch_model.safetensors")
    expected = policy.transformer.state_dict()
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)
    rest = load_file(tmp_path / "policy" / "vae" / "diffusion_pytorch_model.safetensors")
    assert {value.dtype for value in rest.values()} == {torch.bfloat16}
    again = open_pipeline(SD3, tmp_path / "policy")
    assert torch.equal(again.transformer.proj_out.weight, policy.transformer.proj_out.weight)
    assert pipeline.transformer.dtype == torch.bfloat16, "the pipeline is not changed"


def test_all_adapters_are_saved_by_the_names_that_diffusers_knows(tmp_path):
    pipeline = tiny_sd3(dual=True)
    save_policy(make(pipeline, True, 4), pipeline, tmp_path / "policy")
    names = load_file(tmp_path / "policy" / "pytorch_lora_weights.safetensors")
    assert len(names) == 2 * 19 and all(name.startswith("transformer.") for name in names)
    pipeline.load_lora_weights(tmp_path / "policy")
    assert pipeline.transformer.transformer_blocks[0].attn.to_q.scaling == {"default_0": 1.0}


def test_a_loaded_policy_can_be_saved_and_trained_again(tmp_path):
    pipeline, noise = tiny_sd3(), randn((3, 4, 8, 8), seeded(0))
    policy = make(pipeline, moved=True)
    save_policy(policy, pipeline, tmp_path / "policy")
    again = open_pipeline(SD3, tmp_path / "policy")
    assert (sample(make(again), again, noise) - sample(policy, pipeline, noise)).abs().max() < 1e-5


@KINDS
def test_an_average_can_be_saved(tmp_path, rank):
    pipeline, noise = tiny_sd3(), randn((3, 4, 8, 8), seeded(0))
    average = AveragedModel(make(pipeline, rank=rank, moved=True)).module
    save_policy(average, pipeline, tmp_path / "policy")
    with quiet():
        plain = tiny_sd3() if rank else StableDiffusion3Pipeline.from_pretrained(tmp_path / "policy")
    if rank:
        plain.load_lora_weights(tmp_path / "policy")
    assert (call(plain, noise) - sample(average, pipeline, noise)).abs().max() < 1e-5


@KINDS
def test_a_failed_write_leaves_what_was_there(tmp_path, rank, monkeypatch):
    pipeline = tiny_sd3()
    save_policy(make(pipeline, rank=rank), pipeline, tmp_path / "policy")
    before = {path: path.read_bytes() for path in (tmp_path / "policy").rglob("*") if path.is_file()}

    def fail(*args, **more):
        raise OSError("the disk is full")

    monkeypatch.setattr(StableDiffusion3Pipeline, "save_lora_weights" if rank else "save_pretrained", fail)
    with pytest.raises(OSError, match="disk"):
        save_policy(make(pipeline, rank=rank, moved=True), pipeline, tmp_path / "policy")
    assert {path: path.read_bytes() for path in (tmp_path / "policy").rglob("*") if path.is_file()} == before
    monkeypatch.undo()
    save_policy(make(pipeline, rank=rank, moved=True), pipeline, tmp_path / "policy")
    assert [path.name for path in tmp_path.iterdir()] == ["policy"]


def test_a_folder_of_something_else_is_left_alone(tmp_path):
    pipeline = tiny_sd3()
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.txt").write_text("years of work")
    (tmp_path / "file").write_text("")
    for name in ("thesis", "file"):
        with pytest.raises(ValueError, match="folder must be new, empty, or one that a policy was saved to"):
            save_policy(make(pipeline), pipeline, tmp_path / name)
    assert (tmp_path / "thesis" / "chapter.txt").read_text() == "years of work"


@BOTH
@KINDS
def test_compiled_blocks_compute_the_same(dual, rank, monkeypatch):
    "With and without gradient, adapters on and off, and in a copy; the compiler itself is left out: it takes a minute."
    compiled = []

    def compile(block):
        compiled.append(block)
        block._compiled_call_impl = torch.compile(block._call_impl, backend="eager", dynamic=False)

    monkeypatch.setattr(nn.Module, "compile", compile)
    pipeline = tiny_sd3(dual)
    plain, policy = (
        make(pipeline, dual, rank, guidance_scale=2.0),
        make(pipeline, dual, rank, guidance_scale=2.0, compile=True),
    )
    assert (
        compiled == list(policy.transformer.transformer_blocks)
        and plain.state_dict().keys() == policy.state_dict().keys()
    )
    for each in (plain, policy):
        move(each)
    x, t, cond = inputs(pipeline)
    for velocity, expected in (
        (policy, plain),
        (policy.reference(), plain.reference()),
        (copy.deepcopy(policy), plain),
    ):
        with torch.no_grad():
            assert (velocity(x, t, cond) - expected(x, t, cond)).abs().max() < 1e-6
    for each in (plain, policy):
        each(x, t, cond).square().mean().backward()
    for name, weight in trained(policy).items():
        assert (weight.grad - trained(plain)[name].grad).abs().max() < 1e-6
