"""Scripts for the flat layout of earlier versions go on working, and are told the new places."""

import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from neighbor_grpo import _moved

# Each line is one of a script for the flat layout; what it says is the new place.
LINES = {
    "from neighbor_grpo.algorithms import NeighborGRPO": "neighbor.NeighborGRPO",
    "from neighbor_grpo.algorithms import FlowGRPO": "rivals.gaussian.FlowGRPO",
    "from neighbor_grpo.algorithms import Rollout": "rollouts.Rollout",
    "import neighbor_grpo.algorithms as a; a.DanceGRPO": "rivals.gaussian.DanceGRPO",
    "from neighbor_grpo.algorithms import *; States": "rollouts.States",
    "from neighbor_grpo.flow import VelocityMLP": "toyflows.VelocityMLP",
    "from neighbor_grpo.options import shape_advantages": "rivals.modifiers",
    "from neighbor_grpo.mixed import MixGRPO": "rivals.mixed",
    "from neighbor_grpo.forward import DiffusionNFT": "rivals.forward",
    "from neighbor_grpo.folder import Checkpoints": "runs.folder",
    "from neighbor_grpo import folder; folder.Checkpoints": "runs.folder",
    "import neighbor_grpo.toy2d; neighbor_grpo.toy2d.ToyTask": "tasks.toy2d",
    "from neighbor_grpo.sde import flow_sde": "rivals.sde",
    "from neighbor_grpo.scenes import render": "tasks.scenes",
    "from neighbor_grpo.prompts import read_prompts": "tasks.prompts",  # a folder of data has this name, too
    "from neighbor_grpo.images import read_prompts": "tasks.images",
    "from neighbor_grpo.rivals import ALGORITHMS": "rivals.catalogue.ALGORITHMS",
    "from neighbor_grpo.rivals import OPGRPO": "rivals.trajectories.OPGRPO",
    "from neighbor_grpo.training import Trainer": "runs.trainer.Trainer",
    "from neighbor_grpo.training import *; Checkpoints, Trainer, TrainSettings, train": "runs.trainer.Trainer",
    "from neighbor_grpo.training import Checkpoints": "runs.folder.Checkpoints",
    "from neighbor_grpo import training; training.read_rows": "runs.folder.read_rows",
    "from neighbor_grpo.sd3 import MINIATURE, SD3": "models.pipeline.MINIATURE",
    "from neighbor_grpo.rewards import RewardServer, RemoteReward": "rewards.remote.RewardServer",
}

SCRIPT = """
import sys, warnings
for number, line in enumerate({lines!r}):
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        exec(compile(line, f"line {{number}}", "exec"), {{}})
    assert all(w.category is DeprecationWarning for w in seen), seen
    print(line, "|", *[f"{{w.message}} @{{w.filename}}" for w in seen], sep="\\t")
for old in [name for name in sys.modules if name.startswith("neighbor_grpo.")]:
    assert sys.modules[old].__spec__.name == sys.modules[old].__name__, old
    sys.modules.pop(old)
"""


def run(lines, folder):
    process = subprocess.run(
        [sys.executable, "-c", SCRIPT.format(lines=lines)], cwd=folder, capture_output=True, text=True
    )
    assert process.returncode == 0, process.stderr
    return process.stdout.splitlines()


def test_old_names_work_and_say_where_they_are_now(tmp_path):
    # Each in its order; a module that moved as a whole is announced where it is first imported.
    announced = {}
    for number, (answer, (line, new)) in enumerate(zip(run([*LINES], tmp_path), LINES.items(), strict=True)):
        assert answer.startswith(line)
        again = new in announced and new in _moved.WHOLE.values()
        assert again or f"is now neighbor_grpo.{new}; the old name will go @line {number}" in answer
        announced[new] = line


def test_new_names_are_not_spoken_of(tmp_path):
    lines = ["import neighbor_grpo.rivals.forward", "from neighbor_grpo.rivals import mixed"]
    lines += ["from neighbor_grpo.rewards import remote", "from neighbor_grpo.training import Task, train"]
    lines += ["from neighbor_grpo import tasks, training, cli", "import neighbor_grpo.tasks.toy2d"]
    assert [answer.partition("|")[2].strip() for answer in run(lines, tmp_path)] == [""] * len(lines)


def test_the_old_name_is_the_same_module(monkeypatch):
    import neighbor_grpo.tasks.toy2d as new

    with pytest.warns(DeprecationWarning, match="neighbor_grpo.tasks.toy2d"):
        sys.modules.pop("neighbor_grpo.toy2d", None)
        import neighbor_grpo.toy2d as old
    assert old is new and new.__spec__.name == "neighbor_grpo.tasks.toy2d"
    monkeypatch.setattr("neighbor_grpo.toy2d.mode_means", lambda: "patched")
    assert new.mode_means() == "patched"


def test_every_new_place_exists():
    homes = {home for several in _moved.PARTS.values() for home in several} | {*_moved.WHOLE.values()}
    assert all(find_spec(f"neighbor_grpo.{home}") for home in homes)
    library = Path(_moved.__file__).parent
    assert not [old for old in [*_moved.WHOLE, *_moved.GONE] if (library / f"{old}.py").exists()]


@pytest.mark.parametrize("module", ["training", "rivals"])
def test_what_never_was_is_not_found(module):
    with pytest.raises(ImportError, match=f"cannot import name 'nothing' from 'neighbor_grpo.{module}'"):
        exec(f"from neighbor_grpo.{module} import nothing")
