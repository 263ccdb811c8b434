"""Runs on digits that are killed with SIGKILL, also while they write a checkpoint, end as if nothing had happened."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time

import pytest
import safetensors.torch
import torch
from helpers import assert_same_outcome, differences

from neighbor_grpo.tasks.digits import Classifier, UNet

SETTINGS = """--quiet --pretrain_steps 20 --eval_samples 64 --eval_every 5 --checkpoint_every 1 --updates 2
    --groups 2 --group_size 4 --anchors 2 --trained_steps 2 --steps 4 --lr 1e-3 --ema 0.9 --kl_weight 0.05"""

# Imports the library once, then makes a process of its own for each command line. Files of a checkpoint are written in
# pieces, so that kills fall into them.
HOST = """
import json, os, sys, time
import safetensors.torch, torch
import torch._dynamo  # which AdamW imports: once for all processes
from neighbor_grpo import cli
from neighbor_grpo.runs import folder
from neighbor_grpo.tasks.digits import DigitsTask

def save_in_pieces(tensors, path):
    whole = safetensors.torch.save(tensors)
    with open(path, "wb") as file:
        for start in range(0, len(whole), len(whole) // 4 + 1):
            file.write(whole[start : start + len(whole) // 4 + 1])
            file.flush()
            time.sleep(0.004)

folder.save_file = save_in_pieces
cli.plot_run = DigitsTask.draw = lambda *arguments: None  # pictures take longer than these runs
torch.set_num_threads(1)
os.fsync = lambda handle: None  # nobody cuts the power
for line in sys.stdin:
    pid = os.fork()
    if pid == 0:
        os.dup2(2, 1)
        os._exit(cli.main(json.loads(line)))
    print(pid, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
"""


class Host:
    "Starts command lines as processes and tells their exit status."

    def __init__(self):
        self.process = subprocess.Popen([sys.executable, "-c", HOST], stdin=-1, stdout=-1, text=True)

    def start(self, argv):
        self.process.stdin.write(json.dumps(argv) + "\n")
        self.process.stdin.flush()
        return int(self.process.stdout.readline())

    def status(self):
        return int(self.process.stdout.readline())

    def run(self, argv):
        self.start(argv)
        return self.status()


@pytest.fixture(scope="module")
def host():
    host = Host()
    yield host
    host.process.stdin.close()
    assert host.process.wait(60) == 0


@pytest.fixture(scope="module")
def networks(tmp_path_factory):
    "The networks that a run would train first, with random weights: how good they are does not matter here."
    folder = tmp_path_factory.mktemp("networks")
    torch.manual_seed(0)
    base = UNet()
    torch.nn.init.normal_(base.out.weight, std=0.05)
    for name, network in (("reward", Classifier(16)), ("judge", Classifier(24)), ("base", base)):
        safetensors.torch.save_file(network.state_dict(), folder / f"{name}.safetensors")
    return folder


@pytest.fixture(scope="module")
def whole(host, networks, tmp_path_factory):
    "The folder of a run that nothing stopped."
    folder = tmp_path_factory.mktemp("whole") / "run"
    shutil.copytree(networks, folder)
    assert host.run(train(folder)) == 0
    return folder


def train(folder, *more, iterations=10):
    return ["train", "digits", *SETTINGS.split(), "--iterations", str(iterations), "--out", str(folder), *more]


def wait_for(happened):
    "Until something has happened, for at most two minutes."
    for _ in range(60_000):
        if happened():
            return
        time.sleep(0.002)
    raise TimeoutError("the run does not get on")


def rows(folder):
    path = folder / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def wait_for_moment(folder, number, chance):
    "A random moment; every other time, one while a checkpoint is being written."
    at = 0 if number == 0 else chance.randrange(1, 9)
    wait_for(lambda: (folder / "eval.jsonl").exists() and rows(folder) >= at)
    if number % 2 == 0:
        wait_for(lambda: (folder / "checkpoints" / ".partial").exists())
        time.sleep(chance.uniform(0, 0.03))
    else:
        time.sleep(chance.uniform(0, 0.3))


def kill(host, pid):
    os.kill(pid, signal.SIGKILL)
    assert host.status() == -signal.SIGKILL


@pytest.mark.parametrize("moments", [3, pytest.param(10, marks=pytest.mark.slow)])
def test_killed_at_random_moments(host, networks, whole, tmp_path, moments):
    chance, torn, different = random.Random(moments), 0, {}
    for number in range(moments):
        folder = tmp_path / f"killed-{number}"
        shutil.copytree(networks, folder)
        pid = host.start(train(folder))
        wait_for_moment(folder, number, chance)
        kill(host, pid)
        torn += (folder / "checkpoints" / ".partial").exists()
        assert host.run(train(folder, "--resume")) == 0
        if differences(folder, whole):
            different[number] = differences(folder, whole)
    assert torn >= moments // 3  # kills did fall into the writing of a checkpoint
    assert not different


@pytest.mark.slow
def test_killed_again_and_again(host, networks, whole, tmp_path):
    folder, resume = tmp_path / "run", []
    shutil.copytree(networks, folder)
    for at in (2, 3, 7):
        pid = host.start(train(folder, *resume))
        wait_for(lambda at=at: rows(folder) >= at)
        kill(host, pid)
        resume = ["--resume"]
    assert host.run(train(folder, *resume)) == 0
    assert_same_outcome(folder, whole)


def test_what_follows_the_end_is_the_same_too(host, networks, whole, tmp_path):
    folder, longer = tmp_path / "run", tmp_path / "longer"
    shutil.copytree(networks, folder)
    pid = host.start(train(folder))
    wait_for(lambda: rows(folder) >= 6)
    kill(host, pid)
    shutil.copytree(whole, longer)
    for path in (folder, longer):  # more iterations show anything that a checkpoint might have missed
        assert host.run(train(path, "--resume")) == 0
        assert host.run(train(path, "--resume", iterations=12)) == 0
    assert_same_outcome(folder, longer)


def test_an_ordinary_process_is_killed_and_resumed(host, networks, whole, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(networks, folder)
    # With one thread, as the runs that it is compared with: two threads add in another order.
    code = "import sys, torch; from neighbor_grpo.cli import main; torch.set_num_threads(1); sys.exit(main())"
    process = subprocess.Popen([sys.executable, "-c", code, *train(folder)])
    wait_for(lambda: rows(folder) >= 4)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    assert host.run(train(folder, "--resume")) == 0
    assert_same_outcome(folder, whole)
