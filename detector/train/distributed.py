"""Which process of a run this is.  One process alone is number 0 of 1."""

from __future__ import annotations

import torch.distributed as dist


def rank() -> int:
    return dist.get_rank() if _several() else 0


def world_size() -> int:
    return dist.get_world_size() if _several() else 1


def _several() -> bool:
    return dist.is_available() and dist.is_initialized()
