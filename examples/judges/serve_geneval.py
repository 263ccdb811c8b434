"""GenEval behind an address: neighbor-grpo serve --rewards serve_geneval.py:graded

`correct` is GenEval's verdict, 0 or 1. `graded` says how much is right, in [0, 1]: the mean over all that is asked for,
after the reward of Flow-GRPO. The record of a prompt is its line of GenEval's `evaluation_metadata.jsonl`: `tag`,
`include` and perhaps `exclude`. GENEVAL_DETECTOR and GENEVAL_CLIP name other checkpoints: folders, or names on the hub.

Rules, thresholds, names and CLIP's sentences are those of https://github.com/djghosh13/geneval. The detector is the
same network with the weights of its authors (46.3 mask AP on COCO) in place of mmdetection's (46.1), which need mmcv.
How often the two verdicts differ has not been measured: compare scores from here with each other, not with published
ones.
"""

import os
from functools import cache
from typing import NamedTuple

import numpy as np
import torch
import transformers
from PIL import Image
from torch.nn import functional as F

DETECTOR = os.environ.get("GENEVAL_DETECTOR", "facebook/mask2former-swin-small-coco-instance")
CLIP = os.environ.get("GENEVAL_CLIP", "openai/clip-vit-large-patch14")
SURE, SURE_TO_COUNT = 0.3, 0.9  # the detector's score of an object must be above
MOST = 16  # objects of one class
NEAR = 0.1  # of the sizes of both, by which two objects have to be apart
COLORS = "red orange yellow green blue purple pink brown black white".split()
SENTENCES = ("a photo of a {color} {name}", "a photo of a {color}-colored {name}", "a photo of a {color} object")
MIRRORED = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
NAMES = (
    "person,bicycle,car,motorcycle,airplane,bus,train,truck,boat,traffic light,fire hydrant,stop sign,"
    "parking meter,bench,bird,cat,dog,horse,sheep,cow,elephant,bear,zebra,giraffe,backpack,umbrella,handbag,"
    "tie,suitcase,frisbee,skis,snowboard,sports ball,kite,baseball bat,baseball glove,skateboard,surfboard,"
    "tennis racket,bottle,wine glass,cup,fork,knife,spoon,bowl,banana,apple,sandwich,orange,broccoli,carrot,"
    "hot dog,pizza,donut,cake,chair,couch,potted plant,bed,dining table,toilet,tv,laptop,computer mouse,"
    "tv remote,computer keyboard,cell phone,microwave,oven,toaster,sink,refrigerator,book,clock,vase,scissors,"
    "teddy bear,hair drier,toothbrush"
).split(",")  # of COCO's 80 classes, in its order


class Found(NamedTuple):
    "An object in a picture."

    name: str
    score: float  # of the detector
    box: tuple  # left, top, right, bottom, in pixels
    mask: object = None  # (H, W), true where the object is


def check_record(record):
    "A ValueError that says what is wrong with a record."

    def require(good, what):
        if not good:
            raise ValueError(f"not a record of GenEval, with {what}: {record}")

    require(isinstance(record.get("tag"), str), "a tag")
    require(isinstance(record.get("include"), list) and record["include"], "a list of objects to include")
    require(isinstance(record.get("exclude", []), list), "a list of objects to exclude")
    for number, clause in enumerate(record["include"] + record.get("exclude", [])):
        require(isinstance(clause, dict) and clause.get("class") in NAMES, "classes of COCO by GenEval's names")
        require(type(clause.get("count")) is int and clause["count"] >= 1, "counts of at least 1")
        require(clause.get("color", "red") in COLORS, f"colors of {', '.join(COLORS)}")
        relation, target = clause.get("position", ("above", 0))
        require(relation in MIRRORED, f"positions of {', '.join(MIRRORED)}")
        earlier = type(target) is int and 0 <= target < number
        require("position" not in clause or earlier, "positions to the number of an earlier clause")


def sure_of(found, tag):
    "What the detector is sure of, by name, the surest first."
    least = SURE_TO_COUNT if tag == "counting" else SURE
    kept = {}
    for each in sorted(found, key=lambda each: -each.score):
        same = kept.setdefault(each.name, [])
        if each.score > least and len(same) < MOST:
            same.append(each)
    return kept


def relations(a, b):
    """Where box a is from box b, in at most two words: the distance of the centers along a side, less NEAR of both
    sizes, counts if it is more than half of their whole distance."""
    a, b = (np.array(box, float).reshape(2, 2) for box in (a, b))
    away = a.mean(0) - b.mean(0)
    sizes = (a[1] - a[0]) + (b[1] - b[0])
    x, y = np.sign(away) * np.maximum(abs(away) - NEAR * sizes, 0) / max(np.linalg.norm(away), 1e-9)
    words = {"left of": x < -0.5, "right of": x > 0.5, "above": y < -0.5, "below": y > 0.5}
    return {word for word, holds in words.items() if holds}


def placed(objects, clause, groups):
    "Whether all objects of a clause are where it wants them, from all of the group it names."
    relation, target = clause["position"]
    group = groups[target]
    return group is not None and all(relation in relations(a.box, b.box) for a in objects for b in group)


def is_correct(kept, record, color_of):
    """GenEval's verdict: the surest objects, as many as are wanted, have the color and the place; more of them do not
    matter, unless they are excluded."""
    groups = []  # of objects for each clause; None where it is not fulfilled
    for clause in record["include"]:
        objects = kept.get(clause["class"], [])[: clause["count"]]
        good = len(objects) == clause["count"]
        if good and "color" in clause:
            good = all(color_of(each) == clause["color"] for each in objects)
        if good and "position" in clause:
            good = placed(objects, clause, groups)
        groups.append(objects if good else None)
    excluded = any(len(kept.get(clause["class"], [])) >= clause["count"] for clause in record.get("exclude", []))
    return None not in groups and not excluded


def grade(kept, record, color_of):
    """The mean over all that is wanted: 1 minus the relative error of each count, the share that has the color, and 0
    or 1 for a place and for a class to exclude that is not also included; colors and places get 0 where the count is
    wrong. Flow-GRPO's goes below 0 for many objects too many, and gives a wrong place half."""
    parts, groups = [], []
    for clause in record["include"]:
        objects, wanted = kept.get(clause["class"], []), clause["count"]
        good = len(objects) == wanted
        parts.append(max(0.0, 1 - abs(wanted - len(objects)) / wanted))
        if "color" in clause:
            parts.append(sum(color_of(each) == clause["color"] for each in objects) / wanted if good else 0.0)
            good = parts[-1] == 1
        if "position" in clause:
            good = good and placed(objects, clause, groups)
            parts.append(float(good))
        groups.append(objects if good else None)
    included = {clause["class"] for clause in record["include"]}
    for clause in record.get("exclude", []):
        if clause["class"] not in included:
            parts.append(float(len(kept.get(clause["class"], [])) < clause["count"]))
    return sum(parts) / len(parts)


class Models:
    "A detector of objects, and CLIP for their colors."

    def __init__(self, device=None):
        self.device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        load = transformers.AutoModelForUniversalSegmentation.from_pretrained
        self.detector = load(DETECTOR).to(self.device).eval()
        self.prepare = transformers.AutoImageProcessor.from_pretrained(DETECTOR, backend="pil")
        classes = self.detector.config.num_labels
        if classes != len(NAMES):
            raise ValueError(f"{DETECTOR} knows {classes} classes, not COCO's {len(NAMES)}")
        self.clip = transformers.CLIPModel.from_pretrained(CLIP).to(self.device).eval()
        self.words = transformers.AutoTokenizer.from_pretrained(CLIP)
        self.crop = transformers.AutoImageProcessor.from_pretrained(CLIP, backend="pil")
        self.colors = cache(self.colors)

    def find(self, picture):
        """The objects in a picture: a query's probability of a class times the mean probability of its mask, for the
        100 best pairs of query and class, as in mmdetection."""
        given = self.prepare(picture, return_tensors="pt").to(self.device)
        found = self.detector(**given)
        chances = found.class_queries_logits[0].softmax(-1)[:, :-1]
        best, places = chances.flatten().topk(len(chances))
        height, width = (int(given["pixel_mask"][0].any(side).sum()) for side in (1, 0))  # without the padding
        masks = F.interpolate(found.masks_queries_logits, given["pixel_values"].shape[-2:], mode="bilinear")
        masks = F.interpolate(masks[..., :height, :width], picture.size[::-1], mode="bilinear")[0]
        for chance, place in zip(best.tolist(), places.tolist()):
            query, number = divmod(place, len(NAMES))
            mask = masks[query] > 0
            if chance > SURE and mask.any():
                score = chance * masks[query][mask].sigmoid().mean().item()
                rows, columns = (mask.any(side).nonzero()[:, 0] for side in (1, 0))
                box = (int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1)
                yield Found(NAMES[number], score, box, mask.cpu().numpy())

    def colors(self, name):
        "A direction of CLIP for each color of an object, (10, D)."
        sentences = [sentence.format(color=color, name=name) for color in COLORS for sentence in SENTENCES]
        given = self.words(sentences, padding=True, return_tensors="pt").to(self.device)
        features = F.normalize(self.clip.get_text_features(**given).pooler_output, dim=-1)
        return F.normalize(features.view(len(COLORS), len(SENTENCES), -1).mean(1), dim=-1)

    def color_of(self, picture, found):
        "The color of an object, cut out on gray."
        gray = Image.new("RGB", picture.size, "#999")
        part = Image.composite(picture, gray, Image.fromarray(found.mask)).crop(found.box)
        given = self.crop(part, return_tensors="pt").to(self.device)
        features = self.clip.get_image_features(**given).pooler_output
        return COLORS[int((self.colors(found.name) @ features[0]).argmax())]


models = cache(Models)


@torch.inference_mode()
def judge(verdict, pictures, records):
    "A verdict on each picture."
    for record in records:
        check_record(record)
    scores = []
    for picture, record in zip(pictures, records):
        picture = picture.convert("RGB")
        kept = sure_of(models().find(picture), record["tag"])
        scores.append(float(verdict(kept, record, lambda found, picture=picture: models().color_of(picture, found))))
    return scores


def correct(pictures, prompts, records):
    return judge(is_correct, pictures, records)


def graded(pictures, prompts, records):
    return judge(grade, pictures, records)


if __name__.startswith("neighbor_grpo_reward"):  # named by --rewards: what is missing is said before the first picture
    models()
