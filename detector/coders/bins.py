"""Boxes as distributions of the distances of their sides: GFL."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from detector.boxes import centers, edge_distances, full_precision
from detector.coders.base import Coder

LEAST_SHARE = 1e-9  # of a bin that should have none, so that its logit is finite


class Bins(Coder):
    """Each distance in strides as a distribution over 0, 1, ... `reg_max`, of which the mean counts.

    The general distribution of Li et al., "Generalized Focal Loss" (NeurIPS 2020), equations 4 and 5.  Raw numbers are
    logits, ordered left, top, right, bottom, then bin.  `encode` puts all the mass on the two bins beside the distance.
    """

    type: Literal["bins"] = "bins"
    reg_max: int = Field(16, ge=1, description="largest distance in strides; the paper's n")

    @property
    def channels(self) -> int:
        return 4 * (self.reg_max + 1)

    def encode(self, prior_boxes: Tensor, stride: Tensor, boxes: Tensor) -> Tensor:
        distances = self.distances(prior_boxes, stride, boxes)
        bins = torch.arange(self.reg_max + 1, device=distances.device, dtype=distances.dtype)
        share = (1 - (distances[..., None] - bins).abs()).clamp(min=LEAST_SHARE)
        return share.log().flatten(-2)

    def decode(self, prior_boxes: Tensor, stride: Tensor, raw: Tensor) -> Tensor:
        logits = full_precision(raw).unflatten(-1, (4, self.reg_max + 1))
        bins = torch.arange(self.reg_max + 1, device=logits.device, dtype=logits.dtype)
        distances = (logits.softmax(-1) @ bins) * stride[..., None]
        center = centers(full_precision(prior_boxes))
        return torch.cat([center - distances[..., :2], center + distances[..., 2:]], dim=-1)

    def distances(self, prior_boxes: Tensor, stride: Tensor, boxes: Tensor) -> Tensor:
        """(..., 4), (...), (..., 4) -> (..., 4) strides in [0, reg_max] from the prior's centre to the box's sides."""
        distances = edge_distances(centers(full_precision(prior_boxes)), full_precision(boxes)) / stride[..., None]
        return distances.clamp(0, self.reg_max)
