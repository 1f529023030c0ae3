"""Which images an epoch shows: by plain counting, on one rank or several, from any step on."""

from __future__ import annotations

import json
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError

from detector import seeding
from detector.data.coco import CocoData, CocoIndex
from detector.data.loader import train_loader
from detector.data.order import AnyOrdering, ClassBalanced, Order, Ordering, RepeatFactor, Shuffle
from detector.data.resize import Fixed
from detector.data.sampler import Key, Stream
from detector.data.transforms import Color, Flip
from detector.errors import DataError
from tests.data import small_coco
from tests.data.test_loader import same

# Classes of the objects of each image; 0 is in most of them, 3 in one; the last two images hold none.
CLASSES = [[0], [0, 0], [0, 1], [0], [0, 1, 1], [0, 2], [0], [3, 3, 0], [0], [1], [], []]
TALL = {1, 4, 5, 9, 10}


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> CocoIndex:
    folder = tmp_path_factory.mktemp("order")
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for i, classes in enumerate(CLASSES):
        height, width = (60, 40) if i in TALL else (40, 60)
        images.append({"id": i + 1, "file_name": f"{i + 1}.png", "height": height, "width": width})
        for c in classes:
            annotation = {"id": len(annotations) + 1, "image_id": i + 1, "category_id": c + 1, "bbox": [1, 1, 9, 9]}
            annotations.append({**annotation, "bbox": [1.0, 1.0, 9.0, 9.0], "area": 81.0, "iscrowd": 0})
    # A crowd region of the rarest class counts for nothing.
    annotations.append({**annotations[0], "id": 999, "category_id": 4, "iscrowd": 1, "segmentation": []})
    content = {"images": images, "annotations": annotations}
    content["categories"] = [{"id": c + 1, "name": f"class {c}"} for c in range(5)]
    path = folder / "annotations.json"
    path.write_text(json.dumps(content), encoding="utf-8")
    return CocoIndex.load(path, folder)


def test_repeat_factors_are_those_of_the_publication(index: CocoIndex) -> None:
    threshold, n = 0.5, len(CLASSES)
    expected = []
    for classes in CLASSES:
        shares = [sum(c in other for other in CLASSES) / n for c in set(classes)]
        expected.append(max([1.0, *(max(1.0, (threshold / share) ** 0.5) for share in shares)]))
    weights = RepeatFactor(threshold=threshold).weights(index)
    assert np.allclose(weights / weights[0], np.array(expected) / expected[0])
    assert weights.mean() == pytest.approx(1)
    assert np.allclose(RepeatFactor(threshold=1e-3).weights(index), 1), "nothing is rare"


def test_class_balance_is_drawing_a_class_and_then_an_image(index: CocoIndex) -> None:
    chance = np.zeros(len(CLASSES))
    present = range(4)  # class 4 has no object
    for c in present:
        holding = [i for i, classes in enumerate(CLASSES) if c in classes]
        chance[holding] += 1 / len(present) / len(holding)
    weights = ClassBalanced().weights(index)
    assert np.allclose(weights[:-2], chance[:-2] * 10)
    assert weights[-2:].tolist() == [1, 1], "images without objects keep their share"


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10**6), length=st.integers(1, 60))
def test_every_image_gets_its_weight_rounded_down_or_up(seed: int, length: int) -> None:
    weights = np.random.default_rng(seed).lognormal(0, 1, length)
    weights /= weights.mean()
    total = np.zeros(length)
    for epoch in range(200):
        images, repeats = Order(length, seed, weights).epoch(epoch)
        assert len(images) == length
        counts = np.bincount(images, minlength=length)
        assert (counts >= np.floor(weights - 1e-9)).all()
        assert (counts <= np.ceil(weights + 1e-9)).all()
        total += counts
        for i in set(images.tolist()):
            assert repeats[images == i].tolist() == list(range(counts[i]))
    assert np.abs(total / 200 - weights).max() < 0.2


def test_without_weights_the_order_is_a_permutation_of_seed_and_epoch() -> None:
    for epoch in range(3):
        images, repeats = Order(9, 4).epoch(epoch)
        assert np.array_equal(images, seeding.generator(4, seeding.ORDER, epoch).permutation(9))
        assert not repeats.any()


@settings(max_examples=100, deadline=None)
@given(
    seed=st.integers(0, 10**6), length=st.integers(1, 90), batch=st.integers(1, 16), share=st.floats(0, 1),
    weighted=st.booleans(),
)  # fmt: skip
def test_steps_hold_one_shape_as_far_as_they_go(
    seed: int, length: int, batch: int, share: float, weighted: bool
) -> None:
    rng = np.random.default_rng(seed)
    wide = rng.random(length) < share
    weights = rng.uniform(0.5, 1.5, length) if weighted else None
    if weights is not None:
        weights /= weights.mean()
    epochs = 4
    order, free = Order(length, seed, weights, wide), Order(length, seed, weights)
    stream = []
    for epoch in range(epochs):
        images, _ = order.epoch(epoch, batch)
        assert sorted(images.tolist()) == sorted(free.epoch(epoch, batch)[0].tolist()), "nothing lost, nothing added"
        stream += images.tolist()
    mixed = 0
    for step in range(len(stream) // batch):
        part = range(step * batch, (step + 1) * batch)
        inside = part[0] // length == part[-1] // length
        kinds = {bool(wide[stream[p]]) for p in part}
        mixed += inside and len(kinds) == 2
    assert mixed <= 2 * epochs, "what is left over of both fills a step or two of an epoch"


def stream(
    index: CocoIndex, ordering: Ordering, batch: int, start: int = 0, rank: int = 0, world: int = 1
) -> list[Any]:
    order = ordering.of(index, 3)
    return list(
        Stream(
            len(index), batch_size=batch, seed=3, start_step=start, stop_step=13, rank=rank, world=world, order=order
        )
    )


ORDERINGS = [
    Shuffle(group_shapes=True),
    RepeatFactor(threshold=0.9),
    ClassBalanced(),
    ClassBalanced(group_shapes=True),
]


@pytest.mark.parametrize("ordering", ORDERINGS, ids=str)
def test_ranks_and_restarts_see_the_same_stream(index: CocoIndex, ordering: Ordering) -> None:
    whole = stream(index, ordering, 4)
    for start in (1, 2, 7, 12):
        assert stream(index, ordering, 4, start) == whole[start:]
    ranks = [stream(index, ordering, 2, rank=rank, world=2) for rank in (0, 1)]
    assert [list(chain(*parts)) for parts in zip(*ranks, strict=True)] == whole
    assert {key.epoch for batch in whole for key in batch} == {0, 1, 2, 3, 4}


def test_an_image_that_comes_again_in_an_epoch_is_augmented_anew(tmp_path: Path) -> None:
    content = small_coco.document()
    data = CocoData(CocoIndex.load(*small_coco.write(tmp_path, json.dumps(content))))

    def batches(workers: int, start: int = 0) -> list[Any]:
        augment, order = (Flip(), Color(probability=1)), ClassBalanced()
        loader = train_loader(
            data, augment=augment, resize=Fixed(size=(32, 32)), batch_size=3, seed=0, start_step=start, stop_step=8,
            workers=workers, order=order,
        )  # fmt: skip
        return list(loader)

    straight = batches(0)
    assert same(straight, batches(2))
    assert same(straight[5:], batches(1, start=5))
    source = train_loader(
        data,
        augment=(Color(probability=1),),
        resize=Fixed(size=(32, 32)),
        batch_size=1,
        seed=0,
        start_step=0,
        stop_step=1,
    )._loader.dataset
    shown = {source.sample(Key(2, 2, None, repeat), []).image.tobytes() for repeat in range(8)}
    assert len(shown) > 2


def test_balancing_needs_objects(tmp_path: Path) -> None:
    content = small_coco.document() | {"annotations": []}
    index = CocoIndex.load(*small_coco.write(tmp_path, json.dumps(content)))
    with pytest.raises(DataError, match=r"no object to balance classes by: set data\.order\.type=shuffle"):
        ClassBalanced().weights(index)
    assert np.allclose(RepeatFactor().weights(index), 1)


def test_settings_are_checked() -> None:
    read = TypeAdapter(AnyOrdering).validate_python
    for ordering in ORDERINGS:
        assert read(ordering.model_dump(mode="json")) == ordering
    for wrong in ({"type": "repeat_factor", "threshold": 0}, {"type": "random"}, {"type": "shuffle", "groups": True}):
        with pytest.raises(ValidationError):
            read(wrong)
