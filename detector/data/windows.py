"""A part of an image at another scale: what mosaic, mixup and large-scale jitter show of an image.

Only the pixels that will be seen are resampled, so the cost is that of the result, not of the image.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import cv2
import numpy as np

from detector.data.geometry import follow, joined_weights, keep_visible
from detector.data.outlines import Outlines
from detector.data.resize import like, resample
from detector.data.sample import Sample


class Span(NamedTuple):
    """Along one axis: `length` pixels of the image from `start` become `size` pixels from `at` on."""

    start: int
    length: int
    at: int
    size: int

    @property
    def scale(self) -> float:
        return self.size / self.length

    @property
    def offset(self) -> float:
        """Of the map into the window itself, whose first pixel is 0."""
        return -self.start * self.scale


def choose(length: int, room: int, scale: float, rng: np.random.Generator, align: float | None = None) -> Span:
    """Which part of `length` pixels fills `room` pixels at `scale`, and where.

    Where the whole image fits in, it lies at the share `align` of what is left over (0 at the beginning, 1 at the end;
    None: drawn); else a part of it is drawn that fills the room.
    """
    if length * scale <= room:
        size = min(max(round(length * scale), 1), room)
        spare = room - size
        return Span(0, length, int(rng.integers(spare + 1)) if align is None else round(align * spare), size)
    part = min(max(round(room / scale), 1), length)
    return Span(int(rng.integers(length - part + 1)), part, 0, room)


def draw_scale(scale: tuple[float, float], rng: np.random.Generator) -> float:
    """Evenly spread in the logarithm, so that halving is as likely as doubling."""
    return math.exp(rng.uniform(math.log(scale[0]), math.log(scale[1])))


def milder(scale: tuple[float, float], strength: float) -> tuple[float, float]:
    """The range drawn together towards 1, in the logarithm."""
    return scale[0] ** strength, scale[1] ** strength


def fitting(size: tuple[int, int], room: tuple[int, int]) -> float:
    """The scale at which an image of `size` just fits into `room`, height and width each."""
    return min(room[0] / size[0], room[1] / size[1])


def show(sample: Sample, rows: Span, columns: Span, visible: float) -> Sample:
    """The part of the sample that the spans name, at their scale: an image of `rows.size` x `columns.size`.

    Objects of which less than the share `visible` is left are dropped.
    """
    part = sample.image[rows.start : rows.start + rows.length, columns.start : columns.start + columns.length]
    image = resample(part, (rows.size, columns.size))
    moved = follow(sample, image, (columns.scale, rows.scale), (columns.offset, rows.offset))
    return keep_visible(moved, visible)


def canvas(size: tuple[int, int], sample: Sample) -> np.ndarray:
    """(height, width, C) of the sample's ground colour."""
    ground = np.array(sample.ground, dtype=sample.image.dtype)
    row = np.tile(ground, size[1])  # whole rows are copied fast, three bytes at a time not
    return np.tile(row, size[0]).reshape(*size, len(ground))


def join(first: Sample, image: np.ndarray, parts: Sequence[Sample]) -> Sample:
    """One sample of an image and the truth of all parts, with the identity of `first`, but no way back to its pixels.

    All parts are in pixels of `image`.
    """
    outlines = [part.outlines for part in parts if part.outlines is not None]
    return replace(
        first,
        image=image,
        boxes=np.concatenate([part.boxes for part in parts]),
        labels=np.concatenate([part.labels for part in parts]),
        rows=np.concatenate([part.rows for part in parts]),
        weight=joined_weights(parts),
        crowd=np.concatenate([part.crowd for part in parts]),
        scale=np.full(2, np.nan, dtype=np.float32),
        offset=np.full(2, np.nan, dtype=np.float32),
        outlines=Outlines.join(outlines) if len(outlines) == len(parts) else None,
    )


def added(sample: Sample, more: Sample) -> Sample:
    """The sample, which lies where it lay, with the truth of another on its image."""
    return replace(join(sample, sample.image, [sample, more]), scale=sample.scale, offset=sample.offset)


def mirrored(sample: Sample) -> Sample:
    """Left and right exchanged."""
    return follow(sample, like(cv2.flip(sample.image, 1), sample.image), (-1.0, 1.0), (sample.image.shape[1], 0.0))
