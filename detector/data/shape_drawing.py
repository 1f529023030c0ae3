"""Drawing for the generated pictures, in integer arithmetic alone, so that every machine draws the same pixels.

Colours are int16 (H, W, 3) and may leave 0..255 until `finish`.
"""

from __future__ import annotations

import struct
import zlib
from dataclasses import dataclass

import numpy as np

SUB = 16  # drawing positions per pixel
_DISTANCE = 150  # of an object's colour from what it covers: sum over the channels
_TRIES = 30  # colours tried
_BITS = 8
_ONE = 1 << _BITS  # positions between two corners of a cloud
_CLOUDS = ((2, 40, 30), (6, 30, 18), (24, 24, 10))  # cells either way, strength in light, strength in colour


@dataclass(frozen=True)
class Stamp:
    """The pixels of one outline."""

    window: tuple[slice, slice]  # rows and columns of the image
    mask: np.ndarray  # bool, of the window's size


def rasterize(polygon: np.ndarray) -> Stamp:
    """The pixels whose centres are inside a polygon (v, 2) int64 in 1 / SUB pixels, by the even-odd rule.

    Every edge crosses a row of pixel centres at most once; each crossing flips all pixels to its right.
    """
    (left, top), (right, bottom) = polygon.min(0) // SUB, -(-polygon.max(0) // SUB)
    start = polygon - np.array([left, top]) * SUB
    end = np.roll(start, -1, 0)
    down = (start[:, 1] <= end[:, 1])[:, None]
    start, end = np.where(down, start, end), np.where(down, end, start)
    rows = np.arange(bottom - top, dtype=np.int64) * SUB + SUB // 2
    edge, row = np.nonzero((start[:, 1:] <= rows) & (rows < end[:, 1:]))
    (x0, y0), (dx, dy) = start[edge].T, (end - start)[edge].T
    # First column whose centre is not left of the crossing: a ceiling division of exact integers.
    column = -(-((x0 - SUB // 2) * dy + (rows[row] - y0) * dx) // (SUB * dy))
    flips = np.zeros((bottom - top, right - left + 1), dtype=np.int64)
    np.add.at(flips, (row, column), 1)
    return Stamp((slice(int(top), int(bottom)), slice(int(left), int(right))), flips.cumsum(1)[:, :-1] % 2 == 1)


def ground(size: tuple[int, int], rng: np.random.Generator) -> np.ndarray:
    """(H, W, 3) int16 colours: clouds of light and of colour in three sizes around one colour."""
    color = np.zeros((3, *size), dtype=np.int32) + rng.integers(70, 186, size=(3, 1, 1), dtype=np.int32) * _ONE
    for cells, light, tint in _CLOUDS:
        shape = (cells + 1, cells + 1)
        corners = rng.integers(-light, light + 1, size=shape, dtype=np.int32)
        corners = corners + rng.integers(-tint, tint + 1, size=(3, *shape), dtype=np.int32)
        lines = _stretch(corners.transpose(0, 2, 1), size[0]).transpose(0, 2, 1)
        color += _stretch(lines, size[1]) >> _BITS
    return (color >> _BITS).transpose(1, 2, 0).astype(np.int16)


def _stretch(corners: np.ndarray, length: int) -> np.ndarray:
    """(..., cells + 1) int32 to (..., length), linear in between and _ONE times as large."""
    cells = corners.shape[-1] - 1
    position = np.arange(length, dtype=np.int32) * cells * _ONE // length
    cell, part = position // _ONE, position % _ONE
    return corners[..., cell] * (_ONE - part) + corners[..., cell + 1] * part


def paint(image: np.ndarray, stamp: Stamp, rng: np.random.Generator) -> None:
    """A colour that stands off what it covers, in one of four patterns, so that neither tells the class."""
    window = image[stamp.window]
    rows, columns = np.nonzero(stamp.mask)
    under = window[stamp.mask].sum(0) // max(len(rows), 1)
    color = rng.integers(256, size=3)
    for _ in range(_TRIES):
        if int(np.abs(color - under).sum()) >= _DISTANCE:
            break
        color = rng.integers(256, size=3)
    second = color + (-1 if color.sum() > 384 else 1) * rng.integers(30, 80)
    kind, period = int(rng.integers(4)), int(rng.integers(4, 10))
    slope_x, slope_y = int(rng.integers(-2, 3)), int(rng.integers(1, 3))
    if kind == 0:
        pattern = np.zeros(len(rows), dtype=np.int64)
    elif kind == 1:  # stripes
        pattern = (columns * slope_x + rows * slope_y) // period % 2
    elif kind == 2:  # checks
        pattern = (columns // period + rows // period) % 2
    else:  # speckles
        pattern = (rng.integers(4, size=len(rows)) == 0).astype(np.int64)
    window[stamp.mask] = np.where(pattern[:, None] == 1, second, color)


def finish(color: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Softened by a binomial 3x3 filter, with noise, as uint8."""
    padded = np.pad(color, ((1, 1), (1, 1), (0, 0)), mode="edge")
    rows = padded[:-2] + 2 * padded[1:-1] + padded[2:]
    soft = (rows[:, :-2] + 2 * rows[:, 1:-1] + rows[:, 2:]) >> 4
    noisy = soft + rng.integers(-10, 11, size=color.shape, dtype=np.int16)
    return noisy.clip(0, 255).astype(np.uint8)


def png(image: np.ndarray) -> bytes:
    """(H, W, 3) uint8 RGB as a PNG file whose data are stored, not compressed: its bytes depend on no library."""
    height, width, _ = image.shape
    lines = np.zeros((height, 1 + 3 * width), dtype=np.uint8)  # each line starts with its filter: none
    lines[:, 1:] = image.reshape(height, -1)
    data = lines.tobytes()
    blocks = [data[i : i + 0xFFFF] for i in range(0, len(data), 0xFFFF)]
    stored = b"".join(
        struct.pack("<BHH", i == len(blocks) - 1, len(block), len(block) ^ 0xFFFF) + block
        for i, block in enumerate(blocks)
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        for kind, body in (
            (b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)),
            (b"IDAT", b"\x78\x01" + stored + struct.pack(">I", zlib.adler32(data))),
            (b"IEND", b""),
        )
    )
