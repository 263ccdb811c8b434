"""Scenes: captions, layouts, and a verifier that knows what was drawn and is not fooled by what was not."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from malformed import GROUND, PALETTE, TRUE, coloured, cover, gallery, perturbed
from scipy import ndimage

from neighbor_grpo.flow import seeded
from neighbor_grpo.tasks.scenes import (
    COLOURS,
    EXTENT,
    MOST,
    NUMBERS,
    RADII,
    RELATIONS,
    REST,
    SHAPES,
    SIZE,
    TOLERANCE,
    Caption,
    Layout,
    Thing,
    all_captions,
    clearance,
    draw_layout,
    find,
    free,
    paint,
    render,
    split_captions,
    templates,
    verify,
    words,
)

KINDS = ("single", "count", "relation")
EVERY = {kind: all_captions(kind) for kind in KINDS}
NAMES = list(COLOURS)


def some_captions(kind, count, seed=0):
    "Captions of a kind at random."
    return [EVERY[kind][i] for i in torch.randint(len(EVERY[kind]), (count,), generator=seeded(seed, 0)).tolist()]


def some_scenes(kind, count, seed=0):
    "Captions of a kind at random, their layout, their images."
    chosen = some_captions(kind, count, seed)
    layout = draw_layout(chosen, seeded(seed, 1))
    return chosen, layout, render(layout)


def judged(images, captions):
    "Strict and graded scores, in portions."
    parts = [verify(images[i : i + 250], captions[i : i + 250]) for i in range(0, len(images), 250)]
    return (torch.cat(part) for part in zip(*parts))


def accepted(images):
    "Whether any caption of a single shape passes, for each image: the one for its first blob decides."
    found = find(images)
    first = torch.searchsorted(found.image.contiguous(), torch.arange(len(images)))
    captions = [
        Caption(Thing(NAMES[found.colour[b]], SHAPES[found.shape[b]]))
        if b < len(found.image) and found.image[b] == n
        else EVERY["single"][0]
        for n, b in enumerate(first.tolist())
    ]
    return verify(images, captions)[0] == 1


def with_first(caption, **changes):
    "The same caption, but for something about its first thing."
    first = caption.first
    return Caption(Thing(**(vars(first) | changes)), caption.relation, caption.second)


# --- captions ---


def test_captions_read_as_english():
    assert str(Caption(Thing("green", "triangle", 3))) == "three green triangles"
    assert (
        str(Caption(Thing("red", "circle"), "left of", Thing("blue", "square"))) == "a red circle left of a blue square"
    )
    assert str(Caption(Thing("cyan", "square"))) == "a cyan square"


@pytest.mark.parametrize("kind, count", [("single", 6 * 3), ("count", 6 * 3 * 3), ("relation", 18 * 17 * 4)])
def test_all_captions_are_listed_once(kind, count):
    texts = [str(caption) for caption in EVERY[kind]]
    assert len(texts) == len(set(texts)) == count
    assert all(caption.kind == kind for caption in EVERY[kind])


def test_captions_use_a_small_vocabulary():
    assert words() == sorted(set(words())) and len(words()) == 21
    used = {word for captions in EVERY.values() for caption in captions for word in str(caption).split()}
    assert used == set(words())


@pytest.mark.parametrize("kind", ["count", "relation"])
def test_parts_are_disjoint_and_complete(kind):
    parts = split_captions(kind)
    assert sorted(str(c) for part in parts.values() for c in part) == sorted(map(str, EVERY[kind]))
    sizes = {name: len(part) / len(EVERY[kind]) for name, part in parts.items()}
    assert sizes == pytest.approx({"unseen": 1 / 6, "held": 1 / 3, "train": 1 / 2})


@pytest.mark.parametrize("kind, part", list(itertools.product(["count", "relation"], ["unseen", "held", "train"])))
def test_every_part_holds_every_word(kind, part):
    every = {word for caption in EVERY[kind] for word in str(caption).split()}
    assert {word for caption in split_captions(kind)[part] for word in str(caption).split()} == every


def test_relations_go_both_ways_in_space():
    assert {tuple(-x for x in way) for way in RELATIONS.values()} == set(RELATIONS.values())


# --- layouts and images ---


@pytest.mark.parametrize("kind", KINDS)
def test_one_seed_is_one_layout(kind):
    first, again, other = (some_scenes(kind, 20, seed)[1] for seed in (3, 3, 4))
    assert all(torch.equal(a, b) for a, b in zip(vars(first).values(), vars(again).values()))
    assert not torch.equal(first.centre, other.centre)


@pytest.mark.parametrize("kind", KINDS)
def test_layouts_keep_gaps_sizes_and_relations(kind):
    captions, layout, _ = some_scenes(kind, 300, 5)
    there = layout.radius > 0
    assert there.sum(1).tolist() == [len(caption.things) for caption in captions]
    boxes = layout.centre.repeat(1, 1, 2) + EXTENT[layout.shape] * layout.radius[..., None]
    assert boxes[there].min() >= 1 - 1e-4 and boxes[there].max() <= SIZE - 1 + 1e-4
    low, high = RADII[kind]
    assert layout.radius[there].min() >= low and layout.radius[there].max() <= high
    for a, b in itertools.combinations(range(there.shape[1]), 2):
        gap = torch.maximum(boxes[:, a, :2] - boxes[:, b, 2:], boxes[:, b, :2] - boxes[:, a, 2:]).amax(1)
        assert gap[there[:, a] & there[:, b]].min() >= 2 - 1e-4
    if kind == "relation":
        way = torch.tensor([RELATIONS[caption.relation] for caption in captions]).float()
        assert clearance(layout.centre[:, 0] - layout.centre[:, 1], way, 8.0, 0.6).min() >= 0


def test_mixed_kinds_in_one_batch():
    captions = [EVERY["single"][0], EVERY["relation"][7], EVERY["count"][2], EVERY["relation"][500]]
    assert verify(render(draw_layout(captions, seeded(0))), captions)[0].tolist() == [1, 1, 1, 1]


def test_free_sees_neighbours_and_border():
    layout = Layout(
        torch.ones(4, 2, dtype=torch.long),
        torch.zeros(4, 2, dtype=torch.long),
        torch.tensor([[[10.0, 10], [20, 10]], [[10, 10], [15, 10]], [[10, 10], [20, 3]], [[10, 10], [10, 17]]]),
        torch.full((4, 2), 3.0),
    )
    assert free(layout, torch.ones(4, dtype=torch.long)).tolist() == [True, False, False, False]
    assert free(layout, torch.zeros(4, dtype=torch.long)).tolist() == [True] * 4


@pytest.mark.parametrize("shape", range(3))
def test_templates_agree_with_supersampling(shape):
    "The same area and place; a pixel at the edge differs a little, one at the tip of a triangle more."
    random = np.random.default_rng(0)
    for _ in range(5):
        centre, radius = random.uniform(12, 20, 2), random.uniform(3, 6)
        place = torch.tensor(centre, dtype=torch.float32).expand(3, 2)
        drawn = templates(place, torch.full((3,), radius), SIZE)[shape]
        fine = cover(TRUE[shape], centre, radius)
        assert (drawn - fine).abs().max() < (0.25, 0.25, 0.6)[shape] and (drawn - fine).abs().mean() < 0.002
        assert drawn.sum().item() == pytest.approx(math.pi * radius**2, rel=0.03)


def test_render_paints_the_palette():
    _, layout, images = some_scenes("single", 60, 2)
    column, row = layout.centre[:, 0].long().unbind(1)
    assert torch.allclose(images[torch.arange(60), :, row, column], PALETTE[layout.colour[:, 0]], atol=1e-6)
    assert torch.equal(images[:, :, 0, 0], GROUND.expand(60, 3))


@given(colour=st.integers(0, 5), share=st.floats(0, 1))
def test_paint_reads_mixtures_of_colour_and_background(colour, share):
    pixel = GROUND + share * (PALETTE[colour] - GROUND)
    nearest, found = paint(pixel[None, :, None, None])
    assert found.item() == pytest.approx(share, abs=1e-5)
    assert nearest.item() == colour or share < 1e-4


# --- what was drawn is read ---


@pytest.mark.parametrize("kind, count", [("single", 2500), ("count", 3750), ("relation", 3750)])
def test_renders_pass(kind, count):
    captions, _, images = some_scenes(kind, count, 17)
    strict, graded = judged(images, captions)
    assert (strict == 0).float().mean() <= 0.0005 and torch.equal(graded == 1, strict == 1)


@pytest.mark.parametrize("kind", KINDS)
def test_perturbed_renders_pass(kind):
    captions, _, images = some_scenes(kind, 2000, 18)
    strict, graded = judged(perturbed(images), captions)
    assert (strict == 0).float().mean() <= 0.005 and graded.min() > 0.7


def test_find_recovers_the_layout():
    _, layout, images = some_scenes("count", 300, 4)
    found, there = find(images), layout.radius > 0
    assert torch.equal(found.image.bincount(), there.sum(1))
    away = (found.centre[:, None] - layout.centre[found.image]).norm(dim=2).masked_fill(~there[found.image], math.inf)
    distance, mine = away.min(1)
    assert distance.max() < 0.05
    assert (found.radius - layout.radius[found.image, mine]).abs().max() < 0.02
    assert torch.equal(found.shape, layout.shape[found.image, mine])
    assert torch.equal(found.colour, layout.colour[found.image, mine])
    assert torch.equal(found.misfit, found.misfits.amin(1)) and found.misfit.max() < 0.02 and found.rest.max() == 0


@pytest.mark.parametrize("name", range(3))
def test_true_shapes_pass_however_they_are_drawn(name):
    "Supersampled instead of by signed distance, and softened by half a pixel."
    random, images = np.random.default_rng(1), []
    for i in range(40):
        mask = cover(TRUE[name], random.uniform(10, 22, 2), random.uniform(3, 6))
        images.append(coloured(mask, PALETTE[i % 6]))
    captions = [Caption(Thing(NAMES[i % 6], SHAPES[name])) for i in range(40)]
    soft = torch.from_numpy(ndimage.gaussian_filter(torch.stack(images).numpy(), (0, 0, 0.45, 0.45)))
    assert verify(torch.stack(images), captions)[0].mean() == 1
    assert verify(soft, captions)[0].mean() >= 0.95


captions_of_any_kind = st.sampled_from(KINDS).flatmap(lambda kind: st.sampled_from(EVERY[kind]))


@given(caption=captions_of_any_kind, seed=st.integers(0, 2**30))
def test_a_rendered_caption_verifies(caption, seed):
    strict, graded = verify(render(draw_layout([caption], seeded(seed))), [caption])
    assert strict.item() == graded.item() == 1


@given(caption=captions_of_any_kind, seed=st.integers(0, 2**30), data=st.data())
def test_another_caption_does_not(caption, seed, data):
    image = render(draw_layout([caption], seeded(seed)))
    other = lambda names, but: data.draw(st.sampled_from([name for name in names if name != but]))
    wrong = [
        with_first(caption, colour=other(COLOURS, caption.first.colour)),
        with_first(caption, shape=other(SHAPES, caption.first.shape)),
    ]
    if caption.second:
        wrong.append(Caption(caption.first, other(RELATIONS, caption.relation), caption.second))
        wrong.append(Caption(caption.second, caption.relation, caption.first))
        wrong.append(Caption(caption.first))
    else:
        wrong.append(with_first(caption, count=other(NUMBERS, caption.first.count)))
    strict, graded = verify(image.expand(len(wrong), -1, -1, -1), wrong)
    assert strict.sum() == 0 and graded.max() < 1


@given(seed=st.integers(0, 2**30))
@settings(max_examples=25)
def test_images_are_judged_one_by_one(seed):
    "The order of images does not matter, nor their company: noise, nothing, or numbers that are none."
    captions, _, images = some_scenes("count", 12, seed)
    images = torch.cat(
        [perturbed(images, seed), torch.zeros(1, 3, SIZE, SIZE), torch.full((1, 3, SIZE, SIZE), math.nan)]
    )
    images = torch.cat([images, torch.rand(1, 3, SIZE, SIZE, generator=seeded(seed, 3))])
    captions = captions + captions[:3]
    order = torch.randperm(len(images), generator=seeded(seed, 2))
    strict, graded = verify(images, captions)
    again = verify(images[order], [captions[i] for i in order])
    assert torch.equal(strict[order], again[0]) and torch.allclose(graded[order], again[1], atol=1e-4)
    alone = torch.cat([verify(image[None], [caption])[1] for image, caption in zip(images, captions)])
    assert torch.allclose(graded, alone, atol=1e-4)


# --- what was not drawn is not ---


@pytest.fixture(scope="module")
def malformed():
    return gallery(each=8)


# Kinds that come so close to a true shape at the smallest sizes that some may pass.
CLOSE = {"rounded square": 0.45, "superellipse": 0.45, "pentagon": 0.3}


def test_malformed_shapes_are_rejected(malformed):
    images = torch.cat(list(malformed.values()))
    assert len(images) >= 200
    assert accepted(images).float().mean() <= 0.04
    assert accepted(perturbed(images, noise=0.02)).float().mean() <= 0.04


def test_each_kind_of_malformed_shape_is_rejected(malformed):
    passing = {name: accepted(images).float().mean().item() for name, images in malformed.items()}
    assert {name: share for name, share in passing.items() if share > CLOSE.get(name, 0)} == {}


def test_malformed_shapes_are_no_shape_of_any_colour(malformed):
    images = torch.cat([some[:2] for some in malformed.values()])
    passing = torch.stack([verify(images, [caption] * len(images))[0] for caption in EVERY["single"]]).amax(0)
    assert torch.equal(passing == 1, accepted(images))


def test_graded_is_one_where_strict_is(malformed):
    captions, _, images = some_scenes("relation", 300, 8)
    for some, asked in (
        (perturbed(images, noise=0.05), captions),
        (images, captions[::-1]),
        (torch.cat(list(malformed.values())), some_captions("single", len(malformed) * 8)),
    ):
        strict, graded = judged(some, asked)
        assert torch.equal(strict == 1, graded == 1) and graded.min() >= 0 and graded.max() <= 1


def damaged(image, damage, random):
    "An image with a speck of 3 pixels, a smear, a spot in its shape, or a streak from it."
    empty = (image - GROUND[:, None, None]).abs().sum(0).numpy() < 0.02
    inner = ndimage.distance_transform_edt(~empty)
    outer = ndimage.distance_transform_edt(empty)[2:-2, 2:-2]
    if damage == "spot":
        spot = random.choice(np.argwhere(inner > inner.max() - 0.5))
    else:
        spot = random.choice(np.argwhere(outer > 3) + 2)
    mask = cover(TRUE[0], spot[::-1] + random.random(2) * (damage != "spot"), math.sqrt(3 / math.pi))
    if damage == "smear":
        mask = torch.from_numpy(ndimage.gaussian_filter(mask.numpy(), 0.8))
    here = image[:, spot[0], spot[1]]
    colour = random.choice([c for c in PALETTE.numpy() if np.linalg.norm(c - here.numpy()) > 0.6])
    return coloured(mask, colour if damage != "white" else (0.8, 0.8, 0.8), image)


@pytest.mark.parametrize("kind, damage", list(itertools.product(KINDS, ["speck", "smear", "white", "spot"])))
def test_what_is_not_explained_counts(kind, damage):
    captions, _, images = some_scenes(kind, 100, 6)
    random = np.random.default_rng(0)
    bad = torch.stack([damaged(image, damage, random) for image in images])
    strict, graded = verify(bad, captions)
    assert strict.mean() <= 0.01 and (graded < 1).float().mean() >= 0.99


@pytest.mark.parametrize("kind, side, by", list(itertools.product(KINDS, range(4), [0.6, 1.0, 2.0])))
def test_shapes_that_the_border_cuts_are_rejected(kind, side, by):
    "But a triangle whose foot is cut is a smaller triangle."
    captions, layout, _ = some_scenes(kind, 60, 7)
    edge = layout.centre[..., side % 2] + EXTENT[layout.shape][..., side] * layout.radius
    edge = edge.masked_fill(layout.radius == 0, math.inf if side < 2 else -math.inf)
    move = torch.zeros(len(edge), 2)
    move[:, side % 2] = -edge.amin(1) - by if side < 2 else SIZE - edge.amax(1) + by
    images = render(Layout(layout.shape, layout.colour, layout.centre + move[:, None], layout.radius))
    strict, _ = verify(images, captions)
    footed = torch.tensor([side == 3 and "triangle" in str(caption) for caption in captions])
    assert strict[~footed].sum() == 0


@pytest.mark.parametrize("image", ["background", "zeros", "ones", "nan", "noise", "red"])
def test_nothing_gets_nothing(image):
    noise = torch.rand(18, 3, SIZE, SIZE, generator=seeded(0))
    images = {
        "background": GROUND[:, None, None].expand_as(noise),
        "zeros": torch.zeros_like(noise),
        "ones": torch.ones_like(noise),
        "nan": torch.full_like(noise, math.nan),
        "noise": noise,
        "red": PALETTE[0][:, None, None].expand_as(noise),
    }[image]
    strict, graded = verify(images, EVERY["single"])
    assert strict.sum() == 0 and graded.max() < 0.02


def test_values_beyond_white_are_white():
    captions, _, images = some_scenes("single", 20, 1)
    yellow = [n for n, caption in enumerate(captions) if caption.first.colour == "yellow"]
    assert torch.equal(find(images * 1.2).misfit, find((images * 1.2).clamp(0, 1)).misfit) and yellow


def test_a_blob_larger_than_its_crop_is_no_shape():
    image = coloured(cover(TRUE[1], (16, 16), 14), PALETTE[1])[None]
    assert find(image).misfit.min() > 1 and verify(image, [Caption(Thing("green", "square"))])[1] < 0.01


# --- the graded score ---


@given(caption=st.sampled_from(EVERY["count"]), seed=st.integers(0, 2**30))
@settings(max_examples=30)
def test_each_missing_or_extra_shape_costs(caption, seed):
    most = with_first(caption, count=4)
    layout = draw_layout([most], seeded(seed))
    shown = [
        Layout(layout.shape, layout.colour, layout.centre, layout.radius * (torch.arange(4) < n)) for n in range(5)
    ]
    _, graded = verify(torch.cat([render(some) for some in shown]), [caption] * 5)
    count = caption.first.count
    assert graded[0] == 0 and graded[count] == 1
    assert (graded[: count + 1].diff() > 0.2).all() and (graded[count:].diff() < -0.1).all()


@given(caption=st.sampled_from(EVERY["relation"]), seed=st.integers(0, 2**30))
@settings(max_examples=30)
def test_removing_one_of_two_costs(caption, seed):
    layout = draw_layout([caption], seeded(seed))
    keep = torch.tensor([[1, 1], [1, 0], [0, 1], [0, 0]])
    images = [render(Layout(layout.shape, layout.colour, layout.centre, layout.radius * some)) for some in keep]
    graded = verify(torch.cat(images), [caption] * 4)[1]
    assert graded[0] == 1 and graded[3] == 0 and ((graded[1:3] >= 0.25) & (graded[1:3] < 0.5)).all()


def test_a_better_shape_pays_more():
    "From circle to square by the power of a superellipse; asked for either."
    powers = np.linspace(2, 12, 21)
    mask = [cover(lambda u, v, p=p: u.abs() ** p + v.abs() ** p <= 1, (16.2, 15.6), 5.5) for p in powers]
    images = torch.stack([coloured(some, PALETTE[4]) for some in mask])
    as_circle, as_square = (verify(images, [Caption(Thing("purple", name))] * 21)[1] for name in SHAPES[:2])
    assert as_circle[0] == 1 and as_circle[-1] < 0.3 and (as_circle.diff() <= 1e-3).all()
    assert as_square[0] < 0.3 and as_square[-1] > 0.99 and (as_square.diff() >= -1e-3).all()


def test_blobs_do_not_add_up():
    "Sixteen circles pay less for one that was asked for than one does, and for four too."
    y, x = torch.meshgrid(torch.arange(4) * 8.0 + 4, torch.arange(4) * 8.0 + 4, indexing="ij")
    centre = torch.stack([x, y], -1).view(1, 16, 2)
    nothing = torch.zeros(1, 16, dtype=torch.long)
    images = render(Layout(nothing, nothing, centre, torch.full((1, 16), 2.8)))
    for count in (1, 4):
        assert 0 < verify(images, [Caption(Thing("red", "circle", count))])[1].item() <= count / 16


def test_the_side_fades():
    "Asked to stand left of the other, a shape goes round it."
    caption = Caption(Thing("red", "circle"), "left of", Thing("blue", "square"))
    angles = torch.linspace(0, math.pi, 9)
    centre = torch.stack(
        [torch.stack([16 - 10 * angles.cos(), 16 - 10 * angles.sin()], 1), torch.full((9, 2), 16.0)], 1
    )
    kinds = torch.tensor([0, 1]).expand(9, -1)
    images = render(Layout(kinds, kinds * 2, centre, torch.full((9, 2), 3.5)))
    strict, graded = verify(images, [caption] * 9)
    assert strict.tolist() == [1, 1] + [0] * 7 or strict.tolist() == [1, 1, 1] + [0] * 6
    assert (graded.diff() <= 1e-5).all() and graded[0] == 1 and graded[-1] == pytest.approx(0.5)


def test_the_best_blob_of_a_colour_is_taken():
    "A square before a circle: asked for a circle, the circle is matched, and the square costs."
    square = coloured(cover(TRUE[1], (8, 8), 4), PALETTE[0])
    image = coloured(cover(TRUE[0], (9, 22), 4), PALETTE[0], square)[None]
    assert verify(image, [Caption(Thing("red", "circle"))])[1].item() == 0.5
    strict, graded = verify(image, [Caption(Thing("red", "circle"), "below", Thing("red", "square"))])
    assert strict.item() == graded.item() == 1


def test_thresholds_are_what_the_page_says():
    assert TOLERANCE == 0.065 and REST == 0.2


def test_of_many_blobs_only_the_largest_are_looked_at():
    layout = draw_layout([Caption(Thing("red", "circle"))], seeded(0))
    dots = torch.tensor([(x, y) for x in range(3, 32, 5) for y in range(3, 32, 5)], dtype=torch.float32)
    many = Layout(torch.zeros(1, 36).long(), torch.zeros(1, 36).long(), dots[None], torch.full((1, 36), 1.4))
    images = torch.cat([render(layout), render(many), render(layout)])
    found = find(images)
    assert found.image.tolist() == [0] + [1] * MOST + [2]
    strict, graded = verify(images, [Caption(Thing("red", "circle"))] * 3)
    assert strict.tolist() == [1, 0, 1] and graded[1] < 1 / MOST
