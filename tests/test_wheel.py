"""What is released works alone: the source archive builds the wheel, and the wheel runs with no checkout around it."""

import os
import shutil
import subprocess
import sys
import venv
from functools import partial
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parent.parent
SHORT = "--pretrain_steps 20 --iterations 2 --groups 2 --quiet"
SCENES = "--iterations 1 --groups 2 --eval_images 48 --quiet"
SENT = "setup.py settings.ini MANIFEST.in README.md LICENSE CHANGELOG.md neighbor_grpo tests".split()


def run(*command, cwd, **more):
    "What a command prints; neither the checkout nor a variable of this session leads it back to the checkout."
    left = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME", "IN_TEST")}
    command = [str(word) for word in command]
    done = subprocess.run(command, cwd=cwd, env={**left, **more}, capture_output=True, text=True)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    "A source archive, and the wheel that was built out of it."
    pytest.importorskip("build")
    folder = tmp_path_factory.mktemp("built")
    (folder / "copy").mkdir()
    for path in (ROOT / name for name in SENT):
        copy = partial(shutil.copytree, ignore=shutil.ignore_patterns("__pycache__")) if path.is_dir() else shutil.copy
        copy(path, folder / "copy" / path.name)
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", folder, folder / "copy", cwd=folder)
    shutil.rmtree(folder / "copy")
    return next(folder.glob("*.whl")), next(folder.glob("*.tar.gz"))


@pytest.fixture(scope="module")
def user(built, tmp_path_factory):
    "A fresh environment with the wheel; everything else that it sees is what is installed here already."
    folder = tmp_path_factory.mktemp("user")
    venv.create(folder, with_pip=True)
    programs = folder / ("Scripts" if os.name == "nt" else "bin")
    run(programs / "python", "-m", "pip", "install", "--no-deps", "--no-index", built[0], cwd=folder)
    # A path file adds folders, but not what their own path files add: an editable install stays out of sight.
    installed = [path for path in sys.path if Path(path).name in ("site-packages", "dist-packages")]
    own = run(programs / "python", "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=folder)
    (Path(own.strip()) / "theirs.pth").write_text("\n".join(installed) + "\n")
    return programs


def test_the_wheel_is_what_is_imported(user, tmp_path):
    asked = "import neighbor_grpo as n; from importlib.metadata import version; "
    asked += "print(n.__file__, n.__version__, version('neighbor_grpo'))"
    place, *versions = run(user / "python", "-c", asked, cwd=tmp_path).split()
    assert Path(place).is_relative_to(user.parent) and len({*versions}) == 1


def test_the_main_job_runs_from_the_wheel(user, tmp_path):
    printed = run(user / "neighbor-grpo", "train", *SHORT.split(), "--out", "digits", cwd=tmp_path)
    assert "before" in printed and "after" in printed
    assert {"config.json", "metrics.jsonl", "reward.png", "samples.png"} <= {
        path.name for path in (tmp_path / "digits").iterdir()
    }


def test_pretrained_weights_come_with_the_wheel(user, tmp_path):
    run(user / "neighbor-grpo", "train", "scenes", *SCENES.split(), "--out", "scenes", cwd=tmp_path)
    assert (tmp_path / "scenes" / "trained" / "model_index.json").is_file()


def test_prompts_and_recipes_come_with_the_wheel(user, tmp_path):
    asked = "from importlib.resources import files; from neighbor_grpo.cli import read_recipe, recipes; "
    asked += "[read_recipe(name) for name in recipes()]; package = files('neighbor_grpo'); "
    asked += "print(len(recipes()), (package / 'prompts' / 'train.txt').read_text().count(chr(10)))"
    names, prompts = map(int, run(user / "python", "-c", asked, cwd=tmp_path).split())
    assert names == len([*(ROOT / "neighbor_grpo" / "recipes").glob("*.yaml")]) > 0 and prompts > 10


@pytest.mark.parametrize("page", ["method", "help/commands"])
def test_a_page_runs_beside_the_wheel(user, page, tmp_path):
    "As for a reader who downloads one notebook."
    shutil.copy(ROOT / "settings.ini", tmp_path)  # says which cells a test leaves out
    (tmp_path / "nbs").mkdir()
    notebook = shutil.copy(ROOT / "nbs" / f"{page}.ipynb", tmp_path / "nbs")
    run(user / "python", ROOT / "tests" / "page.py", notebook, cwd=tmp_path, MPLBACKEND="agg")
