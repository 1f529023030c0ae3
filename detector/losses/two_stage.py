"""Losses of two-stage detectors: the RPN's, and those of each box head on its sampled proposals.

Legend: B images, R anchors, S sampled proposals of an image, K classes, P (proposal, object) pairs.

As published, every stage's terms are divided by the number of its own sampled priors, positive and negative.  A step
has one normaliser; here it counts images, and each term is its mean over the sample times B.  Where samplers find as
many priors as they should, accumulated micro-batches give exactly the gradient of the whole batch.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from detector.assign.sample import AnySampler, Random, paired
from detector.boxes import full_precision
from detector.coders import Coder
from detector.config.node import Node
from detector.errors import ConfigError
from detector.losses import AnyBoxLoss, AnyClassLoss, BoxLoss
from detector.losses.base import CriterionConfig, refuse_weights
from detector.losses.classification import Bce, ClassLoss, Focal
from detector.losses.regression import L1
from detector.losses.targets import ClassTargets, Pairs, class_targets
from detector.models.stages import Stage, TwoStageOutputs
from detector.structures import Assignment, Losses, Objects, Outputs

if TYPE_CHECKING:
    from detector.assign.base import Assigner


class CrossEntropy(Node):
    """Softmax over the classes and the background, which comes last.

    A pair's quality q (1 for hard rules) is its class's target, 1 - q the background's.
    """

    type: Literal["cross_entropy"] = "cross_entropy"
    weight: float = Field(1.0, ge=0, description="factor of this term in the total")
    label_smoothing: float = Field(0.0, ge=0, lt=1, description="this share of the target goes to all alike")

    def __call__(self, logits: Tensor, targets: ClassTargets) -> Tensor:
        """(B, S, K + 1) -> float32 scalar, undivided and without `weight`."""
        target, weight = targets.dense()
        target = target / target.sum(-1, keepdim=True).clamp(min=1)
        background = 1 - target.sum(-1, keepdim=True)
        target = torch.cat([target, background], -1)
        weight = torch.cat([weight, targets.prior_weight[..., None]], -1)
        smooth = self.label_smoothing
        target = target * (1 - smooth) + smooth / target.shape[-1]
        return -(full_precision(logits).log_softmax(-1) * target * weight).sum()


AnyRoiClassLoss = Annotated[CrossEntropy | Bce | Focal, Field(discriminator="type")]


class RpnLossConfig(Node):
    """The RPN's; what its anchors learn is up to the `assigner`."""

    sampler: AnySampler = Random(count=256, positive_fraction=0.5)
    classification: AnyClassLoss = Bce()
    box: AnyBoxLoss = L1()


class TwoStageCriterionConfig(CriterionConfig):
    """Which losses of which stage, how weighted."""

    type: Literal["two_stage"] = "two_stage"
    rpn: RpnLossConfig | None = Field(RpnLossConfig(), description="null for a model without an RPN")
    classification: AnyRoiClassLoss = CrossEntropy()
    box: AnyBoxLoss = L1()
    stage_weights: tuple[Annotated[float, Field(ge=0)], ...] = Field(
        (1.0,), min_length=1, description="of each box head's terms; Cascade R-CNN: 1, 0.5, 0.25"
    )

    @property
    def uses_quality(self) -> bool:
        return False

    def objection(self, coder: Coder, initial: Coder | None = None) -> str | None:
        return None

    def build(self, assigner: Assigner | None, num_classes: int) -> TwoStageCriterion:
        """`assigner` is the RPN's; the box heads' are the model's."""
        if assigner is None and self.rpn is not None:
            raise ConfigError("criterion 'two_stage' needs a rule of label assignment for its RPN: set assigner")
        return TwoStageCriterion(config=self, assigner=assigner, num_classes=num_classes)


class TwoStageCriterion(nn.Module):
    """`criterion(outputs, objects) -> Losses`: sums `rpn_class`, `rpn_box`, `stage_1_class`, `stage_1_box`, ...

    The RPN is assigned and sampled here, as a dense head of one class; the box heads were in the model's forward pass.
    Everything is float32 with autocast off, without waiting for the device.
    """

    def __init__(self, *, config: TwoStageCriterionConfig, assigner: Assigner | None, num_classes: int) -> None:
        super().__init__()
        self.config, self.assigner, self.num_classes = config, assigner, num_classes

    def forward(self, outputs: TwoStageOutputs, objects: Objects) -> Losses:
        """Raises `ConfigError` where the outputs do not fit the losses that were asked for."""
        self._check(outputs)
        refuse_weights(objects, "two_stage")
        with torch.autocast(objects.boxes.device.type, enabled=False):
            sums, assignments = {}, {}
            if self.config.rpn is not None and outputs.rpn is not None:
                sums["rpn_class"], sums["rpn_box"], assignments["rpn"] = self._rpn(
                    self.config.rpn, outputs.rpn, objects
                )
            for i, (stage, weight) in enumerate(zip(outputs.stages, self.config.stage_weights, strict=True), 1):
                for_class, for_box = self._stage(stage, objects)
                sums[f"stage_{i}_class"], sums[f"stage_{i}_box"] = weight * for_class, weight * for_box
                assignments[f"stage_{i}"] = stage.assignment
            images = objects.boxes.new_full((), float(objects.batch_size))
            return Losses({name: value * images for name, value in sums.items()}, images, assignments)

    def assign_rpn(self, config: RpnLossConfig, outputs: Outputs, objects: Objects) -> Assignment:
        """Of the anchors, those sampled; `objects` all have label 0."""
        assert self.assigner is not None
        predictions = outputs.detached() if self.assigner.uses_predictions else None
        found = self.assigner(outputs.priors, objects, predictions)

        def losses() -> Tensor:
            logits = outputs.class_logits[..., 0].float()
            return F.binary_cross_entropy_with_logits(logits, paired(found).float(), reduction="none")

        return config.sampler(found, outputs.priors, objects, losses=losses)

    def _rpn(self, config: RpnLossConfig, outputs: Outputs, objects: Objects) -> tuple[Tensor, Tensor, Assignment]:
        classification, box = config.classification, config.box
        objects = replace(objects, labels=torch.zeros_like(objects.labels))
        found = self.assign_rpn(config, outputs, objects)
        count = _count(found)
        targets = class_targets(found, objects.labels, 1)
        pairs = Pairs.gather(outputs, objects, found)
        each = pairs.box_loss(box)
        for_class = classification.weight * classification(outputs.class_logits, targets)
        return for_class / count, box.weight * (each * pairs.weight).sum() / count, found

    def _stage(self, stage: Stage, objects: Objects) -> tuple[Tensor, Tensor]:
        classification, box = self.config.classification, self.config.box
        count = _count(stage.assignment)
        targets = class_targets(stage.assignment, objects.labels, self.num_classes)
        for_class = classification.weight * classification(stage.outputs.class_logits, targets)
        return for_class / count, box.weight * box_sum(box, stage.outputs, objects, stage.assignment) / count

    def _check(self, outputs: TwoStageOutputs) -> None:
        if (outputs.rpn is None) != (self.config.rpn is None):
            raise ConfigError("model.rpn and criterion.rpn go together: set both, or both to null")
        if len(outputs.stages) != len(self.config.stage_weights):
            raise ConfigError(
                f"the model has {len(outputs.stages)} box heads, but criterion.stage_weights are"
                f" {list(self.config.stage_weights)}: give one for each"
            )
        logits = outputs.stages[0].outputs.class_logits.shape[-1]
        expected = self.num_classes + (not isinstance(self.config.classification, ClassLoss))
        if logits != expected:
            raise ConfigError(
                f"the box head gives {logits} class logits, but {self.config.classification.type!r} needs {expected}"
                f" for {self.num_classes} classes: model.head.classifier 'softmax' goes with 'cross_entropy', 'sigmoid'"
                " with the rest"
            )


def box_sum(loss: BoxLoss, outputs: Outputs, objects: Objects, assignment: Assignment) -> Tensor:
    """Scalar: the loss of all pairs, undivided and without its weight; of a box for each class, the object's own."""
    prior, weight = assignment.prior, assignment.weight
    if outputs.box_raw.dim() == 4:
        classes = outputs.box_raw.shape[2]
        raw = outputs.box_raw.flatten(0, 2)[prior * classes + objects.labels[assignment.object]]
    else:
        raw = outputs.box_raw.flatten(0, 1)[prior]
    raw = full_precision(raw)
    # Pairs of weight 0 may be padding without area, of which the target would not be finite.
    real, unit = (weight > 0)[:, None], F.pad(weight.new_zeros(len(weight), 2), (0, 2), value=1.0)
    priors, boxes = outputs.priors.boxes_of(prior).where(real, unit), objects.boxes[assignment.object].where(real, unit)
    stride = outputs.priors.stride[prior % len(outputs.priors)]
    if loss.on == "raw":
        each = loss(raw, outputs.coder.encode(priors, stride, boxes))
    else:
        each = loss(outputs.coder.decode(priors, stride, raw), boxes)
    return (each * weight).sum()


def _count(assignment: Assignment) -> Tensor:
    """Scalar float32, at least 1: priors that the losses see."""
    return (~assignment.ignored).sum().float().clamp(min=1)
