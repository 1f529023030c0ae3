"""What a pair of prior and object would cost, for rules that choose pairs by their loss.  No gradient.

Legend: P pairs, K classes, Q rows of the table (all priors of the batch).
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from detector.assign.predicted import softplus
from detector.boxes import pairwise_giou, pairwise_iou
from detector.config.node import Node

LOGITS_AT_ONCE = 1 << 16  # what stays in a core's cache


class PairLoss(Node):
    """Class loss plus box loss, as the criterion would have it.

    The class loss is the sum over all K classes of the prior, with the object's as the only present one.
    """

    class_weight: float = Field(1.0, ge=0)
    box_weight: float = Field(1.3, ge=0, description="1.3 in PAA's code")
    box: Literal["giou", "iou"] = Field("giou", description="1 - GIoU, or -log IoU")

    def __call__(self, class_logits: Tensor, said: Tensor, row: Tensor, labels: Tensor, boxes: Tensor) -> Tensor:
        """class_logits (Q, K), said (Q, 4) xyxy; each pair's row (P,), object's label (P,) and box (P, 4) -> (P,)."""
        classes = class_logits.shape[1]
        step = max(1, LOGITS_AT_ONCE // max(1, classes))
        if len(row) < len(class_logits):  # not every row is wanted
            absent = torch.cat([self.absent(class_logits[part]).sum(1) for part in row.split(step)])
        else:
            absent = torch.cat([self.absent(part).sum(1) for part in class_logits.split(step)])[row]
        own = class_logits.reshape(-1)[row * classes + labels]
        loss = self.class_weight * (absent + (self.present(own) - self.absent(own)))
        if self.box == "giou":
            return loss + self.box_weight * (1 - pairwise_giou(said[row], boxes))
        return loss - self.box_weight * pairwise_iou(said[row], boxes).clamp(min=1e-6).log()

    @abstractmethod
    def present(self, logits: Tensor) -> Tensor:
        """Loss of a logit whose class is there."""

    @abstractmethod
    def absent(self, logits: Tensor) -> Tensor:
        """Loss of a logit whose class is not."""


class FocalPairLoss(PairLoss):
    """With the focal loss (Lin et al., ICCV 2017)."""

    type: Literal["focal"] = "focal"
    alpha: float = Field(0.25, gt=0, lt=1, description="weight of the present class, 1 - alpha of the others")
    gamma: float = Field(2.0, ge=0, description="how much well classified examples count less")

    def present(self, logits: Tensor) -> Tensor:
        return self.alpha * (-logits).sigmoid().pow(self.gamma) * softplus(-logits)

    def absent(self, logits: Tensor) -> Tensor:
        return (1 - self.alpha) * logits.sigmoid().pow(self.gamma) * softplus(logits)


class BcePairLoss(PairLoss):
    """With binary cross-entropy."""

    type: Literal["bce"] = "bce"

    def present(self, logits: Tensor) -> Tensor:
        return softplus(-logits)

    def absent(self, logits: Tensor) -> Tensor:
        return softplus(logits)


AnyPairLoss = Annotated[FocalPairLoss | BcePairLoss, Field(discriminator="type")]
