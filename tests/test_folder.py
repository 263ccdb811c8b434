"""The run folder: what a power cut leaves, who may write, what damage is found, and what signals do."""

import contextlib
import io
import json
import os
import re
import shutil
import signal
import stat
import sys
import threading
import time
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch._dynamo  # which AdamW imports: once, before processes are forked
from helpers import TinyTask, assert_same_outcome, differences

from neighbor_grpo import cli  # imported once, before processes are forked
from neighbor_grpo.neighbor import NeighborGRPO
from neighbor_grpo.runs import folder as run_folder
from neighbor_grpo.runs.folder import (
    Checkpoints,
    append_row,
    check_config,
    hold_folder,
    load_or_train,
    load_tensors,
    new_folder,
    open_run,
    read_rows,
)
from neighbor_grpo.runs.pictures import plot_run
from neighbor_grpo.runs.trainer import Trainer, run_config
from neighbor_grpo.tasks import digits, toy2d  # noqa: F401  # imported once, before processes are forked
from neighbor_grpo.training import TrainSettings

ALGORITHM = NeighborGRPO(group_size=4, steps=3, anchors=2, trained_steps=2)
SETTINGS = TrainSettings(iterations=4, groups=2, kl_weight=0.05, ema=0.8, eval_every=2, checkpoint_every=2)
posix = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")


class Task(TinyTask):
    "With a network that is kept in the run folder."

    def __init__(self, out):
        super().__init__()
        self.base = load_or_train(out, "base", torch.nn.Linear(2, 2), lambda network: network)


def run(out, resume=False, **settings):
    "As the command does it: claim, make the task, train."
    settings = replace(SETTINGS, **settings)
    with open_run(out, run_config(ALGORITHM, settings), resume):
        return Trainer(Task(out), ALGORITHM, settings, out, resume=True).run(progress=False)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    "The folder of a run that nothing stopped."
    folder = tmp_path_factory.mktemp("whole") / "run"
    run(folder)
    return folder


@pytest.fixture
def copy(whole, tmp_path):
    return Path(shutil.copytree(whole, tmp_path / "copy"))


# --- a power cut ---


class Disk:
    "Knows what the disk below a folder has: contents as of their last sync, names as of the last sync of their folder."

    def __init__(self, root, graves, patch):
        self.root, self.graves, self.contents, self.names, self.left = root, graves, {}, {}, []
        self.names[root.stat().st_ino] = {}
        for module, name in ((os, "fsync"), (os, "replace"), (os, "mkdir"), (os, "unlink"), (shutil, "rmtree")):
            patch.setattr(module, name, self.watched(name, getattr(module, name)))

    def watched(self, name, function):
        def call(*arguments, **options):
            self.look()
            result = function(*arguments, **options)
            if name == "fsync":
                self.sync(os.fstat(arguments[0]))
            if name == "mkdir":
                self.names[os.stat(arguments[0]).st_ino] = {}
            self.look()
            return result

        return call

    def sync(self, state):
        if stat.S_ISDIR(state.st_mode):
            (path,) = (p for p in [self.root, *self.root.rglob("*")] if p.stat().st_ino == state.st_ino)
            self.names[state.st_ino] = {p.name: p.stat() for p in path.iterdir()}
            return
        (path,) = (p for p in self.root.rglob("*") if p.stat().st_ino == state.st_ino)
        self.contents[state.st_ino] = path.read_bytes()
        grave = self.graves / str(state.st_ino)  # the number is not given to another file as long as there is a link
        if not grave.exists():
            os.link(path, grave)

    def synced(self, number, path=Path()):
        "Names and contents that were synced."
        for name, state in self.names.get(number, {}).items():
            if stat.S_ISDIR(state.st_mode):
                yield path / name, None
                yield from self.synced(state.st_ino, path / name)
            else:
                yield path / name, self.contents.get(state.st_ino, b"")

    def named(self):
        "All names, as a journal may have written them already, but contents only as far as they were synced."
        for path in self.root.rglob("*"):
            is_folder = path.is_dir()
            yield path.relative_to(self.root), None if is_folder else self.contents.get(path.stat().st_ino, b"")

    def look(self):
        "Remember both as what a power cut would leave now."
        for left in (frozenset(self.synced(self.root.stat().st_ino)), frozenset(self.named())):
            if left not in self.left:
                self.left.append(left)


def lay_out(left, folder):
    "Make the folder that a power cut left."
    folder.mkdir()
    for path, content in sorted(left, key=lambda item: item[0].parts):
        if content is None:
            (folder / path).mkdir(parents=True, exist_ok=True)
        else:
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            (folder / path).write_bytes(content)


@posix
def test_the_power_fails_at_any_moment(whole, tmp_path, monkeypatch):
    for name in ("disk", "graves"):
        (tmp_path / name).mkdir()
    with monkeypatch.context() as patch:
        disk = Disk(tmp_path / "disk", tmp_path / "graves", patch)
        run(tmp_path / "disk" / "runs" / "one")
    assert len(disk.left) > 60
    different = {}
    for number, left in enumerate(disk.left):
        lay_out(left, tmp_path / f"cut-{number}")
        folder = tmp_path / f"cut-{number}" / "runs" / "one"
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # nothing has to be mended
            run(folder, resume=(folder / "config.json").exists())
        if differences(folder, whole):
            different[number] = differences(folder, whole)
    assert not different


@posix
def test_what_is_done_is_on_the_disk(tmp_path, monkeypatch):
    "After each call, and not only after the next one."
    root = tmp_path / "disk"
    for path in (root, tmp_path / "graves"):
        path.mkdir()
    with monkeypatch.context() as patch:
        disk = Disk(root, tmp_path / "graves", patch)
        there = lambda: dict(disk.synced(root.stat().st_ino))
        run_folder.make_folder(root / "a" / "b")
        assert set(there()) == {Path("a"), Path("a/b")}
        run_folder.write_atomically(root / "a" / "text", "whole")
        assert there()[Path("a/text")] == b"whole"
        append_row(root / "a" / "rows.jsonl", {"iteration": 1})
        append_row(root / "a" / "rows.jsonl", {"iteration": 2})
        assert there()[Path("a/rows.jsonl")].count(b"\n") == 2
        load_or_train(root / "a", "net", torch.nn.Linear(1, 1), lambda network: network)
        assert there()[Path("a/net.safetensors")] == (root / "a" / "net.safetensors").read_bytes()
        checkpoints = Checkpoints(root / "a" / "checkpoints")
        checkpoints.save(3, {"policy": {"w": torch.ones(2)}}, {"iteration": 3})
        for path in (root / "a" / "checkpoints" / "000003").iterdir():
            assert there()[path.relative_to(root)] == path.read_bytes()
        new_folder(root / "a" / "run")
        assert Path("a/run") in there()


@posix
def test_files_are_synced_as_windows_wants_it(tmp_path, monkeypatch):
    import errno
    import fcntl

    def fsync(handle):
        if fcntl.fcntl(handle, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
            raise OSError(errno.EBADF, "Bad file descriptor")
        synced.append(handle)

    def no_folders(path, flags, *more):
        if os.path.isdir(path):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return real(path, flags, *more)

    synced, real = [], os.open
    monkeypatch.setattr(os, "fsync", fsync)
    for _ in range(2):
        Checkpoints(tmp_path / "checkpoints").save(len(synced), {"policy": {"w": torch.ones(2)}}, {})
        append_row(tmp_path / "rows.jsonl", {})
        monkeypatch.setattr(os, "open", no_folders)
    assert len(synced) == 6 and len(read_rows(tmp_path / "rows.jsonl")) == 2


def test_a_disk_that_fails_is_not_overlooked(tmp_path, monkeypatch):
    def fail(handle):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="Input/output error"):
        run_folder.sync_folder(tmp_path)


# --- rights, links, what lingers ---


@posix
@pytest.mark.parametrize("mask", [0o022, 0o027, 0o002])
def test_files_have_the_rights_of_the_umask(mask, tmp_path):
    before = os.umask(mask)
    try:
        run(tmp_path / "run", iterations=2)
        plot_run([], [], tmp_path / "run" / "reward.png")
    finally:
        os.umask(before)
    files = [path for path in (tmp_path / "run").rglob("*") if path.is_file()]
    assert {path.suffix for path in files} >= {".safetensors", ".json", ".jsonl", ".png"}
    assert {path.name: oct(path.stat().st_mode & 0o777) for path in files} == {
        path.name: oct(0o666 & ~mask) for path in files
    }


@posix
def test_pictures_do_not_follow_links(tmp_path):
    (tmp_path / "precious").write_text("x")
    for name in ("reward.png", ".reward.png.partial"):
        (tmp_path / name).symlink_to(tmp_path / "precious")
    plot_run([], [], tmp_path / "reward.png")
    assert (tmp_path / "precious").read_text() == "x" and not (tmp_path / "reward.png").is_symlink()
    assert (tmp_path / "reward.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs /proc")
def test_nothing_stays_mapped(copy):
    trainer = Trainer(Task(copy), ALGORITHM, SETTINGS, copy, resume=True)
    assert trainer.iteration == 4 and str(copy) not in Path("/proc/self/maps").read_text()


def test_what_cannot_be_removed_is_left_until_it_can(whole, tmp_path, monkeypatch):
    def busy(*arguments, **options):
        if not options.get("ignore_errors"):
            raise OSError(39, "Directory not empty")

    def old_stays(source, target, real=os.replace):
        if ".old" in str(target) and stubborn:
            raise PermissionError(13, "in use")
        real(source, target)

    stubborn = True
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", busy)
        patch.setattr(os, "replace", old_stays)
        run(tmp_path / "run", iterations=2, checkpoint_every=1, keep=1)
        stubborn = False
        run(tmp_path / "run", resume=True, iterations=3, checkpoint_every=1, keep=1)
        there = {path.name for path in (tmp_path / "run" / "checkpoints").iterdir()}
        assert there == {"000003", ".old-000000", ".old-000001", ".old-000002"}
    run(tmp_path / "run", resume=True, iterations=4, checkpoint_every=1, keep=1)
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["000004"]


# --- one run at a time ---


def child(work):
    "A process that does some work and then waits for its end; returns its number once the work is done."
    done, say = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            with work():
                os.write(say, b"x")
                time.sleep(600)
        finally:
            os._exit(1)
    os.close(say)
    assert os.read(done, 1) == b"x"
    os.close(done)
    return pid


def kill(pid):
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)


@posix
def test_a_held_folder_is_refused_until_its_holder_is_gone(copy, whole):
    before = {path: path.read_bytes() for path in copy.rglob("*") if path.is_file()}
    pid = child(lambda: hold_folder(copy))
    try:
        for action in (lambda: run(copy, resume=True), lambda: hold_folder(copy).__enter__()):
            with pytest.raises(ValueError, match=f"{re.escape(str(copy))} is in use: process {pid} on"):
                action()
        Checkpoints(copy / "checkpoints").load()  # reading is free
        now = {path: path.read_bytes() for path in copy.rglob("*") if path.is_file()}
        assert {k: v for k, v in now.items() if k.name != ".lock"} == {
            k: v for k, v in before.items() if k.name != ".lock"
        }
    finally:
        kill(pid)
    run(copy, resume=True)
    assert_same_outcome(copy, whole)


@posix
def test_a_refused_command_leaves_the_folder_to_its_holder(tmp_path, capfd):
    folder = tmp_path / "run"
    line = ["train", "toy", "--quiet", "--out", str(folder)]
    pid = child(lambda: hold_folder(folder))
    try:
        assert cli.main(line) == 1 and "is in use: process" in capfd.readouterr().err
        assert [path.name for path in folder.iterdir()] == [".lock"]
    finally:
        kill(pid)


def test_the_same_process_may_hold_a_folder_twice(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with hold_folder(Path("run")), hold_folder(tmp_path / "run"):
        assert (tmp_path / "run" / ".lock").exists()


def test_other_threads_are_refused(tmp_path):
    refused = []

    def other():
        try:
            with hold_folder(tmp_path):
                pass
        except ValueError as e:
            refused.append(str(e))

    with hold_folder(tmp_path):
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
    assert len(refused) == 1 and "is in use" in refused[0]


def test_a_trainer_whose_folder_went_on_without_it_is_refused(copy):
    first = Trainer(Task(copy), ALGORITHM, replace(SETTINGS, iterations=6), copy, resume=True)
    run(copy, resume=True, iterations=6)
    with pytest.raises(ValueError, match="out must be as this trainer left it"):
        first.run(progress=False)


def test_names_are_claimed_once(tmp_path):
    names = []
    threads = [threading.Thread(target=lambda: names.append(new_folder(tmp_path / "runs" / "toy"))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    expected = {"toy", *(f"toy-{i}" for i in range(2, 9))}
    assert len(names) == 8 and {path.name for path in names} == expected


# --- damage ---


def flip(path, place):
    content = bytearray(path.read_bytes())
    content[int(place * (len(content) - 1))] ^= 1
    path.write_bytes(content)


DAMAGE = {
    "a bit": lambda path: flip(path, 0.7),
    "the first bit": lambda path: flip(path, 0),
    "cut": lambda path: path.write_bytes(path.read_bytes()[:-3]),
    "empty": lambda path: path.write_bytes(b""),
    "zeros": lambda path: path.write_bytes(bytes(path.stat().st_size)),
    "gone": Path.unlink,
}
IN_CHECKPOINT = ("policy.safetensors", "optimizer.safetensors", "ema.safetensors", "state.json")


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("name", IN_CHECKPOINT)
def test_a_damaged_checkpoint_is_named_with_a_way_on(name, damage, copy, whole):
    newest = copy / "checkpoints" / "000004"
    DAMAGE[damage](newest / name)
    with pytest.raises(ValueError) as error:
        run(copy, resume=True)
    assert str(newest / name) in str(error.value) and "\n" not in str(error.value)
    assert str(error.value).endswith(f"remove {newest} to go on from iteration 2")
    shutil.rmtree(newest)
    run(copy, resume=True)
    assert_same_outcome(copy, whole)


def test_the_way_on_passes_over_other_damage(copy):
    run(copy, resume=True, iterations=6, keep=9)
    for number in ("000004", "000006"):
        flip(copy / "checkpoints" / number / "ema.safetensors", 0.5)
    with pytest.raises(ValueError, match="to go on from iteration 2$"):
        run(copy, resume=True, iterations=6)
    flip(copy / "checkpoints" / "000002" / "ema.safetensors", 0.5)
    with pytest.raises(ValueError, match="there is no good one before it$"):
        run(copy, resume=True, iterations=6)


def test_every_bit_of_the_state_counts(copy):
    path = copy / "checkpoints" / "000004" / "state.json"
    good, (_, state) = path.read_bytes(), Checkpoints(copy / "checkpoints").load()
    for place in range(0, len(good), 7):
        path.write_bytes(good[:place] + bytes([good[place] ^ 1 << place % 8]) + good[place + 1 :])
        with contextlib.suppress(ValueError):
            assert Checkpoints(copy / "checkpoints").load()[1] == state
    for other in (b"{}", b"[]", b"null", b'{"iteration": 2}', b'{"iteration": "4"}', b'{"iteration": 4.5}', b"\xff"):
        path.write_bytes(other)
        with pytest.raises(ValueError, match=re.escape(str(path))):
            Checkpoints(copy / "checkpoints").load()


def test_a_checkpoint_under_another_number_is_refused(copy):
    (copy / "checkpoints" / "000004").rename(copy / "checkpoints" / "000007")
    with pytest.raises(ValueError, match="000007.*of iteration 7, got 4.*remove .*000007 to go on from iteration 2"):
        run(copy, resume=True)


@pytest.mark.parametrize("damage", [name for name in DAMAGE if name != "gone"])
@pytest.mark.parametrize("name", ["base", "reference"])
def test_a_damaged_network_beside_the_checkpoints_is_named(name, damage, copy):
    DAMAGE[damage](copy / f"{name}.safetensors")
    with pytest.raises(ValueError, match=re.escape(f"{name}.safetensors is damaged")) as error:
        run(copy, resume=True)
    assert "\n" not in str(error.value)


def test_another_network_is_refused_even_if_it_is_whole(copy):
    run_folder.save_tensors(copy / "base.safetensors", torch.nn.Linear(2, 2).state_dict())
    with pytest.raises(ValueError, match=r"base.safetensors is damaged.* relies on it"):
        run(copy, resume=True)


@pytest.mark.parametrize("damage", [name for name in DAMAGE if name != "gone"])
def test_a_damaged_configuration_is_named(damage, copy):
    DAMAGE[damage](copy / "config.json")
    with pytest.raises(ValueError, match=re.escape(f"{copy / 'config.json'} is damaged")):
        run(copy, resume=True)


@pytest.mark.parametrize("text", ["{}", "[]", "7", "null", '{"algorithm": 3, "training": null, "versions": {}}'])
def test_a_configuration_that_is_none_is_named(text, copy):
    (copy / "config.json").write_text(text)
    with pytest.raises(ValueError, match=re.escape(str(copy / "config.json"))):
        run(copy, resume=True)


def test_a_wrong_digit_in_the_configuration_is_found(copy):
    text = (copy / "config.json").read_text()
    (copy / "config.json").write_text(text.replace('"lr": 0.001', '"lr": 0.003'))
    with pytest.raises(ValueError, match=r"config.json is damaged"):
        run_folder.read_config(copy)


def earlier(folder):
    "Make a run folder of the version before checksums."
    for path in folder.glob("checkpoints/*/state.json"):
        path.write_text(json.dumps({"iteration": int(path.parent.name)}))
    config = run_folder.read_config(folder)
    (folder / "config.json").write_text(json.dumps(config))


def test_a_folder_of_an_earlier_version_is_taken_up_with_a_warning(copy, tmp_path, whole):
    earlier(copy)
    with pytest.warns(UserWarning, match=r"000004.state.json is of an earlier version, without checksums"):
        run(copy, resume=True, iterations=6)
    shutil.copytree(whole, tmp_path / "other")
    run(tmp_path / "other", resume=True, iterations=6)
    assert_same_outcome(copy, tmp_path / "other")


@pytest.mark.filterwarnings("ignore:.*earlier version")
def test_rows_of_an_earlier_version_are_refused_if_they_are_missing(copy):
    earlier(copy)
    (copy / "eval.jsonl").write_text("")
    with pytest.raises(ValueError, match=r"eval.jsonl must be the rows up to iteration 4"):
        run(copy, resume=True, iterations=6)


# --- rows ---


def test_a_bad_line_is_refused_with_its_number(tmp_path):
    path = tmp_path / "rows.jsonl"
    for bad in ("[", "null", "7", "", '{"a": 1', "\x00\x00"):
        path.write_text(f'{{"a": 0}}\n{bad}\n{{"a": 2}}\n')
        with pytest.raises(ValueError, match=re.escape(f"{path}, line 2, is damaged")):
            read_rows(path)
    path.write_bytes(b'{"a": 0}\n{"a": \xff\xfe}\n')
    with pytest.raises(ValueError, match="line 2"):
        read_rows(path)
    path.write_bytes(b'{"a": 0}\n\x00\x00\x00')  # cut off
    assert read_rows(path) == [{"a": 0}]


def test_what_is_not_finite_is_null(tmp_path):
    append_row(tmp_path / "rows.jsonl", {"a": float("nan"), "b": float("inf"), "c": 1.5, "d": "nan"})
    assert (tmp_path / "rows.jsonl").read_text() == '{"a": null, "b": null, "c": 1.5, "d": "nan"}\n'


def test_an_evaluation_without_a_figure_stops_nothing(tmp_path):
    class Lost(Task):
        def evaluate(self, velocity):
            return {"reward": float("nan")}

    with open_run(tmp_path / "run", run_config(ALGORITHM, SETTINGS), False):
        trainer = Trainer(Lost(tmp_path / "run"), ALGORITHM, SETTINGS, tmp_path / "run", resume=True)
        with contextlib.redirect_stderr(io.StringIO()):
            trainer.run()
    assert trainer.evals == read_rows(tmp_path / "run" / "eval.jsonl") and trainer.evals[0]["reward"] is None
    plot_run(trainer.rows, trainer.evals, tmp_path / "reward.png")
    cli.print_figures({"after": trainer.evals[-1]})


BAD_ROWS = {
    "a bad line": lambda text: text.replace('{"iteration": 2', '["iteration": 2'),
    "a wrong digit": lambda text: text.replace('"reward', '"rewerd', 1),
    "empty": lambda text: "",
    "half": lambda text: text[: len(text) // 2],
    "another order": lambda text: "".join(reversed(text.splitlines(keepends=True))) + "\n",
    "other JSON": lambda text: 'null\n[]\n{}\n{"iteration": "x"}\n{"iteration": []}\n\n' + text[3:],
}


@pytest.mark.parametrize("file", ["metrics.jsonl", "eval.jsonl"])
@pytest.mark.parametrize("name", BAD_ROWS)
def test_damaged_rows_come_from_the_checkpoint(name, file, copy, tmp_path, whole):
    text = (copy / file).read_text()
    (copy / file).write_text(BAD_ROWS[name](text))
    assert name == "another order" or (copy / file).read_text() != text
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run(copy, resume=True)
    assert name == "another order" or any(f"{file} is damaged" in str(w.message) for w in caught)
    assert_same_outcome(copy, whole)


def test_missing_rows_come_from_the_checkpoint(copy, whole):
    for file in ("metrics.jsonl", "eval.jsonl"):
        (copy / file).unlink()
    with pytest.warns(UserWarning, match=r"metrics.jsonl is damaged: 4 of 4 rows come from checkpoint 000004"):
        run(copy, resume=True)
    assert_same_outcome(copy, whole)
    assert [row["seconds"] for row in read_rows(copy / "metrics.jsonl")] == [None] * 4


def test_equal_runs_save_equal_checkpoints(whole, tmp_path):
    run(tmp_path / "run")
    for path in (whole / "checkpoints").rglob("*.*"):
        assert (tmp_path / "run" / path.relative_to(whole)).read_bytes() == path.read_bytes(), path


def test_a_checkpoint_that_came_before_its_evaluation_is_brought_up_to_date(whole, tmp_path):
    class Absent(Task):
        def evaluate(self, velocity):
            raise KeyboardInterrupt

    run(tmp_path / "run", iterations=3, eval_every=4)
    with pytest.raises(KeyboardInterrupt):
        settings = replace(SETTINGS, eval_every=4)
        Trainer(Absent(tmp_path / "run"), ALGORITHM, settings, tmp_path / "run", True).run(progress=False)
    run(tmp_path / "run", resume=True, eval_every=4)
    state = Checkpoints(tmp_path / "run" / "checkpoints").load()[1]
    assert [row["iteration"] for row in state["rows"]["eval.jsonl"]] == [0, 3, 4]


# --- signals ---

LINE = """train toy --quiet --pretrain_steps 4 --iterations 6 --groups 2 --group_size 4 --anchors 2 --eval_every 3
    --checkpoint_every 100""".split()


def commanded(folder, numbers=(), while_saving=(), ignored=(), resume=(), at="end"):
    "Exit status and output of a command that gets signals after its third iteration, and more while it saves."
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        status = 70
        try:
            sys.stdout = sys.stderr = open(writing, "w")
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                signal.signal(number, signal.SIG_IGN if number in ignored else signal.SIG_DFL)
            signal.signal(signal.SIGINT, signal.default_int_handler)
            step, save = Trainer.step, run_folder.save_file

            def stopped(trainer):
                row = step(trainer)
                for number in numbers if trainer.iteration == 3 else ():
                    os.kill(os.getpid(), number)
                return row

            def disturbed(tensors, path):
                save(tensors, path)
                for number in while_saving if sys.exc_info()[1] else ():
                    os.kill(os.getpid(), number)

            def half_way(*arguments, clip=torch.nn.utils.clip_grad_norm_):
                calls.append(1)
                for number in numbers if len(calls) == 6 else ():
                    os.kill(os.getpid(), number)
                return clip(*arguments)

            calls, run_folder.save_file = [], disturbed
            if at == "end":
                Trainer.step = stopped
            else:
                torch.nn.utils.clip_grad_norm_ = half_way
            cli.plot_run = toy2d.ToyTask.draw = lambda *arguments: None
            status = cli.main([*LINE, "--out", str(folder), *resume])
        finally:
            sys.stderr.flush()
            os._exit(status)
    os.close(writing)
    with open(reading) as output:
        text = output.read()
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), text


@pytest.fixture(scope="module")
def commanded_whole(tmp_path_factory):
    if not hasattr(os, "fork"):
        pytest.skip("needs fork")
    folder = tmp_path_factory.mktemp("commanded") / "run"
    assert commanded(folder)[0] == 0
    return folder


@posix
@pytest.mark.parametrize("more", [(), ("SIGTERM",), ("SIGINT", "SIGHUP")], ids="-".join)
@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_signals_save_the_last_iteration_and_say_so_in_one_line(name, more, tmp_path, commanded_whole):
    number = signal.Signals[name]
    status, output = commanded(tmp_path / "run", [number], [signal.Signals[other] for other in more])
    assert status == 128 + number and len(output.splitlines()) == 1
    assert f"go on with: neighbor-grpo train --out {tmp_path / 'run'} --resume" in output
    assert ("stopped by hand" if name == "SIGINT" else f"stopped by {name}") in output
    assert Checkpoints(tmp_path / "run" / "checkpoints").numbers() == [0, 3]
    assert commanded(tmp_path / "run", resume=["--resume"])[0] == 0
    assert_same_outcome(tmp_path / "run", commanded_whole)


@posix
def test_an_iteration_whose_weights_have_moved_is_finished_first(tmp_path):
    updates = ["--updates", "2"]
    status, output = commanded(tmp_path / "run", [signal.SIGTERM], resume=updates, at="second update")
    assert status == 128 + signal.SIGTERM and len(output.splitlines()) == 1
    assert Checkpoints(tmp_path / "run" / "checkpoints").numbers() == [0, 3]
    assert commanded(tmp_path / "run", resume=["--resume"])[0] == 0
    assert commanded(tmp_path / "whole", resume=updates)[0] == 0
    assert_same_outcome(tmp_path / "run", tmp_path / "whole")


@posix
def test_signals_that_were_ignored_stay_ignored(tmp_path, commanded_whole):
    assert commanded(tmp_path / "run", [signal.SIGHUP], ignored=[signal.SIGHUP])[0] == 0
    assert_same_outcome(tmp_path / "run", commanded_whole)


def test_the_library_alone_leaves_signals_as_they_are(tmp_path):
    numbers = (signal.SIGINT, signal.SIGTERM)
    before, seen = [signal.getsignal(number) for number in numbers], []
    trainer = Trainer(Task(tmp_path), ALGORITHM, SETTINGS, tmp_path / "run")
    trainer.run(progress=False, callback=lambda t: seen.append([signal.getsignal(number) for number in numbers]))
    assert seen == [before] * 4


def test_the_command_gives_signals_back():
    before = [signal.getsignal(number) for number in cli.STOPS]
    with contextlib.redirect_stderr(io.StringIO()):
        assert cli.main(["trian"]) == 1
    assert [signal.getsignal(number) for number in cli.STOPS] == before


def test_tensors_come_back_as_copies(tmp_path):
    tensors = {"a": torch.rand(3, 4).T, "b": torch.rand(2).bfloat16(), "c": torch.tensor(2)}
    run_folder.save_tensors(tmp_path / "t.safetensors", tensors)
    loaded = load_tensors(tmp_path / "t.safetensors")
    assert loaded.keys() == tensors.keys() and all(torch.equal(loaded[k], v) for k, v in tensors.items())


@pytest.mark.parametrize("name, value", [("eval_method", "dpm++2m"), ("optimizer", "adamw"), ("quantize", "none")])
def test_a_run_from_before_a_setting_goes_on_as_it_did(name, value):
    check_config(dict(task=dict(lr=1)), dict(task={"lr": 1, name: value}))
    with pytest.raises(ValueError, match=re.escape(f"{name} must be {value!r}, as in the run")):
        check_config(dict(task=dict(lr=1)), dict(task={"lr": 1, name: "another"}))
