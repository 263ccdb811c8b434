"""The method in one cell: the page's loop is the library's algorithm, and a reader meets it at once."""

import copy
import json
from pathlib import Path

import pytest
import torch

from neighbor_grpo.neighbor import NeighborGRPO
from neighbor_grpo.reweighting import quasi_norm
from neighbor_grpo.rollouts import States

PAGE = Path(__file__).parent.parent / "nbs" / "method.ipynb"
CELLS = [(cell["cell_type"], "".join(cell["source"])) for cell in json.loads(PAGE.read_text(encoding="utf-8"))["cells"]]


def source_of(start):
    "The code cell that defines a name."
    return next(source for kind, source in CELLS if kind == "code" and f"\n{start}" in f"\n{source}")


@pytest.fixture
def page():
    "The names of the cells that define the network and the method."
    names = {"torch": torch}
    exec("import math\nfrom statistics import NormalDist", names)
    exec(source_of("class Velocity").partition("\npretrained = ")[0], names)
    exec(source_of("def align"), names)
    return names


def recorded(monkeypatch, name):
    "What a function of torch returns from now on."
    function, answers = getattr(torch, name), []

    def record(*arguments, **options):
        answers.append(function(*arguments, **options))
        return answers[-1]

    monkeypatch.setattr(torch, name, record)
    return answers


@pytest.mark.parametrize("temperature", [1.0, 0.1])
def test_the_loop_is_the_algorithm(page, monkeypatch, temperature):
    "The same states and the same gradient from the page's loop and from the library's class."
    page["tau"] = temperature
    torch.manual_seed(1)
    network = page["Velocity"](16).double()
    torch.set_default_dtype(torch.float64)
    try:
        page["times"] = torch.linspace(1, 0, page["T"] + 1)
        before = copy.deepcopy(network)
        noises, draws = recorded(monkeypatch, "randn"), recorded(monkeypatch, "randperm")
        history = page["align"](network, page["reward"], iterations=1)
    finally:
        torch.set_default_dtype(torch.float32)
    groups, size, count = page["P"], page["G"], page["K"]
    (base, delta), (members, steps) = noises, draws
    algorithm = NeighborGRPO(size, page["sigma"], page["T"], method="ab2", temperature=temperature,
                             clip_range=page["clip_range"], p=page["p"])  # fmt: skip
    velocity = lambda x, t, cond: before(x, t[:, None])
    start = (1 - page["sigma"] ** 2) ** 0.5 * base + page["sigma"] * delta
    with torch.no_grad():
        rollout = algorithm.follow(velocity, start)
    # The class weighs a group of nearly equal rewards less; without that, its advantages have quasi-norm sqrt(G).
    advantages = quasi_norm(algorithm.advantages(page["reward"](rollout.samples)), page["p"])
    chosen = steps[:count].expand(groups, -1), members[: page["B"]].expand(groups, -1)
    states = States.product(*chosen, "cpu")
    (algorithm.loss(velocity, rollout, states, advantages) / len(states)).backward()
    assert history == [pytest.approx(page["reward"](rollout.samples).mean().item(), rel=1e-12)]
    for ours, theirs in zip(network.parameters(), before.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-8, atol=1e-12)


def test_equal_rewards_teach_nothing(page):
    torch.manual_seed(2)
    network = page["Velocity"](16)
    page["align"](network, lambda x: torch.ones(x.shape[:-1]), iterations=1)
    assert all(not weights.grad.any() for weights in network.parameters())


def test_the_method_is_short_and_early():
    lines = source_of("def align").partition("def align")[2].strip().splitlines()
    assert len(lines) <= 36
    prose, place = 0, next(n for n, (_, source) in enumerate(CELLS) if "def align" in source)
    for kind, source in CELLS[:place]:
        prose += len(source.split()) if kind == "markdown" else 0
    assert prose <= 500


def test_the_pictures_of_the_method_lie_beside_the_page():
    import PIL.Image

    moving = PAGE.parent / "images" / "method.webp"
    picture = PIL.Image.open(moving)
    assert picture.n_frames == 12 and picture.width >= 900 and moving.stat().st_size <= 600_000
    assert PIL.Image.open(PAGE.parent / "images" / "method.png").width >= 900
