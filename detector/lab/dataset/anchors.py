"""Anchors from the data: k-means and k-medoids over widths and heights, with IoU in place of a distance.

Legend: N objects, k anchors, M objects that may become a medoid.

IoUs are those of two boxes with a common centre (Redmon and Farhadi, "YOLO9000", CVPR 2017, section 2).
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import combinations
from math import comb

import numpy as np

from detector import seeding

MEANS_FROM = 10_000  # objects that k-means looks at, drawn where there are more
MEDOIDS_FROM = 1_000  # k-medoids needs all pairs
ROUNDS = 40
STARTS = 3
EXHAUSTIVE = 5_000  # sets of medoids that are all tried, so that the best is found


@dataclass(frozen=True, eq=False)
class Fit:
    """k anchors and how well they fit all objects."""

    sizes: np.ndarray  # (k, 2) float64 width, height in pixels of the network's input, by rising area
    mean_iou: float  # of each object with its best anchor
    recall: float  # share of objects whose best anchor has an IoU of at least 0.5


def shape_iou(sizes: np.ndarray, others: np.ndarray) -> np.ndarray:
    """(N, 2), (k, 2) width, height -> (N, k)."""
    shared = np.minimum(sizes[:, None, 0], others[None, :, 0]) * np.minimum(sizes[:, None, 1], others[None, :, 1])
    area, other_area = sizes.prod(1), others.prod(1)
    found: np.ndarray = shared / (area[:, None] + other_area[None] - shared)
    return found


def fit(sizes: np.ndarray, anchors: np.ndarray) -> Fit:
    """How anchors (k, 2) fit objects (N, 2)."""
    best = np.concatenate([shape_iou(sizes[i : i + (1 << 16)], anchors).max(1) for i in range(0, len(sizes), 1 << 16)])
    ordered = anchors[np.argsort(anchors.prod(1), kind="stable")]
    return Fit(ordered, float(best.mean()), float((best >= 0.5).mean()))


def sample(sizes: np.ndarray, most: int, seed: int) -> np.ndarray:
    """(N, 2), or `most` rows of it, drawn by the seed."""
    if len(sizes) <= most:
        return sizes
    rng = seeding.generator(seed, seeding.ANALYSIS, most)
    return sizes[np.sort(rng.choice(len(sizes), most, replace=False))]


def k_means(sizes: np.ndarray, most: int, seed: int) -> list[np.ndarray]:
    """Anchors (k, 2) for k = 1, ..., `most`: each the mean of the objects that it fits best.

    Means do not maximise IoU, so a round can make things worse; the best state seen is what counts.  Each k starts from
    k-means++ drawn anew (Arthur and Vassilvitskii, 2007), and from the k - 1 anchors with the worst-fitted object, so
    that the mean IoU over `sizes` never falls as k grows.
    """
    found: list[np.ndarray] = []
    for k in range(1, most + 1):
        starts = [_plus_plus(sizes, k, seeding.generator(seed, seeding.ANALYSIS, k, i)) for i in range(STARTS)]
        if found:
            worst = shape_iou(sizes, found[-1]).max(1).argmin()
            starts.append(np.concatenate([found[-1], sizes[worst : worst + 1]]))
        found.append(max((_lloyd(sizes, start) for start in starts), key=lambda state: state[0])[1])
    return found


def _plus_plus(sizes: np.ndarray, k: int, rng: np.random.Generator) -> np.ndarray:
    chosen = [int(rng.integers(len(sizes)))]
    gap = 1 - shape_iou(sizes, sizes[chosen]).max(1)
    while len(chosen) < k:
        weight = gap**2
        total = weight.sum()
        chosen.append(int(rng.choice(len(sizes), p=weight / total) if total > 0 else rng.integers(len(sizes))))
        gap = np.minimum(gap, 1 - shape_iou(sizes, sizes[chosen[-1:]])[:, 0])
    return sizes[chosen]


def _lloyd(sizes: np.ndarray, anchors: np.ndarray) -> tuple[float, np.ndarray]:
    """(mean IoU, anchors): the best of all rounds, the start among them."""
    best = (-1.0, anchors)
    for _ in range(ROUNDS):
        iou = shape_iou(sizes, anchors)
        owner = iou.argmax(1)
        value = float(iou.max(1).mean())
        if value > best[0]:
            best = (value, anchors)
        count = np.bincount(owner, minlength=len(anchors))
        total = np.stack([np.bincount(owner, sizes[:, i], len(anchors)) for i in (0, 1)], 1)
        moved = np.where(count[:, None] > 0, total / count[:, None].clip(min=1), anchors)
        if np.allclose(moved, anchors, rtol=1e-4):
            break
        anchors = moved
    return best


def k_medoids(sizes: np.ndarray, most: int) -> list[np.ndarray]:
    """Anchors (k, 2) for k = 1, ..., `most`, each of them an object's own size.

    Where there are few sets of k objects all are tried; else the k - 1 medoids get the object that helps most, and then
    medoids are exchanged for others as long as the mean IoU rises (PAM: Kaufman and Rousseeuw, 1990; all exchanges are
    valued at once as in Schubert and Rousseeuw, "Faster k-Medoids Clustering", 2019).  So the mean IoU over `sizes`
    never falls as k grows.  With fewer objects than k the last are repeated.
    """
    gap = 1 - shape_iou(sizes, sizes)  # (M, N): of each object as a medoid
    found: list[np.ndarray] = []
    chosen: list[int] = []
    for k in range(1, most + 1):
        if k > len(sizes):
            chosen = [*chosen, chosen[-1]]
        elif comb(len(sizes), k) <= EXHAUSTIVE:
            chosen = list(min(combinations(range(len(sizes)), k), key=lambda c: float(gap[list(c)].min(0).sum())))
        else:
            nearest = gap[chosen].min(0) if chosen else np.ones(len(sizes))
            chosen = _exchange(gap, [*chosen, int(np.minimum(gap, nearest).sum(1).argmin())])
        found.append(sizes[chosen])
    return found


def _exchange(gap: np.ndarray, chosen: list[int]) -> list[int]:
    """Exchanges one medoid for another object, the best exchange first, until none helps."""
    count = gap.shape[1]
    while True:
        ranked = np.sort(gap[chosen], 0)
        first, second = ranked[0], ranked[1] if len(chosen) > 1 else np.ones(count)
        owner = gap[chosen].argmin(0)
        kept = np.minimum(gap - first, 0)  # what an object gains by candidate m while its own medoid stays
        lost = np.minimum(gap, second) - first  # and if that goes
        onto = np.zeros((count, len(chosen)))
        onto[np.arange(count), owner] = 1
        change = kept.sum(1)[:, None] + (lost - kept) @ onto  # (M, k)
        best = int(change.argmin())
        if change.flat[best] > -1e-9:
            return chosen
        candidate, medoid = divmod(best, len(chosen))
        chosen = [*chosen[:medoid], candidate, *chosen[medoid + 1 :]]
