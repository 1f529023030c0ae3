"""Assignment and losses of a one-stage detector.

Legend: B images, R priors of an image, N objects of the batch, K classes, C raw numbers of a box, P pairs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from detector.config.node import Node
from detector.errors import ConfigError
from detector.losses import AnyBoxLoss, AnyClassLoss, AnyQualityLoss
from detector.losses.classification import Focal
from detector.losses.normalizer import Kind, Normalizer
from detector.losses.regression import Giou
from detector.losses.targets import Pairs, class_targets
from detector.structures import Assignment, Losses, Objects, Outputs

if TYPE_CHECKING:
    from detector.assign.base import Assigner


class DenseCriterionConfig(Node):
    """Which losses, how weighted, divided by what."""

    type: Literal["dense"] = "dense"
    classification: AnyClassLoss = Focal()
    box: AnyBoxLoss = Giou(weight=2.0)
    quality: AnyQualityLoss | None = Field(None, description="loss of the head's quality branch; null: it has none")
    box_weighting: Literal["uniform", "quality"] = Field(
        "uniform", description="quality: the quality's target weights a pair's box loss (FCOS and ATSS, by centerness)"
    )
    normalizer: Kind = Field(
        "positives",
        description="what all terms are divided by, counted over the whole batch: positive priors, the sum of their"
        " class targets, objects, or a moving average of positives",
    )

    @model_validator(mode="after")
    def _weighting_needs_quality(self) -> DenseCriterionConfig:
        if self.box_weighting == "quality" and self.quality is None:
            raise ValueError("box_weighting is 'quality' but there is no quality loss: set quality, or 'uniform'")
        return self

    def build(self, assigner: Assigner, num_classes: int) -> DenseCriterion:
        return DenseCriterion(config=self, assigner=assigner, num_classes=num_classes)


class DenseCriterion(nn.Module):
    """`criterion(outputs, objects) -> Losses`: labels by whichever assigner, then class, box and quality loss.

    Sums `class`, `box` and, where asked for, `quality`.  All are divided by the one normaliser.  That includes the box
    loss when the quality's target weights it; the FCOS and ATSS papers' code divides that one by the sum of the weights
    instead, which is smaller by a nearly constant factor (about 0.6 for centerness), for `box.weight` to absorb.

    Everything is float32 with autocast off, without synchronisation with the device.  A batch without objects or pairs
    gives box and quality losses of exactly 0 that still hang on the graph.
    """

    def __init__(self, *, config: DenseCriterionConfig, assigner: Assigner, num_classes: int) -> None:
        super().__init__()
        self.config = config
        self.assigner = assigner
        self.num_classes = num_classes
        self.normalizer = Normalizer(config.normalizer)

    def forward(self, outputs: Outputs, objects: Objects) -> Losses:
        """Raises `ConfigError` where the head's outputs do not fit the losses that were asked for."""
        self._check(outputs)
        with torch.autocast(outputs.class_logits.device.type, enabled=False):
            predictions = outputs.detached() if self.assigner.uses_predictions else None
            assignment = self.assigner(outputs.priors, objects, predictions)
            return Losses(
                sums=self._sums(outputs, objects, assignment),
                normalizer=self.normalizer(assignment, objects),
                assignments={"dense": assignment},
            )

    def _sums(self, outputs: Outputs, objects: Objects, assignment: Assignment) -> dict[str, Tensor]:
        classification, box, quality = self.config.classification, self.config.box, self.config.quality
        targets = class_targets(assignment, objects.labels, self.num_classes)
        sums = {"class": classification.weight * classification(outputs.class_logits, targets)}

        pairs = Pairs.gather(outputs, objects, assignment)
        box_weight, quality_sum = pairs.weight, None
        if quality is not None and pairs.quality_logits is not None:
            goal = quality.targets(pairs.centers, pairs.decoded, pairs.boxes)
            quality_sum = quality.weight * (quality(pairs.quality_logits, goal) * pairs.weight).sum()
            if self.config.box_weighting == "quality":
                box_weight = box_weight * goal

        each = box(pairs.raw, pairs.raw_target) if box.on == "raw" else box(pairs.decoded, pairs.boxes)
        sums["box"] = box.weight * (each * box_weight).sum()
        if quality_sum is not None:
            sums["quality"] = quality_sum
        return sums

    def _check(self, outputs: Outputs) -> None:
        classes = outputs.class_logits.shape[-1]
        if classes != self.num_classes:
            raise ConfigError(
                f"the head gives {classes} class logits a prior, the criterion expects {self.num_classes}"
            )
        if self.config.quality is not None and outputs.quality_logits is None:
            raise ConfigError(
                "criterion.quality asks for a quality loss but the head has no quality branch: set"
                " model.head.quality=true, or criterion.quality=null"
            )
