"""Images that look alike are found, others are not; the search in blocks finds what comparing all pairs finds."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from detector.data.images import read_image
from detector.lab.dataset import hashes
from tests.lab.dataset.conftest import picture


def groups(images: list[np.ndarray], distance: int = hashes.DISTANCE) -> list[list[int]]:
    prints = [hashes.fingerprint(image) for image in images]
    numbers = np.array([n for n, _ in prints], dtype=np.uint64)
    return [g.tolist() for g in hashes.groups(numbers, np.stack([p for _, p in prints]), distance)]


def encoded(image: np.ndarray, quality: int) -> np.ndarray:
    _, content = cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, quality])
    return np.asarray(cv2.imdecode(content, cv2.IMREAD_COLOR))


def copies(image: np.ndarray) -> dict[str, np.ndarray]:
    height, width = image.shape[:2]
    return {
        "re-encoded": encoded(image, 30),
        "halved": cv2.resize(image, (width // 2, height // 2), interpolation=cv2.INTER_AREA),
        "enlarged": cv2.resize(image, (width * 2, height * 2), interpolation=cv2.INTER_LINEAR),
        "brighter": np.clip(image.astype(np.int16) + 12, 0, 255).astype(np.uint8),
        "grey": cv2.cvtColor(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY), cv2.COLOR_GRAY2RGB),
    }


def test_copies_are_found_and_others_are_not() -> None:
    images = [picture(120, 160, seed) for seed in range(40)]
    every = [*images, *copies(images[3]).values(), encoded(images[7], 60)]
    assert groups(every) == [[3, 40, 41, 42, 43, 44], [7, 45]]
    assert hashes.groups(np.zeros(0, dtype=np.uint64), np.zeros((0, 256), dtype=np.uint8)) == []
    assert groups(images[:1]) == []


@pytest.mark.parametrize("name", ["bccd", "balloon", "coco_tiny"])
def test_copies_of_real_images(shared: Path, name: str) -> None:
    """Each copy joins its original; what is not a copy joins only what already looked like it."""
    paths = sorted((shared / "datasets" / name / "images").rglob("*.jpg"))[:40]
    images = [read_image(p) for p in paths]
    before = groups(images)
    chosen = [i for i in range(0, 40, 8) if not any(i in g for g in before)]
    made = [(i, copy) for i in chosen for copy in copies(images[i]).values()]
    found = groups([*images, *(copy for _, copy in made)])
    expected = [[i, *(40 + k for k, (j, _) in enumerate(made) if j == i)] for i in chosen]
    assert sorted(found) == sorted([*before, *expected])
    assert len(chosen) >= 4


def test_plain_images_go_by_their_level() -> None:
    plain = [np.full((40, 50, 3), level, dtype=np.uint8) for level in (10, 11, 200, 90)]
    assert groups([*plain, picture(40, 50, 0)]) == [[0, 1]]


def test_one_hash_many_images() -> None:
    """Equal hashes alone do not make images alike."""
    pictures = np.stack([picture(16, 16, s)[..., 0].reshape(-1) for s in (0, 1, 0, 1, 2, 0)])
    found = hashes.groups(np.full(6, 77, dtype=np.uint64), pictures)
    assert [g.tolist() for g in found] == [[0, 2, 5], [1, 3]]
    apart = np.array([77, 77, 76, 76, 77, 77 ^ 0b1110], dtype=np.uint64)
    assert [g.tolist() for g in hashes.groups(apart, pictures, 2)] == [[0, 2], [1, 3]]
    assert [g.tolist() for g in hashes.groups(apart, pictures, 3)] == [[0, 2, 5], [1, 3]]


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(0, 16), st.sampled_from([2, 30, 1 << 22]))
def test_blocks_lose_no_pair(seed: int, distance: int, at_once: int) -> None:
    rng = np.random.default_rng(seed)
    # Clusters, so that there are pairs at every distance.
    centers = rng.integers(0, 1 << 63, 5, dtype=np.uint64)
    flips = np.zeros(60, dtype=np.uint64)
    for i, count in enumerate(rng.integers(0, 12, 60)):
        for bit in rng.integers(0, 64, count):
            flips[i] ^= np.uint64(1) << np.uint64(bit)
    numbers = np.unique(centers[rng.integers(0, 5, 60)] ^ flips)
    before, hashes.PAIRS_AT_ONCE = hashes.PAIRS_AT_ONCE, at_once
    try:
        found = {(min(a, b), max(a, b)) for x, y in hashes.near(numbers, distance)
                 for a, b in zip(x.tolist(), y.tolist(), strict=True)}  # fmt: skip
    finally:
        hashes.PAIRS_AT_ONCE = before
    bits = np.bitwise_count(numbers[:, None] ^ numbers)
    expected = {(a, b) for a, b in np.argwhere(bits <= distance).tolist() if a < b}
    assert found == expected


@pytest.mark.slow
def test_a_hundred_thousand_images() -> None:
    rng = np.random.default_rng(0)
    numbers = rng.integers(0, 1 << 63, 100_000, dtype=np.uint64)
    pictures = rng.integers(0, 256, (100_000, 256)).astype(np.uint8)
    numbers[[5, 70_000]] = numbers[99_000] ^ np.array([3, 1 << 40], dtype=np.uint64)
    pictures[[5, 70_000]] = pictures[99_000]
    assert [g.tolist() for g in hashes.groups(numbers, pictures)] == [[5, 70_000, 99_000]]
