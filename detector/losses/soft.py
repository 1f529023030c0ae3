"""Class losses made for soft targets, where the score says how good the box is; see classification.py."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from detector.losses.classification import ClassLoss, Curve


class QualityFocal(ClassLoss):
    """Quality focal loss: |p - t|^beta BCE(x, t) (Li et al., "Generalized Focal Loss", NeurIPS 2020, equation 2).

    Made for soft targets: with `criterion.class_target=iou` the class score says how good the box is.
    """

    type: Literal["quality_focal"] = "quality_focal"
    beta: float = Field(2.0, ge=0, description="how much logits near their target count less")

    @property
    def curve(self) -> Curve:
        return Curve(gamma=self.beta)


class Varifocal(ClassLoss):
    """Varifocal loss (Zhang et al., "VarifocalNet", CVPR 2021, equation 2).

    Positives count as much as their target says that they are worth, and only negatives have a focal factor.  A
    positive whose target is exactly 0 is a negative.
    """

    type: Literal["varifocal"] = "varifocal"
    alpha: float = Field(0.75, gt=0, description="weight of negatives")
    gamma: float = Field(2.0, ge=0, description="how much negatives of low score count less")

    @property
    def curve(self) -> Curve:
        return Curve(gamma=self.gamma, alpha=self.alpha, asymmetric=True)
