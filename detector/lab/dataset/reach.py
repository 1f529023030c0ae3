"""How many objects get a positive prior: the rules of `detector.assign` themselves, run on the data without a network.

Legend: n images, N objects, B images of a batch, L levels.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from detector.assign import (
    Assigner,
    Atss,
    CenterGaussian,
    CenterRegion,
    Fcos,
    MaxIou,
    PointScale,
    YoloBest,
    YoloRatio,
)
from detector.data.config import Resize
from detector.evaluate.survey import SIZES, groups
from detector.lab.dataset.split import Split
from detector.models.priors import AnyPriors, GridPriors
from detector.structures import Objects, Priors

AT_ONCE = 1 << 18  # priors of a batch, over its images


class Listed(GridPriors):
    """Anchors given one by one, for each stride."""

    by_stride: dict[int, tuple[tuple[float, float], ...]]

    @property
    def per_cell(self) -> int:
        return max(map(len, self.by_stride.values()))

    def shapes(self, stride: int) -> tuple[tuple[float, float], ...]:
        return self.by_stride[stride]


@dataclass(frozen=True)
class Reach:
    """What one rule makes of one set of priors."""

    priors: str
    rule: str
    recall: float  # share of objects that learn by at least one prior
    by_size: dict[str, float]  # the same by side after the resize (survey.SIZES), where there are objects
    positives: float  # mean number of priors of an object


def spread_over_levels(sizes: np.ndarray, strides: Sequence[int]) -> Listed:
    """(k, 2) width, height by rising area -> the smaller on the finer strides, as evenly as can be (YOLO's way).

    k must be at least the number of strides.
    """
    parts = np.array_split(sizes, len(strides))
    return Listed(by_stride={s: tuple((float(w), float(h)) for w, h in part)
                             for s, part in zip(strides, parts, strict=True)})  # fmt: skip


def rules(own: Assigner | None) -> dict[str, Assigner]:
    """Those that look at geometry alone, with their defaults; `own`, a recipe's, in place of its kind's default."""
    found: dict[str, Assigner] = {
        "max_iou": MaxIou(),
        "max_iou, low_quality none": MaxIou(low_quality="none"),
        "atss": Atss(),
        "fcos": Fcos(),
        "yolo_ratio": YoloRatio(),
        "yolo_best": YoloBest(),
        "center_gaussian": CenterGaussian(num_classes=1),
        "center_region": CenterRegion(num_classes=1),
        "point_scale": PointScale(),
    }
    kind = "" if own is None else str(getattr(own, "type", ""))
    if own is not None and kind in found:
        same = {"num_classes": 1} if "num_classes" in type(own).model_fields else {}
        changed = own.model_copy(update=same)
        name = kind if changed == found[kind] else f"{kind} (recipe's)"
        found = {name if key == kind else key: changed if key == kind else rule for key, rule in found.items()}
    return found


def reach(
    split: Split,
    resize: Resize | None,
    strides: Sequence[int],
    sets: dict[str, AnyPriors | Listed],
    own: Assigner | None,
    *,
    most: int,
    pad_multiple: int = 32,
) -> tuple[list[Reach], int]:
    """What each rule makes of each set of priors on at most `most` images (evenly spaced), and how many those were.

    Crowd regions and image borders count as in training; images of a batch have equal canvases.
    """
    holding = np.flatnonzero(split.per_image > 0)
    images = holding[np.linspace(0, len(holding) - 1, min(most, len(holding))).round().astype(int)]
    sizes = split.resized_sides(resize)
    found = []
    for name, priors_of in sets.items():
        positives: dict[str, list[np.ndarray]] = {rule: [] for rule in rules(own)}
        sides: list[np.ndarray] = []
        for priors, objects, rows in _batches(split, resize, images, strides, priors_of, pad_multiple):
            sides.append(np.sqrt(sizes[rows].prod(1)))
            for rule, assigner in rules(own).items():
                made = assigner(priors, objects)
                learns = made.object[made.weight > 0]
                positives[rule].append(torch.bincount(learns, minlength=len(objects)).numpy())
        size = groups(np.concatenate(sides), SIZES)
        for rule, parts in positives.items():
            count = np.concatenate(parts)
            by_size = {n: float((count[size == i] > 0).mean()) for i, n in enumerate(SIZES) if (size == i).any()}
            found.append(Reach(name, rule, float((count > 0).mean()), by_size, float(count.mean())))
    return found, len(images)


def _batches(
    split: Split, resize: Resize | None, images: np.ndarray, strides: Sequence[int],
    priors_of: AnyPriors | Listed, pad_multiple: int,
) -> Iterator[tuple[Priors, Objects, np.ndarray]]:  # fmt: skip
    """Priors, objects and the split's rows of these, for images of one canvas at a time."""
    target = split.targets(resize)
    scale = np.tile(split.scale(resize), 2)
    fixed = None if resize is None else resize.canvas()
    canvas = np.ceil((target if fixed is None else np.tile(fixed, (len(target), 1))) / pad_multiple) * pad_multiple
    start = np.searchsorted(split.image, np.arange(len(target) + 1))
    regions, region_image = split.crowd
    region_start = np.searchsorted(region_image, np.arange(len(target) + 1))
    for height, width in np.unique(canvas[images], axis=0).astype(int).tolist():
        mine = images[(canvas[images] == (height, width)).all(1)]
        priors = priors_of([(math.ceil(height / s), math.ceil(width / s)) for s in strides], strides)
        each = max(1, AT_ONCE // len(priors))
        for first in range(0, len(mine), each):
            batch = mine[first : first + each]
            own = [np.arange(start[i], start[i + 1]) for i in batch]
            objects = Objects.collate(
                [torch.from_numpy(split.boxes[r] * scale[i]).float() for i, r in zip(batch, own, strict=True)],
                [torch.zeros(len(r), dtype=torch.int64) for r in own],
                [torch.from_numpy(regions[region_start[i] : region_start[i + 1]] * scale[i]).float() for i in batch],
                torch.from_numpy(target[batch]).float(),
            )
            yield priors, objects, np.concatenate(own)
