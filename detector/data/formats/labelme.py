"""labelme: a JSON file for each image, with shapes in pixels counted from the image's upper left corner.

    polygon            mask and the box around it
    rectangle          box, from two corners or four
    circle             from centre and a point on it: its exact box, its outline with 64 corners
    mask               box from the pixels, run lengths

Polygons of equal label and `group_id` are the parts of one object.  Lines and points have no area.
"""

from __future__ import annotations

import base64
import binascii
import json
import math
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from pycocotools import mask as rle

from detector.data import masks
from detector.data.annotations import short
from detector.data.coerce import as_integer
from detector.data.columns import is_number
from detector.data.formats.records import (
    Box,
    Entry,
    Object,
    Problems,
    Size,
    Source,
    common_folder,
    extent,
    read_text,
    rounded,
    usable,
)
from detector.errors import DataError

_CIRCLE = 64  # corners of a circle's outline
Points = list[tuple[float, float]]
Shape = dict[str, Any]


def read(folder: Path, images: Path | None, problems: Problems) -> Source:
    """All JSON files of `folder` with all below it.

    `images`: the folder that file names will be relative to; by default the deepest that holds all images.

    Raises:
        DataError: nothing is there, or something is broken and not to be skipped.
    """
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder, expected one of labelme's JSON files")
    files = sorted(folder.rglob("*.json"))
    if not files:
        raise DataError(f"{folder}: holds no .json file, expected labelme's annotations")
    entries = [entry for path in files if (entry := _entry(path, images, problems)) is not None]
    return Source(entries, images or common_folder([e.image for e in entries] or files))


def _entry(path: Path, images: Path | None, problems: Problems) -> Entry | None:
    try:
        document = json.loads(read_text(path, "labelme's annotation"))
    except DataError as error:
        problems.add("image", str(error))
        return None
    except (ValueError, RecursionError) as error:
        place = f"line {error.lineno}, column {error.colno}: " if isinstance(error, json.JSONDecodeError) else ""
        problems.add("image", f"{path}: {place}not valid JSON")
        return None
    if not isinstance(document, dict) or not isinstance(document.get("shapes"), list):
        problems.add("image", f"{path}: not labelme's, expected an object with a list `shapes`")
        return None
    name = document.get("imagePath")
    if not isinstance(name, str) or not name:
        problems.add("image", f"{path}: imagePath is {short(name)}, expected a file name")
        return None
    sides = [document.get(key) for key in ("imageHeight", "imageWidth")]
    size = None
    if sides != [None, None]:
        numbers = [as_integer(side) for side in sides]
        if any(n is None or n < 1 for n in numbers):
            problems.add("image", f"{path}: imageHeight, imageWidth are {short(sides)}, expected whole numbers")
            return None
        size = (numbers[0] or 0, numbers[1] or 0)
    image = path.parent / name.replace("\\", "/")
    if images is not None and not image.is_file():
        image = images / Path(name.replace("\\", "/")).name
    return Entry(str(path), image, size, partial(_objects, path, document["shapes"]))


def _objects(path: Path, shapes: Sequence[Any], size: Size, problems: Problems) -> list[Object]:
    groups: dict[Any, list[Object]] = {}
    for number, shape in enumerate(shapes):
        where = f"{path}: shapes[{number}]"
        try:
            if not isinstance(shape, dict):
                raise ValueError(f"{short(shape)}, expected an object")
            made = _object(shape, size)
        except ValueError as error:
            problems.add("object", f"{where}: {error}")
            continue
        box = usable(made.box, size, f"{where} ({made.name})", problems)
        if box is None:
            continue
        group = shape.get("group_id")
        joins = group is not None and isinstance(made.segmentation, list)
        key = (made.name, json.dumps(group)) if joins else number
        groups.setdefault(key, []).append(Object(made.name, box, made.segmentation))
    return [parts[0] if len(parts) == 1 else _joined(parts) for parts in groups.values()]


def _joined(parts: Sequence[Object]) -> Object:
    polygons = [polygon for part in parts for polygon in part.segmentation]
    return Object(parts[0].name, extent(polygons), polygons)


def _object(shape: Shape, size: Size) -> Object:
    """Raises ValueError: says what is wrong."""
    label = shape.get("label")
    if not isinstance(label, str) or not label:
        raise ValueError(f"label is {short(label)}, expected a text")
    kind = shape.get("shape_type", "polygon")
    if kind not in _KINDS:
        raise ValueError(f"shape_type is {short(kind)}, which has no area, expected one of {', '.join(_KINDS)}")
    box, segmentation = _KINDS[kind](shape, _points(shape), size)
    return Object(label, box, segmentation)


def _points(shape: Shape) -> Points:
    points = shape.get("points")
    good = isinstance(points, list) and all(
        isinstance(p, list) and len(p) == 2 and all(is_number(c) and math.isfinite(c) for c in p) for p in points
    )
    if not isinstance(points, list) or not good:
        raise ValueError(f"points are {short(points)}, expected a list of [x, y]")
    return [(float(x), float(y)) for x, y in points]


def _polygon(shape: Shape, points: Points, size: Size) -> tuple[Box, Any]:
    if len(points) < 3:
        raise ValueError(f"a polygon of {len(points)} points, expected at least 3")
    polygons = [rounded(c for point in points for c in point)]
    return extent(polygons), polygons


def _rectangle(shape: Shape, points: Points, size: Size) -> tuple[Box, Any]:
    if len(points) not in (2, 4):
        raise ValueError(f"a rectangle of {len(points)} points, expected 2 or 4")
    return extent([[c for point in points for c in point]]), None


def _circle(shape: Shape, points: Points, size: Size) -> tuple[Box, Any]:
    if len(points) != 2:
        raise ValueError(f"a circle of {len(points)} points, expected its centre and one on its line")
    (x, y), rim = points[0], points[1]
    radius = math.hypot(rim[0] - x, rim[1] - y)
    turns = [2 * math.pi * i / _CIRCLE for i in range(_CIRCLE)]
    outline = rounded(c for t in turns for c in (x + radius * math.cos(t), y + radius * math.sin(t)))
    return (x - radius, y - radius, x + radius, y + radius), [outline]


def _mask(shape: Shape, points: Points, size: Size) -> tuple[Box, Any]:
    """A PNG in base64 whose upper left pixel is the first point's."""
    try:
        content = base64.b64decode(str(shape.get("mask")), validate=True)
        picture = cv2.imdecode(np.frombuffer(content, dtype=np.uint8), cv2.IMREAD_UNCHANGED) if content else None
    except (binascii.Error, cv2.error):
        picture = None
    if picture is None or picture.ndim != 2:
        raise ValueError("mask cannot be read, expected a grey PNG in base64")
    if len(points) != 2:
        raise ValueError(f"a mask of {len(points)} points, expected the 2 corners of its box")
    left, top = (round(c) for c in points[0])
    height, width = picture.shape
    if left < 0 or top < 0 or left + width > size[1] or top + height > size[0]:
        raise ValueError(
            f"a mask of {height} x {width} pixels at x {left}, y {top} leaves the image of {size[0]} x {size[1]}"
        )
    if not picture.any():
        raise ValueError("mask has no pixel, expected some")
    whole = np.zeros(size, dtype=np.uint8, order="F")
    whole[top : top + height, left : left + width] = picture > 0
    encoded = rle.encode(whole)
    segmentation = {"size": list(size), "counts": encoded["counts"].decode("ascii")}
    x, y, w, h = masks.bounding_box(segmentation, size)
    return (x, y, x + w, y + h), segmentation


_KINDS: dict[str, Callable[[Shape, Points, Size], tuple[Box, Any]]] = {
    "polygon": _polygon,
    "rectangle": _rectangle,
    "circle": _circle,
    "mask": _mask,
}
