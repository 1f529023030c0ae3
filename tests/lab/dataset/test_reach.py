"""The rules' best recall: by hand, against one image at a time, and advice that keeps what it promises."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from detector.assign import Atss, Fcos, MaxIou, YoloRatio
from detector.data.batch import collate
from detector.data.coco import CocoData
from detector.data.index import CocoIndex
from detector.data.resize import Fixed, ShortEdge
from detector.lab.dataset import advice, reach
from detector.lab.dataset.split import Split
from detector.models.priors import Anchors, Points

MakeSplit = Callable[..., Split]


def test_by_hand(split: MakeSplit) -> None:
    """Two objects around cell centres 4, 4 and 36, 36 of stride 8, and one of 2 pixels between cells."""
    objects = [("a", 0, 0, 8, 8), ("a", 32, 32, 8, 8), ("a", 23, 23, 2, 2)]
    made = split([(64, 64, objects), (64, 64, [])], ["a"])
    found, images = reach.reach(made, None, (8,), {"p": Points(scale=1)}, None, most=10)
    recall = {r.rule: r.recall for r in found}
    assert images == 1
    assert recall["fcos"] == pytest.approx(2 / 3)  # no cell's centre lies in the small one
    assert recall["atss"] == pytest.approx(2 / 3)
    assert recall["max_iou"] == 1  # by its low-quality step
    assert recall["max_iou, low_quality none"] == pytest.approx(2 / 3)
    assert recall["yolo_ratio"] == pytest.approx(2 / 3)  # sides of 8 and 2 are four times apart
    by_rule = {r.rule: r for r in found}
    assert by_rule["max_iou, low_quality none"].positives == pytest.approx(2 / 3)
    assert by_rule["fcos"].by_size == {"below 16": pytest.approx(2 / 3)}


def test_a_recipes_rule_takes_the_place_of_its_kind() -> None:
    assert list(reach.rules(Atss())) == list(reach.rules(None))
    own = reach.rules(Atss(topk=3))
    assert own["atss (recipe's)"] == Atss(topk=3)
    assert "atss" not in own
    assert all(not rule.uses_predictions for rule in own.values())


@pytest.mark.parametrize("resize", [ShortEdge(short=240, long=300), Fixed(size=(192, 256))], ids=["short", "fixed"])
@pytest.mark.parametrize("name", ["coco_tiny", "nuclei"])
def test_batches_equal_the_loaders(shared: Path, name: str, resize: ShortEdge | Fixed) -> None:
    """Recall as counted from whole samples, read, resized and put together as in evaluation."""
    folder = shared / "datasets" / name
    index = CocoIndex.load(folder / "annotations" / "val.json", folder / "images")
    made = Split.of("val", index, None, 0)
    strides = (8, 16, 32)
    sets = {"points": Points(), "anchors": Anchors()}
    found, images = reach.reach(made, resize, strides, sets, None, most=9)
    data = CocoData(index)
    holding = np.flatnonzero(made.per_image > 0)
    chosen = holding[np.linspace(0, len(holding) - 1, 9).round().astype(int)]
    assert images == 9
    for priors_name, priors_of in sets.items():
        for rule_name, rule in (("max_iou, low_quality none", MaxIou(low_quality="none")), ("atss", Atss()),
                                ("fcos", Fcos()), ("yolo_ratio", YoloRatio())):  # fmt: skip
            counts = []
            for i in chosen:
                batch = collate([resize(data[int(i)])], pad_multiple=32, canvas=resize.canvas())
                height, width = batch.images.shape[-2:]
                priors = priors_of([(-(-height // s), -(-width // s)) for s in strides], strides)
                assigned = rule(priors, batch.objects)
                learns = assigned.object[assigned.weight > 0]
                counts.append(torch.bincount(learns, minlength=len(batch.objects)).numpy())
            count = np.concatenate(counts)
            mine = next(r for r in found if (r.priors, r.rule) == (priors_name, rule_name))
            assert mine.recall == pytest.approx((count > 0).mean(), abs=0.004)  # a box at a border, by rounding
            assert mine.positives == pytest.approx(count.mean(), rel=0.01)


def test_anchors_spread_over_levels() -> None:
    sizes = np.array([[4.0, 4], [8, 8], [16, 16], [20, 30], [60, 60]])
    made = reach.spread_over_levels(sizes, (8, 16))
    assert made.shapes(8) == ((4, 4), (8, 8), (16, 16))
    assert made.shapes(16) == ((20, 30), (60, 60))
    priors = made([(2, 3), (1, 2)], (8, 16))
    assert priors.level_sizes == (2 * 3 * 3, 1 * 2 * 2)
    assert priors.boxes[0].tolist() == [2, 2, 6, 6]


def test_advice_by_hand(split: MakeSplit) -> None:
    """Sides of 10, 20, ..., 200 in images of 400 x 600: 95 % have at least 20, which stride 8 wants as 16."""
    made = split([(400, 600, [("a", 0, 0, 10 * i, 10 * i)]) for i in range(1, 21)], ["a"])
    found = advice.advise(made)
    assert found.chosen.stride == 8
    assert found.chosen.short == 320  # 20 / 400 * 320 = 16
    assert found.chosen.long == 480
    assert found.chosen.share == pytest.approx(0.95)
    assert not found.limited
    assert found.largest == pytest.approx(np.quantile(np.arange(10, 201, 10), 0.95) * 0.8)
    assert found.strides == (8, 16, 32)  # 8 * 32 is the first above 152
    assert ShortEdge.model_validate({"type": "short_edge", "short": 320, "long": 480})
    assert found.resize == "{type: short_edge, short: 320, long: 480}"


def test_advice_for_tiny_objects(split: MakeSplit) -> None:
    """Stride 4 where 8 would enlarge too much; then as far as enlarging is allowed."""
    made = split([(400, 400, [("a", 0, 0, 6, 6)])], ["a"])
    found = advice.advise(made)
    assert (found.chosen.stride, found.chosen.short, found.limited) == (4, 544, False)
    limited = advice.advise(split([(400, 400, [("a", 0, 0, 2, 2)])], ["a"]))
    assert limited.limited
    assert limited.chosen.short == 576
    assert limited.chosen.enlargement <= advice.MOST_ENLARGED
    assert limited.chosen.share == 0


@pytest.mark.parametrize("name", ["bccd", "nuclei", "balloon", "aerial_cars", "coco_tiny"])
@pytest.mark.parametrize("wanted", [0.5, 0.95])
def test_advice_keeps_its_promise(shared: Path, name: str, wanted: float) -> None:
    folder = shared / "datasets" / name
    made = Split.of("t", CocoIndex.load(folder / "annotations" / "train.json", folder / "images"), None, 0)
    found = advice.advise(made, wanted)
    for size in found.sizes:
        resize = ShortEdge(short=size.short, long=16384)
        side = np.sqrt(made.resized_sides(resize).prod(1))
        assert (side >= 2 * size.stride * 0.99).mean() >= wanted  # 1 %: sizes of images are whole pixels
        if size.short > advice.LEAST:
            smaller = ShortEdge(short=size.short - advice.MULTIPLE, long=16384)
            assert (np.sqrt(made.resized_sides(smaller).prod(1)) >= 2 * size.stride).mean() < wanted
