"""Anchors against brute force on tiny sets, and what has to hold for any set."""

from __future__ import annotations

from itertools import combinations, pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from detector.lab.dataset import anchors


def drawn(seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return np.exp(rng.normal(3, 0.8, (int(rng.integers(1, 60)), 2)))


sets = st.integers(0, 2**32 - 1).map(drawn)


def mean_iou(sizes: np.ndarray, chosen: np.ndarray) -> float:
    """A plain loop."""
    best = []
    for w, h in sizes:
        ious = []
        for a, b in chosen:
            both = min(w, a) * min(h, b)
            ious.append(both / (w * h + a * b - both))
        best.append(max(ious))
    return float(np.mean(best))


def test_by_hand() -> None:
    sizes = np.array([[10.0, 10.0], [20.0, 10.0], [10.0, 40.0]])
    found = anchors.fit(sizes, np.array([[20.0, 10.0], [10.0, 10.0]]))
    assert found.sizes.tolist() == [[10, 10], [20, 10]]
    assert found.mean_iou == pytest.approx((1 + 1 + 0.25) / 3)
    assert found.recall == pytest.approx(2 / 3)
    assert anchors.k_means(sizes[:1], 1, 0)[0].tolist() == [[10, 10]]


@settings(max_examples=25, deadline=None)
@given(sets, st.integers(1, 6), st.integers(0, 5))
def test_more_anchors_never_fit_worse(sizes: np.ndarray, most: int, seed: int) -> None:
    for found in (anchors.k_means(sizes, most, seed), anchors.k_medoids(sizes, most)):
        values = [mean_iou(sizes, a) for a in found]
        assert [len(a) for a in found] == list(range(1, most + 1))
        assert all(b >= a - 1e-9 for a, b in pairwise(values))
        assert values == pytest.approx([anchors.fit(sizes, a).mean_iou for a in found])


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 9), st.integers(1, 4))
def test_medoids_equal_brute_force_on_tiny_sets(seed: int, count: int, k: int) -> None:
    sizes = np.exp(np.random.default_rng(seed).normal(3, 0.8, (count, 2)))
    found = anchors.k_medoids(sizes, k)[-1]
    assert {tuple(a) for a in found.tolist()} <= {tuple(s) for s in sizes.tolist()}
    best = max(mean_iou(sizes, sizes[list(c)]) for c in combinations(range(count), min(k, count)))
    assert mean_iou(sizes, found) == pytest.approx(best)


@pytest.mark.parametrize("seed", range(4))
def test_exchanges_come_close_to_brute_force(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The way of large sets: no single exchange can improve the result, and it is within 5 % of the best."""
    sizes = np.exp(np.random.default_rng(seed).normal(3, 0.8, (14, 2)))
    best = [mean_iou(sizes, a) for a in anchors.k_medoids(sizes, 4)]
    monkeypatch.setattr(anchors, "EXHAUSTIVE", 0)
    found = anchors.k_medoids(sizes, 4)
    for k, chosen in enumerate(found, 1):
        value = mean_iou(sizes, chosen)
        assert best[k - 1] >= value - 1e-9
        assert value > 0.95 * best[k - 1]
        for i in range(k):
            for other in sizes:
                swapped = chosen.copy()
                swapped[i] = other
                assert mean_iou(sizes, swapped) <= value + 1e-6


def test_clusters_are_found() -> None:
    rng = np.random.default_rng(0)
    centers = np.array([[10, 30], [40, 40], [120, 60]])
    sizes = np.concatenate([c * np.exp(rng.normal(0, 0.02, (50, 2))) for c in centers])
    for found in (anchors.k_means(sizes, 3, 0)[-1], anchors.k_medoids(sizes, 3)[-1]):
        assert np.allclose(anchors.fit(sizes, found).sizes, centers, rtol=0.05)


def test_equal_seeds_equal_anchors() -> None:
    sizes = np.exp(np.random.default_rng(1).normal(3, 0.8, (200, 2)))
    one, again, other = (anchors.k_means(sizes, 5, seed) for seed in (0, 0, 1))
    assert all(np.array_equal(a, b) for a, b in zip(one, again, strict=True))
    assert not all(np.array_equal(a, b) for a, b in zip(one, other, strict=True))
    some = anchors.sample(sizes, 50, 3)
    assert len(some) == 50
    assert np.array_equal(some, anchors.sample(sizes, 50, 3))
    assert anchors.sample(sizes, 200, 3) is sizes
