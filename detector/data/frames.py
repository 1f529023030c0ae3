"""Rectangles of whole pixels, and (3, 3) maps of points and pictures; pixel edges throughout."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import cv2
import numpy as np

SAME = np.eye(3)


class Frame(NamedTuple):
    """A rectangle of whole pixels."""

    left: int
    top: int
    right: int
    bottom: int

    @classmethod
    def of(cls, image: np.ndarray) -> Frame:
        return cls(0, 0, image.shape[1], image.shape[0])

    @classmethod
    def around(cls, box: np.ndarray, image: np.ndarray) -> Frame:
        """The pixels of an image that an xyxy box touches; may be empty."""
        x, y, end_x, end_y = box.tolist()
        left, top = max(math.floor(x), 0), max(math.floor(y), 0)
        right, bottom = min(math.ceil(end_x), image.shape[1]), min(math.ceil(end_y), image.shape[0])
        return cls(left, top, max(left, right), max(top, bottom))

    @property
    def pixels(self) -> tuple[slice, slice]:
        """Of an image's rows and columns."""
        return slice(self.top, self.bottom), slice(self.left, self.right)

    @property
    def size(self) -> tuple[int, int]:
        """height, width"""
        return self.bottom - self.top, self.right - self.left

    def shared(self, other: Frame) -> Frame:
        """The pixels in both; may be empty."""
        left, top = max(self.left, other.left), max(self.top, other.top)
        right, bottom = min(self.right, other.right), min(self.bottom, other.bottom)
        return Frame(left, top, max(left, right), max(top, bottom))

    def within(self, whole: Frame) -> tuple[slice, slice]:
        """Rows and columns of `whole` that this part of it takes up."""
        return (
            slice(self.top - whole.top, self.bottom - whole.top),
            slice(self.left - whole.left, self.right - whole.left),
        )


def scaling(scale: Sequence[float] | np.ndarray, offset: Sequence[float] | np.ndarray) -> np.ndarray:
    """(3, 3): x_new = x * scale + offset."""
    return np.array([[scale[0], 0, offset[0]], [0, scale[1], offset[1]], [0, 0, 1]], dtype=np.float64)


def shift(x: float, y: float) -> np.ndarray:
    """(3, 3)"""
    return scaling((1, 1), (x, y))


def move(points: np.ndarray, matrix: np.ndarray) -> np.ndarray:
    """(n, 2) x, y behind a (3, 3) map, which must leave them before the horizon."""
    if matrix is SAME:
        return points
    moved = points @ matrix[:2, :2].T + matrix[:2, 2]
    if matrix[2, 0] or matrix[2, 1]:
        moved = moved / (points @ matrix[2, :2] + matrix[2, 2])[:, None]
    return np.asarray(moved)


def warp(
    image: np.ndarray,
    matrix: np.ndarray,
    size: tuple[int, int],
    ground: int | Sequence[int],
    interpolation: int = cv2.INTER_LINEAR,
) -> np.ndarray:
    """(height, width, ...): the image behind a (3, 3) map given for pixel edges; `ground` where there is none."""
    if image.ndim == 3 and image.shape[2] > 4:  # ground of more than four channels is more than OpenCV takes
        grounds = np.broadcast_to(ground, image.shape[2]).tolist()
        parts = [(np.ascontiguousarray(image[..., i : i + 4]), grounds[i : i + 4]) for i in range(0, len(grounds), 4)]
        return np.concatenate([warp(part, matrix, size, colour, interpolation) for part, colour in parts], axis=2)
    centered = shift(-0.5, -0.5) @ matrix @ shift(0.5, 0.5)  # OpenCV counts from the first pixel's centre
    options: dict[str, Any] = {"flags": interpolation, "borderMode": cv2.BORDER_CONSTANT, "borderValue": ground}
    if matrix[2, 0] or matrix[2, 1]:
        out = cv2.warpPerspective(image, centered, size[::-1], **options)
    else:
        out = cv2.warpAffine(image, centered[:2], size[::-1], **options)
    return np.asarray(out if out.ndim == image.ndim else out[..., None])
