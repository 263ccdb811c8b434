"""The rendered site in a real browser: it fits the screen, can be read, asks no other host, and works by keyboard."""

import json
import os
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import matplotlib.pyplot as plt
import pytest
from filelock import FileLock

import lint_docs
import pages
import preview
from neighbor_grpo import figures

pytestmark = pytest.mark.slow

LOOK = (Path(__file__).parent / "look.js").read_text(encoding="utf-8")
MIN_CONTRAST = 4.5  # what WCAG asks of ordinary text
MAX_WIDE_OUTPUTS = 0.02  # of all outputs, that scroll at 1440 pixels
NOT_COPIED = ("_proc", "_docs", "node_modules", ".*", "__pycache__", "*.egg-info", "results", "build", "dist")


def missing():
    "Why the site cannot be looked at here, or None."
    if sys.version_info < (3, 11):
        return "smalldocs needs Python 3.11"
    return pages.katex_missing() or preview.browser_missing()


def needed():
    "Skips where there is no browser; in CI that is a failure."
    if missing():
        (pytest.fail if os.environ.get("CI") and sys.version_info >= (3, 11) else pytest.skip)(missing())


def rendered(folder):
    "The site of this checkout, staged and rendered in a copy of it."
    checkout = folder / "checkout"
    if not checkout.exists():
        ignore = shutil.ignore_patterns(*NOT_COPIED)
        shutil.copytree(pages.ROOT, checkout, symlinks=True, ignore=ignore)
        shutil.copytree(pages.ROOT / "nbs" / "results", checkout / "nbs" / "results")
    here = os.getcwd()
    try:
        lint_docs.stage(checkout)
        return preview.render(checkout)
    finally:
        os.chdir(here)


def look(tab, page, width, theme):
    "All faults of one page as `(kind, page, width, theme, what)`, and how much there was to look at."
    found = tab.evaluate(f"{LOOK}; look({MIN_CONTRAST})")
    counts = found.pop("counts")
    if width < 1440:
        found.pop("code"), found.pop("outputs")
    return [[kind, page, width, theme, what] for kind, faults in found.items() for what in faults], counts


def look_at(browser, address, page):
    "A page on a screen and on a telephone, in the light and in the dark."
    faults, counts = [], {}
    for width, theme in ((1440, "light"), (390, "dark")):
        tab = preview.open_page(browser, f"{address}{page}", width, theme)
        seen, here = look(tab, page, width, theme)
        faults += seen + [["console", page, width, theme, message] for message in tab.messages]
        faults += [["other host", page, width, theme, url[:100]] for url in tab.refused]
        if width == 1440:
            counts = here
            faults += [["keyboard", page, width, theme, what] for what in by_keyboard(tab, counts)]
        tab.close()
    return faults, counts


def by_keyboard(tab, counts):
    "What a keyboard cannot do to the pictures under sliders and the films of a page."
    players = tab.locator(".flipbook")
    counts["players"], counts["films"] = players.count(), 0
    for k in range(players.count()):
        player = players.nth(k)
        slider, image, button = player.locator("input[type=range]"), player.locator("img"), player.locator("button")
        for key, back in (("ArrowRight", "Home"), ("End", "Home")):
            slider.press(back)
            first, said = image.get_attribute("src"), slider.get_attribute("aria-valuetext")
            slider.press(key)
            if image.get_attribute("src") == first or slider.get_attribute("aria-valuetext") == said:
                yield f"player {k}: {key} on the slider changes nothing"
        if not slider.get_attribute("aria-label"):
            yield f"player {k}: the slider has no name"
        if button.count():
            counts["films"] += 1
            slider.press("Home")
            first = image.get_attribute("src")
            button.press("Enter")
            try:
                tab.wait_for_function(
                    "([img, src]) => img.src !== src", arg=[image.element_handle(), first], timeout=5000
                )
            except Exception:
                yield f"player {k}: Enter on the button starts nothing"
            button.press("Enter")


SOUND = """<!doctype html><html lang="en"><title>Sound</title><body style="color-scheme:light dark"><main>
<h1>Sound</h1><p>Words</p><img alt="a dot" src="dot.svg"><pre><code>short</code></pre>
<span class="math"><span class="katex">x</span></span>{player}</main></body></html>"""
DOT = '<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"><circle r="4"/></svg>'
LONG = "x" * 400
# (kind, what replaces what)
FAULTS = [
    ("wide", "<p>", "<p style='width:1600px'>"),
    ("wide", "Words", f"<span style='white-space:nowrap'>{LONG}</span>"),
    ("faint", "<p>", "<p style='color:#777;background:#ddd'>"),
    ("faint", "<p>", "<p style='opacity:.4'>"),
    ("undescribed", "a dot", ""),
    ("broken", "dot.svg", "gone.svg"),
    ("unset", '<span class="katex">x</span>', "x"),
    ("unset", "Words", '<span class="katex-error">x</span>'),
    ("code", "<pre><code>short", f"<pre style='overflow-x:auto'><code>{LONG}"),
    ("outputs", "<pre><code>short", f"<div class='cell-output'><pre style='overflow-x:auto'><code>{LONG}"),
    ("console", "<p>", "<script>console.error('oh')</script><p>"),
    ("console", "<p>", "<script>nothing()</script><p>"),
    ("other host", "dot.svg", "https://example.org/dot.svg"),
    ("keyboard", 'slider.addEventListener("input"', 'slider.addEventListener("mouseup"'),
    ("keyboard", 'button.addEventListener("click"', 'button.addEventListener("dblclick"'),
    ("keyboard", 'aria-label="', 'data-label="'),
]


@pytest.fixture(scope="module")
def look_at_text(tmp_path_factory):
    "Looks at a page that is given as text; the kinds of its faults."
    needed()
    folder = tmp_path_factory.mktemp("pages")
    (folder / "dot.svg").write_text(DOT)

    def kinds(html):
        (folder / "page.html").write_text(html, encoding="utf-8")
        return {fault[0] for fault in look_at(browser, address, "page.html")[0]}

    with preview.serving(folder) as address, preview.browsing() as browser:
        yield kinds


@pytest.fixture(scope="module")
def sound():
    "A page without a fault, with a picture under a slider."

    def draw(height):
        figure, axis = plt.subplots(figsize=(2, 1))
        axis.bar([0], [height])
        return figure

    player = figures.flipbook(draw, [1, 2, 3], "height", lambda height: f"a bar of {height}", play=True)
    return SOUND.format(player=player.data)


def test_a_sound_page_has_no_fault(look_at_text, sound):
    assert look_at_text(sound) == set()


@pytest.mark.parametrize("kind, old, new", FAULTS)
def test_each_fault_is_found(kind, old, new, look_at_text, sound):
    assert old in sound
    assert kind in look_at_text(sound.replace(old, new))


def look_at_all(folder):
    "All pages of a rendered site: `faults` and `counts`."
    faults, counts = [], {}
    with preview.serving(folder) as address, preview.browsing() as browser:
        for path in sorted(folder.rglob("*.html")):
            page = path.relative_to(folder).as_posix()
            seen, counts[page] = look_at(browser, address, page)
            faults += seen
    return {"faults": faults, "counts": counts}


@pytest.fixture(scope="session")
def site(tmp_path_factory, worker_id):
    "What was found on all pages: `faults` and `counts`; one worker looks, the others read its report."
    needed()
    folder = tmp_path_factory.getbasetemp()
    folder = folder if worker_id == "master" else folder.parent
    report = folder / "site.json"
    with FileLock(folder / "site.lock"):
        if not report.exists():
            # A thread of its own: playwright allows one browser for each, and `look_at_text` may hold one.
            with ThreadPoolExecutor(1) as thread:
                found = thread.submit(look_at_all, rendered(folder)).result()
            report.write_text(json.dumps(found), encoding="utf-8")
    return json.loads(report.read_text(encoding="utf-8"))


def faults(site, kind):
    "One line for each fault of a kind."
    lines = [
        f"{page} ({width} px, {theme}): {what}" for other, page, width, theme, what in site["faults"] if other == kind
    ]
    return "".join(f"\n  {line}" for line in lines)


def total(site, what):
    return sum(counts.get(what, 0) for counts in site["counts"].values())


def test_there_was_something_to_look_at(site):
    assert set(site["counts"]) >= {pages.html_name(name) for name in pages.reading_order()} | {"404.html", "api.html"}
    for what in ("texts", "code", "outputs", "equations", "images", "players", "films"):
        assert total(site, what) > 0, what


@pytest.mark.parametrize(
    "kind",
    ["wide", "faint", "undescribed", "broken", "unset", "code", "console", "other host", "keyboard"],
)
def test_no_page_has_a_fault(kind, site):
    if faults(site, kind):
        pytest.fail(faults(site, kind), pytrace=False)


def test_few_outputs_are_wider_than_their_box(site):
    wide = [fault for fault in site["faults"] if fault[0] == "outputs"]
    if len(wide) > MAX_WIDE_OUTPUTS * total(site, "outputs"):
        pytest.fail(f"{len(wide)} of {total(site, 'outputs')}:{faults(site, 'outputs')}", pytrace=False)
