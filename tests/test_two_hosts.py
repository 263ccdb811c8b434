"""Two machines, each a network namespace with an address of its own, train one run; one of them is lost."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from helpers import assert_same_outcome

from neighbor_grpo.runs.folder import Checkpoints

ROOT = Path(__file__).parent.parent
PORT = 29511
TOY = "--iterations 60 --groups 4 --group_size 4 --checkpoint_every 5 --eval_every 30 --steps 4 --quiet"


def ip(words, check=True):
    return subprocess.run(["ip", *words.split()], check=check, capture_output=True, text=True)


def lose(host):
    "Kill all that runs on a machine, at once."
    for process in ip(f"netns pids {host}", check=False).stdout.split():
        os.kill(int(process), signal.SIGKILL)


@pytest.fixture
def hosts():
    "Names of two namespaces that are joined by a cable."
    names = [f"ng{os.getpid()}{letter}" for letter in "ab"]
    if shutil.which("ip") is None or ip(f"netns add {names[0]}", check=False).returncode:
        pytest.skip("no network namespace can be made here: this takes iproute2 and the rights of root")
    try:
        ip(f"netns add {names[1]}")
        ip(f"link add eth0 netns {names[0]} type veth peer name eth0 netns {names[1]}")
        for number, name in enumerate(names, 1):
            ip(f"-n {name} addr add 10.77.0.{number}/24 dev eth0")
            ip(f"-n {name} link set eth0 up")
            ip(f"-n {name} link set lo up")
        yield names
    finally:
        for name in names:
            lose(name)
            ip(f"netns del {name}", check=False)


def start(host, number, command, home):
    "What somebody types on each machine."
    launcher = f"-m torch.distributed.run --nnodes 2 --nproc_per_node 1 --local_addr 10.77.0.{number} --max_restarts 0"
    meeting = f"--rdzv_backend c10d --rdzv_endpoint 10.77.0.1:{PORT} --rdzv_id 7 --rdzv_conf is_host={number == 1}"
    words = f"netns exec {host} {sys.executable} {launcher} {meeting} -m neighbor_grpo.cli {command}"
    more = dict(GLOO_SOCKET_IFNAME="eth0", OMP_NUM_THREADS="1", ACCELERATE_USE_CPU="true", PYTHONPATH=str(ROOT))
    return subprocess.Popen(
        ["ip", *words.split()], cwd=home, env=os.environ | more, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )


def launch(hosts, command, home):
    return [start(host, number, command, home) for number, host in enumerate(hosts, 1)]


def finish(processes):
    said = [process.communicate(timeout=240)[0].decode() for process in processes]
    return [process.returncode for process in processes], said


@pytest.mark.slow
def test_a_machine_is_lost_and_the_run_resumed(hosts, tmp_path):
    codes, said = finish(launch(hosts, f"train toy {TOY} --out whole", tmp_path))
    assert codes == [0, 0], said
    lost = launch(hosts, f"train toy {TOY} --out lost", tmp_path)
    checkpoints, end = Checkpoints(tmp_path / "lost" / "checkpoints"), time.monotonic() + 120
    while checkpoints.numbers()[-1:] < [5] and time.monotonic() < end:
        time.sleep(0.05)
    lose(hosts[1])
    codes, said = finish(lost)
    assert 0 not in codes, said  # the other machine neither goes on alone nor waits
    assert 5 <= checkpoints.numbers()[-1] < 60
    codes, said = finish(launch(hosts, "train --out lost --resume --quiet", tmp_path))
    assert codes == [0, 0], said
    assert_same_outcome(tmp_path / "lost", tmp_path / "whole")
