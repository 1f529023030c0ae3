"""What pasting does to the pixels and to the truth below: used by all forms of copy-paste, cutout and grid mask."""

from __future__ import annotations

from dataclasses import replace

import cv2
import numpy as np

from detector.data.geometry import take
from detector.data.outlines import Bitmap, Frame, Polygons, Shape
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


def rasterize(objects: Sample, window: Frame) -> tuple[Sample, np.ndarray]:
    """The objects as pixels of a window, and the (h, w) uint8 cover of the window: 1 where any of them is.

    Boxes and masks become those of the pixels; objects that fill none are left out.
    """
    cover, pixels = np.zeros(window.size, dtype=np.uint8), {}
    boxes = objects.boxes.copy()
    for i in range(len(boxes)):
        own = _overlap(boxes[i], window)
        pixels[i] = Bitmap(draw(objects, i, own), own.left, own.top)
        boxes[i] = pixels[i].bounds()
        part = cover[inside(own, window)]
        np.maximum(part, pixels[i].pixels, out=part)
    outlines = None if objects.outlines is None else objects.outlines.changed(pixels)
    return take(replace(objects, boxes=boxes, outlines=outlines), np.flatnonzero(boxes.any(1))), cover


def cover_objects(sample: Sample, cover: np.ndarray, window: Frame, visible: float, shrink: bool = True) -> Sample:
    """The sample's truth where the pixels of `cover`, (h, w) uint8 in `window`, are hidden by something.

    Objects of which less than the share `visible` is left, or less than a pixel's width, are dropped.  Boxes and masks
    of the others shrink to what is left, unless `shrink` is off.  Crowd regions stay.
    """
    boxes, kept, rest = sample.boxes.copy(), np.ones(len(sample.boxes), dtype=bool), {}
    near = (boxes[:, :2] < (window.right, window.bottom)).all(1) & (boxes[:, 2:] > (window.left, window.top)).all(1)
    for i in np.flatnonzero(near).tolist():
        own = Frame.around(boxes[i], sample.image)
        shared = _overlap(boxes[i], window)
        hidden = cover[inside(shared, window)]
        if hidden.size == 0 or cv2.countNonZero(hidden) == 0:
            continue
        whole = draw(sample, i, own)
        before = cv2.countNonZero(whole)
        if before == 0:  # thinner than a pixel
            whole[:] = 1
            before = whole.size
        left = whole.copy()
        part = inside(shared, own)
        left[part] = cv2.subtract(left[part], hidden)  # of zeros and ones, never below zero
        count = cv2.countNonZero(left)
        if count == before:
            continue
        if shrink and count:
            boxes[i] = _shrunk(boxes[i], whole, left, own)
            rest[i] = Bitmap(left, own.left, own.top)
        thin = bool((boxes[i, 2:] - boxes[i, :2] < 1).any())
        kept[i] = count > 0 and count >= visible * before and not (shrink and thin)
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


def inside(part: Frame, window: Frame) -> tuple[slice, slice]:
    """Rows and columns of `window` that `part` takes up."""
    rows, columns = part.pixels
    return (
        slice(rows.start - window.top, rows.stop - window.top),
        slice(columns.start - window.left, columns.stop - window.left),
    )


def _overlap(box: np.ndarray, window: Frame) -> Frame:
    """The pixels of the window that an xyxy box touches."""
    left, top = max(int(np.floor(box[0])), window.left), max(int(np.floor(box[1])), window.top)
    right, bottom = min(int(np.ceil(box[2])), window.right), min(int(np.ceil(box[3])), window.bottom)
    return Frame(left, top, max(left, right), max(top, bottom))


def _shrunk(box: np.ndarray, whole: np.ndarray, left: np.ndarray, own: Frame) -> np.ndarray:
    """The box with those sides moved in at which no pixel is left; the others stay, fractions of pixels included."""
    before, after = Bitmap(whole, own.left, own.top).bounds(), Bitmap(left, own.left, own.top).bounds()
    moved = np.where(after == before, box, after)
    return np.concatenate([np.maximum(moved[:2], box[:2]), np.minimum(moved[2:], box[2:])])
