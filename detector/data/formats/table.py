"""CSV: a row for each object.

Columns, under these names or under others that `columns` maps to them:

    image                              file, relative to the image folder
    label                              class name
    x1 y1 x2 y2    or    x y w h       pixel edges from 0, or fractions of the image
    image_width image_height           optional: checked against the file
    crowd, score, weight               optional: 0 or 1; a number of 0 or more

A row with an image alone, label and box empty, is an image without objects.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Literal

from detector.data.annotations import short
from detector.data.formats.records import Entry, Object, Problems, Size, Source, read_text, usable
from detector.errors import DataError

_CORNERS, _SIDES = ("x1", "y1", "x2", "y2"), ("x", "y", "w", "h")
_SIZE, _NUMBERS = ("image_height", "image_width"), ("score", "weight")
COLUMNS = ("image", "label", *_CORNERS, *_SIDES, *_SIZE, "crowd", *_NUMBERS)
Row = dict[str, str]


@dataclass(frozen=True)
class Table:
    """How to read it.  `columns`: from our name to the file's, where it differs."""

    columns: Mapping[str, str] = field(default_factory=dict)
    units: Literal["pixels", "fractions"] = "pixels"
    delimiter: str = ","

    def read(self, path: Path, images: Path | None, problems: Problems) -> Source:
        """
        Raises:
            DataError: the header lacks a column, or something is broken and not to be skipped.
        """
        folder = images or path.parent
        rows = csv.reader(
            io.StringIO(read_text(path, "a CSV table"), newline=""), delimiter=self.delimiter, strict=True
        )
        by_image: dict[str, list[tuple[int, Row]]] = {}
        box: tuple[str, ...] = ()
        place: dict[str, int] = {}
        try:
            for row in rows:
                if not place:
                    place, box = self._header(path, row)
                elif any(cell.strip() for cell in row):
                    self._add(path, rows.line_num, row, place, by_image, problems)
        except csv.Error as error:
            raise DataError(f"{path}: line {rows.line_num}: not a CSV table ({error})") from None
        if not by_image:
            raise DataError(f"{path}: the table has no rows, expected one for each object")
        entries = []
        for image, lines in by_image.items():
            where = f"{path}: line {lines[0][0]}"
            try:
                size = _size(lines[0][1])
            except ValueError as error:
                problems.add("image", f"{where}: {error}")
                continue
            make = partial(self._objects, path, lines, box)
            entries.append(Entry(where, folder / image.replace("\\", "/"), size, make))
        return Source(entries, folder)

    def _header(self, path: Path, row: Sequence[str]) -> tuple[dict[str, int], tuple[str, ...]]:
        """Where each column that is used stands, and which four are the box."""
        header = [cell.strip() for cell in row]
        place = {}
        for ours in COLUMNS:
            theirs = self.columns.get(ours, ours)
            if header.count(theirs) > 1:
                raise DataError(f"{path}: line 1: column {theirs!r} occurs more than once, expected each name once")
            if theirs in header:
                place[ours] = header.index(theirs)
            elif ours in self.columns:
                raise DataError(f"{path}: line 1: no column {theirs!r} for {ours}, found {', '.join(header)}")
        box = next((names for names in (_CORNERS, _SIDES) if all(n in place for n in names)), None)
        missing = [n for n in ("image", "label") if n not in place]
        if missing or box is None:
            lacking = [*missing, *(["x1, y1, x2, y2 (or x, y, w, h)"] if box is None else [])]
            raise DataError(
                f"{path}: line 1: no column for {', '.join(lacking)}, found {', '.join(header)}; name yours, such as"
                " --columns image=filename x1=xmin (--delimiter is the character between columns)"
            )
        return place, box

    def _add(
        self,
        path: Path,
        line: int,
        row: Sequence[str],
        place: Mapping[str, int],
        by_image: dict[str, list[tuple[int, Row]]],
        problems: Problems,
    ) -> None:
        if len(row) <= max(place.values()):
            problems.add(
                "object", f"{path}: line {line}: {len(row)} cells, expected at least {max(place.values()) + 1}"
            )
            return
        cells = {name: row[at].strip() for name, at in place.items()}
        if not cells["image"]:
            problems.add("object", f"{path}: line {line}: image is empty, expected a file name")
            return
        by_image.setdefault(cells["image"], []).append((line, cells))

    def _objects(
        self, path: Path, lines: Sequence[tuple[int, Row]], box: tuple[str, ...], size: Size, problems: Problems
    ) -> list[Object]:
        found = []
        for line, row in lines:
            where = f"{path}: line {line}"
            if not row["label"] and not any(row[name] for name in box):
                continue
            try:
                if not row["label"]:
                    raise ValueError("label is empty, expected a class name")
                first, second, third, fourth = (_number(row, name) for name in box)
                crowd, more = _crowd(row), {n: _positive(row, n) for n in _NUMBERS if row.get(n)}
                if _size(row) != _size(lines[0][1]):
                    raise ValueError(f"image_height, image_width differ from those in line {lines[0][0]}")
            except ValueError as error:
                problems.add("object", f"{where}: {error}")
                continue
            corners = (
                (first, second, first + third, second + fourth) if box is _SIDES else (first, second, third, fourth)
            )
            if self.units == "fractions":
                corners = tuple(c * (size[1], size[0])[i % 2] for i, c in enumerate(corners))  # type: ignore[assignment]
            kept = usable(corners, size, where, problems)
            if kept is not None:
                found.append(Object(row["label"], kept, crowd=crowd, more=more))
        return found


def _size(row: Row) -> Size | None:
    """None where the table does not say.  Raises ValueError: says what is wrong."""
    given = [row.get(name, "") for name in _SIZE]
    if not any(given):
        return None
    if not all(text.isdecimal() and int(text) > 0 for text in given):
        raise ValueError(
            f"image_height, image_width are {short(given[0])}, {short(given[1])}, expected whole numbers of at least 1"
        )
    return int(given[0]), int(given[1])


def _number(row: Row, name: str) -> float:
    try:
        return float(row[name])
    except ValueError:
        raise ValueError(f"{name} is {short(row[name])}, expected a number") from None


def _positive(row: Row, name: str) -> float:
    number = _number(row, name)
    if not (math.isfinite(number) and number >= 0):
        raise ValueError(f"{name} is {number:g}, expected a number of 0 or more")
    return number


def _crowd(row: Row) -> bool:
    text = row.get("crowd", "")
    if text not in ("", "0", "1"):
        raise ValueError(f"crowd is {short(text)}, expected 0 or 1")
    return text == "1"
