"""What a finished run is remembered by: its matches image by image, how each object was treated, time and memory."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from detector.config.run import RunConfig
from detector.data.coco import CocoData
from detector.data.config import SplitName
from detector.data.loader import eval_loader
from detector.decode import decode
from detector.evaluate.coco import CocoEvaluator, CocoResult
from detector.evaluate.matches import Matches, match
from detector.evaluate.runner import inference, to_original
from detector.evaluate.survey import survey
from detector.evaluate.treatment import Treatment, concatenate, treat
from detector.evaluate.truth import Truth, lookup
from detector.lab.logged import flips
from detector.models.layers import autocast
from detector.models.stages import TwoStageOutputs
from detector.structures import Assignment, Outputs
from detector.train.checkpoint import check_classes, load_checkpoint
from detector.train.device import find_device
from detector.train.folder import RunFiles
from detector.train.step import TrainingModule


@dataclass(frozen=True, eq=False)
class Record:
    """Of one run on one split."""

    result: CocoResult
    matches: Matches
    treatment: Treatment
    annotation: np.ndarray  # (N,) int64: the id of each object of the treatment


def restore(config: RunConfig, path: Path, classes: tuple[str, ...]) -> TrainingModule:
    """Network (averaged weights where there are any) and criterion of a checkpoint, in evaluation mode on the CPU."""
    content = load_checkpoint(path)
    check_classes(content, classes, path)
    model = config.network(len(classes), load_weights=False)
    model.load_state_dict(content["ema"] or content["model"])
    criterion = config.criterion.build(config.assigner, len(classes))
    criterion.load_state_dict(content["criterion"])
    return TrainingModule(model, criterion, config.train.precision).eval()


def observe(config: RunConfig, checkpoint: Path, split: SplitName) -> Record:
    """Evaluates a run's checkpoint once more and looks at what its rule does to each object of the split."""
    device = find_device(config.train.device)
    data = config.data.open(split)
    module = restore(config, checkpoint, data.index.classes).to(device)
    loader = eval_loader(
        data,
        resize=config.data.resize,
        batch_size=config.evaluate.batch_size or config.train.batch_size,
        workers=config.data.workers,
        pad_multiple=config.data.pad_multiple,
        max_unreadable=config.data.max_unreadable,
    )
    limit = config.evaluate.max_dets
    evaluator = CocoEvaluator(data.index, max_dets=limit)
    decoding = config.decode.model_copy(update={"max_detections": max(config.decode.max_detections, limit)})
    treated: list[Treatment] = []
    with inference(module):
        for batch in loader:
            batch = batch.to(device)
            with autocast(device, config.train.precision):
                outputs = module.model(batch.images, batch.objects)
                # With the truth, a two-stage model says what it learns from instead of what it finds.
                two_stage = isinstance(outputs, TwoStageOutputs)
                found = module.model(batch.images, **batch.known) if two_stage else outputs
            evaluator.add(batch.ids, to_original(decode(found, batch.sizes, decoding), batch))
            assignments = module.criterion(outputs, batch.objects).assignments
            dense = dense_part(outputs)
            found_by = assignment_of(dense, assignments)
            predicted = None if dense.priors.per_image else dense.detached()
            treated.append(treat(dense.priors, batch.objects, found_by, predicted))
    treatment = concatenate(treated)
    return Record(
        result=evaluator.result(),
        matches=match(evaluator.truth, evaluator.found, limit),
        treatment=treatment,
        annotation=_annotations(data, loader.unreadable, len(treatment)),
    )


def dense_part(outputs: Outputs | TwoStageOutputs) -> Outputs:
    """What the run's rule labels: of a two-stage model its RPN's anchors, without one the first stage's proposals."""
    if not isinstance(outputs, TwoStageOutputs):
        return outputs
    return outputs.stages[0].outputs if outputs.rpn is None else outputs.rpn


def assignment_of(outputs: Outputs, assignments: dict[str, Assignment]) -> Assignment:
    """The first assignment of the priors that the network's outputs speak about."""
    return next(a for a in assignments.values() if a.num_priors == len(outputs.priors))


def _annotations(data: CocoData, unreadable: set[str], count: int) -> np.ndarray:
    """(N,) ids of the objects in the order of the loader: by image, crowd regions left out."""
    ids = data.index.annotation_ids[~data.index.crowd]
    if unreadable:  # such an image is shown without its objects: no telling whose they are
        return np.full(count, -1, dtype=np.int64)
    assert len(ids) == count, "the loader shows every object once"
    return np.asarray(ids)


def found_at(record_matches: Matches, truth: Truth, annotation: np.ndarray, threshold: int = 0) -> np.ndarray:
    """(N,) score of the detection that found each object, 0 where none did, NaN where the object is not known.

    `threshold`: its index, 0 for IoU 0.5.
    """
    scores = record_matches.found_score(len(truth), threshold)
    order = np.argsort(truth.ids)
    index, known = lookup(annotation, truth.ids[order])
    return np.asarray(np.where(known, scores[order[index]], np.nan))


def summary_of(record: Record, files: RunFiles, batch: int, classes: tuple[str, ...]) -> dict[str, Any]:
    """Plain numbers for `result.json`."""
    rows = [row for row in files.rows() if row["kind"] == "train"]
    rows = rows[1:] or rows  # the first lines include warming up
    speed = [row["images_per_second"] for row in rows]
    return {
        "numbers": record.result.numbers,
        "per_class": {c.name: {"AP": c.ap, "AP50": c.ap50, "objects": c.objects} for c in record.result.per_class},
        "seconds_per_step": batch / float(np.median(speed)) if speed else None,
        "memory_mb": max((row["memory_mb"] for row in rows), default=None),
        "assignment": survey(record.treatment, classes),
        "flips": flips(files),
        "torch": str(torch.__version__),
    }
