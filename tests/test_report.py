"""The report of runs: one file that asks nobody for anything, runs nothing, says everything in words, and warns."""

import json
import os
from html.parser import HTMLParser

import pytest
from test_site import LOOK, MIN_CONTRAST

import preview
from neighbor_grpo.cli import main
from neighbor_grpo.flow import randn, seeded
from neighbor_grpo.lab import report
from neighbor_grpo.lab.looking import Look, summary
from neighbor_grpo.runs.pictures import Seen

EVIL = '<script>alert("1")</script> & <b>'
HELD = [dict(iteration=0, reward=0.5, sharpness=1.0, velocity_norm=1.0), dict(iteration=4, reward=0.7, sharpness=1.8)]
MINI = (
    "train sd3 --quiet --iterations 4 --groups 2 --group_size 4 --anchors 2 --steps 2 --trained_steps 1 --eval_every 2 "
    "--source miniature --height 32 --width 32 --max_sequence_length 16 --precision float32 --lora_rank 2 "
    "--lora_alpha 0 --guidance_scale 1 --train_guidance_scale 1 --eval_images 6 --eval_steps 2 --out"
)


class Page(HTMLParser):
    "What a page is made of."

    def __init__(self, text):
        super().__init__()
        self.tags, self.words = [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_data(self, data):
        self.words.append(data)


def check(text, pictures):
    "No network, no script, a text for each picture, small."
    page = Page(text)
    names = {tag for tag, _ in page.tags}
    assert not names & {"script", "link", "iframe", "object", "embed", "b"} and {"h1", "title", "main"} <= names
    for tag, attributes in page.tags:
        assert not any(name.startswith("on") for name in attributes)
        for name in ("src", "href", "xlink:href"):
            assert attributes.get(name, "data:").startswith(("data:", "#")), attributes
        if tag == "img":
            assert attributes["alt"]
        if tag == "svg":
            assert attributes["role"] == "img" and "reward from" in attributes["aria-label"]
    assert sum(tag == "img" for tag, _ in page.tags) == pictures and len(text) < 500_000
    assert report.INK not in text and "@import" not in text and "url(http" not in text
    return " ".join(page.words)


def hacked():
    "Looks at a policy whose reward rose while a judge fell."
    noise = randn((9, 3, 8, 8), seeded(0)).sigmoid()
    looks, base = [], None
    for title, images in {"before": noise, f"at 4 {EVIL}": 0.5 * noise + 0.5}.items():
        reward = images.mean((1, 2, 3))
        known = dict(reward=reward, judge=-reward, compressibility=-reward)
        seen = Seen(known, [f"{EVIL} {k}" for k in range(9)], images)
        figures = summary(seen, base, ["reward"])
        looks.append(Look(title, figures, seen, EVIL if base else "", 4 if base else 0))
        base = base or seen
    return looks


def test_a_report_is_one_safe_file():
    story = report.Story(EVIL, dict(task=EVIL), [dict(iteration=1, reward_mean=0.5)], HELD, f"ended {EVIL}")
    words = check(report.make_report([story], hacked(), {}), pictures=16)
    assert EVIL in words and json.dumps(EVIL)[1:-1] in words  # as text


def test_it_warns_in_words_of_what_left_its_bounds():
    story = report.Story("run", {}, [], HELD)
    sharp, judge = report.warnings_of(story, hacked()[1])
    assert "sharpness" in sharp and "rose to 1.80 times" in sharp and "above the bound of 1.50" in sharp
    assert "judge judge" in judge.replace(",", "") and "fell by" in judge
    fell = report.Story("run", {}, [], [HELD[0], HELD[1] | dict(reward=0.4)])
    assert len(report.warnings_of(fell, hacked()[1])) == 1  # of the judge: the looks' own reward rose
    assert "No sign left its bounds" in report.warned([report.Story("run", {}, [], HELD[:1] * 2)], [])


def test_the_toy_has_a_picture(tmp_path, capsys):
    out = tmp_path / "run"
    line = f"train toy --quiet --pretrain_steps 20 --eval_samples 40 --iterations 2 --groups 2 --out {out}"
    assert main(line.split()) == 0
    before = sorted(out.rglob("*"))
    assert main(f"report {out} --out {tmp_path / 'a.html'}".split()) == 0
    assert "before training and after" in (tmp_path / "a.html").read_text() and sorted(out.rglob("*")) == before
    check((tmp_path / "a.html").read_text(), pictures=1)
    assert main(f"report {out} --out {tmp_path / 'a.pdf'}".split()) == 1
    assert "--out must be a file that ends in .html" in capsys.readouterr().err


@pytest.mark.slow
def test_two_runs_of_the_miniature_in_a_real_browser(tmp_path):
    (tmp_path / "p.txt").write_text(f"two red circles\n{EVIL}\na red circle")
    (tmp_path / "train.txt").write_text("a blue square\na green square")
    for name in "ab":
        files = f"--prompts {tmp_path / 'train.txt'} --held_out {tmp_path / 'p.txt'}"
        assert main(f"{MINI} {tmp_path / name} {files}".split()) == 0
    page = tmp_path / "page.html"
    assert main(f"report {tmp_path}/a {tmp_path}/b --out {page}".split()) == 0
    assert EVIL in check(page.read_text(), pictures=3 * 6)
    if missing := preview.browser_missing():
        (pytest.fail if os.environ.get("CI") else pytest.skip)(missing)
    with preview.browsing() as browser:
        for width, theme in ((1000, "light"), (390, "dark")):
            tab = browser.new_page(viewport=dict(width=width, height=800), color_scheme=theme)
            asked, said = [], []
            tab.on("request", lambda request, asked=asked: asked.append(request.url))
            tab.on("console", lambda message, said=said: said.append(message.text))
            tab.goto(page.as_uri())
            found = tab.evaluate(f"{LOOK}; look({MIN_CONTRAST})")
            assert found.pop("counts")["texts"] > 50 and not any(found.values()), found
            assert [url for url in asked if not url.startswith("data:")] == [page.as_uri()] and not said
            ink = tab.evaluate("getComputedStyle(document.querySelector('svg text')).fill")
            assert ink == {"light": "rgb(17, 17, 17)", "dark": "rgb(238, 238, 238)"}[theme]
            tab.close()
