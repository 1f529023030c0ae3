"""Boxes as distances of their sides from the prior's centre: FCOS."""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from detector.boxes import centers, edge_distances, full_precision
from detector.coders.base import Coder

# Distances in strides between which `exp` and `softplus` can be inverted and stay finite: a hundredth of a cell, and
# 8,000 pixels on the finest usual level.
LEAST_STRIDES, MOST_STRIDES = 0.01, 1000.0


class Distances(Coder):
    """Left, top, right, bottom distance from the prior's centre in strides (Tian et al., "FCOS", ICCV 2019).

    A centre outside the box would need a negative distance: `encode` gives the nearest box that has the centre.
    """

    type: Literal["distances"] = "distances"
    activation: Literal["relu", "exp", "softplus", "none"] = Field(
        "exp",
        description="turns raw numbers into distances: exp in the FCOS paper, relu in its later improvements; none:"
        " they are distances, negative ones too, so that the box need not hold the centre",
    )

    def encode(self, prior_boxes: Tensor, stride: Tensor, boxes: Tensor) -> Tensor:
        distances = edge_distances(centers(full_precision(prior_boxes)), full_precision(boxes)) / stride[..., None]
        if self.activation == "none":
            return distances
        if self.activation == "relu":
            return distances.clamp(min=0)
        distances = distances.clamp(LEAST_STRIDES, MOST_STRIDES)
        if self.activation == "exp":
            return distances.log()
        return distances + (-torch.expm1(-distances)).log()  # log(exp(d) - 1) without overflow

    def decode(self, prior_boxes: Tensor, stride: Tensor, raw: Tensor) -> Tensor:
        raw, center = full_precision(raw), centers(full_precision(prior_boxes))
        if self.activation == "none":
            distances = raw
        elif self.activation == "relu":
            distances = F.relu(raw)
        elif self.activation == "exp":
            distances = raw.clamp(max=math.log(MOST_STRIDES)).exp()
        else:
            distances = F.softplus(raw)
        distances = distances * stride[..., None]
        return torch.cat([center - distances[..., :2], center + distances[..., 2:]], dim=-1)
