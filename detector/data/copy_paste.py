"""Objects pasted onto images: copy-paste (Ghiasi et al., arXiv:2012.07177), by mask or by box, and small-object
copy-paste (Kisantal et al., arXiv:1902.07296).

What is pasted hides what lies below: masks and boxes below shrink to what is left, and objects that are nearly hidden
are dropped.  Crowd regions stay as they are.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import ClassVar, Literal

import cv2
import numpy as np
from pydantic import Field

from detector.data.frames import Frame, scaling, shift, warp
from detector.data.geometry import keep_visible
from detector.data.index import CocoIndex
from detector.data.outlines import Outlines, Polygons, Shape
from detector.data.pasting import blend, cover_objects, outline, rasterize
from detector.data.pool import Pool
from detector.data.resize import like, resample
from detector.data.sample import Sample
from detector.data.steps import Augmentation, Combination, ScaleRange, Share
from detector.data.windows import added, choose, draw_scale
from detector.errors import DataError

JITTER = {"standard": (0.8, 1.25), "large": (0.1, 2.0)}  # Ghiasi et al., section 3
CLEAR = 0.1  # share of a box that other boxes may cover if it is to be pasted without a mask


class CopyPaste(Combination):
    """Some objects of another image, scaled together, sometimes mirrored, somewhere on the sample.

    The publication jitters the image that is pasted into likewise: put `large_scale_jitter` before this step.
    """

    commutes: ClassVar[bool] = True  # what is pasted is brought to the size of the image at once

    type: Literal["copy_paste"] = "copy_paste"
    by: Literal["mask", "box"] = Field("mask", description="box: for sets without masks")
    jitter: Literal["standard", "large"] = Field("standard", description="scale 0.8 to 1.25, or 0.1 to 2")
    share: float = Field(0.5, gt=0, le=1, description="of the other image's objects; at least one is pasted")
    most: int = Field(20, ge=1, description="objects pasted at one time")
    flip: Share = Field(0.5, description="how often they are mirrored")
    edge: float | None = Field(
        None, ge=0, le=100, description="pixels over which the edge fades, 0: hard; default: 0 by mask, 8 by box"
    )
    visible: Share = Field(0.2, description="share of its pixels below which an object is dropped when covered or cut")

    @property
    def uses_masks(self) -> bool:
        return True

    def check(self, index: CocoIndex) -> None:
        rows = ~index.crowd & index.has_mask if self.by == "mask" else ~index.crowd
        if rows.any():
            return
        if self.by == "mask":
            raise DataError(
                f"{index.annotations}: no object has a mask (`segmentation`) for the step copy_paste to cut along: give"
                " that step `by: box`, which pastes boxes with a fading edge"
            )
        raise DataError(f"{index.annotations}: holds no object for the step copy_paste: take the step out")

    def __call__(self, sample: Sample, rng: np.random.Generator, pool: Pool) -> Sample:
        other = pool.draw(rng, "masks" if self.by == "mask" else "objects")
        chosen = self._choose(other, rng)
        if not chosen:  # the drawn image could not be read, and the one in its place holds none
            return sample
        bounds = np.array([shape.bounds() for shape in chosen.values()])
        source = Frame.around(np.concatenate([bounds[:, :2].min(0), bounds[:, 2:].max(0)]), other.image)
        scale = draw_scale(JITTER[self.jitter], rng)
        down, across = (choose(source.size[i], sample.image.shape[i], scale * pool.zoom[i], rng) for i in (0, 1))
        window = Frame(across.at, down.at, across.at + across.size, down.at + down.size)
        part = other.image[source.pixels][down.start : down.start + down.length]
        patch = resample(part[:, across.start : across.start + across.length], window.size)
        # From the other image's pixels to the window's, then to the sample's.
        factors = [across.scale, down.scale]
        offsets = [across.offset - source.left * across.scale, down.offset - source.top * down.scale]
        if rng.random() < self.flip:
            patch = like(cv2.flip(patch, 1), patch)
            factors[0], offsets[0] = -factors[0], window.size[1] - offsets[0]
        offsets = [offsets[0] + window.left, offsets[1] + window.top]
        boxes = bounds * (factors * 2) + (offsets * 2)
        if factors[0] < 0:
            boxes[:, [0, 2]] = boxes[:, [2, 0]]
        maps = np.broadcast_to(scaling(factors, offsets), (len(chosen), 3, 3))
        outlines = Outlines(tuple(chosen.values()), maps, np.full(len(chosen), self.by == "mask"))
        pasted = _objects(sample, outlines, boxes, other, np.array(list(chosen)))
        pasted, cover = rasterize(pasted, window, self.visible)
        if len(pasted.boxes) == 0:
            return sample
        image = sample.image.copy()
        edge = self.edge if self.edge is not None else 0.0 if self.by == "mask" else 8.0
        image[window.pixels] = blend(image[window.pixels], patch, cover, edge * math.sqrt(math.prod(pool.zoom)))
        below = cover_objects(replace(sample, image=image), cover, window, self.visible)
        return added(below, pasted)

    def _choose(self, other: Sample, rng: np.random.Generator) -> dict[int, Shape]:
        """Some of the other image's objects, by their place in it, with the masks or boxes to cut along."""
        can = np.arange(len(other.boxes))
        if self.by == "mask":
            can = can[:0] if other.outlines is None else np.flatnonzero(other.outlines.true)
        count = min(max(round(self.share * len(can)), 1), self.most)
        places = can[rng.permutation(len(can))[:count]].tolist()
        shapes = {i: outline(other, i) if self.by == "mask" else Polygons.rectangle(other.boxes[i]) for i in places}
        return {i: shape for i, shape in shapes.items() if shape.bounds().any()}


class SmallCopyPaste(Augmentation):
    """Each small object of the sample several times more in the same image, a little scaled and turned, and never onto
    another object or a crowd region."""

    type: Literal["small_copy_paste"] = "small_copy_paste"
    below: float = Field(32, ge=2, le=512, description="pixels; objects of less area than this squared are small")
    copies: int = Field(3, ge=1, le=50, description="of each small object")
    most: int = Field(20, ge=1, le=500, description="pasted in all")
    scale: ScaleRange = (0.8, 1.2)
    degrees: float = Field(15, ge=0, le=180, description="of turning either way, for objects with a mask")
    edge: float = Field(1.0, ge=0, le=10, description="pixels over which the edge fades; 0: hard")
    margin: int = Field(5, ge=0, le=100, description="pixels to the image's border")
    tries: int = Field(20, ge=1, le=1000, description="places tried for each copy before it is left out")

    @property
    def uses_masks(self) -> bool:
        return True

    def __call__(self, sample: Sample, rng: np.random.Generator) -> Sample:
        small = self._small(sample)
        queue = np.tile(rng.permutation(small), self.copies)[: self.most]
        taken = np.concatenate([sample.boxes, sample.crowd])
        image, frame = sample.image, Frame.of(sample.image)
        shapes: dict[int, Shape] = {}
        pasted: list[tuple[int, Shape, np.ndarray]] = []
        for i in queue.tolist():
            shape = shapes.setdefault(i, outline(sample, i))
            matrix = self._place(shape, _has_mask(sample, i), taken, image.shape, rng)
            if matrix is None:
                continue
            box = shape.extent(matrix)
            window = Frame.around(box, image)
            cover = shape.placed(matrix, frame).raster(window)
            if not cover.any():
                continue
            patch = warp(sample.image, shift(-window.left, -window.top) @ matrix, window.size, 0)
            image = image.copy() if image is sample.image else image
            image[window.pixels] = blend(image[window.pixels], patch, cover, self.edge)
            taken = np.concatenate([taken, box[None]])
            pasted.append((i, shape, matrix))
        if not pasted:
            return sample
        places = np.array([i for i, _, _ in pasted])
        true = np.array([_has_mask(sample, i) for i in places.tolist()])
        outlines = Outlines(tuple(s for _, s, _ in pasted), np.stack([m for _, _, m in pasted]), true)
        boxes = np.array([outlines.extent(i) for i in range(len(pasted))])
        more = _objects(sample, outlines, boxes, sample, places)
        return added(replace(sample, image=image), keep_visible(more, 0.0))

    def _small(self, sample: Sample) -> np.ndarray:
        """Places of the small objects; without a mask only those that no other box covers, whose pixels would come
        along."""
        boxes = sample.boxes
        sides = boxes[:, 2:] - boxes[:, :2]
        small = np.flatnonzero((sides.prod(1) < self.below**2) & (sides >= 2).all(1))
        low, high = np.maximum(boxes[small, None, :2], boxes[:, :2]), np.minimum(boxes[small, None, 2:], boxes[:, 2:])
        shared = (high - low).clip(min=0).prod(2)
        shared[np.arange(len(small)), small] = 0
        clear = (shared <= CLEAR * sides[small].prod(1)[:, None]).all(1)
        return np.array(
            [i for i, c in zip(small.tolist(), clear.tolist(), strict=True) if c or _has_mask(sample, i)],
            dtype=np.int64,
        )

    def _place(
        self, shape: Shape, turns: bool, taken: np.ndarray, size: tuple[int, ...], rng: np.random.Generator
    ) -> np.ndarray | None:
        """(3, 3): to a free place, scaled and turned; None if none of `tries` is free."""
        scale = draw_scale(self.scale, rng)
        angle = np.deg2rad(rng.uniform(-self.degrees, self.degrees)) if turns else 0.0
        cosine, sine = scale * np.cos(angle), scale * np.sin(angle)
        matrix = np.array([[cosine, -sine, 0], [sine, cosine, 0], [0, 0, 1]])
        box = shape.extent(matrix)
        room = np.array([size[1], size[0]]) - 2 * self.margin - (box[2:] - box[:2])
        if (room < 0).any():
            return None
        corners = self.margin + rng.uniform(size=(self.tries, 2)) * room
        ends = corners + box[2:] - box[:2]
        free = ~((corners[:, None] < taken[:, 2:]) & (ends[:, None] > taken[:, :2])).all(2).any(1)
        if not free.any():
            return None
        corner = corners[free.argmax()]
        return np.asarray(shift(*(corner - box[:2])) @ matrix)


def _objects(sample: Sample, outlines: Outlines, boxes: np.ndarray, source: Sample, places: np.ndarray) -> Sample:
    """The sample's image with no other truth than some objects of `source`, at other boxes."""
    return replace(
        sample,
        boxes=boxes.astype(np.float32),
        labels=source.labels[places],
        rows=source.rows[places],
        weight=None if source.weight is None else source.weight[places],
        crowd=sample.crowd[:0],
        outlines=outlines,
    )


def _has_mask(sample: Sample, i: int) -> bool:
    return sample.outlines is not None and bool(sample.outlines.true[i])
