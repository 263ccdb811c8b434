"""What the command line says of itself: tasks, settings, versions, what a run has done and what to do next."""

import re
import shlex
import subprocess
import sys

import pytest

from neighbor_grpo.cli import COMMANDS, TASKS, main, read_command, recipes, train_parser
from neighbor_grpo.rivals.catalogue import ALGORITHMS

SHORT = "--pretrain_steps 2 --eval_samples 20 --iterations 2 --groups 2 --group_size 4 --anchors 2"


def said(line, capsys):
    "What a command prints on standard output when it succeeds in silence otherwise."
    assert main(line.split()) == 0
    printed = capsys.readouterr()
    assert printed.err == ""
    return printed.out


def options(text):
    return re.findall(r"^  (?:-h, )?--(\w+)", text, re.MULTILINE)


@pytest.mark.parametrize("line", ["--help", "-h", "train --help", "train -h", "train toy --help", "compare --help"])
def test_help_names_tasks_and_recipes_with_a_line_each(line, capsys):
    text = said(line, capsys)
    for name in (*TASKS, *recipes()):
        assert re.search(rf"^  {re.escape(name)} +\w.{{10,}}$", text, re.MULTILINE), name


def test_nothing_said_is_help_but_no_success(capsys):
    overview = said("--help", capsys)
    assert main([]) == 1
    assert capsys.readouterr().out == overview
    for name in COMMANDS:
        assert re.search(rf"^  {name} +\w", overview, re.MULTILINE), name


@pytest.mark.parametrize("task", TASKS)
def test_help_is_short_and_help_all_is_whole(task, capsys):
    short, whole = said(f"train {task} --help", capsys), said(f"train {task} --help all", capsys)
    assert 15 <= len(options(short)) <= 26 and set(options(short)) < set(options(whole))
    assert {"iterations", "lr", "seed", "out", "group_size", "steps"} <= set(options(short))
    parser = train_parser(task, "neighbor")
    assert set(options(whole)) == {option.lstrip("-") for option in parser._option_string_actions} - {"h"}
    titles = [f"task {task}:", "algorithm neighbor:", "loop:"]
    assert [line for line in whole.splitlines() if line in titles] == titles
    assert whole == said(f"train {task} --help=all", capsys)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_help_all_says_what_each_algorithm_is(algorithm, capsys):
    text = said(f"train toy --algorithm {algorithm} --help", capsys)
    assert f"with the algorithm {algorithm}." in text and re.search(rf"^  {algorithm} +\w.{{20,}}", text, re.MULTILINE)


@pytest.mark.parametrize("command", [name for name in COMMANDS if name != "train"])
def test_every_command_has_help(command, capsys):
    text = said(f"{command} --help", capsys)
    assert text == said(f"{command} -h", capsys) and "None" not in text and "null" not in text
    assert COMMANDS[command].__doc__.split()[0] in text or command == "compare"


def test_dashes_and_underscores_are_the_same():
    under, dashes = ("toy --group_size 8 --eval_samples=50", "toy --group-size 8 --eval-samples=50")
    assert read_command(under.split()) == read_command(dashes.split())
    assert read_command(dashes.split())[1][1].group_size == 8


def test_only_names_of_options_change(capsys):
    out = read_command(["toy", "--out", "a-b", "--trackers=x-y"])[2]
    assert (out.out, out.trackers) == ("a-b", "x-y")


def test_version(capsys):
    import torch

    import neighbor_grpo

    line = said("--version", capsys)
    assert neighbor_grpo.__version__ in line and torch.__version__ in line and len(line.splitlines()) == 1


def test_debug_shows_where(monkeypatch, capsys):
    for line, variable in (
        ("--debug train toy --lr 0", ""),
        ("train toy --lr 0 --debug", "0"),
        ("train toy --lr 0", "1"),
    ):
        monkeypatch.setenv("NEIGHBOR_GRPO_DEBUG", variable)
        assert main(line.split()) == 1
        error = capsys.readouterr().err
        assert error.startswith("Traceback") and error.splitlines()[-1] == "neighbor-grpo: lr must be > 0, got 0.0"
    monkeypatch.setenv("NEIGHBOR_GRPO_DEBUG", "0")
    assert main("train toy --lr 0".split()) == 1
    assert capsys.readouterr().err == "neighbor-grpo: lr must be > 0, got 0.0\n"


def test_help_needs_no_large_library(tmp_path):
    code = (
        "import sys; from neighbor_grpo.cli import main; assert main(['train', 'toy', '--help']) == 0; "
        "print(sorted({'diffusers', 'transformers', 'peft', 'accelerate'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert done.stdout.splitlines()[-1] == "[]", done.stderr


def test_a_run_says_what_it_trains_what_it_left_and_what_to_do_next(tmp_path, capsys):
    out = tmp_path / "a run"
    words = [*f"train toy {SHORT}".split(), "--out", str(out)]
    assert main(words) == 0
    text = capsys.readouterr().out
    first, second, third = text.splitlines()[:3]
    assert all(part in first for part in ("toy", TASKS["toy"].about, "neighbor", "2 iterations", "2 groups of 4"))
    assert str(out) in second and "Ctrl-C" in second and "--resume" in second
    assert "Prompts: 1." in third and "0 of 2" in third
    listed = re.search(r"files:\n(.*?)\n\n", text, re.DOTALL)[1]
    named = {line.split()[0] for line in listed.splitlines()}
    assert all(len(line.split()) > 2 for line in listed.splitlines())
    assert named <= {path.name for path in out.iterdir()}
    assert {"samples.png", "reward.png", "eval.jsonl", "metrics.jsonl", "checkpoints", "config.json"} <= named
    commands = re.findall(r"^  (neighbor-grpo .*?)  #", text, re.MULTILINE)
    assert [command.split()[1] for command in commands] == ["sample", "evaluate", "report", "train"]
    assert text.splitlines()[-1] == f"run folder: {out}"
    for command in commands:  # each can be typed as it stands
        assert main(shlex.split(command)[1:]) == 0, command
    assert "Iterations done: 2 of 4" in capsys.readouterr().out


def test_quiet_says_the_figures_and_the_folder(tmp_path, capsys):
    assert main([*f"train toy --quiet {SHORT}".split(), "--out", str(tmp_path / "run")]) == 0
    printed = capsys.readouterr()
    assert printed.err == ""
    assert [line.split()[0] for line in printed.out.splitlines()] == ["reward", "before", "after", "run"]


def test_the_picture_of_the_toy_says_what_a_dot_is(monkeypatch):
    import matplotlib.pyplot as plt

    import neighbor_grpo.tasks.toy2d as toy2d

    task = toy2d.ToyTask(toy2d.ToySettings(pretrain_steps=1), progress=False)
    collapsed = lambda x, t, cond=None: (x - task.mean) / t[:, None]  # every noise ends at the target
    figure, axis = plt.subplots()
    monkeypatch.setattr(toy2d, "draw_panels", lambda policies, paint, path: paint(axis, policies["after"]))
    task.draw({"after": collapsed}, "unused")
    (text,) = [text.get_text() for text in axis.texts]
    assert "1000 samples" in text and "100% at the target" in text and "reward 1.00" in text
    behind, samples = axis.collections
    assert behind.get_offsets().std() > 0.5 > samples.get_offsets().std(0).max()
    assert samples.get_sizes()[0] > behind.get_sizes()[0] and axis.lines[0].get_markerfacecolor() == "none"
    plt.close(figure)
