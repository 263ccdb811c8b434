"""Shapes that nobody asked for, drawn with 8 x 8 points a pixel, and what an autoencoder might do to images."""

import math

import numpy as np
import torch
from scipy import ndimage

from neighbor_grpo.tasks.scenes import BACKGROUND, COLOURS, SIZE

PALETTE, GROUND = torch.tensor(list(COLOURS.values())), torch.tensor(BACKGROUND)
FINE = 8  # points along a side of a pixel


# --- whether points u, v (y down) are inside a shape of about unit size ---


def circle(u, v):
    return u**2 + v**2 <= 1


def square(u, v):
    return torch.maximum(u.abs(), v.abs()) <= 1


def convex(*corners):
    "A polygon, its corners in order."

    def inside(u, v):
        ahead = corners[1:] + corners[:1]
        sides = torch.stack([(x1 - x0) * (v - y0) - (y1 - y0) * (u - x0) for (x0, y0), (x1, y1) in zip(corners, ahead)])
        return (sides >= 0).all(0) | (sides <= 0).all(0)

    return inside


def regular(n, turn=-math.pi / 2):
    return convex(*((math.cos(turn + 2 * math.pi * k / n), math.sin(turn + 2 * math.pi * k / n)) for k in range(n)))


def turned(shape, angle):
    c, s = math.cos(angle), math.sin(angle)
    return lambda u, v: shape(c * u + s * v, c * v - s * u)


def stretched(shape, ratio, angle=0.0):
    return turned(lambda u, v: shape(u / ratio**0.5, v * ratio**0.5), angle)


def moved(shape, x, y, size=1.0):
    return lambda u, v: shape((u - x) / size, (v - y) / size)


def both(*shapes):
    return lambda u, v: torch.stack([shape(u, v) for shape in shapes]).any(0)


def without(shape, hole):
    return lambda u, v: shape(u, v) & ~hole(u, v)


def rounded(part):
    "A square whose corners are quarters of circles."
    edge = 1 - part
    return lambda u, v: (u.abs() - edge).clamp_min(0) ** 2 + (v.abs() - edge).clamp_min(0) ** 2 <= part**2


def superellipse(power):
    return lambda u, v: u.abs() ** power + v.abs() ** power <= 1


def teardrop(tip):
    slope, low = 1 / math.sqrt(tip**2 - 1), 1 / tip
    return both(circle, lambda u, v: (v <= -low) & (v >= -tip) & (u.abs() <= (v + tip) * slope))


def cross(width):
    return both(lambda u, v: square(u, v) & (u.abs() <= width), lambda u, v: square(u, v) & (v.abs() <= width))


def star(points, inner):
    "Its corners at distance 1, the dents between them at `inner`."
    half = math.pi / points
    dent = inner * math.cos(half), inner * math.sin(half)

    def inside(u, v):
        angle = torch.atan2(u, -v) % (2 * half)
        angle, r = torch.minimum(angle, 2 * half - angle), (u**2 + v**2).sqrt()
        return (dent[0] - 1) * r * angle.sin() - dent[1] * (r * angle.cos() - 1) >= 0

    return inside


def bitten(angle, depth=0.55, shape=circle, distance=1.0):
    return without(shape, moved(circle, distance * math.cos(angle), distance * math.sin(angle), depth))


triangle, quarter = regular(3), math.pi / 2
TRUE = (circle, square, triangle)
UP = convex((0, -1), (1, 1), (-1, 1))

# At these sizes polygons with six and more corners are circles to the eye, so they are not among them.
OUTLINES = {
    "rounded square": [rounded(0.5), rounded(0.6), rounded(0.7)],
    "superellipse": [superellipse(3), superellipse(4)],
    "teardrop": [turned(teardrop(tip), angle) for tip in (1.6, 2.0) for angle in (0, quarter, 2.5)],
    "ellipse": [stretched(circle, ratio, angle) for ratio in (1.3, 1.6) for angle in (0, 0.6, quarter)],
    "rectangle": [stretched(square, 1.3), stretched(square, 1 / 1.3), stretched(square, 1.8), stretched(square, 0.5)],
    "diamond": [turned(square, math.pi / 4), turned(square, math.pi / 7)],
    "turned triangle": [turned(triangle, angle) for angle in (2 * quarter, quarter, -quarter, 0.5)],
    "right-angled triangle": [convex((-1, -1), (-1, 1), (1, 1)), convex((1, -1), (-1, 1), (1, 1))],
    "flat triangle": [stretched(UP, 1.6), stretched(UP, 2.2), stretched(UP, 0.6)],
    "pentagon": [regular(5), regular(5, quarter)],
    "half circle": [without(circle, turned(lambda u, v: v > 0, angle)) for angle in (0, quarter, 2, -quarter)],
    "quarter circle": [turned(lambda u, v: circle(u, v) & (u > 0) & (v > 0), k * quarter) for k in range(4)],
    "ring": [without(circle, moved(circle, 0, 0, hole)) for hole in (0.35, 0.5, 0.65)],
    "holed square": [without(square, moved(circle, 0, 0, 0.45)), without(square, moved(square, 0, 0, 0.5))],
    "cross": [cross(0.33), cross(0.5), turned(cross(0.33), math.pi / 4)],
    "star": [star(5, 0.42), star(5, 0.55), star(6, 0.5), star(4, 0.4)],
    "L": [without(square, moved(square, 1, -1, 1.1)), without(square, moved(square, -0.8, -0.8, 1.2))],
    "T": [both(moved(stretched(square, 3.0), 0, -0.6, 0.6), moved(stretched(square, 0.33), 0, 0.4, 0.6))],
    "two circles": [both(moved(circle, -0.7, 0), moved(circle, 0.7, 0)), both(circle, moved(circle, 0, 0.8))],
    "circle and square": [
        both(moved(circle, -0.8, 0), moved(square, 0.8, 0, 0.9)),
        both(circle, moved(square, 1, 1, 0.8)),
    ],
    "two squares": [both(moved(square, -0.6, -0.6), moved(square, 0.6, 0.6))],
    "bitten circle": [bitten(angle) for angle in (0, 1, 2, 3)],
    "bitten square": [bitten(angle, 0.7, square, 1.2) for angle in (0.8, -0.8, 2.4, 0)],
    "cut square": [lambda u, v: square(u, v) & (u + v < 1.1), lambda u, v: square(u, v) & (u - v < 1)],
    "trapezoid": [convex((-0.5, -1), (0.5, -1), (1, 1), (-1, 1)), convex((-1, -1), (1, -1), (0.5, 1), (-0.5, 1))],
    "cut triangle": [lambda u, v: triangle(u, v) & (v > -0.5)],
    "parallelogram": [convex((-0.5, -1), (1.5, -1), (0.5, 1), (-1.5, 1))],
    "kite": [convex((0, -1.6), (0.9, 0), (0, 0.8), (-0.9, 0))],
    "heart": [lambda u, v: (u * u + v * v - 0.6) ** 3 + u * u * v**3 <= 0],
    "crescent": [bitten(angle, 0.8, circle, 0.6) for angle in (0, 2, 4)],
}


def cover(shape, centre, radius):
    "How much of each pixel (32, 32) a shape covers that has the area of a circle and its centre of mass at `centre`."
    grid = (torch.arange(200) + 0.5) / 50 - 2
    v, u = torch.meshgrid(grid, grid, indexing="ij")
    mask = shape(u, v).float() / 2500
    area, middle = mask.sum(), ((mask * u).sum() / mask.sum(), (mask * v).sum() / mask.sum())
    scale = radius * (math.pi / area).sqrt()
    x, y = ((torch.arange(SIZE * FINE) + 0.5) / FINE - c for c in centre)
    y, x = torch.meshgrid(y / scale + middle[1], x / scale + middle[0], indexing="ij")
    return torch.nn.functional.avg_pool2d(shape(x, y).float()[None], FINE)[0]


def coloured(mask, colour, image=None):
    "A cover (32, 32) in a colour over the background, or over an image."
    image = GROUND[:, None, None] if image is None else image
    return image + mask * (torch.as_tensor(colour)[:, None, None] - image)


def blurred(mask, width):
    return torch.from_numpy(ndimage.gaussian_filter(mask.numpy(), width))


def wrong_paint(mask, centre, colour, other, random):
    "True shapes (32, 32), wrongly painted."
    a, b = PALETTE[colour], PALETTE[other]
    x = torch.arange(SIZE) + 0.5 - centre[0]
    mixed = coloured(mask, a) * (0.5 - x / 10).clamp(0, 1) + coloured(mask, b) * (0.5 + x / 10).clamp(0, 1)
    specks = torch.from_numpy(random.random((SIZE, SIZE)) < 0.25)
    return {
        "half another colour": coloured(mask, (a + b) / 2),
        "a third another colour": coloured(mask, 0.65 * a + 0.35 * b),
        "washed out": coloured(mask, 0.6 * a + 0.4),
        "grey": coloured(mask, torch.full((3,), 0.4 + 0.5 * random.random())),
        "dim": coloured(0.65 * mask, a),
        "blurred": coloured(blurred(mask, 1.0 + 0.6 * random.random()), a),
        "two colours": torch.where(x < 0, coloured(mask, a), coloured(mask, b)),
        "from colour to colour": mixed,
        "speckled": coloured(torch.where(specks, 0.3 * mask, mask), a),
    }


def gallery(each=8, radii=(3.0, 6.0), seed=0):
    "Malformed shapes by kind: name to images (each, 3, 32, 32), in sizes, places and colours at random."
    random, images = np.random.default_rng(seed), {}

    def draw():
        other = int(random.integers(6))
        return random.uniform(12, 20, 2), random.uniform(*radii), other, (other + 1 + int(random.integers(5))) % 6

    for name, shapes in OUTLINES.items():
        for i in range(each):
            centre, radius, colour, _ = draw()
            mask = cover(shapes[i % len(shapes)], centre, radius)
            images.setdefault(name, []).append(coloured(mask, PALETTE[colour]))
    for i in range(each):
        centre, radius, colour, other = draw()
        mask = cover(TRUE[i % 3], centre, radius)
        for name, image in wrong_paint(mask, centre, colour, other, random).items():
            images.setdefault(name, []).append(image)
    return {name: torch.stack(some) for name, some in images.items()}


def perturbed(images, seed=0, noise=0.03, blur=0.3, light=0.03):
    "Noise, blur and brightness, as an autoencoder might change them."
    generator = torch.Generator().manual_seed(seed)
    soft = torch.from_numpy(ndimage.gaussian_filter(images.numpy(), (0, 0, blur, blur), mode="nearest"))
    bright = 1 + light * (2 * torch.rand(len(images), 1, 1, 1, generator=generator) - 1)
    return (soft * bright + noise * torch.randn(images.shape, generator=generator)).clamp(0, 1)
