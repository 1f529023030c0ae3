"""Small annotation files written for a test."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import cv2
import numpy as np
import pytest

from detector.data.index import CocoIndex
from detector.lab.dataset.split import Split

# An image: height, width, and its objects: class, x, y, width, height, and perhaps "crowd".
Image = tuple[int, int, Sequence[tuple[object, ...]]]
Write = Callable[..., Path]


def picture(height: int, width: int, seed: int) -> np.ndarray:
    """(height, width, 3) uint8: smooth noise, another for every seed."""
    coarse = np.random.default_rng(seed).integers(0, 256, (9, 9, 3)).astype(np.uint8)
    return cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC)


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Writes a COCO file (and, with `files`, its images) and returns its path; images lie in `tmp_path / "images"`."""

    def make(name: str, images: Sequence[Image], classes: Sequence[str], files: bool = False, first: int = 0) -> Path:
        folder = tmp_path / "images"
        folder.mkdir(exist_ok=True)
        document: dict[str, list[dict[str, object]]] = {
            "images": [],
            "annotations": [],
            "categories": [{"id": k + 1, "name": c} for k, c in enumerate(classes)],
        }
        for i, (height, width, objects) in enumerate(images):
            file_name = f"{name}-{i}.png"
            document["images"].append({"id": i + 1, "height": height, "width": width, "file_name": file_name})
            if files:
                cv2.imwrite(str(folder / file_name), picture(height, width, first + i))
            for label, x, y, w, h, *crowd in objects:
                document["annotations"].append({
                    "id": len(document["annotations"]) + 1, "image_id": i + 1, "bbox": [x, y, w, h],
                    "category_id": classes.index(str(label)) + 1, "iscrowd": int(bool(crowd)), "area": w * h,  # type: ignore[operator]
                })  # fmt: skip
        path = tmp_path / f"{name}.json"
        path.write_text(json.dumps(document))
        return path

    return make


@pytest.fixture
def split(write: Write, tmp_path: Path) -> Callable[..., Split]:
    def make(images: Sequence[Image], classes: Sequence[str], most: int | None = None, seed: int = 0) -> Split:
        return Split.of("train", CocoIndex.load(write("train", images, classes), tmp_path / "images"), most, seed)

    return make
