"""How a head's raw numbers mean a box: `encode` says what it should have said, `decode` what it did say.

Boxes are xyxy in pixels.  All arguments broadcast over their leading dimensions, so that R priors meet a batch's raw
(B, R, C), or P gathered priors P gathered boxes.  Half-precision raw numbers are taken to float32 before anything else.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from detector.boxes import centers, from_cxcywh, full_precision, to_cxcywh
from detector.config.node import Node

# Distances in strides between which `exp` and `softplus` can be inverted and stay finite: a hundredth of a cell, and
# 8,000 pixels on the finest usual level.
LEAST_STRIDES, MOST_STRIDES = 0.01, 1000.0

LEAST_SHARE = 1e-9  # of a bin that should have none, so that its logit is finite

Positive = Annotated[float, Field(gt=0)]


class Coder(Node):
    """A box as C numbers relative to a prior.  Has no state; `Outputs` carries it to criterion and decoding."""

    @property
    def channels(self) -> int:
        """C, how many numbers the head gives for a prior."""
        return 4

    @abstractmethod
    def encode(self, prior_boxes: Tensor, stride: Tensor, boxes: Tensor) -> Tensor:
        """(..., 4), (...), (..., 4) -> (..., C) float32: the raw numbers that decode to `boxes`.

        Finite for every box; where the coder cannot express a box, the numbers of the nearest one it can.
        """

    @abstractmethod
    def decode(self, prior_boxes: Tensor, stride: Tensor, raw: Tensor) -> Tensor:
        """(..., 4), (...), (..., C) -> (..., 4) float32 xyxy, not clipped to the image; finite for finite `raw`."""


class Deltas(Coder):
    """Shift of the centre over the prior's size, and log of the size ratio (Girshick et al., "R-CNN", CVPR 2014).

    `raw = ((dx / w, dy / h, log(w' / w), log(h' / h)) - mean) / std`.  RetinaNet uses std 1 in Detectron; R-CNN and
    mmdetection's ATSS 0.1 0.1 0.2 0.2.
    """

    type: Literal["deltas"] = "deltas"
    std: tuple[Positive, Positive, Positive, Positive] = Field(
        (1.0, 1.0, 1.0, 1.0), description="dx, dy, dw, dh are divided by these, so that the raw targets are of order 1"
    )
    mean: tuple[float, float, float, float] = Field((0.0, 0.0, 0.0, 0.0), description="subtracted before the division")
    max_ratio: float = Field(1000 / 16, gt=1, description="a box is at most this many times as wide, high as its prior")
    clamp: Literal["both", "above"] = Field(
        "both", description="above: only growth is limited; both: shrinking too, to prior / max_ratio"
    )
    max_shift: float | None = Field(None, gt=0, description="pixels that a centre can leave its prior's (YOLOF: 32)")

    def encode(self, prior_boxes: Tensor, stride: Tensor, boxes: Tensor) -> Tensor:
        prior, box = to_cxcywh(full_precision(prior_boxes)), to_cxcywh(full_precision(boxes))
        shift = (box[..., :2] - prior[..., :2]) / prior[..., 2:]
        # A box without width would be log 0; a millionth of the prior is far below what `decode` gives back.
        ratio = (box[..., 2:] / prior[..., 2:]).clamp(min=1e-6).log()
        deltas = torch.cat([shift, ratio], dim=-1)
        return self._each_column(
            deltas, [((1 / std), -mean / std) for std, mean in zip(self.std, self.mean, strict=True)]
        )

    def decode(self, prior_boxes: Tensor, stride: Tensor, raw: Tensor) -> Tensor:
        prior, raw = to_cxcywh(full_precision(prior_boxes)), full_precision(raw)
        deltas = self._each_column(raw, list(zip(self.std, self.mean, strict=True)))
        shift = deltas[..., :2] * prior[..., 2:]
        if self.max_shift is not None:
            shift = shift.clamp(-self.max_shift, self.max_shift)
        limit = math.log(self.max_ratio)
        ratio = deltas[..., 2:].clamp(min=-limit if self.clamp == "both" else None, max=limit).exp()
        return from_cxcywh(torch.cat([prior[..., :2] + shift, prior[..., 2:] * ratio], dim=-1))

    def _each_column(self, values: Tensor, factor_and_term: list[tuple[float, float]]) -> Tensor:
        """Numbers instead of a tensor of four: making one on the GPU would wait for it."""
        if all(pair == (1, 0) for pair in factor_and_term):
            return values
        columns = zip(values.unbind(-1), factor_and_term, strict=True)
        return torch.stack([column * factor + term for column, (factor, term) in columns], dim=-1)


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


def edge_distances(points: Tensor, boxes: Tensor) -> Tensor:
    """(..., 2), (..., 4) xyxy -> (..., 4) pixels from a point to the left, top, right, bottom edge; < 0 outside."""
    return torch.cat([points - boxes[..., :2], boxes[..., 2:] - points], dim=-1)


AnyCoder = Annotated[Deltas | Distances | Bins, Field(discriminator="type")]
