"Saved adapters act at the strength they were trained at, whoever reads the file, and equal runs save equal bytes."

import copy
import hashlib

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model, set_peft_model_state_dict
from safetensors.torch import load_file
from tiny import tiny_flux, tiny_sd3

from neighbor_grpo.models.flux import FLUX
from neighbor_grpo.models.pipeline import ADAPTER, PipelinePolicy, PipelineSettings, lora_tensors, save_policy
from neighbor_grpo.models.sd3 import SD3
from neighbor_grpo.runs.machine import quiet

CASES = {
    "sd3": (lambda: tiny_sd3(dual=True), SD3, dict(lora_dual=True), "transformer_blocks.0.attn2.to_q"),
    "flux": (tiny_flux, FLUX, {}, "single_transformer_blocks.0.attn.to_q"),
}
PLACE = "transformer_blocks.0.attn.to_q"


def added(transformer, place, of=lambda weight: weight):
    "What an adapter adds to a projection: the product of its matrices, times the scale that the reader takes."
    layer = transformer.get_submodule(place)
    (name,) = layer.scaling
    return (layer.scaling[name] * of(layer.lora_B[name].weight) @ of(layer.lora_A[name].weight)).detach()


def random_policy(pipeline, family, rank=4, alpha=0, **settings):
    "Adapters that do something: B is not zero."
    transformer = copy.deepcopy(pipeline.transformer)
    policy = PipelinePolicy(family, transformer, PipelineSettings(lora_rank=rank, lora_alpha=alpha, **settings))
    generator = torch.Generator().manual_seed(1)
    for name, weight in policy.named_parameters():
        if ".lora_B." in name:
            weight.data = torch.randn(weight.shape, generator=generator)
    return policy


def in_peft(transformer, tensors, rank):
    "The transformer as peft makes it from tensors, with alpha = rank."
    tensors = {name.removeprefix("transformer."): value for name, value in tensors.items()}
    targets = sorted({name.split(".lora_")[0] for name in tensors})
    model = inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=rank, target_modules=targets), transformer)
    result = set_peft_model_state_dict(model, tensors)
    assert not result.unexpected_keys
    return model


@pytest.mark.parametrize("alpha", [0, 3], ids=["exact", "rounded"])
@pytest.mark.parametrize("case", CASES)
def test_every_reader_gets_the_strength_that_was_trained(tmp_path, case, alpha):
    "diffusers from the folder, diffusers from tensors, and peft; a scale of 2 to the last bit."
    make, family, settings, other = CASES[case]
    pipeline = make()
    policy = random_policy(pipeline, family, alpha=alpha, **settings)
    save_policy(policy, pipeline, tmp_path / "lora")
    tensors = load_file(tmp_path / "lora" / "pytorch_lora_weights.safetensors")
    opened = []
    with quiet():
        for given in (tmp_path / "lora", dict(tensors)):
            fresh = type(pipeline)(**pipeline.components | {"transformer": copy.deepcopy(pipeline.transformer)})
            fresh.load_lora_weights(given)
            opened.append(fresh.transformer)
    for transformer in (*opened, in_peft(copy.deepcopy(pipeline.transformer), tensors, 4)):
        for place in (PLACE, other):
            expected, found = added(policy.transformer, place), added(transformer, place)
            assert expected.abs().max() > 0.1
            # either side rounds a product of four terms at most six times
            room = 0 if alpha == 0 else 2 * 6 * 2**-24 * added(transformer, place, torch.abs)
            assert ((found - expected).abs() <= room).all()


def test_a_scale_that_is_no_power_of_two_rounds_each_weight_once():
    policy = random_policy(tiny_sd3(), SD3, rank=6, alpha=5)
    tensors = lora_tensors(policy.transformer)
    layer = policy.transformer.get_submodule(PLACE)
    wanted, found = (5 / 6) * layer.lora_B[ADAPTER].weight.double(), tensors[f"{PLACE}.lora_B.weight"]
    assert torch.equal(tensors[f"{PLACE}.lora_A.weight"], layer.lora_A[ADAPTER].weight)
    assert found.dtype == torch.float32
    # one rounding of the product, one of 5/6 where the kernel takes it as float32
    assert ((found - wanted).abs() <= 2 * 2**-24 * wanted.abs()).all() and not torch.equal(found.double(), wanted)


def test_saving_leaves_the_policy_as_it_was(tmp_path):
    pipeline = tiny_sd3()
    policy = random_policy(pipeline, SD3)
    before = copy.deepcopy(policy.state_dict())
    save_policy(policy, pipeline, tmp_path / "lora")
    after = policy.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    assert policy.transformer.peft_config[ADAPTER].lora_alpha == 8


@pytest.mark.parametrize("kind", ["lora", "whole"])
def test_equal_runs_save_equal_bytes(tmp_path, kind):
    "Eight times: the order of a file's metadata, where it has several entries, is drawn anew each time."
    pipeline, saved = tiny_sd3(), set()
    whole = PipelinePolicy(SD3, copy.deepcopy(pipeline.transformer))
    policy = random_policy(pipeline, SD3) if kind == "lora" else whole
    for number in range(8):
        save_policy(policy, pipeline, tmp_path / str(number))
        files = sorted(path for path in (tmp_path / str(number)).rglob("*") if path.is_file())
        digests = [hashlib.sha256(path.read_bytes()).hexdigest() for path in files]
        saved.add((*(path.relative_to(tmp_path / str(number)) for path in files), *digests))
    assert len(saved) == 1
