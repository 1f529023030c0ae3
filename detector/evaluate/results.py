"""Detections as files in COCO's results format: a list of {image_id, category_id, bbox, score}."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from detector.data.annotations import parse, short
from detector.data.columns import is_box, is_integer, is_number
from detector.errors import DataError
from detector.evaluate.engines import Found, IouType, records
from detector.evaluate.truth import Truth, lookup
from detector.files import write_whole


def read_list(path: Path) -> list[dict[str, Any]]:
    """The detections of a file, none of them checked but for being objects.

    Raises:
        DataError: missing, not JSON, or not a list of objects.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: cannot read the detections ({error.strerror or error})") from None
    if not content.strip():
        raise DataError(f"{path}: the file is empty, expected a list of detections (`[]` where there are none)")
    found = parse(content, path)
    if isinstance(found, dict) and "annotations" in found and "images" in found:
        raise DataError(
            f"{path}: these are annotations, expected detections: a list of {{image_id, category_id, bbox, score}}"
        )
    if not isinstance(found, list):
        raise DataError(f"{path}: holds {short(found)}, expected a list of {{image_id, category_id, bbox, score}}")
    wrong = next((i for i, item in enumerate(found) if not isinstance(item, dict)), None)
    if wrong is not None:
        raise DataError(f"{path}: detection {wrong} is {short(found[wrong])}, expected an object")
    return found


def kind_of(detections: list[dict[str, Any]]) -> IouType:
    """What the detections can be scored by: boxes, unless they hold nothing but masks."""
    masks_only = bool(detections) and "bbox" not in detections[0] and "segmentation" in detections[0]
    return "segm" if masks_only else "bbox"


def parse_results(detections: list[dict[str, Any]], truth: Truth, iou_type: IouType, source: str) -> Found:
    """Checked arrays of a list of detections.

    Raises:
        DataError: names the detection's place in the list (from 0), the key, what was found and what was expected.
    """

    def column(key: str, fits: Callable[[Any], bool], expected: str) -> list[Any]:
        values = [item.get(key) for item in detections]
        wrong = next((i for i, value in enumerate(values) if not fits(value)), None)
        if wrong is None:
            return values
        found = f"is {short(values[wrong])}" if key in detections[wrong] else "is missing"
        raise DataError(f"{source}: detection {wrong}: `{key}` {found}, expected {expected}")

    def known(key: str, ids: np.ndarray, what: str) -> np.ndarray:
        values = np.array(column(key, is_integer, "an integer"), dtype=np.int64)
        index, is_known = lookup(values, ids)
        if not is_known.all():
            wrong = int(np.argmin(is_known))
            raise DataError(
                f"{source}: detection {wrong}: `{key}` {values[wrong]} is no {what} of {truth.source};"
                f" do both belong to the same data? ({int((~is_known).sum())} of {len(values)} detections are unknown)"
            )
        return index

    image = known("image_id", truth.image_ids, "image")
    category = known("category_id", truth.category_ids, "category")
    scores = np.array(column("score", _is_finite, "a finite number"), dtype=np.float64)
    masks = boxes = None
    if iou_type == "segm":
        masks = column("segmentation", lambda m: isinstance(m, dict | list) and bool(m), "a mask")
    if iou_type == "bbox" or (
        detections and "bbox" in detections[0]
    ):  # a mask's box decides the area, as in pycocotools
        expected = "four finite numbers x, y, width, height, the last two of them not negative"
        boxes = np.array(column("bbox", _is_sized_box, expected), dtype=np.float64).reshape(-1, 4)
    return Found(image, category, scores, boxes, masks)


def write_results(path: Path, truth: Truth, found: Found) -> None:
    """A file that pycocotools and `parse_results` read back to the same scores; replaced in one step.

    Nothing is lost: boxes are already multiples of the step they are scored with, and nine digits tell all float32
    scores apart.

    Raises:
        UserError: the file cannot be written.
    """
    rows = records(truth, found)
    for row in rows:
        row["score"] = float(f"{row['score']:.9g}")
    write_whole(path, json.dumps(rows, separators=(",", ":")).encode())


def _is_finite(value: Any) -> bool:
    return is_number(value) and math.isfinite(value)


def _is_sized_box(value: Any) -> bool:
    return is_box(value) and all(map(math.isfinite, value)) and value[2] >= 0 and value[3] >= 0
