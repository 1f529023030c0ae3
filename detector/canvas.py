"""Colours, boxes and text on RGB arrays: the brushes of `detector.draw`.

Everything draws in place on (H, W, 3) uint8 RGB and stays within the image.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import cv2
import numpy as np

Color = tuple[int, int, int]

# Okabe and Ito, "Color Universal Design" (2008): told apart with any kind of colour vision.  Black is left for text.
_OKABE_ITO: tuple[Color, ...] = (
    (230, 159, 0),
    (86, 180, 233),
    (0, 158, 115),
    (240, 228, 66),
    (0, 114, 178),
    (213, 94, 0),
    (204, 121, 167),
)
BLACK: Color = (0, 0, 0)
WHITE: Color = (255, 255, 255)
GREY: Color = (150, 150, 150)
_LINE = 1.4  # height of a line of text, in font sizes
_BASELINE = 1.05  # from the top of the line
GAP = 6  # pixels of a dash and of the gap after it
_HATCH = 9  # pixels from stripe to stripe


def color(i: int) -> Color:
    """The colour of class or object `i`: seven hues, then the same lighter, then darker, then again."""
    base, turn = _OKABE_ITO[i % 7], i // 7 % 3
    toward, share = ((0, 0.0), (255, 0.5), (0, 0.45))[turn]
    red, green, blue = (round(c + (toward - c) * share) for c in base)
    return red, green, blue


def ink(background: Color) -> Color:
    """Black or white, whichever has more contrast on `background` (relative luminance of WCAG 2)."""
    linear = [(c / 255 / 12.92) if c <= 10 else ((c / 255 + 0.055) / 1.055) ** 2.4 for c in background]
    luminance = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
    return BLACK if (luminance + 0.05) / 0.05 > 1.05 / (luminance + 0.05) else WHITE


def line_width(image: np.ndarray) -> int:
    """Of boxes, in pixels, fitting the image."""
    return max(2, round(min(image.shape[:2]) / 250))


def font_size(image: np.ndarray) -> int:
    """Pixels, fitting the image and never too small to read."""
    return int(np.clip(min(image.shape[:2]) / 32, 11, 40))


def text_size(text: str, size: int) -> tuple[int, int]:
    """(width, height) of a line with its margins, in pixels."""
    return _width(text, size) + size // 2 + 1, round(_LINE * size)


def shorten(text: str, size: int, width: int) -> str:
    """`text`, or as much of its beginning as fits into `width` with its margins, and an ellipsis; may be empty."""
    if text_size(text, size)[0] <= width:
        return text
    for end in range(len(text) - 1, 0, -1):
        cut = text[:end].rstrip() + "…"
        if text_size(cut, size)[0] <= width:
            return cut
    return ""


def put_text(image: np.ndarray, text: str, left: int, top: int, size: int, background: Color) -> None:
    """A line of text on a filled box whose upper left corner is (left, top); readable on whatever is below."""
    width, height = text_size(text, size)
    cv2.rectangle(image, (left, top), (left + width - 1, top + height - 1), background, cv2.FILLED)
    at = (left + size // 4, top + round(_BASELINE * size))
    cv2.putText(image, text, at, ink(background), _font(), size, _weight(size), 0, (0, 1 << 20))


def box(image: np.ndarray, corners: np.ndarray, line: Color, width: int, dashed: bool = False) -> None:
    """The outline of an xyxy box inside its edge, between two thin rims of dark that show it on any background.

    A dashed one has gaps of `GAP` pixels.
    """
    left, top, right, bottom = _pixels(image, corners)
    height, across = bottom + 1 - top, right + 1 - left
    outer = np.zeros((height + 2, across + 2), dtype=np.uint8)  # with a rim of one pixel around the box
    _frame(outer, 0, width + 2, 1)
    _frame(outer, 1, width, 2)
    if dashed:
        rows, columns = np.indices(outer.shape)
        outer[(rows + columns) // GAP % 2 == 1] = 0
    y, x = max(top - 1, 0), max(left - 1, 0)
    part = image[y : bottom + 2, x : right + 2]
    drawn = outer[y - top + 1 :, x - left + 1 :][: part.shape[0], : part.shape[1]]
    part[drawn == 1] = (part[drawn == 1] * 0.5).astype(np.uint8)
    part[drawn == 2] = line


def hatch(image: np.ndarray, corners: np.ndarray, line: Color = WHITE) -> None:
    """Diagonal stripes over an xyxy box: a region of which nothing is said."""
    left, top, right, bottom = _pixels(image, corners)
    part = image[top : bottom + 1, left : right + 1]
    rows, columns = np.indices(part.shape[:2])
    for phase, stripe in ((0, line), (1, BLACK)):
        on = (rows + columns) % _HATCH == phase
        part[on] = (part[on] * 0.4 + np.array(stripe) * 0.6).astype(np.uint8)


def visible(image: np.ndarray) -> np.ndarray:
    """(H, W, 3) uint8 to look at, of an image (H, W, C) of any kind: the first three channels, or the first as grey.

    More than 8 bits are spread from the image's 1st to its 99th percentile.  RGB of 8 bits comes back as it is.
    """
    if image.shape[2] != 3:
        image = image[..., :3] if image.shape[2] > 3 else np.repeat(image[..., :1], 3, axis=2)
    if image.dtype == np.uint8:
        return image
    low, high = np.percentile(image, (1, 99))
    return ((image - low) * (255 / max(high - low, 1))).clip(0, 255).astype(np.uint8)


def fit(image: np.ndarray, width: int, height: int) -> tuple[np.ndarray, float]:
    """(a copy as large as fits into width x height, its scale)."""
    scale = min(width / image.shape[1], height / image.shape[0])
    size = (max(1, round(image.shape[1] * scale)), max(1, round(image.shape[0] * scale)))
    return cv2.resize(image, size, interpolation=cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR), scale


class Labels:
    """Finds room for the labels of boxes: inside the image, near their box, not over each other."""

    def __init__(self, image: np.ndarray, size: int) -> None:
        self.image, self.size = image, size
        self._taken = np.zeros((0, 4))
        self._placed: list[tuple[str, int, int, Color]] = []

    def add(self, text: str, corners: np.ndarray, background: Color) -> None:
        """The most important label first; one that finds no room is left out, its box keeps its colour."""
        height, width = self.image.shape[:2]
        text = shorten(text, self.size, width)
        if not text:
            return
        w, h = text_size(text, self.size)
        left, top, right, bottom = _pixels(self.image, corners)
        places = [
            (left, top - h), (left, top), (right + 1 - w, top - h), (left, bottom + 1), (right + 1 - w, top),
            (left, bottom + 1 - h), (right + 1 - w, bottom + 1), (right + 1, top), (left - w, top),
        ]  # fmt: skip
        for x, y in places:
            x, y = min(max(x, 0), width - w), min(max(y, 0), height - h)
            room = np.array([x, y, x + w, y + h])
            if y >= 0 and not self._is_taken(room):
                self._taken = np.vstack([self._taken, room])
                self._placed.append((text, x, y, background))
                return

    def draw(self) -> list[tuple[int, int, int, int]]:
        """Puts all labels on the image; returns their boxes xyxy."""
        for text, x, y, background in self._placed:
            put_text(self.image, text, x, y, self.size, background)
        return [(int(a), int(b), int(c), int(d)) for a, b, c, d in self._taken]

    def _is_taken(self, room: np.ndarray) -> bool:
        low, high = np.maximum(self._taken[:, :2], room[:2]), np.minimum(self._taken[:, 2:], room[2:])
        return bool((low < high).all(1).any())


def _frame(mask: np.ndarray, inset: int, width: int, value: int) -> None:
    """A frame of `width` pixels, `inset` from the border of `mask`."""
    inner = mask[inset : mask.shape[0] - inset, inset : mask.shape[1] - inset]
    inner[:width], inner[-width:], inner[:, :width], inner[:, -width:] = value, value, value, value


def _pixels(image: np.ndarray, corners: np.ndarray) -> tuple[int, int, int, int]:
    """First and last column and row of a box (pixel edges) within the image."""
    height, width = image.shape[:2]
    left, top, right, bottom = (float(c) for c in corners)
    x1, y1 = int(np.clip(np.floor(left), 0, width - 1)), int(np.clip(np.floor(top), 0, height - 1))
    x2, y2 = int(np.clip(np.ceil(right) - 1, x1, width - 1)), int(np.clip(np.ceil(bottom) - 1, y1, height - 1))
    return x1, y1, x2, y2


@cache
def _font() -> Any:
    """A scalable font that comes with OpenCV 5 and knows most scripts."""
    return cv2.FontFace("sans")


def _weight(size: int) -> int:
    return 500 if size < 16 else 400


@cache
def _width(text: str, size: int) -> int:
    return int(cv2.getTextSize((0, 0), text, (0, 0), _font(), size, _weight(size), 0, (0, 1 << 20))[2]) if text else 0
