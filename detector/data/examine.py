"""The data doctor's walk through a COCO file: every entry is checked, and what remains of it is the repaired file.

Checking and repairing are one walk, so that they cannot disagree: a file is clean when nothing had to be done.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np

from detector.data import masks
from detector.data.annotations import leaves_folder, short
from detector.data.check_images import ImageFile
from detector.data.coerce import Entry, as_box, as_id, as_integer, as_object, found
from detector.data.columns import is_box, is_integer, is_number
from detector.data.findings import Report

LookUp = Callable[[str], ImageFile | None]  # file_name -> what is known of the file; None where nobody looked

_STICKS_OUT = 1.0  # pixels; less comes from rounding
_MASK_DIFFERS = 2.0  # pixels, plus
_MASK_DIFFERS_SHARE = 0.05  # of the box's side
_CORNERS_SHARE = 0.2  # of the boxes stick out when x1 y1 x2 y2 is read as x y width height
_JUDGED = 10  # boxes, before anything is said of all boxes


def examine(document: Entry, look_up: LookUp, report: Report) -> Entry:
    """Adds what is wrong with `document` to `report`; returns the repaired document, which shares parts with it."""
    annotations = document.get("annotations")
    report.counts = {k: len(document.get(k) or []) for k in ("images", "annotations", "categories")}
    categories = _categories(document.get("categories") or [], report)
    images, left_out = _images(document["images"], look_up, _boxes_of_images(annotations or []), report)
    repaired = {**document, "images": images, "categories": categories}
    if annotations is None:
        report.add("no-annotations", "`annotations` is missing")
        return repaired
    walk = _Annotations(images, categories, left_out, report)
    repaired["annotations"] = walk.through(annotations)
    return repaired


def file_names(document: Entry) -> list[str]:
    """The file names that may be looked at."""
    names = [i.get("file_name") for i in document["images"] if isinstance(i, dict)]
    return [n for n in names if isinstance(n, str) and n and not leaves_folder(n)]


def _categories(items: list[Any], report: Report) -> list[Entry]:
    kept: dict[int, Entry] = {}
    for at, item in enumerate(items):
        entry = as_object(item, f"categories[{at}]", report)
        number = None if entry is None else as_id(entry, "id", f"categories[{at}]", report)
        if entry is None or number is None:
            continue
        if number in kept:
            report.add("duplicate-category-id", f"category id {number} ({short(entry.get('name'))})")
            continue
        entry = {**entry, "id": number}
        if not isinstance(entry.get("name"), str) or not entry["name"]:
            report.add("wrong-type" if "name" in entry else "missing-key", f"category id {number}: name")
            entry["name"] = f"category {number}"
        kept[number] = entry
    names = Counter(c["name"] for c in kept.values())
    for number, entry in kept.items():
        if names[entry["name"]] > 1:
            report.add("duplicate-category-name", f"category id {number} ({entry['name']})")
            entry["name"] = f"{entry['name']} ({number})"
    if 0 in kept:
        report.add("id-0", "category id 0")
    return list(kept.values())


def _images(
    items: list[Any], look_up: LookUp, boxes_of: dict[int, list[list[float]]], report: Report
) -> tuple[list[Entry], set[int]]:
    """The images that can be used, and the ids of those that cannot."""
    kept: dict[int, Entry] = {}
    left_out: set[int] = set()
    names: set[str] = set()
    for at, item in enumerate(items):
        entry = as_object(item, f"images[{at}]", report)
        number = None if entry is None else as_id(entry, "id", f"images[{at}]", report)
        if entry is None or number is None:
            continue
        where = f"image id {number} ({short(entry.get('file_name'))})"
        if number in kept or number in left_out:
            report.add("duplicate-image-id", where)
            continue
        size = (
            _image_size(entry, look_up, boxes_of.get(number, []), where, report)
            if _named(entry, where, report)
            else None
        )
        if size is None:
            left_out.add(number)
            continue
        if entry["file_name"] in names:
            report.add("duplicate-file-name", where)
        names.add(entry["file_name"])
        kept[number] = {**entry, "id": number, "height": size[0], "width": size[1]}
    if 0 in kept:
        report.add("id-0", "image id 0")
    missing = report.found.get("image-missing")
    if missing is not None and missing.count == len(items):
        report.add("all-images-missing", missing.examples[0])
    return list(kept.values()), left_out


def _named(entry: Entry, where: str, report: Report) -> bool:
    """Whether the entry has a file name within the image folder."""
    name = entry.get("file_name")
    if not isinstance(name, str) or not name:
        report.add(
            "wrong-type" if "file_name" in entry else "missing-key", f"{where}: file_name {found(entry, 'file_name')}"
        )
    elif leaves_folder(name):
        report.add("file-name-leaves-folder", where)
    else:
        return True
    return False


def _image_size(
    entry: Entry, look_up: LookUp, boxes: list[list[float]], where: str, report: Report
) -> tuple[int, int] | None:
    """Height and width to go on with, or None where the image has to be left out."""
    file = look_up(entry["file_name"])
    if file is not None and file.problem is not None:
        report.add("image-missing" if file.missing else "image-unreadable", f"{where}: {file.problem}")
        return None
    sides: list[int] = []
    for key in ("height", "width"):
        value = as_integer(entry.get(key))
        if value is None or not is_integer(entry[key]):
            report.add("wrong-type" if key in entry else "missing-key", f"{where}: {key} {found(entry, key)}")
        elif not 0 < value < 2**31:
            report.add("image-size", f"{where}: {key} {value}")
            value = None
        sides += [] if value is None else [value]
    size = (sides[0], sides[1]) if len(sides) == 2 else None
    if file is None or size in (file.size, file.stored):
        if file is not None and file.turned and file.size == file.stored:
            report.add("orientation", where)
        return size
    if size is not None:
        report.add(
            "image-size", f"{where}: height, width {size[0]}, {size[1]}, the file has {file.size[0]}, {file.size[1]}"
        )
    height, width = file.size
    fits = all(
        min(x, y) >= -_STICKS_OUT and x + w <= width + _STICKS_OUT and y + h <= height + _STICKS_OUT
        for x, y, w, h in boxes
    )
    return file.size if fits else None


def _boxes_of_images(annotations: list[Any]) -> dict[int, list[list[float]]]:
    """The boxes of each image id, as far as they are numbers."""
    boxes: dict[int, list[list[float]]] = {}
    for item in annotations:
        if isinstance(item, dict):
            number, box = as_integer(item.get("image_id")), as_box(item.get("bbox"))
            if number is not None and box is not None:
                boxes.setdefault(number, []).append(box)
    return boxes


class _Annotations:
    """The walk through the annotations; images and categories are repaired already."""

    def __init__(self, images: list[Entry], categories: list[Entry], left_out: set[int], report: Report) -> None:
        self.left_out = left_out
        self.sizes = {i["id"]: (i["height"], i["width"]) for i in images}
        self.names = {i["id"]: i["file_name"] for i in images}
        self.categories = {c["id"]: c["name"] for c in categories}
        self.report = report
        self.ids: set[int] = set()
        self.unnumbered: list[Entry] = []  # these get a new id in the end
        self.seen: set[tuple[Any, ...]] = set()
        self.per_image: Counter[int] = Counter()
        self.per_category: Counter[int] = Counter()
        self.as_read: list[tuple[float, float, float, float, int]] = []  # x, y, width, height, image id

    def through(self, items: list[Any]) -> list[Entry]:
        kept = [entry for at, item in enumerate(items) if (entry := self.one(at, item)) is not None]
        new = max(self.ids, default=0) + 1
        for entry in self.unnumbered:
            entry["id"] = new
            new += 1
        self.judge_all()
        return kept

    def one(self, at: int, item: Any) -> Entry | None:
        """The repaired annotation, or None where it has to be left out."""
        given = as_object(item, f"annotations[{at}]", self.report)
        if given is None:
            return None
        where = f"annotation id {short(given['id'])}" if "id" in given else f"annotations[{at}]"
        image_id = as_id(given, "image_id", where, self.report)
        category_id = as_id(given, "category_id", where, self.report)
        if image_id is None or category_id is None:
            return None
        if image_id in self.left_out:  # the image's own problem is reported already
            return None
        where = f"{where} ({self.names.get(image_id, f'image id {image_id}')})"
        if image_id not in self.sizes:
            self.report.add("unknown-image", f"{where}: image_id {image_id}")
            return None
        if category_id not in self.categories:
            self.report.add("unknown-category", f"{where}: category_id {category_id}")
            return None
        entry = {**given, "image_id": image_id, "category_id": category_id}
        entry["iscrowd"] = self.crowd(entry, where)
        size = self.sizes[image_id]
        self.segmentation(entry, size, where)
        box = self.box(entry, size, where)
        if box is None:
            return None
        entry["bbox"] = box
        self.area(entry, size, where)
        self.weight(entry, where)
        self.number(entry, at, where)
        key = (image_id, category_id, entry["iscrowd"], *box)
        if key in self.seen:
            self.report.add("duplicate-box", where)
            return None
        self.seen.add(key)
        self.per_image[image_id] += 1
        self.per_category[category_id] += not entry["iscrowd"]
        return entry

    def number(self, entry: Entry, at: int, where: str) -> None:
        number = as_integer(entry.get("id"))
        if number is None or not is_integer(entry["id"]):
            self.report.add(
                "wrong-type" if "id" in entry else "missing-key", f"annotations[{at}]: id {found(entry, 'id')}"
            )
        if number is None:
            self.unnumbered.append(entry)
        elif number in self.ids:
            self.report.add("duplicate-annotation-id", where)
            self.unnumbered.append(entry)
        elif number == 0:
            self.report.add("annotation-id-0", where)
            self.unnumbered.append(entry)
        else:
            self.ids.add(number)
            entry["id"] = number

    def crowd(self, entry: Entry, where: str) -> int:
        value = entry.get("iscrowd")
        if value is None:
            self.report.add("missing-iscrowd", where)
        elif not (isinstance(value, int) and value in (0, 1)):
            self.report.add("wrong-type", f"{where}: iscrowd {found(entry, 'iscrowd')}")
        return int(as_integer(value) == 1 or value is True)

    def segmentation(self, entry: Entry, size: tuple[int, int], where: str) -> None:
        """Leaves only what can be drawn."""
        segmentation = entry.get("segmentation")
        if segmentation is None or segmentation == []:
            usable = False
        elif isinstance(segmentation, list):
            problems = [masks.polygon_problem(p) for p in segmentation]
            for problem in problems:
                if problem is not None:
                    self.report.add("segmentation", f"{where}: {problem}")
            if any(problems):
                entry["segmentation"] = [p for p, wrong in zip(segmentation, problems, strict=True) if wrong is None]
            usable = bool(entry["segmentation"])
        elif not isinstance(segmentation, dict):
            self.report.add("wrong-type", f"{where}: segmentation {found(entry, 'segmentation')}")
            entry["segmentation"] = []
            usable = False
        else:
            problem = masks.find_problem(segmentation, size)
            if problem is not None:
                self.report.add("segmentation", f"{where}: {problem}")
                entry["segmentation"] = []
            usable = problem is None
        if entry["iscrowd"] and not (usable and isinstance(entry["segmentation"], dict)):
            self.report.add("crowd-without-run-lengths", where)

    def box(self, entry: Entry, size: tuple[int, int], where: str) -> list[float] | None:
        """x, y, width, height within the image, or None."""
        mask = masks.bounding_box(entry["segmentation"], size) if entry.get("segmentation") else None
        box = as_box(entry.get("bbox"))
        plain = is_box(entry.get("bbox"))
        if not plain:
            self.report.add("wrong-type" if "bbox" in entry else "missing-key", f"{where}: bbox {found(entry, 'bbox')}")
        if box is not None and not all(map(math.isfinite, box)):
            self.report.add("box-not-finite", f"{where}: bbox {short(box)}")
            box = None
        if box is None:
            if mask is None:
                return None
            box = list(mask)
        x, y, width, height = box
        if width <= 0 or height <= 0:
            self.report.add("box-no-area", f"{where}: bbox {short(box)}")
            return None
        self.as_read.append((x, y, width, height, entry["image_id"]))
        clipped = _clip(box, size)
        if clipped is None:
            self.report.add("box-outside", f"{where}: bbox {short(box)} in height, width {size[0]}, {size[1]}")
            return None
        if max(abs(a - b) for a, b in zip(_corners(box), _corners(clipped), strict=True)) > _STICKS_OUT:
            self.report.add("box-sticks-out", f"{where}: bbox {short(box)} in height, width {size[0]}, {size[1]}")
            box = clipped
        if min(box[2:]) < 1:
            self.report.add("box-under-one-pixel", f"{where}: bbox {short(box)}")
        if mask is not None:
            allowed = _MASK_DIFFERS + _MASK_DIFFERS_SHARE * max(box[2:])
            if max(abs(a - b) for a, b in zip(_corners(box), _corners(list(mask)), strict=True)) > allowed:
                self.report.add("mask-differs-from-box", f"{where}: bbox {short(box)}, mask {short(list(mask))}")
        return box if plain else [float(v) for v in box]

    def area(self, entry: Entry, size: tuple[int, int], where: str) -> None:
        area = entry.get("area")
        if area is None:
            self.report.add("missing-area", where)
        elif not is_number(area):
            self.report.add("wrong-type", f"{where}: area {found(entry, 'area')}")
        elif not (math.isfinite(area) and area >= 0):
            self.report.add("area", f"{where}: area {area}")
        else:
            return
        if entry.get("segmentation"):
            entry["area"] = float(masks.area(entry["segmentation"], size))
        else:
            entry["area"] = float(entry["bbox"][2] * entry["bbox"][3])

    def weight(self, entry: Entry, where: str) -> None:
        weight = entry.get("weight")
        if weight is not None and not (is_number(weight) and 0 <= weight < math.inf):
            self.report.add("weight", f"{where}: weight {found(entry, 'weight')}")
            del entry["weight"]

    def judge_all(self) -> None:
        """What shows only over all annotations."""
        report = self.report
        empty = [i for i in self.sizes if not self.per_image[i]]
        if empty:
            report.add("image-without-objects", ", ".join(self.names[i] for i in empty[:3]), len(empty))
        unused = [name for number, name in self.categories.items() if not self.per_category[number]]
        if unused:
            report.add("class-without-objects", ", ".join(unused[:8]), len(unused))
        if len(self.as_read) < _JUDGED:
            return
        boxes = np.array(self.as_read)[:, :4]
        height, width = np.array([self.sizes[int(b[4])] for b in self.as_read]).T
        x, y, third, fourth = boxes.T
        if boxes.max() <= 1:
            report.add("boxes-are-fractions", f"largest number {boxes.max():g}", len(boxes))
            return
        sticks_out = (x + third > width + _STICKS_OUT) | (y + fourth > height + _STICKS_OUT)
        fits = (third > x) & (fourth > y) & (third <= width + _STICKS_OUT) & (fourth <= height + _STICKS_OUT)
        if sticks_out.mean() > _CORNERS_SHARE and fits.all():
            report.add("boxes-are-corners", f"{sticks_out.sum()} of {len(boxes)} stick out as they are", len(boxes))


def _corners(box: list[float]) -> tuple[float, float, float, float]:
    return box[0], box[1], box[0] + box[2], box[1] + box[3]


def _clip(box: list[float], size: tuple[int, int]) -> list[float] | None:
    """The part of a box within the image, or None: where its sides vanish in float32, as training computes."""
    left, top, right, bottom = _corners(box)
    left, right = min(max(left, 0), size[1]), min(max(right, 0), size[1])
    top, bottom = min(max(top, 0), size[0]), min(max(bottom, 0), size[0])
    if np.float32(right) <= np.float32(left) or np.float32(bottom) <= np.float32(top):
        return None
    return [left, top, right - left, bottom - top]
