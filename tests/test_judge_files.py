"""The judges in `examples/judges`: GenEval's rules on boxes and its server, and what UnifiedReward may write."""

import json
import os
import subprocess
import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from tiny import clip_tokenizer
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.mask2former.image_processing_pil_mask2former import Mask2FormerImageProcessorPil

from neighbor_grpo.rewards.remote import RemoteReward

FOLDER = Path(__file__).resolve().parent.parent / "examples" / "judges"
SIDE = 512


def loaded(name):
    "A file as a module, as a plain import would make it, which loads no weights."
    spec = spec_from_file_location(name, FOLDER / f"{name}.py")
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


geneval, unified = loaded("serve_geneval"), loaded("serve_unifiedreward")
few = settings(max_examples=50)


def color_of(found):
    "In these tests an object carries its color where its mask would be."
    return found.mask


# --- GenEval: where a box is ---


@st.composite
def boxes(draw):
    "Whole pixels, so that mirrors, shifts and powers of two are exact."
    (left, right), (top, bottom) = (
        sorted(draw(st.lists(st.integers(0, SIDE), min_size=2, max_size=2, unique=True))) for _ in range(2)
    )
    return left, top, right, bottom


def mirror(box):
    return SIDE - box[2], box[1], SIDE - box[0], box[3]


def turn(box):
    return box[1], box[0], box[3], box[2]


SIDEWAYS = {"left of": "right of", "right of": "left of", "above": "above", "below": "below"}
TURNED = {"left of": "above", "above": "left of", "right of": "below", "below": "right of"}


@given(boxes(), boxes(), st.integers(-99, 99), st.sampled_from((0.25, 2)))
@few
def test_places_follow_mirrors_turns_shifts_and_sizes(a, b, shift, scale):
    here = geneval.relations(a, b)
    assert geneval.relations(b, a) == {geneval.MIRRORED[word] for word in here}
    assert geneval.relations(mirror(a), mirror(b)) == {SIDEWAYS[word] for word in here}
    assert geneval.relations(turn(a), turn(b)) == {TURNED[word] for word in here}
    assert geneval.relations(*(tuple(scale * (side + shift) for side in box) for box in (a, b))) == here
    assert len(here) <= 2 and geneval.relations(a, a) == set()


@pytest.mark.parametrize(
    "box, expected",
    [
        ((0, 100, 20, 120), {"left of"}),
        ((0, 180, 20, 200), {"left of", "below"}),
        ((105, 0, 125, 20), {"above"}),
        ((104, 100, 124, 120), set()),  # 4 pixels are a tenth of both widths
        ((108, 100, 128, 120), set()),  # 8 - 4 is half of 8, and no more
        ((109, 100, 129, 120), {"right of"}),
    ],
)
def test_where_a_box_is_from_another(box, expected):
    assert geneval.relations(box, (100, 100, 120, 120)) == expected


# --- GenEval: verdicts ---


@st.composite
def cases(draw):
    "A record as GenEval makes them, and sure objects of its classes, which are often right."
    names, record = ("cat", "dog", "bus"), dict(tag="any", include=[])
    for number in range(draw(st.integers(1, 3))):
        clause = {"class": names[number], "count": draw(st.integers(1, 3))}
        if draw(st.booleans()):
            clause["color"] = draw(st.sampled_from(("red", "blue")))
        if number and draw(st.booleans()):
            clause["position"] = [draw(st.sampled_from(sorted(geneval.MIRRORED))), draw(st.integers(0, number - 1))]
        record["include"].append(clause)
    kept = {}
    for clause in record["include"]:
        count = clause["count"] + draw(st.sampled_from((0, 0, 0, -1, 1, 4)))
        colors = st.sampled_from((clause.get("color", "red"),) * 4 + ("green",))
        kept[clause["class"]] = [geneval.Found(clause["class"], 0.9, draw(boxes()), draw(colors)) for _ in range(count)]
    return record, kept


@given(cases())
@few
def test_all_is_right_where_each_verdict_says_so(case):
    record, kept = case
    geneval.check_record(record)
    correct, grade = geneval.is_correct(kept, record, color_of), geneval.grade(kept, record, color_of)
    counted = all(len(kept[clause["class"]]) == clause["count"] for clause in record["include"])
    assert 0 <= grade <= 1 and (grade == 1) == (correct and counted)
    for clause in record["include"]:  # one more, of which the detector is less sure, changes nothing here
        more = kept | {clause["class"]: [*kept[clause["class"]], geneval.Found("", 0.8, (0, 0, 1, 1), "green")]}
        assert geneval.is_correct(more, record, color_of) >= correct
        if len(kept[clause["class"]]) >= clause["count"]:
            assert geneval.is_correct(more, record, color_of) == correct


@given(cases())
@few
def test_verdicts_do_not_care_which_way_a_picture_is_mirrored(case):
    record, kept = case
    other = json.loads(json.dumps(record))
    for clause in other["include"]:
        if "position" in clause:
            clause["position"][0] = SIDEWAYS[clause["position"][0]]
    mirrored = {name: [each._replace(box=mirror(each.box)) for each in found] for name, found in kept.items()}
    for verdict in (geneval.is_correct, geneval.grade):
        assert verdict(kept, record, color_of) == verdict(mirrored, other, color_of)


@pytest.mark.parametrize("count", (1, 2, 3))
@pytest.mark.parametrize("found", range(8))
def test_counts(count, found):
    record = dict(tag="counting", include=[{"class": "cat", "count": count}])
    kept = {"cat": [geneval.Found("cat", 0.95, (0, 0, 9, 9))] * found}
    assert geneval.is_correct(kept, record, color_of) == (found >= count)
    record["exclude"] = [{"class": "cat", "count": count + 1}]
    assert geneval.is_correct(kept, record, color_of) == (found == count)
    assert geneval.grade(kept, record, color_of) == max(0, 1 - abs(found - count) / count)
    record["exclude"] += [{"class": "dog", "count": 1}]
    kept["dog"] = [geneval.Found("dog", 0.95, (0, 0, 9, 9))]
    assert not geneval.is_correct(kept, record, color_of)
    assert geneval.grade(kept, record, color_of) == max(0, 1 - abs(found - count) / count) / 2


def test_colors_and_places_by_hand():
    red, blue, low = (
        geneval.Found(name, 0.9, box, color)
        for name, box, color in (
            ("cat", (0, 0, 9, 9), "red"),
            ("cat", (20, 0, 29, 9), "blue"),
            ("dog", (0, 90, 9, 99), "red"),
        )
    )
    two = {"class": "cat", "count": 2, "color": "red"}
    below = {"class": "dog", "count": 1, "position": ["below", 0]}
    verdict = lambda kept, *include: tuple(
        kind(kept, dict(tag="any", include=include), color_of) for kind in (geneval.is_correct, geneval.grade)
    )
    assert verdict({"cat": [red, blue]}, two) == (False, 0.75)  # the count, and half of the colors
    assert verdict({"cat": [red, red]}, two) == (True, 1)
    assert verdict({"cat": [red]}, two) == (False, 0.25)  # half of the count
    one = {"class": "cat", "count": 1, "color": "red"}
    assert verdict({"cat": [red, blue]}, one) == (True, 0)  # the surest one is red
    assert verdict({"cat": [blue], "dog": [low]}, one, below) == (False, 0.5)  # no red cat to be below of
    assert verdict({"cat": [red], "dog": [low]}, one, below) == (True, 1)
    assert verdict({"cat": [red], "dog": [low]}, one, below | {"position": ["above", 0]}) == (False, 0.75)
    pair, right = {"class": "cat", "count": 2}, {"class": "dog", "count": 1, "position": ["right of", 0]}
    between = low._replace(box=(10, 0, 15, 9))  # right of the first cat only
    assert verdict({"cat": [red, blue], "dog": [between]}, pair, right)[0] is False
    assert verdict({"cat": [red, blue], "dog": [between._replace(box=(40, 0, 45, 9))]}, pair, right) == (True, 1)


def test_only_what_the_detector_is_sure_of_counts():
    found = [geneval.Found("cat", score, (0, 0, 1, 1)) for score in (0.3, 0.31, 0.95, 0.9, 0.91)]
    scores = lambda tag: [each.score for each in geneval.sure_of(found, tag)["cat"]]
    assert scores("colors") == [0.95, 0.91, 0.9, 0.31] and scores("counting") == [0.95, 0.91]
    assert len(geneval.sure_of(found * 9, "colors")["cat"]) == 16


def test_an_object_is_where_its_mask_is():
    "In a picture of 160 x 96 that the detector sees as 80 x 48, padded to 96 x 64, a quarter as fine."
    classes, masks = torch.zeros(1, 2, 81), torch.full((1, 2, 16, 24), -20.0)
    classes[0, 0, geneval.NAMES.index("dog")] = classes[0, 1, 80] = 20
    masks[0, :, 3:7, 10:16] = 20
    masks[0, :, 13:] = masks[0, :, :, 21:] = 20  # in the padding
    mask = torch.zeros(1, 64, 96)
    mask[:, :48, :80] = 1
    seen = transformers.BatchFeature(dict(pixel_values=torch.zeros(1, 3, 64, 96), pixel_mask=mask))
    models = object.__new__(geneval.Models)
    models.device, models.prepare = "cpu", lambda picture, return_tensors: seen
    models.detector = lambda **_: SimpleNamespace(class_queries_logits=classes, masks_queries_logits=masks)
    (found,) = models.find(Image.new("RGB", (160, 96)))
    assert found.name == "dog" and found.score > 0.9 and found.mask.shape == (96, 160)
    left, top, right, bottom = found.box
    inside = found.mask[top:bottom, left:right]
    assert found.mask.sum() == inside.sum() and inside.mean() > 0.9  # corners are round
    assert all(abs(side - place) <= 1 for side, place in zip(found.box, (80, 24, 128, 56)))


WRONG = {
    "a tag": dict(include=[{"class": "cat", "count": 1}]),
    "objects to include": dict(tag="colors"),
    "objects to exclude": dict(tag="a", include=[{"class": "cat", "count": 1}], exclude={}),
    "classes of COCO": dict(tag="a", include=[{"class": "mouse", "count": 1}]),
    "counts of at least 1": dict(tag="a", include=[{"class": "cat", "count": True}]),
    "colors of red": dict(tag="a", include=[{"class": "cat", "count": 1, "color": "grey"}]),
    "positions of left of": dict(tag="a", include=[{"class": "cat", "count": 1, "position": ["near", 0]}]),
    "an earlier clause": dict(tag="a", include=[{"class": "cat", "count": 1, "position": ["above", 0]}]),
}


@pytest.mark.parametrize("what", WRONG)
def test_a_record_that_is_not_genevals_is_refused(what):
    with pytest.raises(ValueError, match=f"not a record of GenEval, with .*{what}"):
        geneval.graded([Image.new("RGB", (8, 8))], ["a"], [WRONG[what]])


# --- UnifiedReward: what it wrote ---

ANSWER = "Alignment Score (1-5): 2.694700002670288\nCoherence Score (1-5): 2\nStyle Score (1-5): 5.0"


def test_an_answer_is_three_numbers():
    expected = dict(Alignment=2.694700002670288, Coherence=2.0, Style=5.0)
    assert unified.read(ANSWER) == unified.read(f"\n{ANSWER} \n".replace("\n", "\n\n")) == expected


@pytest.mark.parametrize(
    "answer",
    [
        "",
        "4",
        f"{ANSWER} ... (cut off)",
        f"Here is my evaluation:\n{ANSWER}",
        f"{ANSWER}\n{ANSWER}",
        f"{ANSWER}.",
        ANSWER.replace("5.0", "5.1"),
        ANSWER.replace("5.0", "0.9"),
        ANSWER.replace("5.0", "-3"),
        ANSWER.replace("5.0", "5."),
        ANSWER.replace("5.0", "Z"),
        ANSWER.replace("5.0", "4/5"),
        ANSWER.replace("5.0", "4,5"),
        ANSWER.replace("5.0", "nan"),
        ANSWER.replace("5.0", "4e0"),
        ANSWER.replace("5.0", "\u0664"),
        ANSWER.replace("Style", "style"),
        ANSWER.replace("(1-5)", "(1-10)"),
        ANSWER.replace("Coherence Score (1-5): 2\n", ""),
        "\n".join(reversed(ANSWER.splitlines())),
    ],
)
def test_no_other_answer_becomes_a_reward(answer):
    with pytest.raises(ValueError, match="a score from 1 to 5 for each of Alignment, Coherence, Style, and is"):
        unified.read(answer)


def test_each_picture_gets_its_own_numbers(monkeypatch):
    class Fake:
        def answers(self, pictures, prompts):
            assert len(pictures) == len(prompts) <= unified.AT_ONCE
            return [ANSWER.replace("5.0", f"{1 + int(prompt) / 10}") for prompt in prompts]

    monkeypatch.setattr(unified, "judge", Fake)
    prompts = [str(number) for number in range(2 * unified.AT_ONCE + 3)]
    pictures, records = [Image.new("RGB", (8, 8))] * len(prompts), [{}] * len(prompts)
    style = unified.style(pictures, prompts, records)
    assert style == pytest.approx([1 + number / 10 for number in range(len(prompts))])
    assert unified.alignment(pictures, prompts, records) == [2.694700002670288] * len(prompts)
    expected = [(2.694700002670288 + 2 + score) / 3 for score in style]
    assert unified.mean(pictures, prompts, records) == pytest.approx(expected)


# --- GenEval, served ---


def write_detector(folder):
    "A tiny Mask2Former that takes whatever it sees for persons, but is not sure of its masks."
    backbone = transformers.SwinConfig(
        embed_dim=8, depths=[1] * 4, num_heads=[1, 1, 2, 2], window_size=4,
        out_features=[f"stage{k}" for k in range(1, 5)],
    )  # fmt: skip
    model = transformers.Mask2FormerForUniversalSegmentation(transformers.Mask2FormerConfig(
        backbone_config=backbone, feature_size=32, mask_feature_size=32, hidden_dim=32, encoder_feedforward_dim=32,
        encoder_layers=1, decoder_layers=2, num_attention_heads=2, dim_feedforward=32, num_queries=5, num_labels=80,
    ))  # fmt: skip
    with torch.no_grad():
        model.class_predictor.weight.zero_()
        model.class_predictor.bias.zero_()[0] = 12
    model.save_pretrained(folder)
    Mask2FormerImageProcessorPil(size=dict(shortest_edge=64, longest_edge=96)).save_pretrained(folder)


def write_clip(folder):
    tokenizer = clip_tokenizer()
    text = dict(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=77, bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    vision = dict(
        hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=32, patch_size=8
    )
    config = transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)
    transformers.CLIPModel(config).save_pretrained(folder)
    tokenizer.model_max_length = 77
    tokenizer.save_pretrained(folder)
    CLIPImageProcessorPil(size=dict(shortest_edge=32), crop_size=32).save_pretrained(folder)


@pytest.mark.slow
def test_geneval_is_served(tmp_path):
    write_detector(tmp_path / "detector")
    write_clip(tmp_path / "clip")
    folders = dict(GENEVAL_DETECTOR=str(tmp_path / "detector"), GENEVAL_CLIP=str(tmp_path / "clip"))
    code = "import sys; from neighbor_grpo.cli import main; sys.exit(main())"
    file = f"{FOLDER / 'serve_geneval.py'}:correct"
    command = [sys.executable, "-c", code, *f"serve --rewards {file} --port 0".split()]
    process = subprocess.Popen(command, env=os.environ | folders, stdout=subprocess.PIPE, text=True)
    try:
        reward = RemoteReward(process.stdout.readline().split()[-1], timeout=30, patience=30)
        clauses = [dict(count=1, color=color) for color in geneval.COLORS]
        clauses += [dict(count=1), dict(count=6), {"class": "dog", "count": 1}]
        records = [dict(tag="colors", include=[{"class": "person"} | clause]) for clause in clauses]
        records.append(dict(tag="counting", include=[{"class": "person", "count": 1}]))
        noise = torch.rand(1, 3, 48, 60, generator=torch.Generator().manual_seed(0)).expand(len(records), -1, -1, -1)
        scores = reward(noise, ["a"] * len(records), records).tolist()
        assert sum(scores[:10]) == 1  # it has one of ten colors
        assert scores[10:] == [1, 0, 0, 0]  # a person, not six, no dog, and not sure enough to be counted
        with pytest.raises(RuntimeError, match="not a record of GenEval, with a tag"):
            reward(noise[:1], ["a"], [{}])
    finally:
        process.terminate()
        process.wait(30)
