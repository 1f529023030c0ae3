"""The feature pyramid against torchvision's, and its sizes."""

from __future__ import annotations

from collections import OrderedDict

import pytest
import torch
from torch import nn
from torchvision.ops import FeaturePyramidNetwork
from torchvision.ops.feature_pyramid_network import LastLevelP6P7

from detector.models.fpn import FpnConfig

CHANNELS, STRIDES = (8, 12, 16), (8, 16, 32)


def _maps(height: int, width: int) -> list[torch.Tensor]:
    torch.manual_seed(0)
    return [torch.randn(2, c, -(-height // s), -(-width // s)) for c, s in zip(CHANNELS, STRIDES, strict=True)]


@pytest.mark.parametrize("extra", ["from_p5", "from_c5"])
@pytest.mark.parametrize("size", [(128, 160), (101, 187)])
def test_same_maps_as_torchvision(extra: str, size: tuple[int, int]) -> None:
    ours = FpnConfig(channels=24, extra=extra).build(CHANNELS, STRIDES)
    last = LastLevelP6P7(CHANNELS[-1] if extra == "from_c5" else 24, 24)
    theirs = FeaturePyramidNetwork(list(CHANNELS), 24, extra_blocks=last)
    for module in theirs.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.normal_(module.bias)
    last.use_P5 = extra == "from_p5"
    for i in range(3):
        ours.lateral[i].load_state_dict(theirs.inner_blocks[i][0].state_dict())
        ours.output[i].load_state_dict(theirs.layer_blocks[i][0].state_dict())
    ours.extra[0].load_state_dict(last.p6.state_dict())
    ours.extra[1].load_state_dict(last.p7.state_dict())
    maps = _maps(*size)
    expected = theirs(OrderedDict((str(i), x) for i, x in enumerate(maps))).values()
    found = ours(maps)
    assert ours.strides == (8, 16, 32, 64, 128)
    assert [tuple(x.shape[-2:]) for x in found] == [(-(-size[0] // s), -(-size[1] // s)) for s in ours.strides]
    for x, y in zip(found, expected, strict=True):
        torch.testing.assert_close(x, y)


@pytest.mark.parametrize("norm", ["none", "batch", "group"])
@pytest.mark.parametrize("conv", ["plain", "separable"])
def test_norms_and_light_convolutions(norm: str, conv: str) -> None:
    fpn = FpnConfig(channels=24, norm=norm, conv=conv, extra_levels=1).build(CHANNELS, STRIDES)
    outputs = fpn(_maps(70, 50))
    assert fpn.strides == (8, 16, 32, 64)
    assert all(x.shape[1] == 24 for x in outputs)
    sum(x.sum() for x in outputs).backward()
    assert all(p.grad is not None for p in fpn.parameters())
    wide = FpnConfig(channels=24, norm=norm, extra_levels=1).build(CHANNELS, STRIDES)
    assert conv == "plain" or _size(fpn) < 0.5 * _size(wide)


def test_no_extra_levels() -> None:
    fpn = FpnConfig(channels=24, extra="none").build(CHANNELS, STRIDES)
    assert fpn.strides == STRIDES
    assert len(fpn(_maps(64, 64))) == 3
    assert FpnConfig(channels=8).build((4,), (16,)).strides == (16, 32, 64)


def _size(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())
