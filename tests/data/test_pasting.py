"""What is pasted behind the resize is what would be pasted before it, only smaller; and drawn once."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar

import numpy as np
import pytest

from detector.data.coco import CocoData, CocoIndex
from detector.data.copy_paste import CopyPaste
from detector.data.frames import SAME, Frame, scaling
from detector.data.loader import TrainSource
from detector.data.outlines import Bitmap, Outlines, Polygons
from detector.data.pasting import rasterize
from detector.data.resize import Fixed, Letterbox
from detector.data.sample import Sample
from detector.data.sampler import Key
from detector.data.shapes import ShapeSet, ensure
from detector.data.steps import Step
from detector.data.transforms import Flip
from tests.data import drawn

COUNT = 12


class Early(CopyPaste):
    """Copy-paste that is always done before the resize."""

    commutes: ClassVar[bool] = False


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> CocoData:
    folder = tmp_path_factory.mktemp("shapes")
    ensure(folder, ShapeSet("plain", COUNT, (160, 240), seed=3))
    return CocoData(CocoIndex.load(folder / "annotations.json", folder / "images"))


def source(data: CocoData, step: Step, **other: Any) -> TrainSource:
    settings: dict[str, Any] = {"resize": Fixed(size=(80, 120)), "seed": 0, "epochs": 10.0, "pad_multiple": 1}
    settings |= {"max_unreadable": 0, "partner_cache": 16} | other
    return TrainSource(data, augment=(step, Flip()), **settings)


def test_pasting_behind_the_resize_shows_what_pasting_before_it_shows(data: CocoData) -> None:
    late, early = source(data, CopyPaste()), source(data, Early())
    apart, same = list[float](), 0
    for epoch in range(8):
        for i in range(COUNT):
            one, other = (s.sample(Key(epoch, i, None), []) for s in (late, early))
            assert one.image.shape == other.image.shape == (80, 120, 3)
            if one.rows.tolist() == other.rows.tolist():
                same += 1
                apart += np.abs(one.boxes - other.boxes).max(1).tolist()
    assert same > 0.9 * 8 * COUNT, "now and then a rest is a pixel smaller, and dropped"
    # Places are whole pixels, here of half the size; a sliver that is just hidden or just not moves a side by more.
    assert np.quantile(apart, 0.95) <= 1
    assert np.mean(apart) < 0.5


def test_before_the_resize_where_it_enlarges(data: CocoData) -> None:
    large = Letterbox(size=(320, 480))
    late, early = source(data, CopyPaste(), resize=large), source(data, Early(), resize=large)
    for i in range(COUNT):
        one, other = (s.sample(Key(0, i, None), []) for s in (late, early))
        assert np.array_equal(one.image, other.image)
        assert np.array_equal(one.boxes, other.boxes)


def black_and_white() -> tuple[Sample, Sample]:
    """A black image, and a white one with an ellipse in its middle."""
    box = np.array([[60, 40, 140, 120]], dtype=np.float32)
    ellipse = drawn.shape("ellipse", tuple(box[0].tolist()), (160, 200))
    black = replace(drawn.make((160, 200), 0, 0, np.random.default_rng(0)), image=np.zeros((160, 200, 3), np.uint8))
    white = replace(
        black, image=np.full((160, 200, 3), 255, np.uint8), boxes=box, labels=np.array([1]), rows=np.array([9]),
        outlines=Outlines((ellipse,), SAME[None], np.ones(1, dtype=bool)),
    )  # fmt: skip
    return black, white


def pasted(step: CopyPaste, seed: int, zoom: tuple[float, float]) -> Sample:
    black, white = black_and_white()
    hand: Any = drawn.Hand([white], zoom=zoom)
    return step(black, np.random.default_rng(seed), hand)


@pytest.mark.parametrize("zoom", [(0.5, 0.5), (0.5, 0.25)])
def test_partners_are_resized_as_the_sample_was(zoom: tuple[float, float]) -> None:
    for seed in range(10):
        whole, small = pasted(CopyPaste(), seed, (1.0, 1.0)), pasted(CopyPaste(), seed, zoom)
        (left, top, right, bottom), (x1, y1, x2, y2) = whole.boxes[0], small.boxes[0]
        assert x2 - x1 == pytest.approx((right - left) * zoom[1], abs=1.5)
        assert y2 - y1 == pytest.approx((bottom - top) * zoom[0], abs=1.5)
        assert drawn.extent(small.image[..., 0] > 0) == pytest.approx(small.boxes[0], abs=1)


def test_a_fading_edge_shrinks_with_the_image() -> None:
    def fading(out: Sample) -> int:
        return int(((out.image[..., 0] > 0) & (out.image[..., 0] < 255)).sum())

    for seed in range(5):
        whole, half = (pasted(CopyPaste(edge=8), seed, zoom) for zoom in ((1.0, 1.0), (0.5, 0.5)))
        assert fading(half) == pytest.approx(fading(whole) / 4, rel=0.3), "half as long and half as wide"


def test_objects_are_drawn_together_as_each_would_be_alone() -> None:
    size = (90, 120)
    for seed in range(20):
        rng = np.random.default_rng(seed)
        sample = drawn.make(size, 6, 0, rng)
        assert sample.outlines is not None
        outlines = sample.outlines.mapped(scaling(rng.uniform(0.3, 1.5, 2), rng.uniform(-30, 30, 2)))
        frame = Frame(10, 5, 100, 80)
        cover, boxes = outlines.drawn_together(frame)
        alone = [outlines.drawn(i, frame) for i in range(6)]
        assert np.array_equal(cover, np.max(alone, 0))
        for box, pixels in zip(boxes, alone, strict=True):
            assert box.tolist() == Bitmap(pixels, frame.left, frame.top).bounds().tolist()


def test_what_is_cut_to_nearly_nothing_is_neither_shown_nor_labelled() -> None:
    """Two objects of which the border leaves a tenth of the box, and of one of them no pixel."""
    box = np.array([[90, 10, 190, 60], [90, 100, 190, 150], [20, 20, 60, 60]], dtype=np.float32)
    triangle = Polygons((np.array([[90.0, 150], [190, 100], [190, 150]]),))
    black, _ = black_and_white()
    black = replace(black, image=black.image[:, :100])
    objects = replace(
        black, boxes=box, labels=np.arange(3), rows=np.arange(3),
        outlines=Outlines(
            (Polygons.rectangle(box[0]), triangle, Polygons.rectangle(box[2])),
            np.broadcast_to(SAME, (3, 3, 3)), np.ones(3, dtype=bool),
        ),
    )  # fmt: skip
    found, cover = rasterize(objects, Frame.of(black.image), 0.2)
    assert found.rows.tolist() == [2]
    assert cover.sum() == 40 * 40, "what is not labelled is not pasted either"
    found, cover = rasterize(objects, Frame.of(black.image), 0.05)
    assert found.rows.tolist() == [0, 2], "of the triangle's 5000 square pixels, 25 lie within"
    assert cover.sum() == 40 * 40 + 10 * 50
    assert found.outlines is not None
    assert found.outlines.extent(0).tolist() == [90, 10, 100, 60], "as far as it is seen"
