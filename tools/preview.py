"""Look at a page without Quarto: render a staged page to one HTML file.

    python tools/lint_docs.py                  # stages the pages
    python tools/preview.py lab/compare        # writes _docs/preview/lab/compare.html and prints its path

The words, figures, equations and code are those of the site; its theme, sidebar and search are not.
"""

import argparse
import re
import sys
from pathlib import Path

import nbformat
import yaml
from nbconvert import HTMLExporter
from traitlets.config import Config

import pages as text

STYLE = (
    "<style>body{max-width:900px;margin:auto}.jp-InputPrompt,.jp-OutputPrompt{display:none}img{max-width:100%}</style>"
)


def readable(cell, equations):
    "Turn what Quarto would interpret into plain Markdown and code; equations move to `equations`."
    if cell.cell_type == "raw":
        front = yaml.safe_load(cell.source.strip().strip("-")) or {}
        cell.cell_type = "markdown"
        cell.source = f"# {front.get('title', '')}\n\n> {front.get('description', '')}"
    elif cell.cell_type == "markdown":
        cell.source = re.sub(r"^:::.*$", "", cell.source, flags=re.MULTILINE)
    if cell.cell_type == "markdown":
        cell.source = set_aside(cell.source, equations)
    for output in cell.get("outputs", []):
        if "text/markdown" in output.get("data", {}):
            output.data["text/markdown"] = set_aside("".join(output.data["text/markdown"]), equations)
    if cell.cell_type == "code":
        options, code = text.directives(cell.source), text.split_options(cell.source)[1]
        cell.source = code
        if options.get("echo") == "false":
            cell.metadata.tags = ["hidden-code"]


def set_aside(markdown, equations):
    "Markdown with a mark in the place of each equation outside of code."
    codes = []

    def keep(match):
        codes.append(match.group(0))
        return f"\x00{len(codes) - 1}\x00"

    def mark(match, display):
        equations.append({"tex": match.group(1), "display": display})
        return f"EQUATION{len(equations) - 1}MARK"

    marked = text.CODE_SPAN.sub(keep, text.FENCE.sub(keep, markdown))
    marked = re.sub(r"(?<=\))\{[^}]*\}", "", marked)  # Quarto's attributes of links
    marked = text.DISPLAY.sub(lambda match: mark(match, True), marked)
    marked = text.INLINE.sub(lambda match: mark(match, False), marked)
    return re.sub(r"\x00(\d+)\x00", lambda match: codes[int(match.group(1))], marked)


def preview(page, root=text.ROOT):
    "Render one staged page; the path of the HTML file."
    notebook, equations = nbformat.read(Path(root) / "_proc" / f"{page}.ipynb", as_version=4), []
    for cell in notebook.cells:
        readable(cell, equations)
    config = Config(TagRemovePreprocessor={"remove_input_tags": ["hidden-code"]})
    html, _ = HTMLExporter(config=config, mathjax_url="").from_notebook_node(notebook)
    missing = text.katex_missing()
    answers = [] if missing else text.render_equations(equations)
    rendered = [answer.get("html", answer.get("error")) for answer in answers] or [item["tex"] for item in equations]
    html = re.sub(r"(id|href)=\"[^\"]*\"", lambda match: match.group(0).replace("MARK", ""), html)
    html = re.sub(r"EQUATION(\d+)MARK", lambda match: rendered[int(match.group(1))], html)
    css = (text.KATEX / "node_modules" / "katex" / "dist" / "katex.min.css").as_uri()
    path = Path(root) / "_docs" / "preview" / f"{page}.html"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(html.replace("</head>", f'<link rel="stylesheet" href="{css}">{STYLE}</head>'), encoding="utf-8")
    return path


def main():
    "Command line."
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("pages", nargs="+", metavar="PAGE", help="a notebook in nbs/, with or without .ipynb")
    for page in parser.parse_args().pages:
        print(preview(page.removeprefix("nbs/").removesuffix(".ipynb")))


if __name__ == "__main__":
    sys.exit(main())
