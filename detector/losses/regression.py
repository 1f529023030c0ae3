"""Losses of the boxes, one number for each (prior, object) pair.

Some compare a coder's raw numbers (`on = "raw"`), some boxes in pixels (`on = "boxes"`); the criterion gives each what
it asks for.  All are finite, with finite gradients, for boxes that are identical, apart, or without area.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import ClassVar, Literal

import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from detector.boxes import EPS, pairwise_ciou, pairwise_diou, pairwise_giou, pairwise_iou
from detector.config.node import Node


class BoxLoss(Node):
    """Loss of each pair."""

    on: ClassVar[Literal["raw", "boxes"]] = "boxes"
    weight: float = Field(1.0, ge=0, description="factor of this term in the total")

    @abstractmethod
    def __call__(self, predicted: Tensor, target: Tensor) -> Tensor:
        """(P, C) raw or (P, 4) xyxy, float32, both -> (P,)."""


class L1(BoxLoss):
    """Absolute difference of the raw numbers, summed over them."""

    on: ClassVar[Literal["raw", "boxes"]] = "raw"
    type: Literal["l1"] = "l1"

    def __call__(self, predicted: Tensor, target: Tensor) -> Tensor:
        return (predicted - target).abs().sum(-1)


class SmoothL1(BoxLoss):
    """Squared below `beta`, absolute above, summed over the raw numbers (Girshick, "Fast R-CNN", ICCV 2015)."""

    on: ClassVar[Literal["raw", "boxes"]] = "raw"
    type: Literal["smooth_l1"] = "smooth_l1"
    beta: float = Field(1 / 9, gt=0, description="1 in Fast R-CNN, 1/9 in RetinaNet and in Detectron's RPN")

    def __call__(self, predicted: Tensor, target: Tensor) -> Tensor:
        return F.smooth_l1_loss(predicted, target, reduction="none", beta=self.beta).sum(-1)


class Iou(BoxLoss):
    """From the IoU alone, so without gradient for boxes that are apart (Yu et al., "UnitBox", ACM MM 2016)."""

    on: ClassVar[Literal["raw", "boxes"]] = "boxes"
    type: Literal["iou"] = "iou"
    mode: Literal["log", "linear", "square"] = Field(
        "log", description="-log IoU (UnitBox, FCOS), 1 - IoU, or 1 - IoU²"
    )

    def __call__(self, predicted: Tensor, target: Tensor) -> Tensor:
        iou = pairwise_iou(predicted, target)
        if self.mode == "log":
            return -iou.clamp(min=EPS).log()
        return 1 - (iou.square() if self.mode == "square" else iou)


class Giou(BoxLoss):
    """1 - GIoU, which also pulls boxes that are apart (Rezatofighi et al., CVPR 2019)."""

    on: ClassVar[Literal["raw", "boxes"]] = "boxes"
    type: Literal["giou"] = "giou"

    def __call__(self, predicted: Tensor, target: Tensor) -> Tensor:
        return 1 - pairwise_giou(predicted, target)


class Diou(BoxLoss):
    """1 - DIoU, which pulls the centres together (Zheng et al., AAAI 2020)."""

    on: ClassVar[Literal["raw", "boxes"]] = "boxes"
    type: Literal["diou"] = "diou"

    def __call__(self, predicted: Tensor, target: Tensor) -> Tensor:
        return 1 - pairwise_diou(predicted, target)


class Ciou(BoxLoss):
    """1 - CIoU, which also compares aspect ratios (Zheng et al., AAAI 2020 and IEEE Trans. Cybernetics 2021)."""

    on: ClassVar[Literal["raw", "boxes"]] = "boxes"
    type: Literal["ciou"] = "ciou"
    aspect_from_iou: float = Field(
        0.5,
        ge=0,
        le=1,
        description="aspect ratios count from this IoU on: 0.5 in the article of 2021, 0 in that of 2020",
    )

    def __call__(self, predicted: Tensor, target: Tensor) -> Tensor:
        return 1 - pairwise_ciou(predicted, target, self.aspect_from_iou)
