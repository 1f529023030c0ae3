"""YOLOF's uniform matching (Chen et al., "You Only Look One-level Feature", CVPR 2021, section 4.2).

Legend: N objects, n of a part of them, S kinds of priors (a shape on a level), C candidates, R priors of one image,
B images, P pairs.
"""

from __future__ import annotations

from functools import lru_cache
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from detector.assign.base import Assigner, chunks
from detector.assign.cells import smallest
from detector.assign.geometry import Measure, iou_from, iou_xy, kinds, nearest_on_grids
from detector.structures import Assignment, Grid, Objects, Predictions, Priors


class Uniform(Assigner):
    """Every object, large or small, takes the `topk` nearest anchors and the anchors of the `topk` nearest predictions.

    Near means the sum of the absolute differences of centre x, centre y, width and height; of equals the first prior.
    Of the anchors so found, those that overlap the object by less than `min_anchor_iou` are ignored, as are anchors
    without an object whose prediction overlaps any object by more than `ignore_prediction_iou`.

    An anchor learns all objects that it is given, and one that is found both ways is two pairs, so it counts twice in
    the box loss, as published.  Where we differ from mmdetection: there the class of an anchor with several objects
    (and whether it is ignored at all) is what was written last; here it learns all of them.
    """

    type: Literal["uniform"] = "uniform"
    uses_predictions: ClassVar[bool] = True
    shares: ClassVar[bool] = True
    topk: int = Field(4, ge=1, description="anchors, and predictions, that an object takes")
    min_anchor_iou: float = Field(0.15, ge=0, le=1, description="of anchor and object, from which a pair counts")
    ignore_prediction_iou: float = Field(0.7, ge=0, le=1, description="beyond it an anchor is no background")

    def assign(self, priors: Priors, objects: Objects, predictions: Predictions | None) -> Assignment:
        assert predictions is not None
        count, k = len(priors), min(self.topk, len(priors))
        said = _flat_cxcywh(predictions.boxes)  # 4 times (B, R)
        near = torch.zeros(objects.batch_size, count, dtype=torch.int32, device=priors.boxes.device)
        by_prediction, by_anchor = [], []
        for part in chunks(len(objects), count):
            own, image = _flat_cxcywh(objects.boxes[part, None]), objects.image[part]
            x, y, w, h = (values[image] for values in said)  # (n, R) each
            ox, oy, ow, oh = own
            cost = (x - ox).abs() + (y - oy).abs() + (w - ow).abs() + (h - oh).abs()
            by_prediction.append(smallest(cost, k))
            near.index_add_(0, image, (iou_xy(x - ox, y - oy, w, h, ow, oh) > self.ignore_prediction_iou).int())
        each = 16 * k * sum(len(g.shapes) for g in priors.grids) or 8 * count
        for part in chunks(len(objects), each):
            by_anchor.append(self._nearest_anchors(priors, objects.boxes[part], k))
        prior = torch.stack([torch.cat(by_prediction), torch.cat(by_anchor)], 1).flatten(1)  # (N, 2 k)

        anchor, middle = priors.boxes[prior], objects.centers[:, None]
        size = (objects.boxes[:, 2:] - objects.boxes[:, :2])[:, None]
        iou = iou_from(priors.centers[prior] - middle, anchor[..., 2:] - anchor[..., :2], size)
        kept = (iou >= self.min_anchor_iou).flatten()
        flat = (prior + (objects.image * count)[:, None]).flatten()
        owner = torch.arange(len(objects), device=flat.device)[:, None].expand_as(prior).flatten()
        weak = torch.zeros(near.numel(), dtype=torch.uint8, device=flat.device)
        weak.scatter_reduce_(0, flat, (~kept).to(torch.uint8), "amax")
        ignored = (weak > 0).view_as(near) | (near > 0)
        return Assignment(count, flat, owner, kept.float(), kept.float(), ignored)

    def _nearest_anchors(self, priors: Priors, boxes: Tensor, k: int) -> Tensor:
        """(n, 4) -> (n, k) priors, rising in distance."""
        center, size = (boxes[:, :2].double() + boxes[:, 2:]) / 2, boxes[:, 2:].double() - boxes[:, :2]
        if not priors.grids:
            own = (priors.boxes[:, 2:] - priors.boxes[:, :2]).double()
            gaps = _sum_of_gaps(priors.centers.double() - center[:, None], own - size[:, None])
            return gaps.sort(dim=1, stable=True).indices[:, :k]
        alone = _one_shape_each(priors.grids)
        near = nearest_on_grids(alone, center, k, Measure(power=1))  # the nearest cells of every kind
        kind, start = _kind_of_candidates(alone, k, boxes.device)
        table = kinds(priors.grids, boxes.device)
        prior = table.first[kind] + (near.prior - start) * table.step[kind]  # (n, C)
        cost = _sum_of_gaps(near.center.double() - center[:, None], near.size.double() - size[:, None])
        prior, order = prior.sort(1)
        cost = cost.gather(1, order)
        return prior.gather(1, cost.sort(dim=1, stable=True).indices[:, :k])


def _sum_of_gaps(shift: Tensor, growth: Tensor) -> Tensor:
    """(..., 2) x, y and (..., 2) width, height -> (...), always added up in this order."""
    (dx, dy), (dw, dh) = shift.abs().unbind(-1), growth.abs().unbind(-1)
    return dx + dy + dw + dh


def _flat_cxcywh(boxes: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(..., 4) xyxy -> four times (...)."""
    x1, y1, x2, y2 = boxes.unbind(-1)
    return (x1 + x2) / 2, (y1 + y2) / 2, x2 - x1, y2 - y1


@lru_cache(maxsize=1024)
def _one_shape_each(grids: tuple[Grid, ...]) -> tuple[Grid, ...]:
    """The kinds of priors as levels of their own, in the same order."""
    return tuple(Grid(g.height, g.width, g.stride, (shape,), g.offset) for g in grids for shape in g.shapes)


@lru_cache(maxsize=1024)
def _kind_of_candidates(alone: tuple[Grid, ...], k: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """(C,) kind of each candidate, and where that kind starts when each is a level of its own."""
    kind, start, total = [], [], 0
    for i, g in enumerate(alone):
        kind += [i] * min(k, g.size)
        start += [total] * min(k, g.size)
        total += g.size
    return torch.tensor(kind, device=device), torch.tensor(start, device=device)
