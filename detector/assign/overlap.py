"""Max-IoU matching as in Faster R-CNN and RetinaNet (Ren et al. 2015, Lin et al. 2017), and SSD's (Liu et al. 2016).

Legend: N objects, n of a part of them, S kinds of priors (a shape on a level), J kinds looked at, C cells of a window,
R priors of one image, B images.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import ClassVar, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from detector.assign.base import Assigner, chunks, from_index
from detector.assign.geometry import (
    Kinds,
    Owners,
    Pairs,
    cells_near,
    every_prior,
    iou_from,
    iou_xy,
    kinds,
    nearest_cell,
    windows,
)
from detector.structures import BACKGROUND, IGNORED, Assignment, Grid, Objects, Predictions, Priors

ROUNDING = 1e-5  # relative; IoUs closer than this are equal but for float32


class MaxIou(Assigner):
    """A prior learns the object that it overlaps most, if enough; of equals the first.

    IoU at least `positive_iou`: positive.  Below `negative_iou`: background.  Between: ignored.

    Then, so that few objects stay without, `low_quality`: the best prior of each object (IoU above 0 and at least
    `min_positive_iou`) is its own too.  Of priors with equal IoU the nearest counts: a small object inside several
    priors, or a long one across several, overlaps them all equally, and the peers then take whichever rounding favours.

    all    all such priors, where IoU and distance are equal
    first  one of them
    none   no such step: RCNN

    Where we differ on purpose: this step never takes a prior from an object that has it at `positive_iou` or more
    (mmdetection gives a prior of IoU .9 to another object of IoU .8 if that has no better), a prior that is the best of
    several goes to the one that overlaps it most (mmdetection: to the last), and it always goes to an object whose best
    it is (torchvision, detectron2: to the prior's own best object, whose need it was not).
    """

    takes_proposals: ClassVar[bool] = True

    type: Literal["max_iou"] = "max_iou"
    positive_iou: float = Field(default=0.5, gt=0, le=1)
    negative_iou: float = Field(default=0.4, gt=0, le=1)
    low_quality: Literal["all", "first", "none"] = "all"
    min_positive_iou: float = Field(default=0.0, ge=0, le=1)  # for low quality alone

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.negative_iou > self.positive_iou:
            raise ValueError(f"negative_iou {self.negative_iou} must not exceed positive_iou {self.positive_iou}")
        return self

    def assign(self, priors: Priors, objects: Objects, predictions: Predictions | None) -> Assignment:
        regular, best = self._on_grids(priors, objects) if priors.grids else self._on_all(priors, objects)
        between = ((regular.score >= self.negative_iou) & (regular.score < self.positive_iou)).view(regular.shape)
        good, low = regular.pairs(), None if best is None else best.pairs()
        if good is not None and (low is not None or best is None):
            pairs = good._replace(valid=good.valid & self._well(regular, good.prior))
            if low is not None:
                low = low._replace(valid=low.valid & ~self._well(regular, low.prior))
                pairs = Pairs(*(torch.cat(parts) for parts in zip(pairs, low, strict=True)))
            return pairs.assignment(between)
        index = torch.full_like(between, BACKGROUND, dtype=torch.long) if best is None else best.index()
        index = torch.where(between & (index == BACKGROUND), IGNORED, index)
        return from_index(torch.where((regular.score >= self.positive_iou).view(regular.shape), regular.index(), index))

    def _well(self, regular: Owners, prior: Tensor) -> Tensor:
        """Is the prior (P,) positive by its own best overlap?"""
        return regular.score[prior] >= self.positive_iou

    def _on_grids(self, priors: Priors, objects: Objects) -> tuple[Owners, Owners | None]:
        """Whose each prior is by IoU, complete from `negative_iou` up; and by the objects' best priors."""
        device = priors.boxes.device
        table = kinds(priors.grids, device)
        reach, most = _reach(priors.grids, self.negative_iou)
        window = windows(priors.grids, reach, device)
        each = most * window.cells
        regular = Owners(priors, objects, each)
        best = None if self.low_quality == "none" else Owners(priors, objects, 4 * len(table))
        every = every_prior(priors.grids, device) if each >= len(priors) else None  # windows would be larger
        for part in chunks(len(objects), max(min(each, len(priors)), 4 * len(table))):
            centers = objects.centers[part]
            size = objects.boxes[part, 2:] - objects.boxes[part, :2]
            cell, gap = nearest_cell(table, centers)
            highest = iou_from(gap.float(), table.size, size[:, None])  # (n, S)
            cx, cy, w, h = (t[:, None] for t in torch.cat([centers, size], 1).unbind(1))
            if every is not None:
                iou = iou_xy(every[0] - cx, every[1] - cy, every[2], every[3], w, h)
                regular.offer_rows(part, iou, iou >= self.negative_iou)
            else:
                chosen = highest.topk(most, 1).indices
                prior, x, y, valid = cells_near(table, window, centers, chosen)
                own = table.size[chosen][..., None, :]
                x, y = x - cx[..., None], y - cy[..., None]
                iou = iou_xy(x, y, own[..., 0], own[..., 1], w[..., None], h[..., None])
                regular.offer(part, prior, iou, valid & (iou >= self.negative_iou))
            if best is not None:
                prior, exists = _equally_near(table, cell, gap)
                highest, away = highest[..., None], gap.square().sum(-1)[..., None]
                best.offer(part, prior, highest, self._claims(highest.expand(prior.shape), away, exists, prior))
        return regular, best

    def _on_all(self, priors: Priors, objects: Objects) -> tuple[Owners, Owners | None]:
        """The same for priors that lie on no grid: all pairs, in parts."""
        every = torch.arange(len(priors), device=priors.boxes.device)
        regular = Owners(priors, objects, len(priors))
        best = None if self.low_quality == "none" else Owners(priors, objects, len(priors))
        for part in chunks(len(objects), len(priors)):
            boxes, centers = priors.boxes, priors.centers
            if priors.per_image:
                boxes, centers = boxes[objects.image[part]], centers[objects.image[part]]
            sizes = boxes[..., 2:] - boxes[..., :2]
            gap = centers.double() - objects.centers[part, None].double()  # (n, R, 2)
            size = objects.boxes[part, None, 2:] - objects.boxes[part, None, :2]
            iou = iou_from(gap.float(), sizes, size)
            prior = every.expand_as(iou)
            regular.offer(part, prior, iou, iou >= self.negative_iou)
            if best is not None:
                claim = self._claims(iou, gap.square().sum(-1), torch.ones_like(iou, dtype=torch.bool), prior)
                best.offer(part, prior, iou, claim)
        return regular, best

    def _claims(self, iou: Tensor, distance: Tensor, candidate: Tensor, prior: Tensor) -> Tensor:
        """Which priors are the best of each object, bool; all arguments (n, ...)."""
        dims = tuple(range(1, iou.dim()))
        best = iou.amax(dims, keepdim=True)
        claim = candidate & (iou >= best * (1 - ROUNDING)) & (best > 0) & (best >= self.min_positive_iou)
        away = distance.where(claim, math.inf)
        claim = claim & (away == away.amin(dims, keepdim=True))
        if self.low_quality == "first":
            claim = claim & (prior == prior.where(claim, torch.iinfo(torch.int64).max).amin(dims, keepdim=True))
        return claim


def _equally_near(table: Kinds, cell: Tensor, gap: Tensor) -> tuple[Tensor, Tensor]:
    """The priors of the (up to four) cells of each kind that are as near as the nearest: prior, exists (n, S, 4)."""
    # The next cell up is as near where the object's centre lies just between the two.
    stride = table.stride[:, None]
    count = torch.stack([table.columns, table.rows], 1)
    also = (-gap * 2 == stride) & (cell + 1 < count)
    column, row = ((cell + also)[..., i] for i in range(2))
    here = [(cell[..., 0], cell[..., 1]), (column, cell[..., 1]), (cell[..., 0], row), (column, row)]
    prior = torch.stack([table.first + (r * table.columns + c) * table.step for c, r in here], -1)
    x, y = also.unbind(-1)
    return prior, torch.stack([torch.ones_like(x), x, y, x & y], -1)


@lru_cache(maxsize=1024)
def _reach(grids: tuple[Grid, ...], iou: float) -> tuple[tuple[tuple[float, float], ...], int]:
    """How far (pixels x, y) a prior of each kind can be from an object that it overlaps by `iou`; how many kinds can.

    Overlap by t needs t * (side) <= (other side) both ways, and a shared part of at least t * (larger side) along each
    axis; half the sum of the sides less that is greatest for equal sides, or for an object 1 / t as long.  And areas
    within t of each other: only so many kinds fit into one span from t * area to area / t.
    """
    factor = max(1 - iou, (1 / iou - 1) / 2)
    shapes = [shape for g in grids for shape in g.shapes]
    areas = sorted(w * h for w, h in shapes)
    most = max(sum(1 for b in areas if a * 0.999 <= b <= a / iou**2 * 1.001) for a in areas)
    return tuple((w * factor, h * factor) for w, h in shapes), most
