"""Processes that a launcher started: they learn what one learns, survive a kill, split weights, and fill trackers."""

import copy
import json
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import STRAYED, TinyTask, assert_same_outcome, outcome, strayed
from tiny import tiny_flux, tiny_sd3
from torch.distributed.fsdp import FSDPModule

from neighbor_grpo.flow import randn, seeded, time_grid
from neighbor_grpo.models.flux import FLUX
from neighbor_grpo.models.pipeline import PipelinePolicy, PipelineSettings, PipelineTask, decode, encode_prompts
from neighbor_grpo.models.sd3 import SD3
from neighbor_grpo.neighbor import NeighborGRPO
from neighbor_grpo.rollouts import take
from neighbor_grpo.runs import processes as distributed
from neighbor_grpo.runs import tracking
from neighbor_grpo.runs.folder import gather, read_rows
from neighbor_grpo.runs.processes import check_environment, check_world, make_accelerator, splitter
from neighbor_grpo.runs.state import trained_state
from neighbor_grpo.runs.tracking import TRACKERS, Tracking, flattened
from neighbor_grpo.runs.trainer import Trainer
from neighbor_grpo.solvers import solve
from neighbor_grpo.training import TrainSettings

ALGORITHM = NeighborGRPO(group_size=4, steps=4, anchors=2, trained_steps=2)
SETTINGS = TrainSettings(
    iterations=6, groups=4, updates=2, lr=3e-3, kl_weight=0.05, ema=0.8, eval_every=2, checkpoint_every=2
)
INSTALLED = [name for name in TRACKERS if find_spec(name)]


KINDS = {
    "lora": PipelineSettings(lora_rank=4),
    "full": PipelineSettings(),
    "bf16": PipelineSettings(lora_rank=4, precision="bfloat16"),
    "flux": PipelineSettings(lora_rank=4),
}


class Bright(PipelineTask):
    "A tiny random pipeline that is rewarded for red, and may die while it judges."

    shape, prompts = (4, 8, 8), 3

    def __init__(self, kind="lora", dies_at=None):
        self.judged, self.dies_at, family = 0, dies_at, FLUX if kind == "flux" else SD3
        self.pipeline = tiny_flux() if kind == "flux" else tiny_sd3()
        self.cond = encode_prompts(family, self.pipeline, ["a cat", "two dogs", "a red bird"], 12)
        self.policy = PipelinePolicy(family, copy.deepcopy(self.pipeline.transformer), KINDS[kind])

    def conditions(self, prompts):
        return take(self.cond, prompts)

    def reward(self, samples, prompts):
        self.judged += 1
        if self.judged == self.dies_at:
            os.kill(os.getpid(), signal.SIGKILL)
        return 100 * decode(self.pipeline, samples)[:, 0].mean((1, 2))

    def images(self, velocity):
        x = solve(velocity, randn((3, *self.shape), seeded(0, 9)), time_grid(4), self.cond).x[-1]
        return decode(self.pipeline, x)

    def evaluate(self, velocity):
        return {"reward": self.images(velocity)[:, 0].mean().item()}


# --- what the processes do: this file is also the script that is launched ---


def work(folder, name, resume=False, dies=(None, None), trackers=""):
    "Train in a folder that is named after what is trained, and whether it is split."
    kind, _, split = name.partition("-")
    os.environ["ACCELERATE_USE_FSDP"], os.environ["FSDP_VERSION"] = str(bool(split)).lower(), "2"
    out = Path(folder) / name
    accelerator = make_accelerator(out, trackers)
    assert gather(accelerator.process_index) == [0, 1]  # there are two, and they know each other
    task = Bright(kind, dies[accelerator.process_index])
    trainer = Trainer(task, ALGORITHM, SETTINGS, out, resume, split=splitter(accelerator))
    assert {hasattr(weight, "full_tensor") for weight in trainer.policy.parameters()} == {bool(split)}
    blocks = [*trainer.policy.transformer.transformer_blocks]
    blocks += getattr(trainer.policy.transformer, "single_transformer_blocks", [])
    assert {isinstance(block, FSDPModule) for block in blocks} == {bool(split)}
    with Tracking(accelerator, trainer) as tracking:
        trainer.run(progress=False, callback=tracking)


if __name__ == "__main__":
    torch.set_num_threads(1)
    for job in json.loads(sys.argv[1]):
        work(**job)
    sys.exit()


TORCH = "torch.distributed.run --standalone --nproc_per_node 2"
ONE_HOST = "--num_processes 2 --num_machines 1 --mixed_precision no --dynamo_backend no"
ACCELERATE = f"accelerate.commands.launch --multi_gpu {ONE_HOST} --main_process_port 0"


def launch(launcher, *jobs, home, script=__file__):
    "Start two processes on a CPU, in an empty folder, at an empty home."
    tests, cwd = Path(__file__).parent, home / "here"
    cwd.mkdir(parents=True, exist_ok=True)
    paths = {"HOME": home, "MPLCONFIGDIR": home / "mpl", "PYTHONPATH": f"{tests.parent}:{tests}"}
    more = {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", "WANDB_MODE": "offline", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", *launcher.split(), str(script), json.dumps(jobs)]
    env = os.environ | more | {name: str(path) for name, path in paths.items()}
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=200)


def succeed(*arguments, **more):
    done = launch(*arguments, **more)
    assert done.returncode == 0, done.stderr[-3000:]


def one_process(folder, kind="lora", resume=False, **more):
    return Trainer(Bright(kind), ALGORITHM, replace(SETTINGS, **more), folder, resume).run(progress=False)


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def runs(home, tmp_path_factory):
    "A folder with runs of two processes that nothing stopped: adapters and all weights, whole and split."
    folder = tmp_path_factory.mktemp("runs")
    names = [f"{kind}{end}" for kind in KINDS for end in ("", "-split")]
    succeed(TORCH, *[{"folder": str(folder), "name": name} for name in names], home=home)
    return folder


@pytest.fixture(scope="module")
def killed(home, tmp_path_factory):
    "Two runs of two processes, one of which was killed while it judged, and then resumed by another launcher."
    folder = tmp_path_factory.mktemp("killed")
    jobs = [{"folder": str(folder), "name": name} for name in ("lora", "lora-split")]
    jobs[0]["trackers"] = ",".join(INSTALLED)
    ends = [
        launch(TORCH, {**job, "dies": dies}, home=home) for job, dies in zip(jobs, ((None, 4), (5, None)), strict=True)
    ]
    left = {job["name"]: outcome(folder / job["name"])[1]["state"]["iteration"] for job in jobs}
    succeed(ACCELERATE, *[{**job, "resume": True} for job in jobs], home=home)
    return folder, ends, left


def difference(a, b, kind):
    "How far the weights of two runs' checkpoints are apart, and their averages, as a share of the way: see `strayed`."
    (a, _), (b, _), start = outcome(a), outcome(b), trained_state(Bright(kind).policy)
    assert a.keys() == b.keys()
    both = lambda file: (torch.cat([run[f"{file}.{name}"].float().flatten() for name in start]) for run in (a, b))
    first = torch.cat([value.float().flatten() for value in start.values()])
    return max(strayed(*both(file), first) for file in ("policy", "ema"))


# --- the same weights ---


@pytest.mark.parametrize("kind", ["lora", "full", "flux"])
@pytest.mark.parametrize("split", ["", "-split"])
def test_two_processes_learn_what_one_learns(kind, split, runs, tmp_path):
    single = one_process(tmp_path / "one", kind)
    start = dict(Bright(kind).policy.named_parameters())
    moved = max((weight - start[name]).abs().max().item() for name, weight in single.policy.named_parameters())
    assert difference(runs / f"{kind}{split}", tmp_path / "one", kind) < STRAYED and moved > 1e-3
    for row, expected in zip(read_rows(runs / f"{kind}{split}" / "metrics.jsonl"), single.rows, strict=True):
        assert {k: v for k, v in row.items() if k != "seconds"} == pytest.approx(
            {k: v for k, v in expected.items() if k != "seconds"}, rel=STRAYED, abs=0.04
        )  # of the ratios' share that is clipped, one of 32 may turn


@pytest.mark.parametrize("kind", KINDS)
def test_split_weights_end_where_whole_ones_do(kind, runs):
    assert difference(runs / f"{kind}-split", runs / kind, kind) < (0.1 if kind == "bf16" else STRAYED)
    tensors, _ = outcome(runs / f"{kind}-split")
    assert {value.dtype for name, value in tensors.items() if "lora_" in name or kind == "full"} == {torch.float32}


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_one_process_takes_up_what_two_left_split(kind, runs, tmp_path):
    shutil.copytree(runs / f"{kind}-split", tmp_path / "run")
    longer = one_process(tmp_path / "run", kind, resume=True, iterations=8)
    one_process(tmp_path / "one", kind, iterations=8)
    assert longer.iteration == 8 and difference(tmp_path / "run", tmp_path / "one", kind) < STRAYED


# --- killed ---


def test_when_one_process_is_killed_the_others_end_too(killed):
    _, ends, left = killed
    assert all(end.returncode != 0 and "SIGKILL" in end.stderr for end in ends)
    assert left["lora"] in (2, 3) and left["lora-split"] == 4  # whole weights: the other one may save before it ends


@pytest.mark.parametrize("name", ["lora", "lora-split"])
def test_killed_and_resumed_is_bit_identical(name, killed, runs):
    assert_same_outcome(killed[0] / name, runs / name)


# --- trackers ---


def tensorboard_rows(logs):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(logs / "neighbor_grpo"), {"images": 0, "scalars": 0}).Reload()
    rows = [(event.step, name, event.value) for name in events.Tags()["scalars"] for event in events.Scalars(name)]
    return rows, [event.step for event in events.Images("held_out/images")]


def trackio_rows(logs):
    with sqlite3.connect(logs / "trackio" / "neighbor_grpo.db") as base:
        found = [(step, json.loads(row)) for step, row in base.execute("select step, metrics from metrics")]
    rows = [(step, name, value) for step, row in found for name, value in row.items() if name != "held_out/images"]
    return rows, [step for step, row in found if "held_out/images" in row]


def wandb_records(path):
    "The records of an offline run: a header, then blocks with checksum (4 bytes), length (2) and part (1) of each."
    from wandb.proto.wandb_internal_pb2 import Record

    data, at, whole = path.read_bytes(), 7, b""
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:
            at += 32768 - at % 32768
            continue
        length, part = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        whole += data[at + 7 : at + 7 + length]
        at += 7 + length
        if part in (1, 4):  # all of it, or its last part
            yield Record.FromString(whole)
            whole = b""


def wandb_rows(logs):
    "Of the newest file. wandb keeps what it has not yet written in another process, which a kill takes along."
    rows, images = [], []
    newest = sorted((logs / "wandb").glob("offline-run-*/*.wandb"))[-1]
    for record in wandb_records(newest):
        items = {"/".join(i.nested_key) or i.key: json.loads(i.value_json) for i in record.history.item}
        images += [items["_step"] for name in items if name.startswith("held_out/images")]
        wanted = [name for name in items if not name.startswith(("_", "held_out/images"))]
        rows += [(items["_step"], name, items[name]) for name in wanted]
    return rows, images


@pytest.mark.parametrize("name", TRACKERS)
def test_every_tracker_has_every_row_once_though_the_run_was_killed(name, killed):
    if name not in INSTALLED:
        pytest.skip(f"{name} is not installed: pip install {name}")
    folder = killed[0] / "lora"
    rows, images = {"tensorboard": tensorboard_rows, "wandb": wandb_rows, "trackio": trackio_rows}[name](
        folder / "logs"
    )
    expected = {}
    for prefix, file in (("", "metrics.jsonl"), ("held_out/", "eval.jsonl")):
        for row in read_rows(folder / file):
            expected |= {(row["iteration"], prefix + key): value for key, value in row.items() if key != "iteration"}
    got = {(step, key): value for step, key, value in rows}
    assert len(rows) == len(got) and got.keys() == expected.keys()
    for (step, key), value in expected.items():
        assert key == "seconds" or got[step, key] == pytest.approx(value, rel=1e-6)
    assert sorted(set(images)) == ([4, 6] if name == "wandb" else [0, 2, 4, 6])


def test_nothing_is_written_outside_the_run_folder(killed, home):
    assert list((home / "here").iterdir()) == []
    assert not [path for path in home.rglob("*") if any(name in path.name.lower() for name in TRACKERS)]
    assert len(list((killed[0] / "lora" / "logs").iterdir())) >= len(INSTALLED)


class Notes:
    "A tracker that remembers what it was told."

    name, tracker = "notes", None

    def __init__(self):
        self.rows, self.images, self.finished = [], [], 0

    def log(self, values, step):
        self.rows.append((step, values))

    def log_images(self, values, step):
        self.images.append((step, values))

    def finish(self):
        self.finished += 1


class Noted:
    "What `Tracking` uses of an accelerator."

    def __init__(self, folder):
        self.project_dir, self.trackers, self.config = folder, [Notes()], None

    def init_trackers(self, project, config, start):
        self.config = config


class Colourful(TinyTask):
    def images(self, velocity):
        assert not torch.is_grad_enabled()
        return torch.full((3, 3, 2, 2), 0.5)


def small_run(folder, task, iterations, resume=False):
    "A run without processes; the tracker that was told of it, and the trainer."
    settings = replace(SETTINGS, iterations=iterations, groups=2, kl_weight=0.0, checkpoint_every=3)
    accelerator = Noted(folder / "logs")
    notes = accelerator.trackers[0]
    trainer = Trainer(task, ALGORITHM, settings, folder, resume)
    with Tracking(accelerator, trainer) as tracking:
        trainer.run(progress=False, callback=tracking)
    assert (
        notes.finished == 1 and accelerator.trackers == [] and accelerator.config["training/iterations"] == iterations
    )
    return notes, trainer


def test_a_longer_run_logs_only_what_is_new(tmp_path):
    first, _ = small_run(tmp_path / "run", Colourful(), 3)
    second, trainer = small_run(tmp_path / "run", Colourful(), 5, resume=True)
    assert [step for step, _ in first.rows] == [0, 1, 2, 3] and [step for step, _ in second.rows] == [4, 5]
    assert [step for step, _ in first.images] == [0, 2, 3] and [step for step, _ in second.images] == [4, 5]
    assert first.rows[0][1] == {"held_out/reward": trainer.evals[0]["reward"]}
    last = {**trainer.rows[-1], "held_out/reward": trainer.evals[-1]["reward"]}
    assert {"iteration": 5, **second.rows[-1][1]} == last
    ((key, (grid,)),) = first.images[0][1].items()
    assert key == "held_out/images" and grid.shape == (8, 8, 3)


def test_what_a_killed_run_left_in_tensorboard_is_not_logged_again(tmp_path, monkeypatch):
    "The kill came after some of a row was on the disk, and before the run remembered it."
    writer = pytest.importorskip("torch.utils.tensorboard").SummaryWriter
    monkeypatch.setattr(Notes, "name", "tensorboard")
    small_run(tmp_path / "run", TinyTask(), 3)
    with writer(str(tmp_path / "run" / "logs" / "neighbor_grpo")) as left:
        left.add_scalar("reward_mean", 0.5, 4)
    notes, trainer = small_run(tmp_path / "run", TinyTask(), 5, resume=True)
    assert [step for step, _ in notes.rows] == [4, 5]
    assert "reward_mean" in notes.rows[1][1]
    assert {**notes.rows[1][1]}.keys() - {"held_out/reward"} - notes.rows[0][1].keys() == {"reward_mean"}


def test_a_task_without_images_is_tracked_too(tmp_path):
    notes, _ = small_run(tmp_path / "run", TinyTask(), 2)
    assert len(notes.rows) == 3 and notes.images == []


def test_rows_that_are_made_again_are_not_logged_again(tmp_path):
    "The run dies after iteration 5, its checkpoint is of iteration 3."

    class Killed(BaseException):
        pass

    class Dies(Colourful):
        calls = 0

        def reward(self, samples, prompts):
            self.calls += prompts is not None
            if self.calls == 6:
                raise Killed
            return super().reward(samples, prompts)

    accelerator = Noted(tmp_path / "run" / "logs")
    settings = replace(SETTINGS, iterations=7, groups=2, kl_weight=0.0, checkpoint_every=3)
    trainer = Trainer(Dies(), ALGORITHM, settings, tmp_path / "run")
    trainer.save = lambda save=trainer.save: None if trainer.iteration == 5 else save()
    first = accelerator.trackers[0]
    with pytest.raises(Killed), Tracking(accelerator, trainer) as tracking:
        trainer.run(progress=False, callback=tracking)
    assert trainer.checkpoints.numbers() == [0, 3] and first.finished == 1
    second, _ = small_run(tmp_path / "run", Colourful(), 7, resume=True)
    assert [step for step, _ in first.rows + second.rows] == list(range(8))


def test_tracking_wants_a_run_folder(tmp_path):
    trainer = Trainer(TinyTask(), ALGORITHM, replace(SETTINGS, groups=2, kl_weight=0.0))
    with pytest.raises(ValueError, match="trainer.out is needed: a run folder"):
        Tracking(Noted(tmp_path), trainer)


def test_images_become_one_grid():
    images = torch.zeros(5, 3, 2, 4)
    images[4, 0] = 1.0  # red
    trainer = SimpleNamespace(task=SimpleNamespace(images=lambda velocity: images), velocity=None, iteration=7)
    ((at, grid),) = Tracking.draw(None, trainer).items()
    assert at == 7 and grid.shape == (8, 18, 3) and grid.dtype == np.uint8  # two rows of three, each in a frame
    assert (grid[5:7, 7:11] == [255, 0, 0]).all() and (grid[4:, 12:] == 255).all() and (grid[1:3, 1:5] == 0).all()
    assert (grid[0] == 255).all() and (grid[:, 0] == 255).all() and (grid[3:5] == 255).all()


def test_a_configuration_is_numbers_and_texts():
    flat = flattened({"a": {"b": 1, "c": {"d": [1, 2]}}, "e": None, "f": "g", "h": True})
    assert flat == {"a/b": 1, "a/c/d": "[1, 2]", "e": "null", "f": "g", "h": True}


# --- refusals ---

ENVIRONMENTS = [
    ({"ACCELERATE_USE_DEEPSPEED": "true"}, ("accelerate's distributed_type", "'DeepSpeed'", "fsdp_version: 2")),
    ({"ACCELERATE_USE_MEGATRON_LM": "true"}, ("accelerate's distributed_type", "'Megatron-LM'", "fsdp_version: 2")),
    ({"ACCELERATE_USE_FSDP": "true"}, ("fsdp_version", "'1'", "2")),
    (
        {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_OFFLOAD_PARAMS": "true"},
        ("fsdp_offload_params", "'true'", "false"),
    ),
    ({"ACCELERATE_MIXED_PRECISION": "bf16"}, ("mixed_precision", "'bf16'", "'no'")),
]


@pytest.mark.parametrize("case", ENVIRONMENTS, ids=lambda case: next(reversed(case[0])))
def test_what_is_not_supported_is_refused_before_anything_starts(case, monkeypatch, tmp_path):
    environment, fragments = case
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(distributed, "Accelerator", None)
    with pytest.raises(ValueError) as error:
        make_accelerator(tmp_path / "run")
    assert all(fragment in str(error.value) for fragment in fragments), error.value
    assert "\n" not in str(error.value) and list(tmp_path.iterdir()) == []


def test_a_tracker_that_is_not_installed_says_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setattr(tracking, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="trackers must be installed: pip install wandb, got 'wandb'"):
        make_accelerator(tmp_path, " wandb")


def test_fewer_processes_than_announced_are_refused(monkeypatch):
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    monkeypatch.setenv("WORLD_SIZE", "2")
    check_world(2)
    with pytest.raises(ValueError, match="processes must be 2, as WORLD_SIZE announces.* got 1"):
        check_world(1)


def test_a_launcher_that_starts_one_process_of_two_is_found_out(home, tmp_path):
    script = tmp_path / "script.py"
    script.write_text("from neighbor_grpo.runs.processes import make_accelerator\nmake_accelerator('run')")
    asked = (
        "accelerate.commands.launch --cpu --num_processes 2 --num_machines 1 --mixed_precision no --dynamo_backend no"
    )
    done = launch(asked, home=home, script=script)
    assert done.returncode != 0 and "starts one whatever --num_processes says" in done.stderr


def test_nothing_is_split_unless_asked_for(monkeypatch):
    monkeypatch.delenv("ACCELERATE_USE_FSDP", raising=False)
    check_environment()
    assert splitter(None) is None
