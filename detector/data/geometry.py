"""How boxes follow their image: along an axis-parallel map, and what is kept of them at its border.

Pixel edges: an image of width w covers 0..w, so resizing to w' multiplies by w' / w exactly, as cv2.resize samples.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from detector.data.sample import Sample


def follow(sample: Sample, image: np.ndarray, scale: tuple[float, float], offset: tuple[float, float]) -> Sample:
    """`sample` on a new image, where x_new = x * scale + offset (x, y each); a negative scale mirrors.

    Boxes are neither clipped nor dropped.
    """
    factor, shift = np.array(scale, dtype=np.float64), np.array(offset, dtype=np.float64)
    return replace(
        sample,
        image=image,
        boxes=_map(sample.boxes, factor, shift),
        crowd=_map(sample.crowd, factor, shift),
        scale=(sample.scale * factor).astype(np.float32),
        offset=(sample.offset * factor + shift).astype(np.float32),
    )


def keep_visible(sample: Sample, visible: float, side: float = 1.0) -> Sample:
    """Boxes and crowd regions clipped to the image.

    Dropped with their labels and rows: objects of which less than the share `visible` of the area is left, and what is
    thinner than `side` pixels.  Of crowd regions every such rest stays.
    """
    boxes, crowd = clip(sample.boxes, sample.image), clip(sample.crowd, sample.image)
    left = boxes[:, 2:] - boxes[:, :2]
    whole = sample.boxes[:, 2:] - sample.boxes[:, :2]
    kept = (left >= side).all(1) & (left.prod(1) >= visible * whole.prod(1))
    return replace(
        sample,
        boxes=boxes[kept],
        labels=sample.labels[kept],
        rows=sample.rows[kept],
        crowd=crowd[(crowd[:, 2:] - crowd[:, :2] >= side).all(1)],
    )


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
