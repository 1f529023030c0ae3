"""One prior for each object by least total cost (DETR: Carion et al., ECCV 2020; focal cost: Zhu et al., ICLR 2021).

Legend: R priors of one image, n objects of one image.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from pydantic import Field
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from detector.assign.base import Assigner, chunks
from detector.boxes import pairwise_giou, to_cxcywh
from detector.structures import Assignment, Objects, Predictions, Priors

EPS = 1e-12  # added to a probability whose logarithm is taken


class Hungarian(Assigner):
    """Every object gets exactly one prior (all priors, where objects are more), so that the sum of costs is least.

    cost = class_cost * (focal loss of the object's class if it is there - if it is not)
           + l1_cost * |difference of cx cy w h|, as shares of the image's width and height
           - giou_cost * GIoU

    Solved exactly by `scipy.optimize.linear_sum_assignment` on the host, image by image: the only rule that waits for
    the device.  The cost of one image is held whole, n * R numbers.  The size of an image is `objects.sizes`, or where
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
        cost = self.cost(priors, objects, predictions)
        rows, columns = linear_sum_assignment(cost.cpu().numpy())
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
        present, column = objects.labels.unique(return_inverse=True)
        p = predictions.class_logits[0, :, present].sigmoid()
        there = -self.alpha * (1 - p).pow(self.gamma) * (p + EPS).log()
        absent = -(1 - self.alpha) * p.pow(self.gamma) * (1 - p + EPS).log()
        by_class = self.class_cost * (there - absent)  # (R, labels of the image)
        scale = 1 / _size(priors, objects)
        said = to_cxcywh(predictions.boxes[0] * scale)
        cost = by_class.new_empty(len(objects), len(priors))
        for part in chunks(len(objects), len(priors)):
            own = objects.boxes[part]
            apart = torch.cdist(to_cxcywh(own * scale), said, p=1)
            giou = pairwise_giou(own[:, None], predictions.boxes[0])
            torch.add(by_class.T[column[part]], apart, alpha=self.l1_cost, out=cost[part])
            cost[part].sub_(giou, alpha=self.giou_cost)
        return cost


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
