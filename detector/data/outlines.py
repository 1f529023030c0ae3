"""Masks of a sample's objects that follow them through scaling, cutting, warping and covering.

A mask is read from the annotation file when a step asks for it and not before; until then its object carries a matrix
that leads from the pixels of the file to the present ones.  n objects, v corners of a polygon; pixel edges throughout.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import cv2
import numpy as np
from pycocotools import mask as rle

from detector.data.frames import SAME, move, shift, warp
from detector.data.frames import Frame as Frame
from detector.data.masks import iou, name_point
from detector.errors import DataError

if TYPE_CHECKING:
    from detector.data.index import CocoIndex

LEAST_AGREEMENT = 0.5  # IoU of a mask's own box and its annotated one; below it, one of them belongs to another object


class Shape(ABC):
    """The pixels of one object."""

    @abstractmethod
    def extent(self, matrix: np.ndarray) -> np.ndarray:
        """(4,) xyxy of the whole shape behind a (3, 3) map; `EMPTY` if it holds nothing."""

    @abstractmethod
    def placed(self, matrix: np.ndarray, frame: Frame) -> Shape:
        """Behind the map, and only what lies within the frame."""

    @abstractmethod
    def drawn(self, matrix: np.ndarray, frame: Frame) -> np.ndarray:
        """(height, width) uint8 of the frame: 1 where the object is, behind the map."""

    def raster(self, frame: Frame) -> np.ndarray:
        """(height, width) uint8 of the frame: 1 where the object is."""
        return self.drawn(SAME, frame)

    def bounds(self) -> np.ndarray:
        """(4,) xyxy; `EMPTY` if it holds nothing."""
        return self._bounds

    @cached_property
    def _bounds(self) -> np.ndarray:
        return self.extent(SAME)


EMPTY = np.zeros(4)


@dataclass(frozen=True, eq=False)
class Polygons(Shape):
    """The union of closed rings of corners."""

    rings: tuple[np.ndarray, ...]  # (v, 2) float64 x, y each

    @classmethod
    def rectangle(cls, box: np.ndarray) -> Polygons:
        left, top, right, bottom = (float(v) for v in box)
        return cls((np.array([[left, top], [right, top], [right, bottom], [left, bottom]]),))

    def extent(self, matrix: np.ndarray) -> np.ndarray:
        if not self.rings:
            return EMPTY
        corners = move(self.rings[0] if len(self.rings) == 1 else np.concatenate(self.rings), matrix)
        return np.concatenate([corners.min(0), corners.max(0)])

    def placed(self, matrix: np.ndarray, frame: Frame) -> Shape:
        reach = self.extent(matrix)
        if _holds(frame, reach):
            return self if matrix is SAME else Polygons(tuple(move(ring, matrix) for ring in self.rings))
        rings = []
        for ring in self.rings:
            moved = move(ring, matrix)
            cut = _cut(moved, frame)
            if len(cut) < 3:
                continue
            if cut is not moved and _has_false_corner(cut, moved, frame):
                # The cut has fallen into parts that are joined along two sides of the frame, around a corner which is
                # none of the object's.  Seldom, and pixels know nothing of such joints.
                whole = Polygons(tuple(move(r, matrix) for r in self.rings))
                return Bitmap(whole.raster(frame), frame.left, frame.top)
            rings.append(cut)
        return Polygons(tuple(rings))

    def drawn(self, matrix: np.ndarray, frame: Frame) -> np.ndarray:
        return _draw(self.runs(matrix, frame), frame)

    def runs(self, matrix: np.ndarray, frame: Frame) -> list[Any]:
        """Each ring's pixels in the frame, as COCO encodes them."""
        height, width = frame.size
        if not self.rings or height == 0 or width == 0:
            return []
        corner = np.array([frame.left, frame.top], dtype=np.float64)
        return list(rle.frPyObjects([(move(r, matrix) - corner).ravel().tolist() for r in self.rings], height, width))


def _draw(runs: list[Any], frame: Frame) -> np.ndarray:
    """(height, width) uint8 of the frame: the union of COCO's run lengths in it."""
    if not runs:
        return np.zeros(frame.size, dtype=np.uint8)
    columns = rle.decode(runs[0] if len(runs) == 1 else rle.merge(runs)).T  # as COCO stores them
    return np.asarray(cv2.transpose(columns))


@dataclass(frozen=True, eq=False)
class Bitmap(Shape):
    """Pixels, the first of them at `left`, `top`."""

    pixels: np.ndarray  # (h, w) uint8, 1 where the object is
    left: int
    top: int

    @classmethod
    def of(cls, mask: np.ndarray | None) -> Bitmap:
        """The filled part of an (H, W) mask."""
        if mask is None or not mask.any():
            return cls(np.zeros((0, 0), dtype=np.uint8), 0, 0)
        rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
        part = mask[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
        return cls(np.ascontiguousarray(part, dtype=np.uint8), int(columns[0]), int(rows[0]))

    def extent(self, matrix: np.ndarray) -> np.ndarray:
        """Of the corners of the pixels at the ends of each row: no other corner reaches further."""
        if matrix is SAME:
            if self.pixels.size == 0:
                return EMPTY
            left, top, width, height = cv2.boundingRect(self.pixels)
            x, y = left + self.left, top + self.top
            return np.array([x, y, x + width, y + height], dtype=np.float64) if width else EMPTY
        rows = np.flatnonzero(self.pixels.any(1))
        if len(rows) == 0:
            return EMPTY
        filled = self.pixels[rows]
        first, last = filled.argmax(1), filled.shape[1] - filled[:, ::-1].argmax(1)
        columns = np.concatenate([first, last, first, last]) + self.left
        heights = np.concatenate([rows, rows, rows + 1, rows + 1]) + self.top
        corners = move(np.stack([columns, heights], 1).astype(np.float64), matrix)
        return np.concatenate([corners.min(0), corners.max(0)])

    def placed(self, matrix: np.ndarray, frame: Frame) -> Shape:
        """Resampled, so true to about half a pixel."""
        if np.array_equal(matrix, SAME):
            height, width = self.pixels.shape
            left, right = max(self.left, frame.left), min(self.left + width, frame.right)
            top, bottom = max(self.top, frame.top), min(self.top + height, frame.bottom)
            seen = Frame(left, top, max(left, right), max(top, bottom))
        else:
            reach = self.extent(matrix).clip(
                [frame.left, frame.top, frame.left, frame.top], [frame.right, frame.bottom, frame.right, frame.bottom]
            )
            left, top = np.floor(reach[:2]).astype(int).tolist()
            right, bottom = np.ceil(reach[2:]).astype(int).tolist()
            seen = Frame(left, top, right, bottom)
        if 0 in seen.size:
            return Bitmap(np.zeros((0, 0), dtype=np.uint8), seen.left, seen.top)
        if np.array_equal(matrix, SAME):
            return Bitmap(self._part(seen), seen.left, seen.top)
        inner = shift(-seen.left, -seen.top) @ matrix @ shift(self.left, self.top)
        # A pixel is in if its middle lies in one that was: smoothing would round corners off.
        return Bitmap(warp(self.pixels, inner, seen.size, 0, cv2.INTER_NEAREST), seen.left, seen.top)

    def drawn(self, matrix: np.ndarray, frame: Frame) -> np.ndarray:
        if np.array_equal(matrix, SAME):
            return self._part(frame)
        placed = self.placed(matrix, frame)
        assert isinstance(placed, Bitmap)
        return placed._part(frame)

    def _part(self, frame: Frame) -> np.ndarray:
        out = np.zeros(frame.size, dtype=np.uint8)
        y, x = self.top - frame.top, self.left - frame.left
        part = self.pixels[max(-y, 0) : max(frame.size[0] - y, 0), max(-x, 0) : max(frame.size[1] - x, 0)]
        out[max(y, 0) : max(y, 0) + part.shape[0], max(x, 0) : max(x, 0) + part.shape[1]] = part
        return out


@dataclass(frozen=True, eq=False)
class Stored:
    """A mask in the annotation file, read when it is asked for; the box where the file has none."""

    index: CocoIndex
    row: int
    true: bool  # the file has one
    # What was asked for last, for as long as the sample is kept: in which frame, and the answer.
    _drawn: dict[Frame, np.ndarray] = field(default_factory=dict)  # a bit a pixel
    _within: dict[Frame, Shape] = field(default_factory=dict)

    def drawn(self, frame: Frame) -> np.ndarray:
        """(height, width) uint8 of the frame, in the file's own pixels."""
        packed = self._drawn.get(frame)
        if packed is None:
            pixels = self.shape.raster(frame)
            self._drawn.clear()
            self._drawn[frame] = np.packbits(pixels)
            return pixels
        height, width = frame.size
        return np.unpackbits(packed, count=height * width).reshape(height, width)

    def within(self, frame: Frame) -> Shape:
        """What lies in the frame, in the file's own pixels."""
        shape = self._within.get(frame)
        if shape is None:
            shape = self.shape.placed(SAME, frame)
            self._within.clear()
            self._within[frame] = shape
        return shape

    @cached_property
    def shape(self) -> Shape:
        """
        Raises:
            DataError: the mask is wrong or disagrees with its box: names the annotation.
        """
        index, row = self.index.origin(self.row)
        box = index.boxes[row].astype(np.float64)
        if not self.true:
            return Polygons.rectangle(box)
        height, width = index.sizes[index.image_of(row)].tolist()
        rings = index.rings(row)
        found = Polygons(rings) if rings is not None else Bitmap.of(index.mask(row))
        bounds = found.bounds().clip(0, [width, height, width, height])
        if iou(bounds, box) < LEAST_AGREEMENT and np.abs(bounds - box).max() > 2:
            raise DataError(
                f"{index.annotations}: annotation id {index.annotation_ids[row]}: the mask reaches from"
                f" {name_point(bounds[:2])} to {name_point(bounds[2:])}, but its bbox from {name_point(box[:2])} to"
                f" {name_point(box[2:])}: one of them is wrong; {index.doctor} finds them all"
            )
        return found


@dataclass(frozen=True, eq=False)
class Part:
    """What a frame shows of a shape behind a (3, 3) map; cut when it is asked for."""

    whole: Shape
    matrix: np.ndarray
    frame: Frame

    @cached_property
    def shape(self) -> Shape:
        return self.whole.placed(self.matrix, self.frame)


@dataclass(frozen=True, eq=False)
class Outlines:
    """The masks of n objects, in the order of their boxes."""

    sources: tuple[Shape | Stored | Part, ...]  # n
    maps: np.ndarray  # (n, 3, 3) float64: from the source's pixels to the present ones
    true: np.ndarray  # (n,) bool: a mask, not the box in its place

    @classmethod
    def stored(cls, index: CocoIndex, rows: np.ndarray) -> Outlines:
        """Of annotations, in the image's own pixels; nothing is read yet."""
        maps = np.broadcast_to(SAME, (len(rows), 3, 3))
        true = index.spans[rows, 1] > index.spans[rows, 0]
        stored = tuple(Stored(index, row, has) for row, has in zip(rows.tolist(), true.tolist(), strict=True))
        return cls(stored, maps, true)

    @classmethod
    def boxes(cls, boxes: np.ndarray) -> Outlines:
        """The boxes themselves, where nothing better is known."""
        maps = np.broadcast_to(SAME, (len(boxes), 3, 3))
        return cls(tuple(Polygons.rectangle(box) for box in boxes), maps, np.zeros(len(boxes), dtype=bool))

    @classmethod
    def join(cls, parts: Sequence[Outlines]) -> Outlines:
        sources = tuple(source for part in parts for source in part.sources)
        return cls(sources, np.concatenate([p.maps for p in parts]), np.concatenate([p.true for p in parts]))

    def __len__(self) -> int:
        return len(self.sources)

    def take(self, kept: np.ndarray) -> Outlines:
        """Those of an index, or of a mask of n bools."""
        places = np.flatnonzero(kept) if kept.dtype == bool else kept
        return Outlines(tuple(self.sources[i] for i in places.tolist()), self.maps[places], self.true[places])

    def mapped(self, matrix: np.ndarray) -> Outlines:
        """Behind one more (3, 3) map."""
        return replace(self, maps=matrix @ self.maps)

    def extent(self, i: int) -> np.ndarray:
        """(4,) xyxy of object i's mask, what lies outside the image included."""
        return self._source(i).extent(self.maps[i])

    def shape(self, i: int, frame: Frame) -> Shape:
        """Object i's mask in present pixels, as far as it lies within the frame.

        Raises:
            DataError: the annotation file holds a wrong mask.
        """
        source, matrix = self.sources[i], self.maps[i]
        if isinstance(source, Stored) and (matrix == SAME).all():
            return source.within(frame)
        return self._source(i).placed(matrix, frame)

    def drawn(self, i: int, frame: Frame) -> np.ndarray:
        """(height, width) uint8 of the frame: 1 where object i is."""
        source, matrix = self.sources[i], self.maps[i]
        if isinstance(source, Stored) and (matrix == SAME).all():
            return source.drawn(frame)
        return self._source(i).drawn(matrix, frame)

    def drawn_together(self, frame: Frame) -> tuple[np.ndarray, np.ndarray]:
        """All of them at once.

        Returns:
            (height, width) uint8 of the frame, 1 where any of them is, and (n, 4) float32 xyxy around the pixels of
            each within the frame; zeros for one that fills none.
        """
        runs, owners, pixels = [], [], []
        boxes = np.zeros((len(self), 4), dtype=np.float32)
        for i in range(len(self)):
            source = self._source(i)
            if isinstance(source, Polygons):
                own = source.runs(self.maps[i], frame)
                runs += own
                owners += [i] * len(own)
            else:
                drawn = Bitmap(self.drawn(i, frame), frame.left, frame.top)
                boxes[i] = drawn.bounds()
                pixels.append(drawn.pixels)
        if runs:
            found = rle.toBbox(runs)
            filled = found[:, 2:].all(1)
            low, owner = found[filled, :2] + (frame.left, frame.top), np.array(owners)[filled]
            boxes[owner, :2] = np.inf
            np.minimum.at(boxes[:, :2], owner, low)
            np.maximum.at(boxes[:, 2:], owner, low + found[filled, 2:])
        cover = _draw(runs, frame)
        for other in pixels:
            np.maximum(cover, other, out=cover)
        return cover, boxes

    def cut(self, frames: Mapping[int, Frame]) -> Outlines:
        """Some of them as far as they lie within a frame of their own, which is found out when one is asked for."""
        return self.changed({i: Part(self._source(i), self.maps[i], frame) for i, frame in frames.items()})

    def changed(self, shapes: Mapping[int, Shape | Part]) -> Outlines:
        """With these masks, in present pixels, in place of those before."""
        if not shapes:
            return self
        sources, maps = list(self.sources), self.maps.copy()
        for i, shape in shapes.items():
            sources[i], maps[i] = shape, SAME
        return replace(self, sources=tuple(sources), maps=maps)

    def _source(self, i: int) -> Shape:
        source = self.sources[i]
        return source if isinstance(source, Shape) else source.shape


def _cut(ring: np.ndarray, frame: Frame) -> np.ndarray:
    """A ring's part in a frame, side after side (Sutherland and Hodgman, 1974); the ring itself if all of it is in."""
    for axis, bound, sign in ((0, frame.left, 1), (0, frame.right, -1), (1, frame.top, 1), (1, frame.bottom, -1)):
        depth = sign * (ring[:, axis] - bound)
        inside = depth >= 0
        if inside.all():
            continue
        if not inside.any():
            return ring[:0]
        following, next_inside = np.roll(ring, -1, 0), np.roll(inside, -1)
        crosses = inside != next_inside
        step = np.where(crosses, depth - np.roll(depth, -1), 1.0)
        crossing = ring + (depth / step)[:, None] * (following - ring)
        crossing[:, axis] = bound
        ring = np.stack([crossing, following], 1)[np.stack([crosses, next_inside], 1)]
    return ring


def _has_false_corner(cut: np.ndarray, ring: np.ndarray, frame: Frame) -> bool:
    """Whether a cut ring runs through a corner of the frame that the whole ring does not hold."""
    contour = ring.astype(np.float32)
    for x in (frame.left, frame.right):
        for y in (frame.top, frame.bottom):
            at = (cut[:, 0] == x) & (cut[:, 1] == y)
            if at.any() and cv2.pointPolygonTest(contour, (float(x), float(y)), False) < 0:
                return True
    return False


def _holds(frame: Frame, box: np.ndarray) -> bool:
    left, top, right, bottom = box.tolist()
    return bool(left >= frame.left and top >= frame.top and right <= frame.right and bottom <= frame.bottom)
