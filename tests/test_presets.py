"""Where the settings of a run begin: what was found better, or an algorithm's paper."""

import itertools
import shlex
from pathlib import Path

import pytest

from neighbor_grpo.cli import FOUND, TASKS, command_of, defaults_of, read_command, read_variant, recipes
from neighbor_grpo.lab.compare import read_csv
from neighbor_grpo.lab.share import shareable
from neighbor_grpo.neighbor import NeighborGRPO
from neighbor_grpo.penalties import forward_equivalents
from neighbor_grpo.rivals.catalogue import ALGORITHMS
from neighbor_grpo.runs.plugins import GIVEN, give_plugins
from neighbor_grpo.runs.trainer import run_config
from neighbor_grpo.training import TrainSettings

NBS = Path(__file__).parents[1] / "nbs"


def of_algorithm(*words):
    "The algorithm that a command line asks for."
    return read_command(words)[1][1]


@pytest.mark.parametrize("task", ["digits", "scenes", "toy", "sd3", "flux"])
def test_the_papers_settings_are_the_dataclass_s(task):
    paper = of_algorithm(task, "--preset", "paper")
    assert paper == NeighborGRPO(shift=paper.shift)  # None with a pipeline: its own
    assert (of_algorithm(task) == paper) == ((task, "neighbor") not in FOUND)


def test_the_command_line_overrides_both():
    for preset in ("found", "paper"):
        assert of_algorithm("digits", "--preset", preset, "--steps", "5").steps == 5


def test_rivals_have_their_papers_settings_either_way():
    for task, algorithm in itertools.product(TASKS, ALGORITHMS.keys() - {"neighbor"}):
        assert defaults_of(task, algorithm) == defaults_of(task, algorithm, preset="paper")


@pytest.mark.parametrize("recipe", sorted(recipes()))
def test_a_recipe_for_a_large_model_costs_at_most_three_fifths_of_the_papers_settings(recipe):
    found, paper = (of_algorithm("--recipe", recipe, "--preset", preset) for preset in ("found", "paper"))
    assert forward_equivalents(paper) == 12
    if recipe == "flux-paper":  # says all of its settings itself
        assert found == paper
    else:
        assert forward_equivalents(found) <= 0.6 * 12


def test_a_comparison_may_have_both():
    sides = [read_variant("digits", line)[0] for line in ("neighbor", "neighbor --preset paper")]
    assert sides[0].algorithm != sides[1].algorithm == NeighborGRPO()
    common = read_variant("digits", "neighbor", "--preset paper")[0]
    assert common.algorithm == NeighborGRPO() and common.settings == TrainSettings(
        iterations=common.settings.iterations, lr=2e-4, kl_weight=0.02, ema=0.9
    )


def test_another_name_is_refused():
    with pytest.raises(ValueError, match="--preset.*pepper.*found.*paper"):
        read_command(["digits", "--preset", "pepper"])


def test_the_page_tells_what_the_papers_settings_cost_on_digits():
    "The figure beside the defaults, from the committed curves of both presets."
    first = {}
    for row in read_csv(NBS / "results/presets/curves.csv"):
        good = row["reward"] >= 0.95 and row["frechet"] <= 15 and row["diversity"] >= 0.7
        if good:
            first.setdefault((row["variant"], row["seed"]), row["evaluations"])
    both = [seed for side, seed in first if side == "paper" and ("found", seed) in first]
    found, paper = (sum(first[side, seed] for seed in both) for side in ("found", "paper"))
    assert len(both) == 3
    assert f"cost {paper / found:.1f} times as much" in (NBS / "launch.ipynb").read_text(encoding="utf-8")


def config_of(line):
    "What a run of a command line remembers."
    task, (task_settings, algorithm, settings), _ = read_command(shlex.split(line))
    return run_config(algorithm, settings, task_name=task, task=vars(task_settings))


@pytest.mark.parametrize(
    "line",
    [
        "images --source miniature",
        "images --source miniature --guidance_scale 1 --train_guidance_scale 1",  # not the family's
        "digits --algorithm op",
        "digits --algorithm op --trained_steps 4 --chunk 2",  # not as it is brought along
        "toy --shift null",
        "digits --preset paper",
    ],
)
def test_a_run_s_command_line_makes_it_again(line):
    config = config_of(line)
    *_, task = words = shlex.split(command_of(config))[:3]
    assert words[:2] == ["neighbor-grpo", "train"] and line.startswith(task)
    assert config_of(shlex.join(shlex.split(command_of(config))[2:])) == config


def test_a_command_line_that_is_shown_names_no_folder(tmp_path):
    (tmp_path / "bright.py").write_text("def bright(image, prompt): return 0.0")
    config = config_of(f"images --source miniature --rewards {tmp_path}/bright.py:bright")
    give_plugins([tmp_path / "bright.py"])
    try:
        shown = command_of(config, shareable)
    finally:
        GIVEN.clear()
    assert "bright.py:bright" in shown and str(tmp_path) not in shown
