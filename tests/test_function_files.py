"""A run folder, a recipe made of one and a left study run no function file that the command line does not name."""

import json

import pytest

from neighbor_grpo.cli import main
from neighbor_grpo.runs.folder import seal
from neighbor_grpo.runs.plugins import check_plugins, function_files, give_plugins

EVIL = """
from pathlib import Path
Path("was run").touch()
def score(pictures, prompts, records): return [0.0] * len(pictures)
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    "A run folder from somebody else, with a file in it that its rewards name."
    monkeypatch.chdir(tmp_path)
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "evil.py").write_text(EVIL)
    return tmp_path / "theirs"


def write(folder, text, name="rewards"):
    task = dict(source="miniature", height=32, width=32) | {name: text}
    config = dict(task_name="images", task=task, algorithm_name="NeighborGRPO", algorithm={}, training=dict(seed=0))
    (folder / "config.json").write_text(json.dumps(seal(config)))


COMMANDS = (
    "evaluate theirs",
    "sample theirs",
    "save theirs",
    "report theirs --out a.html",
    "train --resume --out theirs",
    "train --recipe theirs/config.json --out mine",
)


@pytest.mark.parametrize("command", COMMANDS)
def test_a_folder_runs_no_file_by_itself(folder, command, capsys):
    write(folder, "compressibility,2*function@theirs/evil.py:score")
    assert main(command.split()) == 1
    assert "used with --plugin theirs/evil.py: a run folder names its functions" in capsys.readouterr().err
    assert not (folder.parent / "was run").exists()


@pytest.mark.parametrize("entry", ("{}", " function @ {}", "-1 * {}"))
@pytest.mark.parametrize("name", ("rewards", "judges"))
def test_all_ways_to_write_a_function_are_seen(folder, entry, name, capsys):
    write(folder, entry.format("theirs/evil.py:score"), name)
    assert main(["evaluate", "theirs"]) == 1 and "--plugin" in capsys.readouterr().err
    assert not (folder.parent / "was run").exists()


def test_a_left_study_runs_no_file_by_itself(folder, capsys):
    options = "--source miniature --rewards theirs/evil.py:score --height 32 --width 32"
    study = dict(task="images", variants=[f"neighbor {options}"], seeds=[0], evaluations=8)
    (folder / "study.json").write_text(json.dumps(study))
    assert main("compare --quiet --out theirs".split()) == 1
    assert "a run folder names its functions" in capsys.readouterr().err
    assert not (folder.parent / "was run").exists()


def test_a_named_file_is_enough_and_packages_need_none(folder):
    task = dict(rewards=f"function@{folder}/evil.py:score,function@os.path:join,remote@http://a.py:80", judges=None)
    assert function_files(task)[:1] == [f"{folder}/evil.py"]
    with pytest.raises(ValueError, match="--plugin"):
        check_plugins(dict(task=task), "DIR", folder)
    try:
        give_plugins(["theirs/evil.py"])
        check_plugins(dict(task=dict(rewards=f"function@{folder}/evil.py:score")), "DIR", folder)
    finally:
        give_plugins([])
