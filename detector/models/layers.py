"""What networks are made of and run in: convolutions, norms, what batch norms can become, precision."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ConvKind = Literal["plain", "separable"]
NormKind = Literal["none", "batch", "group"]
BackboneNorm = Literal["batch", "frozen_batch", "sync_batch", "group"]
Precision = Literal["fp32", "bf16", "fp16"]

DTYPES: dict[Precision, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def autocast(device: torch.device, precision: Precision) -> AbstractContextManager[None]:
    """Lower precision where it is safe; nothing at all for fp32."""
    return torch.autocast(device.type, dtype=DTYPES[precision], enabled=precision != "fp32")


def conv2d(
    in_channels: int,
    out_channels: int,
    kernel_size: int,
    *,
    kind: ConvKind = "plain",
    stride: int = 1,
    bias: bool = True,
) -> nn.Module:
    """A convolution that keeps the size (divides it by `stride`, rounded up).

    `separable` is a depthwise and a pointwise one after it (Chollet, "Xception", CVPR 2017): about 9 times less work
    for 3 x 3.  A separable 1 x 1 is a plain one.
    """
    padding = kernel_size // 2
    if kind == "plain" or kernel_size == 1:
        return nn.Conv2d(in_channels, out_channels, kernel_size, stride, padding, bias=bias)
    return nn.Sequential(
        nn.Conv2d(in_channels, in_channels, kernel_size, stride, padding, groups=in_channels, bias=False),
        nn.Conv2d(in_channels, out_channels, 1, bias=bias),
    )


def norm2d(kind: NormKind, channels: int) -> nn.Module:
    if kind == "batch":
        return nn.BatchNorm2d(channels)
    return nn.GroupNorm(groups_of(channels), channels) if kind == "group" else nn.Identity()


def groups_of(channels: int) -> int:
    """32 groups (Wu and He, "Group Normalization", ECCV 2018), fewer where one would have less than 8 channels.

    256 channels have 32 groups of 8.  A light head's map of one cell would otherwise be normalised to nothing.
    """
    return max(g for g in range(1, 33) if channels % g == 0 and (g == 1 or channels // g >= 8))


class FrozenBatchNorm2d(nn.Module):
    """A batch norm that never changes again: one multiplication and one addition for each channel.

    What it was is folded into two buffers, so nothing of it is trained, averaged or moved by `train()`.  `act` is what
    the replaced norm did after normalising.  `merged`: the convolution before it already scaled and shifted.
    """

    scale: Tensor
    shift: Tensor

    def __init__(self, scale: Tensor, shift: Tensor, act: nn.Module) -> None:
        super().__init__()
        self.register_buffer("scale", scale)
        self.register_buffer("shift", shift)
        self.act, self.merged = act, False

    def forward(self, x: Tensor) -> Tensor:
        if self.merged:
            return self.act(x)
        scale, shift = self.scale.to(x.dtype)[:, None, None], self.shift.to(x.dtype)[:, None, None]
        return self.act(torch.addcmul(shift, x, scale))


class ScaledConv2d(nn.Conv2d):
    """A convolution that does the work of the frozen batch norm after it: weights are scaled instead of whole maps.

    The norm keeps its buffers and is no child of this module, so names in the state are those of the two apart.
    The scaled weight is not kept for the backward pass, but scaled again: else every weight would be in memory twice.
    """

    def __init__(self, conv: nn.Conv2d, norm: FrozenBatchNorm2d) -> None:
        nn.Module.__init__(self)
        self.__dict__.update(conv.__dict__)
        self.__dict__["norm"] = norm
        norm.merged = True

    def forward(self, x: Tensor) -> Tensor:
        norm: FrozenBatchNorm2d = self.__dict__["norm"]
        bias = norm.shift if self.bias is None else norm.shift + self.bias * norm.scale
        scale = norm.scale[:, None, None, None]
        weight = self.weight * scale
        place = weight.data_ptr()

        def keep(saved: Tensor) -> Tensor | None:
            return None if saved.data_ptr() == place else saved

        def scaled_again(kept: Tensor | None) -> Tensor:
            return self.weight.detach() * scale if kept is None else kept

        with torch.autograd.graph.saved_tensors_hooks(keep, scaled_again):
            return self._conv_forward(x, weight, bias)


class GroupNorm2d(nn.GroupNorm):
    """A group norm in the place of a batch norm that had an activation in it."""

    def __init__(self, channels: int, act: nn.Module) -> None:
        super().__init__(groups_of(channels), channels)
        self.act = act

    def forward(self, x: Tensor) -> Tensor:
        return self.act(F.group_norm(x, self.num_groups, self.weight, self.bias, self.eps))
