"""OCR as a reward: the field's score, its target, and real recognition of rendered words without a network."""

import random
import socket
import string
from pathlib import Path

import matplotlib
import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFont

from neighbor_grpo.rewards.judges import make_rewards, reward_names
from neighbor_grpo.rewards.ocr import reading_score, wanted_text


def written(word, draw):
    "A word in a random place, size and color on a light background."
    size, shade = draw.randint(18, 26), lambda low, high: tuple(draw.randint(low, high) for _ in range(3))
    font = ImageFont.truetype(Path(matplotlib.get_data_path()) / "fonts/ttf/DejaVuSans.ttf", size)
    picture = Image.new("RGB", (192, 64), shade(200, 255))
    ImageDraw.Draw(picture).text((draw.randint(4, 30), draw.randint(4, 30)), word, font=font, fill=shade(0, 80))
    return picture


def distance(a, b):
    "The edit distance by its recursion, a row at a time."
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        last, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            last, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, last + (x != y))
    return row[-1]


def test_the_score_is_that_of_the_field():
    draw = random.Random(0)
    for _ in range(200):
        read, wanted = ("".join(draw.choices("abC ", k=draw.randint(k, 8))) for k in (0, 1))
        a, b = ("".join(text.split()).lower() for text in (read, wanted))
        if b:
            expected = 1.0 if b in a else 1 - min(distance(a, b), len(b)) / len(b)
            assert reading_score(read, wanted) == pytest.approx(expected)


def test_the_target_is_in_the_record_or_in_quotes():
    quoted = "a sign that says \u201cGo on\u201d"
    for record, expected in [({}, "Go on"), ({"ocr": "X"}, "X"), ({"text": "Y"}, "Y"), ({"text": quoted}, "Go on")]:
        assert wanted_text(quoted, record) == expected
    nothing = [("a sign", {}), ('a ""', {}), ('a " " b', {}), ("a b", {"text": " a  b"}), ("a", {"ocr": 3})]
    for prompt, record in nothing:
        with pytest.raises(ValueError, match="prompt must be with a text in double quotes, or a field `ocr`"):
            wanted_text(prompt, record)


def test_words_are_read_without_a_network(monkeypatch, capfd):
    monkeypatch.setattr(socket.socket, "connect", lambda *_: pytest.fail("a network was asked"))
    (ocr,), _ = make_rewards("ocr")
    pictures = [written("window", random.Random(1)), Image.fromarray(np.zeros((40, 60), np.uint8))]
    assert ocr(pictures, ["a", "b"], [{"ocr": "WINDOW"}, {"ocr": "window"}]).tolist() == [1, 0]
    assert reward_names("ocr") == ["ocr"] and not any(capfd.readouterr())


@pytest.mark.slow
def test_the_right_word_scores_above_a_wrong_one_on_200_rendered_words():
    (ocr,), _ = make_rewards("ocr")
    draw, right, wrong = random.Random(7), 0, 0
    for _ in range(200):
        word = "".join(draw.choices(string.ascii_lowercase, k=draw.randint(4, 9)))
        other = list(word)
        place = draw.randrange(len(word))
        other[place] = draw.choice(sorted({*string.ascii_lowercase} - {word[place]}))  # one letter differs
        read = ocr.reader(np.array(written(word, draw))[..., ::-1], use_cls=False).txts
        read = " ".join(read or ())
        right += reading_score(read, word) > reading_score(read, "".join(other))
        wrong += reading_score(read, word) < 1
    print(right, wrong)
    assert right >= 190, (right, wrong)
