"""YOLO's text files: a line for each object, in fractions of the image, and a YAML file with splits and class names.

    class cx cy w h                    a box: its centre and its sides
    class x1 y1 x2 y2 x3 y3 ...        an outline of three corners or more

The labels of `.../images/a/b.jpg` are in `.../labels/a/b.txt` (the last folder of that name counts), else beside the
image.  Numbers are written with all the digits that a float has, so nothing is lost; what is read is rounded to a
billionth of a pixel.

A mask of several polygons is one outline: each ring is closed at its first corner, lines without width lead from ring
to ring and back.  Read again, the rings come apart.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import yaml

from detector.data import masks
from detector.data.annotations import short
from detector.data.formats.records import (
    IMAGE_SUFFIXES,
    Entry,
    Object,
    Picture,
    Problems,
    Size,
    Source,
    common_folder,
    counted,
    extent,
    read_text,
    rounded,
    usable,
)
from detector.errors import DataError

SPLITS = ("train", "val", "test")
_SLACK = 1e-6  # by which a fraction may leave 0..1: others' files are rounded to so many digits


def read(path: Path, split: str, images: Path | None, problems: Problems) -> Source:
    """One split of the YAML file `path`.

    `images`: the folder that file names will be relative to; by default the split's own, or the deepest that holds all.

    Raises:
        DataError: the file or the split is wrong, or something is broken and not to be skipped.
    """
    settings = read_settings(path)
    names = class_names(settings, path)
    given = settings.get(split)
    if given is None:
        has = [s for s in SPLITS if settings.get(s) is not None]
        raise DataError(f"{path}: has no split {split!r}, expected one of {', '.join(has) or 'train, val, test'}")
    root = path.parent / str(settings.get("path") or ".")
    places = [_existing(root, item, path, split) for item in (given if isinstance(given, list) else [given])]
    files = list(dict.fromkeys(file for place in places for file in _files(place)))
    if not files:
        raise DataError(f"{path}: {split}: {places[0]} holds no image ({', '.join(IMAGE_SUFFIXES)})")
    folder = images or (places[0] if len(places) == 1 and places[0].is_dir() else common_folder(files))
    labels = [label_file(file) for file in files]
    bare = [file for file, label in zip(files, labels, strict=True) if not label.is_file()]
    if len(bare) == len(files):
        raise DataError(f"{path}: {split}: not one label file, expected {labels[0]} for {files[0]}")
    notes = []
    if bare:
        notes.append(
            f"{counted(len(bare), 'image')} without a label file, taken as without objects (the first: {bare[0]})"
        )
    entries = [
        Entry(str(label), file, None, partial(_objects, label, names))
        for file, label in zip(files, labels, strict=True)
    ]
    return Source(entries, folder, names, notes)


def read_settings(path: Path) -> dict[str, Any]:
    """The YAML file.

    Raises:
        DataError: it is missing, not YAML, or no table of keys.
    """
    try:
        settings = yaml.safe_load(read_text(path, "YOLO's data file (YAML)"))
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f"line {mark.line + 1}: " if mark is not None else ""
        raise DataError(f"{path}: {line}not valid YAML ({getattr(error, 'problem', error)})") from None
    if not isinstance(settings, dict):
        raise DataError(f"{path}: {short(settings)}, expected keys such as train, val and names")
    return settings


def class_names(settings: dict[str, Any], path: Path) -> list[str]:
    """By number; `names` may be a list, or numbers with names.

    Raises:
        DataError: `names` is missing, has gaps, or is not as long as `nc` says.
    """
    names = settings.get("names")
    if isinstance(names, dict) and set(names) == set(range(len(names))):
        names = [names[i] for i in range(len(names))]
    if not isinstance(names, list) or not names or not all(isinstance(n, str | int) for n in names):
        raise DataError(f"{path}: names: {short(names)}, expected a list of names, or the numbers 0, 1, ... with names")
    if settings.get("nc", len(names)) != len(names):
        raise DataError(f"{path}: nc is {short(settings['nc'])}, expected {len(names)}, as many as there are names")
    twice = [name for name, n in Counter(map(str, names)).items() if n > 1]
    if twice:
        raise DataError(f"{path}: names: {twice[0]!r} occurs more than once, expected each name once")
    return [str(name) for name in names]


def label_file(image: Path) -> Path:
    """Where the labels of an image are."""
    parts = list(image.parts)
    at = next((i for i in range(len(parts) - 2, -1, -1) if parts[i] == "images"), None)
    if at is not None:
        parts[at] = "labels"
    return Path(*parts).with_suffix(".txt")


def _existing(root: Path, item: Any, path: Path, split: str) -> Path:
    if not isinstance(item, str):
        raise DataError(f"{path}: {split}: {short(item)}, expected a folder or a list file")
    place = root / item
    if not place.exists():
        raise DataError(f"{path}: {split}: {place}: no such folder or file; set `path` to where the data are")
    return place


def _files(place: Path) -> list[Path]:
    """Images of a folder with all below it, or those that a text file lists, relative to the text file's folder."""
    if place.is_dir():
        return [p for p in sorted(place.rglob("*")) if p.suffix.lower() in IMAGE_SUFFIXES]
    return [place.parent / line.strip() for line in read_text(place, "a list of images").splitlines() if line.strip()]


def _objects(label: Path, names: Sequence[str], size: Size, problems: Problems) -> list[Object]:
    if not label.is_file():
        return []
    try:
        lines = read_text(label, "YOLO's labels").splitlines()
    except DataError as error:
        problems.add("object", str(error))
        return []
    found = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        where = f"{label}: line {number}"
        try:
            name, polygons, box = _parse(line.split(), names, size)
        except ValueError as error:
            problems.add("object", f"{where}: {error}")
            continue
        kept = usable(box, size, where, problems)
        if kept is not None:
            found.append(Object(name, kept, polygons))
    return found


def _parse(
    words: list[str], names: Sequence[str], size: Size
) -> tuple[str, list[list[float]] | None, tuple[float, float, float, float]]:
    """Class, polygons, box.  Raises ValueError: says what is wrong."""
    height, width = size
    if len(words) != 5 and (len(words) < 7 or len(words) % 2 == 0):
        raise ValueError(
            f"{counted(len(words), 'number')}, expected 5 (class cx cy w h) or a class and the x y of three corners or"
            " more"
        )
    if not words[0].isdecimal() or int(words[0]) >= len(names):
        raise ValueError(f"class is {short(words[0])}, expected a whole number from 0 to {len(names) - 1}")
    try:
        numbers = [float(word) for word in words[1:]]
    except ValueError:
        raise ValueError(f"{short(' '.join(words[1:]))}, expected numbers") from None
    wrong = next((n for n in numbers if not -_SLACK <= n <= 1 + _SLACK), None)
    if wrong is not None:
        raise ValueError(f"{wrong:g} is no fraction of the image, expected numbers from 0 to 1 (pixels?)")
    name = names[int(words[0])]
    if len(numbers) == 4:
        cx, cy, w, h = numbers
        return name, None, ((cx - w / 2) * width, (cy - h / 2) * height, (cx + w / 2) * width, (cy + h / 2) * height)
    scaled = rounded(n * (width, height)[i % 2] for i, n in enumerate(numbers))
    polygons = _apart(scaled)
    return name, polygons, extent(polygons)


@dataclass
class Written:
    """The labels of a data set, and what YOLO cannot say of it."""

    labels: dict[str, str]  # text by file name of the image
    notes: Counter[str]

    def lines(self) -> list[str]:
        return [f"{n} times: {note}" for note, n in self.notes.items()]


def write(pictures: Sequence[Picture], names: Sequence[str], segments: bool) -> Written:
    """A line for each object: its box, or with `segments` its outline."""
    number = {name: i for i, name in enumerate(names)}
    written = Written({}, Counter())
    for picture in pictures:
        lines = []
        for thing in picture.objects:
            if thing.crowd:
                written.notes["a crowd region, which YOLO cannot say, left out: it becomes background"] += 1
                continue
            values = (
                _segment(thing, picture.size, written.notes) if segments else _box(thing, picture.size, written.notes)
            )
            lines.append(" ".join([str(number[thing.name]), *(repr(v) for v in values)]) + "\n")
        written.labels[picture.file_name] = "".join(lines)
    return written


def _box(thing: Object, size: Size, notes: Counter[str]) -> list[float]:
    x1, y1, x2, y2 = _clipped(thing.box, size, notes)
    height, width = size
    return [(x1 + x2) / 2 / width, (y1 + y2) / 2 / height, (x2 - x1) / width, (y2 - y1) / height]


def _segment(thing: Object, size: Size, notes: Counter[str]) -> list[float]:
    polygons = thing.segmentation
    if not isinstance(polygons, list) or not polygons or any(map(masks.polygon_problem, polygons)):
        kind = "a run-length mask" if isinstance(polygons, dict) else "an object without a usable outline"
        notes[f"{kind}: the corners of its box are written"] += 1
        x1, y1, x2, y2 = thing.box
        polygons = [[x1, y1, x2, y1, x2, y2, x1, y2]]
    elif max(abs(a - b) for a, b in zip(extent(polygons), thing.box, strict=True)) > 1:
        notes["a box that differs from its outline by more than a pixel: the outline is written"] += 1
    corners = _clipped(_joined(polygons), size, notes)
    return [c / (size[1], size[0])[i % 2] for i, c in enumerate(corners)]


def _clipped(numbers: Sequence[float], size: Size, notes: Counter[str]) -> list[float]:
    """x y x y ... within the image."""
    inside = [min(max(float(n), 0.0), float((size[1], size[0])[i % 2])) for i, n in enumerate(numbers)]
    if any(abs(a - b) > _SLACK for a, b in zip(inside, numbers, strict=True)):
        notes["an object that sticks out of its image: clipped"] += 1
    return inside


def _joined(polygons: Sequence[Sequence[float]]) -> list[float]:
    """One polygon of several: every ring closed, then back over the first corners so that no area is enclosed."""
    if len(polygons) == 1:
        return list(polygons[0])
    starts = [list(polygon[:2]) for polygon in polygons]
    rings = [c for polygon in polygons for c in [*polygon, *polygon[:2]]]
    return rings + [c for start in starts[-2:0:-1] for c in start]


def _apart(polygon: list[float]) -> list[list[float]]:
    """The rings of what `_joined` made; any other polygon as it is."""
    corners = list(zip(polygon[0::2], polygon[1::2], strict=True))
    rings, at = [], 0
    while at < len(corners):
        close = next((i for i in range(at + 3, len(corners)) if corners[i] == corners[at]), None)
        if close is None:
            break
        rings.append(corners[at:close])
        at = close + 1
    back = [ring[0] for ring in rings[-2:0:-1]]
    if len(rings) < 2 or corners[at:] != back:
        return [polygon]
    return [[c for corner in ring for c in corner] for ring in rings]


def stems_that_clash(file_names: Sequence[str]) -> tuple[str, str] | None:
    """Two images whose labels would be one file."""
    ordered = sorted(file_names, key=lambda name: Path(name).with_suffix("").as_posix())
    return next((p for p in pairwise(ordered) if Path(p[0]).with_suffix("") == Path(p[1]).with_suffix("")), None)
