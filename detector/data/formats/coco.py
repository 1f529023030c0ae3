"""COCO files as a whole document: to be converted, split, or written."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from detector.data import masks
from detector.data.annotations import check_is_coco, doctor, read_full
from detector.data.check import check
from detector.data.check_images import Depth
from detector.data.coerce import as_box
from detector.data.findings import Report
from detector.data.formats.records import Entry, Object, Picture, Problems, Size, Source, counted, usable
from detector.errors import DataError

Document = dict[str, Any]
_KEPT = ("score", "weight", "difficult", "truncated", "occluded", "pose")  # of an annotation, beside COCO's own


def read_document(path: Path, images: Path | None = None) -> Document:
    """The file as it is, with nothing in it that training would refuse.

    Raises:
        DataError: the data doctor finds an error in it.
    """
    report, _ = check(path, None, Depth.NONE)
    _refuse(report, path, images)
    document: Document = read_full(path)
    check_is_coco(document, path)
    return document


def read(path: Path, folder: Path, problems: Problems) -> Source:
    """Everything of a COCO file; with `problems.skip`, what is left of it once the data doctor has repaired it.

    Raises:
        DataError: something is broken and not to be skipped, or beyond repair.
    """
    notes: list[str] = []
    if not folder.is_dir():
        raise DataError(f"{folder}: no such image folder (for the annotations {path})")
    report, repaired = check(path, None, Depth.NONE)
    if problems.skip and report.errors and not report.beyond_repair and repaired is not None:
        notes = [
            f"{f.count} times {f.kind.meaning}: {f.kind.repair} (the first: {f.examples[0]})"
            for f in report.found.values()
            if f.kind.repair is not None
        ]
        document = repaired
    else:
        _refuse(report, path, folder)
        document = read_full(path)
    names = _names(document)
    by_image: dict[int, list[Any]] = {}
    for annotation in document.get("annotations", []):
        by_image.setdefault(annotation["image_id"], []).append(annotation)
    entries = []
    for image in document["images"]:
        own = by_image.get(image["id"], [])
        entries.append(
            Entry(
                f"{path}: image id {image['id']}",
                folder / image["file_name"],
                (image["height"], image["width"]),
                lambda size, problems, own=own: [  # type: ignore[misc]
                    thing for a in own if (thing := _object(a, names, path, size, problems)) is not None
                ],
            )
        )
    return Source(entries, folder, [names[i] for i in sorted(names)], notes)


def document(pictures: Sequence[Picture], classes: Sequence[str], info: dict[str, Any]) -> Document:
    """A COCO file: ids from 1, images in the order given, categories in the order of `classes`."""
    category = {name: i for i, name in enumerate(classes, 1)}
    images, annotations = [], list[dict[str, Any]]()
    for image_id, picture in enumerate(pictures, 1):
        height, width = picture.size
        images.append({"id": image_id, "file_name": picture.file_name, "height": height, "width": width})
        for thing in picture.objects:
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": image_id,
                    "category_id": category[thing.name],
                    **annotation(thing, picture.size),
                }
            )
    return {
        "info": info,
        "licenses": [],
        "images": images,
        "annotations": annotations,
        "categories": [{"id": i, "name": name, "supercategory": ""} for name, i in category.items()],
    }


def annotation(thing: Object, size: Size) -> dict[str, Any]:
    """What COCO says of an object, but for its ids.  `area` is the mask's where there is one."""
    x1, y1, x2, y2 = thing.box
    # Width and height are rounded as the corners are: 0.3 - 0.1 is 0.19999999999999998.
    box = [x1, y1, round(x2 - x1, 9), round(y2 - y1, 9)]
    whole = thing.segmentation and masks.find_problem(thing.segmentation, size) is None
    area = float(masks.area(thing.segmentation, size)) if whole else round(box[2] * box[3], 9)
    return {
        "bbox": box,
        "area": area,
        "iscrowd": int(thing.crowd),
        "segmentation": thing.segmentation or [],
        **thing.more,
    }


def as_bytes(document: Document) -> bytes:
    return (json.dumps(document, ensure_ascii=False) + "\n").encode("utf-8", "surrogatepass")


def _names(document: Document) -> dict[int, str]:
    """By id; a name that several categories have gets the id appended, as in training."""
    items = document.get("categories", [])
    names = [c["name"] for c in items]
    return {c["id"]: c["name"] if names.count(c["name"]) == 1 else f"{c['name']} ({c['id']})" for c in items}


def _object(a: dict[str, Any], names: dict[int, str], path: Path, size: Size, problems: Problems) -> Object | None:
    x, y, w, h = as_box(a["bbox"]) or [math.nan] * 4
    box = usable((x, y, x + w, y + h), size, f"{path}: annotation id {a['id']}", problems)
    if box is None:
        return None
    more = {key: a[key] for key in _KEPT if key in a}
    return Object(names[a["category_id"]], box, a.get("segmentation") or None, a.get("iscrowd") == 1, more)


def _refuse(report: Report, path: Path, images: Path | None) -> None:
    if not report.errors:
        return
    total, first = sum(f.count for f in report.errors), report.errors[0]
    if first.name == "file":
        raise DataError(first.examples[0])
    raise DataError(
        f"{path}: {counted(total, 'error')}, the first: {first.kind.meaning} ({first.examples[0]}); see"
        f" {doctor(path, images)}"
    )
