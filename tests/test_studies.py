"""A default that moves must not change what a committed study asks.

`python tests/test_studies.py` writes `studies.json` anew, for studies that are new or meant to change.
"""

import json
from dataclasses import fields
from pathlib import Path

import pytest

from neighbor_grpo.cli import compare, read_study, search
from neighbor_grpo.rivals.catalogue import modifiers_of
from neighbor_grpo.rivals.modifiers import base

ROOT = Path(__file__).resolve().parent.parent
FILE = Path(__file__).with_name("studies.json")
STUDIES = sorted(p for name in ("study", "search") for p in (ROOT / "nbs/results").rglob(f"{name}.yaml"))


def changed(settings):
    "Values other than their class's defaults."
    plain = {f.name: f.default for f in fields(settings)}
    return {name: value for name, value in vars(settings).items() if name in plain and value != plain[name]}


def resolved(path, out):
    "What each variant of a study trains with."
    command = search if path.stem == "search" else compare
    study, _ = read_study(["--study", str(path), "--out", str(out)], command)
    return {
        side.name: {
            "algorithm": type(base(side.algorithm)).__name__,
            **changed(base(side.algorithm)),
            **modifiers_of(side.algorithm),
            **changed(side.settings),
        }
        for side in study.variants
    }


def record(out):
    "All studies by their place."
    return {path.relative_to(ROOT).as_posix(): resolved(path, out) for path in STUDIES}


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.relative_to(ROOT / "nbs/results").as_posix())
def test_a_study_asks_what_it_asked(path, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)  # where its recipes are named from
    recorded = json.loads(FILE.read_text())
    assert json.loads(json.dumps(resolved(path, tmp_path / "new"))) == recorded[path.relative_to(ROOT).as_posix()]


if __name__ == "__main__":
    FILE.write_text(json.dumps(record(ROOT / "new"), indent=1) + "\n")
