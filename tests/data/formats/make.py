"""Small data sets in every format, written as annotators' programs write them."""

from __future__ import annotations

import contextlib
import io
import json
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from pycocotools.coco import COCO

from detector.cli.check_data import main as check
from detector.cli.convert_data import main

HEIGHT, WIDTH = 40, 60


def image(path: Path, size: tuple[int, int] = (HEIGHT, WIDTH), value: int = 90) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    assert cv2.imwrite(str(path), np.full((*size, 3), value, dtype=np.uint8))
    return path


def convert(*arguments: object) -> int:
    return main([str(a) for a in arguments])


def load(path: Path, images: Path) -> dict[str, Any]:
    """The COCO file, which pycocotools can read and the data doctor finds no fault with."""
    with contextlib.redirect_stdout(io.StringIO()):
        COCO(str(path))
        assert check([str(path), "--images", str(images)]) == 0
    document: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return document


def things(document: dict[str, Any]) -> list[tuple[Any, ...]]:
    """(file name, class, box, segmentation) of every annotation, sorted: what must survive a conversion."""
    files = {i["id"]: i["file_name"] for i in document["images"]}
    names = {c["id"]: c["name"] for c in document["categories"]}
    return sorted(
        (files[a["image_id"]], names[a["category_id"]], tuple(a["bbox"]), json.dumps(a.get("segmentation") or []))
        for a in document["annotations"]
    )
