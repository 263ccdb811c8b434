"""A plugin adds names and takes none: a run that was made without it means the same with it."""

import json

import pytest
from test_plugin import TOY, forgotten, said  # noqa: F401

from neighbor_grpo.cli import TASKS, main
from neighbor_grpo.rivals.catalogue import ALGORITHMS, MODIFIERS
from neighbor_grpo.rivals.gaussian import FlowGRPO
from neighbor_grpo.runs import plugins
from neighbor_grpo.runs.folder import read_rows

HEAD = """
from dataclasses import dataclass
from neighbor_grpo.cli import TASKS
from neighbor_grpo.rivals import gaussian
from neighbor_grpo.rivals.catalogue import ALGORITHMS, MODIFIERS

@dataclass(frozen=True)
class {name}(gaussian.FlowGRPO):
    def advantages(self, *arguments):
        return -super().advantages(*arguments)

ALGORITHMS["added"] = {name}
"""
TAKEN = {
    "ALGORITHMS['flow'] = Worse": "ALGORITHMS must be left as it is: add new names, got 'another flow'",
    "MODIFIERS['guard'] = MODIFIERS['slas']": "MODIFIERS must be left as it is: add new names, got 'another guard'",
    "del MODIFIERS['slas']": "MODIFIERS must be left as it is: add new names, got 'another slas'",
    "TASKS['toy'] = TASKS['digits']": "TASKS must be left as it is: add new names, got 'another toy'",
    "import sys; sys.exit()": "cannot be imported: SystemExit",
    "1 / 0": "cannot be imported: ZeroDivisionError",
}


@pytest.mark.parametrize("line", TAKEN)
def test_a_plugin_that_fails_has_changed_nothing(line, tmp_path, capsys):
    path, before = tmp_path / "mine.py", [dict(names) for names in (ALGORITHMS, MODIFIERS, TASKS)]
    path.write_text(HEAD.format(name="Worse") + line)
    assert TAKEN[line] in said(["train", "toy", "--out", tmp_path / "run", "--plugin", path], capsys)
    assert [dict(names) for names in (ALGORITHMS, MODIFIERS, TASKS)] == before
    assert not plugins.LOADED and not (tmp_path / "run").exists()


def test_a_class_named_as_another_algorithm_does_not_take_over_its_runs(tmp_path, capsys):
    "A run folder knows its algorithm by the name of the class."
    path, out = tmp_path / "mine.py", tmp_path / "run"
    path.write_text(HEAD.format(name="FlowGRPO"))
    assert main([*["flow" if word == "louder" else word for word in TOY], "--out", str(out)]) == 0
    assert json.loads((out / "config.json").read_text())["algorithm_name"] == FlowGRPO.__name__
    text = said(["train", "--out", out, "--resume", "--iterations", 3, "--plugin", path], capsys)
    assert "ALGORITHMS must be of classes named apart, got 'two classes FlowGRPO'" in text
    assert len(read_rows(out / "metrics.jsonl")) == 2


def test_classes_need_no_docstring(tmp_path, capsys):
    path = tmp_path / "mine.py"
    path.write_text(
        "from neighbor_grpo.rivals.catalogue import ALGORITHMS\nclass Silent: pass\nALGORITHMS['quiet'] = Silent"
    )
    assert main(["train", "toy", "--help", "--plugin", str(path)]) == 0
    assert "\n  quiet " in capsys.readouterr().out


def test_one_class_may_have_two_names(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text("from neighbor_grpo.rivals.catalogue import ALGORITHMS\nALGORITHMS['again'] = ALGORITHMS['flow']")
    plugins.load_plugin(path)
    assert ALGORITHMS["again"] is FlowGRPO


def test_an_installed_package_takes_no_name_either(monkeypatch):
    class Point:
        name, value = "mine", "mine.module"

        def load(self):
            ALGORITHMS["flow"] = ALGORITHMS["dance"]

    monkeypatch.setattr(plugins, "entry_points", lambda group: [Point()])
    with pytest.raises(ValueError, match=r"plugin mine \(mine.module\) cannot be imported: .* got 'another flow'"):
        plugins.load_installed.__wrapped__()
    assert ALGORITHMS["flow"] is FlowGRPO
