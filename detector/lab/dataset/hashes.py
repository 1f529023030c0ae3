"""Images that look alike: a perceptual hash finds candidates, a small grey picture of each confirms them.

Legend: n images, u different hashes, T pixels of a grey picture.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import cv2
import numpy as np
from scipy import sparse
from scipy.sparse.csgraph import connected_components

SIDE = 32  # of the picture that the hash is made of; the one that confirms has half of it
DISTANCE = 8  # of 64 bits
ALIKE = 0.96  # correlation of the grey pictures
PLAIN = 2.0  # levels of 255: a picture that deviates less shows nothing
PAIRS_AT_ONCE = 1 << 22


def fingerprint(image: np.ndarray) -> tuple[int, np.ndarray]:
    """(H, W, 3) uint8 RGB -> a 64-bit hash and (T,) uint8, the image in grey as 16 x 16 pixels.

    The hash: which of the 8 x 8 lowest frequencies of the cosine transform are above their median (Zauner,
    "Implementation and Benchmarking of Perceptual Image Hash Functions", 2010; "pHash").
    """
    grey = cv2.resize(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY), (SIDE, SIDE), interpolation=cv2.INTER_AREA)
    low = cv2.dct(grey.astype(np.float32))[:8, :8]
    bits = np.round(low, 3) > np.round(np.median(low), 3)  # rounded, so that a plain image gives the same everywhere
    picture = cv2.resize(grey, (SIDE // 2, SIDE // 2), interpolation=cv2.INTER_AREA)
    return int.from_bytes(np.packbits(bits).tobytes(), "big"), picture.reshape(-1)


def groups(hashes: np.ndarray, pictures: np.ndarray, distance: int = DISTANCE) -> list[np.ndarray]:
    """Images of which each looks like another of its group: rising indices, the groups by their first.

    hashes: (n,) uint64.  pictures: (n, T) uint8.  Two images look alike if their hashes differ in at most `distance`
    bits and their grey pictures correlate by at least ALIKE (plain ones: have the same level).

    Hashes that differ in d bits agree in one of d + 1 blocks, so only images with an equal block are compared; of many
    with one hash (frames of a still scene) each is compared with the first of its kind alone.
    """
    n = len(hashes)
    if n == 0:
        return []
    shape, level, plain = _standardised(pictures)
    unique, place = np.unique(hashes, return_inverse=True)
    order = np.argsort(place, kind="stable")
    members = np.split(order, np.cumsum(np.bincount(place))[:-1])
    edges: list[np.ndarray] = []
    leaders: list[np.ndarray] = []
    for mine in members:
        kinds: list[int] = []
        rest = mine
        while len(rest):
            alike = _alike(shape, level, plain, np.full(len(rest), rest[0]), rest)
            alike[0] = True
            edges.append(np.stack([np.full(int(alike.sum()), rest[0]), rest[alike]], 1))
            kinds.append(int(rest[0]))
            rest = rest[~alike]
        leaders.append(np.array(kinds))
    count = np.array([len(k) for k in leaders])
    flat, start = np.concatenate(leaders), np.cumsum(count) - count
    for a, b in near(unique, distance):
        # Every leader of one hash with every leader of the other; nearly always one each.
        pairs = count[a] * count[b]
        which = np.repeat(np.arange(len(a)), pairs)
        k = np.arange(len(which)) - np.repeat(np.cumsum(pairs) - pairs, pairs)
        one = flat[start[a[which]] + k // count[b[which]]]
        other = flat[start[b[which]] + k % count[b[which]]]
        alike = _alike(shape, level, plain, one, other)
        edges.append(np.stack([one[alike], other[alike]], 1))
    pair = np.concatenate(edges)
    graph = sparse.coo_matrix((np.ones(len(pair), dtype=bool), (pair[:, 0], pair[:, 1])), shape=(n, n))
    _, component = connected_components(graph, directed=False)
    together = np.split(np.argsort(component, kind="stable"), np.cumsum(np.bincount(component))[:-1])
    return sorted((np.sort(g) for g in together if len(g) > 1), key=lambda g: int(g[0]))


def near(hashes: np.ndarray, distance: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Pairs of (u,) different uint64 hashes that differ in 1 to `distance` bits: two int64 arrays at a time.

    A pair may come several times.
    """
    edges = np.linspace(0, 64, distance + 2).round().astype(int)
    for low, high in pairwise(edges):
        block = (hashes >> np.uint64(low)) & np.uint64((1 << int(high - low)) - 1)
        order = np.argsort(block, kind="stable")
        start = np.flatnonzero(np.r_[True, np.diff(block[order]) != 0])
        for first, stop in zip(start, np.r_[start[1:], len(order)], strict=True):
            bucket = order[first:stop]
            rows = max(1, PAIRS_AT_ONCE // len(bucket))
            for top in range(0, len(bucket) - 1, rows):
                part = bucket[top : top + rows]
                bits = np.bitwise_count(hashes[part][:, None] ^ hashes[bucket[top:]][None])
                a, b = np.nonzero(np.triu(bits <= distance, 1))
                if len(a):
                    yield part[a], bucket[top:][b]


def _standardised(pictures: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(n, T) float32 of mean 0 and length 1, (n,) the means, (n,) bool: shows nothing."""
    values = pictures.astype(np.float32)
    level = values.mean(1)
    values -= level[:, None]
    plain = values.std(1) < PLAIN
    length = np.sqrt(np.einsum("nt,nt->n", values, values)).clip(min=1e-6)
    return values / length[:, None], level, plain


def _alike(shape: np.ndarray, level: np.ndarray, plain: np.ndarray, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """(P,) bool for pairs of images a, b (P,)."""
    same = np.einsum("nt,nt->n", shape[a], shape[b]) >= ALIKE
    return np.where(plain[a] | plain[b], plain[a] & plain[b] & (np.abs(level[a] - level[b]) < 2 * PLAIN), same)
