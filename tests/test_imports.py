"""What is imported is imported late: a script, and the help of the command line, wait for torch alone."""

import json
import subprocess
import sys

import pytest

import neighbor_grpo

LARGE = "diffusers transformers peft accelerate torchvision".split()
SLOW = "matplotlib scipy sklearn pandas IPython".split()
OFFERED = {
    "from neighbor_grpo import NeighborGRPO, train": LARGE + SLOW,
    "from neighbor_grpo import ALGORITHMS, Task, Trainer, TrainSettings": LARGE + SLOW,
    "import neighbor_grpo": ["torch"] + LARGE + SLOW,
    "from neighbor_grpo.cli import main; assert main(['--help']) == 0": LARGE + SLOW,
    "from neighbor_grpo.cli import main; assert main(['--version']) == 0": LARGE + SLOW,
}


@pytest.mark.parametrize("line", OFFERED)
def test_what_is_not_needed_is_not_imported(line, tmp_path):
    script = f"{line}\nimport json, sys; json.dump([*sys.modules], open('found.json', 'w'))"
    process = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    assert not {*json.loads((tmp_path / "found.json").read_text())} & {*OFFERED[line]}


def test_the_package_offers_what_scripts_begin_with():
    from neighbor_grpo.neighbor import NeighborGRPO
    from neighbor_grpo.rivals.catalogue import ALGORITHMS
    from neighbor_grpo.runs.trainer import Trainer
    from neighbor_grpo.training import Task, TrainSettings, train

    for thing in (NeighborGRPO, Trainer, Task, TrainSettings, train):
        assert getattr(neighbor_grpo, thing.__name__) is thing
    assert neighbor_grpo.ALGORITHMS is ALGORITHMS
    assert {*neighbor_grpo.__all__} <= {*dir(neighbor_grpo)}


def test_nothing_else_is_offered():
    with pytest.raises(AttributeError, match="'neighbor_grpo' has no attribute 'nothing'"):
        _ = neighbor_grpo.nothing
