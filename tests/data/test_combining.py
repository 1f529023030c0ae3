"""Combining several images in the loader: repeatable to the byte, bad images and masks told, schedules by epoch."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from detector.data.coco import CocoData, CocoIndex, Reader
from detector.data.copy_paste import CopyPaste, SmallCopyPaste
from detector.data.erase import Cutout, GridMask
from detector.data.frames import Frame
from detector.data.loader import Loader, TrainSource, train_loader
from detector.data.mosaic import Mixup, Mosaic
from detector.data.perspective import LargeScaleJitter, RandomPerspective
from detector.data.pool import Pool
from detector.data.resize import Fixed, Letterbox
from detector.data.sample import Sample
from detector.data.sampler import Key
from detector.data.shapes import ShapeSet, ensure
from detector.data.steps import Step, When, active, never_on
from detector.data.transforms import Color, Flip, FromAlbumentations, RandomScaleCrop
from detector.errors import DataError
from tests.data import small_coco
from tests.data.test_loader import same

COUNT = 11
STRONG: tuple[Step, ...] = (
    LargeScaleJitter(size=(48, 64), scale=(0.5, 2), when=When(probability=0.5)),
    CopyPaste(when=When(probability=0.7)),
    SmallCopyPaste(below=20, margin=0, when=When(after=1, ramp=2)),
    Mosaic(size=(64, 64), when=When(probability=0.8, off_last=1)),
    Mixup(when=When(until=2)),
    RandomPerspective(when=When(ramp=3)),
    RandomScaleCrop(),
    Cutout(when=When(probability=0.3)),
    GridMask(when=When(probability=0.3)),
    FromAlbumentations(name="GaussianBlur", arguments={"p": 0.3}),
    Flip(),
    Color(when=When(ramp=2)),
)
EVERY: tuple[Step, ...] = (
    *(Mosaic(size=(160, 192)), Mosaic(size=(160, 192), tiles=9), Mixup(), LargeScaleJitter(size=(160, 192))),
    *(CopyPaste(), CopyPaste(jitter="large", edge=0, share=1.0), CopyPaste(by="box", edge=6), SmallCopyPaste()),
    *(Cutout(), GridMask(), RandomPerspective(), RandomPerspective(degrees=90, tilt=0.3, shear=20)),
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "shapes"
    ensure(folder, ShapeSet("plain", COUNT, (48, 64), seed=1))
    return folder


@pytest.fixture
def data(folder: Path) -> CocoData:
    return CocoData(CocoIndex.load(folder / "annotations.json", folder / "images"))


def training(data: CocoData, start: int = 0, stop: int = 11, workers: int = 0, **other: Any) -> Loader:
    settings = {
        "augment": STRONG,
        "resize": Letterbox(size=(48, 64)),
        "batch_size": 4,
        "seed": 5,
        "epochs": 4.0,
    } | other
    return train_loader(data, start_step=start, stop_step=stop, workers=workers, **settings)


def source(data: CocoData, *augment: Step, **other: Any) -> TrainSource:
    settings = {"resize": Letterbox(size=(160, 192)), "seed": 0, "epochs": 10.0, "pad_multiple": 1}
    return TrainSource(data, augment=augment, **(settings | {"max_unreadable": 3, "partner_cache": 4} | other))


def test_workers_restarts_and_caches_change_no_byte(data: CocoData) -> None:
    straight = list(training(data))
    for workers in (1, 2, 4):
        assert same(straight, list(training(data, workers=workers)))
    for start in (1, 5, 9):
        assert same(straight[start:], list(training(data, start, workers=start % 3)))
    assert same(straight, list(training(data, partner_cache=0)))
    assert not same(straight, list(training(data, seed=6)))
    assert not same(straight, list(training(data, epochs=40.0))), "the last epochs are others"


def test_two_ranks_see_what_one_sees(data: CocoData) -> None:
    whole = list(training(data, stop=5))
    ranks = [list(training(data, stop=5, batch_size=2, rank=rank, world=2)) for rank in (0, 1)]
    for step, batch in enumerate(whole):
        parts = [ranks[rank][step] for rank in (0, 1)]
        assert torch.equal(batch.images, torch.cat([p.images for p in parts]))
        assert torch.equal(batch.objects.boxes, torch.cat([p.objects.boxes for p in parts]))


def test_kept_partners_are_never_changed(data: CocoData) -> None:
    reader = Reader(data, max_unreadable=0, masks=True, keep=1 << 20)
    first = {i: reader.read(i, [], keep=True) for i in range(COUNT)}
    assert first[3] is reader.read(3, []), "kept"
    step_source = source(data, *EVERY)
    step_source.reader = reader
    for i in range(COUNT):
        step_source.sample(Key(0, i, None), [])
    for i in range(COUNT):
        assert np.array_equal(first[i].image, data[i].image)


def test_what_is_kept_stays_within_its_bytes(data: CocoData) -> None:
    size = data[0].image.nbytes
    reader = Reader(data, max_unreadable=0, masks=False, keep=5 * size)
    kept = [reader.read(i, [], keep=True) for i in range(COUNT)]
    assert reader.read(COUNT - 1, []) is kept[-1]
    assert reader.read(0, []) is not kept[0], "the oldest has given way"
    assert reader._bytes <= 5 * size
    small = Reader(data, max_unreadable=0, masks=False, keep=3 * size)
    assert small.read(0, [], keep=True) is not small.read(0, []), "an image too large to keep four of is not kept"


def test_partners_are_others_and_hold_what_is_asked_for(data: CocoData) -> None:
    reader = Reader(data, max_unreadable=0, masks=True, keep=0)
    rng = np.random.default_rng(0)
    pool = Pool(reader, 4, [])
    drawn = {pool.draw(rng).image_id for _ in range(200)}
    assert drawn == set(data.index.image_ids.tolist()) - {int(data.index.image_ids[4])}
    empty = [i for i in range(COUNT) if len(data[i].boxes) == 0]
    holding = {pool.draw(rng, "masks").image_id for _ in range(200)}
    assert holding == drawn - {int(data.index.image_ids[i]) for i in empty}


def test_masks_fit_images_that_are_read_at_another_scale(data: CocoData) -> None:
    class Half(CocoData):
        def __getitem__(self, i: int) -> Sample:
            return Fixed(size=(24, 32))(super().__getitem__(i))

    reader = Reader(Half(data.index), max_unreadable=0, masks=True, keep=0)
    for i in range(COUNT):
        sample = reader.read(i, [])
        assert sample.outlines is not None
        for k, box in enumerate(sample.boxes):
            assert np.abs(sample.outlines.extent(k) - box).max() <= 0.6, "half of a pixel of the annotation"


@pytest.mark.parametrize("workers", [0, 1])
def test_an_unreadable_partner_is_named_counted_and_replaced(tmp_path: Path, workers: int) -> None:
    ensure(tmp_path / "set", ShapeSet("plain", COUNT, (48, 64), seed=1))
    data = CocoData(CocoIndex.load(tmp_path / "set" / "annotations.json", tmp_path / "set" / "images"))
    data.index.image_path(3).write_bytes(b"no image")
    loader = training(data, stop=1, batch_size=3, workers=workers, augment=(Mosaic(size=(64, 64), tiles=9),), seed=1)
    (batch,) = list(loader)
    assert 4 not in batch.ids.tolist(), "it is a partner only"
    assert any("000004.png" in line for line in batch.failures)
    assert len(loader.unreadable) == 1
    with pytest.raises(DataError, match=r"could not be read.*000004\.png"):
        list(training(data, stop=4, workers=workers, augment=(Mosaic(size=(64, 64)),), max_unreadable=0))


def test_a_schedule_is_a_function_of_epoch_and_length() -> None:
    when = When(after=2, until=8, ramp=3)
    assert [when.strength(e, 20) for e in range(10)] == [0, 0, 0.25, 0.5, 0.75, 1, 1, 1, 0, 0]
    last = When(off_last=3)
    assert [last.strength(e, 6) for e in range(6)] == [1, 1, 1, 0, 0, 0]
    assert [last.strength(e, 6.2) for e in range(7)] == [1, 1, 1, 0, 0, 0, 0], (
        "a run's last epoch may be a small part of one"
    )
    assert When(off_last=3).strength(99, 200) == 1

    steps = (Mosaic(when=When(probability=0.5, ramp=1)), Color(hue=0.2, when=When(probability=0.5, ramp=1)), Flip())
    first, second = active(steps, 0, 9), active(steps, 1, 9)
    assert [a.probability for a in first] == [0.25, 0.5, 1], "what has no amounts is more seldom at first"
    assert isinstance(first[1].step, Color)
    assert first[1].step.hue == pytest.approx(0.1)
    assert first[1].step.brightness == pytest.approx(0.1)
    assert [a.probability for a in second] == [0.5, 0.5, 1]
    assert second[1].step is steps[1]
    mild = active((RandomPerspective(scale=(0.25, 4), degrees=8, when=When(ramp=1)),), 0, 9)[0].step
    assert isinstance(mild, RandomPerspective)
    assert mild.scale == pytest.approx((0.5, 2))
    assert mild.degrees == 4
    assert never_on((Mosaic(when=When(after=5)), Mixup(when=When(off_last=9))), 5) == [
        "augment.0.when: is never on in a run of 5 epochs",
        "augment.1.when: is never on in a run of 5 epochs",
    ]
    assert never_on((Mosaic(when=When(after=4)),), 5) == []


def test_strong_augmentation_ends_with_its_epoch(data: CocoData) -> None:
    made = source(data, Mosaic(size=(96, 96), when=When(off_last=2)), epochs=5.0)
    plain = source(data, epochs=5.0)
    for epoch in range(5):
        sample, bare = (s.sample(Key(epoch, 0, None), []) for s in (made, plain))
        assert np.array_equal(sample.image, bare.image) == (epoch >= 3)


def test_a_step_that_is_never_on_is_told(data: CocoData, caplog: pytest.LogCaptureFixture) -> None:
    source(data, Mosaic(when=When(after=50)))
    assert "augment.0.when: is never on in a run of 10 epochs" in caplog.text


def test_a_step_without_a_schedule_draws_what_it_always_drew(data: CocoData) -> None:
    plain, always = source(data, Flip(), RandomScaleCrop()), source(data, Flip(when=When()), RandomScaleCrop())
    for i in range(COUNT):
        a, b = (s.sample(Key(0, i, None), []) for s in (plain, always))
        assert np.array_equal(a.image, b.image)


Broken = Callable[..., CocoData]


@pytest.fixture
def broken(tmp_path: Path) -> Broken:
    """The small set with changes to annotation 101, a dog with a polygon in image 3."""

    def make(**changes: Any) -> CocoData:
        content = small_coco.document()
        content["annotations"][0] |= changes
        return CocoData(CocoIndex.load(*small_coco.write(tmp_path, json.dumps(content))))

    return make


def test_copy_paste_by_mask_needs_masks(broken: Broken) -> None:
    data = broken(segmentation=[])
    with pytest.raises(DataError, match=r"annotations\.json: no object has a mask .* `by: box`"):
        training(data, augment=(CopyPaste(),))
    assert len(list(training(data, stop=3, augment=(CopyPaste(by="box"),)))) == 3


def test_pasting_needs_objects(tmp_path: Path) -> None:
    content = small_coco.document() | {"annotations": []}
    data = CocoData(CocoIndex.load(*small_coco.write(tmp_path, json.dumps(content))))
    with pytest.raises(DataError, match=r"holds no object .* take the step out"):
        training(data, augment=(CopyPaste(by="box"),))


SQUARE = [10.0, 5.0, 30.0, 5.0, 30.0, 25.0, 10.0, 25.0]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"segmentation": [[10.0, 5.0, 30.0, 25.0]]}, "a polygon of 4 numbers, expected at least 6"),
        ({"segmentation": [[*SQUARE, 7.0]]}, "a polygon of 9 numbers, expected an even count"),
        ({"segmentation": {"size": [9, 9], "counts": [0, 81]}}, r"of size \[9, 9\], expected \[height, width\]"),
        ({"segmentation": {"size": [40, 60], "counts": [0, 81]}}, "of 81 pixels, expected 2400"),
        ({"segmentation": [[v + 20 for v in SQUARE]]}, r"the mask reaches from \(30, 25\).* its bbox from \(10, 5\)"),
        ({"segmentation": [[*([200.0, 300.0] * 3)]]}, "the mask reaches from .* one of them is wrong"),
    ],
    ids=["two points", "odd", "size", "counts", "elsewhere", "outside"],
)
@pytest.mark.parametrize("workers", [0, 1])
def test_a_wrong_mask_is_named_when_it_is_used(
    broken: Broken, changes: dict[str, Any], message: str, workers: int
) -> None:
    data = broken(**changes)
    with pytest.raises(DataError, match=message) as caught:
        list(training(data, augment=(CopyPaste(),), workers=workers))
    assert "annotation id 101" in str(caught.value)
    assert "check_data" in str(caught.value)
    assert len(list(training(data, stop=3, augment=(Mosaic(size=(64, 64)), Mixup())))) == 3, "who needs no mask is free"


def test_a_transform_that_empties_every_image_leaves_empty_images(data: CocoData) -> None:
    everything = GridMask(share=0.95, visible=1.0)
    batches = list(training(data, augment=(everything,)))
    assert len(batches) == 11
    assert sum(len(b.objects) for b in batches) == 0
    assert all(len(b) == 4 for b in batches)


def test_an_object_without_a_mask_among_others_is_not_pasted_but_hides(broken: Broken) -> None:
    data = broken()
    reader = Reader(data, max_unreadable=0, masks=True, keep=0)
    assert reader.with_masks.tolist() == [1]
    masked = reader.read(1, [])
    assert masked.outlines is not None
    assert masked.outlines.true.tolist() == [True, False]
    for seed in range(20):
        out = CopyPaste(visible=0)(reader.read(0, []), np.random.default_rng(seed), Pool(reader, 0, []))
        assert set(out.labels[-1:].tolist()) == {1}, "the dog, of which there is a mask"
        assert out.rows[-1] == masked.rows[0]


@pytest.mark.parametrize("name", ["balloon", "nuclei", "coco_tiny"])
def test_real_sets(shared: Path, name: str) -> None:
    """Every step on photographs with polygons and crowds: sound boxes, masks in them, labels of their annotations."""
    root = shared / "datasets" / name
    data = CocoData(CocoIndex.load(root / "annotations" / "train.json", root / "images"))
    index = data.index
    crowded = np.unique([index.image_of(row) for row in np.flatnonzero(index.crowd)]).tolist()
    for step in EVERY:
        made = source(data, step, resize=Fixed(size=(320, 320)), partner_cache=64)
        made.resize = type("AsItIs", (), {"target": lambda _, size, choice: size, "__call__": lambda _, s, c=None: s})()
        for i in [*range(3), *(int(c) for c in crowded[:3])]:
            out = made.sample(Key(0, i, None), failures := [])
            assert not failures
            height, width = out.image.shape[:2]
            assert np.array_equal(out.labels, index.labels[out.rows]), "labels are those of the annotations"
            assert not index.crowd[out.rows].any(), "a crowd never becomes an object"
            for boxes in (out.boxes, out.crowd):
                assert (boxes >= 0).all()
                assert (boxes <= (width, height, width, height)).all()
                assert (boxes[:, 2:] > boxes[:, :2]).all()
            if out.outlines is None:
                continue
            frame = Frame.of(out.image)
            for k, box in enumerate(out.boxes):
                bounds = out.outlines.shape(k, frame).bounds()
                whole = replace(out, boxes=bounds[None]).boxes[0]
                assert (whole[:2] < box[2:]).all(), "each box holds a part of its object"
                assert (whole[2:] > box[:2]).all()
