"""The rule of FSAF (Zhu et al., "Feature Selective Anchor-Free Module", CVPR 2019); mmdetection's "centre region".

Legend: N objects, n of a part of them, C priors around an object, B images, R priors of one image, K classes.
"""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from typing import Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from detector.assign.around import around
from detector.assign.base import Assigner, from_index
from detector.assign.per_class import count_classes
from detector.assign.tiles import entries
from detector.structures import BACKGROUND, Assignment, Grid, Objects, Predictions, Priors


class CenterRegion(Assigner):
    """Priors in an object's shrunken box are positive; in a wider ring around it they are no negatives of its class.

    The object's box, shrunk about its centre to `center` of its sides, is the effective region, to `shadow` the one
    that is left alone.  A prior is in a region that covers more than `min_coverage` of the prior's area; in the
    effective one only if its centre lies in the object.  A prior in several effective regions learns the smallest
    object (areas in float64, of equals the first) and is no negative of the others' classes either.

    Where we differ from mmdetection: there a prior in the regions of two objects of one class is given to neither.
    """

    type: Literal["center_region"] = "center_region"
    center: float = Field(0.2, gt=0, le=1, description="side of the effective region, of the object's; FSAF's 0.2")
    shadow: float = Field(0.5, gt=0, le=1, description="side of the region left alone, at least `center`; FSAF's 0.5")
    min_coverage: float = Field(0.01, ge=0, lt=1, description="of a prior's area, beyond which it is in a region")
    num_classes: int | None = Field(None, ge=1, description="null: as many as the head has; to see labels without one")

    @property
    def uses_predictions(self) -> bool:  # type: ignore[override]
        """Only to know how many classes there are."""
        return self.num_classes is None

    @model_validator(mode="after")
    def _ring_around(self) -> Self:
        if self.shadow < self.center:
            raise ValueError(f"shadow {self.shadow} must be at least center {self.center}, which it surrounds")
        return self

    def assign(self, priors: Priors, objects: Objects, predictions: Predictions | None) -> Assignment:
        classes = count_classes(self.type, self.num_classes, objects, predictions)
        rank, by_rank = _smallest_first(objects)
        count = len(priors)
        # Small whole numbers as float32, for which torch reduces whole rows at once.
        owner = rank.new_full((objects.batch_size, count), torch.inf)
        # The last entry is where pairs outside a shadow go.
        weight = rank.new_ones(objects.batch_size * count * classes + 1)
        sides = [side.contiguous() for side in priors.boxes.unbind(1)]
        for rows in around(priors.grids, len(priors), *_reached(priors, objects.boxes, self.shadow)):
            mine, boxes = rows.object, objects.boxes[rows.object]
            x1, y1, x2, y2 = (entries(side, rows.prior) for side in sides)
            share = _share(x1, x2, boxes, 0, self.shadow) * _share(y1, y2, boxes, 1, self.shadow)
            shadow = rows.exists & (share > self.min_coverage)
            share = _share(x1, x2, boxes, 0, self.center) * _share(y1, y2, boxes, 1, self.center)
            held = _between(x1, x2, boxes, 0) & _between(y1, y2, boxes, 1)
            center = rows.exists & held & (share > self.min_coverage)
            flat = rows.prior + objects.image[mine, None] * count
            bid = rank[mine, None].where(center, torch.inf)
            owner.view(-1).scatter_reduce_(0, flat.view(-1), bid.view(-1), "amin")
            entry = flat.mul_(classes).add_(objects.labels[mine, None]).where(shadow, len(weight) - 1)
            weight.index_fill_(0, entry.view(-1), 0.0)
        index = by_rank[owner.where(owner.isfinite(), 0).long()]
        found = from_index(torch.where(owner.isfinite(), index, BACKGROUND))
        return replace(found, background_weight=weight[:-1].view(*owner.shape, classes), modulated=False)


def _reached(priors: Priors, boxes: Tensor, side: float) -> tuple[Tensor, Tensor]:
    """(N, L, 2) from and to where the centre of a prior can lie that touches the objects (N, 4) shrunk to `side`."""
    center, reach = (boxes[:, None, :2] + boxes[:, None, 2:]) / 2, (boxes[:, None, 2:] - boxes[:, None, :2]) * side / 2
    if priors.grids:
        reach = reach + _half_sizes(priors.grids, boxes.device)
    return center - reach, center + reach


@lru_cache(maxsize=1024)
def _half_sizes(grids: tuple[Grid, ...], device: torch.device) -> Tensor:
    """(L, 2) half of each level's widest and highest prior, pixels."""
    return torch.tensor([[max(side) / 2 for side in zip(*g.shapes, strict=True)] for g in grids], device=device)


def _share(low: Tensor, high: Tensor, boxes: Tensor, axis: int, side: float) -> Tensor:
    """(n, C) extents of priors along an axis, (n, 4) -> (n, C): the share in the object shrunk to `side`."""
    start, stop = boxes[:, axis, None], boxes[:, axis + 2, None]
    center, reach = (start + stop) / 2, (stop - start) * (side / 2)
    shared = torch.minimum(high, center + reach).sub_(torch.maximum(low, center - reach))
    return shared.clamp_(min=0).div_((high - low).clamp_(min=1e-6))


def _between(low: Tensor, high: Tensor, boxes: Tensor, axis: int) -> Tensor:
    """(n, C) bool: is the middle of the extent in the object?"""
    middle = (low + high).div_(2)
    return (middle > boxes[:, axis, None]) & (middle < boxes[:, axis + 2, None])


def _smallest_first(objects: Objects) -> tuple[Tensor, Tensor]:
    """(N,) float32 rank of each object by area, and (N,) int64 the object of each rank; of equals the first."""
    side = objects.boxes[:, 2:].double() - objects.boxes[:, :2].double()
    by_rank = (side[:, 0] * side[:, 1]).sort(stable=True).indices
    place = torch.arange(len(by_rank), device=by_rank.device)
    rank = torch.empty_like(place).scatter_(0, by_rank, place)
    return rank.float(), by_rank
