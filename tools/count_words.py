"""Count the words of prose that a reader of the pages has before them.

    python tools/count_words.py          # a line for each page, then the core, everything, and the way to the method

A word is a word of Markdown: blocks of code, displayed equations and the targets of links are not counted; an equation
or a piece of code in a sentence counts as one. The core pages have a limit each, and everything together has one.
"""

import argparse
import re
import sys
from pathlib import Path

import pages as text

MAX_PAGE, MAX_ALL = 900, 30_000  # words of a core page, and of all pages
MAX_BEFORE_METHOD, MAX_BEFORE_ALIGNED = 500, 9_000  # words until the whole method runs, and until it has moved images
HTML = re.compile(r"<!--.*?-->|<[^>]*>", re.DOTALL)
WORD = re.compile(r"[^\W_][\w'’.-]*")


def count_words(markdown):
    "The words of a piece of Markdown."
    prose = text.CODE_SPAN.sub(" code ", text.FENCE.sub("", markdown))
    prose = text.INLINE.sub(" equation ", text.DISPLAY.sub("", prose))
    prose = HTML.sub("", re.sub(r"\]\([^)]*\)", "]", prose))
    return len(WORD.findall(re.sub(r"\{[^}]*\}", "", prose)))


def words_of(cells):
    "The words of all Markdown cells."
    return sum(count_words(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")


def count_pages(root=text.ROOT):
    "Words by page, in reading order."
    nbs = Path(root) / "nbs"
    return {name: words_of(text.read_notebook(nbs / name)["cells"]) for name in text.reading_order(root)}


def words_before(page, found, root=text.ROOT):
    """Words on the way to the first cell of a core page of which `found(cell)` holds: the landing page and the core
    before it. To the first core page, the landing page counts as far as its link there."""
    nbs = Path(root) / "nbs"
    landing = text.read_notebook(nbs / "index.ipynb")["cells"]
    link = next(number for number, cell in enumerate(landing) if f"]({text.CORE[0]})" in cell["source"])
    words = words_of(landing[: link + 1] if page == text.CORE[0] else landing)
    for name in text.CORE:
        cells = text.read_notebook(nbs / name)["cells"]
        if name == page:
            place = next((number for number, cell in enumerate(cells) if found(cell)), None)
            return None if place is None else words + words_of(cells[:place])
        words += words_of(cells)
    raise ValueError(f"page must be one of {', '.join(text.CORE)}, got {page!r}")


def trains(cell):
    "Does a cell hold the whole method: neighbors, distances, and the step of an optimizer?"
    source = cell["source"] if cell["cell_type"] == "code" else ""
    return bool(re.search(r"\.step\(\)", source) and re.search(r"backward\(\)", source))


def shows_aligned_images(cell):
    "Does a cell show a picture of samples in the course of training, or after it?"
    options = text.directives(cell["source"]) if cell["cell_type"] == "code" else {}
    words = options.get("fig-alt", "") + options.get("fig-cap", "")
    return bool(re.search(r"\bsamples (after|over)\b", words, re.IGNORECASE))


def summary(root=text.ROOT):
    "The figures that have limits: `{name: (words, limit)}`."
    counts = count_pages(root)
    figures = {name: (counts[name], MAX_PAGE) for name in text.CORE}
    figures["everything"] = (sum(counts.values()), MAX_ALL)
    figures["before the method"] = (words_before("method.ipynb", trains, root), MAX_BEFORE_METHOD)
    first = words_before("tasks/digits.ipynb", shows_aligned_images, root)
    return figures | {"before the first aligned images": (first, MAX_BEFORE_ALIGNED)}


def main():
    "Command line: exit status 1 if something is over its limit."
    argparse.ArgumentParser(description=__doc__.split("\n")[0]).parse_args()
    for name, words in count_pages().items():
        print(f"{words:7,}  {name}{'  (core)' if name in text.CORE else ''}")
    figures = summary()
    print(f"{sum(figures[name][0] for name in text.CORE):7,}  the core")
    for name in [name for name in figures if name not in text.CORE]:
        print(f"{figures[name][0] or 0:7,}  {name} (limit {figures[name][1]:,})")
    over = [name for name, (words, limit) in figures.items() if words is None or words > limit]
    print(f"over the limit: {', '.join(over)}" if over else "all within their limits")
    return len(over) > 0


if __name__ == "__main__":
    sys.exit(main())
