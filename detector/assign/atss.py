"""ATSS (Zhang et al., "Bridging the Gap Between Anchor-based and Anchor-free Detection", CVPR 2020).

Legend: N objects, C candidates of an object.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from detector.assign.base import Assigner, chunks
from detector.assign.geometry import Owners, iou_from, nearest_priors
from detector.structures import Assignment, Objects, Predictions, Priors


class Atss(Assigner):
    """The threshold of each object is the mean plus the deviation of its candidates' IoUs.

    Candidates are the `topk` priors of each level nearest to the object's centre (all, where a level has fewer; several
    priors of a cell count each; of equally near the first).  Positive are those whose IoU reaches the threshold and
    whose centre lies in the object; a prior wanted by several goes to the highest IoU, of equals to the first object.

    The mean and the (n - 1) deviation are taken in float64, so that equal IoUs have exactly their own mean and no
    deviation; a single candidate has no deviation either.  Where candidates fall into two camps, mean plus deviation
    can exceed even the best: the published rule then leaves the object without a prior for no reason of its own.
    `reachable` lowers such a threshold to the best candidate's IoU; everything else is as published.
    """

    type: Literal["atss"] = "atss"
    topk: int = Field(default=9, ge=1)  # for each level
    center_margin: float = Field(default=0.01, ge=0)  # pixels by which a prior's centre must be inside its object
    reachable: bool = True  # False: the published threshold, even where no candidate reaches it

    def assign(self, priors: Priors, objects: Objects, predictions: Predictions | None) -> Assignment:
        each = sum(min(self.topk, size) for size in priors.level_sizes)
        owners = Owners(priors, objects, each)
        for part in chunks(len(objects), 4 * each if priors.grids else len(priors)):
            own, middle = objects.boxes[part, None], objects.centers[part]
            prior, center, size = nearest_priors(priors, middle, self.topk)
            iou = iou_from(center - middle[:, None], size, own[..., 2:] - own[..., :2])
            inside = torch.cat([center - own[..., :2], own[..., 2:] - center], -1).amin(-1) > self.center_margin
            owners.offer(part, prior, iou, inside & (iou >= self.threshold(iou)))
        return owners.assignment()

    def threshold(self, iou: Tensor) -> Tensor:
        """(N, 1) float64 from the candidates' IoUs (N, C)."""
        exact = iou.double()
        mean = exact.mean(1, keepdim=True)
        deviation = ((exact - mean).square().sum(1, keepdim=True) / max(1, iou.shape[1] - 1)).sqrt()
        limit = mean + deviation
        return torch.minimum(limit, exact.amax(1, keepdim=True)) if self.reachable else limit
