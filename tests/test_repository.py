"""The repository keeps its promises: what is generated is in sync, what is written is clean, what is shown is sound."""

import ast
import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

import pages

ROOT = Path(__file__).resolve().parent.parent
LIBRARY = ROOT / "neighbor_grpo"
NOTEBOOKS = pages.notebooks(ROOT / "nbs")
MODULES = sorted(path for path in LIBRARY.rglob("*.py") if not path.stem.startswith("_"))

# Modules of the larger rungs, which are imported only when they are asked for, and may need what extras install.
LARGE = {"lab.cost", "models.flux", "models.flux2", "models.miniature", "models.pipeline", "models.qwen", "models.sana"}
LARGE |= {"models.sd3", "models.wan", "models.zimage", "rewards.judges"}
LARGE |= {"lab.fewstep", "lab.share", "rewards.remote", "runs.processes", "runs.tracking", "tasks.images"}
NOTEBOOK = {"figures"}  # for pages: its functions need what the extra `notebooks` installs
QUANTIZED = {"models.pipeline", "runs.trainer"}
# What takes seconds to import, or what a plain install does not bring: the other modules must not even try.
FORBIDDEN = (
    "diffusers transformers peft accelerate torchvision torchaudio sentencepiece ftfy open_clip hpsv2 "
    "nbdev fastcore execnb IPython ipywidgets matplotlib_inline pytest hypothesis"
).split()
DISTRIBUTIONS = {"PIL": "pillow", "huggingface_hub": "huggingface-hub", "sklearn": "scikit-learn", "yaml": "pyyaml"}
DISTRIBUTIONS |= {"matplotlib_inline": "matplotlib-inline"}
MAX_FUNCTION = 40  # lines of code in a function
MAX_LIBRARY = 10_953  # lines of code of at most 92 columns, without docstrings and comments


def run(*command, cwd=ROOT, **environment):
    "Run a command; fail with everything it printed if it fails."
    inherited = {name: value for name, value in os.environ.items() if name != "IN_TEST"}
    process = subprocess.run(command, cwd=cwd, env={**inherited, **environment}, capture_output=True, text=True)
    assert process.returncode == 0, f"{' '.join(map(str, command))}\n{process.stdout}\n{process.stderr}"
    return process.stdout


def dotted(path):
    "The name of a module in the library."
    return ".".join(path.relative_to(LIBRARY).with_suffix("").parts)


def copy_of_checkout(folder):
    "The parts of the checkout that nbdev reads, so that it writes nothing into the original."
    ignored = shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints")
    for name in ("nbs", "neighbor_grpo"):
        shutil.copytree(ROOT / name, folder / name, symlinks=True, ignore=ignored)
    for name in ("settings.ini", "_quarto.yml", "README.md"):
        shutil.copy(ROOT / name, folder)
    for name in ("LICENSE", "CONTRIBUTING.md", "CHANGELOG.md"):  # pages link to them
        shutil.copy(ROOT / name, folder)
    return folder


def tracked_text():
    "Path and text of everything a reader of the repository can see."
    try:
        listed = run("git", "ls-files", "--cached", "--others", "--exclude-standard").splitlines()
    except (AssertionError, FileNotFoundError):  # an unpacked archive has no history
        listed = [path.relative_to(ROOT).as_posix() for path in ROOT.rglob("*") if path.is_file()]
        listed = [path for path in listed if not re.search(r"(^|/)(node_modules|_proc|\.[^/]+|[^/]+\.egg-info)/", path)]
    for name in listed:
        path = ROOT / name
        if path.is_file() and path.suffix not in (".png", ".webp", ".jpg", ".gif", ".pyc", ".safetensors"):
            yield name, path.read_text(encoding="utf-8")


# --- generated files ---


def export(folder):
    "The library as the notebooks export it now."
    copy_of_checkout(folder)
    for path in (folder / "neighbor_grpo").rglob("*.py"):
        if path.stem not in ("__init__", "_moved"):  # these are written by hand
            path.unlink()
    run(sys.executable, "-c", "from nbdev.doclinks import nbdev_export; nbdev_export.__wrapped__()", cwd=folder)
    return folder / "neighbor_grpo"


def test_modules_are_what_the_notebooks_export(tmp_path):
    exported = export(tmp_path)
    wanted = {path.relative_to(exported).as_posix(): path.read_bytes() for path in exported.rglob("*.py")}
    present = {path.relative_to(LIBRARY).as_posix(): path.read_bytes() for path in LIBRARY.rglob("*.py")}
    assert sorted(present) == sorted(wanted), "modules without notebook, or not exported: run nbdev_export"
    stale = sorted(name for name in wanted if present[name] != wanted[name])
    assert not stale, f"run nbdev_export, these differ from their notebooks: {stale}"


@pytest.mark.parametrize("notebook", NOTEBOOKS)
def test_notebook_is_clean(notebook):
    from execnb.nbio import nb2str
    from nbdev.clean import clean_nb

    written = (ROOT / "nbs" / notebook).read_text(encoding="utf-8")
    cells = json.loads(written)
    clean_nb(cells, clean_ids=True)
    assert nb2str(cells) == written, f"run nbdev_clean --fname nbs/{notebook}"


def test_readme_is_the_landing_page():
    import make_readme

    assert make_readme.outdated(ROOT) == [], "run python tools/make_readme.py"


def test_readme_shows_the_two_commands():
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    assert "pip install -e . && neighbor-grpo train" in lines
    assert "pip install -e '.[dev]' && pytest" in lines


def test_quarto_configuration_is_shared():
    assert (ROOT / "nbs" / "_quarto.yml").resolve() == ROOT / "_quarto.yml"


def test_version_is_the_same_everywhere():
    import neighbor_grpo

    version = pages.settings(ROOT)["version"]
    assert neighbor_grpo.__version__ == version
    assert f"## {version}" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


# --- what is installed ---

BUILD = "import sys; from setuptools import build_meta as b; out = sys.argv[1]; b.build_wheel(out); b.build_sdist(out)"


@pytest.fixture(scope="module")
def archives(tmp_path_factory):
    "The files of a wheel and of a source archive, built without a network from a copy of the checkout."
    pytest.importorskip("setuptools", "70.1")  # older ones cannot build wheels alone
    folder = tmp_path_factory.mktemp("build")
    ignored = shutil.ignore_patterns("__pycache__", "*.egg-info")
    for name in ("neighbor_grpo", "tests"):
        shutil.copytree(ROOT / name, folder / "copy" / name, ignore=ignored)
    for name in ("setup.py", "settings.ini", "MANIFEST.in", "README.md", "LICENSE", "CHANGELOG.md"):
        shutil.copy(ROOT / name, folder / "copy")
    run(sys.executable, "-c", BUILD, str(folder), cwd=folder / "copy")
    with zipfile.ZipFile(next(folder.glob("*.whl"))) as wheel, tarfile.open(next(folder.glob("*.tar.gz"))) as source:
        inside = {name.partition("/")[2] for name in source.getnames()}
        return {"wheel": set(wheel.namelist()), "sdist": inside}


@pytest.mark.parametrize("kind", ["wheel", "sdist"])
def test_archives_carry_the_library_and_its_data(kind, archives):
    files = [path for path in LIBRARY.rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    missing = {path.relative_to(ROOT).as_posix() for path in files} - archives[kind]
    assert not missing
    assert kind != "sdist" or {"settings.ini", "setup.py", "LICENSE"} <= archives[kind]
    if kind == "wheel":
        assert all(re.match(r"neighbor_grpo(-[\w.]+\.dist-info)?/", name) for name in archives[kind])


def test_pretrained_weights_are_small_and_of_a_safe_kind():
    files = [path for path in (LIBRARY / "pretrained").rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 16_000_000
    assert {path.suffix for path in files} <= {".safetensors", ".json", ".jsonl", ".md", ".txt", ".model"}


# --- documentation ---


def test_documentation(tmp_path):
    folder = copy_of_checkout(tmp_path)
    report = folder / "findings.json"
    command = [sys.executable, str(ROOT / "tools" / "lint_docs.py"), "--root", str(folder), "--json", str(report)]
    process = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert report.exists(), f"staging the documentation failed:\n{process.stdout}\n{process.stderr}"
    assert json.loads(report.read_text(encoding="utf-8")) == [], f"\n{process.stdout}"
    rewritten = (folder / "nbs" / "nbdev.yml").read_bytes()
    assert rewritten == (ROOT / "nbs" / "nbdev.yml").read_bytes(), "settings.ini changed: run python tools/lint_docs.py"


def test_equations_were_checked():
    if pages.katex_missing():
        (pytest.fail if os.environ.get("CI") else pytest.skip)(pages.katex_missing())


# --- code ---


def test_ruff():
    run(sys.executable, "-m", "ruff", "check", "--no-cache", "setup.py", "tests", "tools", "nbs")


def test_types(tmp_path):
    run(sys.executable, "-m", "mypy", "--config-file", str(ROOT / "mypy.ini"), "--cache-dir", str(tmp_path))


def test_ruff_format():
    run(sys.executable, "-m", "ruff", "format", "--no-cache", "--check", "setup.py", "tests", "tools")


def functions(path):
    "All functions and methods of a module: `(qualified name, node)`."

    def walk(node, prefix):
        for child in ast.iter_child_nodes(node):
            named = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)
            name = f"{prefix}{child.name}" if named else prefix
            if named and not isinstance(child, ast.ClassDef):
                yield name, child
            yield from walk(child, f"{name}." if named else prefix)

    return walk(ast.parse(path.read_text(encoding="utf-8")), f"{path.stem}.")


def code_lines(source, first=1, last=None, docstrings=()):
    "The numbers of the lines that hold code: neither blank, nor a comment, nor in a docstring."
    lines = source.splitlines()
    documented = {number for node in docstrings for number in range(node.lineno, node.end_lineno + 1)}
    numbers = range(first, (last or len(lines)) + 1)
    return [
        n for n in numbers if n not in documented and lines[n - 1].strip() and not lines[n - 1].strip().startswith("#")
    ]


def docstrings(tree):
    "All docstrings and other bare strings, such as those under the fields of a dataclass."
    return [n for n in ast.walk(tree) if isinstance(n, ast.Expr) and isinstance(getattr(n.value, "value", None), str)]


def library_size():
    "Lines of code by module."
    sources = {dotted(path): path.read_text(encoding="utf-8") for path in MODULES}
    return {name: len(code_lines(source, docstrings=docstrings(ast.parse(source)))) for name, source in sources.items()}


@pytest.mark.parametrize("path", MODULES, ids=dotted)
def test_functions_are_short(path):
    source = path.read_text(encoding="utf-8")
    lengths = {
        name: len(code_lines(source, node.lineno, node.end_lineno, docstrings(node))) for name, node in functions(path)
    }
    long = {name: length for name, length in lengths.items() if length > MAX_FUNCTION}
    assert not long, f"functions of more than {MAX_FUNCTION} lines: {long}"


def test_library_does_not_grow_unseen():
    "How the method alone reads is a test of the house."
    sizes = library_size()
    print(*(f"{name:20}{lines:6}" for name, lines in sizes.items()), sep="\n")
    assert sum(sizes.values()) <= MAX_LIBRARY, sizes


BLOCK = """
import importlib, sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {forbidden!r}:
            raise ImportError(f"{{name}} is for the larger rungs")

sys.meta_path.insert(0, Blocker())
for module in {modules!r}:
    importlib.import_module(module)
"""


def test_library_imports_quickly(tmp_path):
    modules = ["neighbor_grpo", *(f"neighbor_grpo.{name}" for name in map(dotted, MODULES) if name not in LARGE)]
    script = BLOCK.format(forbidden=FORBIDDEN, modules=modules)
    run(sys.executable, "-c", script, cwd=tmp_path, PYTHONPATH=str(ROOT))


def imported(path):
    "The top-level names of everything that a module imports, wherever in the file."
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names.add(node.module.partition(".")[0])
    return names - set(sys.stdlib_module_names) - {"neighbor_grpo"}


def own_imports(path):
    "The modules of this library that a module imports at its top."
    package = ["neighbor_grpo", *path.relative_to(LIBRARY).parent.parts]
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ImportFrom) and node.level:
            base = [*package[1 : len(package) - node.level + 1], *filter(None, [node.module])]
            yield from (".".join(base + more) for more in ([], *([alias.name] for alias in node.names)))


def test_modules_import_only_what_earlier_pages_export():
    "In the order of the sidebar."
    books = [pages.read_notebook(ROOT / "nbs" / name) for name in pages.reading_order()]
    exports = [re.findall(r"^#\| default_exp (\S+)", cell["source"]) for book in books for cell in book["cells"]]
    order = [name for names in exports for name in names]
    assert sorted(order) == sorted(map(dotted, MODULES))
    for path in MODULES:
        earlier = order[: order.index(dotted(path))]
        later = [name for name in own_imports(path) if name not in earlier and name in order]
        assert not later, f"{dotted(path)} imports {later}, whose pages come later"


def requirement_names(text):
    return {re.match(r"[\w.-]+", requirement).group(0).lower() for requirement in text.split()}


@pytest.mark.parametrize("path", MODULES, ids=dotted)
def test_imports_are_declared(path):
    settings = pages.settings(ROOT)
    declared = requirement_names(settings["requirements"])
    if dotted(path) in LARGE:
        declared |= requirement_names(" ".join(settings[f"extra_{name}"] for name in ("sd3", "rewards")))
    if dotted(path) == "rewards.ocr":
        declared |= requirement_names(settings["extra_ocr"])
    if dotted(path) == "lab.search":
        declared |= requirement_names(settings["extra_search"])
    if dotted(path) in QUANTIZED:
        declared |= requirement_names(settings["extra_quantized"])
    if dotted(path) in NOTEBOOK:
        declared |= requirement_names(settings["extra_notebooks"])
    undeclared = {DISTRIBUTIONS.get(name, name).lower() for name in imported(path)} - declared
    assert not undeclared, f"{path.name} imports what settings.ini does not require: {undeclared}"


def test_nothing_requires_torchvision():
    assert not [value for value in pages.settings(ROOT).values() if re.search(r"(?<!never )\btorchvision\b", value)]
    assert "torchvision" not in {distribution.name for distribution in importlib.metadata.distributions()}


# --- what a reader sees ---


def test_no_traces_of_a_machine():
    # Pieced together, so that this file is not its own finding.
    folders = "|".join(["work", "tmp", "root", "home/[a-z]", "Users/[A-Za-z]"])
    trace = re.compile(rf"(?<![\w.}})])/({folders})\b/?[\w.-]*|\b(localhost|127\.0\.0\.1):\d+")
    found = [
        f"{name}:{number}: {match.group(0)}"
        for name, content in tracked_text()
        for number, line in enumerate(content.splitlines(), 1)
        for match in trace.finditer(line)
    ]
    assert not found, "\n" + "\n".join(found)
