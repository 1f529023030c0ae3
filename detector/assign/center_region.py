"""The rule of FSAF (Zhu et al., "Feature Selective Anchor-Free Module", CVPR 2019); mmdetection's "centre region".

Legend: N objects, n of a part of them, M extents along an axis, B images, R priors of one image, K classes.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from detector.assign.base import Assigner, chunks, constant, from_index
from detector.assign.per_class import count_classes, per_prior, rows_of
from detector.structures import BACKGROUND, Assignment, Objects, Predictions, Priors


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
        # Small whole numbers as float32, for which torch reduces whole rows at once.
        owner = rank.new_full((objects.batch_size, len(priors)), torch.inf)
        weight = rank.new_ones(objects.batch_size * classes, len(priors))
        row = rows_of(objects, classes)
        for part in chunks(len(objects), len(priors)):
            boxes = objects.boxes[part]
            center = self._within(priors, boxes, self.center, centered=True)
            shadow = self._within(priors, boxes, self.shadow, centered=False)
            bid = rank[part, None].where(center, torch.inf)
            owner.scatter_reduce_(0, objects.image[part, None].expand_as(bid), bid, "amin")
            weight.scatter_reduce_(0, row[part, None].expand_as(shadow), (~shadow).float(), "amin")
        mine = by_rank[owner.where(owner.isfinite(), 0).long()]
        found = from_index(torch.where(owner.isfinite(), mine, BACKGROUND))
        return replace(found, background_weight=per_prior(weight, objects.batch_size).contiguous(), modulated=False)

    def _within(self, priors: Priors, boxes: Tensor, side: float, centered: bool) -> Tensor:
        """(n, R) bool: is the prior in the object (n, 4) shrunk to `side` (its centre in the object, if `centered`)?"""
        if not priors.grids:
            low, high = priors.boxes[:, :2], priors.boxes[:, 2:]
            x, y = (_share(low[:, i], high[:, i], boxes, i, side, centered) for i in (0, 1))
            return x * y > self.min_coverage
        # How much of a prior lies in the region is a share of its width times one of its height.
        found = []
        for g in priors.grids:
            shares = []
            for axis, length in ((0, g.width), (1, g.height)):
                middle = (torch.arange(length, device=boxes.device) + g.offset) * g.stride
                half = constant(tuple(shape[axis] for shape in g.shapes), torch.float32, boxes.device) / 2
                low, high = (middle[:, None] - half).flatten(), (middle[:, None] + half).flatten()
                share = _share(low, high, boxes, axis, side, centered)
                shares.append(share.view(len(boxes), length, len(g.shapes)))
            found.append((shares[1][:, :, None] * shares[0][:, None] > self.min_coverage).flatten(1))
        return torch.cat(found, 1)


def _share(low: Tensor, high: Tensor, boxes: Tensor, axis: int, side: float, centered: bool) -> Tensor:
    """(M,) extents along an axis, (n, 4) -> (n, M): the share in the object shrunk to `side`.

    centered: 0 where the middle of the extent is not in the object.
    """
    start, stop = boxes[:, axis, None], boxes[:, axis + 2, None]
    center, reach = (start + stop) / 2, (stop - start) * (side / 2)
    shared = torch.minimum(high, center + reach) - torch.maximum(low, center - reach)
    share = shared.clamp(min=0) / (high - low).clamp(min=1e-6)
    middle = (low + high) / 2
    return share.where((middle > start) & (middle < stop), 0.0) if centered else share


def _smallest_first(objects: Objects) -> tuple[Tensor, Tensor]:
    """(N,) float32 rank of each object by area, and (N,) int64 the object of each rank; of equals the first."""
    side = objects.boxes[:, 2:].double() - objects.boxes[:, :2].double()
    by_rank = (side[:, 0] * side[:, 1]).sort(stable=True).indices
    place = torch.arange(len(by_rank), device=by_rank.device)
    rank = torch.empty_like(place).scatter_(0, by_rank, place)
    return rank.float(), by_rank
