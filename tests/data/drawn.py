"""Samples whose pixels tell where each object is: every step must put the boxes where it puts the pixels.

A step's random numbers do not depend on the pixels.  So a step is run once for the truth, and once more for each object
on pictures in which that object alone is white: what is white then is what is left of it to be seen.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from detector.data.frames import Frame
from detector.data.outlines import Bitmap, Outlines, Polygons, Shape
from detector.data.sample import Sample
from detector.data.steps import Augmentation, Combination, Step

CROWD = -1
FINE = 8  # parts of a pixel, either way, in which objects are drawn


def shape(kind: str, box: tuple[float, float, float, float], size: tuple[int, int]) -> Shape:
    """An outline that fills an xyxy box: without tips so thin that they vanish between pixels."""
    left, top, right, bottom = box
    if kind == "ellipse":
        angle = np.linspace(0, 2 * np.pi, 40, endpoint=False)
        unit = np.stack([0.5 + np.cos(angle) / 2, 0.5 + np.sin(angle) / 2], 1)
    elif kind == "horseshoe":
        unit = np.array([(0, 0), (0.3, 0), (0.3, 0.7), (0.7, 0.7), (0.7, 0), (1, 0), (1, 1), (0, 1)], dtype=float)
    else:
        unit = np.array([(0, 0), (1, 0), (1, 1), (0, 1)], dtype=float)
    ring = unit * (right - left, bottom - top) + (left, top)
    whole = Polygons((ring,))
    if kind != "pixels":
        return whole
    return Bitmap.of(whole.raster(Frame(0, 0, size[1], size[0])))


def make(
    size: tuple[int, int], count: int, first_row: int, rng: np.random.Generator, masks: bool = True, crowd: bool = True
) -> Sample:
    """`count` objects of a quarter to a half of the image's sides, and a crowd region; label = row % 5."""
    height, width = size
    boxes, shapes = [], []
    for i in range(count):
        w, h = rng.uniform(0.15, 0.45) * width, rng.uniform(0.15, 0.45) * height
        x, y = rng.uniform(0, width - w), rng.uniform(0, height - h)
        box = (x, y, x + w, y + h)
        if not masks or i % 4 == 3:
            box = (round(x), round(y), round(x + w), round(y + h))
        kind = ("ellipse", "horseshoe", "rectangle", "pixels")[i % 4] if masks else "rectangle"
        boxes.append(box)
        shapes.append(shape(kind, box, size))
    rows = first_row + np.arange(count)
    array = np.array(boxes, dtype=np.float32).reshape(-1, 4)
    maps = np.broadcast_to(np.eye(3), (count, 3, 3))
    region = np.round(rng.uniform(0.1, 0.4, (1, 2)) * (width, height))
    return Sample(
        image=rng.integers(0, 256, (*size, 3), dtype=np.uint8),
        boxes=array,
        labels=rows % 5,
        rows=rows,
        crowd=np.concatenate([region, region + np.round(np.array([[0.3 * width, 0.3 * height]]))], 1).astype(np.float32)
        if crowd
        else np.zeros((0, 4), dtype=np.float32),
        image_id=first_row,
        original_size=size,
        scale=np.ones(2, dtype=np.float32),
        offset=np.zeros(2, dtype=np.float32),
        outlines=Outlines(tuple(shapes), maps, np.ones(count, dtype=bool)) if masks else None,
    )


@dataclass
class Hand:
    """Stands for the pool: deals these samples one after the other."""

    samples: Sequence[Sample]
    dealt: int = 0
    zoom: tuple[float, float] = (1.0, 1.0)

    def draw(self, rng: np.random.Generator, holding: str = "anything") -> Sample:
        rng.integers(10)
        self.dealt += 1
        return self.samples[(self.dealt - 1) % len(self.samples)]


def run(step: Step, samples: Sequence[Sample], seed: int) -> Sample:
    """The step on the first of the samples, the others as partners."""
    rng: Any = np.random.default_rng(seed)
    if isinstance(step, Combination):
        return step(samples[0], rng, Hand(samples[1:]))  # type: ignore[arg-type]
    assert isinstance(step, Augmentation)
    return step(samples[0], rng)


def alone(sample: Sample, row: int) -> Sample:
    """The sample with the object `row` in white on black (CROWD: the crowd region)."""
    grey = np.zeros(sample.image.shape[:2], dtype=np.uint8)
    if row == CROWD:
        for box in sample.crowd.astype(int):
            grey[box[1] : box[3], box[0] : box[2]] = 255
    for i in np.flatnonzero(sample.rows == row).tolist():
        grey = np.maximum(grey, np.round(255 * _coverage(sample, i)).astype(np.uint8))
    return replace(sample, image=np.repeat(grey[..., None], 3, 2))


def _coverage(sample: Sample, i: int) -> np.ndarray:
    """(H, W) 0 to 1: how much of each pixel object i takes up."""
    height, width = sample.image.shape[:2]
    frame = Frame(0, 0, FINE * width, FINE * height)
    shape = Outlines.boxes(sample.boxes).sources[i] if sample.outlines is None else sample.outlines.sources[i]
    if isinstance(shape, Bitmap):
        return pixels(sample, i).astype(float)
    fine = shape.placed(np.diag([FINE, FINE, 1.0]), frame).raster(frame)  # type: ignore[union-attr]
    return fine.reshape(height, FINE, width, FINE).mean((1, 3))


def pixels(sample: Sample, i: int) -> np.ndarray:
    """(H, W) uint8, 1 where object i is."""
    frame = Frame.of(sample.image)
    if sample.outlines is not None:
        return sample.outlines.shape(i, frame).raster(frame)
    return Polygons.rectangle(sample.boxes[i]).raster(frame)


def shown(step: Step, samples: Sequence[Sample], seed: int, row: int) -> np.ndarray:
    """(H, W) uint8: how much of each pixel the object `row` takes up after the step."""
    return run(step, [alone(s, row) for s in samples], seed).image[..., 0]


def extent(mask: np.ndarray) -> np.ndarray | None:
    """(4,) xyxy of what is set."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    return np.array([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]) if len(rows) else None


def miss(grey: np.ndarray, box: np.ndarray, full: float = 1.0) -> float:
    """By how many pixels a box misses what is shown, at its worst side.

    A pixel that the object takes up a part of says only that its edge is there or beyond; so the box's sides are held
    between the pixels that the object touches and those that it fills.
    """
    outer, inner = extent(grey > 10 * full), extent(grey > 230 * full)
    if outer is None:
        return float("inf")
    low = outer[:2] - box[:2], box[2:] - outer[2:]  # how far the box reaches beyond what is touched
    beyond = max(float(np.max(low)), 0.0)
    short = 0.0 if inner is None else max(float(np.max([box[:2] - inner[:2], inner[2:] - box[2:]])), 0.0)
    return max(beyond, short)
