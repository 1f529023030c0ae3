"""COCO's twelve numbers from detections in original pixels.

    evaluator = CocoEvaluator(Path("instances_val2017.json"))
    evaluator.add([139, 285], [detections, detections])
    result = evaluator.result()
    result.numbers["AP"]

Average precision and recall as defined by Lin et al., "Microsoft COCO: Common Objects in Context" (arXiv:1405.0312) and
cocodataset.org/#detection-eval: IoU 0.50 to 0.95 in steps of 0.05, 101 points of recall, crowd regions neither right
nor wrong.  Equal to pycocotools in every digit.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from detector.data.index import CocoIndex
from detector.errors import UserError
from detector.evaluate.engines import Curves, Engine, Found, IouType, curves
from detector.evaluate.results import kind_of, parse_results, read_list, write_results
from detector.evaluate.truth import AREAS, Truth, lookup

if TYPE_CHECKING:
    from torch import Tensor

    from detector.structures import Detections

NUMBERS = (
    "AP", "AP50", "AP75", "AP_small", "AP_medium", "AP_large",
    "AR_1", "AR_10", "AR_100", "AR_small", "AR_medium", "AR_large",
)  # fmt: skip
THRESHOLDS = np.linspace(0.5, 0.95, 10).round(2)
# Boxes are scored as multiples of this many pixels (finer than float32 in a large image), so that a written file, which
# holds the same short decimals, gives the same scores.
_DECIMALS = 5


@dataclass(frozen=True)
class ClassScore:
    """The scores of one category; -1 where the annotations hold no object of it."""

    category_id: int
    name: str
    objects: int  # crowd regions aside
    ap: float
    ap50: float
    ar: float  # at the largest limit of detections


@dataclass(frozen=True)
class CocoResult:
    """Scores in [0, 1], or -1 where nothing is to be found."""

    numbers: dict[str, float]  # the twelve of `NUMBERS`, in that order; then AR_n if n > 100 detections counted
    per_class: tuple[ClassScore, ...]  # by ascending category id; empty where classes were ignored
    per_iou: dict[str, float]  # AP at each IoU threshold, "0.50" to "0.95"
    max_dets: int
    notes: tuple[str, ...]  # one sentence for whatever makes a number mean something else than usual

    def lines(self) -> list[str]:
        """What the tools print last: one number a line, as `AP 0.512`."""
        return [f"{name} {value:.3f}" for name, value in self.numbers.items()]

    def as_json(self) -> dict[str, Any]:
        """The numbers under their names in full precision, then the details."""
        per_class = [
            {"id": c.category_id, "name": c.name, "objects": c.objects, "AP": c.ap, "AP50": c.ap50, "AR": c.ar}
            for c in self.per_class
        ]
        return {**self.numbers, "max_dets": self.max_dets, "per_iou": self.per_iou, "per_class": per_class}


class CocoEvaluator:
    """Collects detections as compact arrays and scores them against an annotation file.

    `max_dets`: how many detections of one class in one image count, COCO's 100 by default.  AP and the recalls by size
    are taken at this limit; AR_1, AR_10 and AR_100 keep the limit in their name (or `max_dets` where that is less), and
    a larger limit n adds AR_n to the twelve numbers.

    `annotations`: a COCO file, its content, or the index of what is evaluated.

    `category_ids`: the category of each label; by default the annotations' categories by ascending id.

    Raises:
        DataError: the annotations cannot be read.
    """

    def __init__(
        self,
        annotations: Path | dict[str, Any] | CocoIndex,
        engine: Engine = "hotcoco",
        max_dets: int = 100,
        iou_type: IouType = "bbox",
        use_classes: bool = True,
        category_ids: Sequence[int] | None = None,
    ) -> None:
        if max_dets < 1:
            raise UserError(f"max_dets is {max_dets}, expected at least 1")
        self.engine, self.max_dets, self.iou_type, self.use_classes = engine, max_dets, iou_type, use_classes
        masks = iou_type == "segm"
        if isinstance(annotations, CocoIndex):
            self.truth = Truth.of(annotations, masks)
        else:
            self.truth = Truth.load(annotations, masks)
        ids = self.truth.category_ids if category_ids is None else np.asarray(category_ids, dtype=np.int64)
        self._category, known = lookup(ids, self.truth.category_ids)
        if not known.all():
            raise UserError(f"{self.truth.source}: has no category with the id {ids[np.argmin(known)]} of a label")
        self._parts: list[Found] = []

    def add(self, image_ids: Sequence[int] | Tensor, detections: Sequence[Detections]) -> None:
        """One `Detections` in original pixels for each image id, in the order in which equal scores shall rank.

        Raises:
            UserError: an image id that the annotations do not have; a box or score that is not finite.
        """
        import torch

        if not detections:
            return
        counts = [len(d) for d in detections]
        ids = torch.as_tensor(image_ids).cpu().numpy().astype(np.int64)
        index, known = lookup(ids, self.truth.image_ids)
        if not known.all():
            raise UserError(f"{self.truth.source}: has no image with the id {ids[np.argmin(known)]}")
        # One copy from the device for all that the batch found.
        rows = torch.cat([torch.cat([d.boxes, d.scores[:, None], d.labels[:, None]], 1).double() for d in detections])
        flat = rows.cpu().numpy()
        image = np.repeat(index, counts)
        finite = np.isfinite(flat).all(1)
        if not finite.all():
            wrong = self.truth.image_ids[image[np.argmin(finite)]]
            raise UserError(
                f"image {wrong}: the model found a box or a score that is not finite; its weights have diverged"
            )
        boxes = np.concatenate([flat[:, :2], flat[:, 2:4] - flat[:, :2]], axis=1).round(_DECIMALS)
        self._parts.append(Found(image, self._category[flat[:, 5].astype(np.int64)], flat[:, 4], boxes))

    def add_file(self, path: Path) -> None:
        """A file in COCO's results format.

        Raises:
            DataError: names the file, the detection and the key at fault.
        """
        self.add_list(read_list(path), str(path))

    def add_list(self, detections: list[dict[str, Any]], source: str) -> None:
        """Detections in COCO's results format; `source` names them in messages.

        Raises:
            DataError: names the detection and the key at fault.
        """
        self._parts.append(parse_results(detections, self.truth, self.iou_type, source))

    @property
    def found(self) -> Found:
        """All that was added, as one piece."""
        if len(self._parts) != 1:
            self._parts = [_concatenate(self._parts)]
        return self._parts[0]

    def write_detections(self, path: Path) -> None:
        """All that was added, in COCO's results format; scoring the file gives the same numbers.

        Raises:
            UserError: the file cannot be written.
        """
        write_results(path, self.truth, self.found)

    def result(self) -> CocoResult:
        """The scores of all that was added; images of the annotations without detections count as such."""
        limits = sorted({*(n for n in (1, 10, 100) if n < self.max_dets), self.max_dets})
        found = curves(self.engine, self.truth, self.found, limits, self.iou_type, self.use_classes)
        summary = _Summary(found, limits)
        numbers = summary.numbers()
        return CocoResult(
            numbers=numbers,
            per_class=self._per_class(found) if self.use_classes else (),
            per_iou={f"{t:.2f}": _mean(found.precision[i, :, :, 0, -1]) for i, t in enumerate(THRESHOLDS)},
            max_dets=self.max_dets,
            notes=tuple(self._notes(numbers)),
        )

    def _per_class(self, found: Curves) -> tuple[ClassScore, ...]:
        truth = self.truth
        objects = np.bincount(truth.category[~truth.crowd], minlength=len(truth.names))
        return tuple(
            ClassScore(
                category_id=int(truth.category_ids[k]),
                name=name,
                objects=int(objects[k]),
                ap=_mean(found.precision[:, :, k, 0, -1]),
                ap50=_mean(found.precision[0, :, k, 0, -1]),
                ar=_mean(found.recall[:, k, 0, -1]),
            )
            for k, name in enumerate(truth.names)
        )

    def _notes(self, numbers: dict[str, float]) -> list[str]:
        notes = [*self.truth.notices, *explain_undefined(numbers, self.truth)]
        if self.max_dets != 100:
            notes.append(
                f"AP and the recalls by size count up to {self.max_dets} detections of a class in an image;"
                " COCO's limit is 100"
            )
        if self.engine == "pycocotools" and len(self.truth) and bool((self.truth.ids == 0).any()):
            notes.append(
                f"{self.truth.source}: an annotation has the id 0, which pycocotools takes for `no match`: its scores"
                " are too low; the engine hotcoco is right"
            )
        return notes


def explain_undefined(numbers: dict[str, float], truth: Truth) -> list[str]:
    """One sentence for each size, and for the whole, whose scores are -1 because there is no object to be found."""
    if len(truth) == 0 or bool(truth.crowd.all()):
        return [f"all numbers are -1: {truth.source} holds no object" + (" but crowd regions" if len(truth) else "")]
    notes = []
    for size, (low, high) in list(AREAS.items())[1:]:
        names = [name for name in (f"AP_{size}", f"AR_{size}") if numbers[name] == -1]
        if names:
            upper = f" to {high**0.5:.0f}^2" if high < 1e9 else " and above"
            notes.append(
                f"{' and '.join(names)} are -1: {truth.source} holds no {size} object"
                f" (area {low**0.5:.0f}^2{upper} pixels)"
            )
    return notes


@dataclass(frozen=True, eq=False)
class _Summary:
    """The means that COCO reports, out of the curves."""

    curves: Curves
    limits: list[int]

    @cached_property
    def _areas(self) -> dict[str, int]:
        return {name: i for i, name in enumerate(AREAS)}

    def numbers(self) -> dict[str, float]:
        precision, recall = self.curves.precision, self.curves.recall
        sizes = list(self._areas.items())[1:]
        values = [_mean(precision[:, :, :, 0, -1]), _mean(precision[0, :, :, 0, -1]), _mean(precision[5, :, :, 0, -1])]
        values += [_mean(precision[:, :, :, a, -1]) for _, a in sizes]
        values += [_mean(recall[:, :, 0, self._limit(n)]) for n in (1, 10, 100)]
        values += [_mean(recall[:, :, a, -1]) for _, a in sizes]
        numbers = dict(zip(NUMBERS, values, strict=True))
        if self.limits[-1] > 100:
            numbers[f"AR_{self.limits[-1]}"] = _mean(recall[:, :, 0, -1])
        return numbers

    def _limit(self, n: int) -> int:
        """The index of the limit `n`, or of the largest one below it."""
        return max(i for i, limit in enumerate(self.limits) if limit <= n or i == 0)


def _mean(values: np.ndarray) -> float:
    defined = values[values > -1]
    return float(np.mean(defined)) if defined.size else -1.0


def _concatenate(parts: list[Found]) -> Found:
    if not parts:
        none = np.zeros(0, dtype=np.int64)
        return Found(none, none, np.zeros(0), np.zeros((0, 4)))
    boxes = [p.boxes for p in parts if p.boxes is not None]
    return Found(
        image=np.concatenate([p.image for p in parts]),
        category=np.concatenate([p.category for p in parts]),
        scores=np.concatenate([p.scores for p in parts]),
        boxes=np.concatenate(boxes) if len(boxes) == len(parts) else None,
        masks=[m for p in parts for m in p.masks or ()] if parts[0].masks is not None else None,
    )


def score_file(
    annotations: Path, detections: Path, engine: Engine, max_dets: int, iou_type: IouType | None, use_classes: bool
) -> CocoResult:
    """A results file against an annotation file, without any model; `iou_type` None: as the results are.

    Raises:
        DataError: one of the files cannot be read, or they do not belong together.
    """
    found = read_list(detections)
    evaluator = CocoEvaluator(annotations, engine, max_dets, iou_type or kind_of(found), use_classes)
    evaluator.add_list(found, str(detections))
    return evaluator.result()
