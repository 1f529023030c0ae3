"""IQDet object by object and cell by cell, in plain numbers: the oracle of assign/iqdet.py and losses/iqdet.py.

A level is (height, width, stride, offset, [(w, h), ...]); a component is (mean x, mean y, deviation x, y, share); an
object's mixture is a list of components for each level; a box is four numbers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import NormalDist

Level = tuple[int, int, int, float, list[tuple[float, float]]]
Component = tuple[float, float, float, float, float]
Box = Sequence[float]
NORMAL = NormalDist()
NOTHING: Component = (0.0, 0.0, 1.0, 1.0, 0.0)


def value(components: Sequence[Component], x: float, y: float) -> float:
    """sum of pi_k exp(-(d - mu_k)^2 / (2 sigma_k^2)), d in halves of the box around its centre."""
    return sum(
        share * math.exp(-((x - mx) ** 2) / (2 * sx * sx) - (y - my) ** 2 / (2 * sy * sy))
        for mx, my, sx, sy, share in components
    )


def numbers(seed: int, box: Box, count: int) -> list[tuple[float, float, float]]:
    """The hash of `distribution.random_numbers` on Python's own integers."""

    def scramble(word: int) -> int:
        for _ in range(2):
            word = ((word >> 16) ^ word) * 0x45D9F3B % 2**32
        return (word >> 16) ^ word

    width, height = (round((box[i + 2] - box[i]) * 8) % 2**32 for i in (0, 1))
    key = scramble(scramble(width ^ seed) ^ height)
    flat = [(scramble(scramble(key ^ scramble(i)) ^ seed) + 0.5) / 2**32 for i in range(3 * count)]
    return [(flat[i], flat[i + 1], flat[i + 2]) for i in range(0, 3 * count, 3)]


def draw(mixture: Sequence[Sequence[Component]], random: tuple[float, float, float]) -> tuple[int, float, float]:
    """A level and a place in the square from -1 to 1: choose a component by its mass inside, then invert each axis."""
    weighted = []
    for level, components in enumerate(mixture):
        for mx, my, sx, sy, share in components:
            inside = share
            for m, s in ((mx, sx), (my, sy)):
                inside *= s * (NORMAL.cdf((1 - m) / s) - NORMAL.cdf((-1 - m) / s))
            weighted.append((inside, level, (mx, sx), (my, sy)))
    aim, upto = random[0] * sum(w for w, *_ in weighted), 0.0
    for weight, *chosen in weighted:
        upto += weight
        if aim < upto:
            level, axes = chosen[0], chosen[1:]
            break
    place = []
    for (m, s), u in zip(axes, random[1:], strict=True):
        low, high = NORMAL.cdf((-1 - m) / s), NORMAL.cdf((1 - m) / s)
        place.append(m + s * NORMAL.inv_cdf(low + u * (high - low)))
    return level, place[0], place[1]


def best_shape(box: Box, shapes: Sequence[tuple[float, float]]) -> int:
    """Whose IoU with a box of this size at the same place is the highest, of equals the first."""
    w, h = box[2] - box[0], box[3] - box[1]
    ious = [min(w, a) * min(h, b) / (w * h + a * b - min(w, a) * min(h, b)) for a, b in shapes]
    return ious.index(max(ious))


def static(box: Box, levels: Sequence[Level], deviation: float, octave: float) -> list[list[Component]]:
    """Without an encoder: one Gaussian at the centre, the level of priors like the object in size weighs 1."""
    side = math.sqrt((box[2] - box[0]) * (box[3] - box[1]))
    fits = []
    for *_, shapes in levels:
        w, h = shapes[best_shape(box, shapes)]
        fits.append(-((math.log2(side / math.sqrt(w * h)) / octave) ** 2) / 2)
    best = max(fit for fit, kept in zip(fits, counting(box, levels, [[NOTHING]] * len(fits)), strict=True) if kept)
    return [[(0.0, 0.0, deviation, deviation, math.exp(fit - best))] for fit in fits]


def cells(level: Level) -> list[tuple[int, int, float, float]]:
    """row, column, x, y of each cell of a level."""
    height, width, stride, offset, _ = level
    return [(r, c, (c + offset) * stride, (r + offset) * stride) for r in range(height) for c in range(width)]


def first_prior(levels: Sequence[Level], level: int) -> int:
    return sum(h * w * len(shapes) for h, w, _, _, shapes in levels[:level])


def place(box: Box, x: float, y: float) -> tuple[float, float]:
    return (2 * x - box[0] - box[2]) / (box[2] - box[0]), (2 * y - box[1] - box[3]) / (box[3] - box[1])


def counting(box: Box, levels: Sequence[Level], mixture: Sequence[Sequence[Component]]) -> list[Sequence[Component]]:
    """Levels without a cell's centre in the object drop out; if all would, the first stays."""
    kept = [any(box[0] < x < box[2] and box[1] < y < box[3] for *_, x, y in cells(level)) for level in levels]
    kept[0] = kept[0] or not any(kept)
    return [components if keep else [] for keep, components in zip(kept, mixture, strict=True)]


def assign(
    levels: Sequence[Level],
    boxes: Sequence[Box],
    mixtures: Sequence[Sequence[Sequence[Component]]],
    seed: int,
    samples: int,
    negative_quality: float,
) -> tuple[dict[int, tuple[int, float]], set[int]]:
    """One image: prior -> (object, quality), and the priors that are ignored."""
    taken: dict[int, tuple[int, float]] = {}
    undecided = set()
    for n, (box, mixture) in enumerate(zip(boxes, mixtures, strict=True)):
        mixture = counting(box, levels, mixture)
        for random in numbers(seed, box, samples):
            level, px, py = draw(mixture, random)
            _, width, _, _, shapes = levels[level]
            x = (box[0] + box[2]) / 2 + px * (box[2] - box[0]) / 2
            y = (box[1] + box[3]) / 2 + py * (box[3] - box[1]) / 2
            row, column, cx, cy = min(cells(levels[level]), key=lambda c: (c[2] - x) ** 2 + (c[3] - y) ** 2)
            if not (box[0] < cx < box[2] and box[1] < cy < box[3]):
                continue
            quality = value(mixture[level], *place(box, cx, cy))
            shape = best_shape(box, shapes)
            prior = first_prior(levels, level) + (row * width + column) * len(shapes) + shape
            if prior not in taken or quality > taken[prior][1]:
                taken[prior] = (n, quality)
        for level, (_, width, _, _, shapes) in enumerate(levels):
            for row, column, cx, cy in cells(levels[level]):
                inside = box[0] < cx < box[2] and box[1] < cy < box[3]
                if inside and value(mixture[level], *place(box, cx, cy)) >= negative_quality:
                    cell = (row * width + column) * len(shapes) + best_shape(box, shapes)
                    undecided.add(first_prior(levels, level) + cell)
    return taken, undecided - set(taken)


def iou(a: Box, b: Box) -> float:
    w, h = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    shared = max(w, 0) * max(h, 0)
    return shared / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - shared)


def encoder_loss(
    levels: Sequence[Level], box: Box, mixture: Sequence[Sequence[Component]], said: Sequence[Box]
) -> float:
    """L_IQ of one object: mean over all cells inside of BCE(value there, IoU of the cell's box with the object)."""
    losses = []
    for level, (_, width, _, _, shapes) in enumerate(levels):
        for row, column, cx, cy in cells(levels[level]):
            if box[0] <= cx <= box[2] and box[1] <= cy <= box[3]:
                prior = first_prior(levels, level) + (row * width + column) * len(shapes) + best_shape(box, shapes)
                p = min(max(value(mixture[level], *place(box, cx, cy)), 1e-6), 1 - 1e-6)
                q = iou(said[prior], box)
                losses.append(-q * math.log(p) - (1 - q) * math.log(1 - p))
    return sum(losses) / max(1, len(losses))


def between(level: Level, first: int, shape: int, x: float, y: float) -> dict[int, float]:
    """The priors around a point and their bilinear shares; the map goes on as it ends."""
    height, width, stride, offset, shapes = level
    shares: dict[int, float] = {}
    px = min(max(x / stride - offset, 0), width - 1)
    py = min(max(y / stride - offset, 0), height - 1)
    for row in range(height):
        for column in range(width):
            share = max(0, 1 - abs(px - column)) * max(0, 1 - abs(py - row))
            if share > 0:
                shares[first + (row * width + column) * len(shapes) + shape] = share
    return shares
