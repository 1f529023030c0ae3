"""Losses of dense heads.  These lists are the registry of what a criterion's slots take."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from detector.losses.classification import Bce, ClassLoss, Focal
from detector.losses.quality import QualityBce, QualityLoss
from detector.losses.regression import L1, BoxLoss, Ciou, Diou, Giou, Iou, SmoothL1

AnyClassLoss = Annotated[Focal | Bce, Field(discriminator="type")]
AnyBoxLoss = Annotated[L1 | SmoothL1 | Iou | Giou | Diou | Ciou, Field(discriminator="type")]
AnyQualityLoss = QualityBce  # one kind so far

__all__ = ["AnyBoxLoss", "AnyClassLoss", "AnyQualityLoss", "BoxLoss", "ClassLoss", "QualityLoss"]
