"""A small, correct COCO file for tests to break."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import cv2
import numpy as np

HEIGHT, WIDTH = 40, 60


def document() -> dict[str, Any]:
    """Three images (the last one without objects), two classes, four objects and a crowd region."""
    polygon = [[10.0, 5.0, 30.0, 5.0, 30.0, 25.0, 10.0, 25.0]]
    crowd = {"size": [HEIGHT, WIDTH], "counts": [0, HEIGHT * 10, HEIGHT * (WIDTH - 10)]}  # the ten columns at the left

    def box(number: int, image: int, category: int, bbox: list[float], **more: Any) -> dict[str, Any]:
        area = bbox[2] * bbox[3]
        given = {"id": number, "image_id": image, "category_id": category, "bbox": bbox, "area": area, "iscrowd": 0}
        return {**given, "segmentation": [], **more}

    return {
        "images": [{"id": i, "file_name": f"{i}.png", "height": HEIGHT, "width": WIDTH} for i in (7, 3, 12)],
        "categories": [{"id": 5, "name": "dog"}, {"id": 2, "name": "cat"}],
        "annotations": [
            box(101, 3, 5, [10.0, 5.0, 20.0, 20.0], segmentation=polygon),
            box(102, 7, 2, [1.0, 2.0, 3.0, 4.0]),
            box(103, 3, 2, [30.5, 10.25, 20.0, 12.0]),
            box(104, 3, 2, [0.0, 0.0, 10.0, 40.0], iscrowd=1, segmentation=crowd),
            box(105, 7, 5, [40, 20, 20, 20]),
        ],
    }


def write(folder: Path, content: Any = None) -> tuple[Path, Path]:
    """(annotation file, image folder) with readable images; `content` may be the text of the file."""
    content = document() if content is None else content
    images = folder / "images"
    images.mkdir(exist_ok=True)
    for i in (3, 7, 12):
        cv2.imwrite(str(images / f"{i}.png"), np.full((HEIGHT, WIDTH, 3), i, dtype=np.uint8))
    path = folder / "annotations.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return path, images
