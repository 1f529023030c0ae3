"""FCOS (Tian et al., "FCOS: Fully Convolutional One-Stage Object Detection", ICCV 2019; centre sampling came later).

Legend: N objects, L levels, S kinds of priors, J kinds looked at, C cells of a window, R priors of one image.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Annotated, Literal

import torch
from pydantic import Field, field_validator
from torch import Tensor

from detector.assign.base import Assigner, chunks, constant
from detector.assign.geometry import Owners, cells_near, kinds, windows
from detector.errors import ConfigError
from detector.structures import Assignment, Grid, Objects, Predictions, Priors

LIMIT_IN_STRIDES = 8  # the paper's 64, 128, 256, 512 on strides 8, 16, 32, 64
SLACK = 0.1  # pixels; levels are looked at a little beyond their ranges, far more than float32 can be wrong


class Fcos(Assigner):
    """A prior learns the smallest object that holds its centre, near that object's centre, if its size suits the level.

    The size is the largest distance from the prior's centre to a side of the object; level i takes from limits[i - 1]
    to limits[i] pixels, both included, the first from 0, the last without end.  Of equally small objects (compared in
    float64) the first.
    """

    type: Literal["fcos"] = "fcos"
    limits: tuple[Annotated[float, Field(gt=0)], ...] | None = None  # L - 1 pixels; None: 8 strides of each level
    center_radius: float | None = Field(default=1.5, ge=0)  # strides; None or 0: everywhere in the object

    @field_validator("limits")
    @classmethod
    def _rising(cls, limits: tuple[float, ...] | None) -> tuple[float, ...] | None:
        if limits is not None and list(limits) != sorted(set(limits)):
            raise ValueError(f"must rise from level to level, got {list(limits)}")
        return limits

    def assign(self, priors: Priors, objects: Objects, predictions: Predictions | None) -> Assignment:
        self._check_levels(priors)
        return self._on_grids(priors, objects) if priors.grids else self._on_all(priors, objects)

    def _check_levels(self, priors: Priors) -> None:
        count = len(priors.level_sizes)
        if self.limits is not None and len(self.limits) != count - 1:
            raise ConfigError(
                f"assigner.limits has {len(self.limits)} numbers, but the model has {count} levels: write "
                f"{count - 1}, one between each two levels, or leave it out for {LIMIT_IN_STRIDES} strides of each."
            )

    def _on_grids(self, priors: Priors, objects: Objects) -> Assignment:
        device = priors.boxes.device
        plan = _plan(priors.grids, self.limits, self.center_radius or None)
        table, window = kinds(priors.grids, device), windows(priors.grids, plan.reach, device)
        low, high, small = (constant(x, torch.float32, device) for x in (plan.low, plan.high, plan.smallest))
        half = (objects.boxes[:, 2:] - objects.boxes[:, :2]).amax(1, keepdim=True) / 2
        suits = (half >= small - SLACK) & (half <= high + SLACK)  # (N, S)
        chosen = suits.float().topk(plan.most, 1).indices
        smallest_first = _smallest_first(objects)
        owners = Owners(priors, objects, plan.most * window.cells, torch.float64)
        for part in chunks(len(objects), plan.most * window.cells):
            pick = chosen[part]
            prior, x, y, valid = cells_near(table, window, objects.centers[part], pick)
            limits, stride = (low[pick][..., None], high[pick][..., None]), table.stride[pick][..., None]
            valid = valid & self._suits(x, y, objects.boxes[part], objects.centers[part], stride, limits)
            owners.offer(part, prior, smallest_first[part], valid)
        return owners.assignment()

    def _on_all(self, priors: Priors, objects: Objects) -> Assignment:
        limits = self._limits_of_each(priors)
        x, y = priors.centers.unbind(1)
        every = torch.arange(len(priors), device=x.device)
        smallest_first = _smallest_first(objects)
        owners = Owners(priors, objects, len(priors), torch.float64)
        for part in chunks(len(objects), len(priors)):
            valid = self._suits(x, y, objects.boxes[part], objects.centers[part], priors.stride, limits)
            owners.offer(part, every.expand_as(valid), smallest_first[part], valid)
        return owners.assignment()

    def _suits(
        self, x: Tensor, y: Tensor, boxes: Tensor, centers: Tensor, stride: Tensor, limits: tuple[Tensor, Tensor]
    ) -> Tensor:
        """May the object (n, 4) take the priors centred at x, y (n, J, C)?"""
        x1, y1, x2, y2 = (side[:, None, None] for side in boxes.unbind(1))
        left, top, right, bottom = x - x1, y - y1, x2 - x, y2 - y
        nearest = torch.minimum(torch.minimum(left, right), torch.minimum(top, bottom))
        farthest = torch.maximum(torch.maximum(left, right), torch.maximum(top, bottom))
        suits = (nearest > 0) & (farthest >= limits[0]) & (farthest <= limits[1])
        if self.center_radius:
            cx, cy = (c[:, None, None] for c in centers.unbind(1))
            suits &= torch.maximum((x - cx).abs(), (y - cy).abs()) < self.center_radius * stride
        return suits

    def _limits_of_each(self, priors: Priors) -> tuple[Tensor, Tensor]:
        """(R,) lower and upper limit of each prior, where no grid says the strides on this side of the device."""
        ends, start = [], 0
        for level, size in enumerate(priors.level_sizes):
            if self.limits is not None:
                number = self.limits[level] if level < len(self.limits) else math.inf
                ends.append(constant((number,), torch.float32, priors.boxes.device))
            else:
                ends.append(priors.stride[start : start + 1] * LIMIT_IN_STRIDES)
            start += size
        ends[-1] = constant((math.inf,), torch.float32, priors.boxes.device)
        begins = [torch.zeros_like(ends[0]), *ends[:-1]]
        sizes = priors.level_sizes
        return (
            torch.cat([x.expand(n) for x, n in zip(begins, sizes, strict=True)]),
            torch.cat([x.expand(n) for x, n in zip(ends, sizes, strict=True)]),
        )


def _smallest_first(objects: Objects) -> Tensor:
    """(N, 1, 1) float64 score: float32 cannot tell areas apart that differ by a few pixels in millions."""
    side = (objects.boxes[:, 2:].double() - objects.boxes[:, :2].double()).unbind(1)
    return -(side[0] * side[1])[:, None, None]


@dataclass(frozen=True)
class _Plan:
    """What follows from the configuration and the grids; S numbers each."""

    low: tuple[float, ...]  # pixels
    high: tuple[float, ...]
    smallest: tuple[float, ...]  # half the larger side of the smallest object that the kind can take
    reach: tuple[tuple[float, float], ...]  # pixels x, y from the object's centre
    most: int  # kinds that any one object can use


@lru_cache(maxsize=1024)
def _plan(grids: tuple[Grid, ...], limits: tuple[float, ...] | None, radius: float | None) -> _Plan:
    ends = [*(limits or [g.stride * LIMIT_IN_STRIDES for g in grids[:-1]]), math.inf]
    begins = [0.0, *ends[:-1]]
    low, high, smallest, reach = [], [], [], []
    for g, begin, end in zip(grids, begins, ends, strict=True):
        # From a point in the object the far side is at most a whole side away; from one near the centre, less.
        near = math.inf if radius is None else radius * g.stride
        for _ in g.shapes:
            low.append(begin)
            high.append(end)
            smallest.append(max(begin / 2, begin - near))
            # Both sides within `end` leave a strip around the centre half as wide as that, at most.
            reach.append((min(near, end / 2),) * 2)
    most = max(
        sum(a - SLACK <= start + SLACK and start - SLACK <= b + SLACK for a, b in zip(smallest, high, strict=True))
        for start in smallest
    )
    return _Plan(tuple(low), tuple(high), tuple(smallest), tuple(reach), most)
