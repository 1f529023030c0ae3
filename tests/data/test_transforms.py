"""Augmentation: boxes follow the pixels, labels stay with their boxes, and only the generator decides."""

from __future__ import annotations

import pickle
from dataclasses import fields, replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError

from detector.data.batch import PADDING
from detector.data.geometry import keep_visible
from detector.data.sample import Sample
from detector.data.transforms import Augmentation, Color, Flip, FromAlbumentations, RandomScaleCrop, Transform
from detector.errors import ConfigError
from tests.data.test_resize import back, make_sample, random_boxes

read = TypeAdapter(Transform).validate_python

EVERY: list[Augmentation] = [
    Flip(horizontal=0.5, vertical=0.5),
    Color(),
    RandomScaleCrop(scale=(0.4, 3.0), probability=1.0),
    FromAlbumentations(name="GaussianBlur", arguments={"p": 0.5}),
    FromAlbumentations(name="Rotate", arguments={"limit": 30, "p": 1.0}),
    FromAlbumentations(name="RandomSizedBBoxSafeCrop", arguments={"height": 90, "width": 80, "p": 1.0}),
]


def noise(size: tuple[int, int], count: int, seed: int) -> Sample:
    rng = np.random.default_rng(seed)
    return make_sample(size, random_boxes(size, count, rng), rng.integers(0, 256, (*size, 3), dtype=np.uint8))


def equal(a: Sample, b: Sample) -> bool:
    names = [f.name for f in fields(Sample) if f.name not in ("outlines", "weight", "later", "proposals")]
    return a.weight is b.weight is a.proposals is b.proposals is None and all(
        np.array_equal(getattr(a, n), getattr(b, n), equal_nan=True) for n in names
    )


@pytest.mark.parametrize("change", EVERY, ids=str)
@pytest.mark.parametrize("count", [0, 1, 9])
def test_sound_whatever_comes(change: Augmentation, count: int) -> None:
    for seed in range(8):
        sample = noise((60 + 7 * seed, 80), count, seed)
        before = pickle.dumps(sample)
        state = np.random.get_state()[1].copy()  # noqa: NPY002
        out = change(sample, np.random.default_rng(seed))
        assert pickle.dumps(sample) == before, "the given sample is not changed"
        assert np.array_equal(state, np.random.get_state()[1]), "no global randomness"  # noqa: NPY002
        assert equal(out, change(sample, np.random.default_rng(seed))), "a function of the generator alone"
        height, width = out.image.shape[:2]
        assert out.image.dtype == np.uint8
        assert out.image.shape[2] == 3
        assert out.boxes.dtype == np.float32
        assert out.crowd.dtype == np.float32
        assert out.labels.dtype == np.int64
        assert len(out.boxes) == len(out.labels) == len(out.rows) <= count
        assert (out.rows - out.labels == 10).all(), "labels and rows stay with each other"
        for boxes in (out.boxes, out.crowd):
            assert (boxes >= 0).all()
            assert (boxes <= np.array([width, height, width, height]) + 1e-4).all()
            assert (boxes[:, 2:] > boxes[:, :2]).all()


@pytest.mark.parametrize(
    "change",
    [
        Flip(horizontal=1, vertical=0),
        Flip(horizontal=0, vertical=1),
        Flip(horizontal=1, vertical=1),
        RandomScaleCrop(scale=(0.5, 2.0), visible=0.1, probability=1.0),
    ],
    ids=str,
)
def test_boxes_lie_on_the_pixels(change: Augmentation) -> None:
    """Draw a rectangle for each object in a grey of its own, transform, measure again."""
    for seed in range(20):
        rng = np.random.default_rng(seed)
        size = (90 + seed, 130 - seed)
        boxes = np.round(random_boxes(size, 1, rng))
        x1, y1, x2, y2 = boxes[0].astype(int)
        image = np.zeros((*size, 3), dtype=np.uint8)
        image[y1:y2, x1:x2] = 255
        out = change(make_sample(size, boxes, image), rng)
        light = (out.image == 255).all(2)
        for box in out.boxes:
            rows, columns = np.flatnonzero(light.any(1)), np.flatnonzero(light.any(0))
            assert [columns[0], rows[0], columns[-1] + 1, rows[-1] + 1] == box.tolist()


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10**6), height=st.integers(2, 300), width=st.integers(2, 300))
def test_flips_and_crops_lead_back_to_original_pixels(seed: int, height: int, width: int) -> None:
    sample = noise((height, width), 4, seed)
    rng = np.random.default_rng(seed)
    out = Flip(horizontal=0.5, vertical=0.5)(sample, rng)
    out = RandomScaleCrop(scale=(0.5, 1.0), visible=0.0, probability=1.0)(out, rng)
    # Mirrored boxes come back with their corners exchanged.
    found = (out.boxes - np.tile(out.offset, 2)) / np.tile(out.scale, 2)
    found = np.concatenate([np.minimum(found[:, :2], found[:, 2:]), np.maximum(found[:, :2], found[:, 2:])], 1)
    assert np.abs(found - sample.boxes[out.labels]).max(initial=0) < 1e-3
    assert len(out.boxes) == 4, "zooming out loses nothing"


def test_flip_is_sometimes_and_twice_is_nothing() -> None:
    sample = noise((20, 30), 3, 0)
    flips = [Flip()(sample, np.random.default_rng(i)) is not sample for i in range(200)]
    assert 70 < sum(flips) < 130
    always = Flip(horizontal=1)
    twice = always(always(sample, np.random.default_rng(0)), np.random.default_rng(0))
    assert np.array_equal(twice.image, sample.image)
    assert np.allclose(twice.boxes, sample.boxes, atol=1e-5)
    assert np.abs(back(twice) - sample.boxes).max() < 1e-4


def test_color_of_nothing_changes_nothing_and_grey_stays_grey() -> None:
    sample = noise((20, 30), 1, 0)
    nothing = Color(brightness=0, contrast=0, saturation=0, hue=0, probability=1)
    assert np.abs(nothing(sample, np.random.default_rng(0)).image.astype(int) - sample.image).max() <= 1
    grey = replace(sample, image=np.repeat(sample.image[..., :1], 3, 2))
    out = Color(probability=1, hue=0.5, saturation=1)(grey, np.random.default_rng(0)).image.astype(int)
    assert np.abs(out - out[..., :1]).max() <= 1


def test_color_does_what_its_names_say() -> None:
    image = np.random.default_rng(0).integers(60, 160, (40, 40, 3), dtype=np.uint8)
    sample = make_sample((40, 40), image=image)
    only = {"brightness": 0.0, "contrast": 0.0, "saturation": 0.0, "hue": 0.0, "probability": 1.0}

    def spread(name: str, measure: Any, amount: float = 0.3) -> float:
        change = Color(**(only | {name: amount}))
        results = [measure(change(sample, np.random.default_rng(i)).image.astype(float)) for i in range(30)]
        return float(np.ptp(results) / np.mean(results))

    def mean(x: np.ndarray) -> float:
        return float(x.mean())

    def colour(x: np.ndarray) -> float:
        return float((x - x.mean(2, keepdims=True)).std())

    assert 0.4 < spread("brightness", mean) < 0.65
    assert spread("contrast", mean) < 0.02
    assert 0.4 < spread("contrast", np.std) < 0.65
    assert spread("saturation", mean) < 0.05
    assert 0.4 < spread("saturation", colour) < 0.65
    assert spread("hue", mean, 0.5) < 0.05


def test_scale_crop_takes_windows_of_the_image_shape() -> None:
    sample = noise((100, 200), 0, 0)
    half = RandomScaleCrop(scale=(2.0, 2.0), probability=1)(sample, np.random.default_rng(0))
    assert half.image.shape == (50, 100, 3)
    x, y = (-half.offset).astype(int)
    assert np.array_equal(half.image, sample.image[y : y + 50, x : x + 100])
    double = RandomScaleCrop(scale=(0.5, 0.5), probability=1)(sample, np.random.default_rng(0))
    assert double.image.shape == (200, 400, 3)
    x, y = double.offset.astype(int)
    assert np.array_equal(double.image[y : y + 100, x : x + 200], sample.image)
    assert (double.image == PADDING).all(2).sum() == pytest.approx(200 * 400 - 100 * 200, abs=9)


def test_what_is_hardly_visible_is_dropped_with_its_label() -> None:
    boxes = np.array([[-8, 0, 2, 10], [-5, 0, 5, 10], [0, 0, 10, 10], [19.5, 0, 30, 10], [40, 0, 50, 10]])
    kept = keep_visible(make_sample((20, 20), boxes), visible=0.3)
    assert kept.labels.tolist() == [1, 2]
    assert kept.rows.tolist() == [11, 12]
    assert kept.boxes.tolist() == [[0, 0, 5, 10], [0, 0, 10, 10]]
    assert kept.crowd.tolist() == [[0, 0, 2, 10]], "a crowd's rest still is a crowd"


def test_albumentations_moves_boxes_and_forgets_the_way_back() -> None:
    sample = noise((60, 80), 5, 1)
    out = FromAlbumentations(name="HorizontalFlip", arguments={"p": 1.0})(sample, np.random.default_rng(0))
    assert np.array_equal(out.image, sample.image[:, ::-1])
    assert np.allclose(out.boxes[:, [2, 0]], 80 - sample.boxes[:, [0, 2]], atol=1e-3)
    assert out.labels.tolist() == sample.labels.tolist()
    assert len(out.crowd) == 1
    assert np.isnan(out.scale).all()
    blurred = FromAlbumentations(name="GaussianBlur", arguments={"p": 1.0})(sample, np.random.default_rng(0))
    assert blurred.boxes is sample.boxes
    assert blurred.scale.tolist() == [1, 1]


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"name": "GausianBlur"}, "did you mean 'GaussianBlur'"),
        ({"name": "GaussianBlur", "arguments": {"blurlimit": 3}}, "blurlimit"),
        ({"name": "GaussianBlur", "arguments": {"p": 3}}, "GaussianBlur: p: Input should be less than"),
        ({"name": "MaskDropout"}, "needs mask"),
        ({"name": "Compose"}, "no transform 'Compose'"),
    ],
)
def test_wrong_albumentations_are_refused_with_the_configuration(spec: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        read({"type": "albumentations", **spec})


def test_albumentations_that_fail_on_an_image_are_named() -> None:
    sample = noise((60, 80), 1, 0)
    with pytest.raises(ConfigError, match="Normalize: gives float32"):
        FromAlbumentations(name="Normalize")(sample, np.random.default_rng(0))
    with pytest.raises(ConfigError, match="RandomCrop: fails"):
        FromAlbumentations(name="RandomCrop", arguments={"height": 999, "width": 9})(sample, np.random.default_rng(0))


def test_settings_are_checked_and_survive_a_round_trip() -> None:
    for change in EVERY:
        assert read(change.model_dump(mode="json")) == change
        assert pickle.loads(pickle.dumps(change)) == change
    for wrong in (
        {"type": "flip", "horizontal": 2},
        {"type": "random_scale_crop", "scale": [2.0, 1.0]},
        {"type": "color", "brightness": -1},
        {"type": "flop"},
    ):
        with pytest.raises(ValidationError):
            read(wrong)
