"""Counts and shares against numbers worked out by hand, overlap against a plain loop, real sets against their notes."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from detector.data.index import CocoIndex
from detector.data.resize import Fixed, ShortEdge
from detector.errors import DataError
from detector.lab.dataset import overlap
from detector.lab.dataset.describe import CELLS, describe
from detector.lab.dataset.split import Split, check_together

MakeSplit = Callable[..., Split]

IMAGES = [
    (100, 200, [("a", 0, 0, 10, 20), ("a", 50, 50, 40, 40), ("b", 60, 50, 40, 40)]),
    (100, 200, [("b", 120, 20, 16, 4), ("b", 0, 0, 200, 100, "crowd")]),
    (300, 100, []),
]


def test_small_set_by_hand(split: MakeSplit) -> None:
    facts = describe(split(IMAGES, ["a", "b", "never"]), ShortEdge(short=50, long=1000))
    assert (facts.images, facts.objects, facts.crowd_regions, facts.empty_images) == (3, 4, 1, 1)
    a, b, never = facts.classes
    assert (a.name, a.objects, a.share, a.images, a.per_image) == ("a", 2, 0.5, 1, 2.0)
    assert (b.objects, b.images) == (2, 2)
    assert b.image_share == pytest.approx(2 / 3)
    assert (never.objects, never.images, never.side, never.per_image) == (0, 0, 0.0, 0.0)
    assert facts.together.tolist() == [[1, 1, 0], [1, 2, 0], [0, 0, 0]]
    assert facts.coco == {"small": 2, "medium": 2, "large": 0}
    assert facts.elongation == {"below 1.5": 2, "1.5 to 3": 1, "3 to 6": 1, "above 6": 0}
    assert facts.side["least"] == pytest.approx(8)
    assert facts.side["most"] == pytest.approx(40)
    assert facts.aspect["most"] == pytest.approx(4)
    assert facts.resized_side["most"] == pytest.approx(20)  # every image is halved
    assert facts.relative_side["most"] == pytest.approx(40 / np.sqrt(20000))
    assert facts.per_image["mean"] == pytest.approx(4 / 3)
    assert facts.at_edge == pytest.approx(1 / 4)
    assert facts.image_sizes[0] == (100, 200, 2)
    # The two squares share 30 x 40 of 2000; each centre (70 and 80) lies in the other.
    assert sorted(facts.crowding.iou.tolist()) == pytest.approx([0, 0, 0.6, 0.6])
    assert facts.crowding.iou_of_class.tolist() == [0, 0, 0, 0]
    assert facts.crowding.contested == 0.5
    assert facts.crowding.pairs_per_image == pytest.approx(1 / 3)
    assert facts.crowding.above(0.5) == 0.5
    assert facts.crowding.above(0.5, same_class=True) == 0
    assert facts.centers.sum() == 4
    assert facts.centers[int(10 / 100 * CELLS), int(5 / 200 * CELLS)] == 1


def test_a_stretching_resize(split: MakeSplit) -> None:
    made = split(IMAGES, ["a", "b"])
    assert made.resized_sides(Fixed(size=(300, 400)))[0].tolist() == [20, 60]
    assert np.array_equal(made.resized_sides(None), made.sides)


@pytest.mark.parametrize("at_once", [1, 50, 1 << 20])
def test_overlap_equals_a_plain_loop(split: MakeSplit, at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(overlap, "PAIRS_AT_ONCE", at_once)
    rng = np.random.default_rng(3)
    images = []
    for count in (7, 0, 1, 12):
        corner, side = rng.integers(0, 30, (count, 2)), rng.integers(15, 40, (count, 2))
        objects = [(rng.choice(["a", "b"]), *map(int, (*c, *s))) for c, s in zip(corner, side, strict=True)]
        images.append((100, 100, objects))
    made = split(images, ["a", "b"])
    found = overlap.crowding(made)
    pairs = 0
    for i, one in enumerate(made.boxes):
        best = own = 0.0
        holders = 0
        for j, other in enumerate(made.boxes):
            if i == j or made.image[i] != made.image[j]:
                continue
            w, h = min(one[2], other[2]) - max(one[0], other[0]), min(one[3], other[3]) - max(one[1], other[1])
            both = max(0.0, w) * max(0.0, h)
            iou = both / (np.prod(one[2:] - one[:2]) + np.prod(other[2:] - other[:2]) - both)
            best, own = max(best, iou), max(own, iou if made.labels[i] == made.labels[j] else 0.0)
            x, y = (one[:2] + one[2:]) / 2
            holders += other[0] < x < other[2] and other[1] < y < other[3]
            pairs += i < j and iou > 0.5
        assert found.iou[i] == pytest.approx(best)
        assert found.iou_of_class[i] == pytest.approx(own)
        assert found.holders[i] == holders
    assert found.pairs_per_image == pytest.approx(pairs / 4)
    assert found.holders.any()
    assert (found.iou > 0.5).any()


def test_a_sample_is_seeded_and_consistent(split: MakeSplit) -> None:
    images = [(50, 50, [("a", i, 0, 5, 1 + i)] * (i % 3)) for i in range(30)]
    whole = split(images, ["a"])
    one, again, other = (split(images, ["a"], 12, seed) for seed in (0, 0, 1))
    assert one.sampled
    assert not whole.sampled
    assert one.images.tolist() == again.images.tolist() != other.images.tolist()
    assert len(set(one.images.tolist())) == 12
    expected = [row for row, image in zip(whole.rows, whole.image, strict=True) if image in one.images]
    assert one.rows.tolist() == expected
    assert one.per_image.tolist() == whole.per_image[one.images].tolist()


def test_what_cannot_be_analysed(split: MakeSplit, write: Callable[..., Path], tmp_path: Path) -> None:
    with pytest.raises(DataError, match="holds no images"):
        split([], ["a"])
    empty = split([(10, 10, []), (10, 10, [("a", 0, 0, 5, 5, "crowd")])], ["a"])
    with pytest.raises(DataError, match="hold no object"):
        check_together([empty])
    one = split(IMAGES, ["a", "b"])
    other = Split.of("val", CocoIndex.load(write("val", IMAGES, ["a", "b", "c"]), tmp_path / "images"), None, 0)
    with pytest.raises(DataError, match="'c' is in one of them only"):
        check_together([one, other])
    assert describe(empty, None).side == {}


@pytest.mark.parametrize("name", ["bccd", "nuclei", "balloon", "aerial_cars"])
def test_real_sets_agree_with_their_descriptions(shared: Path, name: str) -> None:
    folder = shared / "datasets" / name
    readme = (folder / "README.md").read_text(encoding="utf-8")
    facts = [
        describe(
            Split.of(part, CocoIndex.load(folder / "annotations" / f"{part}.json", folder / "images"), None, 0), None
        )
        for part in ("train", "val", "test")
    ]
    for part in facts:
        row = re.search(rf"^\| {part.name} \| (\d+) \| (\d+) \| (\d+) \| (\d+) \|", readme, re.MULTILINE)
        assert row is not None
        assert [part.images, part.empty_images, part.objects, part.crowd_regions] == list(map(int, row.groups()))
        for c in part.classes:
            counts = re.search(rf"^\| {re.escape(c.name)} \| \d+ \| (\d+) \| (\d+) \| (\d+) \|", readme, re.MULTILINE)
            assert counts is not None
            assert c.objects == int(counts.groups()[facts.index(part)])
    if name in ("bccd", "aerial_cars"):  # no masks, so that the annotated area is the box's, as there
        sizes = re.search(r"small \(< 32\^2\) (\d+), medium (\d+), large \(>= 96\^2\) (\d+)", readme)
        assert sizes is not None
        assert [sum(f.coco[s] for f in facts) for s in ("small", "medium", "large")] == list(map(int, sizes.groups()))
