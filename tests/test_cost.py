"""Counts from shapes against counts by hand, and the phases of a measured iteration."""

import pytest
import torch
from peft.tuners.lora import LoraLayer
from torch import nn

from neighbor_grpo.cli import main
from neighbor_grpo.lab import cost
from neighbor_grpo.lab.cost import (
    MODELS,
    RandomTask,
    count_cost,
    estimate,
    measure_model,
    random_conditions,
    random_policy,
    timed_phases,
)
from neighbor_grpo.models.pipeline import PipelineSettings
from neighbor_grpo.neighbor import NeighborGRPO
from neighbor_grpo.rivals.gaussian import DanceGRPO
from neighbor_grpo.runs.trainer import Trainer
from neighbor_grpo.training import TrainSettings

TINY_FLUX = dict(in_channels=64, num_layers=1, num_single_layers=2, attention_head_dim=16, num_attention_heads=2)
TINY_FLUX |= dict(joint_attention_dim=32, pooled_projection_dim=8, axes_dims_rope=(4, 4, 8), guidance_embeds=True)


@pytest.fixture(autouse=True)
def tiny_flux(monkeypatch):
    "FLUX at a size that can be counted here."
    told = dict(embeds=(12, 32), pooled=(8,))
    model = cost.Model(MODELS["flux-dev"].family, MODELS["flux-dev"].network, TINY_FLUX, told)
    monkeypatch.setitem(MODELS, "tiny-flux", model)


def products(name, pixels, guidance_scale=1.0):
    "Operations of linear layers and convolutions, by hooks, and of attention, by its formula, for one state."
    model, total = MODELS[name], 0
    policy = random_policy(model, PipelineSettings(guidance_scale=guidance_scale), "cpu")
    network = policy.transformer

    def count(module, inputs, output):
        nonlocal total
        total += 2 * output.numel() * module.weight[0].numel()

    for module in network.modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            module.register_forward_hook(count)
    x = torch.randn(1, *model.shape(pixels, pixels))
    with torch.no_grad():
        policy(x, torch.rand(1), random_conditions(model, 1))
    c, image = network.config, (pixels // 16) ** 2
    layers = c.num_layers + c.get("num_single_layers", 0)
    squares = layers * (image + model.told["embeds"][0]) ** 2 + len(c.get("dual_attention_layers", ())) * image**2
    rows = 2 if guidance_scale != 1 and name == "tiny" else 1
    return (total + rows * 4 * c.num_attention_heads * c.attention_head_dim * squares) / 1e12


@pytest.mark.parametrize("name", ["tiny", "tiny-flux"])
@pytest.mark.parametrize("pixels", [64, 192])
@pytest.mark.parametrize("guidance_scale", [1.0, 2.0])
def test_operations_are_those_of_the_layers(name, pixels, guidance_scale):
    counted = count_cost(name, pixels, pixels, PipelineSettings(guidance_scale=guidance_scale))["forward"]
    assert counted == pytest.approx(products(name, pixels, guidance_scale), rel=1e-6)


def saved_bytes(policy, x, t, cond):
    "What autograd really keeps, on real tensors."
    kept, weights = {}, {weight.untyped_storage().data_ptr() for weight in policy.parameters()}

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()  # held, so that no address comes twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        policy(x, t, cond).square().mean()
    return sum(storage.nbytes() for address, storage in kept.items() if address not in weights) / 1e9


@pytest.mark.parametrize("name", ["tiny", "tiny-flux"])
@pytest.mark.parametrize("settings", [dict(), dict(lora_rank=4), dict(lora_rank=4, gradient_checkpointing=True)])
def test_bytes_are_those_that_autograd_keeps(name, settings):
    settings, model = PipelineSettings(**settings), MODELS[name]
    policy = random_policy(model, settings, "cpu")
    cond = random_conditions(model, 1)
    real = saved_bytes(policy, torch.randn(1, model.channels, 8, 8), torch.rand(1), cond)
    counted = count_cost(name, 64, 64, settings)
    assert counted["kept"] == pytest.approx(real, rel=1e-6)
    size = sum(weight.numel() * weight.element_size() for weight in policy.parameters())
    assert counted["weights"] == pytest.approx(size / 1e9)
    if settings.gradient_checkpointing:
        assert counted["kept"] < 0.3 * count_cost(name, 64, 64, PipelineSettings(lora_rank=4))["kept"]


def test_adapters_make_a_gradient_cheaper():
    full, adapters, again = (
        count_cost("tiny", 128, 128, PipelineSettings(**more))
        for more in ({}, dict(lora_rank=1), dict(lora_rank=1, gradient_checkpointing=True))
    )
    assert full["both"] / full["forward"] == pytest.approx(3, abs=0.15)
    assert adapters["both"] / adapters["forward"] == pytest.approx(2, abs=0.15)
    assert again["both"] / again["forward"] == pytest.approx(3, abs=0.15)
    assert adapters["trained"] < 0.1 * full["trained"]


def test_estimate_adds_up():
    counted = dict(forward=2.0, both=5.0, kept=0.5, weights=10.0, trained=1.0)
    found = estimate(counted, NeighborGRPO(), groups=3, micro_batch=4, rate=100.0, evaluations=2)
    assert found["seconds"] == pytest.approx(3 * 12 * 2 * (8 * 2.0 + 4 / 3 * 5.0) / 100)
    assert found["memory"] == pytest.approx(10 + 4 * 1 + 4 * 2 * 0.5)


@pytest.mark.parametrize("model", ["flux2-klein-4b", "qwen-image", "sana-1.6b", "wan-1.3b"])
def test_a_decoder_of_another_kind_is_not_timed(model):
    with pytest.raises(ValueError, match="decode_batch must be 0 for"):
        RandomTask(model, 64, 64, decode_batch=4)


def test_phases_of_an_iteration(monkeypatch):
    "On a clock that moves only while the transformer works, nothing happens outside of it."
    task = RandomTask("tiny", 64, 64, PipelineSettings(lora_rank=2))
    now = [0.0]
    monkeypatch.setattr(cost, "wall_time", lambda: now[0])
    forward = task.policy.transformer.forward

    def slow(*arguments, **options):
        now[0] += 1.0
        return forward(*arguments, **options)

    task.policy.transformer.forward = slow
    trainer = Trainer(task, NeighborGRPO(steps=5, trained_steps=2, shift=None), TrainSettings(groups=1, micro_batch=4))
    phases = timed_phases(trainer)
    assert phases["rollout"] == 5 and phases["seconds"] == 5 + 2  # eight trained states, four at once
    assert phases["rollout_outside"] == pytest.approx(0) and phases["update_outside"] == pytest.approx(0)
    assert "credit" not in vars(trainer)


def test_measured_rows():
    algorithms = [NeighborGRPO(steps=4, trained_steps=2), DanceGRPO(steps=6, trained_steps=4)]
    rows = measure_model("tiny-flux", algorithms, 64, 64, iterations=1, micro_batch=12, progress=False)
    assert [row["algorithm"] for row in rows] == ["NeighborGRPO", "DanceGRPO"] and rows[0]["times"] == 1
    assert all(0 < row["rollout"] < row["seconds"] and 0 < row["rollout_outside"] < 1 for row in rows)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("bench --model sd4", "--model"),
        ("bench --model tiny --size 20", "height must be a multiple of 16, got 20"),
        ("bench --model tiny --iterations 0", "iterations must be an integer >= 1, got 0"),
        ("bench --model tiny --lora_alpha 3", "lora_alpha must be unset where lora_rank is 0"),
    ],
)
def test_wrong_calls(line, message, capsys):
    assert main(line.split()) == 1
    assert message in capsys.readouterr().err


def test_the_command_prints_a_table(capsys):
    line = "bench --model tiny --size 32 48 --iterations 1 --micro_batch 24 --lora_rank 2 --quiet"
    assert main(line.split()) == 0
    table = capsys.readouterr().out.splitlines()
    cells = [[cell.strip() for cell in row.split("|")[1:4]] for row in table[2:]]
    names = ("NeighborGRPO", "DanceGRPO", "MixGRPO")
    assert cells == [[size, "24", name] for size in ("32", "48") for name in names]


@pytest.mark.parametrize("name", ["tiny", "tiny-flux"])
def test_adapters_in_half_precision_are_not_cast_twice(name):
    "autocast alone gives the same bits as PEFT's cast to float32 and autocast's back."
    task = RandomTask(name, 64, 64, PipelineSettings(lora_rank=4, precision="bfloat16"))
    trained = [weight for weight in task.policy.parameters() if weight.requires_grad]
    layers = [part for part in task.policy.modules() if isinstance(part, LoraLayer)]
    assert layers and not any(layer.cast_input_dtype_enabled for layer in layers)
    for weight in trained:
        nn.init.normal_(weight, std=0.1)
    states, found = task.states(2), []
    for cast in (False, True):
        for layer in layers:
            layer.cast_input_dtype_enabled = cast
        task.policy.zero_grad()
        v = task.policy(*states)
        v.square().mean().backward()
        found.append([v.detach(), *(weight.grad.clone() for weight in trained)])
    assert all(torch.equal(one, other) for one, other in zip(*found))


def test_attention_is_not_cudnns(monkeypatch):
    asked = []
    monkeypatch.setattr(torch.backends.cuda, "enable_cudnn_sdp", asked.append)
    random_policy(MODELS["tiny"], PipelineSettings(), "cpu")
    assert asked == [False]
