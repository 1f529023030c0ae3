"""How boxes follow their image: along an axis-parallel map, and what is kept of them at its border.

Pixel edges: an image of width w covers 0..w, so resizing to w' multiplies by w' / w exactly, as cv2.resize samples.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from detector.data.frames import Frame, scaling
from detector.data.sample import Sample


def follow(sample: Sample, image: np.ndarray, scale: tuple[float, float], offset: tuple[float, float]) -> Sample:
    """`sample` on a new image, where x_new = x * scale + offset (x, y each); a negative scale mirrors.

    Boxes are neither clipped nor dropped.  Masks, where the sample has them, follow too.
    """
    factor, shift = np.array(scale, dtype=np.float64), np.array(offset, dtype=np.float64)
    return replace(
        sample,
        image=image,
        boxes=_map(sample.boxes, factor, shift),
        crowd=_map(sample.crowd, factor, shift),
        scale=(sample.scale * factor).astype(np.float32),
        offset=(sample.offset * factor + shift).astype(np.float32),
        outlines=None if sample.outlines is None else sample.outlines.mapped(scaling(scale, offset)),
    )


def keep_visible(sample: Sample, visible: float, side: float = 1.0) -> Sample:
    """Boxes and crowd regions clipped to the image.

    Dropped with their labels and rows: objects of which less than the share `visible` of the area is left, and what is
    thinner than `side` pixels.  Of crowd regions every such rest stays.  Where the sample has masks, the box of an
    object that the border cuts is that of the rest of its mask, and objects without any rest are dropped.
    """
    boxes, crowd = clip(sample.boxes, sample.image), clip(sample.crowd, sample.image)
    whole = sample.boxes[:, 2:] - sample.boxes[:, :2]
    kept = is_left(boxes, whole, visible, side)
    outlines = sample.outlines
    if outlines is not None:
        frame, rest = Frame.of(sample.image), {}
        for i in np.flatnonzero(kept & (boxes != sample.boxes).any(1)).tolist():
            rest[i] = outlines.shape(i, frame)
            bounds = rest[i].bounds()
            boxes[i] = np.concatenate([np.maximum(boxes[i, :2], bounds[:2]), np.minimum(boxes[i, 2:], bounds[2:])])
        kept &= is_left(boxes, whole, visible, side)
        outlines = outlines.changed(rest)
    crowd = crowd[(crowd[:, 2:] - crowd[:, :2] >= side).all(1)]
    return take(replace(sample, boxes=boxes, crowd=crowd, outlines=outlines), kept)


def take(sample: Sample, kept: np.ndarray) -> Sample:
    """Only the objects of an index or of a mask of n bools; crowd regions stay."""
    return replace(
        sample,
        boxes=sample.boxes[kept],
        labels=sample.labels[kept],
        rows=sample.rows[kept],
        weight=None if sample.weight is None else sample.weight[kept],
        outlines=None if sample.outlines is None else sample.outlines.take(kept),
    )


def joined_weights(parts: Sequence[Sample]) -> np.ndarray | None:
    """(n,) of the objects of all parts, 1 where a part has none; None where no part has any."""
    return None if all(part.weight is None for part in parts) else np.concatenate([weights(part) for part in parts])


def weights(sample: Sample) -> np.ndarray:
    """(n,) float32: how much each object counts."""
    return np.ones(len(sample.boxes), dtype=np.float32) if sample.weight is None else sample.weight


def is_left(boxes: np.ndarray, whole: np.ndarray, visible: float, side: float) -> np.ndarray:
    """(n,) bool: the box has sides of at least `side` and at least the share `visible` of `whole`, (n, 2) sides."""
    left = boxes[:, 2:] - boxes[:, :2]
    return np.asarray((left >= side).all(1) & (left.prod(1) >= visible * whole.prod(1)))


def clip(boxes: np.ndarray, image: np.ndarray) -> np.ndarray:
    """(n, 4) xyxy within an image (H, W, ...)."""
    height, width = image.shape[:2]
    return boxes.clip(0, np.array([width, height, width, height], dtype=np.float32))


def _map(boxes: np.ndarray, scale: np.ndarray, offset: np.ndarray) -> np.ndarray:
    if len(boxes) == 0:
        return boxes
    mapped = boxes.reshape(-1, 2, 2) * scale + offset
    if scale[0] < 0 or scale[1] < 0:  # mirrored: the far corner has become the near one
        mapped.sort(1)
    return mapped.astype(np.float32).reshape(-1, 4)
