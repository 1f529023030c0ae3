"""The first stages of a backbone, fixed."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn


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
    return list(_filled(features, frozen))


def _filled(module: nn.Module, parameters: set[int], prefix: str = "") -> Iterator[str]:
    """Names of the largest modules below `module` that have no other parameters than these."""
    for name, child in module.named_children():
        own = [id(parameter) in parameters for parameter in child.parameters()]
        if own and all(own):
            yield prefix + name
        elif any(own):
            yield from _filled(child, parameters, f"{prefix}{name}.")
