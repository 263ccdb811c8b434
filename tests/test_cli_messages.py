"""Wrong calls and files of settings end in one line of our own words, whatever is wrong with them."""

import json
import os
import re
import subprocess
import sys
from dataclasses import fields

import pytest
import yaml
from helpers import TinyTask
from hypothesis import example, given, settings
from hypothesis import strategies as st

from neighbor_grpo.cli import COMMANDS, MAX_BYTES, TASKS, main, read_command, read_recipe, read_study, train_parser
from neighbor_grpo.flow import require
from neighbor_grpo.models.sd3 import SD3
from neighbor_grpo.neighbor import NeighborGRPO
from neighbor_grpo.rivals.catalogue import ALGORITHMS, MODIFIERS
from neighbor_grpo.runs.trainer import Trainer
from neighbor_grpo.tasks.toy2d import ToySettings
from neighbor_grpo.training import TrainSettings

RAW = "Error: |Traceback|NoneType|<class|typing\\.|got None|NestedArg|object is not|Parser key"


def in_our_words(message):
    "The message is a line that shows nothing of Python's or a library's inside."
    assert message.strip() and len(message) < 2500
    assert not re.search(RAW, message), message


def refused(call, *parts):
    "The message with which a call is refused, which holds the parts."
    with pytest.raises(ValueError) as error:
        call()
    in_our_words(str(error.value))
    assert all(part in str(error.value) for part in parts), str(error.value)
    return str(error.value)


def error_line(argv, capsys):
    "The one line on standard error of a command that fails."
    capsys.readouterr()
    assert main(argv) == 1
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1 and error.startswith("neighbor-grpo: ")
    in_our_words(error.removeprefix("neighbor-grpo: "))
    return error


# --- what is missing, what is unknown ---


@pytest.mark.parametrize("line", ["serve", "pretrain", "compare", "train --resume", "compare --out x", "train sd3"])
def test_what_is_missing_is_needed(line, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    error = error_line([*line.split(), "--quiet"] if line != "serve" else ["serve"], capsys)
    assert " is needed: " in error
    assert list(tmp_path.rglob("*")) in ([], [tmp_path / "runs"])


def test_require_without_a_value():
    assert refused(lambda: require(False, "anchors", None, "an integer")) == "anchors is needed: an integer"
    assert refused(lambda: require(False, "anchors", 0, "an integer >= 1")) == "anchors must be an integer >= 1, got 0"


@pytest.mark.parametrize(
    "option, meant",
    [
        ("--batch-size", "--groups"),
        ("--batch_size=4", "--groups"),
        ("--learning-rate", "--lr"),
        ("--epochs", "--iterations"),
        ("--iter", "--iterations"),
        ("--output-dir", "--out"),
        ("--sigmaa", "--sigma"),
        ("--groupsize", "--group_size"),
        ("--num_generations", "--group_size"),
        ("--chunk", "--with chunks --chunk"),
        ("--guard", "--with guard"),
        ("--advantage-power", "--with slas --advantage_power"),
    ],
)
def test_an_unknown_option_gets_a_suggestion(option, meant):
    refused(lambda: read_command(["toy", option, "3"]), option, f"did you mean {meant}")


def test_a_suggestion_is_an_option_of_this_task():
    assert "did you mean" not in refused(lambda: read_command(["toy", "--lora-rnk", "3"]))
    refused(lambda: read_command(["sd3", "--lora-rnk", "3"]), "did you mean --lora_rank?")
    refused(lambda: read_command(["sd3", "--resolution", "512"]), "--height and --width")


@pytest.mark.parametrize("option", ["--out.x", "--lr.x", "--resume=yes", "--quiet=3", "--help=3", "--", "-x"])
def test_odd_options_are_refused(option):
    refused(lambda: read_command(["toy", option, "3"]), option.split("=")[0])


# --- files of settings ---

BOMB = "a0: &a0 lol\n" + "".join(f"a{i + 1}: &a{i + 1} [{', '.join(9 * [f'*a{i}'])}]\n" for i in range(9))
FLAT_BOMB = "[&a0 [x,x,x,x,x,x,x,x,x]," + ",".join(f"&a{i + 1} [{','.join([f'*a{i}'] * 9)}]" for i in range(9)) + "]"
FILES = {
    "aliases": (BOMB, "line 2", "without aliases"),
    "merge": ("base: &b {lr: 0.1}\n<<: *b\n", "line 2", "without aliases"),
    "aliases in a text": (f'task: toy\nsigma: "{FLAT_BOMB}"\n', "aliases"),
    "deep flow": ("lr: " + 5000 * "[" + 5000 * "]", "nested at most"),
    "deep json": ('{"lr": ' + 50 * '{"a": ' + "1" + 50 * "}" + "}", "nested at most"),
    "deep text": (f'task: toy\nsigma: "{5000 * "["}{5000 * "]"}"\n', "nesting"),
    "tag": ("lr: !!python/object/apply:os.system [ls]\n", "line 1", "without tags"),
    "bool tag": ("resume: !!bool x\n", "without tags"),
    "twice": ("lr: 0.1\nlr: 0.2\n", "lr twice"),
    "twice in other letters": ("group-size: 4\ngroup_size: 8\n", "group_size twice"),
    "large": ("# " + MAX_BYTES * "x", f"at most {MAX_BYTES} bytes"),
    "list": ("- 1\n- 2\n", "a mapping"),
    "number as name": ("1: 2\n", "a mapping"),
    "empty": ("", "a mapping"),
    "text": ("just words", "a mapping"),
    "no YAML": ("lr: [1, 2\n", "not YAML"),
    "a date that is none": ("lr: 2020-13-45\n", "month"),
    "control letters": ("lr: \x01\n", "not YAML"),
}


@pytest.mark.parametrize("kind", FILES)
def test_files_that_are_not_plain_settings(kind, tmp_path):
    path = tmp_path / "mine.yaml"
    text, *parts = FILES[kind]
    path.write_text(text, encoding="utf-8")
    refused(lambda: read_command(["toy", "--recipe", str(path)]), "--recipe", *parts[kind.endswith("a text") :])
    if "text" not in kind:
        refused(lambda: read_study(["--study", str(path), "--out", "x"]), "--study", *parts)


def test_aliases_in_the_lines_of_a_study(tmp_path):
    path = tmp_path / "study.yaml"
    path.write_text(json.dumps(dict(task="toy", variants=["neighbor"], seeds=[0], common=f"--sigma '{FLAT_BOMB}'")))
    refused(lambda: read_study(["--study", str(path), "--out", "x", "--iterations", "1"]), "aliases")


VALUES = {
    "lr: fast": ("--lr", "float", "'fast'"),
    "lr: [1]": ("--lr", "float", "[1]"),
    "lr: true": ("--lr", "float", "True"),
    "lr: null": ("lr is needed",),
    "groups: 2.5": ("--groups", "int", "2.5"),
    "groups: many": ("--groups", "int", "'many'"),
    "method: rk4": ("--method", "heun", "'rk4'"),
    "method: 3": ("--method", "heun", "3"),
    "shuffle: perhaps": ("--shuffle", "bool", "'perhaps'"),
    "task: [toy]": ("task among",),
    "algorithm: {a: 1}": ("algorithm among",),
    "task: null": ("task among",),
    "quiet: true": ("names of settings",),
    "out: x": ("names of settings",),
}


@pytest.mark.parametrize("line", VALUES)
def test_values_of_a_recipe_have_the_types_of_their_settings(line, tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(line if line.startswith("task") else f"task: toy\n{line}\n")
    message = refused(lambda: read_command(["--recipe", str(path)]), *VALUES[line])
    assert str(path) in message or "is needed" in message


STUDY = dict(task="toy", variants=["neighbor"], seeds=[0], iterations=2, out="x")
STUDY_VALUES = {
    "jobs": ("many", 2.5, [2], None, True),
    "seeds": ("a", [0, "b"], [[0]], {"a": 1}, [None], [-1], []),
    "variants": (3, [3], [None], [["neighbor"]], {"a": None}, {"a": 1}, "neighbor '", {"../up": "neighbor"}, []),
    "common": (3, "--lr '", "--lr", "--seed 3", "--help", "-h", [1]),
    "iterations": ("many", 0, [1], 1.5),
    "evaluations": ("many", -1, {}),
    "target": ("high", None, []),
    "task": ("moon", 3, ["toy"]),
    "quiet": ("maybe", 3),
    "out": (3, ["x"], None),
    "study": ("other.yaml",),
    "help": (True,),
    "lr": (0.1,),
}


@pytest.mark.parametrize("name", STUDY_VALUES)
def test_values_of_a_study_have_the_types_of_their_settings(name, tmp_path):
    path = tmp_path / "study.yaml"
    for value in STUDY_VALUES[name]:
        path.write_text(yaml.safe_dump(STUDY | {name: value}))
        if value is None and name in ("jobs", "target"):
            assert read_study(["--study", str(path)])[1][name] is not None  # as if it did not stand there
        else:
            message = refused(lambda: read_study(["--study", str(path)]))
            assert name in message or name == "common" and "variant neighbor: " in message


def test_single_values_and_dashes_in_files(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("task: toy\ngroup-size: 4\nlr: 1e-4\nanchors: 2\n")
    _, (_, algorithm, loop), _ = read_command(["--recipe", str(path)])
    assert (algorithm.group_size, loop.lr) == (4, 1e-4)
    path.write_text(yaml.safe_dump(STUDY | dict(variants="neighbor --group-size 4 --anchors 2", seeds=3)))
    study, _ = read_study(["--study", str(path)])
    assert study.seeds == (3,) and study.variants[0].algorithm.group_size == 4


def test_recipes_are_utf8_on_any_machine(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("\ufeff# für später: größer, 大きい\ntask: toy\nlr: 0.002\n", encoding="utf-8")
    code = "from neighbor_grpo.cli import read_recipe; print(read_recipe('mine.yaml')['lr'])"
    plain = os.environ | {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    done = subprocess.run([sys.executable, "-c", code], env=plain, capture_output=True, text=True, cwd=tmp_path)
    assert done.stdout.strip() == "0.002", done.stderr
    path.write_bytes("task: toy\n# größer\n".encode("latin-1"))
    refused(lambda: read_recipe(str(path)), "UTF-8")


# --- configurations of runs ---


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    "The shortest toy run."
    folder = tmp_path_factory.mktemp("runs") / "run"
    line = "train toy --quiet --pretrain-steps 1 --iterations 1 --eval-samples 4 --groups 1 --lr 0.003 --out"
    assert main([*line.split(), str(folder)]) == 0
    return folder


def test_the_configuration_of_a_run_is_a_recipe(run, capsys):
    again = read_command(["--recipe", str(run / "config.json"), "--out", "x"])
    first = read_command(["--out", str(run), "--resume"])
    assert again[:2] == first[:2] and again[1][2].lr == 0.003
    task, (_, algorithm, loop), _ = read_command(
        ["--recipe", str(run / "config.json"), "--algorithm", "dance", "--lr", "0.1"]
    )
    assert (task, type(algorithm), loop.lr, loop.groups) == ("toy", ALGORITHMS["dance"], 0.1, 1)


def test_the_study_of_a_comparison_is_a_study(tmp_path, capsys):
    line = "compare toy --variants neighbor --seeds 0 --iterations 1 --jobs 1 --quiet --common"
    common = "--pretrain-steps 1 --eval-samples 4 --groups 1"
    assert main([*line.split(), common, "--out", str(tmp_path / "one")]) == 0
    study, values = read_study(["--study", str(tmp_path / "one" / "study.json"), "--out", "x", "--seeds", "1"])
    assert study.seeds == (1,) and study.budgets == {"iterations": 1} and values.common == common
    assert "task_name" not in error_line(["train", "--recipe", str(tmp_path / "one" / "study.json")], capsys)


def test_the_folder_of_a_trainer_says_what_it_lacks(tmp_path, capsys):
    Trainer(
        TinyTask(), NeighborGRPO(group_size=2, anchors=1), TrainSettings(iterations=1, groups=1), tmp_path / "own"
    ).run(False)
    folder = str(tmp_path / "own")
    for argv in (["evaluate", folder], ["sample", folder], ["save", folder], ["train", "--out", folder, "--resume"]):
        error = error_line(argv, capsys)
        assert folder in error and "without task_name" in error and "Python" in error
    assert "without task_name" in error_line(["train", "--recipe", f"{folder}/config.json"], capsys)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)
PARTS = ("task_name", "task", "algorithm_name", "algorithm", "modifiers", "training")


@settings(max_examples=40)
@given(st.sampled_from(PARTS), st.one_of(st.just("missing"), JSON), st.sampled_from(["whole", "inside"]))
@example("task_name", ["toy"], "whole")
@example("training", {}, "whole")
@example("task", 10**400, "inside")
def test_any_configuration_is_read_or_refused(run, part, value, where):
    config = json.loads((run / "config.json").read_text())
    if where == "inside" and config[part] and isinstance(config[part], dict):
        config[part][next(iter(config[part]))] = value
    elif value == "missing":
        del config[part]
    else:
        config[part] = value
    path = run.parent / "config.json"
    path.write_text(json.dumps(config))
    for argv in (["--recipe", str(path)], ["--resume", "--out", str(run.parent)]):
        try:
            read_command(argv)
        except ValueError as error:
            in_our_words(str(error))


# --- everything else ---

classes = (ToySettings, TrainSettings, *ALGORITHMS.values(), *MODIFIERS.values())
names = sorted({"with"} | {field.name for cls in classes for field in fields(cls)})
WORDS = st.one_of(
    st.sampled_from(
        [*COMMANDS, *TASKS, *ALGORITHMS, *MODIFIERS, "all", "", "-", "--", "-1", "nan", "inf", "1e400", "null", "true"]
    ),
    st.sampled_from(
        ["[", "[" * 30, "{", "{a: 1}", "[1, 2]", "&a [*a]", "!!int x", "0x10", "1_0", "9" * 5000, "\ud800"]
    ),
    st.text(max_size=4),
    st.integers().map(str),
    st.floats().map(str),
)
OPTIONS = st.sampled_from(
    [*names, "out", "recipe", "resume", "quiet", "trackers", "algorithm", "help", "seeds", "variants"]
)


@st.composite
def lines(draw):
    "Command lines with known names and odd values."
    words = draw(st.lists(st.sampled_from([*TASKS, "toy", "moon"]), max_size=1))
    for _ in range(draw(st.integers(1, 4))):
        name, value = draw(OPTIONS), draw(WORDS)
        option = "--" + draw(st.sampled_from([name, name.replace("_", "-"), name[:-1], f"{name}.x"]))
        words += draw(st.sampled_from([[option, value], [f"{option}={value}"], [option], [value]]))
    return words


@settings(max_examples=40)
@given(lines())
@example(["toy", "--algorithm", "neighbor", "--seed", "9" * 5000])
@example(["toy", "--sigma", "\ud800"])
@example(["toy", "--method", ""])
def test_any_command_line_is_read_or_refused(argv):
    for read in (read_command, read_study):
        try:
            read([*argv])
        except ValueError as error:
            in_our_words(str(error))
        except SystemExit as error:  # after --help
            assert error.code == 0


def test_a_bug_says_how_to_see_where(monkeypatch, capsys):
    monkeypatch.setitem(COMMANDS, "bench", lambda argv: {}["nothing"])
    assert main(["bench"]) == 1
    assert capsys.readouterr().err == "neighbor-grpo: KeyError: 'nothing' (--debug shows where)\n"


def test_files_give_defaults_with_the_types_of_the_settings():
    parser = train_parser("toy", "neighbor", defaults={"lr": "1e-4", "groups": "8"})
    assert (parser.parse_args([]).lr, parser.parse_args([]).groups) == (1e-4, 8)


# --- the pipeline of the package by its name ---


def test_the_packaged_miniature_has_a_name(tmp_path, monkeypatch, capsys):
    from neighbor_grpo.models.pipeline import MINIATURE, open_pipeline

    monkeypatch.chdir(tmp_path)
    one, two = open_pipeline(SD3, "miniature"), open_pipeline(SD3, MINIATURE)
    assert one.transformer.config == two.transformer.config
    (tmp_path / "miniature").mkdir()
    assert "'miniature'" in refused(lambda: open_pipeline(SD3, "miniature"))  # an own folder of this name goes first
    for task in ("sd3", "scenes"):
        assert main(["train", task, "--help"]) == 0
        assert "miniature" in capsys.readouterr().out.split("--source", 1)[1].split("  --")[0]


def test_a_value_of_neither_kind_is_refused_with_both():
    assert refused(lambda: read_command(["toy", "--shift", "abc"])) == (
        "--shift must be of type float or null, got 'abc'"
    )
