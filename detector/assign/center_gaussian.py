"""CenterNet's rule (Zhou et al., "Objects as Points", 2019; the Gaussians are CornerNet's, Law and Deng, ECCV 2018).

Legend: N objects, n of a part of them, S kinds of priors (a shape on a level), L levels, H x W cells of a level,
A shapes of a cell, B images, R priors of one image, K classes.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from detector.assign.base import Assigner, chunks, constant
from detector.assign.cells import first_best, home_cells, level_of_size, level_strides, prior_in, require_grid
from detector.assign.geometry import iou_from, kinds
from detector.assign.per_class import count_classes, per_prior, rows_of
from detector.structures import Assignment, Grid, Objects, Predictions, Priors


class CenterGaussian(Assigner):
    """The cell of the object's centre is positive, cells around it are weaker negatives of the object's class.

    A negative weighs (1 - h) ** power, where h falls from 1 at the centre like a Gaussian, as wide as a box can be
    shifted and still overlap the object by `min_iou`.  Several Gaussians of one class: the highest counts.

    The paper has one level.  With several the object is on that whose stride is `scale` to 2 * `scale` times smaller
    than its side, or the nearest; with several shapes in a cell the most similar is positive (of equals the first).  A
    prior learns every object whose centre is in its cell, as the paper's heat map says; mmdetection's box, of which
    there is one, is then the last object's.
    """

    type: Literal["center_gaussian"] = "center_gaussian"
    shares: ClassVar[bool] = True
    min_iou: float = Field(0.3, gt=0, lt=1, description="of a box at the Gaussian's edge; 0.3 in CenterNet's code")
    power: float = Field(4.0, ge=0, description="of 1 - h: how fast negatives weaken towards a centre")
    scale: float = Field(4.0, gt=0, description="least side of an object in strides of its level; idle with one level")
    num_classes: int | None = Field(None, ge=1, description="null: as many as the head has; to see labels without one")

    @property
    def uses_predictions(self) -> bool:  # type: ignore[override]
        """Only to know how many classes there are."""
        return self.num_classes is None

    def assign(self, priors: Priors, objects: Objects, predictions: Predictions | None) -> Assignment:
        require_grid(priors, self.type)
        classes = count_classes(self.type, self.num_classes, objects, predictions)
        device = priors.boxes.device
        table = kinds(priors.grids, device)
        size = objects.boxes[:, 2:] - objects.boxes[:, :2]
        level = level_of_size(size, level_strides(priors), self.scale)
        level_of_kind = constant(tuple(i for i, g in enumerate(priors.grids) for _ in g.shapes), torch.int64, device)
        home = home_cells(table, objects.centers)
        suits = home.exists & (level_of_kind == level[:, None])
        similar = iou_from(torch.zeros_like(table.size), table.size, size[:, None]).where(suits, -1.0)
        best = first_best(similar)
        prior = prior_in(table, home.cell).gather(1, best).squeeze(1)
        weight = suits.gather(1, best).squeeze(1).float()
        return Assignment(
            num_priors=len(priors),
            prior=prior + objects.image * len(priors),
            object=torch.arange(len(objects), device=device),
            quality=weight,
            weight=weight,
            ignored=torch.zeros(objects.batch_size, len(priors), dtype=torch.bool, device=device),
            background_weight=self._background(priors, objects, size, level, home.cell, home.exists, classes),
            modulated=False,
        )

    def _background(
        self, priors: Priors, objects: Objects, size: Tensor, level: Tensor, cell: Tensor, exists: Tensor, classes: int
    ) -> Tensor:
        """(B, R, K)."""
        row = rows_of(objects, classes)
        weight = size.new_empty(objects.batch_size, len(priors), classes)
        start = kind = 0
        for i, g in enumerate(priors.grids):
            heat = size.new_zeros(objects.batch_size * classes, g.height * g.width)
            radius = gaussian_radius(size / g.stride, self.min_iou)
            here = (level == i) & exists[:, kind]
            for part in chunks(len(objects), g.height * g.width):
                own = _gaussian(g, cell[part, kind], radius[part], here[part]).flatten(1)
                heat.scatter_reduce_(0, row[part, None].expand_as(own), own, "amax")
            faded = heat.neg_().add_(1)
            # A general power takes ten times as long as two squares.
            faded = faded.square_().square_() if self.power == 4 else faded.pow_(self.power)
            level_weight = weight[:, start : start + g.size].view(objects.batch_size, -1, len(g.shapes), classes)
            level_weight.copy_(per_prior(faded, objects.batch_size)[:, :, None])
            start, kind = start + g.size, kind + len(g.shapes)
        return weight


def _gaussian(g: Grid, cell: Tensor, radius: Tensor, here: Tensor) -> Tensor:
    """(n, H, W): each object's Gaussian; 0 beyond its radius (Chebyshev), below float32's resolution, and elsewhere."""
    spread = 2 * ((2 * radius + 1) / 6).square()[:, None]
    sides = []
    for axis, length in ((1, g.height), (0, g.width)):
        away = (torch.arange(length, device=cell.device) - cell[:, axis, None]).float()
        side = (-away.square() / spread).exp()
        sides.append(side.where((away.abs() <= radius[:, None]) & here[:, None], 0.0))
    heat = sides[0][:, :, None] * sides[1][:, None]
    return heat.masked_fill_(heat < torch.finfo(heat.dtype).eps, 0.0)


def gaussian_radius(size: Tensor, min_iou: float) -> Tensor:
    """(N, 2) width, height -> (N,) whole cells, at least 0, that corners can move with the IoU still `min_iou`.

    The least of three cases: both corners move the same way, both inwards, both outwards; each the root of a quadratic
    (CornerNet's published code divides two of them by the wrong number, mmdetection by the right one).
    """
    w, h = size.unbind(-1)
    total, area = w + h, w * h
    shifted = (total - (total.square() - 4 * area * (1 - min_iou) / (1 + min_iou)).clamp(min=0).sqrt()) / 2
    inside = (total - (total.square() - 4 * area * (1 - min_iou)).clamp(min=0).sqrt()) / 4
    outside = (-total + (total.square() + 4 * area * (1 - min_iou) / min_iou).clamp(min=0).sqrt()) / 4
    return torch.minimum(torch.minimum(shifted, inside), outside).trunc().clamp(min=0)
