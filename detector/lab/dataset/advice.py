"""Which input size and strides suit the objects, by a rule that is stated.

Legend: N objects.

The rule.  An object is within reach of a level of stride s if its side (square root of its area) is at least `cells`
* s pixels there: with two cells, which is the default, some cell's centre lies well inside it.  For a finest stride the
advised input is the smallest whose shorter side puts `share` of the objects within reach.  Of the strides 8 and 4 the
first is taken whose input enlarges the median image by no more than MOST_ENLARGED, since enlarging adds pixels but no
detail; if neither does, the input is limited to that enlargement.  Coarser levels, each of twice the stride, are added
until 8 strides (what a point or anchor of a level stands for: ATSS, section 3) reach the side below which `share` of
the objects are.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from detector.lab.dataset.split import Split

FINEST = (4, 8, 16)  # strides that are shown
CHOICE = (8, 4)
MOST_ENLARGED = 1.5
MULTIPLE = 32  # input sides are rounded up to one
LEAST = 64  # pixels of an input's shorter side
SIDE_IN_STRIDES = 8


@dataclass(frozen=True)
class InputSize:
    """For one finest stride."""

    stride: int
    short: int  # pixels of the input's shorter side
    long: int  # limit of the longer side that lets `share` of the images reach `short`
    enlargement: float  # of the median image
    megapixels: float  # of the median image at this size
    share: float  # of objects that are within reach at it


@dataclass(frozen=True)
class Advice:
    sizes: tuple[InputSize, ...]  # for each of FINEST
    chosen: InputSize
    limited: bool  # no size reaches the wanted share without enlarging too much
    strides: tuple[int, ...]
    largest: float  # side at the chosen size below which `share` of the objects are
    wanted: float  # the share
    cells: float

    @property
    def resize(self) -> str:
        """As a recipe says it."""
        return f"{{type: short_edge, short: {self.chosen.short}, long: {self.chosen.long}}}"


def relative_side(split: Split) -> np.ndarray:
    """(N,) side of each object over the shorter side of its image."""
    found: np.ndarray = np.sqrt(split.sides.prod(1)) / split.sizes.min(1)[split.image]
    return found


def advise(split: Split, wanted: float = 0.95, cells: float = 2.0) -> Advice:
    """For the objects of a split, at least one."""
    relative = relative_side(split)
    sizes = tuple(_for_stride(split, relative, stride, wanted, cells) for stride in FINEST)
    fitting = [s for stride in CHOICE for s in sizes if s.stride == stride and s.enlargement <= MOST_ENLARGED]
    if fitting:
        chosen = fitting[0]
    else:
        most = MOST_ENLARGED * float(np.median(split.sizes.min(1)))
        short = max(LEAST, math.floor(most / MULTIPLE) * MULTIPLE)
        chosen = _at(split, relative, min(CHOICE), short, wanted, cells)
    largest = float(np.quantile(relative, wanted)) * chosen.short
    strides = [chosen.stride]
    while strides[-1] * SIDE_IN_STRIDES < largest:
        strides.append(strides[-1] * 2)
    return Advice(sizes, chosen, not fitting, tuple(strides), largest, wanted, cells)


def _for_stride(split: Split, relative: np.ndarray, stride: int, wanted: float, cells: float) -> InputSize:
    # The highest value that at least `wanted` of the objects reach.
    ranked = np.sort(relative)
    smallest = ranked[min(len(ranked) - 1, math.floor((1 - wanted) * len(ranked) + 1e-9))]
    short = max(LEAST, math.ceil(cells * stride / smallest / MULTIPLE - 1e-9) * MULTIPLE)
    return _at(split, relative, stride, short, wanted, cells)


def _at(split: Split, relative: np.ndarray, stride: int, short: int, wanted: float, cells: float) -> InputSize:
    aspect = split.sizes.max(1) / split.sizes.min(1)
    long = math.ceil(short * float(np.quantile(aspect, wanted)) / MULTIPLE - 1e-6) * MULTIPLE
    return InputSize(
        stride=stride,
        short=short,
        long=max(short, long),
        enlargement=short / float(np.median(split.sizes.min(1))),
        megapixels=short * short * float(np.median(aspect)) / 1e6,
        share=float((relative * short >= cells * stride * (1 - 1e-9)).mean()),
    )
