"""Whether two checkpoints are the same, bit for bit."""

from __future__ import annotations

from typing import Any

import torch

TRAINED = ("model", "ema", "ema_count", "criterion", "optimizer", "scaler", "step")


def assert_same(one: Any, other: Any, place: str = "") -> None:
    assert type(one) is type(other), place
    if isinstance(one, torch.Tensor):
        assert one.dtype == other.dtype, place
        assert torch.equal(one, other), f"{place}: differs by up to {(one.double() - other.double()).abs().max():.3g}"
    elif isinstance(one, dict):
        assert list(one) == list(other), place
        for key in one:
            assert_same(one[key], other[key], f"{place}.{key}")
    elif isinstance(one, list | tuple):
        assert len(one) == len(other), place
        for i, (a, b) in enumerate(zip(one, other, strict=True)):
            assert_same(a, b, f"{place}[{i}]")
    else:
        assert one == other, place


def assert_same_training(one: dict[str, Any], other: dict[str, Any]) -> None:
    """Weights, averages, optimiser and all else that decides what comes next."""
    for key in TRAINED:
        assert_same(one[key], other[key], key)
