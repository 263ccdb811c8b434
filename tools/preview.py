"""Look at the site without Quarto: stage, render with smalldocs, then serve it or take pictures of pages.

    python tools/preview.py                                      # the whole site, served on port 4200
    python tools/preview.py method lab/compare                   # pictures of two pages, in _docs/pictures/
    python tools/preview.py method --width 390 --theme dark      # as a telephone in the dark shows it
    python tools/preview.py method --at one-leaping-step         # what a screen shows from this heading on

Only pages that changed are staged again. smalldocs and its fastcore 2 live in an environment of their own beside
nbdev's: `.smalldocs/`, made on first use, or the folder that the environment variable SMALLDOCS names. Pictures need
Chromium and `pip install -e '.[site]'`. No page asks another host: KaTeX is npm's copy, and pictures refuse the rest.
Quarto's site looks nearly the same; it also has a menu that folds all code.
"""

import argparse
import contextlib
import functools
import http.server
import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import venv
from pathlib import Path

import yaml

import lint_docs
import pages as text

SMALLDOCS = "smalldocs==0.5.4"
CDN = re.compile(r"https://cdn\.jsdelivr\.net/npm/katex@[\d.]+/dist/")
WEB_FONT = re.compile(r"@import url\(https://fonts\.googleapis\.com[^)]*\);")
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
# No sandbox, because it refuses to run as root; and nothing that the browser would ask its maker's hosts for.
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"]
FLAGS += ["--disable-background-networking", "--disable-component-update"]
SLICE = 1600  # pixels of one picture: a page is many screens long


# --- rendering ---


def environment(root=text.ROOT):
    "The folder of smalldocs's environment, made if it does not exist."
    folder = Path(os.environ.get("SMALLDOCS") or Path(root) / ".smalldocs")
    if not (folder / "bin" / "smalldocs").exists():
        print(f"Making an environment with {SMALLDOCS} in {folder}, once", file=sys.stderr)
        venv.create(folder, with_pip=True)
        subprocess.run([folder / "bin" / "python", "-m", "pip", "install", "--quiet", SMALLDOCS], check=True)
    return folder


def render(root=text.ROOT):
    "Render what is staged in `_proc` to `_docs/preview`; the folder of the site."
    root, library = Path(root), environment(root)
    missing = text.katex_missing()
    if missing:
        raise SystemExit(missing)
    site = root / "_docs" / "preview"
    with tempfile.TemporaryDirectory() as folder:
        project = Path(folder) / "site"
        shutil.copytree(root / "_proc", project, ignore=shutil.ignore_patterns("_docs", ".quarto"))
        adapt(project, vendored(library, "cosmo.min.css"))
        command = [library / "bin" / "smalldocs", "render", "-q", project]
        process = subprocess.run(command, capture_output=True, text=True)
        # Every page names its output file, and the links to other sites' files are checked by the lint.
        notes = [line for line in process.stderr.splitlines() if "output-file is not read" not in line]
        print(*notes, sep="\n", file=sys.stderr, end="\n" if notes else "")
        process.check_returncode()
        shutil.rmtree(site, ignore_errors=True)
        shutil.copytree(project / "_docs", site)
    make_local(site)
    return site


def vendored(library, name):
    "The text of one of the themes that come with smalldocs."
    return next(library.glob(f"lib/python*/site-packages/smalldocs/assets/vendor/bootswatch/{name}")).read_text()


def adapt(project, theme):
    "Write what smalldocs cannot make from Quarto's options: it compiles no Sass and knows no grid."
    config = yaml.safe_load((project / "_quarto.yml").read_text(encoding="utf-8"))
    options = config["format"]["html"]
    # Bootstrap holds a dark variant of each theme; as a stylesheet of its own it needs no attribute.
    for mode, css in {"light": theme, "dark": theme.replace("[data-bs-theme=dark]", ":root")}.items():
        (project / f"cosmo-{mode}.css").write_text(WEB_FONT.sub("", css) + properties(project, mode), encoding="utf-8")
    config["smalldocs"] = {"theme": {"light": "cosmo-light.css", "dark": "cosmo-dark.css"}}
    widths = {name.replace("-width", ""): width for name, width in options["grid"].items()}
    with (project / options["css"]).open("a", encoding="utf-8") as styles:
        styles.write(":root{" + "".join(f"--sd-{name}-width:{width};" for name, width in widths.items()) + "}")
    for option in ("html-math-method", "grid", "code-tools", "respect-user-color-scheme"):
        options.pop(option)
    (project / "_quarto.yml").write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")


def properties(project, mode):
    "The colors of `light.scss` or `dark.scss` as Bootstrap's custom properties."
    sass = (project / f"{mode}.scss").read_text(encoding="utf-8")
    found = dict(re.findall(r"^\$([\w-]+):\s*(#[0-9a-f]{6});", sass, re.MULTILINE))
    found["link-hover-color"] = found["link-color"]
    lines = [f"--bs-{name}:{value};--bs-{name}-rgb:{rgb(value)};" for name, value in found.items()]
    return ":root{color-scheme:" + mode + ";" + "".join(lines) + "}"


def rgb(color):
    "`#1a5fb4` as `26, 95, 180`."
    return ", ".join(str(part) for part in bytes.fromhex(color.removeprefix("#")))


def make_local(site):
    "Take KaTeX from npm's copy, and no typeface from the network."
    shutil.copytree(text.KATEX / "node_modules" / "katex" / "dist", site / "site_libs" / "katex")
    for path in site.rglob("*.html"):
        up = "../" * (len(path.relative_to(site).parts) - 1)
        html = path.read_text(encoding="utf-8")
        path.write_text(CDN.sub(f"{up}site_libs/katex/", html), encoding="utf-8")
    for path in (site / "site_libs" / "themes").glob("*.css"):
        path.write_text(WEB_FONT.sub("", path.read_text(encoding="utf-8")), encoding="utf-8")


# --- serving ---


class Quiet(http.server.SimpleHTTPRequestHandler):
    "Serves files without a line for each."

    def log_message(self, *_):
        pass


@contextlib.contextmanager
def serving(site, port=0):
    "The address of a server of this folder, while the block runs."
    handler = functools.partial(Quiet, directory=str(site))
    with http.server.ThreadingHTTPServer(("127.0.0.1", port), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield f"http://127.0.0.1:{server.server_port}/"
        finally:
            server.shutdown()


# --- pictures ---


def browser_missing():
    "Why there is no browser to look with, or None if there is."
    try:
        import playwright  # noqa: F401
    except ImportError:
        return "playwright is not installed: run `pip install -e '.[site]'`"
    if not find_browser():
        return "Chromium is not installed (Debian's package is `chromium`); CHROMIUM may name another one's path"
    return None


def find_browser():
    "The path of Chromium, or None."
    return os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, BROWSERS)), None)


@contextlib.contextmanager
def browsing():
    "Chromium, driven by playwright, while the block runs."
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=find_browser(), args=FLAGS)
        try:
            yield browser
        finally:
            browser.close()


def open_page(browser, address, width=1440, theme="light", height=900):
    "A tab at an address, all equations set. `refused` holds its requests to other hosts, `messages` its errors."
    tab = browser.new_page(viewport={"width": width, "height": height}, color_scheme=theme)
    tab.refused, tab.messages = [], []

    def refuse(route):
        tab.refused.append(route.request.url)
        route.abort()

    def note(message):
        if message.type in ("error", "warning") and not any(url in message.location["url"] for url in tab.refused):
            tab.messages.append(f"{message.text} {message.location['url']}")

    tab.route(lambda url: not url.startswith(("http://127.0.0.1:", "data:", "blob:")), refuse)
    tab.on("console", note)
    tab.on("pageerror", lambda error: tab.messages.append(str(error)))
    tab.goto(address, wait_until="load")
    tab.evaluate("document.fonts.ready")
    return tab


def take(browser, address, page, folder, width, theme, at=None):
    "Write pictures of one page; their paths."
    tab = open_page(browser, f"{address}{page}.html", width, theme)
    name = f"{page.replace('/', '-')}-{width}-{theme}"
    if at:
        path = folder / f"{name}-{at}.png"
        tab.locator(f"[id='{at}']").first.evaluate("element => element.scrollIntoView()")
        tab.screenshot(path=path)
        paths = [path]
    else:
        # A window as tall as the page: what sticks to the window then stands at the top, once.
        height = tab.evaluate("document.documentElement.scrollHeight")
        tab.set_viewport_size({"width": width, "height": height})
        tops = range(0, height, SLICE)
        paths = [folder / f"{name}-{number:02d}.png" for number, _ in enumerate(tops)]
        for top, path in zip(tops, paths, strict=True):
            box = {"x": 0, "y": top, "width": width, "height": min(SLICE, height - top)}
            tab.screenshot(path=path, clip=box)
    for url in sorted(set(tab.refused)):
        print(f"{page}: asks another host, refused: {url[:100]}", file=sys.stderr)
    tab.close()
    return paths


def pictures(names, site, folder, width, theme, at):
    "Write pictures of pages of a rendered site, and print their paths."
    missing = browser_missing()
    if missing:
        raise SystemExit(missing)
    folder.mkdir(parents=True, exist_ok=True)
    with serving(site) as address, browsing() as browser:
        for name in names:
            page = name.removeprefix("nbs/").removesuffix(".ipynb").removesuffix(".html")
            print(*take(browser, address, page, folder, width, theme, at), sep="\n")


def main():
    "Command line."
    parser = argparse.ArgumentParser(
        description="Stage and render the site without Quarto, then serve it or take pictures of pages."
    )
    parser.add_argument("pages", nargs="*", metavar="PAGE", help="pages to take pictures of, such as lab/compare")
    parser.add_argument("--width", type=int, default=1440, help="of the window (default 1440; a telephone has 390)")
    parser.add_argument("--theme", choices=["light", "dark"], default="light", help="(default light)")
    parser.add_argument("--at", metavar="ID", help="one screen from this heading on, instead of the whole page")
    parser.add_argument("--to", type=Path, help="folder of the pictures (default _docs/pictures)")
    parser.add_argument("--root", type=Path, default=text.ROOT, help="the checkout (default: this one)")
    parser.add_argument("--no-stage", action="store_true", help="render what is already in _proc/")
    parser.add_argument("--port", type=int, default=4200, help="where the site is served (default 4200)")
    arguments = parser.parse_args()
    root = arguments.root.resolve()
    to = (arguments.to or root / "_docs" / "pictures").resolve()
    if not arguments.no_stage:
        lint_docs.stage(root, force=False)
    site = render(root)
    if arguments.pages:
        pictures(arguments.pages, site, to, arguments.width, arguments.theme, arguments.at)
    else:
        with serving(site, arguments.port) as address:
            print(f"{address} (end with Control-C)", flush=True)
            with contextlib.suppress(KeyboardInterrupt):
                threading.Event().wait()


if __name__ == "__main__":
    sys.exit(main())
