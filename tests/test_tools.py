"""The checks of the documentation find what they are for, and the README is what the landing page says."""

import shutil

import pytest

import lint_docs
import make_readme
import pages
import staging

PICTURE = [{"output_type": "display_data", "data": {"image/png": "iVBORw0KGgo="}}]
FRONT = {"cell_type": "raw", "source": "---\ntitle: GRPO\ndescription: How a group is scored\n---"}
TITLE = {"cell_type": "markdown", "id": "t", "source": "# GRPO\n\n> How a group is scored"}
RAW_LINK = "```python\nf(\n    x, # of [`g`](https://example.org/g.html#g)\n)\n```"
ONWARD = {"cell_type": "markdown", "id": "o", "source": "Next: [steps](rivals/sde.ipynb)."}


def prose(source):
    return {"cell_type": "markdown", "id": "x", "source": source}


def code(source, outputs=()):
    outputs = [{"data": {}, **output} for output in outputs]
    return {"cell_type": "code", "id": "x", "source": source, "outputs": outputs}


def site(*cells, title=TITLE, front=FRONT, last=ONWARD):
    "A site of two pages, the first of which holds `cells`."
    page = lint_docs.Page("grpo.ipynb", [title, *cells, last], [front, *cells, last])
    following = lint_docs.Page("rivals/sde.ipynb", [prose("## A step")], [prose("## A step\n\n## A step\n\n[]{#mark}")])
    return lint_docs.Site(pages.ROOT, [page, following])


def findings(kind, *cells, **parts):
    built = site(*cells, **parts)
    return [what for _, what in lint_docs.CHECKS[kind](built.pages[0], built)]


SOUND = [
    prose(
        "## A heading\n\n$x_t$ costs \\$5, `$HOME`\n\n$$\\begin{aligned} a &= b \\\\ c &= d \\end{aligned}$$ {#eq-one}"
    ),
    prose("See [up](#a-heading), @eq-one, [there](rivals/sde.ipynb#a-step-1), [mark](./rivals/sde.ipynb#mark)"),
    prose("$f[x](y)$,"),
    prose("[paper](https://arxiv.org/abs/2511.16955), `flow.py`, `torch.nothing`, `[no](link)`."),
    prose('![](styles.css){width=50% fig-alt="a dot"}'),
    code("#| hide\n" + "x" * 200),
    code(
        "f()", [{"output_type": "display_data", "data": {"text/markdown": "[a](https://a.org)\n\n```python\nf()\n```"}}]
    ),
    prose('![](styles.css){fig-alt="a dot"}'),
    code('#| fig-alt: "a dot"\n#| echo: false\nplot()', PICTURE),
    code("#| exports\ndef f():\n    import math"),
    code("#| export\nimport torch"),
    code("print(1)", [{"output_type": "stream", "name": "stdout", "text": "1"}]),
    code("#| hide\nimport nbdev; nbdev.nbdev_export()"),
]

# (check, a cell that it must find)
BROKEN = [
    ("placeholder", prose("TODO: explain")),
    ("option", code("#| fig-alt: a: b\nplot()")),
    ("option", code("#| fig-alt:\n#|   - a dot\nplot()")),
    ("staging", code("import torch\nx = 1")),
    ("shown", code("#| export\ndef f():\n    return 1")),
    ("figure", code("plot()", PICTURE)),
    ("figure", code('#| fig-alt: ""\nplot()', PICTURE)),
    ("figure", code('#| fig-alt: "one"\nplot()', 2 * PICTURE)),
    ("figure", code("show()", [{"output_type": "display_data", "data": {"text/html": "<img src='x.png'>"}}])),
    ("figure", prose("![](styles.css)")),
    ("figure", prose("![a caption](styles.css)")),
    ("figure", prose('![a caption](styles.css){fig-alt="a dot"}')),
    ("figure", prose('![](styles.css){fig-alt=""}')),
    ("width", code("x = " + "1" * 97)),
    ("width", code("f()", [{"output_type": "stream", "name": "stdout", "text": "short\n" + "x" * 89}])),
    ("signature", code("f()", [{"output_type": "display_data", "data": {"text/markdown": RAW_LINK}}])),
    ("figure", prose('![](styles.css){fig-alt=""}')),
    ("output", code("print(1)")),
    ("output", code("f()", [{"output_type": "error", "ename": "ValueError", "evalue": "no"}])),
    ("output", code("f()", [{"output_type": "stream", "name": "stderr", "text": "UserWarning: no"}])),
    ("size", code("f()", [{"output_type": "stream", "name": "stdout", "text": "x" * (lint_docs.MAX_OUTPUT + 1)}])),
    ("size", code("f()", 5 * [{"output_type": "stream", "name": "stdout", "text": "x" * (lint_docs.MAX_PAGE // 4)}])),
    ("link", prose("[gone](99_gone.ipynb)")),
    ("link", prose("[gone](#gone)")),
    ("link", prose("[gone](rivals/sde.ipynb#gone)")),
    ("link", prose("[published name](rivals/sde.html)")),
    ("link", prose("[odd](htp://example.org)")),
    ("link", prose("[split](https://example.org/a b)")),
    ("link", prose("[paper](https://arxiv.org/abs/25.16955)")),
    ("link", prose("[file](https://github.com/neighbor-grpo/neighbor_grpo/blob/main/GONE.md)")),
    ("link", prose('<a href="gone.html">gone</a>')),
    ("link", prose("by @eq-gone")),
    ("symbol", prose("`flow.no_such_function`")),
    ("symbol", prose("`neighbor_grpo.no_such_module.f()`")),
    ("onward", prose("[back](flow.ipynb)")),
    ("equation", prose("$\\frac{a}$")),
    ("equation", prose("$$\na\n\nb\n$$")),
    ("equation", prose("it costs $5")),
    ("equation", prose("\\begin{align} a \\end{align}")),
]


@pytest.mark.parametrize("kind", sorted(set(lint_docs.CHECKS) - {"sidebar"}))
def test_sound_page_has_no_findings(kind):
    assert findings(kind, *SOUND) == []


@pytest.mark.parametrize("kind, cell", BROKEN, ids=[f"{kind}-{i}" for i, (kind, _) in enumerate(BROKEN)])
def test_defect_is_found(kind, cell):
    if kind == "equation" and "frac" in cell["source"] and pages.katex_missing():
        pytest.skip(pages.katex_missing())
    exported = code("#| exports\nx = 1")
    last = cell if kind == "onward" else ONWARD
    assert findings(kind, exported, cell, last=last)


@pytest.mark.parametrize("target, found", [("../rivals/sde.ipynb#mark", 0), ("../styles.css", 0), ("sde.ipynb", 1)])
def test_links_are_relative_to_the_folder_of_their_page(target, found):
    built = site()
    inside = lint_docs.Page("lab/compare.ipynb", [], [prose(f"[there]({target})")])
    assert len(list(lint_docs.CHECKS["link"](inside, built))) == found


@pytest.mark.parametrize(
    "title, front, words",
    [
        (prose("Just text"), prose(""), "no title"),
        (prose("# Title"), {"cell_type": "raw", "source": "---\ntitle: Title\n---"}, "no description"),
        (prose("# Title\n\n> About\n\nLost."), FRONT, "Lost."),
        (prose("# Title\n\n> About\n> more"), FRONT, "drops"),
    ],
)
def test_title_cell(title, front, words):
    assert any(words in what for what in findings("title", title=title, front=front))


def test_page_outside_of_the_sidebar_is_found():
    built = site()
    stray = lint_docs.Page("98_stray.ipynb", [TITLE], [FRONT])
    assert list(lint_docs.CHECKS["sidebar"](stray, built))
    assert not list(lint_docs.CHECKS["sidebar"](built.pages[0], built))


@pytest.mark.parametrize(
    "heading, name",
    [
        ("What GRPO needs", "what-grpo-needs"),
        ("1. Steps, and `euler_step`!", "steps-and-euler_step"),
        ("With $x_t$ and [a link](a.ipynb)", "with-x_t-and-a-link"),
        ("Named {#given .class}", "given"),
        ("NeighborGRPO.rollout", "neighborgrpo.rollout"),
        ("100 %", "section"),
    ],
)
def test_heading_ids(heading, name):
    assert lint_docs.heading_id(heading) == name


@pytest.mark.parametrize("longest, found", [([88] * 48 + [89], 1), ([88] * 49 + [89], 0)])
def test_one_printed_output_in_fifty_may_be_wide(longest, found):
    cells = [code("f()", [{"output_type": "stream", "name": "stdout", "text": "x" * width}]) for width in longest]
    assert len(findings("width", *cells)) == found


def test_all_pages_install_on_colab_or_none_does():
    built = site()
    page = built.pages[0]
    assert findings("colab") == []
    built.pages[1].source.append(code(staging.install_cell("rivals/sde.ipynb", built.config)))
    assert len(list(lint_docs.CHECKS["colab"](page, built))) == 1
    page.source.insert(1, code(staging.install_cell("grpo.ipynb", built.config)))
    assert list(lint_docs.CHECKS["colab"](page, built)) == []


def test_core_pages_lead_to_core_pages_and_reference_to_reference():
    order = pages.reading_order()
    assert pages.following("index.ipynb") == pages.CORE[0]
    assert [pages.following(name) for name in pages.CORE[:-1]] == pages.CORE[1:]
    reference = [name for name in order if name not in pages.CORE and name != "index.ipynb"]
    assert [pages.following(name) for name in reference] == [*reference[1:], None]
    # After the method comes what stands after it in the sidebar.
    assert pages.following(pages.CORE[-1]) == order[order.index(pages.CORE[-1]) + 1]
    assert pages.following("stray.ipynb") is None


def test_names_and_order():
    order = pages.reading_order()
    assert order[0] == "index.ipynb"
    assert pages.html_name("tasks/Digits.ipynb") == "tasks/digits.html"
    assert sorted(order) == pages.notebooks(pages.ROOT / "nbs")


@pytest.mark.parametrize(
    "markdown, readme",
    [
        ("[a](tasks/digits.ipynb)", "[a](nbs/tasks/digits.ipynb)"),
        ("[a](./flow.ipynb#symbols)", "[a](nbs/flow.ipynb)"),
        ("![dots](images/dots.png){width=50%}", "![dots](nbs/images/dots.png)"),
        ('![](images/dots.png){fig-alt="Three dots."}', "![Three dots.](nbs/images/dots.png)"),
        ('<img src="images/dots.png" alt="dots">', '<img src="nbs/images/dots.png" alt="dots">'),
        ("[run](help/commands.ipynb){.btn}", "[run](nbs/help/commands.ipynb)"),
        ("[l](https://github.com/neighbor-grpo/neighbor_grpo/blob/main/LICENSE)", "[l](LICENSE)"),
        ("[paper](https://arxiv.org/abs/2511.16955) [up](#up)", "[paper](https://arxiv.org/abs/2511.16955) [up](#up)"),
        ("$a_i$ and `$b$`", "$`a_i`$ and `$b$`"),
        ("$$\na_i\n$$", "```math\na_i\n```"),
        ("::: {.note}\ntext\n:::", "text\n"),
        ("## Heading {#id}", "## Heading"),
        ("```sh\necho $A [x](y) $B\n```", "```sh\necho $A [x](y) $B\n```"),
    ],
)
def test_readme_markdown(markdown, readme):
    assert make_readme.prose(markdown, pages.ROOT) == readme


def test_readme_out_of_date_is_found(tmp_path):
    for name in ("settings.ini", "README.md"):
        shutil.copy(pages.ROOT / name, tmp_path)
    shutil.copytree(pages.ROOT / "nbs", tmp_path / "nbs", symlinks=True)
    make_readme.write(tmp_path)
    assert make_readme.outdated(tmp_path) == []
    with (tmp_path / "README.md").open("a") as readme:
        readme.write("edited by hand\n")
    assert make_readme.outdated(tmp_path) == ["README.md"]
