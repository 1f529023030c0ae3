"""What the losses see of an assignment: what the class logits should say, and the pairs that boxes learn from.

Legend: B images, R priors of an image, K classes, P pairs, C raw numbers of a box.  A *cell* is one class logit of the
batch, (image * R + prior) * K + class.  Nearly every cell is background; a batch of RetinaNet has 15 million of them
and some hundred that are not, so targets and weights of that size are never made.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from detector import boxes
from detector.boxes import full_precision
from detector.coders import Coder
from detector.losses.regression import BoxLoss
from detector.structures import Assignment, Objects, Outputs


@dataclass(frozen=True)
class ClassTargets:
    """Every cell is background, with weight `prior_weight` times `background_weight`, but for the listed ones."""

    shape: tuple[int, int, int]  # B, R, K
    cell: Tensor  # (P,) int64, each cell once; B * R * K marks an entry without meaning
    target: Tensor  # (P,) float32 in [0, 1]
    weight: Tensor  # (P,) float32
    prior_weight: Tensor  # (B, R) float32, 0 where a prior is ignored
    background_weight: Tensor | None = None  # (B, R, K) float32; None means 1

    def dense(self) -> tuple[Tensor, Tensor]:
        """Target and weight of every cell, (B, R, K) float32 each: for losses that have no use for sparsity."""
        batch, priors, classes = self.shape
        weight = self.prior_weight[..., None].expand(self.shape)
        if self.background_weight is not None:
            weight = weight * self.background_weight
        # One place more than there are cells takes the entries without meaning.
        targets = self.target.new_zeros(batch * priors * classes + 1)
        weights = torch.cat([weight.reshape(-1), targets[:1]])
        targets.scatter_(0, self.cell, self.target)
        weights.scatter_(0, self.cell, self.weight)
        return targets[:-1].view(self.shape), weights[:-1].view(self.shape)


def class_targets(
    assignment: Assignment, labels: Tensor, num_classes: int, positives_alone: bool = False
) -> ClassTargets:
    """From pairs to cells; `labels` (N,) int64 are those of the batch's objects.

    A pair of weight 0, or of an ignored prior, says nothing.  Several pairs of one cell (a prior with two objects of
    one class) are one target: their highest quality, with their highest weight.  `positives_alone`: priors without a
    pair weigh nothing.  A prior's other cells weigh as much as its heaviest object.
    """
    batch, priors = assignment.ignored.shape
    nowhere = batch * priors * num_classes
    weight = assignment.weight.float() * ~assignment.ignored.view(-1)[assignment.prior]
    cell = assignment.prior * num_classes + labels[assignment.object]
    seen = weight > 0
    cell, order = torch.where(seen, cell, nowhere).sort()
    prior_weight = (~assignment.ignored).float()
    if assignment.object_weight is not None:
        weight = weight * assignment.object_weight
        prior = torch.where(seen, assignment.prior, batch * priors)
        heaviest = prior_weight.new_ones(batch * priors + 1)
        heaviest.scatter_reduce_(0, prior, assignment.object_weight, "amax", include_self=False)
        prior_weight = prior_weight * heaviest[:-1].view_as(prior_weight)

    first = cell != cell.roll(1)
    first[:1].fill_(True)
    group = first.cumsum(0) - 1
    zeros = torch.zeros_like(weight)
    target = zeros.scatter_reduce(0, group, assignment.quality.float()[order], "amax")[group]
    highest = zeros.scatter_reduce(0, group, weight[order], "amax")[group]
    if positives_alone:
        paired = torch.zeros_like(prior_weight).view(-1).scatter_reduce(0, assignment.prior, seen.float(), "amax")
        prior_weight = prior_weight * paired.view_as(prior_weight)
    return ClassTargets(
        shape=(batch, priors, num_classes),
        cell=torch.where(first, cell, nowhere),
        target=target,
        weight=highest,
        prior_weight=prior_weight,
        background_weight=assignment.background_weight,
    )


@dataclass(frozen=True)
class Pairs:
    """P (prior, object) pairs; boxes are decoded for them alone, and only if a loss asks."""

    weight: Tensor  # (P,) float32, 0 for padding and for ignored priors
    prior_boxes: Tensor  # (P, 4) float32 xyxy
    stride: Tensor  # (P,) float32 pixels
    raw: Tensor  # (P, C) float32, with graph
    prior: Tensor  # (P,) int64 image * R + prior
    class_logits: Tensor  # (B * R, K) of all priors, without graph
    boxes: Tensor  # (P, 4) float32 xyxy of the objects
    coder: Coder

    @classmethod
    def gather(cls, outputs: Outputs, objects: Objects, assignment: Assignment) -> Pairs:
        prior = assignment.prior % len(outputs.priors)
        weight = assignment.weight * ~assignment.ignored.view(-1)[assignment.prior]
        return cls(
            weight=weight if assignment.object_weight is None else weight * assignment.object_weight,
            prior_boxes=outputs.priors.boxes[prior],
            stride=outputs.priors.stride[prior],
            raw=full_precision(outputs.box_raw.flatten(0, 1)[assignment.prior]),
            prior=assignment.prior,
            class_logits=outputs.class_logits.detach().flatten(0, 1),
            boxes=objects.boxes[assignment.object],
            coder=outputs.coder,
        )

    @cached_property
    def centers(self) -> Tensor:
        """(P, 2) x, y of the priors."""
        return boxes.centers(self.prior_boxes)

    @cached_property
    def decoded(self) -> Tensor:
        """(P, 4) float32 xyxy that the head says, with graph."""
        return self.coder.decode(self.prior_boxes, self.stride, self.raw)

    @cached_property
    def raw_target(self) -> Tensor:
        """(P, C) float32 that the head should say."""
        return self.coder.encode(self.prior_boxes, self.stride, self.boxes)

    def box_loss(self, loss: BoxLoss) -> Tensor:
        """(P,) of what the loss compares, with graph."""
        return loss(self.raw, self.raw_target) if loss.on == "raw" else loss(self.decoded, self.boxes)

    @cached_property
    def iou(self) -> Tensor:
        """(P,) in [0, 1] of what the head says now with the object, no gradient."""
        return boxes.pairwise_iou(self.decoded.detach(), self.boxes)

    @cached_property
    def best_score(self) -> Tensor:
        """(P,) in [0, 1]: the prior's highest class score now, no gradient."""
        return full_precision(self.class_logits[self.prior]).amax(-1).sigmoid()
