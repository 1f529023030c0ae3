"""One prior for each object by least total cost (DETR: Carion et al., ECCV 2020; focal cost: Zhu et al., ICLR 2021).

Legend: B images, R priors of one image, N objects of the batch, n of a part of them, T tiles, M priors of a tile, P
pairs, K classes.
"""

from __future__ import annotations

from typing import ClassVar, Literal, NamedTuple, Self

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field, model_validator
from scipy.sparse import csr_array
from scipy.sparse.csgraph import min_weight_full_bipartite_matching
from torch import Tensor

from detector.assign.base import Assigner, chunks
from detector.assign.tiles import SLACK, Bounds, by_side, entries, layout
from detector.boxes import EPS as LEAST_AREA
from detector.boxes import to_cxcywh
from detector.structures import Assignment, Objects, Predictions, Priors

EPS = 1e-12  # added to a probability whose logarithm is taken
SIDE = 4  # cells of a tile
FEW, MORE = 4, 4  # priors of each object that are tried first, and the factor by which more are where those fall short
LEAD = 8  # tiles of each object that are looked at first
GRAIN = 2.0**30  # parts of a unit of cost that count: whole numbers, so that the solver does not round


class Hungarian(Assigner):
    """Every object gets exactly one prior (all priors, where objects are more), so that the sum of costs is least.

    cost = class_cost * (focal loss of the object's class if it is there - if it is not)
           + l1_cost * |difference of cx cy w h|, as shares of the image's width and height
           - giou_cost * GIoU

    Exact, by a sparse solver on the host: the only rule that waits for the device.  It is given each object's cheapest
    priors, all whose cost is up to a limit, and in place of all others one of the object's own that costs the least
    above the limit.  That can only make the total less; so where no object takes its own, the matching is the best of
    all.  Objects that do are given more priors.  A tile of neighbours whose logits and boxes cannot make any of its
    priors cheap enough is not looked at.

    The size of an image is `objects.sizes`, or where that is not given the extent of the priors' grid (of their boxes,
    where there is none).

    Ties: of equally cheap matchings the one that the solver finds; the same input gives the same answer.
    """

    uses_predictions: ClassVar[bool] = True
    synchronises: ClassVar[bool] = True

    type: Literal["hungarian"] = "hungarian"
    class_cost: float = Field(default=2.0, ge=0)
    l1_cost: float = Field(default=5.0, ge=0)
    giou_cost: float = Field(default=2.0, ge=0)
    alpha: float = Field(default=0.25, gt=0, lt=1)  # of the focal loss
    gamma: float = Field(default=2.0, ge=0)

    @model_validator(mode="after")
    def _something_costs(self) -> Self:
        if not (self.class_cost or self.l1_cost or self.giou_cost):
            raise ValueError("class_cost, l1_cost and giou_cost are all 0, so any matching would do: set one above 0")
        return self

    def assign(self, priors: Priors, objects: Objects, predictions: Predictions | None) -> Assignment:
        assert predictions is not None
        device, total = priors.boxes.device, len(objects)
        search = _Search(_Costs(self, priors, objects, predictions), priors, objects, predictions)
        pairs, few, rows = _Pairs.none(total), FEW, torch.arange(total, device=device)
        while len(rows):
            pairs = pairs.replaced(rows.cpu().numpy(), search.cheapest(rows, few))
            column = pairs.matched()
            rows = torch.from_numpy(((column < 0) & np.isfinite(pairs.limit)).nonzero()[0]).to(device)
            few *= MORE
        owner = (column >= 0).nonzero()[0]
        ones = torch.ones(len(owner), device=device)
        return Assignment(
            num_priors=len(priors),
            prior=torch.from_numpy(column[owner]).to(device),
            object=torch.from_numpy(owner).to(device),
            quality=ones,
            weight=ones,
            ignored=torch.zeros(objects.batch_size, len(priors), dtype=torch.bool, device=device),
        )

    def cost(self, priors: Priors, objects: Objects, predictions: Predictions) -> Tensor:
        """(n, R) float32, of one image."""
        row = torch.arange(len(objects), device=priors.boxes.device)[:, None]
        every = torch.arange(len(priors), device=priors.boxes.device)
        return _Costs(self, priors, objects, predictions).of(row, every.expand(len(row), -1))

    def class_part(self, logits: Tensor) -> Tensor:
        """What a pair costs for the logit of its class: the higher, the less."""
        p = logits.sigmoid()
        q = 1 - p
        there = q.pow(self.gamma).mul_((p + EPS).log_()).mul_(-self.alpha)
        absent = p.pow(self.gamma).mul_(q.add_(EPS).log_()).mul_(self.alpha - 1)
        return there.sub_(absent).mul_(self.class_cost)


class _Pairs(NamedTuple):
    """Candidates, on the host."""

    object: NDArray[np.int64]  # (P,)
    prior: NDArray[np.int64]  # (P,) image * R + prior
    cost: NDArray[np.float32]  # (P,)
    limit: NDArray[np.float32]  # (N,) all pairs of the object that cost no more are listed; inf: all there are

    @classmethod
    def none(cls, total: int) -> _Pairs:
        nobody = np.zeros(0, np.int64)
        return cls(nobody, nobody, np.zeros(0, np.float32), np.full(total, -np.inf, np.float32))

    def replaced(self, rows: NDArray[np.int64], found: tuple[Tensor, Tensor, Tensor, Tensor]) -> _Pairs:
        """With new pairs for the objects `rows`."""
        row, prior, cost, limit = (x.cpu().numpy() for x in found)
        again = np.zeros(len(self.limit), bool)
        again[rows] = True
        old, limits = ~again[self.object], self.limit.copy()
        limits[rows] = limit
        return _Pairs(
            np.concatenate([self.object[old], row]),
            np.concatenate([self.prior[old], prior]),
            np.concatenate([self.cost[old], cost]),
            limits,
        )

    def matched(self) -> NDArray[np.int64]:
        """(N,) image * R + prior, or -1 for an object that is best off with what lies beyond its limit."""
        total = len(self.limit)
        used, column = np.unique(self.prior, return_inverse=True)
        beyond = np.nextafter(self.limit, np.float32(np.inf)).astype(np.float64)
        known = np.concatenate([self.cost, beyond[np.isfinite(beyond)]])
        least, most = float(known.min()), float(known.max())
        beyond[~np.isfinite(beyond)] = most + (most - least + 1) * (total + 1)  # dearer than any way round it
        # Whole numbers from 1: a sparse matrix has no place for a cost of 0.
        weight = np.rint((np.concatenate([self.cost, beyond]) - least) * GRAIN) + 1
        own = np.arange(total)
        place = (np.concatenate([self.object, own]), np.concatenate([column, len(used) + own]))
        table = csr_array((weight, place), shape=(total, len(used) + total))
        _, chosen = min_weight_full_bipartite_matching(table)
        return np.concatenate([used, np.full(total, -1)])[chosen]


class _Costs:
    """Of objects with priors (image * R + prior) of their images; the objects may broadcast."""

    def __init__(self, rule: Hungarian, priors: Priors, objects: Objects, predictions: Predictions) -> None:
        self.rule, self.objects = rule, objects
        self.classes = predictions.class_logits.shape[2]
        self.logits, self.scale = predictions.class_logits.reshape(-1), 1 / _sizes(priors, objects)
        self.said = [x.flatten() for x in by_side(predictions.boxes)]  # x1 y1 x2 y2: (B * R,) each
        # x1 y1 x2 y2, and what makes widths and heights shares of the image's: (N,) each.
        scale = self.scale[objects.image, :2]
        self.own = [x.contiguous() for x in (*objects.boxes.unbind(1), *scale.unbind(1))]

    def of(self, row: Tensor, prior: Tensor) -> Tensor:
        return self.geometry(row, prior).add_(self.of_class(row, prior))

    def of_class(self, row: Tensor, prior: Tensor) -> Tensor:
        place = (prior * self.classes).add_(entries(self.objects.labels, row))
        return self.rule.class_part(entries(self.logits, place))

    def geometry(self, row: Tensor, prior: Tensor) -> Tensor:
        x1, y1, x2, y2 = (entries(x, prior) for x in self.said)
        left, top, right, bottom, across, down = (entries(x, row) for x in self.own)
        apart = _apart(x1 - left, x2 - right).mul_(across).add_(_apart(y1 - top, y2 - bottom).mul_(down))
        shared = torch.minimum(x2, right).sub_(torch.maximum(x1, left)).clamp_(min=0)
        shared.mul_(torch.minimum(y2, bottom).sub_(torch.maximum(y1, top)).clamp_(min=0))
        around = torch.maximum(x2, right).sub_(torch.minimum(x1, left)).clamp_(min=0)
        around.mul_(torch.maximum(y2, bottom).sub_(torch.minimum(y1, top)).clamp_(min=0))
        union = x2.sub_(x1).clamp_(min=0).mul_(y2.sub_(y1).clamp_(min=0))
        union.add_(right.sub_(left).clamp_(min=0).mul_(bottom.sub_(top).clamp_(min=0))).sub_(shared)
        empty = (around - union).div_(around.clamp_(min=LEAST_AREA))
        giou = shared.div_(union.clamp_(min=LEAST_AREA)).sub_(empty)
        return apart.mul_(self.rule.l1_cost).sub_(giou, alpha=self.rule.giou_cost)


def _apart(low: Tensor, high: Tensor) -> Tensor:
    """How far two boxes' centres are apart and how much their sizes differ, of how far apart their two sides are."""
    return (low + high).abs_().mul_(0.5).add_(high.sub_(low).abs_())


class _Search:
    """Finds the cheapest priors of objects."""

    def __init__(self, costs: _Costs, priors: Priors, objects: Objects, predictions: Predictions) -> None:
        self.costs, self.rule, self.objects, self.count = costs, costs.rule, objects, len(priors)
        self.tiles = layout(priors, SIDE)
        self.bounds = Bounds(self.tiles, predictions.boxes)
        x1, y1, x2, y2 = self.bounds.sides
        self.inner = x1.amax(1), y1.amax(1), x2.amin(1), y2.amin(1)  # (B, T) each
        place = [self.tiles.rows(x) for x in by_side(to_cxcywh(predictions.boxes * costs.scale[:, None]))]
        self.least, self.most = [x.amin(1) for x in place], [x.amax(1) for x in place]  # cx cy w h: (B, T) each
        self.place = to_cxcywh(objects.boxes * costs.scale[objects.image])  # (N, 4), as shares of the image
        self.by_class = torch.cat([self._by_class(logits) for logits in predictions.class_logits])  # (B * K, T)

    def _by_class(self, logits: Tensor) -> Tensor:
        """(R, K) -> (K, T): no prior of the tile costs less for its logit."""
        highest = logits.index_select(0, self.tiles.prior[:, 0])
        for prior in self.tiles.prior.unbind(1)[1:]:
            torch.maximum(highest, logits.index_select(0, prior), out=highest)
        return self.rule.class_part(highest.T.contiguous())

    def cheapest(self, rows: Tensor, few: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Object (P,), image * R + prior (P,) and cost (P,) of all pairs of the objects `rows` that cost no more than
        the object's limit (n,): about its `few` cheapest."""
        (many, size), pairs, limits = self.tiles.prior.shape, [], []
        lead = min(max(LEAD, MORE * few // size), many)
        for part in chunks(len(rows), 2 * max(many, lead * size)):
            mine = rows[part]
            image, label = self.objects.image[mine], self.objects.labels[mine]
            geometry = self._geometry(mine)
            bound = self.by_class.index_select(0, image * self.costs.classes + label).add_(geometry)  # (n, T)
            limit = torch.full_like(bound[:, 0], torch.inf)
            if few < self.count:
                first = bound.topk(lead, 1, largest=False, sorted=False).indices
                prior = self.tiles.priors_of(first, self._first(mine)[:, None])
                cost = self.costs.of(mine[:, None, None], prior).where(entries(self.tiles.real, first), torch.inf)
                known = cost.flatten(1).topk(min(few, lead * size), 1, largest=False).values
                known = known.where(known.isfinite(), -torch.inf).amax(1)
                limit = known.where(known.isfinite(), limit)
            limits.append(limit)

            place = (bound > limit[:, None]).logical_not_().view(-1).nonzero().squeeze(1)
            row = place.div(many, rounding_mode="floor")
            tile = place - row * many
            object_ = mine.take(row)
            prior = self.tiles.priors_of(tile, self._first(object_))
            of_class = self.costs.of_class(object_[:, None], prior)
            most = limit.take(row)[:, None]
            worth = (of_class + geometry.take(place)[:, None] > most).logical_not_() & entries(self.tiles.real, tile)
            place = worth.view(-1).nonzero().squeeze(1)
            pair, prior = place.div(size, rounding_mode="floor"), prior.take(place)
            object_ = object_.take(pair)
            cost = self.costs.geometry(object_, prior).add_(of_class.take(place))
            kept = (cost <= limit.take(row.take(pair))).nonzero().squeeze(1)
            pairs.append((object_.take(kept), prior.take(kept), cost.take(kept)))
        object_, prior, cost = (torch.cat(x) for x in zip(*pairs, strict=True))
        return object_, prior, cost, torch.cat(limits)

    def _first(self, rows: Tensor) -> Tensor:
        """What the priors of the image of each of the objects `rows` are counted from."""
        return self.objects.image.take(rows) * self.count

    def _geometry(self, rows: Tensor) -> Tensor:
        """(n, T): for its box no prior of the tile costs the objects `rows` less."""
        rule, image = self.rule, self.objects.image[rows]
        left, top, right, bottom = self.objects.boxes[rows, :, None].unbind(1)
        around = torch.maximum(self.inner[2].index_select(0, image), right)
        around.sub_(torch.minimum(self.inner[0].index_select(0, image), left))
        down = torch.maximum(self.inner[3].index_select(0, image), bottom)
        around.mul_(down.sub_(torch.minimum(self.inner[1].index_select(0, image), top)))
        # The union's share of the box around both: a little more of each makes it no less, and there is no 0 / 0.
        share = self.bounds.most.index_select(0, image).add_((right - left) * (bottom - top) + LEAST_AREA)
        giou = share.div_(around.add_(LEAST_AREA)).clamp_(max=1)
        giou.add_(self.bounds.iou(image, self.objects.boxes[rows])).sub_(1)
        bound = giou.mul_(-rule.giou_cost).sub_(SLACK * (rule.class_cost + rule.l1_cost + rule.giou_cost))
        for least, most, own in zip(self.least, self.most, self.place[rows, :, None].unbind(1), strict=True):
            nearest = torch.maximum(least.index_select(0, image), own)
            nearest = torch.minimum(nearest, most.index_select(0, image), out=nearest)
            bound.add_(nearest.sub_(own).abs_(), alpha=rule.l1_cost * (1 - SLACK))
        return bound


def _sizes(priors: Priors, objects: Objects) -> Tensor:
    """(B, 4) float32 width, height, width, height in pixels."""
    if objects.sizes is not None:
        return objects.sizes.flip(1).to(priors.boxes).repeat(1, 2)
    if priors.grids:
        grids = priors.grids
        extent = [max(g.width * g.stride for g in grids), max(g.height * g.stride for g in grids)]
        size = priors.boxes.new_tensor(extent)
    else:
        size = priors.boxes[:, 2:].amax(0).clamp(min=1)
    return size.to(priors.boxes).repeat(2).expand(objects.batch_size, -1)
