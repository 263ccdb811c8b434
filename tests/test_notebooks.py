"""Every notebook runs from top to bottom in a process of its own."""

import multiprocessing
import shutil
from pathlib import Path

import page
import pytest

import pages

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = [ROOT / "nbs" / name for name in pages.notebooks(ROOT / "nbs")]
# Pages that take ten seconds or more, teach nothing that the core rests on, and whose modules have tests of their own.
SLOW = {
    "help/own",
    "lab/benchmark",
    "lab/compare",
    "lab/cost",
    "lab/gradients",
    "lab/stability",
    "models/miniature",
    "rivals/forward",
    "rivals/mixed",
    "rivals/pairs",
    "rivals/trajectories",
    "runs/processes",
    "tasks/images",
    "tasks/scenes",
}
LIMIT = 600  # seconds; pages are written to take one minute at most, a busy machine may take longer


@pytest.fixture(scope="session")
def server():
    "Processes that are forks of one in which the libraries have been imported, and nothing of the project."
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(page.LIBRARIES)
    return context


def workplace(notebook, folder):
    "A copy of the notebook beside the files that pages refer to, so that what it writes stays out of the checkout."
    shutil.copy(ROOT / "settings.ini", folder)
    for name in ("images", "results"):
        shutil.copytree(ROOT / "nbs" / name, folder / "nbs" / name)
    inside = notebook.is_relative_to(ROOT)
    copy = folder / (notebook.relative_to(ROOT) if inside else f"nbs/{notebook.name}")
    copy.parent.mkdir(exist_ok=True)
    return shutil.copy(notebook, copy)


def run_notebook(server, notebook, folder):
    "Run a notebook in a fresh process: where it failed with the traceback, or nothing."
    report, printed = folder / "report.txt", folder / "printed.txt"
    process = server.Process(target=page.serve, args=(workplace(notebook, folder), report, printed, ROOT))
    process.start()
    process.join(LIMIT)
    if process.is_alive():
        process.kill()
        return f"{notebook.name} was not done after {LIMIT} s"
    if process.exitcode or not report.exists():
        return f"{notebook.name}: its process ended with {process.exitcode}\n{printed.read_text()}"
    return report.read_text()


def name_of(notebook):
    "Its path in `nbs`: the name of its test."
    return notebook.relative_to(ROOT / "nbs").with_suffix("").as_posix()


def test_there_are_notebooks():
    assert SLOW < {name_of(path) for path in NOTEBOOKS}


NAMED = [(path, name_of(path)) for path in NOTEBOOKS]
PAGES = [pytest.param(path, id=name, marks=[pytest.mark.slow] * (name in SLOW)) for path, name in NAMED]


@pytest.mark.parametrize("notebook", PAGES)
def test_notebook(server, notebook, tmp_path):
    failed = run_notebook(server, notebook, tmp_path)
    if failed:
        pytest.fail(failed, pytrace=False)


def test_a_broken_page_says_where(server, tmp_path):
    "The cell's number, its source, the line, the error."
    import nbformat

    book = nbformat.read(ROOT / "nbs" / "grpo.ipynb", 4)
    broken = "def half(x):\n    assert x % 2 == 0, f'{x} is odd'\n    return x // 2\n\nhalf(3)"
    book.cells = [*book.cells[:2], nbformat.v4.new_code_cell(broken)]
    nbformat.write(book, tmp_path / "broken.ipynb")
    folder = tmp_path / "place"
    folder.mkdir()
    failed = run_notebook(server, tmp_path / "broken.ipynb", folder)
    head, *rest = failed.splitlines()
    assert head == "broken.ipynb, cell 2, line 5: AssertionError: 3 is odd"
    assert "   5  half(3)" in rest and any("line 2, in half" in line for line in rest)
    assert "execnb" not in failed and "site-packages" not in failed
