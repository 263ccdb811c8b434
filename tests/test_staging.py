"""What staging adds to the pages: a link to Colab, folded sources, plain signatures, the index of the library."""

import json
import re
import shutil

import pytest

import lint_docs
import pages
import preview
import staging

RAW = {"cell_type": "raw", "id": "r", "metadata": {}, "source": "---\ntitle: Page\n---"}
RAW_LINK = "[`g`](https://a.org/g.html#g)"
SIGNATURE = f"text {RAW_LINK}\n\n```python\nf(\n  x, # of {RAW_LINK}, twice\n)\n```"


def exported():
    output = {"output_type": "display_data", "data": {"text/markdown": SIGNATURE}}
    source = '#| code-fold: show\n#| code-summary: "Exported source"\ndef f(): ...'
    return {"cell_type": "code", "id": "c", "metadata": {}, "outputs": [output], "source": source}


@pytest.fixture(scope="module")
def staged(tmp_path_factory):
    "A checkout of two staged pages, one of the core and one of reference."
    tmp_path = tmp_path_factory.mktemp("staged")
    for name in ("settings.ini", "_quarto.yml"):
        shutil.copy(pages.ROOT / name, tmp_path)
    unneeded = shutil.ignore_patterns("pretrained")
    shutil.copytree(pages.ROOT / "neighbor_grpo", tmp_path / "neighbor_grpo", ignore=unneeded)
    for name in ("flow.ipynb", "lab/compare.ipynb"):
        for folder, cells in (("nbs", [RAW, exported()]), ("_proc", [RAW, exported()])):
            path = tmp_path / folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps({"cells": cells}), encoding="utf-8")
    staging.finish(tmp_path)
    return tmp_path


def cells(root, name):
    return pages.read_notebook(root / "_proc" / name)["cells"]


def test_link_to_colab_stands_under_the_title(staged):
    link = cells(staged, "lab/compare.ipynb")[1]["source"]
    user = "https://colab.research.google.com/github/neighbor-grpo/neighbor_grpo"
    assert link == f"[Open in Colab]({user}/blob/main/nbs/lab/compare.ipynb){{.colab}}"
    assert (pages.ROOT / "nbs" / "lab" / "compare.ipynb").exists()


def test_sources_are_folded_on_reference_pages_only(staged):
    assert "#| code-fold: true\n" in cells(staged, "lab/compare.ipynb")[-1]["source"]
    assert "#| code-fold: show\n" in cells(staged, "flow.ipynb")[-1]["source"]


def test_signatures_hold_no_raw_links(staged):
    signature = cells(staged, "flow.ipynb")[-1]["outputs"][0]["data"]["text/markdown"]
    assert signature == SIGNATURE.replace(f"# of {RAW_LINK}, twice", "# of g, twice")


def test_staging_twice_changes_nothing(staged):
    files = {path: path.read_bytes() for path in (staged / "_proc").rglob("*") if path.is_file()}
    staging.finish(staged)
    assert files == {path: path.read_bytes() for path in files}


def test_version_is_shown(staged):
    version = pages.settings()["version"]
    assert f"left: neighbor_grpo {version}\n" in (staged / "_proc" / "version.yml").read_text()


def test_index_holds_every_public_name_once_with_its_page():
    index = staging.api_index(pages.ROOT)
    headings = re.findall(r"^## (\w+) \{#([\w.]+)\}$", index, re.MULTILINE)
    assert ("neighbor_noise", "neighbors.neighbor_noise") in headings
    assert "[`neighbor_grpo.neighbors`](neighbors.ipynb#neighbor_noise): " in index
    places = [place for _, place in headings]
    assert len(set(places)) == len(places) > 100
    assert not any(name.startswith("_") for name, _ in headings)
    # A name without a page would have no link; one without a docstring would end with the colon.
    entries = [line for line in index.splitlines() if line.startswith(("[`", "`"))]
    assert len(entries) == len(headings)
    assert all(re.fullmatch(r"\[`[\w.]+`\]\([\w/]+\.ipynb#[\w.-]+\): \S.*", line) for line in entries)


def test_links_of_the_index_are_checked(staged):
    api = staged / "_proc" / "api.qmd"
    site = lint_docs.Site(staged, [lint_docs.Page("flow.ipynb", [], cells(staged, "flow.ipynb"))])
    api.write_text("[there](flow.ipynb)", encoding="utf-8")
    assert list(lint_docs.generated_links(site)) == []
    api.write_text("[there](flow.ipynb#gone)", encoding="utf-8")
    assert len(list(lint_docs.generated_links(site))) == 1


def test_install_cells_are_added_once_and_renewed(tmp_path):
    shutil.copy(pages.ROOT / "settings.ini", tmp_path)
    path = tmp_path / "nbs" / "lab" / "page.ipynb"
    path.parent.mkdir(parents=True)
    title = {"cell_type": "markdown", "id": "t", "metadata": {}, "source": ["# Page"]}
    path.write_text(json.dumps({"cells": [title]}), encoding="utf-8")
    assert staging.add_install_cells(tmp_path) == ["lab/page.ipynb"]
    assert staging.add_install_cells(tmp_path) == []
    source = pages.read_notebook(path)["cells"][1]["source"]
    assert 'run_line_magic("cd", "/content/neighbor_grpo/nbs/lab")' in source
    asked = []

    class Shell:
        def system(self, command):
            asked.append(command)

        def run_line_magic(self, *command):
            asked.append(command)

    exec(compile(source, "cell", "exec"), {"get_ipython": lambda: "a shell elsewhere"})
    assert not asked
    Shell.__str__ = lambda self: "<google.colab._shell.Shell>"
    exec(compile(source, "cell", "exec"), {"get_ipython": Shell})
    assert "git clone" in asked[0] and asked[1] == ("cd", "/content/neighbor_grpo/nbs/lab")
    path.write_text(path.read_text().replace("--depth 1", "--depth 2"), encoding="utf-8")
    assert staging.add_install_cells(tmp_path) == ["lab/page.ipynb"]
    assert len(pages.read_notebook(path)["cells"]) == 2


def test_katex_of_the_site_is_the_one_that_equations_were_checked_with():
    checked = json.loads((pages.KATEX / "package.json").read_text())["dependencies"]["katex"]
    assert f"katex@{checked}/dist/" in (pages.ROOT / "_quarto.yml").read_text()


@pytest.mark.parametrize("mode", ["light", "dark"])
def test_both_themes_name_the_same_colors(mode, tmp_path):
    for name in ("light.scss", "dark.scss"):
        shutil.copy(pages.ROOT / "nbs" / name, tmp_path)
    css = preview.properties(tmp_path, mode)
    assert f"color-scheme:{mode}" in css
    for name in ("body-bg", "body-color", "link-color", "navbar-bg"):
        assert re.search(rf"--bs-{name}:#[0-9a-f]{{6}};--bs-{name}-rgb:\d+, \d+, \d+;", css)
