"""Comparisons without ties: a cost and an index in one whole number, so that of equals the first wins everywhere.

`topk` does not say which of equal values it takes, and two reductions (lowest value, then first index) cost twice as
much as one.  A key is

    tier (2 bits) | cost (32 bits, ordered like the float32 number) | index (28 bits)

so that keys compare like (tier, cost, index) and are all different.
"""

from __future__ import annotations

import torch
from torch import Tensor

INDEX_BITS = 28
LAST = torch.iinfo(torch.int64).max
_HALF = 1 << 31


def keys(cost: Tensor, tier: Tensor) -> Tensor:
    """int64 of the shape of `cost` (float32, no NaN), with index 0: `| index` adds one below 2 ** 28.

    tier: int64 in 0..2, broadcasting; a lower one comes first whatever the cost.
    """
    bits = (cost + 0.0).view(torch.int32)  # + 0.0: minus zero is zero
    bits = bits ^ (bits >> 31).bitwise_and_(0x7FFFFFFF)  # negative numbers are ordered the other way round
    return bits.long().add_(tier << 32).bitwise_left_shift_(INDEX_BITS)


def index_of(key: Tensor) -> Tensor:
    """The index in a key."""
    return key & ((1 << INDEX_BITS) - 1)


def tier_of(key: Tensor) -> Tensor:
    """The tier in a key."""
    return ((key >> INDEX_BITS) + _HALF) >> 32
