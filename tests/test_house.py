"""The plan of the house: short lines, short functions, a method that reads in an hour, calls that never climb."""

import ast
import statistics
import sys
from pathlib import Path

import pytest
import torch
from test_repository import LIBRARY, MODULES, code_lines, docstrings, functions

import pages
from neighbor_grpo.neighbor import NeighborGRPO
from neighbor_grpo.toyflows import VelocityMLP
from neighbor_grpo.training import Run, Task, TrainSettings, iterate

METHOD = "flow solvers grpo neighbors leaping anchors reweighting rollouts neighbor training".split()
MAX_LINE, MAX_FUNCTION, MAX_METHOD = 100, 30, 999
ROOT = LIBRARY.parent


def lines_of(path):
    "Lines of code that people wrote: without marks of cells and names, which nbdev writes, and without texts."
    source = path.read_text(encoding="utf-8")
    names = [
        range(node.lineno, node.end_lineno + 1)
        for node in ast.parse(source).body
        if isinstance(node, ast.Assign)
        and (ast.unparse(node.targets[0]) == "__all__" or isinstance(node.value, ast.Constant))
    ]
    for number, line in enumerate(source.splitlines(), 1):
        if not line.startswith("# %% ") and not any(number in span for span in names):
            yield number, line


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.relative_to(LIBRARY).as_posix())
def test_lines_are_short(path):
    long = [f"{path.name}:{number}: {line}" for number, line in lines_of(path) if len(line) > MAX_LINE]
    assert not long, "\n" + "\n".join(long)


def lengths(path):
    "Lines of code of each function."
    source = path.read_text(encoding="utf-8")
    return {
        name: len(code_lines(source, node.lineno, node.end_lineno, docstrings(node))) for name, node in functions(path)
    }


def test_the_method_reads_in_an_hour():
    paths = [LIBRARY / f"{name}.py" for name in METHOD]
    sources = [path.read_text(encoding="utf-8") for path in paths]
    size = sum(len(code_lines(source, docstrings=docstrings(ast.parse(source)))) for source in sources)
    sizes = {name: length for path in paths for name, length in lengths(path).items()}
    assert size <= MAX_METHOD
    assert statistics.median(sizes.values()) <= 8
    assert max(sizes.values()) <= MAX_FUNCTION, max(sizes, key=sizes.get)


def test_nothing_asks_what_something_can_do():
    "`hasattr` is left for what a platform has, and for tensors that are split."
    platform = ("full_tensor", "hasattr(signal", "hasattr(torch")
    found = [
        f"{path.name}:{number}: {line.strip()}"
        for path in MODULES
        for number, line in lines_of(path)
        if "hasattr(" in line and not any(word in line for word in platform)
    ]
    assert not found, "\n" + "\n".join(found)


class Flat(Task):
    shape, prompts = (2,), 1

    def __init__(self):
        torch.manual_seed(0)
        self.policy = VelocityMLP(2, 8, 1)

    def conditions(self, prompts):
        return None

    def reward(self, samples, prompts):
        return samples[:, 0]

    def evaluate(self, velocity):
        return dict(reward=0.0)


def test_an_iteration_never_climbs():
    "From the loop to the gradient, a call goes to the module itself or to one that stands before it."
    order = {Path(page).with_suffix("").as_posix(): n for n, page in enumerate(pages.reading_order(ROOT))}

    def place(frame):
        path = Path(frame.f_code.co_filename)
        name = path.relative_to(LIBRARY).with_suffix("").as_posix() if LIBRARY in path.parents else None
        return name if name in order else None

    climbs, seen = set(), set()

    def watch(frame, event, argument):
        if event != "call" or place(frame) is None:
            return
        above = frame.f_back
        while above is not None and place(above) is None:
            above = above.f_back
        if above is None:
            return
        low, high = place(frame), place(above)
        seen.add(low)
        if order[low] > order[high]:
            climbs.add(f"{high}.{above.f_code.co_name} -> {low}.{frame.f_code.co_name}")

    run = Run(Flat(), NeighborGRPO(), TrainSettings(groups=2))
    sys.setprofile(watch)
    try:
        iterate(run)
    finally:
        sys.setprofile(None)
    assert seen - {"toyflows"} == {*METHOD}  # the policy is a small flow
    assert not climbs
