"""What a dense head labels: anchors or points on the grid of each pyramid level.

Centres lie in the middle of the cells (offset 0.5) unless the offset says otherwise; sizes are never rounded; strides
are the network's own, not image size over map size.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from detector.config.node import Node
from detector.structures import Grid, Priors

Positive = Annotated[float, Field(gt=0)]


class GridPriors(Node):
    """The same priors in every cell.  `Priors.grids` says so, so that assigners find candidates by arithmetic."""

    offset: float = Field(0.5, ge=0, le=1, description="where in its cell a centre lies: 0.5 middle, 0 corner")

    @property
    def per_cell(self) -> int:
        """A, how many priors a cell has."""
        return len(self.shapes(1))

    @abstractmethod
    def shapes(self, stride: int) -> tuple[tuple[float, float], ...]:
        """(width, height) in pixels of each of the A priors of a cell."""

    def __call__(
        self, feature_sizes: Sequence[tuple[int, int]], strides: Sequence[int], device: torch.device | str = "cpu"
    ) -> Priors:
        """For maps of (height, width) cells of `strides` pixels; ordered level, row, column, prior of the cell."""
        grids = tuple(
            Grid(height, width, stride, self.shapes(stride), self.offset)
            for (height, width), stride in zip(feature_sizes, strides, strict=True)
        )
        sizes = tuple(grid.size for grid in grids)
        stride = [torch.full((grid.size,), float(grid.stride), device=device) for grid in grids]
        return Priors(torch.cat([_boxes(grid, device) for grid in grids]), torch.cat(stride), sizes, grids)


class Anchors(GridPriors):
    """Boxes of several scales and shapes (Ren et al., "Faster R-CNN", 2015; Lin et al., "Focal Loss", 2017).

    The default is RetinaNet's nine; `scale: 8, octave_scales: 1, ratios: [1]` is ATSS's one.
    """

    type: Literal["anchors"] = "anchors"
    scale: Positive = Field(4.0, description="side of the smallest square anchor in strides")
    octave_scales: int = Field(3, ge=1, description="sizes before the next level's: scale * 2 ** (i / octave_scales)")
    octaves: int = Field(1, ge=1, description="more where a single level has boxes of all sizes: each twice the last")
    ratios: tuple[Positive, ...] = Field((0.5, 1.0, 2.0), min_length=1, description="height / width, at equal area")
    whole_pixels: bool = Field(
        False, description="sizes cut, and then half sides rounded, to whole pixels: what torchvision's weights expect"
    )

    def shapes(self, stride: int) -> tuple[tuple[float, float], ...]:
        steps = self.octave_scales * self.octaves
        sides = [self.scale * stride * 2 ** (i / self.octave_scales) for i in range(steps)]
        if self.whole_pixels:
            sides = [float(int(side + 1e-6)) for side in sides]
        shapes = tuple((side / ratio**0.5, side * ratio**0.5) for ratio in self.ratios for side in sides)
        return tuple((2.0 * round(w / 2), 2.0 * round(h / 2)) for w, h in shapes) if self.whole_pixels else shapes


class Points(GridPriors):
    """One point a cell (Tian et al., "FCOS", ICCV 2019), seen as a square where a rule or a coder wants a box."""

    type: Literal["points"] = "points"
    scale: Positive = Field(
        8.0, description="side in strides of the square that stands for the point where IoU counts (ATSS, section 3)"
    )

    def shapes(self, stride: int) -> tuple[tuple[float, float], ...]:
        return ((self.scale * stride, self.scale * stride),)


AnyPriors = Annotated[Anchors | Points, Field(discriminator="type")]


def _boxes(grid: Grid, device: torch.device | str) -> Tensor:
    """(grid.size, 4) xyxy."""
    x = (torch.arange(grid.width, device=device) + grid.offset) * grid.stride
    y = (torch.arange(grid.height, device=device) + grid.offset) * grid.stride
    rows, columns = torch.meshgrid(y, x, indexing="ij")
    centers = torch.stack([columns, rows], dim=-1)[:, :, None]  # (height, width, 1, 2)
    half = torch.tensor(grid.shapes, device=device) / 2  # (A, 2)
    return torch.cat([centers - half, centers + half], dim=-1).reshape(-1, 4)
