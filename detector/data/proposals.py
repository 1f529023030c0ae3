"""Proposals from a file: boxes that may hold an object, for detectors that are given them (Fast R-CNN, R-CNN).

Two formats, both with boxes as in COCO's results, x, y, width, height in pixels of the original image:

    .json   [{"image_id": 7, "bbox": [x, y, w, h], "score": 0.9}, ...]      other keys are not looked at
    .npz    image_id (m,) integers, bbox (m, 4), score (m,)

Legend: n images, m proposals of all images, B images of a batch, M proposals of an image in it.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import Field

from detector.config.node import Node
from detector.data.annotations import parse, short
from detector.data.columns import is_box, is_integer, is_number
from detector.data.index import CocoIndex
from detector.data.sample import Sample
from detector.errors import DataError

_log = logging.getLogger(__name__)
KEYS = ("image_id", "bbox", "score")


class ProposalFiles(Node):
    """One file for each split, relative to the current folder."""

    train: Path | None = None
    val: Path | None = None
    test: Path | None = None
    most: int = Field(300, ge=1, description="proposals of an image that are used, by falling score")

    def load(self, split: str, index: CocoIndex) -> ProposalSet:
        """
        Raises:
            DataError: as `read_proposals`, or the split has no file.
        """
        path = {"train": self.train, "val": self.val, "test": self.test}[split]
        if path is None:
            raise DataError(f"data.proposals.{split} is not set: give a file of proposals for this split")
        return read_proposals(path, index, self.most)


@dataclass(frozen=True, eq=False)
class ProposalSet:
    """Of all images of an index: image i has the rows offsets[i] to offsets[i + 1], by falling score."""

    image_ids: np.ndarray  # (n,) int64, rising
    offsets: np.ndarray  # (n + 1,) int64
    boxes: np.ndarray  # (m, 4) float32 xyxy in pixels of the original image, inside it and with area

    def of(self, image_id: int) -> np.ndarray:
        """(k, 4)."""
        i = int(np.searchsorted(self.image_ids, image_id))
        return np.asarray(self.boxes[self.offsets[i] : self.offsets[i + 1]])


def read_proposals(path: Path, index: CocoIndex, most: int) -> ProposalSet:
    """The `most` best of each image.  Clipped to the images; what has no area there is left out, and counted.

    Raises:
        DataError: missing, of another format, empty, not finite, or of images that the annotations do not have: names
            the proposal's place in the file (from 0).
    """
    image_id, boxes, score = _read_npz(path) if path.suffix == ".npz" else _read_json(path)
    if len(image_id) == 0:
        raise DataError(f"{path}: holds no proposal at all; make some with tools/make_proposals.py")
    for name, values in (("bbox", boxes), ("score", score)):
        wrong = ~np.isfinite(values.reshape(len(values), -1)).all(1)
        if wrong.any():
            i = int(np.argmax(wrong))
            raise DataError(f"{path}: proposal {i}: `{name}` is {values[i].tolist()}, expected finite numbers")
    order = np.argsort(index.image_ids, kind="stable")
    ids = index.image_ids[order]
    place = np.searchsorted(ids, image_id).clip(max=len(ids) - 1)
    unknown = ids[place] != image_id
    if unknown.any():
        i = int(np.argmax(unknown))
        raise DataError(
            f"{path}: proposal {i}: `image_id` {image_id[i]} is no image of {index.annotations}; do both belong to the"
            f" same split? ({int(unknown.sum())} of {len(image_id)} proposals are of unknown images)"
        )
    limit = np.tile(index.sizes[order][place][:, ::-1], 2)
    corners = np.concatenate([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], 1).clip(0, limit)
    real = np.asarray((corners[:, 2:] > corners[:, :2]).all(1))
    if not real.any():
        raise DataError(
            f"{path}: none of its {len(real)} proposals has an area inside its image; `bbox` is x, y, width, height in"
            " pixels of the original image"
        )
    if not real.all():
        _log.warning("%s: %d of %d proposals have no area inside their image: left out", path, (~real).sum(), len(real))
    corners, place, score = corners[real], place[real], score[real]
    best = np.lexsort((-score, place))
    corners, place = corners[best], place[best]
    counts = np.bincount(place, minlength=len(ids))
    rank = np.arange(len(place)) - (np.cumsum(counts) - counts)[place]
    corners, counts = corners[rank < most], counts.clip(max=most)
    none = int((counts == 0).sum())
    if none:
        _log.warning("%s: %d of %d images have no proposal: nothing is found there", path, none, len(ids))
    return ProposalSet(ids, np.concatenate([[0], np.cumsum(counts)]), corners.astype(np.float32))


def on_canvas(samples: Sequence[Sample]) -> np.ndarray:
    """(B, M, 4) float32: each sample's proposals where its image now is, clipped to it; padded with zeros, M > 0.

    Raises:
        DataError: a step of `augment` did what proposals cannot follow.
    """
    mapped = [_mapped(sample) for sample in samples]
    out = np.zeros((len(samples), max(1, *map(len, mapped)), 4), dtype=np.float32)
    for row, boxes in zip(out, mapped, strict=True):
        row[: len(boxes)] = boxes
    return out


def _mapped(sample: Sample) -> np.ndarray:
    if sample.proposals is None:  # an image that could not be read
        return np.zeros((0, 4), dtype=np.float32)
    if not (np.isfinite(sample.scale).all() and np.isfinite(sample.offset).all()):
        raise DataError(
            f"image {sample.image_id}: a step of augment moves it in a way that proposals cannot follow: with"
            " data.proposals use flip, color, random_scale_crop, large_scale_jitter, cutout, grid_mask, or steps of"
            " albumentations that leave boxes where they are"
        )
    corners = np.sort(sample.proposals.reshape(-1, 2, 2) * sample.scale + sample.offset, axis=1)  # mirrors swap corners
    height, width = sample.image.shape[:2]
    boxes = corners.reshape(-1, 4).clip(0, np.array([width, height, width, height]))
    return np.asarray(boxes[(boxes[:, 2:] > boxes[:, :2]).all(1)], dtype=np.float32)


def _read_npz(path: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    try:
        with np.load(path, allow_pickle=False) as file:
            found = {key: file[key] for key in KEYS if key in file}
    except FileNotFoundError:
        raise DataError(f"{path}: no such file of proposals; make it with tools/make_proposals.py") from None
    except Exception as error:  # whatever numpy and the zip reader raise on a damaged file
        raise DataError(f"{path}: cannot read the proposals ({error}); expected an .npz file") from None
    missing = [key for key in KEYS if key not in found]
    if missing:
        raise DataError(f"{path}: has no array {missing[0]!r}, expected {', '.join(KEYS)}")
    count = len(np.atleast_1d(found["image_id"]))
    for key, shape, kinds in (("image_id", (count,), "iu"), ("bbox", (count, 4), "fiu"), ("score", (count,), "fiu")):
        if found[key].shape != shape or found[key].dtype.kind not in kinds:
            raise DataError(
                f"{path}: {key} is {found[key].dtype} {found[key].shape}, expected"
                f" {'integers' if kinds == 'iu' else 'numbers'} of shape {shape}"
            )
    return found["image_id"].astype(np.int64), found["bbox"].astype(np.float64), found["score"].astype(np.float64)


def _read_json(path: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: cannot read the proposals ({error.strerror or error})") from None
    rows: Any = parse(content, path)
    if not isinstance(rows, list):
        raise DataError(f"{path}: holds {short(rows)}, expected a list of {{image_id, bbox, score}}, or an .npz file")
    for i, row in enumerate(rows):
        if not isinstance(row, dict):
            raise DataError(f"{path}: proposal {i} is {short(row)}, expected an object with image_id, bbox and score")
        for key, fits, expected in (
            ("image_id", is_integer, "an integer"),
            ("bbox", is_box, "four numbers x, y, width, height"),
            ("score", is_number, "a number"),
        ):
            if not fits(row.get(key)):
                found = f"is {short(row[key])}" if key in row else "is missing"
                raise DataError(f"{path}: proposal {i}: `{key}` {found}, expected {expected}")
    return (
        np.array([row["image_id"] for row in rows], dtype=np.int64),
        np.array([row["bbox"] for row in rows], dtype=np.float64).reshape(-1, 4),
        np.array([row["score"] for row in rows], dtype=np.float64),
    )
