"""COCO segmentations to bool masks: polygons, run lengths as numbers, run lengths as text."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from pycocotools import mask as rle

from detector.errors import DataError


def decode(segmentation: Any, size: tuple[int, int]) -> np.ndarray:
    """(height, width) bool: the union of the polygons, or the run-length encoding.  Rasterised as COCO does.

    Args:
        segmentation: a list of polygons `[x1, y1, x2, y2, ...]` in pixels, or `{"size": [h, w], "counts": ...}`.
        size: height, width of the image.

    Raises:
        DataError: what is wrong with it; the caller says where.
    """
    problem = find_problem(segmentation, size)
    if problem is not None:
        raise DataError(problem)
    return np.asarray(rle.decode(encode(segmentation, size)), dtype=bool)


def encode(segmentation: Any, size: tuple[int, int]) -> dict[str, Any]:
    """The compressed run-length encoding of a segmentation that has no problem."""
    height, width = size
    if isinstance(segmentation, list):
        return dict(rle.merge(rle.frPyObjects([[float(v) for v in p] for p in segmentation], height, width)))
    if isinstance(segmentation["counts"], list):
        return dict(rle.frPyObjects(segmentation, height, width))
    counts = segmentation["counts"]
    return {"size": [height, width], "counts": counts.encode() if isinstance(counts, str) else counts}


def bounding_box(segmentation: Any, size: tuple[int, int]) -> tuple[float, float, float, float]:
    """x, y, width, height: of the corners for polygons, of the pixels for run lengths."""
    if isinstance(segmentation, list):
        left, top = min(min(p[0::2]) for p in segmentation), min(min(p[1::2]) for p in segmentation)
        right, bottom = max(max(p[0::2]) for p in segmentation), max(max(p[1::2]) for p in segmentation)
        return left, top, right - left, bottom - top
    x, y, width, height = rle.toBbox(encode(segmentation, size)).tolist()
    return x, y, width, height


def area(segmentation: Any, size: tuple[int, int]) -> int:
    """How many pixels a segmentation without problem covers."""
    return int(rle.area(encode(segmentation, size)))


def find_problem(segmentation: Any, size: tuple[int, int]) -> str | None:
    """What is wrong with a segmentation, or None."""
    if isinstance(segmentation, list):
        if not segmentation:
            return "no polygon in it"
        return next((p for p in map(polygon_problem, segmentation) if p is not None), None)
    if isinstance(segmentation, dict):
        return _run_length_problem(segmentation, size)
    return "neither a list of polygons nor a run-length encoding"


def polygon_problem(polygon: Any) -> str | None:
    """What is wrong with one polygon `[x1, y1, x2, y2, ...]`, or None."""
    if not isinstance(polygon, list):
        return "a polygon that is not a list of numbers"
    try:
        numbers = set(map(type, polygon)) <= {int, float}
        finite = numbers and math.isfinite(sum(map(float, polygon)))  # NaN and infinity survive in a sum
    except OverflowError:  # an integer beyond any float
        finite = False
    if not numbers:
        return "a polygon that is not a list of numbers"
    if not finite:
        return "a polygon with NaN or infinite numbers"
    if len(polygon) < 6:
        return f"a polygon of {len(polygon)} numbers, expected at least 6 (three corners)"
    if len(polygon) % 2:
        return f"a polygon of {len(polygon)} numbers, expected an even count"
    return None


def _run_length_problem(segmentation: dict[str, Any], size: tuple[int, int]) -> str | None:
    counts, given = segmentation.get("counts"), segmentation.get("size")
    if not isinstance(counts, list | str | bytes):
        return "a run-length encoding without `counts`"
    if not isinstance(given, list) or list(given) != list(size):
        return f"a run-length encoding of size {given}, expected [height, width] = {list(size)}"
    if isinstance(counts, list):
        whole = all(isinstance(c, int) and not isinstance(c, bool) and c >= 0 for c in counts)
        runs = counts if whole else None
    else:
        runs = _runs(counts if isinstance(counts, bytes) else counts.encode("utf-8"))
    if runs is None:
        return "a run-length encoding with invalid counts"
    if sum(runs) != size[0] * size[1]:
        return f"a run-length encoding of {sum(runs)} pixels, expected {size[0] * size[1]}"
    return None


def _runs(text: bytes) -> list[int] | None:
    """The run lengths of COCO's compressed text, or None if it is invalid (the decoder itself would read past its end).

    Six bits a character, from 48 on: five of the number, least significant first, and one that says "more follows";
    the last one's bit 4 is the sign; from the fourth run on, each number is the difference to the run two before.
    """
    runs: list[int] = []
    value = shift = 0
    for character in text:
        bits = character - 48
        if not 0 <= bits < 64 or shift > 30:
            return None
        value |= (bits & 31) << shift
        shift += 5
        if bits & 32:
            continue
        if bits & 16:
            value -= 1 << shift
        if len(runs) > 2:
            value += runs[-2]
        if value < 0:
            return None
        runs.append(value)
        value = shift = 0
    return None if shift else runs


def iou(a: np.ndarray, b: np.ndarray) -> float:
    """Of two (4,) xyxy boxes."""
    (a0, a1, a2, a3), (b0, b1, b2, b3) = a.tolist(), b.tolist()
    shared = max(min(a2, b2) - max(a0, b0), 0.0) * max(min(a3, b3) - max(a1, b1), 0.0)
    union = (a2 - a0) * (a3 - a1) + (b2 - b0) * (b3 - b1) - shared
    return shared / union if union > 0 else 0.0


def name_point(point: np.ndarray) -> str:
    """(2,) x, y to be read."""
    return "(" + ", ".join(f"{v:g}" for v in point.round(2)) + ")"
