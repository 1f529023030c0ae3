"""Where ResNets halve their maps."""

from __future__ import annotations

from timm.models.resnet import Bottleneck
from torch import nn


def stride_first(features: nn.Module) -> int:
    """Lets the bottlenecks that halve the map do so in their first, 1 x 1 convolution; returns how many there are.

    So did the first ResNets (He et al., CVPR 2016) and what was trained from Caffe's; timm's do it in the 3 x 3.
    """
    halving = [m for m in features.modules() if isinstance(m, Bottleneck) and m.conv2.stride != (1, 1)]
    for block in halving:
        block.conv1.stride, block.conv2.stride = block.conv2.stride, (1, 1)
    return len(halving)
