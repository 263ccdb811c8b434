"""Stage the documentation as nbdev does before Quarto renders it, and lint the staged pages.

    python tools/lint_docs.py            # prints `page: cell N: what` for every finding; exit status 1 if there is one

Staging runs the import cells and the exported cells of every page, writes what Quarto would read to `_proc/`, and
stops at a cell that fails. The lint then reads those pages as a visitor would: does every link lead somewhere, has
every figure a description, can every equation be set, does every page lead on to the next?
Cells are counted from 0, as they stand in the notebook.
"""

import argparse
import ast
import importlib
import json
import os
import posixpath
import re
import sys
from dataclasses import dataclass, field
from functools import cached_property
from importlib.metadata import entry_points
from pathlib import Path
from typing import NamedTuple
from urllib.parse import unquote, urlsplit

import yaml

import pages as text
from staging import finish, install_cell

MAX_OUTPUT = 400_000  # bytes of one output
MAX_PAGE = 1_500_000  # bytes of all outputs of a page
# What fits into a page's column at 1440 pixels, in characters of a line, and the share of blocks that may be wider.
WIDE_CODE, MAX_WIDE_CODE = 100, 0.0
WIDE_OUTPUT, MAX_WIDE_OUTPUT = 88, 0.02
PICTURES = ("image/png", "image/jpeg", "image/svg+xml")
FILE_SUFFIXES = {"html", "ini", "ipynb", "js", "json", "jsonl", "md", "png", "py", "safetensors", "toml", "txt", "yml"}
PLACEHOLDER = re.compile(r"\b(TODO|FIXME|XXX|TBD)\b|lorem ipsum", re.IGNORECASE)
HEADING = re.compile(r"^(#{1,6})[ \t]+(.+?)[ \t]*#*$", re.MULTILINE)
EXPLICIT_ID = re.compile(r"\{[^}]*?#([\w:.-]+)[^}]*\}|\bid=[\"']([\w:.-]+)[\"']")
CROSS_REFERENCE = re.compile(r"(?<![\w@])@((?:eq|fig|tbl|sec)-[\w-]+)")
REFERENCE = re.compile(r"`([A-Za-z_]\w*(?:\.[A-Za-z_]\w*)+)(?:\([^`]*\))?`")
HTML_LINK = re.compile(r"<a\s[^>]*?href=[\"']([^\"']+)[\"']|<(https?://[^>\s]+)>")
ARXIV = re.compile(r"/(abs|pdf|html)/\d{4}\.\d{4,5}(v\d+)?(\.pdf)?$")

CHECKS = {}


class Finding(NamedTuple):
    page: str
    cell: int
    kind: str
    what: str

    def __str__(self):
        return f"{self.page}: cell {self.cell}: {self.what}"


def check(function):
    "Register `function(page, site)`, which yields `(cell, what)`, as a check named after it."
    CHECKS[function.__name__] = function
    return function


@dataclass
class Page:
    "A staged page beside the notebook that it comes from."

    name: str
    source: list = field(repr=False)  # the cells of the notebook
    staged: list = field(repr=False)  # the cells of the staged page

    @cached_property
    def front(self):
        "The front matter that nbdev made from the title cell."
        raw = next((cell["source"] for cell in self.staged if cell["cell_type"] == "raw"), "")
        match = re.match(r"---\s*\n(.*?)\n---", raw, re.DOTALL)
        return yaml.safe_load(match.group(1)) if match else {}

    @cached_property
    def cells(self):
        "`(number in the notebook, staged cell)`; a cell that staging added carries the number of the one before it."
        number_of, number, cells = {cell.get("id"): i for i, cell in enumerate(self.source)}, 0, []
        for cell in self.staged:
            number = number_of.get(cell.get("id"), number)
            cells.append((number, cell))
        return cells

    @cached_property
    def prose(self):
        "All Markdown that the page shows: `(cell, text)`."
        found = [(0, f"{self.front.get('title', '')}\n\n{self.front.get('description', '')}")]
        for number, cell in self.cells:
            if cell["cell_type"] == "markdown":
                found.append((number, cell["source"]))
            for output in cell.get("outputs", []):
                if "text/markdown" in output["data"]:
                    found.append((number, output["data"]["text/markdown"]))
        return found

    @cached_property
    def anchors(self):
        "Every id that a link may point to."
        found, seen = set(), {}
        for _, markdown in self.prose[1:]:
            prose = text.blank(markdown, text.FENCE)
            found.update(a or b for a, b in EXPLICIT_ID.findall(prose))
            for _, heading in HEADING.findall(prose):
                name = heading_id(heading)
                seen[name] = seen.get(name, -1) + 1
                found.add(f"{name}-{seen[name]}" if seen[name] else name)
        labels = (text.directives(cell["source"]).get("label") for _, cell in self.cells if cell["cell_type"] == "code")
        return found | {label for label in labels if label}

    @cached_property
    def plain(self):
        "The prose without its code and equations: `(cell, text)`."
        return [(number, text.without_math(text.without_code(markdown))) for number, markdown in self.prose]

    @cached_property
    def matches(self):
        "All matches of LINK with their cells; images inside a link are matched as its text."
        return [
            (number, m) for number, prose in self.plain for match in text.LINK.finditer(prose) for m in _nested(match)
        ]

    @cached_property
    def images(self):
        "All images: `(cell, target, caption, alt text)`."
        found = []
        for number, m in self.matches:
            if m["image"]:
                alt = re.search(r"fig-alt=([\"'])(.*?)\1", m["attributes"] or "")
                found.append((number, m["target"], m["text"], alt.group(2) if alt else ""))
        return found

    @cached_property
    def blocks(self):
        "The widest line of each block of code and of each printed output that the page shows: `(cell, kind, width)`."
        found = []
        for number, cell in enumerate(self.source):
            options = text.directives(cell["source"])
            if cell["cell_type"] != "code" or "hide" in options or options.get("include") == "false":
                continue
            shown = [("code", text.split_options(cell["source"])[1])] if options.get("echo") != "false" else []
            shown += [("output", printed(output)) for output in cell["outputs"] if options.get("output") != "false"]
            found += [(number, kind, max(map(len, lines.split("\n")))) for kind, lines in shown if lines]
        return found

    @cached_property
    def links(self):
        "All links: `(cell, target, text, is an image)`."
        found = [(number, m["target"], text.words_of(m), bool(m["image"])) for number, m in self.matches]
        tags = [(number, *pair) for number, prose in self.plain for pair in HTML_LINK.findall(prose)]
        return found + [(number, a or b, "", False) for number, a, b in tags]


def printed(output):
    "The text of an output that is only text."
    data = output["data"]
    return output.get("text") or ("" if data.keys() - {"text/plain"} else data.get("text/plain", ""))


def _nested(match):
    return [match, *text.LINK.finditer(match["text"])]


@dataclass
class Site:
    "All pages in reading order, and what they may refer to."

    root: Path
    pages: list

    @cached_property
    def config(self):
        return text.settings(self.root)

    @cached_property
    def by_name(self):
        "Pages by the names they are linked with: the notebook's and, from outside, the published one."
        return {page.name: page for page in self.pages}

    @cached_property
    def by_html(self):
        return {text.html_name(page.name): page for page in self.pages}

    def wide_share(self, kind, limit):
        "Which share of the blocks of this kind, on all pages, has a line longer than `limit`."
        widths = [wide for page in self.pages for _, other, wide in page.blocks if other == kind]
        return sum(wide > limit for wide in widths) / max(1, len(widths))

    @cached_property
    def modules(self):
        "The path of every module in the library, by its last name."
        library = self.root / self.config["lib_path"]
        paths = [path.relative_to(library).with_suffix("") for path in library.rglob("*.py") if path.stem[0] != "_"]
        return {path.name: path.parts for path in paths}

    def parts(self, name):
        "The parts of a name in the library, its module written in full."
        first, *rest = name.removeprefix(self.config["lib_name"] + ".").split(".")
        return [*self.modules.get(first, [first]), *rest]

    def target(self, page, link):
        "The page that a link leads to, if it is one of ours."
        home = text.site_url(self.config)
        path = urlsplit(link.removeprefix(home)).path
        folder = "" if link.startswith(home) else posixpath.dirname(page.name)
        place = posixpath.normpath(posixpath.join(folder, path))
        return page if not path else self.by_name.get(place) or self.by_html.get(place)


def heading_id(heading):
    "The id that Pandoc gives a heading."
    explicit = re.search(r"\{[^}]*#([\w:.-]+)[^}]*\}\s*$", heading)
    if explicit:
        return explicit.group(1)
    plain = re.sub(r"\s*\{[^}]*\}\s*$", "", heading)
    plain = re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", plain)
    kept = re.sub(r"[^\w\s.-]", "", plain).strip().lower()
    return re.sub(r"^[^a-z\u00df-\uffff]+", "", re.sub(r"\s+", "-", kept)) or "section"


# --- the checks: each yields (cell, what) ---


@check
def title(page, site):
    "A title, a description, and no prose that nbdev drops together with them."
    if not page.front.get("title"):
        yield 0, "no title: start the page with a cell `# Title`"
    if not page.front.get("description"):
        yield 0, "no description: write a line `> …` under the title"
    for number, cell in enumerate(page.source):
        if cell["cell_type"] == "markdown" and re.match(r"#\s", cell["source"].strip()):
            lines = [line for line in cell["source"].strip().split("\n")[1:] if line.strip()]
            lost = [line for line in lines if not re.match(r"^>\s|^-\s+[\w-]+:\s", line)]
            if lost or sum(line.startswith(">") for line in lines) > 1:
                yield number, f"staging drops this text from the title cell, give it a cell of its own: {lost or lines}"
            return


@check
def sidebar(page, site):
    "Every page is in the sidebar."
    if page.name not in text.reading_order(site.root):
        yield 0, "not in the sidebar of _quarto.yml"


@check
def placeholder(page, site):
    "No notes to oneself."
    for number, markdown in page.prose:
        for match in PLACEHOLDER.finditer(text.without_code(markdown)):
            yield number, f"placeholder {match.group(0)!r}"


@check
def option(page, site):
    "The `#|` lines are YAML as Quarto reads it, and nbdev keeps them."
    for number, cell in enumerate(page.source):
        if cell["cell_type"] != "code":
            continue
        lines = [line for line in text.split_options(cell["source"])[0].split("\n") if ":" in line]
        for line in lines:
            try:
                value = yaml.safe_load(line)
            except yaml.YAMLError:
                value = None
            if not isinstance(value, dict):
                yield number, f"not a YAML option (quote its value): #| {line}"
            elif any(v is None or isinstance(v, str) and v in ("", "|", ">") for v in value.values()):
                yield number, f"nbdev keeps only the first line of an option, write its value on it: #| {line}"


@check
def staging(page, site):
    "Imports in cells of their own, because staging runs every cell that imports."
    if not any({"export", "exports", "exporti"} & text.directives(cell["source"]).keys() for cell in code_cells(page)):
        return
    for number, cell in enumerate(page.source):
        if cell["cell_type"] == "code" and runs_too_much(cell["source"]):
            yield number, "imports and other code in one cell: staging would run all of it"


def code_cells(page):
    return [cell for cell in page.source if cell["cell_type"] == "code"]


def statements(source):
    "The syntax trees of the statements in a cell; none if it holds magics."
    try:
        return ast.parse(text.split_options(source)[1]).body
    except SyntaxError:
        return []


def runs_too_much(source):
    "Does a cell that is not exported import something and also do something else?"
    options, body = text.directives(source), statements(source)
    never = options.get("eval") == "false" or "nbdev_export()" in source
    if never or {"export", "exports", "exporti", "exec_doc"} & options.keys():
        return False
    imports = any(isinstance(node, ast.Import | ast.ImportFrom) for statement in body for node in ast.walk(statement))
    return imports and any(isinstance(statement, ast.Expr | ast.Assign) for statement in body)


@check
def shown(page, site):
    "The code that a page derives is on the page."
    for number, cell in enumerate(page.source):
        if cell["cell_type"] == "code" and "export" in text.directives(cell["source"]):
            if any(not isinstance(statement, ast.Import | ast.ImportFrom) for statement in statements(cell["source"])):
                yield number, "`#| export` hides code from the page: write `#| exports`, or `#| exporti` for internals"


@check
def figure(page, site):
    "Every figure has a description for those who cannot see it."
    for number, cell in page.cells:
        if cell["cell_type"] != "code":
            continue
        pictures = sum(any(mime in output["data"] for mime in PICTURES) for output in cell["outputs"])
        alts = alt_texts(cell["source"])
        if pictures and len(alts) != pictures and not (len(alts) == 1 and pictures > 1 and "layout" in cell["source"]):
            yield (
                number,
                f'{pictures} figure(s) but {len(alts)} alt text(s): add a line `#| fig-alt: "…"` (a list for several)',
            )
        for output in cell["outputs"]:
            html = output["data"].get("text/html", "")
            if not pictures and re.search(r"<(img|svg|canvas|video)\b", html) and not has_label(html):
                yield number, 'an embedded picture without description: wrap it in `<div role="img" aria-label="…">`'
    for number, target, caption, alt in page.images:
        if caption or not alt.strip():
            yield number, f'an image needs a description, and Quarto shows words in []: ![]({target}){{fig-alt="…"}}'


def alt_texts(source):
    "The non-empty alt texts that a cell declares."
    line = text.directives(source).get("fig-alt", "")
    try:
        value = yaml.safe_load(line) if line else []
    except yaml.YAMLError:
        return []  # reported by the check `option`
    return [alt for alt in (value if isinstance(value, list) else [value]) if str(alt or "").strip()]


def has_label(html):
    return re.search(r"(aria-label|alt)=([\"'])\s*[^\"'\s]", html)


@check
def output(page, site):
    "Outputs are stored, and there are no errors, tracebacks or warnings among them."
    for number, cell in enumerate(page.source):
        if cell["cell_type"] == "code" and not cell["outputs"] and prints(cell["source"]):
            yield number, "this cell prints, but its output is not stored: run the notebook"
    for number, cell in page.cells:
        for out in cell.get("outputs", []):
            if out["output_type"] == "error":
                yield number, f"the output is an error: {out.get('ename')}: {out.get('evalue')}"
            if out.get("name") == "stderr" and re.search(r"Traceback|Warning|Error\b", out["text"]):
                yield number, f"stderr output: {out['text'].strip()[:200]}"


def prints(source):
    "Does a cell that runs, and shows what it prints, end in a call of print?"
    options, body = text.directives(source), statements(source)
    if "hide" in options or "false" in (options.get("eval"), options.get("output"), options.get("include")):
        return False
    last = getattr(body[-1], "value", None) if body else None
    return getattr(getattr(last, "func", None), "id", "") == "print"


@check
def size(page, site):
    "Pages stay light."
    total = 0
    for number, cell in page.cells:
        for out in cell.get("outputs", []):
            weight = len(json.dumps(out))
            total += weight
            if weight > MAX_OUTPUT:
                yield number, f"an output of {weight / 1000:.0f} KB (limit {MAX_OUTPUT / 1000:.0f} KB)"
    if total > MAX_PAGE:
        yield 0, f"{total / 1000:.0f} KB of outputs on the page (limit {MAX_PAGE / 1000:.0f} KB)"


@check
def width(page, site):
    "Code and printed lines fit into the column; a small share of outputs may be wider."
    for number, kind, wide in page.blocks:
        limit, share = {"code": (WIDE_CODE, MAX_WIDE_CODE), "output": (WIDE_OUTPUT, MAX_WIDE_OUTPUT)}[kind]
        if wide > limit and site.wide_share(kind, limit) > share:
            yield number, f"{kind} of {wide} characters in a line (limit {limit})"


@check
def signature(page, site):
    "No raw links in signatures: nbdev makes them of backticks in the comments behind parameters."
    for number, cell in page.cells:
        for out in cell.get("outputs", []):
            for block in text.FENCE.finditer(out["data"].get("text/markdown", "")):
                if "](http" in block.group(0):
                    yield number, f"a raw link in a signature: {block.group(0).split(chr(10))[1]}"


@check
def colab(page, site):
    "As soon as one page has a cell that installs the library on Colab, all have it."
    if not any(has_install_cell(other, site) for other in site.pages) or page.name == "index.ipynb":
        return
    if not has_install_cell(page, site):
        yield 0, "no cell that installs the library on Colab: run python tools/staging.py"


def has_install_cell(page, site):
    "Is the cell after the title the one that installs the library on Colab?"
    return len(page.source) > 1 and page.source[1]["source"] == install_cell(page.name, site.config)


@check
def link(page, site):
    "Every link and cross-reference leads somewhere."
    for number, target, _, image in page.links:
        problem = broken(target, page, site, image)
        if problem:
            yield number, f"{problem}: {target}"
    for number, prose in page.plain:
        rest = text.LINK.sub("", prose)
        if "](" in rest:
            yield number, f"malformed link: {rest[max(0, rest.index('](') - 20) :][:60].strip()!r}"
        for name in CROSS_REFERENCE.findall(prose):
            if name not in page.anchors:
                yield number, f"cross-reference to nothing: @{name}"


def broken(target, page, site, image=False):
    "What is wrong with a link, or None."
    home, repository = text.site_url(site.config), f"{site.config['git_url']}/blob/{site.config['branch']}/"
    if target.startswith(repository):
        path = unquote(urlsplit(target.removeprefix(repository)).path)
        return None if (site.root / path).exists() else "no such file in the repository"
    if target == home or target == home.rstrip("/"):
        return None
    if re.match(r"[a-z]+:", target) and not target.startswith(home):
        return malformed(target)
    destination, fragment = site.target(page, target), urlsplit(target).fragment
    if destination is None:
        path = unquote(urlsplit(target).path)
        if posixpath.normpath(posixpath.join(posixpath.dirname(page.name), path)) in text.GENERATED:
            return None
        return (
            None if path and (site.root / "nbs" / posixpath.dirname(page.name) / path).is_file() else "link to nothing"
        )
    if not image and not target.startswith(home) and re.match(r"[^#]+\.html", target):
        return "link to the notebook instead, Quarto knows its published name"
    if fragment and unquote(fragment) not in destination.anchors:
        return f"no heading with this id on {destination.name}"
    return None


def malformed(target):
    "What is wrong with an external link, or None."
    parts = urlsplit(target)
    if parts.scheme == "mailto":
        return None
    if parts.scheme not in ("http", "https") or not re.fullmatch(r"[\w-]+(\.[\w-]+)+", parts.hostname or ""):
        return "malformed link"
    if parts.hostname.endswith("arxiv.org") and not ARXIV.search(parts.path):
        return "not an arXiv identifier"
    return None


@check
def symbol(page, site):
    "Every `module.name` of ours exists."
    for number, markdown in page.prose:
        for name in REFERENCE.findall(text.blank(markdown, text.FENCE)):
            parts, known = site.parts(name), {path[0] for path in site.modules.values()}
            ours = name.startswith(site.config["lib_name"] + ".") or parts[0] in known
            if ours and parts[-1] not in FILE_SUFFIXES and not exists(site.config["lib_name"], parts):
                yield number, f"`{name}` names nothing in the library"


def exists(library, parts):
    "Does `library.parts[0].parts[1]…` name a module, an attribute or a field?"
    thing, place = importlib.import_module(library), library
    for part in parts:
        place = f"{place}.{part}"
        if not hasattr(thing, part):
            try:
                importlib.import_module(place)
            except ModuleNotFoundError:
                return part == parts[-1] and part in getattr(thing, "__annotations__", {})
        thing = getattr(thing, part)
    return True


@check
def onward(page, site):
    "The last paragraph of a page leads to the next one."
    following = text.following(page.name, site.root)
    if following not in site.by_name:
        return
    numbers = [number for number, cell in page.cells if cell["cell_type"] == "markdown" and cell["source"].strip()]
    last = numbers[-1] if numbers else 0
    if not any(
        number == last and site.target(page, target) is site.by_name[following] for number, target, *_ in page.links
    ):
        yield last, f"the page does not end with a link to the next one, {following}"


@check
def equation(page, site):
    "Every equation is delimited as Pandoc expects and can be set by KaTeX."
    found = [(number, item) for number, markdown in page.prose for item in text.equations(markdown)]
    for number, item in found:
        if item["display"] and re.search(r"\n\s*\n", item["tex"]):
            yield number, f"blank line in an equation: {item['tex'].strip()[:60]}"
    for number, rest in page.plain:
        if re.search(r"(?<!\\)\$", rest):
            yield number, f"a dollar sign without its partner: {rest[rest.index('$') :][:60]!r}"
        if r"\begin{" in rest:
            yield number, "an environment outside of $$"
    if found and not text.katex_missing():
        answers = text.render_equations([item for _, item in found])
        for (number, item), answer in zip(found, answers, strict=True):
            if "error" in answer:
                yield number, f"{answer['error']} in ${item['tex'].strip()}$"


# --- staging and running ---


def stage(root, force=True):
    "Write the pages as Quarto will read them to `root/_proc`, all or those that changed; fails on a cell that fails."
    from nbdev.config import get_config
    from nbdev.quarto import refresh_quarto_yml
    from nbdev.serve import proc_nbs

    library = text.settings(root)["lib_name"]
    if not any(entry.name == library for entry in entry_points(group="nbdev")):
        raise SystemExit("nbdev links symbols of installed projects only: run pip install -e . first")
    sys.path.insert(0, str(root))
    os.environ.setdefault("MPLBACKEND", "agg")
    os.chdir(root)  # nbdev finds its settings from the current folder
    get_config.cache_clear()
    refresh_quarto_yml()
    # One process: with workers, a failing cell would be printed and forgotten.
    staged = proc_nbs(force=force, n_workers=0)
    if not list(staged.glob("*.ipynb")):
        raise RuntimeError(
            f"nothing was staged: nbdev skips folders whose path has a part that starts with a dot: {root}"
        )
    finish(root)
    return staged


def load(root, folder="_proc"):
    "The site as it lies in `folder`."
    root, read = Path(root), text.read_notebook
    names = text.notebooks(root / folder)
    pages = [Page(name, read(root / "nbs" / name)["cells"], read(root / folder / name)["cells"]) for name in names]
    return Site(root, pages)


def lint(site):
    "All findings, page by page."
    order = text.reading_order(site.root)
    found = [
        Finding("_quarto.yml", 0, "sidebar", f"no such page: {name}") for name in order if name not in site.by_name
    ]
    for page in sorted(site.pages, key=lambda page: order.index(page.name) if page.name in order else len(order)):
        for kind, function in CHECKS.items():
            found += [Finding(page.name, number, kind, what) for number, what in function(page, site)]
    return found + [Finding("api.qmd", 0, "link", what) for what in generated_links(site)]


def generated_links(site):
    "Links to nowhere on the pages that staging writes."
    for name in text.GENERATED:
        source = (site.root / "_proc" / name).read_text(encoding="utf-8")
        page = Page(name, [], [{"cell_type": "markdown", "id": name, "source": source}])
        yield from (what for _, what in link(page, site))


def malformed_options(site):
    "What can be said before staging."
    return [Finding(page.name, number, "option", what) for page in site.pages for number, what in option(page, site)]


def main():
    "Command line."
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--root", type=Path, default=text.ROOT, help="the checkout to stage (default: this one)")
    parser.add_argument("--no-stage", action="store_true", help="lint what is already in _proc/")
    parser.add_argument("--json", type=Path, help="also write the findings to this file")
    arguments = parser.parse_args()
    root = arguments.root.resolve()
    # Some malformed options make staging stop with an error that does not name them.
    found, missing = malformed_options(load(root, "nbs")), text.katex_missing()
    if not found:
        if not arguments.no_stage:
            stage(root)
        found = lint(load(root))
    if arguments.json:
        arguments.json.write_text(json.dumps([finding._asdict() for finding in found]), encoding="utf-8")
    print(*found, sep="\n", end="\n" if found else "")
    print(f"{len(found)} finding(s)" + (f"; {missing}" if missing else ""))
    return 1 if found or (missing and os.environ.get("CI")) else 0


if __name__ == "__main__":
    sys.exit(main())
