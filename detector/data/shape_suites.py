"""What the generated pictures hold: the classes' outlines, and the suites that isolate what assignment finds hard.

Everything here is integer arithmetic, so that every machine draws the same pixels: outlines are polygons on a square of
`UNIT` x `UNIT`, drawn lengths come out of `size_at`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np

UNIT = 1 << 12
TURN = 256  # directions of a full turn
SIZE_STEPS = 64  # sizes between a suite's smallest and largest, evenly spaced in the logarithm

SuiteName = Literal["plain", "dense", "tiny", "elongated", "nested", "crescent", "scales"]


@dataclass(frozen=True)
class Suite:
    """One kind of picture.  Lengths in pixels, shares in percent."""

    about: str
    classes: tuple[str, ...]
    objects: tuple[int, int]  # how many in an image, or how many nests; fewer where no more fit
    side: tuple[int, int]  # longer side of an object's box
    aspect: tuple[int, int] = (100, 125)  # longer side over shorter side
    turn: int = 24  # largest rotation either way, in 1/256 of a full turn
    visible: int = 70  # an object placed later hides at most what leaves this much of the earlier ones
    nest: tuple[int, int] = (1, 1)  # how many objects share one centre
    crowd: int = 6  # images that hold a crowd region
    empty: int = 5  # images without any object


PLAIN = ("circle", "square", "triangle", "star", "cross")
HOLLOW = ("crescent", "arc", "hook", "horseshoe")

SUITES: dict[SuiteName, Suite] = {
    "plain": Suite(
        "several objects of moderate sizes, little occlusion", ("circle", "triangle", "cross"), (5, 11), (22, 64)
    ),
    "dense": Suite("dozens of objects, touching and overlapping", PLAIN, (30, 60), (14, 40), visible=50, crowd=12),
    "tiny": Suite("objects of a few pixels", PLAIN, (8, 24), (5, 16), turn=8),
    "elongated": Suite(
        "long and thin objects", ("bar", "ellipse", "wedge"), (2, 6), (50, 180), (500, 1200), turn=3, crowd=0
    ),
    "nested": Suite("several objects with one centre", PLAIN, (1, 3), (60, 180), visible=30, nest=(2, 4)),
    "crescent": Suite("objects that are not where their boxes' centres are", HOLLOW, (2, 6), (30, 120), turn=128),
    "scales": Suite("the largest object is twenty times the smallest", PLAIN, (4, 12), (10, 200), visible=50),
}


def size_at(step: int, side: tuple[int, int]) -> int:
    """The `step`-th of SIZE_STEPS + 1 lengths from `side[0]` to `side[1]`, evenly spaced in the logarithm."""
    return round(side[0] * (side[1] / side[0]) ** (step / SIZE_STEPS))


def outline(name: str, turn: int) -> np.ndarray:
    """(v, 2) int64: the class's polygon turned by `turn` / TURN and stretched to fill 0..UNIT in x and y."""
    angle = 2 * math.pi * turn / TURN
    cosine, sine = round(math.cos(angle) * UNIT), round(math.sin(angle) * UNIT)
    points = OUTLINES[name]
    turned = points @ np.array([[cosine, sine], [-sine, cosine]], dtype=np.int64)
    low = turned.min(0)
    return (turned - low) * UNIT // (turned.max(0) - low)


def _grid(points: list[tuple[float, float]]) -> np.ndarray:
    return np.array([(round(x * UNIT), round(y * UNIT)) for x, y in points], dtype=np.int64)


def _ring(radius: float, first: float, last: float, count: int, center: float = 0.0) -> list[tuple[float, float]]:
    """Points on a circle around (`center`, 0) from angle `first` to `last`, in full turns."""
    angles = [2 * math.pi * (first + (last - first) * i / (count - 1)) for i in range(count)]
    return [(center + radius * math.cos(a), radius * math.sin(a)) for a in angles]


def _star(tips: int, inner: float) -> list[tuple[float, float]]:
    corners = [(1.0 if i % 2 == 0 else inner, (i / (2 * tips) - 0.25) * 2 * math.pi) for i in range(2 * tips)]
    return [(r * math.cos(a), r * math.sin(a)) for r, a in corners]


_CROSS = [(1, 0), (2, 0), (2, 1), (3, 1), (3, 2), (2, 2), (2, 3), (1, 3), (1, 2), (0, 2), (0, 1), (1, 1)]
_HORSESHOE = [(-1, -1), (-0.6, -1), *_ring(0.6, 0.5, 0, 13), (0.6, -1), (1, -1), *_ring(1, 0, 0.5, 25)]

OUTLINES: dict[str, np.ndarray] = {
    "circle": _grid(_ring(1, 0, 31 / 32, 32)),
    "square": _grid([(0, 0), (1, 0), (1, 1), (0, 1)]),
    "triangle": _grid([(0, 0.87), (0.5, 0), (1, 0.87)]),
    "star": _grid(_star(5, 0.42)),
    "cross": _grid([(x / 3, y / 3) for x, y in _CROSS]),
    "bar": _grid([(0, 0), (8, 0), (8, 1), (0, 1)]),
    "ellipse": _grid([(8 * x, y) for x, y in _ring(1, 0, 31 / 32, 32)]),
    "wedge": _grid([(0, 0), (8, 0.3), (8, 0.7), (0, 1)]),
    "crescent": _grid([*_ring(1, 0.153, 0.847, 25), *_ring(0.85, 0.792, 0.208, 21, 0.35)[1:-1]]),
    "arc": _grid([*_ring(1, 0.12, 0.88, 25), *_ring(0.62, 0.88, 0.12, 21)]),
    "hook": _grid([(0, 0), (0.24, 0), (0.24, 0.76), (1, 0.76), (1, 1), (0, 1)]),
    "horseshoe": _grid(_HORSESHOE),
}
