"""RepPoints' rule for its first stage (Yang et al., "RepPoints", ICCV 2019).

Legend: N objects, n of a part of them, L levels, C candidates, R priors of one image.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from detector.assign.base import Assigner, chunks
from detector.assign.cells import level_of_size, level_strides
from detector.assign.geometry import Measure, Owners, nearest_priors
from detector.structures import Assignment, Objects, Predictions, Priors


class PointScale(Assigner):
    """An object takes the `topk` nearest priors of the one level that suits its size.

    The level is that whose stride is `scale` to 2 * `scale` times smaller than the object's side (geometric mean of
    both), or the nearest there is.  Distances are in widths and heights of the object (so a wide object looks farther
    to its sides), in float64; several priors of a cell count each, of equally near the first.  A prior that several
    objects ask for learns the nearest, of equals the first.
    """

    type: Literal["point_scale"] = "point_scale"
    topk: int = Field(1, ge=1, description="priors an object takes; the paper's 1")
    scale: float = Field(4.0, gt=0, description="least side of an object in strides of its level")

    def assign(self, priors: Priors, objects: Objects, predictions: Predictions | None) -> Assignment:
        each = sum(min(self.topk, size) for size in priors.level_sizes)
        owners = Owners(priors, objects, each, torch.float64)
        stride, level = level_strides(priors), _level_of_candidates(priors, self.topk)
        for part in chunks(len(objects), 4 * each if priors.grids else 2 * len(priors)):
            center, size = objects.centers[part], objects.boxes[part, 2:] - objects.boxes[part, :2]
            unit = size.clamp(min=1e-6)
            near = nearest_priors(priors, center, self.topk, Measure(unit=unit))  # on every level
            away = ((near.center.double() - center[:, None].double()) / unit[:, None].double()).square().sum(-1)
            own = level_of_size(size, stride, self.scale)
            owners.offer(part, near.prior, -away, level == own[:, None])
        return owners.assignment()


def _level_of_candidates(priors: Priors, k: int) -> Tensor:
    """(C,) int64: the level of each candidate that `nearest_priors` lists."""
    counts = [min(k, size) for size in priors.level_sizes]
    return torch.cat([priors.boxes.new_full((n,), i, dtype=torch.int64) for i, n in enumerate(counts)])
