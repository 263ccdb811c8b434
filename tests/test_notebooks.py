"""Every notebook runs from top to bottom in a process of its own."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted((ROOT / "nbs").glob("*.ipynb"))
LIMIT = 600  # seconds; pages are written to take one minute at most, a busy machine may take longer

RUN = """
import sys
from pathlib import Path
from nbdev.config import get_config
from nbdev.test import test_nb

passed, seconds = test_nb(Path(sys.argv[1]), skip_flags=get_config().tst_flags.split())
sys.exit(0 if passed else 1)
"""


def workplace(notebook, folder):
    "A copy of the notebook beside the files that pages refer to, so that what it writes stays out of the checkout."
    shutil.copy(ROOT / "settings.ini", folder)
    pages = folder / "nbs"
    pages.mkdir()
    for path in (ROOT / "nbs").iterdir():
        if path.is_dir() and path.name[0] not in "._":
            shutil.copytree(path, pages / path.name)
    return shutil.copy(notebook, pages)


def run_notebook(notebook, folder):
    "Run a notebook in a fresh process; its exit status and everything it printed."
    search = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "MPLBACKEND": "agg", "PYTHONPATH": search}
    copy = workplace(notebook, folder)
    command = [sys.executable, "-c", RUN, str(copy)]
    process = subprocess.run(
        command, cwd=Path(copy).parent, env=environment, capture_output=True, text=True, timeout=LIMIT
    )
    return process.returncode, process.stdout + process.stderr


def test_there_are_notebooks():
    assert NOTEBOOKS


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook(notebook, tmp_path):
    status, printed = run_notebook(notebook, tmp_path)
    assert status == 0, f"{notebook.name} failed:\n{printed}"
