"""Which detection found which object, image by image: what COCO's numbers are counted from.

With these records the numbers of any weighting of the images can be had without matching anew.

Legend: d detections, A areas (all, small, medium, large), T IoU thresholds, K categories, n images, m annotations.
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from detector.errors import DataError
from detector.evaluate.engines import Found, matching
from detector.evaluate.truth import AREAS, Truth
from detector.files import write_whole

THRESHOLD_COUNT = 10


@dataclass(frozen=True, eq=False)
class Matches:
    """Detections by category, in each by falling score, equal scores in the order of their images: COCO's order."""

    category: np.ndarray  # (d,) int32 index into the truth's categories
    image: np.ndarray  # (d,) int32 index into the truth's images
    score: np.ndarray  # (d,) float64
    object: np.ndarray  # (T, d) int32 annotation that was found, with the area `all`; -1 for none
    hit: np.ndarray  # (A, T, d) bool: found an object that counts
    ignored: np.ndarray  # (A, T, d) bool: neither right nor wrong
    objects: np.ndarray  # (A, n, K) int32 objects that count

    def save(self, path: Path) -> None:
        """Raises UserError where the file cannot be written."""
        content = io.BytesIO()
        packed: dict[str, Any] = {name: np.packbits(getattr(self, name), axis=-1) for name in ("hit", "ignored")}
        plain: dict[str, Any] = {
            name: getattr(self, name) for name in ("category", "image", "score", "object", "objects")
        }
        np.savez_compressed(content, **plain, **packed)
        write_whole(path, content.getvalue())

    @classmethod
    def load(cls, path: Path) -> Matches:
        """Raises DataError where the file is missing or damaged."""
        try:
            with np.load(path, allow_pickle=False) as data:
                values = {name: data[name] for name in data.files}
            count = len(values["score"])
            for name in ("hit", "ignored"):
                values[name] = np.unpackbits(values[name], axis=-1, count=count).astype(bool)
            return cls(**values)
        except Exception as error:  # whatever numpy and the zip reader raise on a damaged file
            raise DataError(f"{path}: cannot read the matches ({error}); delete the cell's result.json") from None

    def found_score(self, annotations: int, threshold: int) -> np.ndarray:
        """(m,) the score of the detection that found each annotation at a threshold's index; 0 where none did."""
        scores = np.zeros(annotations)
        index = self.object[threshold]
        scores[index[index >= 0]] = self.score[index >= 0]
        return scores


def match(truth: Truth, found: Found, max_dets: int = 100) -> Matches:
    """Matches as COCO's evaluation makes them, at most `max_dets` detections of a category in an image."""
    areas, categories, images = len(AREAS), len(truth.category_ids), len(truth.image_ids)
    objects = np.zeros((areas, images, categories), dtype=np.int32)
    parts: dict[tuple[int, int], list[tuple[np.ndarray, np.ndarray, np.ndarray]]] = {}
    heads: dict[int, list[tuple[int, np.ndarray]]] = {}
    area_of = {bounds: i for i, bounds in enumerate(AREAS.values())}
    if images and categories:
        for item in matching(truth, found, [max_dets], "bbox", True).eval_imgs:
            if item is None:
                continue
            area, image, category = area_of[tuple(item["aRng"])], item["image_id"] - 1, item["category_id"] - 1
            objects[area, image, category] = sum(not ignored for ignored in item["gtIgnore"])
            scores = np.array(item["dtScores"], dtype=np.float64)
            shape = (THRESHOLD_COUNT, len(scores))
            which = np.array(item["dtMatches"], dtype=np.int64).reshape(shape) - 1
            ignored = np.array(item["dtIgnore"], dtype=bool).reshape(shape)
            parts.setdefault((area, category), []).append((which, (which >= 0) & ~ignored, ignored))
            if area == 0:
                heads.setdefault(category, []).append((image, scores))
    rows: dict[str, list[np.ndarray]] = {name: [] for name in Matches.__dataclass_fields__ if name != "objects"}
    for category in sorted(heads):
        image = np.concatenate([np.full(len(s), i, dtype=np.int32) for i, s in heads[category]])
        score = np.concatenate([s for _, s in heads[category]])
        by_score = np.argsort(-score, kind="stable")
        columns = [[np.concatenate(x, axis=1)[:, by_score] for x in zip(*parts[a, category], strict=True)]
                   for a in range(areas)]  # fmt: skip
        rows["category"].append(np.full(len(score), category, dtype=np.int32))
        rows["image"].append(image[by_score])
        rows["score"].append(score[by_score])
        rows["object"].append(columns[0][0].astype(np.int32))
        rows["hit"].append(np.stack([c[1] for c in columns]))
        rows["ignored"].append(np.stack([c[2] for c in columns]))
    if not heads:
        none = np.zeros(0, dtype=np.int32)
        flags = np.zeros((areas, THRESHOLD_COUNT, 0), dtype=bool)
        return Matches(none, none, np.zeros(0), np.zeros((THRESHOLD_COUNT, 0), np.int32), flags, flags, objects)
    return Matches(objects=objects, **{name: np.concatenate(values, axis=-1) for name, values in rows.items()})
