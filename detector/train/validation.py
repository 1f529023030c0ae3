"""Scores during training, on the validation split."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from detector.config.run import RunConfig
from detector.data.coco import CocoData
from detector.data.loader import eval_loader
from detector.evaluate.coco import CocoEvaluator, CocoResult
from detector.evaluate.runner import evaluate
from detector.structures import Batch, Detections
from detector.train.pictures import ValidationPictures
from detector.train.signals import StopRequest


class Interrupted(Exception):
    """A signal came during an evaluation, which is left undone."""


class Validation:
    """Scores a model on `data` as often as asked, always in the same way."""

    def __init__(self, config: RunConfig, data: CocoData, device: torch.device) -> None:
        self.config, self.data, self.device = config, data, device
        self.pictures = ValidationPictures(data, config.train.pictures)
        self.loader = eval_loader(
            data,
            resize=config.data.resize,
            batch_size=config.evaluate.batch_size or config.train.batch_size,
            workers=config.data.workers,
            pad_multiple=config.data.pad_multiple,
            max_unreadable=config.data.max_unreadable,
        )

    def run(self, model: nn.Module, stop: StopRequest) -> CocoResult:
        """COCO's numbers of `model`, which is left as it was, and so are all random number generators.

        Raises:
            Interrupted: `stop` was requested.
        """
        settings = self.config.evaluate
        limit = max(self.config.decode.max_detections, settings.max_dets)  # as many may be found as count
        evaluator = CocoEvaluator(self.data.index, settings.engine, settings.max_dets)

        def watch(batch: Batch, found: Sequence[Detections]) -> None:
            if stop.name is not None:
                raise Interrupted
            self.pictures.collect(batch, found)

        return evaluate(
            model,
            self.loader,
            self.config.decode.model_copy(update={"max_detections": limit}),
            evaluator,
            self.device,
            self.config.train.precision,
            watch,
        )
