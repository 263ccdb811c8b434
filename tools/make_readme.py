"""Write README.md from nbs/index.ipynb, so that the landing page exists once.

python tools/make_readme.py            # writes README.md, and the figures of the page to nbs/images/
python tools/make_readme.py --check    # exit status 1 if README.md is not what would be written
"""

import argparse
import base64
import re
import sys
from pathlib import Path

import yaml

import pages as text

HIDDEN = {"hide", "export", "exporti", "default_exp"}
NOTICE = "<!-- Made from nbs/index.ipynb by tools/make_readme.py; edit the notebook. -->"
SUFFIXES = {"image/png": "png", "image/jpeg": "jpg", "image/svg+xml": "svg"}


def make_readme(root=text.ROOT):
    "The README and the figures that it shows: `(markdown, {path: bytes})`."
    root, figures, parts = Path(root), {}, [NOTICE]
    for number, cell in enumerate(text.read_notebook(root / "nbs" / "index.ipynb")["cells"]):
        if cell["cell_type"] == "markdown":
            parts.append(prose(cell["source"], root))
        elif cell["cell_type"] == "code" and not HIDDEN & text.directives(cell["source"]).keys():
            parts += code(cell, number, figures, root)
    return "\n\n".join(part.strip("\n") for part in parts if part.strip()) + "\n", figures


def prose(markdown, root):
    "Quarto's Markdown as GitHub reads it."
    kept, codes = protect(markdown)
    kept = re.sub(r"^:::.*$\n?", "", kept, flags=re.MULTILINE)
    kept = re.sub(r"^(#{1,6} .*?)\s*\{[^}]*\}\s*$", r"\1", kept, flags=re.MULTILINE)
    # GitHub leaves code alone but not dollars: there, backslashes and underscores in plain $…$ get lost.
    kept = text.DISPLAY.sub(lambda match: f"```math\n{match.group(1).strip()}\n```", kept)
    kept = text.INLINE.sub(lambda match: f"$`{match.group(1)}`$", kept)
    kept = text.LINK.sub(lambda match: link(match, root), kept)
    kept = re.sub(r'\b(src|srcset)="([^"]+)"', lambda match: f'{match[1]}="{repository_path(match[2], root)}"', kept)
    return re.sub(r"\x00(\d+)\x00", lambda match: codes[int(match.group(1))], kept)


def protect(markdown):
    "Put a numbered mark in the place of every piece of code: `(marked text, pieces)`."
    codes = []

    def mark(match):
        codes.append(match.group(0))
        return f"\x00{len(codes) - 1}\x00"

    return text.CODE_SPAN.sub(mark, text.FENCE.sub(mark, markdown)), codes


def link(match, root):
    "A link of the site as a link in the repository; the description of an image becomes its text."
    return f"{match['image']}[{text.words_of(match)}]({repository_path(match['target'], root)})"


def repository_path(target, root):
    "Where in the repository the target of a link lies; the address itself if it lies outside."
    config = text.settings(root)
    blob = f"{config['git_url']}/blob/{config['branch']}/"
    if target.startswith(blob):
        return target.removeprefix(blob)
    if re.match(r"[a-z]+:|#|\.\./", target):
        return target.removeprefix("../")
    path, mark, fragment = target.removeprefix("./").partition("#")
    return f"{config['nbs_path']}/{path}" + (mark + fragment if not path.endswith(".ipynb") else "")


def code(cell, number, figures, root):
    "A code cell as Markdown: its code and what it shows. Figures are added to `figures`."
    options, source = text.directives(cell["source"]), text.split_options(cell["source"])[1]
    folded = options.get("echo") == "false" or options.get("code-fold") == "true"
    parts = [] if folded else [f"```python\n{source.strip()}\n```"]
    if options.get("output") == "false" or options.get("include") == "false":
        return parts if options.get("include") != "false" else []
    alts = yaml.safe_load(options.get("fig-alt", "")) or ""
    alts = alts if isinstance(alts, list) else [alts]
    for output in merged(cell["outputs"]):
        parts += shown(output, alts, number, figures, root)
    return parts


def merged(outputs):
    "The outputs, with what was printed in pieces as one piece."
    result = []
    for output in outputs:
        if result and "text" in output and output.get("name") == result[-1].get("name"):
            result[-1]["text"] += output["text"]
        else:
            result.append(output)
    return result


def shown(output, alts, number, figures, root):
    "One output as Markdown, in the form that a page would prefer."
    data = output["data"]
    for mime, suffix in SUFFIXES.items():
        if mime in data:
            raw = data[mime].encode() if suffix == "svg" else base64.b64decode(data[mime])
            path = f"nbs/images/index_{number}_{len(figures)}.{suffix}"
            figures[path] = raw
            return [f"![{alts.pop(0) if alts else ''}]({path})"]
    if "text/markdown" in data:
        return [prose(data["text/markdown"], root)]
    plain = output.get("text") or data.get("text/plain", "")
    return [f"```text\n{plain.rstrip()}\n```"] if plain.strip() else []


def outdated(root=text.ROOT):
    "The files that are not what would be written."
    root = Path(root)
    readme, figures = make_readme(root)
    wanted = {"README.md": readme.encode(), **figures}
    stale = [
        path for path, content in wanted.items() if not (root / path).exists() or (root / path).read_bytes() != content
    ]
    kept = {path.relative_to(root).as_posix() for path in (root / "nbs" / "images").glob("index_*")}
    return stale + sorted(kept - wanted.keys())


def write(root=text.ROOT):
    "Write README.md and its figures, and remove figures that are no longer shown."
    root = Path(root)
    readme, figures = make_readme(root)
    for path in (root / "nbs" / "images").glob("index_*"):
        path.unlink()
    (root / "README.md").write_text(readme, encoding="utf-8")
    for path, content in figures.items():
        (root / path).parent.mkdir(exist_ok=True)
        (root / path).write_bytes(content)


def main():
    "Command line."
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--check", action="store_true", help="write nothing; exit status 1 if something is out of date")
    if not parser.parse_args().check:
        return write()
    stale = outdated()
    if stale:
        print(f"out of date: {', '.join(stale)}; run python tools/make_readme.py", file=sys.stderr)
    return 1 if stale else 0


if __name__ == "__main__":
    sys.exit(main())
