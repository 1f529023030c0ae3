"""Neighbouring priors taken together, so that what none of them can be for an object is known without looking at each.

Legend: B images, R priors of one image, T tiles, M priors of a tile, N objects, n of a part of them, K classes.

Neighbours predict boxes near one another.  From the outermost sides of a tile's boxes follows the most that any of them
can overlap an object; where that is too little to count, the tile's priors need not be compared with it.
"""

from __future__ import annotations

from functools import cached_property, lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from detector.boxes import EPS
from detector.structures import Grid, Priors

SIDE = 2  # cells, unless asked for others; M is its square
BLOCK = 8  # T is a multiple of it
SLACK = 1e-4  # relative, by which bounds are wider than float32 says


class Layout(NamedTuple):
    """Which priors lie in each tile: of one shape each."""

    prior: Tensor  # (T, M) int64
    real: Tensor  # (T, M) bool; the others repeat a neighbour, at the far edges of a level

    def rows(self, values: Tensor) -> Tensor:
        """(B, R) -> (B, M, T): M rows of tiles, so that what all priors of a tile have is found fast."""
        return values.index_select(1, self.prior.T.flatten()).unflatten(1, self.prior.T.shape)

    def priors_of(self, tile: Tensor, first: Tensor) -> Tensor:
        """(...) tiles, and what to count their priors from, (...) too or broadcast -> (..., M)."""
        return entries(self.prior, tile).add_(first[..., None])


def layout(priors: Priors, side: int = SIDE) -> Layout:
    """Squares of cells; where the priors lie on no grid, those that follow one another."""
    return _layout(priors.grids, 0 if priors.grids else len(priors), side, priors.boxes.device)


@lru_cache(maxsize=1024)
def _layout(grids: tuple[Grid, ...], count: int, side: int, device: torch.device) -> Layout:
    if not grids:
        index = torch.arange(-(-count // side**2) * side**2, device=device).view(-1, side**2)
        return _filled([index.clamp(max=count - 1)], [index < count])
    prior, real, first = [], [], 0
    for g in grids:
        top, left = (torch.arange(0, n, side, device=device) for n in (g.height, g.width))
        step = torch.arange(side, device=device)
        row, column = (top[:, None] + step)[:, None, :, None], (left[:, None] + step)[None, :, None, :]
        exists = ((row < g.height) & (column < g.width)).reshape(-1, side**2)
        cell = (row.clamp(max=g.height - 1) * g.width + column.clamp(max=g.width - 1)).reshape(-1, side**2)
        for shape in range(len(g.shapes)):
            prior.append(first + cell * len(g.shapes) + shape)
            real.append(exists)
        first += g.size
    return _filled(prior, real)


def _filled(prior: list[Tensor], real: list[Tensor]) -> Layout:
    last, rest = prior[-1][-1:], -sum(len(x) for x in prior) % BLOCK
    empty = torch.zeros(rest, last.shape[1], dtype=torch.bool, device=last.device)
    return Layout(torch.cat([*prior, last.expand(rest, -1)]), torch.cat([*real, empty]))


class Bounds:
    """What the predicted boxes of the tiles can have in common with objects."""

    def __init__(self, tiles: Layout, boxes: Tensor) -> None:
        """boxes: (B, R, 4) xyxy."""
        self.tiles = tiles
        self.sides = x1, y1, x2, y2 = [tiles.rows(side) for side in by_side(boxes)]  # (B, M, T) each
        # (B, T) each: the least of x1 and y1, the most of x2 and y2
        self.low, self.high = (x1.amin(1), y1.amin(1)), (x2.amax(1), y2.amax(1))
        areas = (x2 - x1).clamp_(min=0).mul_((y2 - y1).clamp_(min=0))
        self.least, self.most = areas.amin(1), areas.amax(1)  # (B, T)

    @cached_property
    def together(self) -> list[Tensor]:
        """The sides again, (B * T, M) each: a tile's priors side by side."""
        return [side.transpose(1, 2).flatten(0, 1) for side in self.sides]

    def first(self, promise: Tensor, k: int) -> Tensor:
        """(n, T) -> (n, k): tiles that promise much, no two of them a multiple of T / BLOCK apart; k at most that."""
        blocks = promise.unflatten(1, (BLOCK, -1))
        chosen = blocks.amax(1).topk(k, 1, sorted=False).indices
        inner = blocks.gather(2, chosen[:, None].expand(-1, BLOCK, -1)).argmax(1)
        return chosen + inner * blocks.shape[2]

    def exact_iou(self, tile: Tensor, own: Tensor) -> Tensor:
        """image * T + tile (...) and objects' boxes (..., 4) -> (..., M), as `pairwise_iou` has it."""
        x1, y1, x2, y2 = (entries(side, tile) for side in self.together)
        left, top, right, bottom = own[..., None, :].unbind(-1)
        shared = torch.minimum(x2, right).sub_(torch.maximum(x1, left)).clamp_(min=0)
        shared *= torch.minimum(y2, bottom).sub_(torch.maximum(y1, top)).clamp_(min=0)
        union = x2.sub_(x1).clamp_(min=0).mul_(y2.sub_(y1).clamp_(min=0))
        union += (right - left) * (bottom - top)
        return shared.div_(union.sub_(shared).clamp_(min=EPS))

    def iou(self, image: Tensor, own: Tensor) -> Tensor:
        """(n,) images and (n, 4) objects' boxes -> (n, T): no box of the tile has a higher IoU with the object."""
        left, top, right, bottom = own[:, :, None].unbind(1)
        # One after the other: a gathered row is small enough to stay in the processor's cache until it is used.
        shared = torch.minimum(self.high[0].index_select(0, image), right)
        shared.sub_(torch.maximum(self.low[0].index_select(0, image), left)).clamp_(min=0)
        across = torch.minimum(self.high[1].index_select(0, image), bottom)
        shared *= across.sub_(torch.maximum(self.low[1].index_select(0, image), top)).clamp_(min=0)
        own_area = (right - left) * (bottom - top)
        shared = torch.minimum(
            torch.minimum(shared, own_area, out=shared), self.most.index_select(0, image), out=shared
        )
        least = self.least.index_select(0, image)
        union = torch.maximum(least, shared, out=least).add_(own_area).sub_(shared)
        return shared.div_(union.clamp_(min=EPS)).mul_(1 + SLACK)


def entries(values: Tensor, index: Tensor) -> Tensor:
    """(X, ...) and (*I) -> (*I, ...): whole rows, faster than by brackets."""
    return values.index_select(0, index.flatten()).unflatten(0, index.shape)


def by_side(values: Tensor) -> list[Tensor]:
    """(B, R, X) -> X tensors (B, R), of which single numbers are gathered fast."""
    return [x.contiguous() for x in values.unbind(2)]
