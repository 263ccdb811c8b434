"Processes end when the launcher that started them is killed, so that a resumed run does not meet them."

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from neighbor_grpo.runs import processes as distributed
from neighbor_grpo.runs.processes import make_accelerator

WORKER = """
import os, time, threading
from neighbor_grpo.runs.processes import end_with_launcher
end_with_launcher(0.05)
assert threading.active_count() == 2
print(os.getpid(), flush=True)
time.sleep(300)
"""
LAUNCHER = """
import subprocess, sys, time
workers = [subprocess.Popen([sys.executable, "-c", sys.argv[1]]) for _ in range(2)]
time.sleep(300)
"""


def test_workers_end_with_a_launcher_that_is_killed():
    command = [sys.executable, "-c", LAUNCHER, WORKER]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    launcher = subprocess.Popen(command, env=environment, start_new_session=True, **pipes)
    try:
        workers = [int(launcher.stdout.readline()) for _ in range(2)]
        launcher.kill()
        _, errors = launcher.communicate(timeout=60)  # comes back when all who could write are gone
        assert errors.count("the launcher has ended, and so does this process") == 2
        assert len(set(workers)) == 2
    finally:
        try:
            os.killpg(launcher.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass


@pytest.mark.parametrize("processes", ["1", "2"])
def test_several_processes_watch_their_launcher_before_they_join(processes, tmp_path, monkeypatch):
    watched = []

    def join(**settings):
        assert watched == [True] * (int(processes) - 1)
        raise RuntimeError("no peer")

    monkeypatch.setattr(distributed, "end_with_launcher", lambda: watched.append(True))
    monkeypatch.setattr(distributed, "Accelerator", join)
    monkeypatch.setenv("WORLD_SIZE", processes)
    with pytest.raises(RuntimeError, match="no peer"):
        make_accelerator(tmp_path / "run")


TRAIN = """train toy --quiet --pretrain_steps 20 --iterations 400 --eval_every 400 --checkpoint_every 1 --groups 2
--group_size 4 --anchors 2 --steps 4 --trained_steps 1"""


@pytest.mark.slow
def test_a_run_whose_launcher_was_killed_is_resumed_at_once(tmp_path):
    "torchrun with two processes: every iteration once, in order."
    run, rows = tmp_path / "run", tmp_path / "run" / "metrics.jsonl"
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command = [*launcher, "-m", "neighbor_grpo.cli", *TRAIN.split(), "--out", str(run)]
    more = {"PYTHONPATH": str(Path(__file__).parents[1]), "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    first = subprocess.Popen(command, env=os.environ | more, start_new_session=True, stderr=subprocess.PIPE)
    try:
        while not (rows.exists() and len(rows.read_text().splitlines()) > 5):
            time.sleep(0.05)
            assert first.poll() is None, first.stderr.read()
        first.kill()
        again = subprocess.run([*command, "--resume"], env=os.environ | more, capture_output=True, text=True)
        assert again.returncode == 0, again.stderr
    finally:
        try:
            os.killpg(first.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
    assert [json.loads(line)["iteration"] for line in rows.read_text().splitlines()] == list(range(1, 401))
