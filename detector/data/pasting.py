"""What pasting does to the pixels and to the truth below: used by all forms of copy-paste, cutout and grid mask."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import cv2
import numpy as np

from detector.data.frames import Frame
from detector.data.geometry import clip, is_left, take
from detector.data.outlines import Bitmap, Polygons, Shape
from detector.data.resize import like
from detector.data.sample import Sample


def blend(below: np.ndarray, above: np.ndarray, cover: np.ndarray, edge: float) -> np.ndarray:
    """(h, w, C): `above` where the (h, w) uint8 `cover` is 1.

    Within `edge` pixels of the cover's rim it fades, so nothing from outside the cover comes along.
    """
    if edge == 0:
        return np.asarray(cv2.copyTo(above, cover, below.copy()))
    rim = cv2.copyMakeBorder(cover, 1, 1, 1, 1, cv2.BORDER_CONSTANT, value=0)
    depth = cv2.distanceTransform(rim, cv2.DIST_L2, 3)[1:-1, 1:-1]
    weight = np.minimum(depth * np.float32(1 / (edge + 1)), np.float32(1))
    if above.dtype != np.uint8:  # more bits than cv2 blends
        shares = weight[..., None]
        return np.rint(above * shares + below * (1 - shares)).astype(above.dtype)
    return like(cv2.blendLinear(above, below, weight, 1 - weight), above)


def rasterize(objects: Sample, window: Frame, visible: float) -> tuple[Sample, np.ndarray]:
    """The objects on the pixels of a window of their image, and the (h, w) uint8 cover of the window: 1 where any is.

    Boxes become those of the pixels.  Objects that the image's border cuts to less than the share `visible` of their
    box are left out, and those that fill no pixel or are thinner than one.
    """
    clipped = clip(objects.boxes, objects.image)
    sides = objects.boxes[:, 2:] - objects.boxes[:, :2]
    kept = is_left(clipped, sides, visible, 1.0)
    while True:
        objects, sides, clipped = take(objects, kept), sides[kept], clipped[kept]
        assert objects.outlines is not None
        cover, boxes = objects.outlines.drawn_together(window)
        cut = (clipped != objects.boxes).any(1)
        kept = is_left(boxes, np.where(cut[:, None], sides, 0), visible, 1.0)
        if kept.all():
            frames = {i: Frame(*boxes[i].astype(int).tolist()) for i in np.flatnonzero(cut).tolist()}
            return replace(objects, boxes=boxes, outlines=objects.outlines.cut(frames)), cover


def cover_objects(sample: Sample, cover: np.ndarray, window: Frame, visible: float, shrink: bool = True) -> Sample:
    """The sample's truth where the pixels of `cover`, (h, w) uint8 in `window`, are hidden by something.

    Objects of which less than the share `visible` is left, or less than a pixel's width, are dropped.  Boxes and masks
    of the others shrink to what is left, unless `shrink` is off.  Crowd regions stay.
    """
    boxes, kept, rest = sample.boxes.copy(), np.ones(len(sample.boxes), dtype=bool), {}
    near = (boxes[:, :2] < (window.right, window.bottom)).all(1) & (boxes[:, 2:] > (window.left, window.top)).all(1)
    for i in np.flatnonzero(near).tolist():
        own = Frame.around(boxes[i], sample.image)
        shared = own.shared(window)
        hidden = cover[shared.within(window)]
        if hidden.size == 0 or cv2.countNonZero(hidden) == 0:
            continue
        pixels = draw(sample, i, own)
        before, extent = cv2.countNonZero(pixels), cv2.boundingRect(pixels)
        if before == 0:  # thinner than a pixel
            pixels[:] = 1
            before, extent = pixels.size, (0, 0, pixels.shape[1], pixels.shape[0])
        part = shared.within(own)
        pixels[part] = cv2.subtract(pixels[part], hidden)  # of zeros and ones, never below zero
        count = cv2.countNonZero(pixels)
        if count == before:
            continue
        thin = False
        if shrink and count:
            box = _shrunk(boxes[i].tolist(), extent, cv2.boundingRect(pixels), own)
            boxes[i], thin = box, box[2] - box[0] < 1 or box[3] - box[1] < 1
            rest[i] = Bitmap(pixels, own.left, own.top)
        kept[i] = count > 0 and count >= visible * before and not thin
    outlines = None if sample.outlines is None else sample.outlines.changed(rest)
    return take(replace(sample, boxes=boxes, outlines=outlines), kept)


def outline(sample: Sample, i: int) -> Shape:
    """Object i's mask within the image; its box where nothing better is known."""
    if sample.outlines is None:
        return Polygons.rectangle(sample.boxes[i])
    return sample.outlines.shape(i, Frame.of(sample.image))


def draw(sample: Sample, i: int, frame: Frame) -> np.ndarray:
    """(height, width) uint8 of the frame: 1 where object i is; all of its box where nothing better is known."""
    if sample.outlines is None:
        return Polygons.rectangle(sample.boxes[i]).raster(frame)
    return sample.outlines.drawn(i, frame)


def _shrunk(box: list[float], before: Sequence[int], after: Sequence[int], own: Frame) -> tuple[float, ...]:
    """The xyxy box with those sides moved in at which no pixel is left; the others stay, fractions of pixels included.

    Args:
        before, after: what encloses the pixels, as x, y, width, height in `own`.
    """
    moved = list(box)
    for axis, corner in ((0, own.left), (1, own.top)):
        low, high = after[axis], after[axis] + after[axis + 2]
        if low != before[axis]:
            moved[axis] = max(corner + low, box[axis])
        if high != before[axis] + before[axis + 2]:
            moved[axis + 2] = min(corner + high, box[axis + 2])
    return tuple(moved)
