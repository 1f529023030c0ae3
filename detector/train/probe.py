"""The assignment of a few validation images, noted down as training goes on: how steady is what a rule asks for?

folder/assignments/step-000123.npz    prior, object, weight, quality of each pair of positive weight, under the name
                                      of its assignment: `dense/prior`, ...
"""

from __future__ import annotations

import io
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
from detector.files import write_whole
from detector.structures import Assignment, Batch
from detector.train.folder import RunFiles
from detector.train.length import Length
from detector.train.step import TrainingModule


class ProbeConfig(Node):
    """Notes the assignments of the same images again and again."""

    images: int = Field(8, ge=1, description="evenly spaced over the validation split")
    every: Length = Length(epochs=1)


class Probe:
    """The same images each time, resized as in evaluation, without augmentation."""

    def __init__(self, config: ProbeConfig, data: CocoData, resize: Sizing, pad_multiple: int) -> None:
        self.config, self.data, self.resize, self.pad_multiple = config, data, resize, pad_multiple
        self._batch: Batch | None = None

    def note(self, module: TrainingModule, files: RunFiles, step: int) -> None:
        """Writes a file for the state after `step` steps; neither the module nor random numbers are changed.

        Raises:
            UserError: the file cannot be written.
        """
        batch = self._images()
        if batch is None:
            return
        batch = batch.to(next(module.parameters()).device)
        with inference(module):
            outputs = module.model(batch.images, batch.objects)
            assignments = module.criterion(outputs, batch.objects).assignments
        content = io.BytesIO()
        np.savez_compressed(content, **{k: v for name, a in assignments.items() for k, v in _arrays(name, a).items()})
        write_whole(path_of(files, step), content.getvalue())

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


def _arrays(name: str, assignment: Assignment) -> dict[str, Any]:
    kept = assignment.weight > 0
    columns = {"prior": assignment.prior, "object": assignment.object, "weight": assignment.weight,
               "quality": assignment.quality}  # fmt: skip
    return {f"{name}/{key}": value[kept].cpu().numpy() for key, value in columns.items()}
