"""Each family learns with each of three algorithms on three seeds, resumes to the bit, and opens in plain diffusers."""

import shutil
from pathlib import Path

import pytest
import torch
from families import CASES, LENGTH
from helpers import assert_same_outcome
from tiny import tiny_flux, tiny_flux2, tiny_qwen, tiny_sana, tiny_sd3, tiny_wan, tiny_zimage

from neighbor_grpo.neighbor import NeighborGRPO
from neighbor_grpo.rivals.forward import DiffusionNFT
from neighbor_grpo.rivals.gaussian import FlowGRPO
from neighbor_grpo.runs.folder import Checkpoints
from neighbor_grpo.runs.machine import quiet
from neighbor_grpo.runs.trainer import Trainer
from neighbor_grpo.tasks.images import ImagesSettings, ImagesTask
from neighbor_grpo.training import TrainSettings

# With the schedulers of the real ones, and what draws with them in `families`.
FAMILIES = {
    "sd3": (tiny_sd3, "sd3"),
    "flux": (tiny_flux, "flux-dev"),
    "flux2": (tiny_flux2, "flux2-klein-base"),
    "qwen": (tiny_qwen, "qwen"),
    "zimage": (tiny_zimage, "zimage"),
    "sana": (tiny_sana, "sana"),
    "wan": (tiny_wan, "wan"),
}
SMALL = dict(group_size=6, steps=3, trained_steps=2, shift=None)
ALGORITHMS = {
    "neighbor": NeighborGRPO(anchors=2, **SMALL),
    "nft": DiffusionNFT(**SMALL),
    "flow": FlowGRPO(**SMALL),
}
# The rate whose least gain over the algorithms is largest on seed 3, which is not tested: of 0.003, 0.01 and 0.03, of
# 0.1 where 0.03 is better than 0.01, and of 0.001 and 0.0003 where 0.003 is better than 0.01.
RATES = dict(sd3=0.1, flux=0.01, flux2=0.1, qwen=0.001, zimage=0.01, sana=0.01, wan=0.001)
IMAGES = 64  # of an evaluation: a gain of Qwen's is 0.005 kB, and the spread of single images' gains 0.008
WORDS = [f"a {color} {animal}" for color in ("red", "blue") for animal in ("cat", "dog", "bird", "fish")]

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("families")
    (folder / "prompts.txt").write_text("\n".join(WORDS))
    with quiet():
        for name, (make, _) in FAMILIES.items():
            make().save_pretrained(folder / name)
    return folder


def train(folder, name, algorithm, out=None, seed=0, resume=False):
    "Twenty iterations, all weights, with an evaluation on held-out prompts before and after."
    given = dict(source=str(folder / name), prompts=str(folder / "prompts.txt"), max_sequence_length=LENGTH)
    size = dict(height=32, width=32, frames=3 if name == "wan" else 1, eval_images=IMAGES, eval_steps=3)
    task = ImagesTask(ImagesSettings(**given, **size), out, seed, progress=False)
    settings = TrainSettings(iterations=20, groups=2, lr=RATES[name], eval_every=20, checkpoint_every=18, seed=seed)
    return Trainer(task, ALGORITHMS[algorithm], settings, out, resume).run(progress=False)


def cut(out, to):
    "A copy of a run that was killed after its checkpoint before the last."
    shutil.copytree(out, to)
    checkpoints = Checkpoints(to / "checkpoints")
    assert checkpoints.numbers() == [18, 20]
    for path in Path(checkpoints.folder).glob("*20*"):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert checkpoints.numbers() == [18]


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_learns_resumes_and_is_saved(folder, tmp_path, name, algorithm):
    out, again = tmp_path / "run", tmp_path / "again"
    trainers = [train(folder, name, algorithm, out if seed == 0 else None, seed) for seed in range(3)]
    gains = [last["reward"] - first["reward"] for first, last in (trainer.evals for trainer in trainers)]
    print(f"{name} {algorithm}: gains {gains}")
    assert sum(gains) > 0, gains  # on average: a single run is chaotic, and another rounding makes it another run
    cut(out, again)
    train(folder, name, algorithm, again, resume=True)
    assert_same_outcome(again, out)
    task, case = trainers[0].task, CASES[FAMILIES[name][1]]
    task.save(trainers[0].policy, tmp_path / "saved")
    base = task.open()
    noise, size = case.noise(base, case.sizes[0]), case.sizes[0]
    with quiet():
        plain = type(base).from_pretrained(tmp_path / "saved")
    before = case.draw(base, noise, 1.0, size, 2)
    base.transformer = trainers[0].policy.transformer
    after, opened = case.draw(base, noise, 1.0, size, 2), case.draw(plain, noise, 1.0, size, 2)
    assert torch.equal(opened, after) and not torch.equal(after, before)
