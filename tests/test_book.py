"""The book keeps its promises to a reader: short core pages, words before use, nothing from later pages, exercises."""

import ast
import json
import re

import pytest

import count_words
import neighbor_grpo
import pages
import staging

NBS = pages.ROOT / "nbs"
ORDER = pages.reading_order()
# Pages that nobody reads in order: the landing page shows the library whole, and how-to pages are looked up.
LOOKED_UP = {"index.ipynb", *(name for name in ORDER if name.startswith("help/"))}
DRAWING = {"figures", "tables"}  # how pages draw and tabulate, whatever they are about
# What all families share is shown on one of them, whose own page needs what they share.
EXAMPLES = {("models/pipeline.ipynb", "models.sd3")}
TERM = re.compile(r"^\| \[(?P<term>[^]]+)\]\(\.\./(?P<page>[^)]+)\) \|", re.MULTILINE)
HEADINGS = re.compile(r"^(#|>).*$", re.MULTILINE)


def cells_of(name):
    return pages.read_notebook(NBS / name)["cells"]


# --- how many words ---


@pytest.mark.parametrize("name", pages.CORE)
def test_a_core_page_is_short(name):
    assert count_words.words_of(cells_of(name)) <= count_words.MAX_PAGE


def test_everything_is_short():
    words = sum(count_words.count_pages().values())
    assert words <= count_words.MAX_ALL, f"{words:,} words; python tools/count_words.py lists the pages"


def test_the_method_and_the_first_aligned_images_come_soon():
    figures = count_words.summary()
    for name in ("before the method", "before the first aligned images"):
        words, limit = figures[name]
        assert words is not None and words <= limit, name


@pytest.mark.parametrize(
    "markdown, words",
    [
        ("Two words.", 2),
        ("# Head\n\n> sub", 2),
        ("$a_i + b$ is code `f(x, y)`", 4),
        ("$$\na b c\n$$\n", 0),
        ("```sh\npip install it\n```", 0),
        ("[a link](some/page.ipynb){.btn .btn-primary}", 2),
        ("<img src='a b.png' alt='three words here'>", 0),
        ("| one | two |\n|---|---|\n| three | 4 |", 4),
        ("it's well-known, isn't it", 4),
    ],
)
def test_what_a_word_is(markdown, words):
    assert count_words.count_words(markdown) == words


def test_a_page_of_reference_says_whom_it_is_for():
    "And how long it takes, in its first words."
    for name in set(ORDER) - {"index.ipynb", *pages.CORE}:
        first = [cell["source"] for cell in cells_of(name) if cell["cell_type"] == "markdown"][1]
        assert re.match(r"Reference, [a-z]+ minutes, for (those|readers) ", first), name


# --- exercises ---


def test_every_core_page_has_one_exercise():
    "The task, a cell to fill in, its check, a folded answer that passes, and a wrong answer that fails with a hint."
    for name in pages.CORE:
        cells = cells_of(name)
        heads = [n for n, cell in enumerate(cells) if re.search(r"^## Exercise\b", cell["source"], re.MULTILINE)]
        assert len(heads) == 1, f"{name}: {len(heads)} exercises"
        fill, check, answer, wrong = cells[heads[0] + 1 : heads[0] + 5]
        assert [cell["cell_type"] for cell in (fill, check, answer, wrong)] == 4 * ["code"], name
        assert re.search(r"^def answer\b", fill["source"], re.MULTILINE) and "..." in fill["source"], name
        assert re.search(r"^def check\b", check["source"], re.MULTILINE) and "Hint" in check["source"], name
        assert "Fill in" in printed(check), name
        assert pages.directives(answer["source"]).get("code-fold") == "true" and "Right" in printed(answer), name
        assert "hide" in pages.directives(wrong["source"]) and "Hint" in wrong["source"], name


def printed(cell):
    "All text that a cell left."
    return " ".join(out.get("text", "") + json.dumps(out["data"]) for out in cell["outputs"])


# --- words before use ---


def glossary():
    "The page that explains each term."
    text = "\n".join(cell["source"] for cell in cells_of("help/glossary.ipynb") if cell["cell_type"] == "markdown")
    return {match["term"]: match["page"] for match in TERM.finditer(text)}


def prose(name, headings):
    "What a core page says: no code, no equations, no titles of other pages; every mark of bold still in it."
    parts = [cell["source"] for cell in cells_of(name) if cell["cell_type"] == "markdown"]
    text = pages.without_math(pages.without_code("\n\n".join(parts)))
    text = re.sub(r"\[[^]]*\]\([^)]*\)|<[^>]*>|\{[^}]*\}", " ", text)
    return text if headings else HEADINGS.sub("", text)


def pattern(term):
    "A term and its plural, not the name of the method."
    words = r"\s+".join(map(re.escape, term.split()))
    return re.compile(rf"(?<![\w-]){words}(?:s|es)?(?![\w-])(?!\s+GRPO)", re.IGNORECASE)


def test_the_glossary_has_terms_of_every_core_page():
    assert set(glossary().values()) == {*pages.CORE}


@pytest.mark.parametrize("term, page", glossary().items())
def test_no_term_before_its_page(term, page):
    for name in pages.CORE[: pages.CORE.index(page)]:
        found = pattern(term).search(prose(name, headings=True))
        assert not found, f"{name} says {term!r}, which {page} explains"


@pytest.mark.parametrize("term, page", glossary().items())
def test_a_term_is_bold_where_it_is_explained(term, page):
    text = prose(page, headings=False)
    found = pattern(term).search(text)
    assert found, f"{page} never says {term!r}"
    bold = [match.span() for match in re.finditer(r"\*\*[^*]+\*\*", text)]
    where = text[max(0, found.start() - 40) : found.end() + 40]
    assert any(start <= found.start() and found.end() <= end for start, end in bold), f"{term!r} in {where!r}"


# --- nothing from later pages ---


def exports():
    "The page of each module."
    found = {}
    for name in ORDER:
        for cell in cells_of(name):
            for module in re.findall(r"^#\| default_exp (\S+)", cell["source"], re.MULTILINE):
                found[module] = name
    return found


def imported(source):
    "The modules of the library that a cell imports, anywhere in it."
    try:
        tree = ast.parse(pages.split_options(source)[1])
    except SyntaxError:  # a magic
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module == "neighbor_grpo":
            yield from (neighbor_grpo._OFFERED.get(alias.name, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("neighbor_grpo."):
            yield node.module.removeprefix("neighbor_grpo.")
        elif isinstance(node, ast.Import):
            names = (alias.name for alias in node.names)
            yield from (name.removeprefix("neighbor_grpo.") for name in names if name.startswith("neighbor_grpo."))


def test_what_is_imported():
    source = "#| export\nimport neighbor_grpo.flow\ndef f():\n    from neighbor_grpo.lab.cost import a\n"
    assert {*imported(source + "from neighbor_grpo import cli, train")} == {"flow", "lab.cost", "cli", "training"}


@pytest.mark.parametrize("name", [name for name in ORDER if name not in LOOKED_UP])
def test_no_import_from_a_later_page(name):
    page_of = exports()
    later = {*ORDER[ORDER.index(name) + 1 :]}
    used = {module for cell in cells_of(name) if cell["cell_type"] == "code" for module in imported(cell["source"])}
    # A function may import what its caller asks for by name; the cell that asks must not be earlier than the module.
    used -= DRAWING | {module for page, module in EXAMPLES if page == name}
    found = {module: page_of[module] for module in used if page_of.get(module) in later}
    assert not found, found


# --- links ---


def shown(name):
    "What a page shows as Markdown: its texts and its outputs."
    for cell in cells_of(name):
        if cell["cell_type"] == "markdown":
            yield cell["source"]
        yield from (out["data"].get("text/markdown", "") for out in cell.get("outputs", []))


def test_no_link_inside_a_link():
    "nbdev makes a link of each name of the library in backticks, also of one that is the text of a link already."
    names = {name for name, *_ in staging.symbols(pages.ROOT / "neighbor_grpo")}
    for page in ORDER:
        linked = re.findall(r"\[`([\w.]+)`\]\(", "\n".join(shown(page)))
        assert not names.intersection(linked), f"{page}: the text of these links needs no backticks"
