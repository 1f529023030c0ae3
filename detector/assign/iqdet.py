"""IQDet's sampling (Ma et al., "IQDet: Instance-wise Quality Distribution Sampling for Object Detection", CVPR 2021).

Legend: B images, R priors of one image, N objects of the batch, n of a part of them, L levels, M components, S points
drawn for an object, A priors of a cell, P pairs.

Each object draws a fixed number of points from the distribution that the model's encoder learnt of it, over all levels.
The rule rounds them to cells, as it has to name priors; the paper's own way, predictions interpolated at the points
themselves, has a gradient for several priors at once and so is part of criterion.type=iqdet, which asks `points`.
"""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar, Literal, NamedTuple

import torch
from pydantic import Field
from torch import Tensor

from detector.assign.around import around
from detector.assign.base import Assigner, constant
from detector.assign.cells import first_best, require_grid
from detector.assign.distribution import LEAST_SIDE, Distribution, random_numbers
from detector.assign.geometry import NOBODY, Kinds, Owners, every_prior, iou_from, kinds
from detector.structures import Assignment, Objects, Predictions, Priors


class Drawn(NamedTuple):
    """The points of each object."""

    level: Tensor  # (N, S) int64
    kind: Tensor  # (N, S) int64 which prior of a cell, counted over the shapes of all levels
    center: Tensor  # (N, S, 2) float64 x, y in pixels
    quality: Tensor  # (N, S) float32: the distribution's value there


class IqDet(Assigner):
    """Random priors where an object's predictions are good; how good they should be there is their class target.

    Points are drawn with replacement and rounded to the nearest cell of their level; a cell counts once, if its centre
    lies in the object, and its quality is the distribution's value at the centre.  Of a cell's priors the one whose
    shape suits the object best is taken, of equals the first.  A prior that several objects ask for learns the one of
    the highest quality, of equals the first.  Priors inside an object that nobody took are background where the value
    is below `negative_quality`, else ignored.

    Levels on which no cell's centre lies in the object take no part: nothing there could learn it, and nothing tells
    the encoder how good it would be.  An object without any on all levels draws from the first.

    Without an encoder (`model.encoder`, which criterion.type=iqdet trains) the distribution is one Gaussian at the
    object's centre, on the levels whose priors are of the object's size: the paper's sampling alone.

    Random numbers depend on the step's seed and the object's size alone (`distribution.random_numbers`).
    """

    type: Literal["iqdet"] = "iqdet"
    uses_predictions: ClassVar[bool] = True
    soft_quality: ClassVar[bool] = True

    samples: int = Field(12, ge=1, description="points drawn for an object; the paper's 12")
    negative_quality: float = Field(0.1, gt=0, le=1, description="inside objects, background lies below this quality")
    deviation: float = Field(0.35, gt=0, description="without an encoder: of the Gaussian, in halves of a side")
    level_deviation: float = Field(0.5, gt=0, description="without an encoder: over levels, in octaves of size")

    def assign(self, priors: Priors, objects: Objects, predictions: Predictions | None) -> Assignment:
        require_grid(priors, self.type)
        suited = best_kinds(priors, objects)
        distribution = self.distribution(priors, objects, predictions, suited)
        drawn = self._drawn(priors, objects, distribution, suited)
        table = kinds(priors.grids, priors.boxes.device)
        stride, offset = table.stride.double()[drawn.kind], table.offset.double()[drawn.kind]
        count = torch.stack([table.columns, table.rows], 1)[drawn.kind]
        cell = (drawn.center / stride[..., None] - offset[..., None] + 0.5).floor().long().clamp(min=0)
        cell = torch.minimum(cell, count - 1)
        place = place_in(objects, (cell + offset[..., None]) * stride[..., None])
        quality = distribution.of_level(drawn.level).value(place).float()
        inside = (place.abs() < 1).all(-1)
        prior = prior_at(table, drawn.kind, cell)
        owners = Owners(priors, objects, self.samples)
        owners.offer(slice(0, len(objects)), prior, quality, inside & _first_of_each(prior.where(inside, NOBODY)))
        return self._assignment(owners, self._undecided(priors, objects, distribution, suited))

    def points(self, priors: Priors, objects: Objects, predictions: Predictions) -> Drawn:
        """What the rule draws, not rounded; the same points that a call with the same arguments rounds."""
        require_grid(priors, self.type)
        suited = best_kinds(priors, objects)
        return self._drawn(priors, objects, self.distribution(priors, objects, predictions, suited), suited)

    def distribution(
        self, priors: Priors, objects: Objects, predictions: Predictions | None, suited: Tensor
    ) -> Distribution:
        """(N, L, M): what the encoder says, or where there is none, one Gaussian at the centre; on levels that count.

        Raises ValueError where the encoder's mixture does not fit the objects or the levels.
        """
        if predictions is not None and predictions.mixture is not None:
            mixture, shape = predictions.mixture, (len(objects), len(priors.grids))
            if mixture.dim() != 4 or mixture.shape[:2] != shape or mixture.shape[3] != 5:
                raise ValueError(
                    f"IqDet: predictions.mixture has shape {tuple(mixture.shape)}, expected ({shape[0]}, {shape[1]},"
                    " any, 5): the encoder must have seen these objects on these levels."
                )
            torch._assert_async(~mixture.isnan().any(), "the encoder's predictions hold NaN: the training has diverged")
            said = Distribution.unpack(mixture)
            return said._replace(share=said.share * counting_levels(priors, objects)[..., None])
        table = kinds(priors.grids, priors.boxes.device)
        octaves = _side(objects.boxes[:, 2:] - objects.boxes[:, :2])[:, None] - _side(table.size[suited])
        fit = (octaves / self.level_deviation).square() / -2
        fit = fit.where(counting_levels(priors, objects), -torch.inf)
        share = (fit - fit.amax(1, keepdim=True)).exp()[..., None].float()  # 1 on the one that suits best
        mean = share.new_zeros(*share.shape, 2)
        return Distribution(mean, torch.full_like(mean, self.deviation), share)

    def _drawn(self, priors: Priors, objects: Objects, distribution: Distribution, suited: Tensor) -> Drawn:
        level, place = distribution.draw(random_numbers(objects, self.samples))
        center = objects.centers.double()[:, None] + place * halves(objects)[:, None]
        quality = distribution.of_level(level).value(place).float()
        return Drawn(level, suited.gather(1, level), center, quality)

    def _undecided(self, priors: Priors, objects: Objects, distribution: Distribution, suited: Tensor) -> Tensor:
        """(B, R) bool: inside an object, of the shape that suits it, and not bad enough to be background."""
        found, kind, device = [], 0, priors.boxes.device
        low, high, half = objects.boxes[:, None, :2], objects.boxes[:, None, 2:], halves(objects).float()
        for level, g in enumerate(priors.grids):
            of_level = torch.zeros(objects.batch_size * g.size, dtype=torch.uint8, device=device)
            mine = Distribution(*(each[:, level].float() for each in distribution))
            shape = objects.image * g.size + suited[:, level] - kind
            cells = replace(g, shapes=g.shapes[:1])
            x, y, _, _ = every_prior((cells,), device)
            for row, cell, exists in around((cells,), len(x), low, high):
                across, down = (
                    (at[cell] - objects.centers[row, axis, None]) / half[row, axis, None]
                    for axis, at in enumerate((x, y))
                )
                good = mine.of_rows(row).value_at(across, down) >= self.negative_quality
                good &= exists & (across.abs() < 1) & (down.abs() < 1)
                prior = shape[row, None] + cell * len(g.shapes)
                of_level.scatter_reduce_(0, prior.view(-1), good.view(-1).to(torch.uint8), "amax")
            kind += len(g.shapes)
            found.append(of_level.view(objects.batch_size, -1))
        return torch.cat(found, 1) > 0

    def _assignment(self, owners: Owners, undecided: Tensor) -> Assignment:
        pairs = owners.pairs()
        if pairs is None:  # more offers than priors: one entry for each prior
            object_ = owners.index().view(-1)
            prior, valid = torch.arange(len(object_), device=object_.device), object_ >= 0
        else:
            prior, object_, valid = pairs
        weight = valid.float()
        quality = owners.score[prior].where(valid, 0.0)
        return Assignment(undecided.shape[1], prior, object_.clamp(min=0), quality, weight, undecided)


def best_kinds(priors: Priors, objects: Objects) -> Tensor:
    """(N, L) int64: on each level the shape that overlaps the object most, both at one place; of equals the first."""
    table = kinds(priors.grids, priors.boxes.device)
    size = (objects.boxes[:, 2:] - objects.boxes[:, :2])[:, None]
    iou = iou_from(torch.zeros_like(size), size, table.size)  # (N, all shapes)
    best, start = [], 0
    for g in priors.grids:
        best.append(first_best(iou[:, start : start + len(g.shapes)]) + start)
        start += len(g.shapes)
    return torch.cat(best, 1)


def counting_levels(priors: Priors, objects: Objects) -> Tensor:
    """(N, L) bool: some cell's centre lies in the object; where there is none on any level, the first level."""
    boxes, counts = objects.boxes.double(), []
    for g in priors.grids:
        count = constant((g.width, g.height), torch.int64, boxes.device)
        first = (boxes[:, :2] / g.stride - g.offset).floor().long().clamp(min=-1) + 1
        end = torch.minimum((boxes[:, 2:] / g.stride - g.offset).ceil().long(), count) - 1
        counts.append((first <= end).all(-1))
    found = torch.stack(counts, 1)
    none = ~found.any(1, keepdim=True)
    return found | (none & (torch.arange(found.shape[1], device=found.device) == 0))


def prior_at(table: Kinds, kind: Tensor, cell: Tensor) -> Tensor:
    """(...) kinds and (..., 2) column, row of cells -> (...) index into the image's priors."""
    return table.first[kind] + (cell[..., 1] * table.columns[kind] + cell[..., 0]) * table.step[kind]


def halves(objects: Objects) -> Tensor:
    """(N, 2) float64 half of width and height, at least `LEAST_SIDE`."""
    return ((objects.boxes[:, 2:] - objects.boxes[:, :2]).double() / 2).clamp(min=LEAST_SIDE)


def place_in(objects: Objects, center: Tensor) -> Tensor:
    """(N, S, 2) pixels -> places in the object, float64."""
    return (center.double() - objects.centers.double()[:, None]) / halves(objects)[:, None]


def _side(size: Tensor) -> Tensor:
    """(..., 2) width, height -> (...) log2 of their geometric mean, float64."""
    return size.double().clamp(min=LEAST_SIDE).log2().mean(-1)


def _first_of_each(prior: Tensor) -> Tensor:
    """(N, S) bool: no earlier point of the object went to this prior."""
    ordered, order = prior.sort(dim=1, stable=True)
    new = ordered != ordered.roll(1, 1)
    new[:, :1].fill_(True)
    return torch.empty_like(new).scatter_(1, order, new)
