"""Features of regions of interest: a fixed grid of bins of each box, from the pyramid level that fits its size.

Legend: B images, S boxes of an image, M boxes of all images, C channels, H W cells of a map, h w bins of a box.

A cell's value stands at its middle, (column + 0.5) * stride pixels.  `aligned: false` is the older convention, half a
cell off: values stand at column * stride, and boxes narrower than a cell are widened to one.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn
from torchvision import ops

from detector.boxes import area, full_precision
from detector.config.node import Node
from detector.models.roi_gather import gather_align, gathers

Bins = Annotated[int, Field(ge=1, le=64)]

# Numbers that the exact integral holds at once, of one chunk of boxes.
MOST_AT_ONCE = 1 << 24


class RoiOperator(Node):
    """How the bins of a box are filled, and which level a box looks at."""

    size: tuple[Bins, Bins] = Field((7, 7), description="bins of a box: rows, columns")
    canonical_size: float = Field(224.0, gt=0, description="side in pixels of a box of `canonical_level` (FPN, eq. 1)")
    canonical_level: int = Field(4, ge=0, description="level n has stride 2**n")

    @abstractmethod
    def __call__(self, features: Tensor, rois: Tensor, scale: float) -> Tensor:
        """(B, C, H, W) map, (M, 5) float32 image index and xyxy pixels, 1 / stride -> (M, C, h, w).

        Position-sensitive operators give (M, C / (h w), h, w).  Boxes without area give finite values.
        """

    @property
    def channels(self) -> int | None:
        """What position-sensitive operators give of any map; None: as many as the map has."""
        return None

    def levels(self, boxes: Tensor, strides: Sequence[int]) -> Tensor:
        """(..., 4) xyxy -> (...) int64 index into `strides` (fine to coarse, doubling).

        Lin et al., "Feature Pyramid Networks", CVPR 2017, equation 1: floor(k0 + log2(sqrt(area) / canonical size)).
        """
        ratio = area(boxes).sqrt() / self.canonical_size
        # A box of exactly the canonical size must not fall below it by rounding.
        level = (self.canonical_level + ratio.clamp(min=1e-9).log2() + 1e-6).floor() - math.log2(strides[0])
        return level.clamp(0, len(strides) - 1).nan_to_num(0).long()


class Align(RoiOperator):
    """RoIAlign (He et al., "Mask R-CNN", ICCV 2017): bilinear samples at regular places of each bin.

    `reduce: max` takes the largest of a bin's samples, which the paper found to be as good as their average.
    """

    type: Literal["align"] = "align"
    sampling_ratio: int = Field(2, ge=0, description="samples of a bin along each axis; 0: one for each cell it covers")
    aligned: bool = True
    reduce: Literal["average", "max"] = "average"

    @model_validator(mode="after")
    def _known_samples(self) -> Align:
        if self.reduce == "max" and self.sampling_ratio == 0:
            raise ValueError("reduce 'max' needs a fixed number of samples: set sampling_ratio to 1 or more")
        return self

    @property
    def regular(self) -> bool:
        """Every bin is the mean of the same number of samples."""
        return self.sampling_ratio > 0 and self.reduce == "average"

    def __call__(self, features: Tensor, rois: Tensor, scale: float) -> Tensor:
        if self.reduce == "average":
            return ops.roi_align(features, rois, self.size, scale, self.sampling_ratio, self.aligned)
        n = self.sampling_ratio
        # A bin's n x n samples are the single samples of n x n smaller bins.
        fine = ops.roi_align(features, rois, (self.size[0] * n, self.size[1] * n), scale, 1, self.aligned)
        return F.max_pool2d(fine, n)


class Pool(RoiOperator):
    """RoIPool (Girshick, "Fast R-CNN", ICCV 2015): the box and then its bins rounded to whole cells; their maximum."""

    type: Literal["pool"] = "pool"

    def __call__(self, features: Tensor, rois: Tensor, scale: float) -> Tensor:
        return ops.roi_pool(features, rois, self.size, scale)


class PsAlign(RoiOperator):
    """Position-sensitive RoIAlign: each bin looks at channels of its own (Dai et al., "R-FCN", NeurIPS 2016; as in
    Light-Head R-CNN, Li et al. 2017, where these maps are few and a box head follows)."""

    type: Literal["ps_align"] = "ps_align"
    sampling_ratio: int = Field(2, ge=0, description="samples of a bin along each axis; 0: one for each cell it covers")
    bin_channels: int = Field(10, ge=1, description="channels of each bin")

    @property
    def channels(self) -> int | None:
        return self.bin_channels

    def __call__(self, features: Tensor, rois: Tensor, scale: float) -> Tensor:
        return ops.ps_roi_align(features, rois, self.size, scale, self.sampling_ratio)


class PsPool(RoiOperator):
    """Position-sensitive RoIPool: the average of a bin's cells, each bin with channels of its own (R-FCN)."""

    type: Literal["ps_pool"] = "ps_pool"
    bin_channels: int = Field(10, ge=1, description="channels of each bin")

    @property
    def channels(self) -> int | None:
        return self.bin_channels

    def __call__(self, features: Tensor, rois: Tensor, scale: float) -> Tensor:
        return ops.ps_roi_pool(features, rois, self.size, scale)


class Precise(RoiOperator):
    """PrRoIPool (Jiang et al., "IoU-Net", ECCV 2018): the exact mean over a bin of the bilinearly interpolated map.

    The only operator with a gradient for the boxes.  The map is 0 outside; a bin without area is 0.  Plain tensor
    operations, image by image and in chunks: slower than the others.
    """

    type: Literal["precise"] = "precise"
    aligned: bool = True

    def __call__(self, features: Tensor, rois: Tensor, scale: float) -> Tensor:
        batch, channels, height, width = features.shape
        rows, columns = self.size
        corners = rois[:, 1:] * scale - (0.5 if self.aligned else 0.0)
        across = _shares(corners[:, 0], corners[:, 2], columns, width)  # (M, w, W)
        down = _shares(corners[:, 1], corners[:, 3], rows, height)  # (M, h, H)
        at_once = max(1, MOST_AT_ONCE // max(1, channels * height * columns))
        found = features.new_zeros(len(rois), channels, rows, columns)
        for image in range(batch):
            for mine in (rois[:, 0] == image).nonzero().squeeze(1).split(at_once):
                # The hat functions are products, so the integral is one matrix product for each axis.
                along = torch.einsum("mjx,cyx->mcyj", across[mine], features[image])
                found = found.index_add(0, mine, torch.einsum("miy,mcyj->mcij", down[mine], along))
        return found


def _shares(start: Tensor, end: Tensor, bins: int, cells: int) -> Tensor:
    """(M,), (M,) ends of boxes in cells -> (M, bins, cells): what each cell gives to the mean over each bin."""
    length = (end - start)[:, None] / bins
    edges = start[:, None] + length * torch.arange(bins + 1, device=start.device)
    place = edges[..., None] - torch.arange(cells, device=start.device)  # (M, bins + 1, cells)
    # Integral up to `place` of the hat function max(0, 1 - |t|).
    below, above = (place + 1).clamp(0, 1), (1 - place).clamp(0, 1)
    integral = torch.where(place < 0, below.square() / 2, 1 - above.square() / 2)
    real = length > 0
    return (integral[:, 1:] - integral[:, :-1]) * (real / length.where(real, 1.0))[..., None]


AnyRoi = Annotated[Align | Pool | PsAlign | PsPool | Precise, Field(discriminator="type")]


class RoiExtractor(nn.Module):
    """L maps (B, C, H, W) and (B, S, 4) boxes -> (B * S, `channels`, h, w), every box from its own level.

    Waits for the device once, to learn how many boxes each level has; RoIAlign of a fixed number of samples on a CPU
    takes all levels at once.  Computes in float32: half precision would round coordinates to half a pixel.
    """

    def __init__(self, operator: RoiOperator, in_channels: int, strides: Sequence[int]) -> None:
        super().__init__()
        self.operator, self.strides = operator, tuple(strides)
        self.channels = in_channels if operator.channels is None else operator.channels
        # Position-sensitive maps are made by one convolution for all levels (R-FCN).
        self.maps = None
        if operator.channels is not None:
            self.maps = nn.Conv2d(in_channels, operator.channels * operator.size[0] * operator.size[1], 1)
            nn.init.normal_(self.maps.weight, std=0.01)
            nn.init.zeros_(self.maps.bias)  # type: ignore[arg-type]

    def forward(self, maps: Sequence[Tensor], boxes: Tensor) -> Tensor:
        maps = maps[: len(self.strides)]
        kind = maps[0].dtype
        if self.maps is not None:
            maps = [self.maps(x) for x in maps]
        image = torch.arange(len(boxes), device=boxes.device, dtype=boxes.dtype)
        rois = torch.cat([image.repeat_interleave(boxes.shape[1])[:, None], boxes.flatten(0, 1)], dim=1)
        operator, one = self.operator, len(self.strides) == 1
        level = rois.new_zeros(len(rois)).long() if one else operator.levels(rois[:, 1:], self.strides)
        maps = [full_precision(x) for x in maps]
        if isinstance(operator, Align) and operator.regular and gathers(maps[0]):
            n, aligned = operator.sampling_ratio, operator.aligned
            return gather_align(maps, rois, level, self.strides, operator.size, n, aligned).to(kind)
        if one:
            return operator(maps[0], rois, 1 / self.strides[0]).to(kind)
        order = level.argsort(stable=True)
        counts = torch.bincount(level, minlength=len(self.strides)).tolist()
        parts = rois[order].split(counts)
        found: list[Tensor] = []
        ordered = None
        for x, part, rows, stride in zip(maps, parts, order.split(counts), self.strides, strict=True):
            features = operator(x, part, 1 / stride)
            if torch.is_grad_enabled():
                found.append(features)
                continue
            # Each level straight to its place: in inference these features are what takes most memory.
            ordered = features.new_empty(len(rois), *features.shape[1:]) if ordered is None else ordered
            ordered[rows] = features
        if ordered is None:
            features = torch.cat(found)
            found.clear()
            # The gradient of putting rows somewhere is picking them; that of picking would be adding up.
            ordered = torch.empty_like(features).index_copy_(0, order, features)
        return ordered.to(kind)
