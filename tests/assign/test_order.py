"""Keys compare like (tier, cost, index)."""

from __future__ import annotations

import math

import torch
from hypothesis import given
from hypothesis import strategies as st

from detector.assign.order import INDEX_BITS, LAST, index_of, keys, tier_of

COST = st.floats(width=32, allow_nan=False)
ENTRY = st.tuples(st.integers(0, 2), COST, st.integers(0, 2**INDEX_BITS - 1))


@given(ENTRY, ENTRY)
def test_keys_are_ordered_like_what_they_hold(a: tuple[int, float, int], b: tuple[int, float, int]) -> None:
    tier, cost, index = (torch.tensor(x) for x in zip(a, b, strict=True))
    key = keys(cost.float(), tier) | index
    assert (key < LAST).all()
    assert index_of(key).tolist() == [a[2], b[2]]
    assert tier_of(key).tolist() == [a[0], b[0]]
    assert (key[0] < key[1]).item() == (a < b)
    assert (key[0] == key[1]).item() == (a == b)


def test_zeros_are_equal_and_infinities_are_at_the_ends() -> None:
    cost = torch.tensor([-math.inf, -1e30, -1e-45, -0.0, 0.0, 1e-45, 1.0, math.inf])
    key = keys(cost, torch.zeros(8, dtype=torch.long))
    assert key[3] == key[4]
    assert (key.diff() >= 0).all()
    assert (key.diff() > 0).sum() == 6
