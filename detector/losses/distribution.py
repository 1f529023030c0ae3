"""Loss of the distribution that a `bins` coder gives for each side of a box.

Legend: P pairs, n the coder's `reg_max`.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from detector.coders import Bins
from detector.config.node import Node


class DistributionFocal(Node):
    """Distribution focal loss (Li et al., "Generalized Focal Loss", NeurIPS 2020, equation 6).

    Cross-entropy with the two bins beside the true distance y, weighted by how near they are:

        DFL = -((y_i+1 - y) log S_i + (y - y_i) log S_i+1)        y_i <= y < y_i+1

    The mean over a box's four sides.
    """

    type: Literal["dfl"] = "dfl"
    weight: float = Field(0.25, ge=0, description="factor of this term in the total")
    margin: float = Field(0.1, ge=0, lt=1, description="strides by which true distances stay below reg_max, as in GFL")

    def __call__(self, raw: Tensor, distances: Tensor, coder: Bins) -> Tensor:
        """(P, 4 (n + 1)) logits, (P, 4) strides, float32 -> (P,)."""
        log_share = raw.unflatten(-1, (4, coder.reg_max + 1)).log_softmax(-1)
        target = distances.clamp(max=coder.reg_max - self.margin)
        bins = torch.arange(coder.reg_max + 1, device=raw.device, dtype=raw.dtype)
        nearness = F.relu(1 - (target[..., None] - bins).abs())  # 0 but for the two bins beside the target
        return -(nearness * log_share).sum(-1).mean(-1)
