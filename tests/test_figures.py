"""Pictures under a slider: what a page holds of them, whoever reads it; colors that differ."""

import colorsys
import io
import itertools
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser

import matplotlib
import matplotlib.pyplot as plt
import PIL.Image
import pytest
from matplotlib.colors import to_rgb

from neighbor_grpo import figures

matplotlib.use("agg")
NASTY = """</script> <b> "two" & 'one' ü"""


def draw(value):
    figure, axis = plt.subplots(figsize=(1, 0.6))
    axis.plot([0, 1], [0, value])
    return figure


class Elements(HTMLParser):
    "The start tags of a page with their attributes, and its scripts."

    def __init__(self, page):
        super().__init__()
        self.found, self.scripts = [], []
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.found.append((tag, dict(attributes)))

    def handle_data(self, data):
        if self.lasttag == "script":
            self.scripts.append(data)

    def one(self, tag):
        return next(attributes for name, attributes in self.found if name == tag)


def player(**options):
    options = {"name": "sigma", "alt": lambda value: f"Frame {value}.", "dpi": 40} | options
    return Elements(figures.flipbook(draw, [1, 2, 3], **options).data)


def frames_of(page):
    return json.loads(re.search(r"frames = (\[.*?\]);\n", page.scripts[0]).group(1))


def test_a_page_without_scripts_shows_a_described_frame():
    page = player(start=1)
    image = page.one("img")
    assert image["alt"] == "Frame 2." and image["src"].startswith("data:image/webp;base64,")
    assert (image["width"], image["height"]) == ("40", "24")
    assert "hidden" in page.one("div")


def test_all_frames_are_in_the_page_and_the_first_is_stored_once():
    frames = frames_of(player(start=1))
    assert [frame["text"] for frame in frames] == ["sigma = 1", "sigma = 2", "sigma = 3"]
    assert [frame["alt"] for frame in frames] == ["Frame 1.", "Frame 2.", "Frame 3."]
    assert [bool(frame["image"]) for frame in frames] == [True, False, True]


def test_the_last_frame_may_come_first():
    page = player(start=-1)
    assert page.one("input")["value"] == page.one("input")["max"] == "2"
    assert page.one("img")["alt"] == "Frame 3."


def test_the_slider_says_what_it_sets():
    page = player(start=1)
    assert page.one("input")["aria-label"] == "sigma" and page.one("input")["aria-valuetext"] == "sigma = 2"
    assert player(name="").one("input")["aria-label"] == "frame"


@pytest.mark.parametrize("play", [True, False])
def test_a_button_only_for_what_plays_and_nothing_starts_alone(play):
    page = player(play=play)
    assert ("button" in [tag for tag, _ in page.found]) == play
    assert page.scripts[0].count("setInterval") == 1
    assert "prefers-reduced-motion" in page.scripts[0]


def test_texts_cannot_leave_their_place():
    page = player(name=NASTY, alt=lambda value: NASTY, show=lambda value: NASTY)
    assert [tag for tag, _ in page.found] == ["figure", "img", "div", "input", "output", "script"]
    assert page.one("img")["alt"] == page.one("input")["aria-label"] == NASTY
    assert [(frame["alt"], frame["text"]) for frame in frames_of(page)] == 3 * [(NASTY, f"{NASTY} = {NASTY}")]
    assert re.fullmatch(r"[\w-]+", page.one("figure")["id"])


def test_players_of_one_setting_have_ids_of_their_own():
    pages = [player() for _ in range(3)]
    names = [page.one("figure")["id"] for page in pages]
    assert len(set(names)) == 3
    for page, name in zip(pages, names, strict=True):
        assert f'getElementById("{name}")' in page.scripts[0]


def test_frames_of_different_sizes_are_refused():
    with pytest.raises(ValueError, match="one size"):
        figures.flipbook(lambda value: plt.figure(figsize=(value, 1)), [1, 2], "x", str, dpi=40)


DOCUMENT = """
const element = () => ({events: {}, style: {}, set: {}, addEventListener(name, f) { this.events[name] = f; },
                        setAttribute(name, value) { this.set[name] = value; }});
const parts = {img: element(), input: element(), output: element(), button: element(), ".flipbook-controls": element()};
Object.assign(parts.img, {src: "second"}); Object.assign(parts.input, {value: 1});
parts[".flipbook-controls"].hidden = true;
let tick = null;
globalThis.document = {getElementById: () => ({querySelector: name => parts[name]})};
globalThis.matchMedia = () => ({matches: CALM});
globalThis.Image = class {};
globalThis.setInterval = (f, pause) => { tick = f; globalThis.pause = pause; return 1; };
globalThis.clearInterval = () => { tick = null; };
SCRIPT
const seen = [];
const look = () => seen.push([+parts.input.value, parts.img.alt, parts.output.textContent, tick !== null]);
seen.push(parts[".flipbook-controls"].hidden, tick !== null);
parts.input.value = 0; parts.input.events.input(); look();
parts.button.events.click(); look();
tick(); look(); tick(); look();
parts.button.events.click(); look(); parts.button.events.click(); look();
console.log(JSON.stringify([globalThis.pause, ...seen]));
"""


@pytest.mark.skipif(not shutil.which("node"), reason="Node.js is not installed")
@pytest.mark.parametrize("calm", [True, False])
def test_the_script_moves_the_frames(calm):
    "The slider shows a frame; the button plays to the last one, stops there, starts again, and pauses."
    script = player(start=1, play=True, pause=100).scripts[0]
    program = DOCUMENT.replace("CALM", json.dumps(calm)).replace("SCRIPT", script)
    answer = subprocess.run(["node", "-e", program], capture_output=True, text=True, check=True).stdout
    pause, hidden, moving, *seen = json.loads(answer)
    assert (pause, hidden, moving) == (1500 if calm else 100, False, False)
    frame = [[k, f"Frame {k + 1}.", f"sigma = {k + 1}"] for k in range(3)]
    assert seen == [frame[0] + [False], frame[0] + [True], frame[1] + [True], frame[2] + [False],
                    frame[0] + [True], frame[0] + [False]]  # fmt: skip


def test_an_animation_holds_its_last_frame(tmp_path):
    path = tmp_path / "wave.webp"
    figures.animate(draw, [1, 2, 3], str(path), pause=100, dpi=40, hold=500)
    picture = PIL.Image.open(io.BytesIO(path.read_bytes()))
    durations = []
    for k in range(picture.n_frames):
        picture.seek(k)
        picture.load()
        durations.append(picture.info["duration"])
    assert (picture.size, durations) == ((40, 24), [100, 100, 600])
    assert plt.get_fignums() == []


MEANINGS = "GOOD BAD ANCHOR TARGET OLD NEW DATA NOISE".split()
PALETTES = [{name: getattr(figures, name) for name in MEANINGS}, figures.SOLVERS, figures.ALGORITHMS]


@pytest.mark.parametrize("palette", PALETTES, ids=["meanings", "solvers", "algorithms"])
def test_the_colors_of_a_palette_differ(palette):
    for (one, a), (other, b) in itertools.combinations(palette.items(), 2):
        apart = sum((x - y) ** 2 for x, y in zip(to_rgb(a), to_rgb(b), strict=True)) ** 0.5
        assert apart > 0.15, f"{one} and {other}"


def test_advantages_go_from_bad_over_gray_to_good():
    low, middle, high = (figures.advantage_colors(x)[:3] for x in (0.0, 0.5, 1.0))
    assert low == pytest.approx(to_rgb(figures.BAD)) and high == pytest.approx(to_rgb(figures.GOOD))
    assert colorsys.rgb_to_hsv(*middle)[1] < 0.02


def test_texts_are_escaped_once():
    page = figures.flipbook(draw, [1], "a & b", lambda value: "c & d", dpi=40).data
    assert 'alt="c &amp; d"' in page and "a & b" in frames_of(Elements(page))[0]["text"]
