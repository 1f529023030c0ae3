"""Boxes follow the pixels through every resize, and find their way back."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError

from detector.data.resize import Fixed, Letterbox, Resize, ShortEdge, Sizing, resample
from detector.data.sample import Sample
from detector.structures import Detections


def make_sample(size: tuple[int, int], boxes: np.ndarray | None = None, image: np.ndarray | None = None) -> Sample:
    boxes = np.zeros((0, 4)) if boxes is None else np.asarray(boxes)
    return Sample(
        image=np.zeros((*size, 3), dtype=np.uint8) if image is None else image,
        boxes=boxes.astype(np.float32),
        labels=np.arange(len(boxes)),
        rows=10 + np.arange(len(boxes)),
        crowd=boxes[:1].astype(np.float32),
        image_id=7,
        original_size=size,
        scale=np.ones(2, dtype=np.float32),
        offset=np.zeros(2, dtype=np.float32),
    )


def random_boxes(size: tuple[int, int], count: int, rng: np.random.Generator) -> np.ndarray:
    """(count, 4) float64 within the image, at least one pixel wide and high."""
    corner = rng.uniform(0, 1, (count, 2)) * (np.array(size[::-1]) - 1)
    far = corner + 1 + rng.uniform(0, 1, (count, 2)) * (np.array(size[::-1]) - 1 - corner)
    return np.concatenate([corner, far], 1)


def back(sample: Sample) -> np.ndarray:
    """The sample's boxes in original pixels, by the code that brings detections back."""
    boxes = torch.from_numpy(sample.boxes)
    found = Detections(boxes, torch.ones(len(boxes)), torch.zeros(len(boxes), dtype=torch.int64))
    size = torch.tensor(sample.original_size)
    return found.to_original(torch.from_numpy(sample.scale), torch.from_numpy(sample.offset), size).boxes.numpy()


sizes = st.tuples(st.integers(1, 700), st.integers(1, 700))
ways = st.one_of(
    st.builds(ShortEdge, short=st.integers(1, 600), long=st.integers(1, 900)),
    st.builds(Letterbox, size=st.tuples(st.integers(1, 500), st.integers(1, 500))),
    st.builds(Fixed, size=st.tuples(st.integers(1, 500), st.integers(1, 500))),
)


@settings(max_examples=150, deadline=None)
@given(size=sizes, way=ways, seed=st.integers(0, 10**6))
def test_boxes_go_there_and_back(size: tuple[int, int], way: Sizing, seed: int) -> None:
    boxes = random_boxes(size, 5, np.random.default_rng(seed))
    there = way(make_sample(size, boxes))
    height, width = there.image.shape[:2]
    assert (there.boxes >= 0).all()
    assert (there.boxes <= np.array([width, height, width, height]) * (1 + 1e-6)).all()
    assert np.abs(back(there) - boxes).max() < 1e-3
    assert there.image.shape[:2] == way.target(size)
    if (canvas := way.canvas()) is not None:
        assert there.image.shape[0] <= canvas[0]
        assert there.image.shape[1] <= canvas[1]


@pytest.mark.parametrize(
    "way",
    [ShortEdge(short=90, long=400), ShortEdge(short=500, long=900), Letterbox(size=(100, 300)), Fixed(size=(150, 150))],
    ids=str,
)
def test_boxes_lie_on_the_pixels(way: Sizing) -> None:
    rng = np.random.default_rng(0)
    for size in ((240, 320), (301, 203), (97, 640)):
        for box in np.round(random_boxes(size, 6, rng)):
            if (box[2:] - box[:2]).min() < 12:
                continue
            image = np.zeros((*size, 3), dtype=np.uint8)
            x1, y1, x2, y2 = box.astype(int)
            image[y1:y2, x1:x2] = 255
            out = way(make_sample(size, box[None], image))
            # The sum of the brightness along the middle of the box is its width, to the fraction of a pixel.
            x, y = (out.boxes[0, :2] + out.boxes[0, 2:]).astype(int) // 2
            light = out.image[..., 0].astype(float) / 255
            extent = np.array([light[y].sum(), light[:, x].sum()])
            assert np.abs(extent - (out.boxes[0, 2:] - out.boxes[0, :2])).max() < 0.6
            middle = np.array([np.average(np.arange(len(p)) + 0.5, weights=p) for p in (light[y], light[:, x])])
            assert np.abs(middle - (out.boxes[0, :2] + out.boxes[0, 2:]) / 2).max() < 0.6


def test_short_edge_keeps_the_shape_and_the_limit() -> None:
    way = ShortEdge(short=240, long=400)
    assert way.target((480, 640)) == (240, 320)
    assert way.target((640, 480)) == (320, 240)
    assert way.target((100, 1000)) == (40, 400)
    assert way.target((60, 80)) == (240, 320)
    assert way.target((1, 5000)) == (1, 400)


def test_letterbox_fits_and_fixed_stretches() -> None:
    assert Letterbox(size=(320, 640)).target((480, 640)) == (320, 427)
    assert Letterbox(size=(320, 640)).target((100, 1000)) == (64, 640)
    assert Fixed(size=(320, 640)).target((480, 640)) == (320, 640)


def test_multi_scale_choices_replace_the_set_length() -> None:
    short = ShortEdge(short=240, long=1000, multi_scale=(100, 200))
    assert [short.target((480, 640), c) for c in (None, 0, 1)] == [(240, 320), (100, 133), (200, 267)]
    letter = Letterbox(size=(320, 640), multi_scale=(320,))
    assert letter.canvas(0) == (160, 320)
    assert letter.target((480, 640), 0) == (160, 213)
    assert Fixed(size=(64, 64), multi_scale=(96,)).target((5, 5), 0) == (96, 96)


def test_same_size_copies_nothing() -> None:
    sample = make_sample((48, 64))
    assert Fixed(size=(48, 64))(sample) is sample


def test_shrinking_averages_instead_of_skipping_pixels() -> None:
    stripes = np.zeros((256, 256, 3), dtype=np.uint8)
    stripes[:, ::2] = 200
    small = resample(stripes, (50, 50))
    assert np.abs(small.astype(int) - 100).max() <= 12


def test_settings_are_checked() -> None:
    read = TypeAdapter(Resize).validate_python
    assert read({"type": "letterbox", "size": [320, 320]}) == Letterbox(size=(320, 320))
    for wrong in (
        {"type": "short_edge", "short": 0},
        {"type": "fixed", "size": [10]},
        {"type": "square"},
        {"short": 1},
    ):
        with pytest.raises(ValidationError):
            read(wrong)
