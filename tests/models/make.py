"""Feature maps, and heads whose outputs depend visibly on them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import torch
from torch import Tensor, nn

Head = TypeVar("Head", bound=nn.Module)


def random_maps(sizes: Sequence[tuple[int, int]], batch: int = 2, channels: int = 16) -> list[Tensor]:
    random = torch.Generator().manual_seed(0)
    return [torch.randn(batch, channels, *size, generator=random) for size in sizes]


def lively(built: Head) -> Head:
    """With outputs that depend visibly on the input."""
    torch.manual_seed(1)
    for module in built.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.normal_(module.weight, std=module.weight[0].numel() ** -0.5)
            nn.init.normal_(module.bias, std=0.3) if module.bias is not None else None
    return built
