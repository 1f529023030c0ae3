"""The one number that divides all loss terms of a criterion.

Published detectors differ here, often without saying so, and that alone spoils comparisons; so it has a name.

What a criterion gives is the batch's plain count, without a floor: counts of accumulated micro-batches are added up,
and only their sum is kept from being smaller than 1 (`Losses.parts` does that for a batch by itself).  So an image
without objects is never counted as one positive, and micro-batches give the gradient of the whole batch.

Over several processes it is the mean of their counts: data-parallel training averages gradients, so that the result is
the gradient of all sums over all counts.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from detector.structures import Assignment, Objects

Kind = Literal["positives", "quality", "objects", "ema"]


class Normalizer(nn.Module):
    """Counts what the losses of a batch are divided by.

    `positives`: pairs of positive weight.  `quality`: the sum of their class targets times weights (the same for hard
    rules; what quality-aware ones divide by).  `objects`: annotated objects.  `ema`: the moving average of `positives`
    that detectron2's RetinaNet uses, with its momentum and start; unlike there it is kept in checkpoints.  An object
    with a weight of its own counts that much, and so do its pairs.
    """

    average: Tensor

    def __init__(self, kind: Kind, momentum: float = 0.9, start: float = 100.0) -> None:
        super().__init__()
        self.kind, self.momentum = kind, momentum
        if kind == "ema":
            self.register_buffer("average", torch.tensor(float(start)))

    @torch.no_grad()
    def forward(self, assignment: Assignment, objects: Objects) -> Tensor:
        """-> scalar float32 on the assignment's device, equal in all processes.  `ema` moves in training mode only."""
        if self.kind == "objects":
            count = assignment.weight.new_full((), len(objects)) if objects.weight is None else objects.weight.sum()
        elif self.kind == "quality":
            count = (assignment.weight * assignment.quality * _counts(assignment)).sum()
        else:
            count = _counts(assignment).sum()
        count = mean_over_processes(count.float())
        if self.kind != "ema":
            return count
        if self.training:
            self.average.lerp_(count, 1 - self.momentum)
        return self.average.clone()


def _counts(assignment: Assignment) -> Tensor:
    """(P,) 1, or the object's own weight, for pairs that the losses see."""
    seen = ((assignment.weight > 0) & ~assignment.ignored.view(-1)[assignment.prior]).float()
    return seen if assignment.object_weight is None else seen * assignment.object_weight


def mean_over_processes(count: Tensor) -> Tensor:
    """`count` itself in a single process."""
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(count)
        count = count / dist.get_world_size()
    return count
