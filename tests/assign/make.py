"""Priors and objects for the tests of assignment."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from detector.structures import Grid, Objects, Priors

POINT = ((1.0, 1.0),)
ONE_ANCHOR = ((8.0, 8.0),)
EXACT = ((4.0, 8.0), (8.0, 8.0), (8.0, 4.0))  # sides that float32 holds exactly at any place
NINE_ANCHORS = tuple(
    (4 * 2 ** (k / 3) * ratio**-0.5, 4 * 2 ** (k / 3) * ratio**0.5) for ratio in (0.5, 1.0, 2.0) for k in range(3)
)


def pyramid(
    size: tuple[int, int],
    strides: tuple[int, ...] = (8, 16, 32, 64, 128),
    shapes: tuple[tuple[float, float], ...] = POINT,
    offset: float = 0.5,
) -> Priors:
    """Priors for an image of (height, width); `shapes` are widths and heights in strides."""
    return on_grids(
        tuple(
            Grid(math.ceil(size[0] / s), math.ceil(size[1] / s), s, tuple((w * s, h * s) for w, h in shapes), offset)
            for s in strides
        )
    )


def on_grids(grids: tuple[Grid, ...]) -> Priors:
    boxes, strides = [], []
    for g in grids:
        y = (torch.arange(g.height) + g.offset) * g.stride
        x = (torch.arange(g.width) + g.offset) * g.stride
        y, x = torch.meshgrid(y, x, indexing="ij")
        center = torch.stack([x, y], -1)[:, :, None]
        half = torch.tensor(g.shapes) / 2
        boxes.append(torch.cat([center - half, center + half], -1).reshape(-1, 4))
        strides.append(torch.full((g.size,), float(g.stride)))
    return Priors(torch.cat(boxes), torch.cat(strides), tuple(g.size for g in grids), grids)


def without_grids(priors: Priors) -> Priors:
    return Priors(priors.boxes, priors.stride, priors.level_sizes)


def random_boxes(count: int, size: tuple[int, int], seed: int) -> Tensor:
    """(count, 4) inside an image of (height, width), sides log-uniform from 2 px to the whole image."""
    random = torch.Generator().manual_seed(seed)
    limit = torch.tensor([size[1], size[0]], dtype=torch.float32)
    center = torch.rand(count, 2, generator=random) * limit
    side = 2 * (limit / 2) ** torch.rand(count, 2, generator=random)
    return torch.cat([(center - side / 2).clamp(min=0), torch.minimum(center + side / 2, limit)], 1)


def batch(
    *images: list[list[float]] | Tensor, ignore: list[Tensor] | None = None, sizes: Tensor | None = None
) -> Objects:
    """One image for each argument; the labels are 0, 1, 2, 0, 1, ..."""
    boxes = [torch.as_tensor(x, dtype=torch.float32).reshape(-1, 4) for x in images]
    return Objects.collate(boxes, [torch.arange(len(x)) % 3 for x in boxes], ignore, sizes)
