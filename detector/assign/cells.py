"""Whose cell an object lies in, which level suits its size, and choosing the smallest in a stated order.

Legend: N objects, n of a part of them, S kinds of priors (a shape on a level), L levels, R priors, M columns.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from detector.assign.geometry import Kinds
from detector.errors import ConfigError
from detector.structures import Priors

BLOCK = 64  # columns of which only the best is looked at first
HIGHEST, SHIFT = (1 << 31) - 1, 1 << 32  # of the bits of a float32, and past them


def require_grid(priors: Priors, rule: str) -> None:
    """Raises ConfigError for priors on no grid: a rule about cells means nothing there."""
    if not priors.grids:
        raise ConfigError(
            f"assigner.type={rule} gives objects to cells of a grid, but these priors (proposals) lie on none:"
            " choose a rule that compares boxes, such as max_iou."
        )


class Home(NamedTuple):
    """The cell that holds each object's centre, for every kind of prior."""

    cell: Tensor  # (N, S, 2) int64 column, row; on the grid even where `exists` is false
    place: Tensor  # (N, S, 2) float64: where the centre is in the cell, from -0.5 to 0.5, 0 is the prior's centre
    exists: Tensor  # (N, S) bool: the centre lies on the grid


def home_cells(table: Kinds, centers: Tensor) -> Home:
    """A cell reaches half a stride to each side of its prior's centre.

    A centre between two cells belongs to the right or lower one, on the far border of the grid to the last.  Quotients
    are taken in float64, which finds every border exactly.  centers: (N, 2).
    """
    count = torch.stack([table.columns, table.rows], 1)
    position = centers.double()[:, None] / table.stride.double()[:, None] - table.offset.double()[:, None]
    cell = (position + 0.5).floor().long()
    cell = torch.where(position + 0.5 == count, count - 1, cell)
    exists = ((cell >= 0) & (cell < count)).all(-1)
    cell = torch.minimum(cell.clamp(min=0), count - 1)
    return Home(cell, position - cell, exists)


def prior_in(table: Kinds, cell: Tensor) -> Tensor:
    """(N, S, 2) column, row -> (N, S) index of the kind's prior in that cell."""
    return table.first + (cell[..., 1] * table.columns + cell[..., 0]) * table.step


def level_of_size(size: Tensor, stride: Tensor, scale: float) -> Tensor:
    """(N,) int64: the level for objects of `size` (N, 2) whose side is `scale` to 2 * `scale` strides, or the nearest.

    The power of two at or below the geometric mean of the sides over `scale` (Yang et al., "RepPoints", ICCV 2019,
    equation 6), on the last level whose stride is no larger.  stride: (L,) rising.
    """
    power = (size.clamp(min=1e-6) / scale).log2().mean(-1).trunc()
    return ((stride.log2().trunc() <= power[:, None]).sum(1) - 1).clamp(min=0)


def level_strides(priors: Priors) -> Tensor:
    """(L,) pixels, without asking the device."""
    starts = [sum(priors.level_sizes[:i]) for i in range(len(priors.level_sizes))]
    return torch.cat([priors.stride[start : start + 1] for start in starts])


def smallest(cost: Tensor, k: int) -> Tensor:
    """(n, min(k, M)) int64: the columns of the smallest numbers of each row, rising; of equals the first column.

    cost: (n, M) float32, not negative.
    """
    return _best_columns(cost, k, sign=1)


def largest(value: Tensor, k: int) -> Tensor:
    """The same for the largest, falling."""
    return _best_columns(value, k, sign=-1)


def _best_columns(value: Tensor, k: int, sign: int) -> Tensor:
    """The k best lie in the k blocks of columns whose own best come first, so most columns are looked at once."""
    k = min(k, value.shape[1])
    if value.shape[1] <= 4 * k * BLOCK:
        return _sorted_keys(value, torch.arange(value.shape[1], device=value.device), k, sign)
    rest = -value.shape[1] % BLOCK
    padded = F.pad(value, (0, rest), value=torch.inf if sign == 1 else 0.0) if rest else value
    blocks = padded.view(len(value), -1, BLOCK)
    best = blocks.amin(-1) if sign == 1 else blocks.amax(-1)
    chosen = _sorted_keys(best, torch.arange(best.shape[1], device=value.device), k, sign)  # (n, k)
    column = (chosen[..., None] * BLOCK + torch.arange(BLOCK, device=value.device)).flatten(1)
    near = blocks.gather(1, chosen[..., None].expand(-1, -1, BLOCK)).flatten(1)
    return _sorted_keys(near, column, k, sign)


def _sorted_keys(value: Tensor, column: Tensor, k: int, sign: int) -> Tensor:
    """`topk` promises no order among equals, so number and column become one key.

    The bits of a float that is not negative rise with it; adding 0 turns -0 into 0.
    """
    bits = (value.contiguous() + 0.0).view(torch.int32).long()
    key = (bits if sign == 1 else HIGHEST - bits) * SHIFT + column
    return key.topk(k, 1, largest=False).values % SHIFT


def first_best(value: Tensor) -> Tensor:
    """(N, S) -> (N, 1): the first column of the highest number; `argmax` promises no order among equals."""
    return (
        (value == value.amax(1, keepdim=True)).to(torch.uint8).sort(dim=1, descending=True, stable=True).indices[:, :1]
    )
