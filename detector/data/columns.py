"""From a list of JSON objects to one array for each key: fast when all is well, precise when something is not."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from detector.data.annotations import doctor, short
from detector.errors import DataError

_SINGULAR = {"images": "image", "annotations": "annotation", "categories": "category"}


@dataclass(frozen=True)
class Place:
    """The file that an error is about."""

    annotations: Path
    images: Path

    def error(self, message: str) -> DataError:
        return DataError(f"{self.annotations}: {message}; see {doctor(self.annotations, self.images)}")


def integers(items: list[Any], key: str, table: str, place: Place) -> np.ndarray:
    """(n,) int64.

    Raises:
        DataError: an entry lacks the key or has something else there.
    """
    values = [item.get(key) for item in items]
    if not (set(map(type, values)) <= {int} and -(2**63) <= min(values, default=0) <= max(values, default=0) < 2**63):
        _refuse(items, key, table, is_integer, "a whole number", place)
    return np.array(values, dtype=np.int64)


def numbers(items: list[Any], key: str, table: str, place: Place) -> np.ndarray:
    """(n,) float64; NaN where the key is missing or null.

    Raises:
        DataError: an entry has something there that is no number.
    """
    values = [item.get(key, math.nan) for item in items]
    if not set(map(type, values)) <= {int, float}:
        _refuse(items, key, table, lambda v: v is None or is_number(v), "a number", place)
        values = [math.nan if v is None else v for v in values]
    return np.array(values, dtype=np.float64)


def strings(items: list[Any], key: str, table: str, place: Place) -> list[str]:
    """Raises:
    DataError: an entry lacks the key, or it is empty or no text.
    """
    _refuse(items, key, table, lambda v: isinstance(v, str) and v != "", "a text", place)
    return [item[key] for item in items]


def boxes(items: list[Any], place: Place) -> np.ndarray:
    """(n, 4) float64 x, y, width, height as they stand, NaN included.

    Raises:
        DataError: a `bbox` is missing or is not four numbers.
    """
    values = [item.get("bbox") for item in items]
    well = set(map(type, values)) <= {list} and set(map(len, values)) <= {4}
    if not (well and set(map(type, chain.from_iterable(values))) <= {float}):
        _refuse(items, "bbox", "annotations", is_box, "[x, y, width, height]", place)
    return np.fromiter(chain.from_iterable(values), dtype=np.float64, count=4 * len(values)).reshape(-1, 4)


def refuse_duplicates(ids: np.ndarray, kind: str, place: Place) -> None:
    """Raises:
    DataError: an id occurs twice.
    """
    ordered = np.sort(ids)
    twice = ordered[1:][ordered[1:] == ordered[:-1]]
    if len(twice):
        raise place.error(
            f"{kind} id {twice[0]} occurs more than once ({len(np.unique(twice))} such ids), expected each id once"
        )


def is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and -(2**63) <= value < 2**63


def is_number(value: Any) -> bool:
    """Any float, NaN included, or an integer that a float can hold."""
    return isinstance(value, float) or (isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**1000)


def is_box(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 4 and all(map(is_number, value))


def _refuse(items: list[Any], key: str, table: str, fits: Callable[[Any], bool], expected: str, place: Place) -> None:
    """Names the first entry whose value does not fit."""
    for i, item in enumerate(items):
        if not fits(item.get(key)):
            who = f"{_SINGULAR[table]} id {short(item['id'])}" if key != "id" and "id" in item else f"{table}[{i}]"
            found = f"is {short(item[key])}" if key in item else "is missing"
            raise place.error(f"{who}: {key} {found}, expected {expected}")
