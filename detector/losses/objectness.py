"""Objectness as a loss of the quality branch: is there an object at all.

Legend: B images, R priors of an image, P pairs.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from detector.boxes import pairwise_iou
from detector.losses.classification import Bce
from detector.losses.quality import QualityLoss
from detector.losses.targets import Pairs, class_targets
from detector.structures import Assignment


class Objectness(QualityLoss):
    """Binary cross-entropy of every prior: is there an object (Redmon et al., CVPR 2016; Ge et al., "YOLOX", 2021).

    Priors without an object learn 0, ignored ones nothing.  Goes with `criterion.class_on=positives`.
    """

    type: Literal["objectness"] = "objectness"
    target: Literal["one", "iou"] = Field(
        "one", description="what priors with an object learn: 1 (YOLOX), or the IoU of their box now (YOLOv5)"
    )

    def targets(self, centers: Tensor, decoded: Tensor, boxes: Tensor) -> Tensor:
        if self.target == "one":
            return torch.ones_like(boxes[:, 0])
        return pairwise_iou(decoded.detach(), boxes)

    def __call__(self, logits: Tensor, target: Tensor, pairs: Pairs, assignment: Assignment) -> Tensor:
        any_object = torch.zeros_like(assignment.object)
        plain = replace(assignment, quality=target, object=any_object, background_weight=None)
        return Bce()(logits[..., None], class_targets(plain, any_object.new_zeros(1), 1))
