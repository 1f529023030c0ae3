"""COCO's numbers against pycocotools: time, and whether all twelve are equal."""

from __future__ import annotations

import contextlib
import io
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from detector.bench.measure import Table, Target, seconds_text, take_turns
from detector.evaluate.coco import NUMBERS, CocoEvaluator
from detector.evaluate.engines import records
from detector.seeding import SYNTHETIC, generator
from detector.structures import Detections

IMAGES, OBJECTS_EACH, DETECTIONS_EACH, CLASSES = 5000, 7, 88, 80
BATCH = 16
MOST_SECONDS = 3.0

METHOD = (
    "{images:,} generated images with {objects:,} objects of {classes} classes and {detections:,} detections.  Ours:"
    " the annotation file is read, the detections are added by batches of {batch} as they come from the model, and"
    " scored (hotcoco).  pycocotools: the annotation file is read, the detections are given as a list of records,"
    " already in its format, and scored.  Ours is run {turns} times, pycocotools once, in between."
)


def run(device: torch.device, quick: bool) -> Table:
    count, turns = (40, 2) if quick else (IMAGES, 4)
    content, found = make_set(count)
    ids = [image["id"] for image in content["images"]]
    with tempfile.TemporaryDirectory() as name:
        path = Path(name) / "annotations.json"
        path.write_text(json.dumps(content), encoding="utf-8")

        def evaluator() -> CocoEvaluator:
            result = CocoEvaluator(path)
            for start in range(0, count, BATCH):
                result.add(ids[start : start + BATCH], found[start : start + BATCH])
            return result

        filled = evaluator()
        listed = records(filled.truth, filled.found)
        ours = filled.result().numbers
        theirs: dict[str, float] = {}

        def score() -> None:
            evaluator().result()

        def peer() -> None:
            theirs.update(zip(NUMBERS, _pycocotools(path, listed), strict=True))

        cpu = torch.device("cpu")
        half = turns // 2
        before = take_turns({"ours": score}, cpu, turns=half, warm_up=0).seconds["ours"]
        slow = take_turns({"peer": peer}, cpu, turns=1, warm_up=0).median("peer")
        seconds = before + take_turns({"ours": score}, cpu, turns=turns - half, warm_up=0).seconds["ours"]
    median = float(np.median(seconds))
    apart = max(abs(ours[key] - theirs[key]) for key in NUMBERS)
    return Table(
        title="Evaluation",
        method=METHOD.format(
            images=count,
            objects=len(content["annotations"]),
            classes=CLASSES,
            detections=len(listed),
            batch=BATCH,
            turns=turns,
        ),
        columns=("", "time", "AP", "faster", "greatest difference of the twelve numbers"),
        rows=[
            ("ours", seconds_text(median), f"{ours['AP']:.6f}", f"{slow / median:.3g}x", f"{apart:.3g}"),
            ("pycocotools", seconds_text(slow), f"{theirs['AP']:.6f}", "", ""),
        ],
        targets=[
            Target("time", median, MOST_SECONDS, True, " s"),
            Target("greatest difference from pycocotools", apart, 0, True),
        ],
        numbers={"seconds": seconds, "pycocotools_seconds": slow, "ours": ours, "pycocotools": theirs},
    )


def _pycocotools(path: Path, listed: list[dict[str, Any]]) -> list[float]:
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    with contextlib.redirect_stdout(io.StringIO()):
        known = COCO(str(path))
        evaluation = COCOeval(known, known.loadRes(listed), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return [float(value) for value in evaluation.stats]


def make_set(count: int) -> tuple[dict[str, Any], list[Detections]]:
    """Annotations, and detections of which some find an object, more or less well, and most find none.

    Some objects are crowd regions; sizes span COCO's small, medium and large.
    """
    rng = generator(3, SYNTHETIC)
    objects = count * OBJECTS_EACH
    side = np.exp(rng.uniform(np.log(8), np.log(300), (objects, 2)))
    corner = rng.uniform(0, 1, (objects, 2)) * (np.array([640, 480]) - side.clip(max=470)).clip(min=1)
    boxes = np.concatenate([corner, side], 1).round(2)
    labels, crowd = rng.integers(CLASSES, size=objects), rng.random(objects) < 0.01
    content: dict[str, Any] = {
        "images": [{"id": i, "file_name": f"{i}.jpg", "width": 640, "height": 480} for i in range(1, count + 1)],
        "categories": [{"id": k, "name": f"class {k}"} for k in range(1, CLASSES + 1)],
        "annotations": [
            {"id": i + 1, "image_id": i // OBJECTS_EACH + 1, "category_id": label + 1, "bbox": box, "iscrowd": int(c)}
            | {"area": box[2] * box[3]}
            for i, (box, label, c) in enumerate(zip(boxes.tolist(), labels.tolist(), crowd.tolist(), strict=True))
        ],
    }
    found = []
    for image in range(count):
        near = rng.integers(image * OBJECTS_EACH, (image + 1) * OBJECTS_EACH, DETECTIONS_EACH)
        size = boxes[near, 2:]
        shift = rng.normal(size=(DETECTIONS_EACH, 2)) * size * rng.uniform(0.02, 1, (DETECTIONS_EACH, 1))
        grow = np.exp(rng.normal(size=(DETECTIONS_EACH, 2)) * 0.15)
        corner = (boxes[near, :2] + shift).clip(min=0)
        right = rng.random(DETECTIONS_EACH) < 0.4
        label = np.where(right, labels[near], rng.integers(CLASSES, size=DETECTIONS_EACH))
        quality = np.exp(-np.abs(shift / size).sum(1)) * np.where(right, 1, 0.5)
        scores = np.sort((quality * rng.uniform(0.5, 1, DETECTIONS_EACH)).round(3))[::-1].copy()
        order = np.argsort(-quality, kind="stable")
        both = np.concatenate([corner, corner + size * grow], 1)[order]
        found.append(
            Detections(torch.from_numpy(both).float(), torch.from_numpy(scores).float(), torch.from_numpy(label[order]))
        )
    return content, found
