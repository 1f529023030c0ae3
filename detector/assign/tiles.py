"""Neighbouring priors taken together, so that what none of them can be for an object is known without looking at each.

Legend: B images, R priors of one image, T tiles, M priors of a tile, N objects, n of a part of them, K classes.

Neighbours predict boxes near one another.  From the outermost sides of a tile's boxes follows the most that any of them
can overlap an object; where that is too little to count, the tile's priors need not be compared with it.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from detector.boxes import EPS, area
from detector.structures import Grid, Objects, Priors

SIDE = 2  # cells, unless asked for others; M is its square
BLOCK = 8  # T is a multiple of it
SLACK = 1e-4  # relative, by which bounds are wider than float32 says


class Layout(NamedTuple):
    """Which priors lie in each tile: of one shape each."""

    prior: Tensor  # (T, M) int64
    real: Tensor  # (T, M) bool; the others repeat a neighbour, at the far edges of a level


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
        tiled = boxes[:, tiles.prior]  # (B, T, M, 4)
        self.boxes = tiled.permute(3, 0, 1, 2).flatten(1, 2).contiguous()  # (4, B * T, M)
        # (2, B, T): the least of x1 and y1, the most of x2 and y2
        self.low, self.high = (
            x.permute(2, 0, 1).contiguous() for x in (tiled[..., :2].amin(2), tiled[..., 2:].amax(2))
        )
        areas = area(tiled)
        self.least, self.most = areas.amin(2), areas.amax(2)  # (B, T)

    def first(self, promise: Tensor, k: int) -> Tensor:
        """(n, T) -> (n, k): tiles that promise much, from different blocks; k at most the number of blocks."""
        blocks = promise.unflatten(1, (-1, BLOCK))
        chosen = blocks.amax(2).topk(k, 1, sorted=False).indices
        inner = blocks.gather(1, chosen[..., None].expand(-1, -1, BLOCK)).argmax(2)
        return chosen * BLOCK + inner

    def exact_iou(self, tile: Tensor, own: Tensor) -> Tensor:
        """image * T + tile (...) and objects' boxes (..., 4) -> (..., M), as `pairwise_iou` has it."""
        x1, y1, x2, y2 = self.boxes[:, tile]
        left, top, right, bottom = own[..., None, :].unbind(-1)
        shared = torch.minimum(x2, right).sub_(torch.maximum(x1, left)).clamp_(min=0)
        shared *= torch.minimum(y2, bottom).sub_(torch.maximum(y1, top)).clamp_(min=0)
        union = (x2 - x1).clamp_(min=0).mul_((y2 - y1).clamp_(min=0))
        union += (right - left) * (bottom - top)
        return shared.div_(union.sub_(shared).clamp_(min=EPS))

    def iou(self, objects: Objects, rows: slice | Tensor) -> Tensor:
        """(n, T): no box of the tile has a higher IoU with the objects `rows`."""
        image, (left, top, right, bottom) = objects.image[rows], objects.boxes[rows, :, None].unbind(1)
        low, high = self.low[:, image], self.high[:, image]
        shared = torch.minimum(high[0], right).sub_(torch.maximum(low[0], left)).clamp_(min=0)
        shared *= torch.minimum(high[1], bottom).sub_(torch.maximum(low[1], top)).clamp_(min=0)
        own = (right - left) * (bottom - top)
        shared = torch.minimum(torch.minimum(shared, own), self.most[image])
        union = torch.maximum(self.least[image], shared).add_(own).sub_(shared)
        return shared.div_(union.clamp_(min=EPS)).mul_(1 + SLACK)
