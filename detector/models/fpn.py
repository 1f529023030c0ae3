"""Feature Pyramid Network (Lin et al., CVPR 2017), with RetinaNet's and FCOS's coarser levels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from detector.config.node import Node
from detector.models.layers import ConvKind, NormKind, conv2d, norm2d


class FpnConfig(Node):
    """The neck: every level gets the same number of channels and sees what the coarser ones saw."""

    type: Literal["fpn"] = "fpn"
    channels: int = Field(256, ge=1)
    extra: Literal["from_p5", "from_c5", "pool", "none"] = Field(
        "from_p5",
        description="what the coarser levels are made of: convolutions of the last output (FCOS, ATSS) or of the last"
        " input (RetinaNet), or every second cell of the last output (FPN's own, for an RPN)",
    )
    extra_levels: int = Field(2, ge=1, le=4, description="how many coarser levels, unless extra is none")
    extra_relu: bool = Field(True, description="a ReLU between extra levels; mmdetection's often have none")
    norm: NormKind = "none"
    conv: ConvKind = Field("plain", description="separable: light 3 x 3 convolutions")

    def build(self, in_channels: Sequence[int], in_strides: Sequence[int]) -> Fpn:
        """For maps of these channels and strides, fine to coarse."""
        return Fpn(self, in_channels, in_strides)


class Fpn(nn.Module):
    """List of L maps (B, in_channels[i], H, W), fine to coarse -> list of maps (B, channels, H, W), extra ones last.

    `strides` are the true ones of the outputs.  Nearest-neighbour upsampling goes to the exact size of the finer map,
    so odd sizes need no padding.
    """

    def __init__(self, config: FpnConfig, in_channels: Sequence[int], in_strides: Sequence[int]) -> None:
        super().__init__()
        extra_levels = 0 if config.extra == "none" else config.extra_levels
        self.channels = config.channels
        self.strides = (*in_strides, *(in_strides[-1] * 2 ** (i + 1) for i in range(extra_levels)))
        self.extra_from_input = config.extra == "from_c5"
        self.extra_relu = config.extra_relu
        self.pooled_levels = extra_levels if config.extra == "pool" else 0

        def layer(channels: int, kernel_size: int, stride: int = 1, kind: ConvKind = "plain") -> nn.Module:
            bias = config.norm == "none"
            conv = conv2d(channels, config.channels, kernel_size, kind=kind, stride=stride, bias=bias)
            return conv if bias else nn.Sequential(conv, norm2d(config.norm, config.channels))

        self.lateral = nn.ModuleList(layer(channels, 1) for channels in in_channels)
        self.output = nn.ModuleList(layer(config.channels, 3, kind=config.conv) for _ in in_channels)
        first = in_channels[-1] if self.extra_from_input else config.channels
        self.extra = nn.ModuleList(
            layer(config.channels if i else first, 3, stride=2, kind=config.conv)
            for i in range(extra_levels - self.pooled_levels)
        )
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_uniform_(module.weight, a=1)  # "Xavier" of Caffe2, as in the authors' Detectron
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        sums = [lateral(x) for lateral, x in zip(self.lateral, maps, strict=True)]
        for i in range(len(sums) - 1, 0, -1):
            sums[i - 1] = sums[i - 1] + F.interpolate(sums[i], size=sums[i - 1].shape[-2:], mode="nearest")
        outputs = [output(x) for output, x in zip(self.output, sums, strict=True)]
        coarse = maps[-1] if self.extra_from_input else outputs[-1]
        for i, extra in enumerate(self.extra):
            coarse = extra(F.relu(coarse) if i and self.extra_relu else coarse)
            outputs.append(coarse)
        for _ in range(self.pooled_levels):
            outputs.append(outputs[-1][..., ::2, ::2])
        return outputs
