"""Made-up evaluations: truth, detections, and their matches."""

from __future__ import annotations

from typing import Any

import numpy as np

from detector.evaluate.engines import Found
from detector.evaluate.truth import Truth


def document(images: int, rng: np.random.Generator, classes: int = 3, crowds: bool = True) -> dict[str, Any]:
    """A COCO document with boxes of all sizes."""
    annotations: list[dict[str, Any]] = []
    for image in range(1, images + 1):
        for _ in range(int(rng.integers(0, 9))):
            w, h = np.exp(rng.uniform(np.log(8), np.log(200), 2))
            x, y = rng.uniform(0, 400 - w), rng.uniform(0, 400 - h)
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": image,
                    "category_id": int(rng.integers(1, classes + 1)),
                    "bbox": [float(x), float(y), float(w), float(h)],
                    "area": float(w * h),
                    "iscrowd": int(crowds and rng.random() < 0.08),
                }
            )
    return {
        "images": [{"id": i, "file_name": f"{i}.png", "height": 400, "width": 400} for i in range(1, images + 1)],
        "categories": [{"id": k, "name": f"class {k}"} for k in range(1, classes + 1)],
        "annotations": annotations,
    }


def detections(truth: Truth, rng: np.random.Generator, noise: float = 0.08, false: int = 3) -> Found:
    """Most objects found with jittered boxes, and some false positives; some scores are equal."""
    image, category, scores, boxes = [], [], [], []
    for i in range(len(truth)):
        for _ in range(int(rng.integers(0, 3))):
            x, y, w, h = truth.boxes[i]
            dx, dy, dw, dh = rng.normal(0, noise, 4)
            image.append(truth.image[i])
            category.append(truth.category[i] if rng.random() < 0.9 else rng.integers(len(truth.names)))
            scores.append(round(float(rng.beta(3, 2)), 2))
            boxes.append([x + dx * w, y + dy * h, w * np.exp(dw), h * np.exp(dh)])
    for i in range(len(truth.image_ids)):
        for _ in range(int(rng.integers(0, false + 1))):
            image.append(i)
            category.append(rng.integers(len(truth.names)))
            scores.append(round(float(rng.beta(2, 4)), 2))
            boxes.append([*rng.uniform(0, 300, 2), *rng.uniform(8, 100, 2)])
    order = np.argsort(image, kind="stable")
    return Found(
        np.array(image, dtype=np.int64)[order],
        np.array(category, dtype=np.int64)[order],
        np.array(scores)[order],
        np.array(boxes, dtype=np.float64).reshape(-1, 4)[order],
    )
