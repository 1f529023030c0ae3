"""Assignment and losses of a one-stage detector.

Legend: B images, R priors of an image, N objects of the batch, K classes, C raw numbers of a box, P pairs.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from detector.coders import Bins
from detector.errors import ConfigError
from detector.losses import AnyBoxLoss, AnyClassLoss, AnyQualityLoss, DistributionFocal, base
from detector.losses.base import CriterionConfig
from detector.losses.classification import Focal
from detector.losses.normalizer import Kind, Normalizer, mean_over_processes
from detector.losses.regression import Giou
from detector.losses.targets import Pairs, class_targets
from detector.structures import Assignment, Losses, Objects, Outputs

if TYPE_CHECKING:
    from detector.assign.base import Assigner
    from detector.coders import Coder


class DenseCriterionConfig(CriterionConfig):
    """Which losses, towards what, how weighted, divided by what."""

    type: Literal["dense"] = "dense"
    classification: AnyClassLoss = Focal()
    class_target: Literal["assignment", "iou", "one"] = Field(
        "assignment",
        description="what a pair's class score should be: what the rule says (1 for hard rules), the IoU of the"
        " prediction with its object now (GFL, VFNet), or 1 whatever the rule says",
    )
    class_on: Literal["all", "positives"] = Field(
        "all", description="positives: priors without an object are left to the quality branch's objectness (YOLOX)"
    )
    box: AnyBoxLoss = Giou(weight=2.0)
    initial_box: AnyBoxLoss | None = Field(
        None, description="loss of the boxes before a head refines them, weighted likewise; null: they have none"
    )
    box_weighting: Literal["uniform", "quality", "assignment", "iou", "score"] = Field(
        "uniform",
        description="a pair's box loss is weighted by the quality branch's target (FCOS and ATSS, by centerness), the"
        " rule's quality (TOOD, RTMDet), the prediction's IoU now (VFNet), or its best class score now (GFL)",
    )
    normalize_box_weights: bool = Field(
        False,
        description="scale them to a mean of 1 in each (micro-)batch, which is what dividing boxes by the sum of their"
        " weights does in the authors' codes; else boxes count little while their weights are small",
    )
    distribution: DistributionFocal | None = Field(None, description="loss of the distributions of a 'bins' coder")
    quality: AnyQualityLoss | None = Field(None, description="loss of the head's quality branch; null: it has none")
    normalizer: Kind = Field(
        "positives",
        description="what all terms are divided by, counted over the whole batch: positive priors, the sum of their"
        " class targets, objects, or a moving average of positives",
    )

    @model_validator(mode="after")
    def _parts_fit(self) -> DenseCriterionConfig:
        if self.box_weighting == "quality" and self.quality is None:
            raise ValueError("box_weighting is 'quality' but there is no quality loss: set quality, or 'uniform'")
        if self.class_on == "positives" and (self.quality is None or self.quality.type != "objectness"):
            raise ValueError(base.NO_BACKGROUND)
        return self

    @property
    def uses_quality(self) -> bool:
        return self.quality is not None

    def objection(self, coder: Coder, initial: Coder | None = None) -> str | None:
        if self.distribution is not None and not isinstance(coder, Bins):
            return base.NO_DISTRIBUTIONS
        if self.initial_box is not None and initial is None:
            return base.NOT_REFINED
        if self.initial_box is not None and self.initial_box.on == "raw" and isinstance(initial, Bins):
            return base.RAW_ARE_LOGITS.replace("criterion.box", "criterion.initial_box")
        return base.RAW_ARE_LOGITS if self.box.on == "raw" and isinstance(coder, Bins) else None

    def build(self, assigner: Assigner | None, num_classes: int) -> DenseCriterion:
        if assigner is None:
            raise ConfigError("criterion.type 'dense' needs a rule of label assignment: set assigner")
        return DenseCriterion(config=self, assigner=assigner, num_classes=num_classes)


class DenseCriterion(nn.Module):
    """`criterion(outputs, objects) -> Losses`: labels by whichever assigner, then class, box and quality loss.

    Sums `class`, `box` and, where asked for, `initial_box`, `distribution` and `quality`, all divided by the one
    normaliser.  That includes weighted box losses, which the authors' codes divide by the sum of the weights instead.
    For centerness that is smaller by a nearly constant factor (about 0.6), for `box.weight` to absorb; weights that
    grow while the network learns want `normalize_box_weights`.  Objects' own weights: docs/conversion.md.

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
        """Raises `ConfigError` where the head's outputs or the rule do not fit the losses that were asked for."""
        self.check(outputs)
        predictions = outputs.detached() if self.assigner.uses_predictions else None
        return self.losses(outputs, objects, self.assigner(outputs.priors, objects, predictions))

    def losses(self, outputs: Outputs, objects: Objects, assignment: Assignment) -> Losses:
        """The same for an assignment that was made already."""
        with torch.autocast(outputs.class_logits.device.type, enabled=False):
            if objects.weight is not None:
                assignment = replace(assignment, object_weight=objects.weight[assignment.object])
            pairs = Pairs.gather(outputs, objects, assignment)
            learnt = replace(assignment, quality=self._class_target(assignment, pairs))
            return Losses(
                sums={
                    "class": self.class_sum(outputs, objects, learnt),
                    **self._sums(outputs, objects, assignment, pairs),
                },
                normalizer=self.normalizer(learnt, objects),
                assignments={"dense": assignment},
            )

    def _class_target(self, assignment: Assignment, pairs: Pairs) -> Tensor:
        """(P,) what each pair's class score should be."""
        if self.config.class_target == "iou":
            return pairs.iou
        return assignment.quality if self.config.class_target == "assignment" else torch.ones_like(pairs.weight)

    def class_sum(self, outputs: Outputs, objects: Objects, learnt: Assignment) -> Tensor:
        """The class term alone, towards the pairs' `quality`."""
        loss = self.config.classification
        targets = class_targets(learnt, objects.labels, self.num_classes, self.config.class_on == "positives")
        return loss.weight * loss(outputs.class_logits, targets, modulation=not self._modulated(learnt))

    def _sums(self, outputs: Outputs, objects: Objects, assignment: Assignment, pairs: Pairs) -> dict[str, Tensor]:
        """Of boxes and quality."""
        first, distribution, quality = self.config.initial_box, self.config.distribution, self.config.quality
        goal = None if quality is None else quality.targets(pairs.centers, pairs.decoded, pairs.boxes)
        weight = self._box_weight(assignment, pairs, goal)
        sums = {"box": self.config.box.weight * (pairs.box_loss(self.config.box) * weight).sum()}
        if first is not None and outputs.initial is not None:
            before = Pairs.gather(outputs.initial, objects, assignment)
            counts = self._box_weight(assignment, before, goal)
            sums["initial_box"] = first.weight * (before.box_loss(first) * counts).sum()
        if distribution is not None and isinstance(pairs.coder, Bins):
            true = pairs.coder.distances(pairs.prior_boxes, pairs.stride, pairs.boxes)
            sums["distribution"] = distribution.weight * (distribution(pairs.raw, true, pairs.coder) * weight).sum()
        if quality is not None and goal is not None and outputs.quality_logits is not None:
            sums["quality"] = quality.weight * quality(outputs.quality_logits, goal, pairs, assignment)
        return sums

    def _box_weight(self, assignment: Assignment, pairs: Pairs, goal: Tensor | None) -> Tensor:
        """(P,) what a pair's box counts, its own weight included; no gradient."""
        weight, by = pairs.weight, self.config.box_weighting
        if by == "quality" and goal is not None:
            weight = weight * goal
        elif by == "assignment":
            weight = weight * assignment.quality
        elif by in ("iou", "score"):
            weight = weight * (pairs.iou if by == "iou" else pairs.best_score)
        if self.config.normalize_box_weights:
            weight = weight * mean_over_processes(pairs.weight.sum()) / mean_over_processes(weight.sum()).clamp(min=1)
        return weight

    def _modulated(self, assignment: Assignment) -> bool:
        """Whether the rule's weights hold the focal factor already."""
        if assignment.modulated is None and assignment.background_weight is not None:
            raise ConfigError(type(self.assigner).__name__ + base.NOT_SAID_WHETHER_MODULATED)
        return bool(assignment.modulated)

    def check(self, outputs: Outputs) -> None:
        """Raises `ConfigError` where the head does not fit the losses."""
        classes = outputs.class_logits.shape[-1]
        if classes != self.num_classes:
            raise ConfigError(f"the head gives {classes} class logits a prior, criterion expects {self.num_classes}")
        if self.config.quality is not None and outputs.quality_logits is None:
            raise ConfigError(base.NO_QUALITY)
        objection = self.config.objection(outputs.coder, None if outputs.initial is None else outputs.initial.coder)
        if objection is not None:
            raise ConfigError(objection)
