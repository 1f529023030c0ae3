"""Masks that follow their objects, against plain rendering."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from detector.data.frames import Frame, move, scaling, shift, warp
from detector.data.outlines import Bitmap, Outlines, Polygons
from tests.data.drawn import extent


def star(rng: np.random.Generator, corners: int = 9, radius: float = 40.0) -> np.ndarray:
    """A ring of any shape around a point, without crossings."""
    angle = 2 * np.pi * (np.arange(corners) + rng.uniform(-0.3, 0.3, corners)) / corners
    return rng.uniform(0.6, 1, corners)[:, None] * radius * np.stack([np.cos(angle), np.sin(angle)], 1) + (50, 45)


FRAME = Frame(0, 0, 100, 90)


@settings(max_examples=200, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_cutting_and_drawing_is_drawing_and_cutting(seed: int) -> None:
    rng = np.random.default_rng(seed)
    rings = tuple(star(rng) for _ in range(rng.integers(1, 4)))
    whole = Polygons(rings)
    left, top = rng.integers(0, 60, 2).tolist()
    part = Frame(left, top, left + int(rng.integers(1, 40)), top + int(rng.integers(1, 30)))
    expected = whole.raster(FRAME)[part.pixels]
    cut = whole.placed(np.eye(3), part)
    # A ring's corners are rounded to a fifth of a pixel when it is drawn, and cutting makes new corners.
    assert (cut.raster(part) != expected).sum() <= 0.02 * expected.size + 3
    bounds, measured = cut.bounds(), extent(expected)
    if measured is not None:
        measured = measured + np.array([left, top, left, top])
        assert (bounds[:2] <= measured[:2] + 1).all()
        assert (bounds[2:] >= measured[2:] - 1).all()
    assert (bounds[:2] >= (part.left, part.top)).all() or not bounds.any()
    assert (bounds[2:] <= (part.right, part.bottom)).all()


def test_a_ring_that_a_corner_cuts_in_two_is_two() -> None:
    """Joined outside the frame around its corner: the corner is not the object's."""
    ring = np.array([(-10, -10), (30, -10), (30, 20), (20, 20), (20, -4), (-4, -4), (-4, 30), (20, 30), (20, 40),
                     (-10, 40)], dtype=float)  # fmt: skip
    cut = Polygons((ring,)).placed(np.eye(3), FRAME)
    assert cut.bounds().tolist() == [0, 0, 30, 40]
    # Two prongs come in, one from the left and one from the top, joined beyond the corner.
    prongs = [(-8, 10), (-8, -8), (10, -8), (10, 4), (14, 4), (14, -12), (-12, -12), (-12, 14), (6, 14), (6, 10)]
    inner = Polygons((np.array(prongs, dtype=float),)).placed(np.eye(3), FRAME)
    assert isinstance(inner, Bitmap)
    assert inner.raster(FRAME)[:4, :10].sum() == 0, "nothing between the two parts"
    assert inner.raster(FRAME).sum() == 4 * 4 + 6 * 4
    low = Polygons((np.array([(-8, -8), (30, -8), (30, -2), (-2, -2), (-2, 30), (10, 30), (10, 40), (-8, 40)], float),))
    assert low.placed(np.eye(3), FRAME).bounds().tolist() == [0, 30, 10, 40], "the corner is outside"


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_pixels_and_corners_agree_behind_any_map(seed: int) -> None:
    rng = np.random.default_rng(seed)
    ring = star(rng)
    angle, scale = rng.uniform(0, 6.3), rng.uniform(0.6, 2.0)
    turn = np.array([[np.cos(angle), -np.sin(angle), 0], [np.sin(angle), np.cos(angle), 0], [0, 0, 1]])
    tilt = np.array([[1, 0, 0], [0, 1, 0], [*rng.uniform(-0.002, 0.002, 2), 1]])
    matrix = shift(80, 80) @ np.diag([scale, scale, 1]) @ turn @ tilt @ shift(-50, -45)
    frame = Frame(0, 0, 160, 160)
    polygons = Polygons((ring,))
    pixels = Bitmap.of(polygons.raster(FRAME))
    a, b = polygons.placed(matrix, frame).raster(frame), pixels.placed(matrix, frame).raster(frame)
    rim = 4 * 2 * (a.any(0).sum() + a.any(1).sum())  # a pixel either way along a jagged rim
    assert (a != b).sum() <= max(rim, 40)
    assert np.abs(polygons.extent(matrix) - pixels.extent(matrix)).max() <= 2 * scale * 1.3 + 1, "tips fill no pixel"
    inside = pixels.placed(matrix, frame).bounds()
    assert (inside[:2] >= pixels.extent(matrix).clip(0)[:2] - 1).all()


def test_an_axis_parallel_map_moves_pixels_exactly() -> None:
    pixels = Bitmap(np.array([[1, 0, 1], [1, 1, 1]], dtype=np.uint8), 4, 7)
    doubled = pixels.placed(scaling((2, 3), (-1, 2)), Frame(0, 0, 50, 50))
    assert isinstance(doubled, Bitmap)
    assert (doubled.left, doubled.top) == (7, 23)
    assert np.array_equal(doubled.pixels, np.kron(pixels.pixels, np.ones((3, 2), dtype=np.uint8)))
    assert doubled.bounds().tolist() == [7, 23, 13, 29]
    assert pixels.placed(np.eye(3), Frame(5, 8, 6, 30)).raster(Frame(4, 7, 7, 9)).tolist() == [[0, 0, 0], [0, 1, 0]]
    nothing = pixels.placed(shift(100, 0), Frame(0, 0, 50, 50))
    assert not nothing.bounds().any()
    assert not nothing.raster(Frame(0, 0, 5, 5)).any()


def test_warp_counts_from_pixel_edges() -> None:
    image = np.arange(12, dtype=np.uint8).reshape(3, 4) * 20
    assert np.array_equal(warp(image, np.eye(3), (3, 4), 0), image)
    mirrored = warp(image, scaling((-1, 1), (4, 0)), (3, 4), 0)
    assert np.array_equal(mirrored, image[:, ::-1])
    assert np.array_equal(warp(image, shift(1, 2), (5, 6), 9)[2:, 1:5], image)


def test_outlines_are_taken_joined_and_changed_in_order() -> None:
    boxes = np.array([[0, 0, 10, 10], [5, 5, 9, 9], [20, 0, 30, 8]], dtype=np.float32)
    outlines = Outlines.boxes(boxes)
    moved = outlines.mapped(scaling((2, 1), (1, 0)))
    assert moved.take(np.array([2, 0])).extent(0).tolist() == [41, 0, 61, 8]
    assert moved.take(np.array([False, True, False])).extent(0).tolist() == [11, 5, 19, 9]
    both = Outlines.join([outlines, moved])
    assert len(both) == 6
    assert both.extent(3).tolist() == [1, 0, 21, 10]
    other = both.changed({4: Polygons.rectangle(np.array([1, 2, 3, 4]))})
    assert other.extent(4).tolist() == [1, 2, 3, 4]
    assert other.extent(3).tolist() == [1, 0, 21, 10]
    assert move(np.array([[1.0, 2.0]]), np.diag([2.0, 3.0, 1.0])).tolist() == [[2, 6]]


@pytest.mark.parametrize("shape", [Polygons(()), Bitmap.of(None), Bitmap.of(np.zeros((4, 5), dtype=bool))])
def test_nothing_stays_nothing(shape: Polygons | Bitmap) -> None:
    assert shape.bounds().tolist() == [0, 0, 0, 0]
    placed = shape.placed(scaling((2, 2), (0, 0)), FRAME)
    assert not placed.raster(FRAME).any()
    assert shape.raster(Frame(3, 3, 3, 9)).shape == (6, 0)
