"""What networks are made of and run in: convolutions, norms, what batch norms can become, precision."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Literal

import torch
import torch.nn.functional as F
from timm.layers import convert_sync_batchnorm
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

    The statistics and the affine parameters of the batch norm it replaces are folded into two buffers, so nothing of it
    is trained, averaged or moved by `train()`.  `act` is what the replaced norm did after normalising.
    """

    scale: Tensor
    shift: Tensor

    def __init__(self, norm: nn.BatchNorm2d, act: nn.Module) -> None:
        super().__init__()
        scale, shift = affine_of(norm)
        self.register_buffer("scale", scale.to(norm.weight.dtype))
        self.register_buffer("shift", shift.to(norm.weight.dtype))
        self.act = act

    def forward(self, x: Tensor) -> Tensor:
        scale, shift = self.scale.to(x.dtype)[:, None, None], self.shift.to(x.dtype)[:, None, None]
        return self.act(torch.addcmul(shift, x, scale))


class GroupNorm2d(nn.GroupNorm):
    """A group norm in the place of a batch norm that had an activation in it."""

    def __init__(self, channels: int, act: nn.Module) -> None:
        super().__init__(groups_of(channels), channels)
        self.act = act

    def forward(self, x: Tensor) -> Tensor:
        return self.act(F.group_norm(x, self.num_groups, self.weight, self.bias, self.eps))


AnyBatchNorm = nn.BatchNorm2d | nn.SyncBatchNorm | FrozenBatchNorm2d


def affine_of(norm: AnyBatchNorm) -> tuple[Tensor, Tensor]:
    """(C,), (C,) float64: in inference the norm is `x * scale + shift`."""
    if isinstance(norm, FrozenBatchNorm2d):
        return norm.scale.double(), norm.shift.double()
    assert norm.running_mean is not None
    assert norm.running_var is not None
    scale = norm.weight.detach().double() / (norm.running_var.double() + norm.eps).sqrt()
    return scale, norm.bias.detach().double() - norm.running_mean.double() * scale


def activation_of(norm: nn.Module) -> nn.Module:
    """What a norm does after normalising: timm's mobile networks keep the activation inside the norm."""
    act = getattr(norm, "act", None)
    return act if isinstance(act, nn.Module) else nn.Identity()


def replace_batch_norms(module: nn.Module, kind: BackboneNorm) -> int:
    """Turns every batch norm below `module` into `kind`, in place; returns how many there were."""
    count = 0
    for name, child in module.named_children():
        if isinstance(child, nn.BatchNorm2d):
            setattr(module, name, _replacement(child, kind))
            count += 1
        else:
            count += replace_batch_norms(child, kind)
    return count


def _replacement(norm: nn.BatchNorm2d, kind: BackboneNorm) -> nn.Module:
    if kind == "frozen_batch":
        return FrozenBatchNorm2d(norm, activation_of(norm))
    if kind == "group":
        return GroupNorm2d(norm.num_features, activation_of(norm))
    # Statistics over all ranks; where training is not distributed, it is an ordinary batch norm.
    return convert_sync_batchnorm(norm) if kind == "sync_batch" else norm
