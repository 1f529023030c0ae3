"""Pictures of a run to look at: what goes in, which priors learn it, and what is found."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from detector import draw
from detector.data.coco import CocoData
from detector.errors import DataError
from detector.evaluate.runner import inference
from detector.structures import Batch, Detections
from detector.train.folder import RunFiles
from detector.train.log import Log
from detector.train.step import TrainingModule


def draw_first_batch(files: RunFiles, module: TrainingModule, batch: Batch, classes: Sequence[str]) -> None:
    """One sheet of augmented samples with their objects, and one of the priors that learn them, by level.

    `batch` is on the module's device; neither the module nor the random number generators are changed.
    """
    with inference(module):
        outputs = module.model(batch.images, batch.objects)
        losses = module.criterion(outputs, batch.objects)
    on_cpu = batch.to("cpu")
    draw.write(files.pictures / "train-samples.jpg", draw.sample_sheet(on_cpu, classes))
    for name, assignment in losses.assignments.items():
        priors = outputs.priors_of(name)
        if priors.per_image:  # proposals lie on no grid that dots could show
            continue
        sheet = draw.assignment_sheet(on_cpu, priors.to("cpu"), assignment, classes)
        draw.write(files.pictures / f"assignment-{name}.jpg", sheet)


class ValidationPictures:
    """Collects the detections of a few images during an evaluation, then draws them."""

    def __init__(self, data: CocoData, count: int) -> None:
        self.data = data
        picks = {round(i) for i in np.linspace(0, len(data) - 1, min(count, len(data))).tolist()}
        self._index = {int(data.index.image_ids[i]): i for i in sorted(picks)}
        self._found: dict[int, Detections] = {}

    def collect(self, batch: Batch, found: Sequence[Detections]) -> None:
        """`found` in original pixels."""
        if len(self._found) == len(self._index):
            return
        for image_id, detections in zip(batch.ids.tolist(), found, strict=True):
            if image_id in self._index:
                self._found[image_id] = detections.cpu()

    def draw(self, files: RunFiles, log: Log, step: int) -> None:
        """`pictures/step-<step>-<image id>.jpg`, and the same in TensorBoard."""
        for image_id, found in self._found.items():
            try:
                image = self.data[self._index[image_id]].image
            except DataError:  # already named and counted by the loader
                continue
            picture = draw.detections(image, found, self.data.index.classes)
            draw.write(files.pictures / f"step-{step:06}-{image_id}.jpg", picture)
            log.picture(step, f"val/{image_id}", picture)
        self._found = {}
