"""What staging adds to the pages that nbdev has staged: a way to run them, an index of the library, the version.

`lint_docs.stage` calls `finish`; what it writes stands in `_proc/` alone, and the notebooks stay as they are.

    python tools/staging.py            # puts the cell that installs the library on Colab into every notebook
"""

import ast
import hashlib
import json
import posixpath
import re
from pathlib import Path

import yaml

import pages as text

COLAB = "https://colab.research.google.com/github/{user}/{repo}/blob/{branch}/nbs/{name}"
LINK_ID = "open-in-colab"  # of the cell that holds the link
# What follows the title of a notebook, so that it runs on Colab, where only the notebook is at hand.
INSTALL = """#| hide
if "google.colab" in str(get_ipython()):  # elsewhere there is nothing to do
    get_ipython().system(
        "git clone --quiet --depth 1 {git_url} /content/{repo}"
        " && pip install --quiet /content/{repo}"
    )
    get_ipython().run_line_magic("cd", "/content/{repo}/{folder}")"""


def finish(root):
    "Complete what nbdev staged; doing it twice changes nothing."
    root = Path(root)
    config, staged = text.settings(root), root / "_proc"
    for name in text.notebooks(staged):
        path = staged / name
        notebook = json.loads(path.read_text(encoding="utf-8"))
        before = json.dumps(notebook)
        add_colab_link(notebook, name, config)
        plain_signatures(notebook)
        if name not in text.CORE:
            fold_sources(notebook)
        if json.dumps(notebook) != before:
            path.write_text(json.dumps(notebook, indent=1, ensure_ascii=False), encoding="utf-8")
    (staged / "api.qmd").write_text(api_index(root), encoding="utf-8")
    footer = {"left": f"{config['title']} {config['version']}", "right": f"[Changes]({changes(config)})"}
    version = {"website": {"page-footer": footer}}
    (staged / "version.yml").write_text(yaml.safe_dump(version, sort_keys=False), encoding="utf-8")


def changes(config):
    "Where the list of changes is."
    return f"{config['git_url']}/blob/{config['branch']}/CHANGELOG.md"


# --- the pages ---


def add_colab_link(notebook, name, config):
    "Put the link under the title of a staged page."
    if name == "index.ipynb" or any(cell.get("id") == LINK_ID for cell in notebook["cells"]):
        return
    target = COLAB.format(name=name, **{key: config[key] for key in ("user", "repo", "branch")})
    link = {"cell_type": "markdown", "id": LINK_ID, "metadata": {}, "source": f"[Open in Colab]({target}){{.colab}}"}
    place = next((k + 1 for k, cell in enumerate(notebook["cells"]) if cell["cell_type"] == "raw"), 0)
    notebook["cells"].insert(place, link)


def fold_sources(notebook):
    "Close the exported source of a staged page; the signature and its comments stay above it."
    for cell in notebook["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "code" and re.search(r"^#\|\s*code-fold:\s*show\s*$", source, re.MULTILINE):
            cell["source"] = re.sub(r"^#\|\s*code-fold:\s*show\s*$", "#| code-fold: true", source, flags=re.MULTILINE)


def plain_signatures(notebook):
    "Names in the comments behind parameters, which nbdev links, as plain code: a link in a block of code stays raw."
    for cell in notebook["cells"]:
        for output in cell.get("outputs", []):
            markdown = "".join(output.get("data", {}).get("text/markdown", ""))
            plain = text.FENCE.sub(lambda block: re.sub(r"\[`([^`]*)`\]\(http[^)]*\)", r"\1", block.group(0)), markdown)
            if plain != markdown:
                output["data"]["text/markdown"] = plain


# --- notebooks on Colab ---


def install_cell(name, config):
    "The source of the cell that makes a notebook run on Colab."
    folder = posixpath.dirname(f"nbs/{name}")
    return INSTALL.format(git_url=config["git_url"], repo=config["repo"], folder=folder)


def add_install_cells(root):
    "Put the cell after the title of every notebook that lacks it; the names of those that changed."
    changed, config = [], text.settings(root)
    for name in text.notebooks(Path(root) / "nbs"):
        path, source = Path(root) / "nbs" / name, install_cell(name, config)
        notebook = json.loads(path.read_text(encoding="utf-8"))
        if name == "index.ipynb" or any("".join(cell["source"]) == source for cell in notebook["cells"][1:2]):
            continue
        old = [k for k, cell in enumerate(notebook["cells"]) if '"google.colab" in' in "".join(cell["source"])]
        cell = {"cell_type": "code", "execution_count": None, "metadata": {}, "outputs": []}
        cell |= {"id": hashlib.sha256(source.encode() + name.encode()).hexdigest()[:8]}
        cell |= {"source": source.splitlines(keepends=True)}
        notebook["cells"] = [other for k, other in enumerate(notebook["cells"]) if k not in old]
        notebook["cells"].insert(1, cell)
        path.write_text(json.dumps(notebook, indent=1, ensure_ascii=False, sort_keys=True) + "\n", encoding="utf-8")
        changed.append(name)
    return changed


# --- the index of the library ---


API_PAGE = """---
title: "API"
description: "Every public name, and the page that derives it"
toc: false
---

Each name links to the page where it is written, with its signature, source and tests.

:::: {{.symbols}}

{entries}

::::
"""


def api_index(root):
    "A page with a heading and a line for every public name, linked to the page that derives it."
    config, page_of = text.settings(root), {text.html_name(name): name for name in text.notebooks(Path(root) / "nbs")}
    known = symbols(Path(root) / config["lib_path"])
    entries = []
    for name, module, place, summary in sorted(known, key=lambda symbol: (symbol[0].lower(), symbol[1])):
        page, _, anchor = place.partition("#")
        label = f"[`{module}`]({page_of[page]}#{anchor})" if page in page_of else f"`{module}`"
        short = module.removeprefix(config["lib_name"] + ".")
        entries.append(f"## {name} {{#{short}.{name}}}\n\n{label}: {summary}")
    return API_PAGE.format(entries="\n\n".join(entries))


def symbols(library):
    "`(name, module, page#anchor, first line of the docstring)` of everything in the `__all__` of a module."
    index = ast.parse((library / "_modidx.py").read_text(encoding="utf-8"))
    assigned = next(node for node in index.body if isinstance(node, ast.Assign))
    found = []
    for module, names in ast.literal_eval(assigned.value)["syms"].items():
        path = library.parent.joinpath(*module.split(".")).with_suffix(".py")
        if not path.exists():
            path = path.with_suffix("") / "__init__.py"
        tree = ast.parse(path.read_text(encoding="utf-8"))
        public = exported(tree)
        for node in tree.body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name in public:
                summary = (ast.get_docstring(node) or "").partition("\n")[0]
                place = names.get(f"{module}.{node.name}", ("",))[0]
                found.append((node.name, module, place, summary))
    return found


def exported(tree):
    "The names in a module's `__all__`."
    for node in tree.body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "__all__":
            return set(ast.literal_eval(node.value))
    return set()


if __name__ == "__main__":
    print(*add_install_cells(text.ROOT), sep="\n")
