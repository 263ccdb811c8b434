"""What makes a model fit a smaller card, and changes nothing else."""

import copy
from dataclasses import replace

import pytest
import torch
from helpers import TinyTask, assert_same_outcome, outcome
from test_accelerate import ALGORITHM, SETTINGS, Bright
from tiny import tiny_sd3

from neighbor_grpo.flow import randn, seeded
from neighbor_grpo.models.pipeline import PipelinePolicy, PipelineSettings, WithoutAdapters, save_policy
from neighbor_grpo.models.sd3 import SD3
from neighbor_grpo.rewards.programs import Reward
from neighbor_grpo.runs.folder import Stored
from neighbor_grpo.runs.machine import choose_device
from neighbor_grpo.runs.state import trained_state
from neighbor_grpo.runs.trainer import Trainer
from neighbor_grpo.tasks import images
from neighbor_grpo.tasks.images import ImagesSettings, ImagesTask
from neighbor_grpo.training import Run, TrainSettings


class Packed(Bright):
    "The same task on a base that is packed."

    def __init__(self, kind, **more):
        super().__init__()
        settings = PipelineSettings(lora_rank=4, quantize=kind, **more)
        self.policy = PipelinePolicy(SD3, copy.deepcopy(self.pipeline.transformer), settings).to("cpu")


def packed_bytes(policy):
    return {name: w.clone() for name, w in policy.named_parameters() if not w.is_floating_point()}


def velocity(policy, task):
    with torch.no_grad():
        return policy(randn((3, *task.shape), seeded(0)), torch.tensor([0.2, 0.5, 0.9]), task.cond)


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "bound"), [("int8", 0.05), ("nf4", 0.4)])
def test_adapters_learn_on_a_packed_base(kind, bound, tmp_path):
    pytest.importorskip("bitsandbytes")
    plain, task = Bright(), Packed(kind)
    start, exact = velocity(task.policy, task), velocity(plain.policy, plain)
    assert torch.equal(start, velocity(WithoutAdapters(task.policy), task))  # at first the adapters are zero
    assert 0 < (start - exact).norm() / exact.norm() < bound
    packed = packed_bytes(task.policy)
    assert len(packed) > 10 and sum(w.numel() for w in packed.values()) > 5000

    settings = replace(SETTINGS, ema=0.9)  # which would change a quarter of all bytes
    trainer = Trainer(task, ALGORITHM, settings, tmp_path / "run").run(progress=False)
    left = packed_bytes(trainer.policy)
    assert all(torch.equal(left[name], w) for name, w in packed.items())  # neither trained nor averaged
    assert trainer.velocity.transformer is not task.policy.transformer
    assert not torch.equal(velocity(task.policy, task), start)
    assert torch.equal(velocity(task.reference(), task), start)
    assert trained_state(task.policy).keys() == trained_state(plain.policy).keys()  # of the base there is nothing

    parts = replace(settings, iterations=4)
    Trainer(Packed(kind), ALGORITHM, parts, tmp_path / "parts").run(progress=False)
    Trainer(Packed(kind), ALGORITHM, settings, tmp_path / "parts", resume=True).run(progress=False)
    assert_same_outcome(tmp_path / "parts", tmp_path / "run")

    save_policy(task.policy, task.pipeline, tmp_path / "saved")
    opened = tiny_sd3()
    opened.load_lora_weights(tmp_path / "saved")
    adapters = {name: w for name, w in opened.transformer.named_parameters() if ".lora_A." in name}
    own = {name: w for name, w in task.policy.transformer.named_parameters() if ".lora_A." in name}
    assert len(adapters) == len(own) > 0
    assert all(torch.equal(a, b) for a, b in zip(adapters.values(), own.values(), strict=True))


class Wide(TinyTask):
    "A network with weights that are large enough for eight bits."

    def __init__(self):
        super().__init__(dropout=0.0)
        self.policy.net = torch.nn.Sequential(
            torch.nn.Linear(3, 64), torch.nn.SiLU(), torch.nn.Linear(64, 64), torch.nn.SiLU(), torch.nn.Linear(64, 2)
        )


@pytest.mark.slow
def test_moments_in_eight_bits_resume_bit_for_bit(tmp_path):
    pytest.importorskip("bitsandbytes")
    settings = TrainSettings(iterations=6, groups=2, lr=1e-2, optimizer="adamw8bit", eval_every=3, checkpoint_every=3)
    whole = Trainer(Wide(), ALGORITHM, settings, tmp_path / "whole").run(progress=False)
    Trainer(Wide(), ALGORITHM, replace(settings, iterations=3), tmp_path / "parts").run(progress=False)
    Trainer(Wide(), ALGORITHM, settings, tmp_path / "parts", resume=True).run(progress=False)
    assert_same_outcome(tmp_path / "parts", tmp_path / "whole")
    stored = outcome(tmp_path / "parts")[0]
    assert stored["optimizer.2.state1"].dtype == torch.uint8 and stored["optimizer.2.step"] == 6
    assert whole.evals[-1]["reward"] > whole.evals[0]["reward"]


def test_what_does_not_go_together_is_refused(tmp_path):
    with pytest.raises(ValueError, match="quantize must be 'none' where lora_rank is 0"):
        PipelineSettings(quantize="nf4")
    with pytest.raises(ValueError, match="optimizer must be 'adamw' here"):
        Run(TinyTask(), ALGORITHM, TrainSettings(optimizer="adamw8bit"))
    with pytest.raises(ValueError, match="optimizer must be 'adamw' where weights are split"):
        Trainer(TinyTask(), ALGORITHM, TrainSettings(optimizer="adamw8bit"), split=len)


class Judge(Reward):
    "Notes where it is moved to, and where it is when it judges."

    def __init__(self):
        self.place, self.notes = "cpu", []

    def to(self, device):
        self.place = str(device)

    def score(self, pictures, prompts):
        self.notes.append(self.place)
        return [1.0] * len(pictures)


def test_decoder_and_judges_visit_the_device(monkeypatch):
    judge, moves = Judge(), []
    monkeypatch.setattr(images, "make_rewards", lambda text, device: ([judge], [1.0]))
    settings = ImagesSettings(source="miniature", height=32, width=32, offload=True, eval_images=2, eval_steps=2)
    task = ImagesTask(settings, progress=False)
    task.device = "meta"
    task.pipeline.vae.to = moves.append
    x = randn((2, *task.shape), seeded(0))
    assert task.reward(x, torch.tensor([0, 1])).tolist() == [1.0, 1.0]
    assert moves == ["meta", "cpu"] and judge.place == "cpu" and judge.notes == [str(choose_device())]


def test_of_the_encoded_prompts_rows_are_read_by_need(tmp_path, monkeypatch):
    settings = ImagesSettings(source="miniature", height=32, width=32)
    task, whole = ImagesTask(settings, tmp_path, progress=False), ImagesTask(settings, progress=False)
    read, rows = [], Stored.rows
    monkeypatch.setattr(Stored, "rows", lambda self, name, *ends: read.append(ends) or rows(self, name, *ends))
    found, expected = (some.conditions(torch.tensor([5, 2, 5])) for some in (task, whole))
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)
    assert set(read) == {(5, 6), (2, 3)}
