"""The dense head: one design that is RetinaNet's, ATSS's and FCOS's by configuration.

Legend: B images, L levels, R priors, K classes, A priors in a cell, C numbers of a box, T tower channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from detector.models.heads import HeadConfig, initialise, say, start_at
from detector.models.layers import conv2d, norm2d
from detector.structures import Outputs, Priors

# Training at many sizes would otherwise keep the priors of all of them on the device.
MOST_CACHED = 8


class DenseHeadConfig(HeadConfig):
    """Class and box towers over every level with the same weights; what they label and how boxes are coded.

    The default is RetinaNet with group norm.  FCOS: points, distances, quality, level_scale.  ATSS: one anchor, deltas,
    quality, level_scale.  GFL: as ATSS, but bins and no quality.
    """

    type: Literal["dense"] = "dense"
    convs: int = Field(4, ge=0, description="convolutions of a tower before the one that predicts")
    shared_tower: bool = Field(False, description="one tower for classes and boxes: light")
    predict_kernel: Literal[1, 3] = Field(3, description="side of the convolutions that predict: 1 in an RPN")

    def build(self, in_channels: int, strides: Sequence[int], num_classes: int) -> DenseHead:
        return DenseHead(self, in_channels, strides, num_classes)


class TowerLayer(nn.Module):
    """Convolution, norm, ReLU with the same convolution for all levels.

    Batch norms are one for each level, statistics and affine parameters: levels differ in scale, and one norm would
    train on each level's statistics but infer with their mixture (Ghiasi et al., "NAS-FPN", CVPR 2019).
    """

    def __init__(self, in_channels: int, config: HeadConfig, levels: int, kernel_size: int = 3) -> None:
        super().__init__()
        bias = config.norm == "none" or config.tower_bias
        # One, or, once batch norms were folded into it, one for each level; so are the norms.
        self.convs = nn.ModuleList([conv2d(in_channels, config.channels, kernel_size, kind=config.conv, bias=bias)])
        norms = levels if config.norm == "batch" else 1
        self.norms = nn.ModuleList(norm2d(config.norm, config.channels) for _ in range(norms))

    def forward(self, x: Tensor, level: int) -> Tensor:
        conv = self.convs[level if len(self.convs) > 1 else 0]
        norm = self.norms[level if len(self.norms) > 1 else 0]
        return F.relu(norm(conv(x)), inplace=True)


class Tower(nn.ModuleList):
    """(B, in_channels, H, W) of one level -> (B, T, H, W)."""

    def __init__(self, in_channels: int, config: DenseHeadConfig, levels: int) -> None:
        super().__init__(TowerLayer(config.channels if i else in_channels, config, levels) for i in range(config.convs))

    def forward(self, x: Tensor, level: int) -> Tensor:
        for layer in self:
            x = layer(x, level)
        return x


class GridHead(nn.Module):
    """A head over all levels: what it is built for, and the priors of maps of whatever size."""

    config: HeadConfig
    classes: nn.Module  # the last layers of the class and the box branch
    box: nn.Module

    def __init__(self, config: HeadConfig, strides: Sequence[int], num_classes: int) -> None:
        super().__init__()
        self.strides, self.num_classes = tuple(strides), num_classes
        self._make_priors = config.priors
        self._cache: dict[tuple[tuple[tuple[int, int], ...], torch.device], Priors] = {}

    def priors(self, maps: Sequence[Tensor]) -> Priors:
        """The priors of maps of these sizes, made once for each set of sizes and device."""
        sizes = tuple((int(x.shape[-2]), int(x.shape[-1])) for x in maps)
        key = (sizes, maps[0].device)
        if key in self._cache:
            return self._cache[key]
        # Made in inference mode they could never be used for training.
        with torch.inference_mode(False):
            priors = self._make_priors(sizes, self.strides, maps[0].device)
        if not torch.compiler.is_compiling():  # an exporter's tensors must not outlive it
            if len(self._cache) == MOST_CACHED:
                del self._cache[next(iter(self._cache))]
            self._cache[key] = priors
        return priors


class DenseHead(GridHead):
    """List of L maps (B, in_channels, H, W), fine to coarse -> `Outputs`.

    Everything is ordered level, row, column, prior of the cell; a cell's numbers are ordered prior, then class.
    """

    def __init__(self, config: DenseHeadConfig, in_channels: int, strides: Sequence[int], num_classes: int) -> None:
        super().__init__(config, strides, num_classes)
        self.config = config
        width = config.channels if config.convs else in_channels

        def predict(numbers: int) -> nn.Module:
            return conv2d(width, config.priors.per_cell * numbers, config.predict_kernel, kind=config.conv)

        self.class_tower = Tower(in_channels, config, len(strides))
        self.box_tower = None if config.shared_tower else Tower(in_channels, config, len(strides))
        self.box_numbers = config.coder.channels
        self.classes, self.box = predict(num_classes), predict(self.box_numbers)
        self.quality = predict(1) if config.quality else None
        self.level_scale = nn.Parameter(torch.ones(len(strides))) if config.level_scale else None
        initialise(self)
        say(config.prior_probability, self.classes)
        start_at(self.box, config, self.strides[0])

    def forward(self, maps: Sequence[Tensor]) -> Outputs:
        classes, boxes, qualities = [], [], []
        for level, x in enumerate(maps):
            for_class = self.class_tower(x, level)
            for_box = for_class if self.box_tower is None else self.box_tower(x, level)
            raw = self.box(for_box)
            classes.append(flat(self.classes(for_class), self.num_classes))
            boxes.append(flat(raw if self.level_scale is None else raw * self.level_scale[level], self.box_numbers))
            if self.quality is not None:
                qualities.append(flat(self.quality(for_box), 1))
        return Outputs(
            priors=self.priors(maps),
            class_logits=torch.cat(classes, dim=1),
            box_raw=torch.cat(boxes, dim=1),
            quality_logits=torch.cat(qualities, dim=1).squeeze(-1) if qualities else None,
            coder=self.config.coder,
        )


def flat(x: Tensor, numbers: int) -> Tensor:
    """(B, A * numbers, H, W) -> (B, H * W * A, numbers); a view where `x` is in channels_last."""
    return x.permute(0, 2, 3, 1).reshape(x.shape[0], -1, numbers)
