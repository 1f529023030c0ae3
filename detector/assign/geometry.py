"""Candidates found by arithmetic on the grids of the priors instead of search over all of them.

Legend: N objects, L levels, S kinds of priors (a shape on a level), J kinds looked at for each object, M nearest cells,
C cells or candidates, P pairs, B images, R priors of one image.

All priors of a cell share a centre, (column + offset) * stride; so whatever is near an object lies in a window of cells
whose size depends on the configuration alone.  Everything here has a shape known without asking the device.  Tables
are made once for each shape of the feature maps and kept, for sending them to the device would wait for it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from detector.assign.base import constant, from_index
from detector.structures import BACKGROUND, Assignment, Grid, Objects, Priors

NOBODY = torch.iinfo(torch.int64).max
SLACK = 0.01  # cells by which windows are larger than needed, far more than float32 can be wrong


@dataclass(frozen=True)
class Kinds:
    """Every shape of every level, as tables on the device."""

    stride: Tensor  # (S,) float32
    offset: Tensor  # (S,) float32
    columns: Tensor  # (S,) int64 cells in a row of the level
    rows: Tensor  # (S,) int64
    first: Tensor  # (S,) int64 index of the kind's first prior
    step: Tensor  # (S,) int64 from one cell's prior of this kind to the next cell's
    size: Tensor  # (S, 2) float32 width, height in pixels

    def __len__(self) -> int:
        return len(self.stride)


@lru_cache(maxsize=1024)
def kinds(grids: tuple[Grid, ...], device: torch.device) -> Kinds:
    """In order of level, then shape."""
    first: list[int] = []
    start = 0
    for g in grids:
        first += range(start, start + len(g.shapes))
        start += g.size
    each = [g for g in grids for _ in g.shapes]

    def real(x: object) -> Tensor:
        return torch.tensor(x, dtype=torch.float32, device=device)

    def whole(x: list[int]) -> Tensor:
        return torch.tensor(x, dtype=torch.int64, device=device)

    return Kinds(
        stride=real([g.stride for g in each]),
        offset=real([g.offset for g in each]),
        columns=whole([g.width for g in each]),
        rows=whole([g.height for g in each]),
        first=whole(first),
        step=whole([len(g.shapes) for g in each]),
        size=real([shape for g in grids for shape in g.shapes]),
    )


@dataclass(frozen=True)
class Windows:
    """How many cells around an object's centre are looked at, for each kind."""

    reach: Tensor  # (S, 2) float32 cells x, y
    width: Tensor  # (S,) int64 columns of the window, at most the level's
    height: Tensor  # (S,) int64
    cells: int  # C: most cells of any window


@lru_cache(maxsize=1024)
def windows(grids: tuple[Grid, ...], reach: tuple[tuple[float, float], ...], device: torch.device) -> Windows:
    """reach: for each kind, how many pixels a prior's centre may be from the object's, in x and y (inf: any)."""
    per_kind = [g for g in grids for _ in g.shapes]
    cells, width, height = [], [], []
    for g, (x, y) in zip(per_kind, reach, strict=True):
        rx, ry = (min(r / g.stride, g.width + g.height) + SLACK for r in (x, y))
        cells.append((rx, ry))
        width.append(min(math.floor(2 * rx) + 1, g.width))
        height.append(min(math.floor(2 * ry) + 1, g.height))
    return Windows(
        reach=torch.tensor(cells, dtype=torch.float32, device=device),
        width=torch.tensor(width, device=device),
        height=torch.tensor(height, device=device),
        cells=max(w * h for w, h in zip(width, height, strict=True)),
    )


def cells_near(table: Kinds, window: Windows, centers: Tensor, chosen: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The priors of some kinds in the window around each object: prior (N, J, C), x and y (N, J, C), valid (N, J, C).

    centers: (N, 2).  chosen: (N, J) which kinds.  A window that sticks out of the grid is moved inside: it loses
    nothing, as it only leaves out cells that do not exist.
    """
    stride, offset, columns, rows = (t[chosen] for t in (table.stride, table.offset, table.columns, table.rows))
    width, height, reach = window.width[chosen], window.height[chosen], window.reach[chosen]
    lowest = (centers[:, None] / stride[..., None] - offset[..., None] - reach).ceil().long()
    left = torch.minimum(lowest[..., 0].clamp(min=0), columns - width)[..., None]
    top = torch.minimum(lowest[..., 1].clamp(min=0), rows - height)[..., None]
    cell = torch.arange(window.cells, device=centers.device)
    down = cell.div(width[..., None], rounding_mode="floor")
    valid = down < height[..., None]
    row = top + down.where(valid, 0)
    column = left + cell - down * width[..., None]
    prior = table.first[chosen][..., None] + (row * columns[..., None] + column) * table.step[chosen][..., None]
    x = (column + offset[..., None]) * stride[..., None]
    y = (row + offset[..., None]) * stride[..., None]
    return prior, x, y, valid


def nearest_cell(table: Kinds, centers: Tensor) -> tuple[Tensor, Tensor]:
    """Each object's nearest cell of every kind, x and y apart: position (N, S, 2) int64, distance (N, S, 2) pixels.

    Of two equally near the lower one.  Distances are float64, in which the sums of float32 coordinates are exact.
    """
    stride, offset = table.stride.double()[:, None], table.offset.double()[:, None]
    count = torch.stack([table.columns, table.rows], 1)
    place = centers.double()[:, None] / stride - offset
    cell = torch.minimum((place - 0.5).ceil().long().clamp(min=0), count - 1)
    return cell, (cell + offset) * stride - centers.double()[:, None]


@dataclass(frozen=True)
class _Levels:
    stride: Tensor  # (L, 1) float64
    offset: Tensor  # (L, 1) float64
    count: Tensor  # (L, 2) int64 columns, rows
    ranks: Tensor  # (2, H) int64: rank of column and row of each cell that may be among the nearest
    level: Tensor  # (C,) int64 of each candidate
    rank: Tensor  # (C,) int64: of the candidate's cell on its level, by distance
    first: Tensor  # (C,) int64
    shapes: Tensor  # (C,) int64 priors in a cell
    size: Tensor  # (C, 2) float32 of the candidate
    most: int  # M


@lru_cache(maxsize=1024)
def _levels(grids: tuple[Grid, ...], k: int, device: torch.device) -> _Levels:
    most = max(min(-(-k // len(g.shapes)), g.height * g.width) for g in grids)
    # In rank of nearness among columns and among rows, the cell (a, b) is no nearer than the a * b cells up to it.
    ranks = [(a, b) for a in range(most) for b in range(most) if (a + 1) * (b + 1) <= most]
    slots, sizes, start = [], [], 0
    for level, g in enumerate(grids):
        shapes = len(g.shapes)
        slots += [(level, n // shapes, start + n % shapes, shapes) for n in range(min(k, g.size))]
        sizes += [g.shapes[n % shapes] for n in range(min(k, g.size))]
        start += g.size

    def whole(x: object) -> Tensor:
        return torch.tensor(x, dtype=torch.int64, device=device)

    level_of, rank, first, per_cell = (whole(x) for x in zip(*slots, strict=True))
    return _Levels(
        stride=torch.tensor([[g.stride] for g in grids], dtype=torch.float64, device=device),
        offset=torch.tensor([[g.offset] for g in grids], dtype=torch.float64, device=device),
        count=whole([(g.width, g.height) for g in grids]),
        ranks=whole(ranks).T.contiguous(),
        level=level_of,
        rank=rank,
        first=first,
        shapes=per_cell,
        size=torch.tensor(sizes, dtype=torch.float32, device=device),
        most=most,
    )


class Candidates(NamedTuple):
    """Priors to look at for each object, with what they are."""

    prior: Tensor  # (N, C) int64
    center: Tensor  # (N, C, 2) float32
    size: Tensor  # (N, C, 2) float32 width, height


class Measure(NamedTuple):
    """How far a prior is: what its distances in x and y, in the object's own units, are raised to and added up."""

    power: int = 2
    unit: Tensor | None = None  # (N, 2) pixels; None: 1

    def __call__(self, gap: Tensor, axis: int) -> Tensor:
        """gap: (N, ..., 2, ...) float64 with x and y along `axis`."""
        if self.unit is not None:
            shape = [1] * gap.dim()
            shape[0], shape[axis] = self.unit.shape
            gap = gap / self.unit.double().view(shape)
        return gap.abs() if self.power == 1 else gap * gap


def nearest_priors(priors: Priors, centers: Tensor, k: int, measure: Measure | None = None) -> Candidates:
    """The `k` priors (all, if fewer) nearest to each object on every level; of equally near the first.

    C sums min(k, size) over the levels.  centers: (N, 2).  Distances are compared in float64, exactly.
    """
    measure = measure or Measure()
    if priors.grids:
        return nearest_on_grids(priors.grids, centers, k, measure)
    return _nearest_of_all(priors, centers, k, measure)


def nearest_on_grids(grids: tuple[Grid, ...], centers: Tensor, k: int, measure: Measure) -> Candidates:
    table = _levels(grids, k, centers.device)
    place = centers.double()[:, None] / table.stride - table.offset  # (N, L, 2) in cells
    order = _outwards(place, table.count, table.most)  # (N, L, 2, M)
    gap = (order + table.offset[..., None]) * table.stride[..., None] - centers.double()[:, None, :, None]
    exists = torch.arange(table.most, device=centers.device) < table.count[..., None]  # (L, 2, M)
    gap = measure(gap, 2).where(exists, torch.inf)
    a, b = table.ranks[0], table.ranks[1]
    distance = gap[:, :, 0, a] + gap[:, :, 1, b]  # (N, L, H)
    cell = order[:, :, 1, b] * table.count[:, None, 0] + order[:, :, 0, a]
    cell, by_index = cell.where(distance.isfinite(), NOBODY).sort(-1)
    by_distance = distance.gather(-1, by_index).sort(dim=-1, stable=True).indices[..., : table.most]
    cell = cell.gather(-1, by_distance)[:, table.level, table.rank]  # (N, C)
    row = cell // table.count[table.level, 0]
    place = torch.stack([cell - row * table.count[table.level, 0], row], -1)
    center = ((place + table.offset[table.level]) * table.stride[table.level]).float()
    return Candidates(table.first + cell * table.shapes, center, table.size.expand_as(center))


def _outwards(place: Tensor, count: Tensor, most: int) -> Tensor:
    """(..., M): the cells of an axis from the nearest outwards; positions that do not exist come after those that do.

    place: (...) in cells.  count: how many cells the axis has, broadcasting.  To both sides in turn until one ends.
    """
    start = torch.minimum((place - 0.5).ceil().long().clamp(min=0), count - 1)
    up = place > start  # the second nearest lies on this side; of equally near the lower
    room_up, room_down = count - 1 - start, start
    room = torch.where(up, room_up, room_down)[..., None]
    other_room = torch.where(up, room_down, room_up)[..., None]
    t = torch.arange(most, device=place.device)
    there, back = (t + 1) // 2, t // 2
    step = torch.where(t % 2 == 1, there, -back)
    step = torch.where(there > room, room - t, step)
    step = torch.where(back > other_room, t - other_room, step)
    return start[..., None] + torch.where(up[..., None], step, -step)


def _nearest_of_all(priors: Priors, centers: Tensor, k: int, measure: Measure) -> Candidates:
    distance = measure(priors.centers.double() - centers[:, None].double(), 2).sum(-1)
    found, start = [], 0
    for size in priors.level_sizes:
        found.append(distance[:, start : start + size].sort(dim=1, stable=True).indices[:, :k] + start)
        start += size
    prior = torch.cat(found, 1)
    box = priors.boxes[prior]
    return Candidates(prior, priors.centers[prior], box[..., 2:] - box[..., :2])


def every_prior(grids: tuple[Grid, ...], device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Centre x, y, width and height of all priors, (R,) each, exactly as `cells_near` and `Kinds` have them."""
    levels = []
    for g in grids:
        x = ((torch.arange(g.width, device=device) + g.offset) * g.stride)[None, :, None]
        y = ((torch.arange(g.height, device=device) + g.offset) * g.stride)[:, None, None]
        w, h = (constant(side, torch.float32, device) for side in zip(*g.shapes, strict=True))
        levels.append([t.expand(g.height, g.width, len(g.shapes)).reshape(-1) for t in (x, y, w, h)])
    x, y, w, h = (torch.cat(parts) for parts in zip(*levels, strict=True))
    return x, y, w, h


def iou_from(gap: Tensor, size: Tensor, other: Tensor) -> Tensor:
    """IoU of boxes from the distance of their centres and their sizes, each (..., 2) x, y in pixels.

    Unlike corners this knows exactly when one box holds the other, so that equal IoUs come out equal, and it never
    grows with the distance.
    """
    return iou_xy(gap[..., 0], gap[..., 1], size[..., 0], size[..., 1], other[..., 0], other[..., 1])


def iou_xy(dx: Tensor, dy: Tensor, w: Tensor, h: Tensor, other_w: Tensor, other_h: Tensor) -> Tensor:
    shared = torch.minimum(torch.minimum(w, other_w), (w + other_w) / 2 - dx.abs()).clamp(min=0)
    shared = shared * torch.minimum(torch.minimum(h, other_h), (h + other_h) / 2 - dy.abs()).clamp(min=0)
    return shared / (w * h + other_w * other_h - shared).clamp(min=1e-12)


class Pairs(NamedTuple):
    """(object, prior) pairs, flat over the batch; those that are not valid are padding."""

    prior: Tensor  # (P,) image * R + prior
    object: Tensor  # (P,)
    valid: Tensor  # (P,) bool

    def assignment(self, ignored: Tensor) -> Assignment:
        """Quality 1 for all.  ignored: (B, R)."""
        weight = self.valid.float()
        return Assignment(ignored.shape[1], self.prior, self.object, weight, weight, ignored)


class Owners:
    """Who owns each prior of the batch when several objects ask for it: the highest score, of equals the first object.

    Takes offers in parts; neither the order of the parts nor that of the offers matters.  The offered pairs are kept
    only if they are fewer than the batch's priors: `each` says how many priors every object asks for.
    """

    def __init__(self, priors: Priors, objects: Objects, each: int, dtype: torch.dtype = torch.float32) -> None:
        self.shape = (objects.batch_size, len(priors))
        self.image = objects.image  # (N,)
        self.start = objects.image * len(priors)  # (N,)
        count, device = objects.batch_size * len(priors), priors.boxes.device
        self.score = torch.full((count,), -torch.inf, dtype=dtype, device=device)  # (B * R,)
        self.object = torch.full((count,), NOBODY, dtype=torch.int64, device=device)  # (B * R,)
        self._offered: list[Pairs] | None = [] if len(objects) * each < count else None

    def offer(self, part: slice, prior: Tensor, score: Tensor, valid: Tensor) -> None:
        """The objects of `part`, n of them, ask for the priors (n, ...) of their image where `valid` (n, ...)."""
        ones = (1,) * (prior.dim() - 1)
        start = self.start[part].view(-1, *ones)
        owner = torch.arange(part.start, part.stop, device=prior.device).view(-1, *ones).expand_as(prior).reshape(-1)
        flat, valid = (prior + start).reshape(-1), valid.reshape(-1)
        score = score.expand_as(prior).reshape(-1).where(valid, -torch.inf)
        before = self.score[flat]
        self.score.scatter_reduce_(0, flat, score, "amax")
        best = self.score[flat]
        # Who is outbid leaves; then the first of the highest bidders enters.  Touches the offered priors alone.
        self.object.scatter_reduce_(0, flat, torch.where(best > before, NOBODY, -1), "amax")
        self.object.scatter_reduce_(0, flat, owner.where(valid & (score == best), NOBODY), "amin")
        if self._offered is not None:
            self._offered.append(Pairs(flat, owner, valid))

    def offer_rows(self, part: slice, score: Tensor, valid: Tensor) -> None:
        """The objects of `part` ask for all priors of their image in order, (n, R): as `offer`, by whole rows."""
        image = self.image[part]
        index = image[:, None].expand_as(score)
        owner = torch.arange(part.start, part.stop, device=score.device)[:, None]
        score = score.where(valid, -torch.inf)
        table, objects = self.score.view(self.shape), self.object.view(self.shape)
        before = table[image]
        table.scatter_reduce_(0, index, score, "amax")
        best = table[image]
        objects.scatter_reduce_(0, index, torch.where(best > before, NOBODY, -1), "amax")
        objects.scatter_reduce_(0, index, owner.where(valid & (score == best), NOBODY), "amin")
        self._offered = None

    def index(self) -> Tensor:
        """(B, R): the object that owns each prior, or BACKGROUND."""
        return self.object.where(self.object != NOBODY, BACKGROUND).view(self.shape)

    def pairs(self) -> Pairs | None:
        """The offers, valid where they won; None where they were too many to keep."""
        if self._offered is None:
            return None
        prior, owner, valid = (torch.cat(parts) for parts in zip(*self._offered, strict=True))
        return Pairs(prior, owner, valid & (self.object[prior] == owner))

    def assignment(self) -> Assignment:
        """Every prior learns its owner, the others are background."""
        pairs = self.pairs()
        if pairs is None:
            return from_index(self.index())
        return pairs.assignment(torch.zeros(self.shape, dtype=torch.bool, device=self.score.device))
