"""Losses of dense heads.  These lists are the registry of what a criterion's slots take."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from detector.config.node import default_type
from detector.losses.classification import Bce, ClassLoss, Focal
from detector.losses.distribution import DistributionFocal
from detector.losses.objectness import Objectness
from detector.losses.quality import QualityBce, QualityLoss
from detector.losses.regression import L1, BoxLoss, Ciou, Diou, Giou, Iou, SmoothL1
from detector.losses.soft import QualityFocal, Varifocal

AnyClassLoss = Annotated[Focal | Bce | QualityFocal | Varifocal, Field(discriminator="type")]
AnyBoxLoss = Annotated[L1 | SmoothL1 | Iou | Giou | Diou | Ciou, Field(discriminator="type")]
AnyQualityLoss = Annotated[QualityBce | Objectness, Field(discriminator="type"), default_type("bce")]

__all__ = [
    "AnyBoxLoss",
    "AnyClassLoss",
    "AnyQualityLoss",
    "BoxLoss",
    "ClassLoss",
    "DistributionFocal",
    "QualityLoss",
]
