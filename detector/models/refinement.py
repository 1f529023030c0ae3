"""A second look at the boxes that a head has said: DW's boundary points and VarifocalNet's star.

Legend: B images, T tower channels, A priors in a cell, H, W cells of one level.

Boxes are four distances here, left, top, right, bottom from the prior's centre in strides, negative where a side lies
on the other side of it.  In the feature map a prior's centre is its cell, wherever in the image the cell's priors lie.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from typing import Annotated, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn
from torchvision.ops import deform_conv2d

from detector.boxes import full_precision
from detector.config.node import Node
from detector.models.corrections import look_up
from detector.models.dense_head import TowerLayer, flat
from detector.models.heads import HeadConfig
from detector.models.layers import conv2d

MOST_GROWTH = 1000 / 16  # a refined side is at most so many times as far away: what coders of size ratios allow


class Refiner(nn.Module):
    """The layers of a second look, the same for all levels but for learnt factors."""

    def before(self, for_box: Tensor, level: int) -> Tensor:
        """(B, T, H, W) features of the boxes -> (B, T, H, W), from which the initial boxes are said."""
        return for_box

    @abstractmethod
    def forward(self, for_class: Tensor, for_box: Tensor, initial: Tensor, level: int) -> tuple[Tensor, Tensor]:
        """(B, T, H, W) each, (B, H W A, 4) distances -> features of the classes, refined distances; of these shapes."""


class Refinement(Node):
    """How boxes are refined."""

    one_prior_a_cell: ClassVar[bool] = False  # whether it can look at one box of a cell only
    needs_initial_loss: ClassVar[bool] = False  # whether the initial boxes would else hardly learn

    @abstractmethod
    def build(self, config: HeadConfig, levels: int) -> Refiner:
        """For a head of `config` over so many levels."""


class Boundary(Refinement):
    """DW's: each side is read off the boxes that are said near that side (Li et al., CVPR 2022, section 3.4).

    The initial box has a point in the middle of each side, level with the prior's centre.  A convolution of the boxes'
    features moves each point, and the side of the boxes there, interpolated bilinearly, is the refined side.
    """

    type: Literal["boundary"] = "boundary"

    def build(self, config: HeadConfig, levels: int) -> BoundaryRefiner:
        return BoundaryRefiner(config)


class BoundaryRefiner(Refiner):
    signs: Tensor
    axes: Tensor

    def __init__(self, config: HeadConfig) -> None:
        super().__init__()
        self.offsets = conv2d(config.channels, config.priors.per_cell * 8, 3, kind=config.conv)  # x, y of four points
        self.register_buffer("signs", torch.tensor([-1.0, -1, 1, 1]), persistent=False)
        self.register_buffer("axes", torch.tensor([[1.0, 0], [0, 1], [1, 0], [0, 1]]), persistent=False)

    def forward(self, for_class: Tensor, for_box: Tensor, initial: Tensor, level: int) -> tuple[Tensor, Tensor]:
        height, width = for_box.shape[-2:]
        rows, columns = (torch.arange(n, device=initial.device, dtype=initial.dtype) for n in (height, width))
        y, x = torch.meshgrid(rows, columns, indexing="ij")
        center = torch.stack([x, y, x, y], -1)[:, :, None]  # (H, W, 1, 4) cells
        sides = initial.view(len(initial), height, width, -1, 4) * self.signs  # (B, H, W, A, 4) seen from the centre
        points = (sides[..., None] * self.axes).flatten(3).permute(0, 3, 1, 2)  # (B, 8 A, H, W)
        boxes = (center + sides).view_as(initial)
        found = look_up(boxes, points + full_precision(self.offsets(for_box))).view_as(sides)
        return for_class, ((found - center) * self.signs).view_as(initial)


class Star(Refinement):
    """VarifocalNet's: classes and factors of the sides, from features at nine points of the initial box.

    Zhang et al., "VarifocalNet", CVPR 2021, sections 3.2 and 3.3: a deformable convolution whose taps are the prior's
    centre, the middles of the sides and the corners.  Each side's distance is multiplied by a learnt factor, whose
    gradient the initial box does not see.
    """

    type: Literal["star"] = "star"
    one_prior_a_cell: ClassVar[bool] = True
    needs_initial_loss: ClassVar[bool] = True
    gradient: float = Field(
        0.1, ge=0, le=1, description="share of the gradient that the initial box gets from where the star looked"
    )

    def build(self, config: HeadConfig, levels: int) -> StarRefiner:
        return StarRefiner(self, config, levels)


class StarRefiner(Refiner):
    """Beside the star, one more layer before the initial boxes, as in the authors' code."""

    def __init__(self, refinement: Star, config: HeadConfig, levels: int) -> None:
        super().__init__()
        self.gradient = refinement.gradient
        self.first = TowerLayer(config.channels, config, levels)
        self.for_class, self.for_box = StarConvolution(config.channels), StarConvolution(config.channels)
        self.factors = conv2d(config.channels, 4, 3, kind=config.conv)
        self.level_scale = nn.Parameter(torch.ones(levels)) if config.level_scale else None

    def before(self, for_box: Tensor, level: int) -> Tensor:
        features: Tensor = self.first(for_box, level)
        return features

    def forward(self, for_class: Tensor, for_box: Tensor, initial: Tensor, level: int) -> tuple[Tensor, Tensor]:
        fixed = initial.detach()
        seen = fixed + self.gradient * (initial - fixed)
        offsets = star_offsets(seen.transpose(1, 2).unflatten(2, for_box.shape[-2:]))
        raw = self.factors(self.for_box(for_box, offsets))
        raw = flat(full_precision(raw if self.level_scale is None else raw * self.level_scale[level]), 4)
        refined = fixed * raw.clamp(max=math.log(MOST_GROWTH)).exp()
        # A box that does not hold its prior's centre could be turned inside out.
        upright = (refined[..., :2] + refined[..., 2:] >= 0).all(-1, keepdim=True)
        return self.for_class(for_class, offsets), torch.where(upright, refined, fixed)


class StarConvolution(nn.Module):
    """A 3 x 3 convolution whose taps lie where `offsets` say, then ReLU: (B, T, H, W), (B, 18, H, W) -> (B, T, H, W).

    In float32 whatever the precision: in bfloat16 a place a hundred cells away would be rounded to a half.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(channels, channels, 3, 3))
        nn.init.kaiming_uniform_(self.weight, nonlinearity="relu")

    def forward(self, x: Tensor, offsets: Tensor) -> Tensor:
        found = deform_conv2d(full_precision(x), offsets, full_precision(self.weight), padding=1)
        return F.relu(found).to(x.dtype)


def star_offsets(distances: Tensor) -> Tensor:
    """(B, 4, H, W) -> (B, 18, H, W): y, x from where each tap of a 3 x 3 convolution is to where the star has it.

    Taps in order of rows; their rows go to the top side, the centre and the bottom side, their columns likewise.
    """
    left, top, right, bottom = distances.unbind(1)
    nowhere = torch.zeros_like(left)
    y = torch.stack([1 - top, nowhere, bottom - 1], 1)[:, :, None].expand(-1, -1, 3, -1, -1)
    x = torch.stack([1 - left, nowhere, right - 1], 1)[:, None].expand(-1, 3, -1, -1, -1)
    return torch.stack([y, x], 3).flatten(1, 3)


AnyRefinement = Annotated[Boundary | Star, Field(discriminator="type")]
