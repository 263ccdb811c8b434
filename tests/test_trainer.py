"""A training with a folder: its rows, its checkpoints, what resumes it exactly, and what stops it."""

import json
import math
import os
import shutil
from dataclasses import asdict, dataclass, replace

import numpy as np
import pytest
import safetensors.torch
import torch
from helpers import TinyTask, assert_same_outcome, differences, outcome, weights

from neighbor_grpo import training
from neighbor_grpo.neighbor import NeighborGRPO
from neighbor_grpo.rivals.catalogue import modified
from neighbor_grpo.rivals.gaussian import DanceGRPO
from neighbor_grpo.runs import folder as run_folder
from neighbor_grpo.runs import trainer as trainer_module
from neighbor_grpo.runs.folder import (
    Checkpoints,
    append_row,
    load_or_train,
    read_config,
    read_rows,
    save_tensors,
    write_atomically,
)
from neighbor_grpo.runs.pictures import plot_run
from neighbor_grpo.runs.state import load_trained, trained_state
from neighbor_grpo.runs.trainer import Trainer
from neighbor_grpo.training import TrainSettings, train

ALGORITHM = NeighborGRPO(group_size=4, steps=3, anchors=2, trained_steps=2)
SETTINGS = TrainSettings(
    iterations=6, groups=3, updates=2, lr=1e-2, kl_weight=0.05, ema=0.8, eval_every=2, checkpoint_every=2
)
FIELDS = "iteration reward_mean reward_std nfe_old nfe_theta clip_fraction ratio_min ratio_max entropy grad_norm"


def run(out=None, task=None, algorithm=ALGORITHM, resume=False, callback=None, **settings):
    trainer = Trainer(task or TinyTask(), algorithm, replace(SETTINGS, **settings), out, resume)
    return trainer.run(progress=False, callback=callback)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    "The run folder of a run that nothing stopped."
    folder = tmp_path_factory.mktemp("uninterrupted") / "run"
    run(folder)
    return folder


class Killed(BaseException):
    "Stands for a process that is no more."


# --- metrics ---


@pytest.mark.parametrize("algorithm", [ALGORITHM, DanceGRPO(group_size=4, steps=4, trained_steps=2)])
def test_the_folder_holds_the_rows_of_the_run(algorithm, tmp_path):
    trainer, alone = run(tmp_path / "run", algorithm=algorithm), train(TinyTask(), algorithm, SETTINGS, progress=False)
    rows = read_rows(tmp_path / "run" / "metrics.jsonl")
    assert rows == trainer.rows and [row["iteration"] for row in rows] == [1, 2, 3, 4, 5, 6]
    assert [row | {"seconds": 0} for row in rows] == [row | {"seconds": 0} for row in alone.rows]
    assert read_rows(tmp_path / "run" / "eval.jsonl") == trainer.evals == alone.evals
    assert torch.equal(weights(trainer.policy), weights(alone.policy))


def test_the_run_folder_remembers_everything(uninterrupted):
    config = json.loads((uninterrupted / "config.json").read_text())
    assert config["algorithm_name"] == "NeighborGRPO" and config["algorithm"] == asdict(ALGORITHM)
    assert config["training"] == asdict(SETTINGS) and config["versions"]["torch"] == torch.__version__
    names = {path.name for path in uninterrupted.iterdir()}
    assert names == {".lock", "config.json", "metrics.jsonl", "eval.jsonl", "checkpoints", "reference.safetensors"}
    assert {path.name for path in (uninterrupted / "checkpoints").iterdir()} == {"000004", "000006"}


def test_nothing_is_written_elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run()
    assert list(tmp_path.iterdir()) == []
    run("run")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_picture_of_a_run(uninterrupted, tmp_path):
    plot_run(
        read_rows(uninterrupted / "metrics.jsonl"), read_rows(uninterrupted / "eval.jsonl"), tmp_path / "reward.png"
    )
    assert (tmp_path / "reward.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("lr_decay", [0, 6, 8])
def test_the_rate_falls_in_a_straight_line_through_a_resume(lr_decay, tmp_path):
    rates, look = [], lambda trainer: rates.append(trainer.optimizer.param_groups[0]["lr"])
    run(tmp_path / "run", lr_decay=lr_decay, iterations=3, callback=look)
    run(tmp_path / "run", lr_decay=lr_decay, iterations=6, callback=look, resume=True)
    left = [1 - i / lr_decay if lr_decay else 1 for i in range(6)]
    assert rates == pytest.approx([SETTINGS.lr * share for share in left])


# --- resume ---


@pytest.mark.parametrize("stop", range(1, 7))
def test_stopped_after_any_iteration_and_resumed(stop, uninterrupted, tmp_path):
    def interrupt(trainer):
        if trainer.iteration == stop:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "run", callback=interrupt)
    assert Checkpoints(tmp_path / "run" / "checkpoints").numbers()[-1] == stop  # nothing was lost
    assert run(tmp_path / "run", resume=True).iteration == 6
    assert_same_outcome(tmp_path / "run", uninterrupted)


def test_resuming_a_finished_run_changes_nothing(uninterrupted, tmp_path):
    shutil.copytree(uninterrupted, tmp_path / "run")
    assert len(run(tmp_path / "run", resume=True).rows) == 6
    assert_same_outcome(tmp_path / "run", uninterrupted)


def test_a_longer_run_goes_on_from_a_shorter_one(uninterrupted, tmp_path):
    run(tmp_path / "run", iterations=4)
    run(tmp_path / "run", resume=True)
    assert_same_outcome(tmp_path / "run", uninterrupted)


def test_resuming_with_the_task_of_the_interrupted_run(uninterrupted, tmp_path):
    task = TinyTask()  # as in a notebook: its policy has been trained in the meantime, the reference is the base

    def interrupt(trainer):
        if trainer.iteration == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "run", task=task, callback=interrupt)
    run(tmp_path / "run", task=task, resume=True)
    assert_same_outcome(tmp_path / "run", uninterrupted)


def test_interrupted_while_the_metrics_are_made(uninterrupted, tmp_path, monkeypatch):
    summary, calls = training.SurrogateStats.summary, []

    def interrupt(stats):
        calls.append(stats)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return summary(stats)

    monkeypatch.setattr(training.SurrogateStats, "summary", interrupt)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "run")
    run(tmp_path / "run", resume=True)
    assert_same_outcome(tmp_path / "run", uninterrupted)


class Mortal:
    "Lets a run die at the n-th time that it touches the disk, half way through, and touch nothing afterwards."

    def __init__(self, monkeypatch, last=None):
        self.last, self.count = last, 0
        monkeypatch.setattr(run_folder, "save_file", self.guard(run_folder.save_file, self.half_file))
        monkeypatch.setattr(trainer_module, "append_row", self.guard(append_row, self.half_row))
        monkeypatch.setattr(os, "replace", self.guard(os.replace))
        monkeypatch.setattr(os, "fsync", self.guard(os.fsync))
        monkeypatch.setattr(shutil, "rmtree", self.guard(shutil.rmtree, self.half_folder))

    def guard(self, function, half=lambda *arguments: None):
        def guarded(*arguments, **options):
            self.count += 1
            if self.last is not None and self.count >= self.last:
                if self.count == self.last:
                    half(*arguments)
                raise Killed
            return function(*arguments, **options)

        return guarded

    def half_file(self, tensors, path):
        whole = safetensors.torch.save(tensors)
        path.write_bytes(whole[: len(whole) // 2])

    def half_row(self, path, row):
        with open(path, "a") as file:
            file.write(json.dumps(row)[:20])

    def half_folder(self, path):
        for file in sorted(path.iterdir())[:1] if path.exists() else []:
            file.unlink()


def touches(tmp_path_factory):
    "How often a run of two iterations touches the disk."
    with pytest.MonkeyPatch.context() as patch:
        mortal = Mortal(patch)
        run(tmp_path_factory.mktemp("touches") / "run", iterations=2, checkpoint_every=1)
    return mortal.count


def test_killed_at_any_touch_of_the_disk_and_resumed(tmp_path, tmp_path_factory, monkeypatch):
    run(tmp_path / "whole", iterations=2, checkpoint_every=1)
    count, different = touches(tmp_path_factory), {}
    assert count > 50
    for last in range(1, count + 1):
        folder = tmp_path / f"killed-{last}"
        with monkeypatch.context() as patch, pytest.raises(Killed):
            Mortal(patch, last)
            run(folder, iterations=2, checkpoint_every=1)
        if Checkpoints(folder / "checkpoints").numbers():
            Checkpoints(folder / "checkpoints").load()  # the newest can be read
        run(folder, iterations=2, checkpoint_every=1, resume=(folder / "config.json").exists())
        if differences(folder, tmp_path / "whole"):
            different[last] = differences(folder, tmp_path / "whole")
        elif {path.name for path in (folder / "checkpoints").iterdir()} != {"000001", "000002"}:
            different[last] = "other checkpoints"
    assert not different


def test_killed_twice_in_a_row(uninterrupted, tmp_path, monkeypatch):
    for last, resume in ((40, False), (30, True)):
        with monkeypatch.context() as patch, pytest.raises(Killed):
            Mortal(patch, last)
            run(tmp_path / "run", resume=resume)
    run(tmp_path / "run", resume=True)
    assert_same_outcome(tmp_path / "run", uninterrupted)


# --- checkpoints ---


@pytest.mark.parametrize("keep", [1, 2, 3])
def test_the_newest_checkpoints_are_kept(keep, tmp_path):
    run(tmp_path / "run", checkpoint_every=1, keep=keep)
    checkpoints = Checkpoints(tmp_path / "run" / "checkpoints", keep)
    assert checkpoints.numbers() == [0, 1, 2, 3, 4, 5, 6][-keep:]
    assert {path.name for path in checkpoints.folder.iterdir()} == {f"{n:06d}" for n in checkpoints.numbers()}


def test_a_checkpoint_comes_back_as_it_was_written(tmp_path):
    tensors = {
        "policy": {"a.b": torch.rand(3).bfloat16(), "c": torch.arange(4)},
        "optimizer": {"0.step": torch.tensor(2.0)},
    }
    strided = {"policy": {**tensors["policy"], "d": torch.rand(3, 4).T}, "optimizer": tensors["optimizer"]}
    Checkpoints(tmp_path).save(3, strided, {"iteration": 3})
    loaded, state = Checkpoints(tmp_path).load()
    assert state == {"iteration": 3} and loaded.keys() == strided.keys()
    for group, values in strided.items():
        assert loaded[group].keys() == values.keys()
        assert all(torch.equal(loaded[group][k], v) and loaded[group][k].dtype == v.dtype for k, v in values.items())


def truncate(folder):
    path = folder / "policy.safetensors"
    path.write_bytes(path.read_bytes()[:-10])


def scribble(folder):
    (folder / "optimizer.safetensors").write_bytes(b"no tensors here")


def empty_state(folder):
    (folder / "state.json").write_text("{")


def no_state(folder):
    (folder / "state.json").unlink()


def no_policy(folder):
    (folder / "policy.safetensors").unlink()


def no_average(folder):
    (folder / "ema.safetensors").unlink()


def foreign(folder):
    safetensors.torch.save_file({"weight": torch.zeros(3)}, folder / "policy.safetensors")


def no_number(folder):
    (folder / "state.json").write_text("{}")


@pytest.mark.parametrize(
    "damage",
    [truncate, scribble, empty_state, no_state, no_policy, no_average, foreign, no_number],
    ids=lambda f: f.__name__,
)
def test_a_damaged_checkpoint_is_named(damage, uninterrupted, tmp_path):
    shutil.copytree(uninterrupted, tmp_path / "run")
    newest = tmp_path / "run" / "checkpoints" / "000006"
    damage(newest)
    with pytest.raises(ValueError, match="checkpoint") as error:
        run(tmp_path / "run", resume=True)
    assert str(newest) in str(error.value)
    shutil.rmtree(newest)  # what the message advises
    run(tmp_path / "run", resume=True)
    assert_same_outcome(tmp_path / "run", uninterrupted)


@pytest.mark.parametrize(
    ("name", "changed", "value", "before"),
    [
        ("lr", {"lr": 0.5}, "0.5", "0.01"),
        ("seed", {"seed": 3}, "3", "0"),
        ("groups", {"groups": 6}, "6", "3"),
        ("sigma", {"algorithm": replace(ALGORITHM, sigma=0.7)}, "0.7", "0.3"),
        ("algorithm_name", {"algorithm": DanceGRPO()}, "DanceGRPO", "NeighborGRPO"),
    ],
)
def test_resuming_under_another_setting_names_it(name, changed, value, before, uninterrupted, tmp_path):
    shutil.copytree(uninterrupted, tmp_path / "run")
    with pytest.raises(ValueError) as error:
        run(tmp_path / "run", resume=True, **changed)
    assert all(part in str(error.value) for part in (name, value, before))
    run(tmp_path / "run", resume=True, iterations=7, keep=1)  # these may change
    assert Checkpoints(tmp_path / "run" / "checkpoints").numbers() == [7]


def test_a_folder_with_a_run_is_not_overwritten(uninterrupted):
    before = outcome(uninterrupted)[1]
    with pytest.raises(ValueError, match="out must be a folder without a run"):
        run(uninterrupted)
    assert outcome(uninterrupted)[1] == before


def test_resume_needs_a_run(tmp_path):
    with pytest.raises(ValueError, match="out must be a run folder"):
        run(tmp_path / "nowhere", resume=True)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["guard", "lean", "gdpo"])
def test_a_run_is_not_resumed_with_a_modifier_that_it_did_not_have(name, uninterrupted, tmp_path):
    "These have no settings: all that tells them apart is their name."
    shutil.copytree(uninterrupted, tmp_path / "run")
    with pytest.raises(ValueError, match=f"{name} must be None, as in the run"):
        run(tmp_path / "run", algorithm=modified(ALGORITHM, name), resume=True)
    assert_same_outcome(tmp_path / "run", uninterrupted)


def test_a_trainer_does_not_go_on_from_the_midst_of_an_iteration(uninterrupted, tmp_path):
    trainer, learned = Trainer(TinyTask(), ALGORITHM, SETTINGS, tmp_path / "run"), []
    step = trainer.optimizer.step

    def fail():
        learned.append(step())
        if len(learned) == 3:  # the first update of the second iteration
            raise MemoryError

    trainer.optimizer.step = fail
    with pytest.raises(MemoryError):
        trainer.run(progress=False)
    with pytest.raises(ValueError, match="resume=True, got .*in the midst of iteration 2"):
        trainer.run(progress=False)
    run(tmp_path / "run", resume=True)
    assert_same_outcome(tmp_path / "run", uninterrupted)


def test_a_reason_to_stop_ends_one_call_of_run(tmp_path):
    trainer = Trainer(TinyTask(), ALGORITHM, SETTINGS)
    trainer.stop_reason = "a signal"
    with pytest.raises(KeyboardInterrupt, match="a signal"):
        trainer.run(progress=False)
    try:
        assert trainer.run(progress=False).iteration == 6
    except KeyboardInterrupt:  # would end pytest
        pytest.fail("stopped again")


def test_figures_may_be_numbers_of_torch_and_numpy(tmp_path):
    class Figures(TinyTask):
        def evaluate(self, velocity):
            return dict(reward=torch.tensor(0.5), spread=np.float32(0.25), none=torch.tensor(math.nan))

    evals = run(tmp_path / "run", task=Figures(), iterations=1).evals
    assert evals == [dict(iteration=i, reward=0.5, spread=0.25, none=None) for i in (0, 1)]


def test_tied_weights_are_stored(tmp_path):
    one, other = torch.nn.Linear(3, 3), torch.nn.Linear(3, 3)
    other.weight = one.weight
    state = trained_state(torch.nn.Sequential(one, other))
    save_tensors(tmp_path / "tied.safetensors", state)
    stored = safetensors.torch.load_file(tmp_path / "tied.safetensors")
    assert stored.keys() == state.keys() and all(torch.equal(stored[name], state[name]) for name in state)


# --- what is not trained ---


def half_frozen(seed=0):
    "Two layers, the first frozen, and a buffer."
    torch.manual_seed(seed)
    network = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4), torch.nn.Linear(4, 2))
    network[0].requires_grad_(False)
    return network


def test_what_is_stored_is_what_can_change():
    stored = trained_state(half_frozen())
    buffers = {"1.running_mean", "1.running_var", "1.num_batches_tracked"}
    assert stored.keys() == {"1.weight", "1.bias", "2.weight", "2.bias", *buffers}


def test_what_is_frozen_stays_and_the_rest_comes_back():
    one, other = half_frozen(0), half_frozen(1)
    before = other[0].weight.clone()
    load_trained(other, trained_state(one))
    assert torch.equal(other[0].weight, before) and not torch.equal(before, one[0].weight)
    assert all(torch.equal(value, trained_state(one)[name]) for name, value in trained_state(other).items())
    other[2].weight.data += 1
    assert not torch.equal(other[2].weight, one[2].weight), "a copy, not the same memory"


@pytest.mark.parametrize("change", [lambda state: state.pop("2.bias"), lambda state: state.update(more=torch.zeros(1))])
def test_a_state_with_other_names_is_refused(change):
    state = trained_state(half_frozen())
    change(state)
    with pytest.raises(ValueError, match="more|2.bias"):
        load_trained(half_frozen(), state)


def test_checkpoints_hold_no_frozen_weights_and_resume_exactly(tmp_path):
    def task():
        task = TinyTask()
        task.policy.net[0].requires_grad_(False)
        return task

    run(tmp_path / "whole", task())
    (tensors, _), frozen = Checkpoints(tmp_path / "whole" / "checkpoints").load(), {"net.0.weight", "net.0.bias"}
    assert frozen < task().policy.state_dict().keys()
    assert tensors["policy"].keys() == tensors["ema"].keys() == task().policy.state_dict().keys() - frozen
    run(tmp_path / "parts", task(), iterations=4)
    trainer = run(tmp_path / "parts", task(), resume=True)
    assert_same_outcome(tmp_path / "parts", tmp_path / "whole")
    assert torch.equal(trainer.policy.net[0].weight, task().policy.net[0].weight)


def test_settings_that_do_not_go_together_leave_no_folder(tmp_path):
    task = TinyTask()
    task.split_guidance = True
    with pytest.raises(ValueError, match="train_guidance_scale must be that of the rollout unless updates is 1"):
        Trainer(task, ALGORITHM, SETTINGS, tmp_path / "run")
    assert not (tmp_path / "run").exists()


# --- files ---


def test_rows_up_to_a_line_that_was_cut(tmp_path):
    path, rows = tmp_path / "rows.jsonl", [{"iteration": k, "x": k / 3, "none": None} for k in range(3)]
    for row in rows:
        append_row(path, row)
    whole = path.read_bytes()
    assert read_rows(path) == rows and read_rows(tmp_path / "none.jsonl") == []
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        assert read_rows(path) == rows[: whole[: length + 1].count(b"\n")]


def test_atomic_writing_leaves_the_old_text_or_the_new(tmp_path, monkeypatch):
    path = tmp_path / "text"
    write_atomically(path, "old")
    with monkeypatch.context() as patch, pytest.raises(Killed):
        Mortal(patch, 2)
        write_atomically(path, "new")
    assert path.read_text() == "old"
    write_atomically(path, "new")
    assert path.read_text() == "new" and [p.name for p in tmp_path.iterdir()] == ["text"]


def test_a_kept_network_is_trained_once(tmp_path):
    trained = []

    def train(network):
        trained.append(network)
        torch.nn.init.constant_(network.weight, 2.0)
        return network

    for _ in range(2):
        network = load_or_train(tmp_path, "base", torch.nn.Linear(2, 2), train)
        assert (network.weight == 2).all() and not network.training
        assert not any(p.requires_grad for p in network.parameters())
    assert len(trained) == 1 and [path.name for path in tmp_path.iterdir()] == ["base.safetensors"]
    load_or_train(None, "base", torch.nn.Linear(2, 2), train)
    assert len(trained) == 2


# --- what stops a run ---


class Broken(TinyTask):
    "Its reward goes wrong in the fifth iteration."

    def __init__(self, fault):
        super().__init__()
        self.fault, self.calls = fault, 0

    def reward(self, samples, prompts):
        if prompts is not None:
            self.calls += 1
        rewards = super().reward(samples, prompts)
        return self.fault(rewards) if self.calls == 5 and prompts is not None else rewards


def gone(rewards):
    raise ConnectionError("the reward server is gone")


FAULTS = {
    "nan": (lambda r: r.index_fill(0, torch.tensor([7]), math.nan), ValueError, ["rewards", "finite", "nan"]),
    "infinite": (lambda r: r.index_fill(0, torch.tensor([0]), -math.inf), ValueError, ["rewards", "finite", "-inf"]),
    "raises": (gone, ConnectionError, ["the reward server is gone"]),
    "too few": (lambda r: r[:-1], ValueError, ["rewards", "(11,)", "(12,)"]),
    "a column": (lambda r: r[:, None], ValueError, ["rewards", "(12, 1)", "(12,)"]),
    "one number": (lambda r: r.mean(), ValueError, ["rewards", "()", "(12,)"]),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_broken_reward_stops_the_run_with_the_last_good_checkpoint(name, tmp_path):
    fault, kind, fragments = FAULTS[name]
    task = Broken(fault)
    with pytest.raises(kind) as error:
        run(tmp_path / "run", task=task, checkpoint_every=100)
    assert all(part in str(error.value) for part in fragments)
    assert weights(task.policy).isfinite().all()
    run(tmp_path / "four", iterations=4)
    (tensors, _), (expected, _) = outcome(tmp_path / "run"), outcome(tmp_path / "four")
    assert Checkpoints(tmp_path / "run" / "checkpoints").numbers() == [0, 4]
    assert all(torch.equal(value, expected[key]) for key, value in tensors.items())


def test_a_repaired_reward_goes_on_as_if_nothing_had_happened(uninterrupted, tmp_path):
    with pytest.raises(ConnectionError):
        run(tmp_path / "run", task=Broken(gone))
    run(tmp_path / "run", resume=True)
    assert_same_outcome(tmp_path / "run", uninterrupted)


class Exploding(torch.nn.Module):
    "A policy that returns NaN with gradient at one of its calls."

    def __init__(self, policy, at):
        super().__init__()
        self.policy, self.at, self.calls = policy, at, 0

    def forward(self, x, t, cond):
        v = self.policy(x, t, cond)
        self.calls += torch.is_grad_enabled()
        return v * math.nan if self.calls == self.at and torch.is_grad_enabled() else v


@pytest.mark.parametrize(("at", "micro_batch", "last"), [(7, 0, 3), (8, 0, 2), (19, 4, 3), (21, 4, 3)])
def test_a_loss_that_is_not_finite_never_reaches_the_weights(at, micro_batch, last, tmp_path):
    # Two updates an iteration; 12 trained states make one batch or three.
    task = TinyTask()
    task.policy = Exploding(task.policy, at)
    with pytest.raises(ValueError, match="loss must be finite, got nan"):
        run(tmp_path / "run", task=task, micro_batch=micro_batch, checkpoint_every=2)
    assert weights(task.policy).isfinite().all()
    tensors, rest = outcome(tmp_path / "run")
    assert rest["state"]["iteration"] == last and all(value.isfinite().all() for value in tensors.values())


def test_a_gradient_that_is_not_finite_never_reaches_the_weights(tmp_path):
    task, calls = TinyTask(), []

    def poison(gradient):
        calls.append(gradient)
        return gradient * math.inf if len(calls) == 5 else gradient

    task.policy.net[-1].weight.register_hook(poison)
    with pytest.raises(ValueError, match="gradient norm must be finite"):
        run(tmp_path / "run", task=task)
    assert weights(task.policy).isfinite().all()
    tensors, rest = outcome(tmp_path / "run")
    assert rest["state"]["iteration"] == 2 and all(value.isfinite().all() for value in tensors.values())


def test_a_failing_evaluation_loses_no_iteration(uninterrupted, tmp_path):
    class Absent(TinyTask):
        def evaluate(self, velocity):
            if velocity.training is not None and len(read_rows(tmp_path / "run" / "eval.jsonl")) == 2:
                raise ConnectionError("no judge")
            return super().evaluate(velocity)

    with pytest.raises(ConnectionError):
        run(tmp_path / "run", task=Absent())
    assert Checkpoints(tmp_path / "run" / "checkpoints").numbers()[-1] == 4
    run(tmp_path / "run", resume=True)
    assert_same_outcome(tmp_path / "run", uninterrupted)


# --- an average that collects, and a memory ---


def test_a_run_collected_by_its_average_resumes_exactly(tmp_path):
    def interrupt(trainer):
        if trainer.iteration in (2, 5):
            raise KeyboardInterrupt

    more = {"collector": "average", "shuffle": True}
    run(tmp_path / "whole", **more)
    for resume in (False, True):
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "run", resume=resume, callback=interrupt, **more)
    run(tmp_path / "run", resume=True, **more)
    assert_same_outcome(tmp_path / "run", tmp_path / "whole")


@dataclass(frozen=True)
class Remembering(NeighborGRPO):
    "Adds the best reward that it remembers to all rewards of a group, which changes nothing but the memory."

    def recall(self, rollout, rewards, prompts, memory, generator=None):
        return rollout, rewards, {"best": rewards.max(1).values, "prompts": prompts}

    def remember(self, memory, news, iteration):
        best = torch.cat([memory.get("best", torch.zeros(0)), *(new["best"] for new in news)])
        return {"best": best[-8:], "iteration": torch.tensor(iteration)}


def test_a_memory_is_saved_and_comes_back(tmp_path):
    algorithm = Remembering(**vars(ALGORITHM))

    def interrupt(trainer):
        if trainer.iteration == 3:
            raise KeyboardInterrupt

    run(tmp_path / "whole", algorithm=algorithm)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "run", algorithm=algorithm, callback=interrupt)
    trainer = Trainer(TinyTask(), algorithm, SETTINGS, tmp_path / "run", resume=True)
    assert trainer.memory["iteration"] == 2 and trainer.memory["best"].shape == (8,)
    trainer.run(progress=False)
    assert_same_outcome(tmp_path / "run", tmp_path / "whole")
    assert "memory.best" in outcome(tmp_path / "run")[0]


def test_configuration_of_a_run(uninterrupted, tmp_path):
    assert read_config(uninterrupted)["algorithm"] == asdict(ALGORITHM)
    with pytest.raises(ValueError, match="--out must be a run folder"):
        read_config(tmp_path, "--out")
