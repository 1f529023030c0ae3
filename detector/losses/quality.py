"""Loss of the quality branch: how good a prior's box is, said by the head itself and multiplied into the score.

Legend: B images, R priors of an image, P pairs.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Literal

import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from detector.boxes import EPS, edge_distances, full_precision, pairwise_iou
from detector.config.node import Node
from detector.losses.targets import Pairs
from detector.structures import Assignment


class QualityLoss(Node):
    """Loss of the quality logits."""

    weight: float = Field(1.0, ge=0, description="factor of this term in the total")

    @abstractmethod
    def targets(self, centers: Tensor, decoded: Tensor, boxes: Tensor) -> Tensor:
        """(P, 2) of the priors, (P, 4) what they predict, (P, 4) of their objects -> (P,) in [0, 1], no gradient."""

    @abstractmethod
    def __call__(self, logits: Tensor, target: Tensor, pairs: Pairs, assignment: Assignment) -> Tensor:
        """(B, R) logits, (P,) targets -> float32 scalar, undivided and without `weight`."""


class QualityBce(QualityLoss):
    """Binary cross-entropy against centerness or IoU, of priors with an object."""

    type: Literal["bce"] = "bce"
    target: Literal["centerness", "iou"] = Field(
        "centerness", description="where in the object the prior lies (FCOS, ATSS), or the IoU of its box now (PAA)"
    )

    def targets(self, centers: Tensor, decoded: Tensor, boxes: Tensor) -> Tensor:
        if self.target == "centerness":
            return centerness(centers, boxes)
        return pairwise_iou(decoded.detach(), boxes)

    def __call__(self, logits: Tensor, target: Tensor, pairs: Pairs, assignment: Assignment) -> Tensor:
        own = full_precision(logits.reshape(-1)[assignment.prior])
        return (F.binary_cross_entropy_with_logits(own, target, reduction="none") * pairs.weight).sum()


def centerness(points: Tensor, boxes: Tensor) -> Tensor:
    """(P, 2), (P, 4) xyxy -> (P,) in [0, 1]: 1 at the box's centre, 0 on its edges and outside.

    sqrt(min(l, r) / max(l, r) * min(t, b) / max(t, b)), Tian et al., "FCOS", ICCV 2019.
    """
    left, top, right, bottom = edge_distances(points, full_precision(boxes)).clamp(min=0).unbind(-1)
    across = left.minimum(right) / left.maximum(right).clamp(min=EPS)
    down = top.minimum(bottom) / top.maximum(bottom).clamp(min=EPS)
    return (across * down).sqrt()
