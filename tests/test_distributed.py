"""Two real processes against one: the same weights, whole groups, one writer."""

import os
import weakref
from contextlib import suppress

import pytest
import torch
import torch.distributed as dist
import torch.distributed.nn.functional  # its defaults keep the group that there is at its first import
from helpers import STRAYED, TinyTask, assert_same_outcome, strayed, weights
from torch import multiprocessing

from neighbor_grpo.neighbor import NeighborGRPO
from neighbor_grpo.rivals.catalogue import make, modified
from neighbor_grpo.runs import folder as run_folder
from neighbor_grpo.runs import trainer as trainer_module
from neighbor_grpo.runs.folder import Checkpoints, gather, read_rows
from neighbor_grpo.runs.trainer import Trainer
from neighbor_grpo.training import TrainSettings

ALGORITHMS = {
    "neighbor": modified(
        NeighborGRPO(group_size=4, steps=3, anchors=2, trained_steps=2), "slas", advantage_scale="batch"
    ),
    "op": modified(
        make("op", group_size=4, steps=4, trained_steps=2, replay=2, memory_size=3, memory_age=3), "previews", scouts=6
    ),
}
SETTINGS = TrainSettings(
    iterations=6, groups=4, updates=2, lr=1e-2, kl_weight=0.05, ema=0.8, eval_every=2, checkpoint_every=2
)


class Watched(TinyTask):
    "Remembers what was rewarded. Without dropout: its draws cannot be the same for another number of processes."

    def __init__(self):
        super().__init__(dropout=0.0)
        self.seen = []

    def reward(self, samples, prompts):
        if prompts is not None:
            self.seen.append((samples, prompts))
        return super().reward(samples, prompts)


def run(folder, name, resume=False, callback=None):
    return Trainer(Watched(), ALGORITHMS[name], SETTINGS, folder, resume).run(progress=False, callback=callback)


def stop(trainer):
    "Interrupt every process after three iterations."
    if trainer.iteration == 3:
        raise KeyboardInterrupt


def work(rank, size, folder, name):
    "One process: a run in `folder / 'run'`, another that is resumed half way, and a note of what this process saw."
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=size)
    writers = {"save_file": run_folder, "append_row": trainer_module, "write_atomically": run_folder}
    written = []
    for writer, module in writers.items():
        function = getattr(module, writer)
        setattr(module, writer, lambda *a, w=writer, f=function: (written.append(w), f(*a))[1])
    trainer = run(folder / "run", name)
    with suppress(KeyboardInterrupt):
        run(folder / "resumed", name, callback=stop)
    run(folder / "resumed", name, resume=True)
    note = {
        "world": dist.get_world_size(),
        "gathered": gather(rank),
        "written": written,
        "weights": weights(trainer.policy),
        "average": weights(trainer.velocity),
        "rows": trainer.rows,
        "seen": trainer.task.seen,
    }
    torch.save(note, folder / f"note-{rank}.pt")
    group = weakref.ref(dist.group.WORLD)
    dist.destroy_process_group()
    assert group() is None  # else its threads run on, and one that frees a tensor aborts a Python that ends


@pytest.fixture(scope="module", params=ALGORITHMS)
def runs(request, tmp_path_factory):
    "Folder, what the two processes noted, and the same run in this process."
    folder = tmp_path_factory.mktemp(request.param)
    multiprocessing.spawn(work, (2, folder, request.param), nprocs=2)
    notes = [torch.load(folder / f"note-{rank}.pt") for rank in range(2)]
    return folder, notes, run(folder / "single", request.param)


def test_there_were_two_processes(runs):
    _, notes, _ = runs
    assert [note["world"] for note in notes] == [2, 2]
    assert [note["gathered"] for note in notes] == [[0, 1], [0, 1]]


def test_two_processes_learn_what_one_learns(runs):
    _, notes, single = runs
    start = weights(TinyTask().policy)
    for name, expected in (("weights", weights(single.policy)), ("average", weights(single.velocity))):
        assert torch.equal(notes[0][name], notes[1][name])
        assert (expected - start).abs().max() > 0.01  # it did learn
        assert strayed(notes[0][name], expected, start) < STRAYED


def test_metrics_are_those_of_all_processes(runs):
    folder, notes, single = runs
    assert read_rows(folder / "run" / "metrics.jsonl") == notes[0]["rows"]
    for row, expected in zip(notes[0]["rows"], single.rows, strict=True):
        assert (row["nfe_old"], row["nfe_theta"]) == (expected["nfe_old"], expected["nfe_theta"])
        for key in ("reward_mean", "reward_std", "grad_norm"):  # of trained weights: see `strayed`
            assert row[key] == pytest.approx(expected[key], rel=STRAYED), key


def test_groups_are_whole_and_the_same_as_in_one_process(runs):
    _, notes, single = runs
    for iteration, (samples, prompts) in enumerate(single.task.seen):
        parts = [note["seen"][iteration] for note in notes]
        assert len(samples) in (16, 24)  # four groups of four, or of six previews
        assert [len(part[0]) for part in parts] == [len(samples) // 2] * 2  # two groups each
        assert torch.equal(torch.cat([part[1] for part in parts]), prompts)
        # Samples are of order one and smooth in the weights, which stray by rounding; other noise differs by one.
        assert (torch.cat([part[0] for part in parts]) - samples).abs().max() < STRAYED


def test_ratios_of_all_processes_are_in_the_metrics(runs):
    _, notes, single = runs
    for row, expected in zip(notes[0]["rows"], single.rows, strict=True):
        for key in ("ratio_min", "ratio_max"):
            assert row[key] == pytest.approx(expected[key], rel=STRAYED), key
        if expected["entropy"] is not None:  # the policy of OP-GRPO has none
            assert row["entropy"] == pytest.approx(expected["entropy"], rel=STRAYED)
        assert row["clip_fraction"] == pytest.approx(expected["clip_fraction"], abs=0.04), "one ratio of 32 may turn"


def test_only_the_first_process_writes(runs):
    folder, notes, _ = runs
    assert set(notes[0]["written"]) == {"save_file", "append_row", "write_atomically"} and notes[1]["written"] == []
    assert Checkpoints(folder / "run" / "checkpoints").numbers() == [4, 6]
    assert [row["iteration"] for row in read_rows(folder / "run" / "metrics.jsonl")] == [1, 2, 3, 4, 5, 6]


def test_two_processes_resume_where_they_stopped(runs):
    folder, _, _ = runs
    assert_same_outcome(folder / "resumed", folder / "run")


def test_groups_must_divide_among_the_processes(tmp_path, monkeypatch):
    monkeypatch.setattr(trainer_module, "world", lambda: (0, 3))
    with pytest.raises(ValueError, match="groups must be a multiple of the 3 processes, got 4"):
        Trainer(TinyTask(), ALGORITHMS["neighbor"], SETTINGS, tmp_path / "run")
    assert list(tmp_path.iterdir()) == []
