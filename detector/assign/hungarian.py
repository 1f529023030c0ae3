"""One prior for each object by least total cost (DETR: Carion et al., ECCV 2020; focal cost: Zhu et al., ICLR 2021).

Legend: R priors of one image, n objects of one image or a part of them, C priors looked at.
"""

from __future__ import annotations

from copy import copy
from typing import ClassVar, Literal

import torch
from pydantic import Field
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from detector.assign.base import Assigner, chunks
from detector.boxes import EPS as LEAST_AREA
from detector.boxes import area, to_cxcywh
from detector.structures import Assignment, Objects, Predictions, Priors

EPS = 1e-12  # added to a probability whose logarithm is taken
SCRATCH = 3  # numbers of a pair at once are so many times what other rules have; smaller parts stay in the cache


class Hungarian(Assigner):
    """Every object gets exactly one prior (all priors, where objects are more), so that the sum of costs is least.

    cost = class_cost * (focal loss of the object's class if it is there - if it is not)
           + l1_cost * |difference of cx cy w h|, as shares of the image's width and height
           - giou_cost * GIoU

    Solved exactly by `scipy.optimize.linear_sum_assignment` on the host, image by image: the only rule that waits for
    the device.  A matching of least cost needs no more than the n cheapest priors of each object, since one of them is
    always left by the others; the costs of all priors are looked at in parts, and only those of these priors are kept.
    The size of an image is `objects.sizes`, or where
    that is not given the extent of the priors' grid (of their boxes, where there is none).

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

    def assign_image(self, priors: Priors, objects: Objects, predictions: Predictions | None) -> Assignment:
        assert predictions is not None
        costs, wanted = _Costs(self, priors, objects, predictions), min(len(objects), len(priors))
        cheap = torch.zeros(len(priors), dtype=torch.bool, device=priors.boxes.device)
        for part in chunks(len(objects), SCRATCH * len(priors)):
            cheap[costs.of(part).topk(wanted, 1, largest=False, sorted=False).indices.flatten()] = True
        among = cheap.nonzero().squeeze(1)
        rows, columns = linear_sum_assignment(costs.only(among).all().cpu().numpy())
        columns = among.cpu().numpy()[columns]
        device = priors.boxes.device
        ones = torch.ones(len(rows), device=device)
        return Assignment(
            num_priors=len(priors),
            prior=torch.from_numpy(columns).to(device),
            object=torch.from_numpy(rows).to(device),
            quality=ones,
            weight=ones,
            ignored=torch.zeros(1, len(priors), dtype=torch.bool, device=device),
        )

    def cost(self, priors: Priors, objects: Objects, predictions: Predictions) -> Tensor:
        """(n, R) float32, of one image."""
        return _Costs(self, priors, objects, predictions).all()


class _Costs:
    """Of the objects of one image with all of its priors, or some; what depends on one of the two is prepared."""

    def __init__(self, rule: Hungarian, priors: Priors, objects: Objects, predictions: Predictions) -> None:
        logits, boxes = predictions.class_logits[0].T, predictions.boxes[0]
        self.rule = rule
        present, self.column = objects.labels.unique(return_inverse=True)
        self.by_class = torch.stack([self._class_cost(row) for row in logits[present]])  # (labels of the image, C)
        scale = 1 / _size(priors, objects)
        self.place, self.own_place = to_cxcywh(boxes * scale).T.contiguous(), to_cxcywh(objects.boxes * scale)
        self.sides, self.own_sides = boxes.T.contiguous(), objects.boxes
        self.area, self.own_area = area(boxes), area(objects.boxes)

    def _class_cost(self, logits: Tensor) -> Tensor:
        rule = self.rule
        p = logits.sigmoid()
        q = 1 - p
        there = q.pow(rule.gamma).mul_((p + EPS).log_()).mul_(-rule.alpha)
        absent = p.pow(rule.gamma).mul_(q.add_(EPS).log_()).mul_(rule.alpha - 1)
        return there.sub_(absent).mul_(rule.class_cost)

    def only(self, among: Tensor) -> _Costs:
        """The same for the priors `among` (C,)."""
        few = copy(self)
        few.by_class, few.place, few.sides = (x[:, among] for x in (self.by_class, self.place, self.sides))
        few.area = self.area[among]
        return few

    def all(self) -> Tensor:
        """(n, C)"""
        found = self.by_class.new_empty(len(self.column), self.by_class.shape[1])
        for part in chunks(len(found), SCRATCH * found.shape[1]):
            found[part] = self.of(part)
        return found

    def of(self, part: slice) -> Tensor:
        """(n, C) of a part of the objects."""
        cost = self.by_class[self.column[part]]
        for theirs, own in zip(self.place, self.own_place[part].T, strict=True):
            cost.add_((theirs - own[:, None]).abs_(), alpha=self.rule.l1_cost)
        x1, y1, x2, y2 = self.sides
        left, top, right, bottom = self.own_sides[part, :, None].unbind(1)
        shared = torch.minimum(x2, right).sub_(torch.maximum(x1, left)).clamp_(min=0)
        shared.mul_(torch.minimum(y2, bottom).sub_(torch.maximum(y1, top)).clamp_(min=0))
        union = (self.area + self.own_area[part, None]).sub_(shared)
        around = torch.maximum(x2, right).sub_(torch.minimum(x1, left)).clamp_(min=0)
        around.mul_(torch.maximum(y2, bottom).sub_(torch.minimum(y1, top)).clamp_(min=0))
        cost.sub_(shared.div_(union.clamp(min=LEAST_AREA)), alpha=self.rule.giou_cost)
        empty = torch.sub(around, union, out=union).div_(around.clamp_(min=LEAST_AREA))
        return cost.add_(empty, alpha=self.rule.giou_cost)


def _size(priors: Priors, objects: Objects) -> Tensor:
    """(4,) float32 width, height, width, height in pixels."""
    if objects.sizes is not None:
        size = objects.sizes[0].flip(0)
    elif priors.grids:
        grids = priors.grids
        extent = [max(g.width * g.stride for g in grids), max(g.height * g.stride for g in grids)]
        size = priors.boxes.new_tensor(extent)
    else:
        size = priors.boxes[:, 2:].amax(0).clamp(min=1)
    return size.to(priors.boxes).repeat(2)
