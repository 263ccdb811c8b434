"""`--with`: ideas of other papers around an algorithm, from the command line, recipes, studies and run folders."""

import json

import pytest

from neighbor_grpo.cli import main, read_command, read_recipe, read_variant
from neighbor_grpo.rivals.catalogue import ALGORITHMS, MODIFIERS, make, modified

TOY = "toy --pretrain_steps 5 --eval_samples 50 --groups 2 --quiet"


def algorithm_of(line):
    return read_command(line.split())[1][1]


@pytest.mark.parametrize(
    "names", ["guard chunks", "chunks guard", "chunks,guard", "guard,chunks", "guard", "chunks", ""]
)
def test_modifiers_stand_around_the_algorithm_in_one_order(names):
    given = names.replace(",", " ").split()
    chunk = dict(chunk=3) if "chunks" in given else {}
    line = f"toy --algorithm flow --with {names}" + "".join(f" --{key} {value}" for key, value in chunk.items())
    assert algorithm_of(line) == modified(ALGORITHMS["flow"](), *given, **chunk)


@pytest.mark.parametrize("name", MODIFIERS)
def test_each_has_the_defaults_of_its_class(name):
    algorithm = "op" if name == "replay" else "flow"
    line = f"toy --algorithm {algorithm} --trained_steps 4 --with {name}"
    assert algorithm_of(line) == MODIFIERS[name](ALGORITHMS[algorithm](trained_steps=4))


def test_what_an_algorithm_brings_along_is_replaced_by_what_is_said():
    assert algorithm_of("toy --algorithm op") == make("op")
    assert algorithm_of("toy --algorithm op --replay 1 --chunk 1") == make("op", replay=1, chunk=1)
    assert algorithm_of("toy --algorithm op --with chunks") == modified(ALGORITHMS["op"](), "chunks", chunk=0)
    assert algorithm_of("toy --algorithm op --with") == ALGORITHMS["op"]()


@pytest.mark.parametrize(
    ("line", "parts"),
    [
        ("train toy --with glasses", ["--with must be some of", "guard", "'glasses'"]),
        ("train toy --with guard guard", ["--with must be some of", "each once"]),
        ("train toy --chunk 2", ["--chunk", "did you mean --with chunks --chunk?"]),
        ("train toy --with chunks --chunk 3", ["chunk must be 0, or a divisor of 4", "got 3"]),
        ("train toy --algorithm nft --with guard", ["GuardedRatios", "DiffusionNFT"]),
        ("train toy --algorithm flow --with previews --scouts 3", ["scouts", "got 3"]),
    ],
)
def test_wrong_calls_end_in_one_line(line, parts, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(line.split()) == 1
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1 and all(part in error for part in parts), error
    assert not list(tmp_path.iterdir())


def test_help_shows_the_settings_of_the_modifiers_that_are_named(capsys):
    shown = {}
    for names in ("", "chunks", "slas previews"):
        assert main(["train", "toy", "--with", *names.split(), "--help"]) == 0
        shown[names] = capsys.readouterr().out
        assert all(f"\n  {name} " in shown[names] for name in MODIFIERS)
    assert "--chunk " not in shown[""] and "default: []" not in shown[""]
    assert "--chunk " in shown["chunks"] and "(default: chunks)" in shown["chunks"]
    for option in ("--advantage_power", "--advantage_scale", "--scouts", "--scout_steps"):
        assert option in shown["slas previews"] and option not in shown["chunks"]


@pytest.mark.parametrize("value", ["guard chunks", "[chunks, guard]"])
def test_a_recipe_names_them(value, tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(f"task: toy\nalgorithm: dance\nwith: {value}\nchunk: 7\n")
    assert read_recipe(str(path))["with"] == ["guard", "chunks"]
    wanted = modified(ALGORITHMS["dance"](), "guard", "chunks", chunk=7)
    assert algorithm_of(f"--recipe {path}") == wanted
    assert algorithm_of(f"--recipe {path} --with chunks") == modified(ALGORITHMS["dance"](), "chunks", chunk=7)


@pytest.mark.parametrize("text", ["with: [glasses]", "with: 3", "with: null", "with: {guard: true}", "chunk: 2"])
def test_a_recipe_is_refused_by_name(text, tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(f"task: toy\n{text}\n")
    with pytest.raises(ValueError, match="--recipe"):
        read_recipe(str(path))


def test_a_variant_of_a_study_names_them():
    variant, _ = read_variant("toy", "evened: mix --with weights --trained_steps 1", common="--lr 0.001")
    assert variant.algorithm == modified(ALGORITHMS["mix"](trained_steps=1), "weights")
    assert variant.settings.lr == 0.001


def test_a_run_remembers_them(tmp_path, capsys):
    "Resumed, and as a recipe; another algorithm does not take them over."
    out = tmp_path / "run"
    line = f"train {TOY} --algorithm flow --with slas chunks --chunk 3 --out {out}"
    assert main([*line.split(), "--iterations", "1"]) == 0
    config = json.loads((out / "config.json").read_text())
    assert config["modifiers"] == {
        "chunks": {"chunk": 3},
        "slas": {"advantage_power": 0.5, "advantage_scale": "batch"},
    }
    wanted = modified(ALGORITHMS["flow"](), "slas", "chunks", chunk=3)
    assert algorithm_of(f"--recipe {out}/config.json") == wanted
    assert algorithm_of(f"--recipe {out}/config.json --algorithm dance") == ALGORITHMS["dance"]()
    assert main(["train", "--out", str(out), "--resume", "--iterations", "2", "--quiet"]) == 0
    assert main(["evaluate", str(out)]) == 0
    capsys.readouterr()
    for other in (["--with", "chunks"], ["--chunk", "9"], ["--with"]):
        assert main(["train", "--out", str(out), "--resume", "--quiet", *other]) == 1
        assert str(out) in capsys.readouterr().err
