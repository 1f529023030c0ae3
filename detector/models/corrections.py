"""How heads correct what they said: scores by other scores, boxes by boxes elsewhere on the map.

Legend: B images, K classes, A priors in a cell, H, W cells of a level.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from detector.boxes import full_precision
from detector.coders import Distances

# A corrected box need not hold the prior's centre, so its distances may be negative.
SIGNED = Distances(activation="none")

CERTAIN = -1e-30  # log of the highest score, so that its logit is finite


def geometric_mean(a: Tensor, b: Tensor) -> Tensor:
    """Broadcasting logits -> float32 logit of sqrt(sigmoid(a) sigmoid(b)), exact where scores are near 0 or 1."""
    return _logit(_log_of_product(a, b) / 2)


def product(a: Tensor, b: Tensor) -> Tensor:
    """Broadcasting logits -> float32 logit of sigmoid(a) sigmoid(b), exact where scores are near 0 or 1."""
    return _logit(_log_of_product(a, b))


def _log_of_product(a: Tensor, b: Tensor) -> Tensor:
    return -(F.softplus(-full_precision(a)) + F.softplus(-full_precision(b)))


def _logit(log_score: Tensor) -> Tensor:
    log_score = log_score.clamp(max=CERTAIN)
    return log_score - (-torch.expm1(log_score)).log()


def look_up(boxes: Tensor, offsets: Tensor) -> Tensor:
    """Each side of each box read at another place of its map: (B, H W A, 4), (B, A 8, H, W) -> (B, H W A, 4) float32.

    offsets: cells x, y for the left side of a cell's first prior, for its top, and so on.  Bilinear; beyond the map's
    edge its last boxes count, and a box that came out inside out stays as it was.
    """
    batch, numbers, height, width = offsets.shape
    sides = numbers // 2
    maps = boxes.view(batch, height, width, sides).permute(0, 3, 1, 2).reshape(batch * sides, 1, height, width)
    shift = offsets.to(boxes.dtype).reshape(batch * sides, 2, height, width)
    x = torch.arange(width, device=offsets.device) + shift[:, 0]
    y = torch.arange(height, device=offsets.device)[:, None] + shift[:, 1]
    place = torch.stack([(2 * x + 1) / width - 1, (2 * y + 1) / height - 1], -1)  # as grid_sample counts
    found = F.grid_sample(maps, place, mode="bilinear", padding_mode="border", align_corners=False)
    found = found.view(batch, sides, height, width).permute(0, 2, 3, 1).reshape(boxes.shape)
    upright = (found[..., 2:] >= found[..., :2]).all(-1, keepdim=True)
    return torch.where(upright, found, boxes)
