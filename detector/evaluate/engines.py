"""Two programs that compute COCO's precision and recall, behind one function: hotcoco for speed, pycocotools for proof.

Both follow the same definition to the last bit, with one exception: pycocotools marks "no match" with annotation id 0,
so it takes a match with the annotation of that id for none.  hotcoco gets its own running ids and is right there.

Legend: T IoU thresholds, Q recall steps, K categories, A areas (all, small, medium, large), M limits of detections.
"""

from __future__ import annotations

import contextlib
import io
import warnings
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from detector.evaluate.truth import AREAS, Truth

Engine = Literal["hotcoco", "pycocotools"]
IouType = Literal["bbox", "segm"]


@dataclass(frozen=True, eq=False)
class Found:
    """d detections in original pixels, in the order in which equal scores are ranked."""

    image: np.ndarray  # (d,) int64 index into the truth's image_ids
    category: np.ndarray  # (d,) int64 index into its category_ids
    scores: np.ndarray  # (d,) float64
    boxes: np.ndarray | None  # (d, 4) float64 x y width height; None where there are only masks
    masks: list[Any] | None = None  # d run-length encodings or polygons, where masks are scored

    def __len__(self) -> int:
        return len(self.scores)


@dataclass(frozen=True, eq=False)
class Curves:
    """What both engines yield; -1 where nothing is to be found."""

    precision: np.ndarray  # (T, Q, K, A, M)
    recall: np.ndarray  # (T, K, A, M)


def curves(
    engine: Engine, truth: Truth, found: Found, limits: list[int], iou_type: IouType, use_classes: bool
) -> Curves:
    """Precision and recall of `found`; without classes K is 1.

    `limits`: ascending numbers of detections of one class and image that count.
    """
    if len(truth.image_ids) == 0 or len(truth.category_ids) == 0:
        shape = (10, 101, len(truth.category_ids) if use_classes else 1, len(AREAS), len(limits))
        return Curves(np.full(shape, -1.0), np.full(shape[:1] + shape[2:], -1.0))
    run = _hotcoco if engine == "hotcoco" else _pycocotools
    result = run(truth, found, limits, iou_type, use_classes)
    return Curves(np.asarray(result["precision"]), np.asarray(result["recall"]))


def _hotcoco(truth: Truth, found: Found, limits: list[int], iou_type: IouType, use_classes: bool) -> Any:
    evaluation = matching(truth, found, limits, iou_type, use_classes)
    evaluation.accumulate()
    return evaluation.eval


def matching(truth: Truth, found: Found, limits: list[int], iou_type: IouType, use_classes: bool) -> Any:
    """hotcoco's evaluation once detections and objects are matched; annotation ids are indices of `truth` plus 1."""
    from hotcoco import COCO, COCOeval

    images = [
        {"id": i, "file_name": "", "height": h, "width": w} for i, (h, w) in enumerate(truth.image_sizes.tolist(), 1)
    ]
    categories = [{"id": k, "name": name} for k, name in enumerate(truth.names, 1)]
    known = COCO.from_arrays(
        images,
        categories,
        truth.image + 1,
        truth.category + 1,
        truth.boxes,
        area=truth.area,
        iscrowd=truth.crowd.astype(np.int64),
        segmentation=truth.masks,
    )
    if found.boxes is not None:
        rows = np.column_stack([found.image + 1, found.boxes, found.scores, found.category + 1])
        detected = known.load_res(rows, segmentation=found.masks)
    else:
        detected = known.load_res(_records(found, found.image + 1, found.category + 1))
    evaluation = COCOeval(known, detected, iou_type)
    evaluation.params.max_dets = limits
    evaluation.params.use_cats = use_classes
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that other limits than COCO's are asked for is known
        evaluation.evaluate()
    return evaluation


def _pycocotools(truth: Truth, found: Found, limits: list[int], iou_type: IouType, use_classes: bool) -> Any:
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    annotations = [
        {"id": i, "image_id": image, "category_id": category, "bbox": box, "area": area, "iscrowd": int(crowd)}
        for i, image, category, box, area, crowd in zip(
            truth.ids.tolist(),
            truth.image_ids[truth.image].tolist(),
            truth.category_ids[truth.category].tolist(),
            truth.boxes.tolist(),
            truth.area.tolist(),
            truth.crowd.tolist(),
            strict=True,
        )
    ]
    for annotation, mask in zip(annotations, truth.masks or (), strict=False):
        annotation["segmentation"] = mask
    known = COCO()
    known.dataset = {
        "images": [
            {"id": i, "height": h, "width": w}
            for i, (h, w) in zip(truth.image_ids.tolist(), truth.image_sizes.tolist(), strict=True)
        ],
        "categories": [
            {"id": i, "name": name} for i, name in zip(truth.category_ids.tolist(), truth.names, strict=True)
        ],
        "annotations": annotations,
    }
    with contextlib.redirect_stdout(io.StringIO()):
        known.createIndex()
        if len(found):
            detected = known.loadRes(records(truth, found))
        else:  # pycocotools cannot load an empty list
            detected = COCO()
            detected.dataset = {**known.dataset, "annotations": []}
            detected.createIndex()
        evaluation = COCOeval(known, detected, iou_type)
        evaluation.params.maxDets = limits
        evaluation.params.useCats = int(use_classes)
        evaluation.evaluate()
        evaluation.accumulate()
    return evaluation.eval


def records(truth: Truth, found: Found) -> list[dict[str, Any]]:
    """The detections in COCO's results format, in their order."""
    return _records(found, truth.image_ids[found.image], truth.category_ids[found.category])


def _records(found: Found, image_ids: np.ndarray, category_ids: np.ndarray) -> list[dict[str, Any]]:
    columns: dict[str, list[Any]] = {"image_id": image_ids.tolist(), "category_id": category_ids.tolist()}
    if found.boxes is not None:
        columns["bbox"] = found.boxes.tolist()
    if found.masks is not None:
        columns["segmentation"] = found.masks
    columns["score"] = found.scores.tolist()
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
