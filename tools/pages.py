"""What the other tools share: the project's settings, its pages in reading order, and the parts of their text."""

import json
import posixpath
import re
import shutil
import subprocess
from configparser import ConfigParser
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parent.parent
KATEX = ROOT / "tools" / "katex"

# The method: ten short pages, read in this order. Every other page is reference.
CORE = "method flow grpo rivals/sde distance neighbors leaping anchors tasks/toy2d tasks/digits".split()
CORE = [f"{name}.ipynb" for name in CORE]
# Written when the pages are staged.
GENERATED = ["api.qmd"]

FENCE = re.compile(r"^[ \t]*(```+|~~~+)[^\n]*\n.*?^[ \t]*\1[ \t]*$", re.MULTILINE | re.DOTALL)
CODE_SPAN = re.compile(r"(?<!`)(`+)(?!`)(.+?)(?<!`)\1(?!`)", re.DOTALL)
DISPLAY = re.compile(r"(?<!\\)\$\$(.+?)(?<!\\)\$\$", re.DOTALL)
# Pandoc's rule: no space just inside the dollars, and no digit after the closing one.
INLINE = re.compile(r"(?<![\\$])\$(?![\s$])((?:[^$\\]|\\.)*?)(?<!\s)\$(?!\d)", re.DOTALL)
LINK = re.compile(
    r"(?P<image>!?)\[(?P<text>[^\[\]]*(?:\[[^\[\]]*\][^\[\]]*)*)\]"
    r"\(\s*<?(?P<target>[^\s<>()]*(?:\([^\s()]*\)[^\s<>()]*)*)>?(?:\s+\"(?P<title>[^\"]*)\")?\s*\)"
    r"(?P<attributes>\{[^}]*\})?"
)
OPTION = re.compile(r"^#\|\s?(.*)$")


def settings(root=ROOT):
    "The settings of `settings.ini` as a mapping of strings."
    parser = ConfigParser(delimiters=["="])
    parser.read(Path(root) / "settings.ini", encoding="utf-8")
    return parser["DEFAULT"]


def site_url(config):
    "Where the pages are published, with a slash at the end."
    return config["doc_host"].rstrip("/") + "/" + config["doc_baseurl"].strip("/") + "/"


def reading_order(root=ROOT):
    "The paths of all pages in `nbs`, in the order of the sidebar."
    contents = yaml.safe_load((Path(root) / "_quarto.yml").read_text(encoding="utf-8"))["website"]["sidebar"][
        "contents"
    ]
    return list(_flatten(contents))


def following(name, root=ROOT):
    "The page that a reader of this one goes on with: the next core page, or the next page of reference; or None."
    order = reading_order(root)
    if name in CORE[:-1]:
        return CORE[CORE.index(name) + 1]
    if name == "index.ipynb":
        return CORE[0]
    rest = [other for other in order if other not in CORE] if name not in CORE else order
    return next(iter(rest[rest.index(name) + 1 :]), None) if name in rest else None


def _flatten(contents):
    for entry in contents:
        if isinstance(entry, str):
            yield entry
        else:
            yield from _flatten(entry["contents"])


def notebooks(folder):
    "The paths of all notebooks in a folder and in those below it, with slashes and relative to it."
    found = (path.relative_to(folder) for path in Path(folder).rglob("*.ipynb"))
    return sorted(path.as_posix() for path in found if not any(part[0] in "._" for part in path.parts))


def html_name(notebook):
    "Where nbdev publishes a notebook: `tasks/Digits.ipynb` becomes `tasks/digits.html`."
    folder, name = posixpath.split(notebook)
    return posixpath.join(folder, re.sub(r"^\d+[a-zA-Z0-9]*_", "", name.lower()).removesuffix(".ipynb") + ".html")


def read_notebook(path):
    "A notebook as nested dictionaries, the source of each cell and each text output being one string."
    notebook = json.loads(Path(path).read_text(encoding="utf-8"))
    for cell in notebook["cells"]:
        cell["source"] = "".join(cell["source"])
        for output in cell.get("outputs", []):
            if "text" in output:
                output["text"] = "".join(output["text"])
            output["data"] = {mime: _joined(data) for mime, data in output.get("data", {}).items()}
    return notebook


def _joined(data):
    return "".join(data) if isinstance(data, list) else data


def split_options(source):
    "Separate the leading `#|` lines of a code cell from its code: `(options, code)`, both strings."
    lines = source.split("\n")
    count = next((i for i, line in enumerate(lines) if line.strip() and not OPTION.match(line)), len(lines))
    options = [OPTION.match(line).group(1) for line in lines[:count] if line.strip()]
    return "\n".join(options), "\n".join(lines[count:])


def directives(source):
    "The names of nbdev's and Quarto's directives in a code cell, with their values: `{'hide': '', 'echo': 'false'}`."
    pairs = (line.strip().partition(":") for line in split_options(source)[0].split("\n") if line.strip())
    flat = {}
    for name, colon, value in pairs:
        # nbdev writes `eval: false` and also plain flags with arguments, such as `default_exp flow`.
        head, _, rest = name.partition(" ")
        flat[name if colon else head] = value.strip() if colon else rest
    return flat


def blank(text, pattern):
    "Replace what `pattern` matches by spaces, so that what is left keeps its place."
    return pattern.sub(lambda match: re.sub(r"[^\n]", " ", match.group(0)), text)


def words_of(link):
    "The text of a match of LINK; for an image that Quarto describes apart from its caption, the description."
    described = re.search(r'fig-alt="([^"]*)"', link["attributes"] or "")
    return described[1] if link["image"] and described else link["text"]


def without_code(markdown):
    "Markdown without its code blocks and code spans."
    return blank(blank(markdown, FENCE), CODE_SPAN)


def without_math(markdown):
    "Markdown without its equations; take the code out first."
    return blank(blank(markdown, DISPLAY), INLINE)


def equations(markdown):
    "All equations as `{'tex', 'display'}`, the displayed ones first."
    prose = without_code(markdown)
    found = [{"tex": tex, "display": True} for tex in DISPLAY.findall(prose)]
    return found + [{"tex": tex, "display": False} for tex in INLINE.findall(blank(prose, DISPLAY))]


def katex_missing():
    "Why equations cannot be checked here, or None if they can."
    if not shutil.which("node"):
        return "Node.js is not installed, so equations cannot be checked (any version from 18 on will do)"
    if not (KATEX / "node_modules" / "katex").exists():
        return "KaTeX is not installed, so equations cannot be checked: run `npm ci --prefix tools/katex`"
    return None


def render_equations(found):
    "KaTeX's answer to each equation: `{'html': …}` or `{'error': …}`."
    process = subprocess.run(
        ["node", str(KATEX / "check.js")], input=json.dumps(found), capture_output=True, text=True, check=True
    )
    return json.loads(process.stdout)
