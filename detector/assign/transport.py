"""OTA: label assignment as optimal transport (Ge et al., "OTA", CVPR 2021, arXiv:2103.14259, section 3).

Legend: B images, R priors of one image, N objects of the batch, C priors in reach of an object, K classes.

Objects supply k units each, the background supplies the rest, every prior takes one.  The plan of least cost, smoothed
by an entropy of weight `eps`, is found by Sinkhorn-Knopp iterations (Cuturi, "Sinkhorn Distances", NeurIPS 2013).

A pair beyond the centre prior costs so much that nothing is ever shipped along it.  So those pairs are left out
instead: the plan is a sparse matrix of the priors in reach, and the background's row.  All is done in the logarithm and
in float64, in which what is summed in another order still gives the same decision.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar, Literal, NamedTuple

import torch
from pydantic import Field
from torch import Tensor

from detector.assign.base import Assigner, chunks, from_index
from detector.assign.geometry import Owners, cells_near, kinds, windows
from detector.assign.predicted import over_classes, softplus
from detector.boxes import pairwise_iou
from detector.structures import BACKGROUND, Assignment, Objects, Predictions, Priors

EPS = 1e-7  # added to an IoU whose logarithm is taken
TINY = 1e-8  # added to supply and demand, so that nobody's logarithm is infinite
# Sums over a prior's objects are taken in whole numbers of this size: exact, and so the same in any order.
UNIT = 2.0**40

Reach = tuple[Tensor, Tensor, Tensor, Tensor]


class Ota(Assigner):
    """Every prior learns the object (or the background) whose largest share of the optimal transport plan it gets.

    cost of a pair        focal loss of the logits with the object's label, summed over the classes
                          - iou_weight * log(IoU of the predicted box); only where the prior's centre is in the object
                          and within `center_radius` strides of its centre
    cost of background    focal loss of the logits without any label
    supply of an object   the sum of its `topk` highest IoUs within reach, rounded down, at least 1 (section 3.3)
    supply of background  the priors that remain

    The plan is divided by each supplier's largest flow, and a prior goes to the supplier of its largest value; of
    equals to the first object, to background last.  An object without any prior in reach gets none; the authors' code
    lets it ship beyond the centre prior, where the rounding of 1e6 + cost picks the priors.  `keep_one` gives it one.

    Priors on no grid (proposals) are compared with every object at once, which takes memory of N * R.
    """

    uses_predictions: ClassVar[bool] = True

    type: Literal["ota"] = "ota"
    center_radius: float = Field(default=2.5, gt=0)  # strides
    center_margin: float = Field(default=0.01, ge=0)  # pixels by which a prior's centre must be inside its object
    topk: int = Field(default=20, ge=1)  # IoUs that make an object's supply
    iou_weight: float = Field(default=1.5, ge=0)
    alpha: float = Field(default=0.25, gt=0, lt=1)  # of the focal loss
    gamma: float = Field(default=2.0, ge=0)
    eps: float = Field(default=0.1, gt=0)  # how much the plan is smoothed, in units of cost
    iterations: int = Field(default=50, ge=1)

    def assign(self, priors: Priors, objects: Objects, predictions: Predictions | None) -> Assignment:
        assert predictions is not None
        background = over_classes(predictions, lambda x, _: self._focal(x)[1], torch.float64)
        table = self.table(priors, objects, predictions, background)
        score, limit = self.plan(table, background, objects)
        owners = Owners(priors, objects, table.prior.shape[1], torch.float64)
        owners.offer(slice(0, len(objects)), table.prior, score, table.valid)
        held = owners.score >= limit.view(-1)
        pairs = owners.pairs()
        if pairs is None:
            return from_index(owners.index().where(held.view(owners.shape), BACKGROUND))
        ignored = torch.zeros(owners.shape, dtype=torch.bool, device=held.device)
        return pairs._replace(valid=pairs.valid & held[pairs.prior]).assignment(ignored)

    def plan(self, table: Table, background: Tensor, objects: Objects) -> tuple[Tensor, Tensor]:
        """Logarithm of the flow over the supplier's largest: of the objects (N, C), of the background (B, R).

        background: (B, R) float64 cost.  Flows along what is not valid have no meaning.
        """
        images, count = background.shape
        flat = (table.prior + objects.image[:, None] * count).view(-1)
        cost, valid = table.cost, table.valid
        some = valid.any(1)
        supply = table.supply * some
        left = count - supply.new_zeros(images).scatter_add_(0, objects.image, supply)
        supply_log = (supply.double() + TINY).log()
        left_log = (left.clamp(min=0).double() + TINY).log()
        demand_log = torch.log1p(cost.new_full((), TINY))
        v, before = torch.zeros_like(background), torch.empty_like(background)
        for _ in range(self.iterations):
            # Rows: what the suppliers must charge for all their supply to leave.  Columns: what makes priors take one.
            flow = ((v.view(-1)[flat].view_as(cost) - cost) / self.eps).masked_fill_(~valid, -torch.inf)
            u = torch.where(some, supply_log - flow.logsumexp(1), -torch.inf)
            torch.sub(v, background, out=before).div_(self.eps)
            u_left = left_log - before.logsumexp(1)
            into = (u[:, None] - cost / self.eps).masked_fill_(~valid, -torch.inf)
            v = self.eps * (demand_log - _logsumexp(u_left[:, None] - background / self.eps, flat, into))
        flow = ((v.view(-1)[flat].view_as(cost) - cost) / self.eps).masked_fill_(~valid, -torch.inf)
        rest = (v - background) / self.eps
        return flow - flow.amax(1, keepdim=True), rest - rest.amax(1, keepdim=True)

    def table(self, priors: Priors, objects: Objects, predictions: Predictions, background: Tensor) -> Table:
        """The priors in reach of each object, and what they cost; background: (B, R) float64 cost."""
        find, each = self._reach(priors)
        boxes, parts = predictions.boxes.reshape(-1, 4), []
        for part in chunks(len(objects), each):
            center, own, image = objects.centers[part], objects.boxes[part], objects.image[part, None]
            prior, x, y, exists = find(center)
            left, top, right, bottom = own[..., None].unbind(1)
            inside = torch.minimum(torch.minimum(x - left, right - x), torch.minimum(y - top, bottom - y))
            away = torch.maximum((x - center[:, :1]).abs(), (y - center[:, 1:]).abs())
            valid = exists & (inside > self.center_margin) & (away < self.center_radius * priors.stride[prior])
            iou = pairwise_iou(boxes[prior + image * len(priors)], own[:, None])
            positive, negative = self._focal(predictions.class_logits[image, prior, objects.labels[part, None]])
            cost = background[image, prior] + (positive - negative - self.iou_weight * (iou + EPS).log()).double()
            best = iou.where(valid, 0).topk(min(self.topk, iou.shape[1]), 1).values
            parts.append(Table(prior, cost, valid, best.sum(1).long().clamp(min=1)))
        return Table(*(torch.cat(column) for column in zip(*parts, strict=True)))

    def _reach(self, priors: Priors) -> tuple[Callable[[Tensor], Reach], int]:
        """From centres (n, 2) to prior, x, y and whether it exists, (n, C) each; C."""
        device, count = priors.boxes.device, len(priors)
        if not priors.grids:
            every = torch.arange(count, device=device)
            x, y = priors.centers.unbind(1)
            exists = torch.ones_like(every, dtype=torch.bool)

            def take_all(center: Tensor) -> Reach:
                n = len(center)
                return every.expand(n, -1), x.expand(n, -1), y.expand(n, -1), exists.expand(n, -1)

            return take_all, count
        table = kinds(priors.grids, device)
        radius = tuple((self.center_radius * g.stride,) * 2 for g in priors.grids for _ in g.shapes)
        window = windows(priors.grids, radius, device)
        chosen = torch.arange(len(table), device=device)

        def find(center: Tensor) -> Reach:
            prior, x, y, exists = cells_near(table, window, center, chosen.expand(len(center), -1))
            return prior.flatten(1), x.flatten(1), y.flatten(1), exists.flatten(1)

        return find, len(table) * window.cells

    def _focal(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Focal loss of each logit if its class were there, and if it were not."""
        p, not_p = logits.sigmoid(), (-logits).sigmoid()
        positive = self.alpha * not_p.pow(self.gamma) * softplus(-logits)
        return positive, (1 - self.alpha) * p.pow(self.gamma) * softplus(logits)


class Table(NamedTuple):
    """Priors in reach of each object."""

    prior: Tensor  # (N, C) int64 of its image
    cost: Tensor  # (N, C) float64
    valid: Tensor  # (N, C) bool
    supply: Tensor  # (N,) int64 units


def _logsumexp(base: Tensor, flat: Tensor, terms: Tensor) -> Tensor:
    """(B, R): logarithm of the sum of exponentials of `base` (finite) and of the `terms` that belong to each place.

    base: (B, R).  flat: (P,) places.  terms: any shape of P numbers, -inf for none.
    """
    terms = terms.view(-1)
    highest = base.flatten().scatter_reduce(0, flat, terms, "amax")
    share = ((terms - highest[flat]).exp_() * UNIT).round_().long()
    total = ((base.view(-1) - highest).exp_() * UNIT).round_().long().scatter_add_(0, flat, share)
    return (highest + (total.double() / UNIT).log_()).view_as(base)
