"""Runs one page from top to bottom: `python tests/page.py nbs/flow.ipynb` prints the seconds of each cell."""

import os
import sys
import time
import traceback
from pathlib import Path

# What many pages import; a server imports it once, and each page runs in a fork of that server.
LIBRARIES = ["torch", "matplotlib.pyplot", "scipy.stats", "sklearn.datasets", "IPython.display", "execnb.shell"]
LIBRARIES += ["nbdev.process", "accelerate", "peft", "diffusers.pipelines.flux.pipeline_flux"]
LIBRARIES += ["diffusers.pipelines.stable_diffusion_3.pipeline_stable_diffusion_3"]


def code_cells(page):
    "Number and source of each cell that runs."
    from nbdev.config import get_config
    from nbdev.process import NBProcessor

    skipped = set(get_config().tst_flags.split())
    for number, cell in enumerate(NBProcessor(page, process=True).nb.cells):
        marks = getattr(cell, "directives_", None) or {}
        if cell.cell_type == "code" and marks.get("eval:") != ["false"] and not skipped & marks.keys():
            yield number, cell.source


def describe(page, number, source, error):
    "Where a page failed: one line to find it by, the cell, the traceback from the cell on."
    frames = list(traceback.extract_tb(error.__traceback__))
    inside = next((k for k, frame in enumerate(frames) if frame.filename.startswith("<ipython-input")), 0)
    lines = "".join(f"{n:4d}  {line}\n" for n, line in enumerate(source.splitlines(), 1))
    trace = "".join(traceback.format_list(frames[inside:]) + traceback.format_exception_only(error))
    place = f"{page.name}, cell {number}, line {frames[inside].lineno}"
    return f"{place}: {type(error).__name__}: {error}\n\n{lines}\n{trace}"


def run_page(page, cell_seconds=False):
    "Runs a page in its folder; where it failed, or nothing."
    from execnb.shell import CaptureShell

    page = Path(page).resolve()
    os.chdir(page.parent)
    os.environ["IN_TEST"] = "1"
    shell = CaptureShell(page, mpl_format="png")
    for number, source in code_cells(page):
        started, used = time.perf_counter(), time.process_time()
        shell.run(source)
        if cell_seconds:
            wall, cpu = time.perf_counter() - started, time.process_time() - used
            first = next((line for line in source.splitlines() if not line.startswith("#")), "")
            print(f"{number:4d} {wall:7.2f} s {cpu:7.2f} s  {first}", file=sys.__stdout__, flush=True)
        if shell.exc:
            return describe(page, number, source, shell.exc)
    return ""


def serve(page, report, printed, root):
    "Runs a page in a process of its own: what it prints goes to a file, where it failed to another."
    for stream in (1, 2):
        os.dup2(os.open(printed, os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream)
    sys.path.insert(0, str(root))
    os.environ |= {"MPLBACKEND": "agg", "PYTHONPATH": os.pathsep.join([str(root), os.environ.get("PYTHONPATH", "")])}
    Path(report).write_text(run_page(page))


if __name__ == "__main__":
    sys.exit(run_page(sys.argv[1], True) or 0)
