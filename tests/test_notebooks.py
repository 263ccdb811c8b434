"""Every notebook runs from top to bottom in a process of its own."""

import multiprocessing
import shutil
from pathlib import Path

import page
import pytest

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted((ROOT / "nbs").glob("*.ipynb"))
# Evidence that the library does not rest on, and what test_miniature.py and test_accelerate.py guard as well.
SLOW = {"13b_gradients", "16a_miniature", "16b_stability", "17b_distributed"}
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
    copy = folder / "nbs"
    copy.mkdir()
    for path in (ROOT / "nbs").iterdir():
        if path.is_dir() and path.name[0] not in "._":
            shutil.copytree(path, copy / path.name)
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


def test_there_are_notebooks():
    assert SLOW < {path.stem for path in NOTEBOOKS}


PAGES = [pytest.param(path, id=path.stem, marks=[pytest.mark.slow] * (path.stem in SLOW)) for path in NOTEBOOKS]


@pytest.mark.parametrize("notebook", PAGES)
def test_notebook(server, notebook, tmp_path):
    failed = run_notebook(server, notebook, tmp_path)
    if failed:
        pytest.fail(failed, pytrace=False)


def test_a_broken_page_says_where(server, tmp_path):
    "The cell's number, its source, the line, the error."
    import nbformat

    book = nbformat.read(ROOT / "nbs" / "03_grpo.ipynb", 4)
    broken = "def half(x):\n    assert x % 2 == 0, f'{x} is odd'\n    return x // 2\n\nhalf(3)"
    book.cells = [*book.cells[:2], nbformat.v4.new_code_cell(broken)]
    nbformat.write(book, tmp_path / "03_broken.ipynb")
    folder = tmp_path / "place"
    folder.mkdir()
    failed = run_notebook(server, tmp_path / "03_broken.ipynb", folder)
    head, *rest = failed.splitlines()
    assert head == "03_broken.ipynb, cell 2, line 5: AssertionError: 3 is odd"
    assert "   5  half(3)" in rest and any("line 2, in half" in line for line in rest)
    assert "execnb" not in failed and "site-packages" not in failed
