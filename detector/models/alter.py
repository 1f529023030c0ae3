"""How a backbone of timm's is changed: stages frozen, strides moved."""

from __future__ import annotations

from collections.abc import Iterator

import torch
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


def freeze(features: nn.Module, last: int, channels: int) -> list[str]:
    """Stops the gradient of all that map number `last` depends on; returns the names of the modules it fills wholly.

    Which parameters those are is asked of autograd, since each family of networks names its stages in its own way.
    """
    was_training, parameters = features.training, list(features.parameters())
    features.eval()
    with torch.enable_grad():
        total = features(torch.zeros(1, channels, 64, 64))[last].sum()
        gradients = torch.autograd.grad(total, parameters, allow_unused=True)
    features.train(was_training)
    frozen = {id(p) for p, gradient in zip(parameters, gradients, strict=True) if gradient is not None}
    for parameter in parameters:
        if id(parameter) in frozen:
            parameter.requires_grad_(False)
    return list(filled(features, frozen))


def filled(module: nn.Module, parameters: set[int], prefix: str = "") -> Iterator[str]:
    """Names of the largest modules below `module` that have no other parameters than these."""
    for name, child in module.named_children():
        own = [id(parameter) in parameters for parameter in child.parameters()]
        if own and all(own):
            yield prefix + name
        elif any(own):
            yield from filled(child, parameters, f"{prefix}{name}.")
