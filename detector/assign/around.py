"""Objects with the priors around them, where a region says which those are but not how many.

Legend: N objects, n of a part of them, L levels, C priors of an object, Q runs of neighbouring cells, R priors of one
image.

A large object has thousands of priors in it and most have a few dozen, so that a table wide enough for all would be as
large as all pairs.  How wide it must be only the objects know.  A CPU may be asked (it is its own host): there, objects
of about equal number come together.  Asking another device would wait for it: there, every object comes with all R
priors of its image.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from detector.assign.base import chunks
from detector.assign.geometry import SLACK
from detector.structures import Grid

PAIRS = 1 << 15  # at once: what a few dozen operations leave in a core's cache
ALIKE = 1.25  # the widest row of a part over its narrowest


class Rows(NamedTuple):
    """Some objects, each with priors of its image; every object comes once."""

    object: Tensor  # (n,) int64
    prior: Tensor  # (n, C) int64
    exists: Tensor  # (n, C) bool; the others are padding


def may_ask(device: torch.device) -> bool:
    """Whether reading a number from the device costs nothing."""
    return device.type == "cpu"


def around(grids: tuple[Grid, ...], count: int, low: Tensor, high: Tensor) -> Iterator[Rows]:
    """All of `count` priors whose centre lies between `low` and `high`, and perhaps others.

    grids: where they lie; empty if they lie on none.

    low, high: (N, L, 2) x, y in pixels, each object's region on each level; (N, 1, 2) where all levels have the same.
    """
    if not grids or not may_ask(low.device):
        every = torch.arange(count, device=low.device)
        for part in chunks(len(low), count):
            mine = torch.arange(part.start, part.stop, device=low.device)
            prior = every.expand(len(mine), -1)
            yield Rows(mine, prior, torch.ones_like(prior, dtype=torch.bool))
        return
    table = _table(grids, low.device)
    start = (low / table.stride - table.offset - SLACK).ceil().long().clamp(min=0)  # (N, L, 2) first column and row
    last = torch.minimum((high / table.stride - table.offset + SLACK).floor().long(), table.extent - 1)
    cells = (last - start + 1).clamp(min=0)
    number, order = (cells.prod(2) * table.shapes).sum(1).sort()
    numbers, first = number.tolist(), 0
    while first < len(numbers):
        stop = bisect_right(numbers, max(ALIKE * numbers[first], 64))
        stop = min(stop, first + max(1, PAIRS // max(1, numbers[stop - 1])))
        rows = order[first:stop]
        yield _rows(table, rows, start[rows], cells[rows], number[first:stop], max(1, numbers[stop - 1]))
        first = stop


class _Table(NamedTuple):
    stride: Tensor  # (L, 1) float32
    offset: Tensor  # (L, 1) float32
    extent: Tensor  # (L, 2) int64 columns, rows
    first: Tensor  # (L,) int64 index of the level's first prior
    shapes: Tensor  # (L,) int64 priors in a cell


@lru_cache(maxsize=1024)
def _table(grids: tuple[Grid, ...], device: torch.device) -> _Table:
    return _Table(
        stride=torch.tensor([[float(g.stride)] for g in grids], device=device),
        offset=torch.tensor([[g.offset] for g in grids], device=device),
        extent=torch.tensor([(g.width, g.height) for g in grids], device=device),
        first=torch.tensor([sum(g.size for g in grids[:i]) for i in range(len(grids))], device=device),
        shapes=torch.tensor([len(g.shapes) for g in grids], device=device),
    )


def _rows(table: _Table, rows: Tensor, start: Tensor, cells: Tensor, number: Tensor, width: int) -> Rows:
    """The priors of a row of cells follow one another: each region is a list of such runs, laid end to end."""
    columns, heights = (cells[..., 0] * table.shapes).flatten(), cells[..., 1].flatten()
    place = torch.arange(len(heights)).repeat_interleave(heights)  # (Q,) object and level of each run
    down = torch.arange(len(place)) - (heights.cumsum(0) - heights).index_select(0, place)
    head = (table.first + (start[..., 1] * table.extent[:, 0] + start[..., 0]) * table.shapes).flatten()
    step = (table.extent[:, 0] * table.shapes).repeat(len(rows))  # from a row of cells to the next
    head = head.index_select(0, place) + down * step.index_select(0, place)
    length = columns.index_select(0, place)
    flat = (head - (length.cumsum(0) - length)).repeat_interleave(length)
    flat += torch.arange(len(flat))
    along = torch.arange(width)
    exists = along < number[:, None]
    index = ((number.cumsum(0) - number)[:, None] + along).clamp_(max=max(0, len(flat) - 1))
    flat = flat if len(flat) else flat.new_zeros(1)
    prior = flat.index_select(0, index.flatten()).view(index.shape)
    return Rows(rows, prior.mul_(exists), exists)
