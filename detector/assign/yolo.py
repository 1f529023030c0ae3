"""The rules of the YOLO family that give an object to the priors of the cell that its centre lies in.

Legend: N objects, S kinds of priors (a shape on a level), B images, R priors of one image.
"""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from detector.assign.base import Assigner
from detector.assign.cells import first_best, home_cells, prior_in, require_grid
from detector.assign.geometry import Owners, Pairs, iou_from, kinds
from detector.assign.overlap import MaxIou
from detector.structures import Assignment, Objects, Predictions, Priors


class YoloRatio(Assigner):
    """YOLOv5 (Jocher et al., 2020): every shape not too unlike the object's, in its cell and the two nearest to it.

    A prior fits if neither side is `ratio` times or more its object's, or the other way round.  Beside the cell that
    holds the object's centre, the horizontal and the vertical neighbour whose border is nearer than `reach` cells take
    part.  A prior learns all objects that it is given.
    """

    type: Literal["yolo_ratio"] = "yolo_ratio"
    shares: ClassVar[bool] = True
    ratio: float = Field(4.0, gt=1, description="of prior to object, in width and height; at or beyond it is unlike")
    reach: float = Field(0.5, ge=0, le=0.5, description="cells from a border within which the cell beyond takes part")

    def assign(self, priors: Priors, objects: Objects, predictions: Predictions | None) -> Assignment:
        require_grid(priors, self.type)
        table = kinds(priors.grids, priors.boxes.device)
        home = home_cells(table, objects.centers)
        proportion = table.size / (objects.boxes[:, 2:] - objects.boxes[:, :2])[:, None]  # (N, S, 2)
        fits = home.exists & (torch.maximum(proportion, 1 / proportion).amax(-1) < self.ratio)

        step = (home.place > 0.5 - self.reach).long() - (home.place < self.reach - 0.5).long()
        count = torch.stack([table.columns, table.rows], 1)
        beside = home.cell + step
        there = (step != 0) & (beside >= 0) & (beside < count)
        beside = torch.minimum(beside.clamp(min=0), count - 1)
        column, row = home.cell.unbind(-1)
        cells = (home.cell, torch.stack([beside[..., 0], row], -1), torch.stack([column, beside[..., 1]], -1))
        prior = torch.stack([prior_in(table, cell) for cell in cells], -1)  # (N, S, 3)
        valid = fits[..., None] & torch.stack([torch.ones_like(fits), there[..., 0], there[..., 1]], -1)

        owner = torch.arange(len(objects), device=prior.device)[:, None, None].expand_as(prior)
        flat = prior + (objects.image * len(priors))[:, None, None]
        none = torch.zeros(objects.batch_size, len(priors), dtype=torch.bool, device=prior.device)
        return Pairs(flat.flatten(), owner.flatten(), valid.flatten()).assignment(none)


class YoloBest(Assigner):
    """YOLOv3 (Redmon and Farhadi, 2018): each object takes the best of all shapes, in the cell that holds its centre.

    Priors that overlap any object by more than `ignore_iou` and are not taken are ignored, the rest is background.
    `positive_iou` adds the other priors of the object's cells (one cell a level) that overlap it by more; the paper has
    no such step, mmdetection takes 0.5.  A prior that several objects ask for goes to one whose best it is, then to the
    highest IoU, then to the first.  Of equally good shapes the first is the best.

    Where we differ from mmdetection: there an object may also take a prior in the cell of another object, and what two
    objects ask for goes to the last.
    """

    type: Literal["yolo_best"] = "yolo_best"
    ignore_iou: float = Field(0.5, gt=0, lt=1, description="priors that overlap more are not background")
    positive_iou: float | None = Field(None, gt=0, lt=1, description="further priors of the object's cells; null: none")
    compare: Literal["shape", "box"] = Field(
        "shape", description="what makes a prior the best: the IoU of the shapes alone (paper), or of the boxes"
    )

    def assign(self, priors: Priors, objects: Objects, predictions: Predictions | None) -> Assignment:
        require_grid(priors, self.type)
        table = kinds(priors.grids, priors.boxes.device)
        home = home_cells(table, objects.centers)
        size = (objects.boxes[:, 2:] - objects.boxes[:, :2])[:, None]
        gap = (home.place * table.stride.double()[:, None]).float()
        iou = iou_from(gap, table.size, size)  # (N, S)
        ranking = iou if self.compare == "box" else iou_from(torch.zeros_like(gap), table.size, size)
        ranking = ranking.where(home.exists & (ranking > 0), -1.0)
        best = torch.zeros_like(home.exists).scatter_(1, first_best(ranking), True) & (ranking > 0)
        claims = best if self.positive_iou is None else best | (home.exists & (iou > self.positive_iou))

        owners = Owners(priors, objects, len(table))
        owners.offer(slice(0, len(objects)), prior_in(table, home.cell), iou + 2 * best, claims)
        return replace(owners.assignment(), ignored=self._overlapping(priors, objects))

    def _overlapping(self, priors: Priors, objects: Objects) -> Tensor:
        """(B, R) bool: overlaps any object by more than `ignore_iou`."""
        above = float(np.nextafter(np.float32(self.ignore_iou), np.float32(1)))  # the next that a float32 can be
        found = MaxIou(positive_iou=above, negative_iou=above, low_quality="none").assign(priors, objects, None)
        flag = torch.zeros(found.ignored.numel(), dtype=torch.uint8, device=found.ignored.device)
        flag.scatter_reduce_(0, found.prior, (found.weight > 0).to(torch.uint8), "amax")
        return (flag > 0).view_as(found.ignored)
