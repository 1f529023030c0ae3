"""The assignment of a few validation images, noted down as training goes on: how steady is what a rule asks for?

folder/assignments/step-000123.npz    prior, object, weight, quality of each pair of positive weight, under the name
                                      of its assignment: `dense/prior`, ...

What the notes come to is logged with them: `survey`'s numbers over all objects, positives by size, shape, class and
level, and the share of pairs that changed since the note before.
"""

from __future__ import annotations

import io
import math
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import Field

from detector.config.node import Node
from detector.data.batch import collate
from detector.data.coco import CocoData
from detector.data.resize import Sizing
from detector.errors import DataError
from detector.evaluate.runner import inference
from detector.evaluate.survey import survey
from detector.evaluate.treatment import flip_rate, read_note, treat
from detector.files import write_whole
from detector.models.stages import TwoStageOutputs
from detector.structures import Assignment, Batch
from detector.train.folder import RunFiles
from detector.train.length import Length
from detector.train.step import TrainingModule


class ProbeConfig(Node):
    """Notes and logs the assignments of the same images again and again."""

    images: int = Field(8, ge=1, description="evenly spaced over the validation split")
    every: Length = Length(epochs=1)


class Probe:
    """The same images each time, resized as in evaluation, without augmentation."""

    def __init__(self, config: ProbeConfig, data: CocoData, resize: Sizing, pad_multiple: int) -> None:
        self.config, self.data, self.resize, self.pad_multiple = config, data, resize, pad_multiple
        self._batch: Batch | None = None

    def note(self, module: TrainingModule, files: RunFiles, step: int) -> dict[str, float]:
        """Writes a file for the state after `step` steps, and what is to be logged of it.

        Neither the module nor random numbers are changed.

        Raises:
            DataError: the note before is damaged.
            UserError: the file cannot be written.
        """
        batch = self._images()
        if batch is None:
            return {}
        batch = batch.to(next(module.parameters()).device)
        with inference(module):
            outputs = module.model(batch.images, batch.objects)
            assignments = module.criterion(outputs, batch.objects).assignments
        note = {k: v for name, a in assignments.items() for k, v in _arrays(name, a).items()}
        earlier = sorted(path for path in files.assignments.glob("step-*.npz") if path < path_of(files, step))
        before = read_note(earlier[-1]) if earlier else {}
        # Of two stages only the first predicts at the priors of its assignment.
        dense = outputs.rpn if isinstance(outputs, TwoStageOutputs) else outputs
        predicted = None if dense is None else dense.detached()
        numbers: dict[str, float] = {}
        for name, assignment in assignments.items():
            treated = treat(outputs.priors_of(name), batch.objects, assignment, predicted)
            own = _numbers(survey(treated, self.data.index.classes))
            if f"{name}/prior" in before:
                own["flip_rate"] = flip_rate(before, note, name)
            numbers |= {f"{name}/{key}": value for key, value in own.items()}
        content = io.BytesIO()
        np.savez_compressed(content, **note)
        write_whole(path_of(files, step), content.getvalue())
        return numbers

    def _images(self) -> Batch | None:
        """Read once; those that cannot be read are left out (the evaluation names them)."""
        if self._batch is None:
            samples = []
            for i in np.linspace(0, len(self.data) - 1, min(self.config.images, len(self.data))).round().tolist():
                try:
                    samples.append(self.resize(self.data[int(i)]))
                except DataError:
                    continue
            if samples:
                self._batch = collate(samples, pad_multiple=self.pad_multiple, canvas=self.resize.canvas())
        return self._batch


def path_of(files: RunFiles, step: int) -> Path:
    return files.assignments / f"step-{step:06}.npz"


def _numbers(found: dict[str, dict[str, dict[str, float]]]) -> dict[str, float]:
    """Keys as of the training batches' own statistics, `positives_per_object/all`, with more groups behind the slash.

    Of a group only how many positives its objects have, so that curves stay few; unknown values are left out.
    """
    numbers = {f"{key}/all": value for key, value in found["all"].get("all", {}).items()}
    for kind in ("size", "aspect", "class"):
        for group, values in found[kind].items():
            for key in ("positives_per_object", "without_positive"):
                numbers[f"{key}/{kind}_{group}".replace(" ", "_")] = values[key]
    numbers |= {f"share_of_positives/level_{i}": level["share_of_positives"] for i, level in found["level"].items()}
    return {key: value for key, value in numbers.items() if math.isfinite(value)}


def _arrays(name: str, assignment: Assignment) -> dict[str, Any]:
    kept = assignment.weight > 0
    columns = {"prior": assignment.prior, "object": assignment.object, "weight": assignment.weight,
               "quality": assignment.quality}  # fmt: skip
    return {f"{name}/{key}": value[kept].cpu().numpy() for key, value in columns.items()}
