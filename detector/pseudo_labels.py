"""What a trained detector finds in images that nobody annotated, as annotations to train on (Lee, "Pseudo-Label", ICML
2013 workshop; for detection Sohn et al., arXiv:2005.04757: what is above a threshold counts as truth).

Every annotation holds its `score`, and the `weight` with which training counts it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from detector.data.channels import read_pixels
from detector.data.formats import coco
from detector.errors import DataError, UserError
from detector.media import IMAGES
from detector.predict import Detector, Found

_DIGITS = 3  # of a box, pixels after the point


@dataclass(frozen=True)
class Unlabelled:
    """Images to be labelled: entries of a COCO file's `images`, without sizes where only their files are known."""

    folder: Path
    images: Sequence[dict[str, Any]]


def of_folder(folder: Path) -> Unlabelled:
    """All images of a folder and below it, by name.

    Raises:
        DataError: there is none.
    """
    files = [p for p in sorted(folder.rglob("*")) if p.suffix.lower() in IMAGES and p.is_file()]
    if not files:
        raise DataError(f"{folder}: the folder holds no image ({', '.join(sorted(IMAGES))})")
    return Unlabelled(
        folder, [{"id": i, "file_name": p.relative_to(folder).as_posix()} for i, p in enumerate(files, 1)]
    )


def of_coco(path: Path, folder: Path) -> Unlabelled:
    """The images of a COCO file, with their ids.

    Raises:
        DataError: the file is wrong, or has annotations.
    """
    document = coco.read_document(path, folder)
    if document.get("annotations"):
        raise DataError(
            f"{path}: has {len(document['annotations'])} annotations, expected none: give it unlabelled images"
        )
    if not document["images"]:
        raise DataError(f"{path}: has no images, expected some to label")
    if not folder.is_dir():
        raise DataError(f"{folder}: no such image folder (for the annotations {path})")
    return Unlabelled(folder, document["images"])


def by_class(given: Sequence[str], classes: Sequence[str]) -> list[float]:
    """(K,) thresholds from texts: `0.5` for all classes that are not named, `name=0.6` for one.

    Raises:
        UserError: a text is neither, a name is no class, or a class is left without a threshold.
    """
    named: dict[str, float] = {}
    for text in given:
        name, equals, number = text.rpartition("=")
        try:
            threshold = float(number)
        except ValueError:
            threshold = -1.0
        if not 0 < threshold < 1:
            raise UserError(f"--threshold {text}: expected a score between 0 and 1, or class=score")
        if equals and name not in classes:
            raise UserError(f"--threshold {text}: no such class, expected one of {', '.join(classes)}")
        named[name if equals else ""] = threshold
    missing = [name for name in classes if name not in named and "" not in named]
    if missing:
        raise UserError(
            f"--threshold: class {missing[0]!r} has none, expected one for each class, or a number for the rest"
        )
    return [named[name] if name in named else named[""] for name in classes]


class Labeller:
    """Runs a detector over images and keeps what is sure enough.

    thresholds: (K,) least score by label.  weight: of every annotation; None: its score.  `keep_empty`: images in which
    nothing was found stay, as background.
    """

    def __init__(
        self, detector: Detector, thresholds: Sequence[float], weight: float | None, keep_empty: bool = False
    ) -> None:
        self.detector, self.weight, self.keep_empty = detector, weight, keep_empty
        self.thresholds = np.array(thresholds)
        self.images: list[dict[str, Any]] = []
        self.annotations: list[dict[str, Any]] = []
        self.failures: list[str] = []  # a sentence for each image that could not be read
        self.empty = 0  # images in which nothing was found
        self.counts = np.zeros(len(thresholds), dtype=np.int64)  # (K,) annotations
        self.highest = np.zeros(len(thresholds))  # (K,) score seen, whether it was enough or not

    def label(self, source: Unlabelled, batch_size: int, progress: Callable[[int], None]) -> None:
        """All images; `progress` is told after each batch how many it had."""
        for start in range(0, len(source.images), batch_size):
            part = source.images[start : start + batch_size]
            read, pictures = [], []
            for image in part:
                try:
                    size = (image["height"], image["width"]) if "height" in image else None
                    pictures.append(read_pixels(source.folder / image["file_name"], self.detector.pixels, size))
                    read.append(image)
                except DataError as error:
                    self.failures.append(str(error))
            for image, picture, found in zip(read, pictures, self.detector(pictures), strict=True):
                self._add({**image, "height": picture.shape[0], "width": picture.shape[1]}, found)
            progress(len(part))

    def document(self, source: Path, checkpoint: Path, checksum: str, version: str) -> dict[str, Any]:
        """The COCO file; `info` says where its annotations are from.

        Raises:
            DataError: no image could be read, or no object was sure enough.
        """
        if not self.annotations:
            raise DataError(self._why_nothing(source))
        classes = self.detector.classes
        thresholds = dict(zip(classes, self.thresholds.tolist(), strict=True))
        origin = {
            "source": str(source),
            "checkpoint": str(checkpoint),
            "sha256": checksum,
            "thresholds": thresholds,
            "weight": "score" if self.weight is None else self.weight,
            "decode": self.detector.decode_config.model_dump(mode="json"),
            "detector": version,
        }
        return {
            "info": {"description": "pseudo labels: found by a detector, seen by nobody", "pseudo_labels": origin},
            "licenses": [],
            "images": self.images,
            "annotations": self.annotations,
            "categories": [
                {"id": i, "name": name, "supercategory": ""}
                for i, name in zip(self.detector.category_ids, classes, strict=True)
            ],
        }

    def _add(self, image: Mapping[str, Any], found: Found) -> None:
        labels, scores = found.labels.numpy(), found.scores.double().numpy()
        np.maximum.at(self.highest, labels, scores)
        boxes = found.boxes.double().numpy().round(_DIGITS)
        sides = (boxes[:, 2:] - boxes[:, :2]).round(_DIGITS)
        kept = np.flatnonzero((scores >= self.thresholds[labels]) & (sides > 0).all(1))
        if not len(kept) and not self.keep_empty:
            self.empty += 1
            return
        self.empty += not len(kept)
        self.images.append(dict(image))
        for i in kept.tolist():
            score, (width, height) = round(float(scores[i]), 6), sides[i].tolist()
            self.annotations.append(
                {
                    "id": len(self.annotations) + 1,
                    "image_id": image["id"],
                    "category_id": self.detector.category_ids[labels[i]],
                    "bbox": [*boxes[i, :2].tolist(), width, height],
                    "area": width * height,
                    "iscrowd": 0,
                    "segmentation": [],
                    "score": score,
                    "weight": score if self.weight is None else self.weight,
                }
            )
        self.counts += np.bincount(labels[kept], minlength=len(self.counts))

    def _why_nothing(self, source: Path) -> str:
        if self.failures and not self.empty:
            return f"{source}: no image could be read, the first: {self.failures[0]}"
        best = int(self.highest.argmax())
        seen = (
            f"the highest score is {self.highest[best]:.3f}, of class {self.detector.classes[best]!r}, whose threshold"
            f" is {self.thresholds[best]:g}"
            if self.highest[best] > 0
            else "the detector finds nothing at all"
        )
        return (
            f"{source}: no object in {self.empty} images reaches its threshold ({seen}); nothing is written: lower"
            " --threshold, or train the detector longer"
        )
