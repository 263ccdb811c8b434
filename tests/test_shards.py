"""A checkpoint whose weights are split: each process writes its rows, and any number of processes reads them."""

import json
import os
import shutil
import sys
from dataclasses import replace

import pytest
import torch
from helpers import STRAYED, assert_same_outcome, outcome, strayed
from test_accelerate import ALGORITHM, SETTINGS, Bright, launch

from neighbor_grpo.runs.folder import Checkpoints, gather, read_rows
from neighbor_grpo.runs.processes import make_accelerator, splitter
from neighbor_grpo.runs.state import trained_state
from neighbor_grpo.runs.trainer import Trainer


def work(folder, processes, iterations, resume=False):
    "Train all weights, split, to an iteration."
    os.environ["ACCELERATE_USE_FSDP"], os.environ["FSDP_VERSION"] = "true", "2"
    accelerator = make_accelerator(folder)
    assert len(gather(0)) == processes
    settings = replace(SETTINGS, iterations=iterations)
    Trainer(Bright("full"), ALGORITHM, settings, folder, resume, split=splitter(accelerator)).run(progress=False)


if __name__ == "__main__":
    torch.set_num_threads(1)
    for job in json.loads(sys.argv[1]):
        work(**job)
    sys.exit()


def start(processes, *jobs, home):
    launcher = f"torch.distributed.run --standalone --nproc_per_node {processes}"
    jobs = [{**job, "processes": processes, "folder": str(job["folder"])} for job in jobs]
    done = launch(launcher, *jobs, home=home, script=__file__)
    assert done.returncode == 0, done.stderr[-3000:]


def test_any_number_reads_what_any_number_wrote(tmp_path):
    whole = {f"{rows}": torch.rand(rows, 3) for rows in range(8)} | {"vector": torch.rand(5), "step": torch.tensor(2.0)}
    for writers in range(1, 6):
        checkpoints = Checkpoints(tmp_path / str(writers))
        parts = [{} for _ in range(writers)]
        for name, tensor in whole.items():
            rows = tensor.tensor_split(writers) if tensor.ndim else [tensor]
            for part, some in zip(parts, rows, strict=False):
                part[name] = some
        assert checkpoints.begin(7, {})
        files = {}
        for rank, part in enumerate(parts):
            files |= checkpoints.write({"policy": part}, rank, writers)
        checkpoints.finish(7, {}, files)
        stored = checkpoints.load()[0]["policy"]
        assert len(files) == writers and stored.keys() == whole.keys()
        assert all(
            torch.equal(stored[name], tensor) and stored.shape(name) == tensor.shape for name, tensor in whole.items()
        )
        for name, tensor in whole.items():
            for first in range(len(tensor) + 1 if tensor.ndim else 0):
                for last in range(first, len(tensor) + 1):
                    assert torch.equal(stored.rows(name, first, last), tensor[first:last])


def test_any_damaged_part_is_refused_by_name(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.begin(7, {})
    files = {}
    for rank in range(3):
        files |= checkpoints.write({"policy": {"w": torch.rand(2)}}, rank, 3)
    checkpoints.finish(7, {}, files)
    for name in files:
        path = checkpoints.folder_of(7) / name
        good = path.read_bytes()
        path.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
        with pytest.raises(ValueError, match=f"{name} is damaged"):
            checkpoints.load()
        path.unlink()
        with pytest.raises(ValueError, match=f"{name} is missing"):
            checkpoints.load()
        path.write_bytes(good)
    assert checkpoints.load()


def test_a_folder_that_one_machine_does_not_see_is_refused(tmp_path):
    with pytest.raises(ValueError, match="out must be a folder that all machines of a run with split weights see"):
        Checkpoints(tmp_path / "here" / "checkpoints").write({"policy": {}}, 1, 2)


@pytest.mark.slow
def test_two_processes_then_four_then_one(tmp_path):
    whole, moved, same = (tmp_path / name for name in ("whole", "moved", "same"))
    start(2, dict(folder=whole, iterations=6), dict(folder=moved, iterations=2), home=tmp_path / "home")
    shutil.copytree(moved, same)
    start(2, dict(folder=same, iterations=6, resume=True), home=tmp_path / "home")
    assert_same_outcome(same, whole)  # as many processes: the same bits
    start(4, dict(folder=moved, iterations=4, resume=True), home=tmp_path / "home")
    newest = moved / "checkpoints" / "000004"
    parts = sorted(path.name for path in newest.glob("policy-*"))
    assert parts == [f"policy-{rank:05d}-of-00004.safetensors" for rank in range(1, 5)]
    sizes = [sum(path.stat().st_size for path in newest.glob(f"*-{rank:05d}-of-*")) for rank in range(1, 5)]
    assert max(sizes) < 0.4 * sum(sizes)  # nobody writes for the others
    settings = replace(SETTINGS, iterations=6)
    Trainer(Bright("full"), ALGORITHM, settings, moved, resume=True).run(progress=False)

    first, flat = trained_state(Bright("full").policy), lambda values: torch.cat([v.flatten() for v in values])
    ends = [outcome(run)[0] for run in (moved, whole)]
    for group in ("policy", "ema"):
        found, expected = (flat(end[f"{group}.{name}"] for name in first) for end in ends)
        assert strayed(found, expected, flat(first.values())) < STRAYED
    for found, expected in zip(*(read_rows(run / "metrics.jsonl") for run in (moved, whole)), strict=True):
        assert {**found, "seconds": 0} == pytest.approx({**expected, "seconds": 0}, rel=STRAYED, abs=0.04)
