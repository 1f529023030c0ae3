"""Steps that need masks or other images: the truth lies where the pixels are, and nothing is lost but by rule."""

from __future__ import annotations

import pickle
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError

from detector.data.batch import PADDING
from detector.data.copy_paste import CopyPaste, SmallCopyPaste
from detector.data.erase import Cutout, GridMask
from detector.data.frames import Frame
from detector.data.mosaic import Mixup, Mosaic
from detector.data.outlines import Polygons
from detector.data.perspective import LargeScaleJitter, RandomPerspective
from detector.data.sample import Sample
from detector.data.steps import Step
from detector.data.transforms import Transform
from tests.data import drawn

read = TypeAdapter(Transform).validate_python

# Nothing is dropped for being cut or hidden, edges are hard, and mixed images are half of each: pixels can be measured.
GEOMETRY: list[Step] = [
    Mosaic(size=(256, 224), visible=0),
    Mosaic(size=(256, 288), tiles=9, shift=0.15, scale=(0.3, 0.8), visible=0),
    Mixup(share=(0.5, 0.5), visible=0, scale=(0.4, 2.0)),
    CopyPaste(visible=0, edge=0),
    CopyPaste(visible=0, edge=0, jitter="large", share=1.0),
    CopyPaste(visible=0, edge=0, by="box"),
    LargeScaleJitter(size=(192, 224), scale=(0.3, 3.0), visible=0),
    RandomPerspective(degrees=40, shear=15, visible=0),
    RandomPerspective(degrees=180, tilt=0.4, size=(200, 160), visible=0),
]
OTHERS: list[Step] = [
    SmallCopyPaste(below=80, margin=0),
    Cutout(visible=0.4),
    GridMask(visible=0.4),
    CopyPaste(),
    CopyPaste(by="box", edge=8),
    Mixup(),
]


def samples(seed: int, masks: bool = True, size: tuple[int, int] = (150, 190)) -> list[Sample]:
    """Nine of them, of different sizes."""
    rng = np.random.default_rng(seed)
    sizes = [size, *((int(h), int(w)) for h, w in rng.integers(90, 260, (8, 2)))]
    return [drawn.make(s, 5, 10 * i, rng, masks) for i, s in enumerate(sizes)]


def check_geometry(step: Step, seed: int, masks: bool) -> None:
    given_samples = samples(seed, masks)
    out = drawn.run(step, given_samples, seed)
    full = 0.5 if isinstance(step, Mixup) else 1.0
    for box, row in zip(out.boxes, out.rows.tolist(), strict=True):
        found = drawn.shown(step, given_samples, seed, row)
        assert drawn.miss(found, box, full) <= 1, f"{row}: seen at {drawn.extent(found > 127 * full)}, box {box}"
    # Of another image's objects, those that are not pasted may show through the ones in front of them.
    own = given_samples[:1] if isinstance(step, CopyPaste) else given_samples
    for row in {row for s in own for row in s.rows.tolist()} - set(out.rows.tolist()):
        measured = drawn.extent(drawn.shown(step, given_samples, seed, row) > 127 * full)
        assert measured is None or (measured[2:] - measured[:2]).min() <= 2, f"{row}: lost, but seen at {measured}"


@pytest.mark.parametrize("step", GEOMETRY, ids=str)
@pytest.mark.parametrize("masks", [True, False], ids=["masks", "boxes"])
def test_boxes_are_where_the_pixels_are(step: Step, masks: bool) -> None:
    if isinstance(step, CopyPaste) and (step.by == "mask") != masks:
        pytest.skip("pastes the other kind")
    for seed in range(3):
        check_geometry(step, seed, masks)


@pytest.mark.slow
@pytest.mark.parametrize("step", GEOMETRY, ids=str)
@pytest.mark.parametrize("masks", [True, False], ids=["masks", "boxes"])
def test_boxes_are_where_the_pixels_are_in_two_thousand_samples(step: Step, masks: bool) -> None:
    if isinstance(step, CopyPaste) and (step.by == "mask") != masks:
        pytest.skip("pastes the other kind")
    for seed in range(100, 240):
        check_geometry(step, seed, masks)


def check_soundness(step: Step, given_samples: list[Sample], seed: int) -> Sample:
    before = pickle.dumps(given_samples)
    out = drawn.run(step, given_samples, seed)
    assert pickle.dumps(given_samples) == before, "the given samples are not changed"
    again = drawn.run(step, given_samples, seed)
    assert np.array_equal(out.image, again.image)
    assert np.array_equal(out.boxes, again.boxes)
    height, width = out.image.shape[:2]
    assert out.image.dtype == np.uint8
    assert out.boxes.dtype == out.crowd.dtype == np.float32
    assert len(out.boxes) == len(out.labels) == len(out.rows)
    assert (out.labels == out.rows % 5).all(), "labels stay with their objects"
    for boxes in (out.boxes, out.crowd):
        assert boxes.shape[1:] == (4,)
        assert (boxes >= 0).all()
        assert (boxes <= np.array([width, height, width, height])).all()
        assert (boxes[:, 2:] - boxes[:, :2] >= 1).all()
    if out.outlines is not None:
        assert len(out.outlines) == len(out.boxes)
        for i, box in enumerate(out.boxes):
            bounds = out.outlines.shape(i, Frame.of(out.image)).bounds()
            assert np.abs(bounds - box).max() <= 2, "masks come along, thin tips aside, which fill no pixel"
    return out


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6), height=st.integers(16, 200), width=st.integers(16, 200), masks=st.booleans())
@pytest.mark.parametrize("step", GEOMETRY + OTHERS, ids=str)
def test_sound_whatever_comes(step: Step, seed: int, height: int, width: int, masks: bool) -> None:
    if isinstance(step, CopyPaste) and step.by == "mask" and not masks:
        return
    check_soundness(step, samples(seed, masks, (height, width)), seed)


@pytest.mark.parametrize("step", GEOMETRY + OTHERS, ids=str)
@pytest.mark.parametrize("size", [(1, 1), (1, 90), (90, 1)])
def test_images_of_one_pixel_and_without_objects(step: Step, size: tuple[int, int]) -> None:
    tiny = [replace(s, crowd=s.crowd[:0]) for s in samples(3)]
    empty = drawn.make(size, 0, 0, np.random.default_rng(0), crowd=False)
    for seed in range(3):
        check_soundness(step, [empty, *tiny[1:]], seed)
        check_soundness(step, [tiny[0], *[empty] * 8], seed)
    nothing = drawn.run(step, [empty] * 9, 0)
    assert len(nothing.boxes) == len(nothing.crowd) == 0


@pytest.mark.parametrize("step", GEOMETRY + OTHERS, ids=str)
def test_crowd_regions_survive(step: Step) -> None:
    for seed in range(8):
        given_samples = samples(seed)
        out = drawn.run(step, given_samples, seed)
        if isinstance(step, CopyPaste | SmallCopyPaste | Cutout | GridMask):
            assert np.array_equal(out.crowd, given_samples[0].crowd), "hidden or not, nobody knows what is in there"
            continue
        for own, sample in enumerate(given_samples):
            only = [s if i == own else replace(s, crowd=s.crowd[:0]) for i, s in enumerate(given_samples)]
            level = 25 if isinstance(step, Mixup) else 127
            measured = drawn.extent(drawn.shown(step, only, seed, drawn.CROWD) > level)
            crowd = drawn.run(step, only, seed).crowd
            if measured is None or (measured[2:] - measured[:2]).min() <= 2:
                continue
            assert len(crowd) == 1, f"the crowd of sample {sample.image_id} is lost"
            assert (crowd[0, :2] <= measured[:2] + 1).all()
            assert (crowd[0, 2:] >= measured[2:] - 1).all()
            if not isinstance(step, RandomPerspective):
                assert np.abs(crowd[0] - measured).max() <= 1


def test_mosaic_shows_four_or_nine_images() -> None:
    given_samples = samples(0)
    for tiles in (4, 9):
        out = drawn.run(Mosaic(size=(600, 600), tiles=tiles, scale=(0.3, 0.3), visible=0), given_samples, 1)
        assert len({row // 10 for row in out.rows.tolist()}) == tiles
        assert out.image.shape == (600, 600, 3)
        assert np.isnan(out.scale).all(), "no way leads back to one image"
    own = [drawn.run(Mosaic(size=(64, 64)), given_samples, seed) for seed in range(40)]
    firsts = {tuple(np.argwhere(o.rows < 10).ravel()[:1].tolist()) for o in own}
    assert len(firsts) > 2, "the sample's own place is drawn"


def test_mixup_is_the_weighted_mean_where_the_other_image_lies() -> None:
    a, b = samples(0)[:2]
    a, b = replace(a, image=np.full_like(a.image, 200)), replace(b, image=np.full_like(b.image, 100))
    for seed in range(20):
        out = drawn.run(Mixup(alpha=1.0, share=(0.2, 0.8)), [a, b], seed)
        values = np.unique(out.image)
        assert set(values.tolist()) - {200} <= set(range(119, 182)), "between 0.2 and 0.8 of each"
        assert len(values) <= 2
        assert np.array_equal(out.boxes[: len(a.boxes)], a.boxes), "the sample's own objects stay as they are"
        assert out.scale.tolist() == [1, 1]


def test_what_is_pasted_hides_and_what_is_nearly_hidden_is_dropped() -> None:
    """Against counting pixels: of the objects below, the ones with less than `visible` of their pixels left go."""
    step = CopyPaste(edge=0, visible=0.4, share=1.0)
    dropped = shrunk = 0
    for seed in range(60):
        given_samples = samples(seed)
        below = given_samples[0]
        out = drawn.run(step, given_samples, seed)
        for i, row in enumerate(below.rows.tolist()):
            whole = int(drawn.pixels(below, i).sum())
            left = int(run_pixels(step, given_samples, seed, row).sum())
            at = np.flatnonzero(out.rows == row)
            assert (len(at) == 1) == (left >= 0.4 * whole), f"{left} of {whole} pixels are left"
            if len(at) == 1 and left < whole:
                shrunk += 1
                assert out.outlines is not None
                mask = drawn.pixels(out, int(at[0]))
                assert int(mask.sum()) == left, "the mask is what is left to be seen"
            dropped += len(at) == 0
    assert dropped > 20, "or nothing was tested"
    assert shrunk > 20


def run_pixels(step: Step, given_samples: list[Sample], seed: int, row: int) -> np.ndarray:
    """(H, W) bool: which pixels of the mask of the first sample's object `row` are still there."""
    first = given_samples[0]
    mask = drawn.pixels(first, int(np.flatnonzero(first.rows == row)[0]))
    black = [replace(s, image=np.zeros_like(s.image)) for s in given_samples[1:]]
    return (
        drawn.run(step, [replace(first, image=np.repeat(255 * mask[..., None], 3, 2)), *black], seed).image[..., 0] > 0
    )


def test_a_soft_edge_brings_nothing_from_outside_the_object() -> None:
    a, b = samples(5)[:2]
    black = replace(a, image=np.zeros_like(a.image))
    pure = drawn.alone(b, int(b.rows[0]))
    assert b.outlines is not None
    first = np.array([0])
    one = replace(
        pure, boxes=b.boxes[first], labels=b.labels[first], rows=b.rows[first], outlines=b.outlines.take(first)
    )
    inverted = replace(one, image=255 - one.image)
    hard = drawn.run(CopyPaste(edge=0), [black, one], 3).image[..., 0] > 127
    soft = drawn.run(CopyPaste(edge=4), [black, one], 3).image[..., 0]
    outside = drawn.run(CopyPaste(edge=4), [black, inverted], 3).image[..., 0]
    assert (soft[~hard] < 128).all()
    assert soft[hard].min() < 100, "it fades"
    assert outside.max() < 128, "the ground around the object does not come along"


def test_small_objects_are_pasted_on_free_ground_only() -> None:
    step = SmallCopyPaste(below=40, copies=4, most=12, edge=0)
    pasted = measured = 0
    for seed in range(40):
        rng = np.random.default_rng(seed)
        sample = drawn.make((300, 300), 3, 0, rng)
        small = [Polygons.rectangle(np.array([x, 5, x + 12, 25])) for x in (5, 40)]
        assert sample.outlines is not None
        boxes = np.concatenate([sample.boxes, [[5, 5, 17, 25], [40, 5, 52, 25]]]).astype(np.float32)
        sample = replace(
            sample,
            boxes=boxes,
            labels=np.arange(5) % 5,
            rows=np.arange(5),
            outlines=type(sample.outlines)(
                (*sample.outlines.sources, *small), np.broadcast_to(np.eye(3), (5, 3, 3)), np.ones(5, dtype=bool)
            ),
        )
        out = check_soundness(step, [sample], seed)
        assert np.array_equal(out.boxes[:5], boxes), "what was there stays"
        new = out.boxes[5:]
        pasted += len(new)
        assert len(new) <= 8
        assert set(out.rows[5:].tolist()) <= {3, 4}
        for i, box in enumerate(new):
            rest = np.concatenate([out.boxes[:5], np.delete(new, i, 0), sample.crowd])
            apart = (box[2:] <= rest[:, :2] + 1e-3).any(1) | (box[:2] >= rest[:, 2:] - 1e-3).any(1)
            assert apart.all(), "never onto another object or a crowd"
            assert box.min() >= 5
            assert box.max() <= 295
        for i in (3, 4):
            found = drawn.shown(step, [sample], seed, i)
            for box in new[out.rows[5:] == i]:
                x1, y1, x2, y2 = np.round(box).astype(int)
                others = out.boxes[(out.boxes != box).any(1)]
                if ((others[:, :2] < box[2:] + 3) & (others[:, 2:] > box[:2] - 3)).all(1).any():
                    continue  # its neighbour would be measured with it
                measured += 1
                part, corner = found[y1 - 2 : y2 + 2, x1 - 2 : x2 + 2], np.array([x1 - 2, y1 - 2] * 2)
                assert drawn.miss(part, box - corner) <= 1
    assert pasted > 100
    assert measured > 50


@pytest.mark.parametrize(
    "step", [Cutout(visible=0.5, holes=(3, 6), size=(0.2, 0.5)), GridMask(visible=0.5, share=0.65)]
)
def test_holes_drop_what_they_mostly_cover_and_nothing_else(step: Step) -> None:
    dropped = 0
    for seed in range(40):
        (sample, *_) = samples(seed)
        out = drawn.run(step, [sample], seed)
        white = replace(sample, image=np.full_like(sample.image, 255))
        hole = (drawn.run(step, [white], seed).image == PADDING).all(2)
        assert 0 < hole.mean() < 1
        for i, row in enumerate(sample.rows.tolist()):
            mask = drawn.pixels(sample, i).astype(bool)
            # The box's pixels are what the rule looks at; a mask may stick out by the pixel that its edge crosses.
            frame = Frame.around(sample.boxes[i], sample.image)
            share = 1 - hole[frame.pixels][mask[frame.pixels]].mean()
            assert (row in out.rows) == (share >= 0.5)
            dropped += row not in out.rows
        kept = np.isin(sample.rows, out.rows)
        assert np.array_equal(out.boxes, sample.boxes[kept]), "the others keep their whole boxes"
    assert dropped > 10


def test_perspective_boxes_are_tighter_with_masks_than_from_corners() -> None:
    step = RandomPerspective(degrees=45, visible=0, scale=(0.5, 0.5), translate=0)
    areas = []
    for masks in (True, False):
        (sample, *_) = samples(1)
        sample = replace(sample, outlines=sample.outlines if masks else None)
        out = drawn.run(step, [sample], 11)
        areas.append(float((out.boxes[:, 2:] - out.boxes[:, :2]).prod(1).sum()))
    assert areas[0] < 0.9 * areas[1]


def test_what_a_huge_image_costs_is_what_is_shown_of_it() -> None:
    import tracemalloc

    side = 8000
    sample = replace(drawn.make((100, 100), 2, 0, np.random.default_rng(0)), image=np.zeros((side, side, 3), np.uint8))
    for step in (
        Mosaic(size=(128, 128)),
        LargeScaleJitter(size=(128, 128), scale=(0.5, 2)),
        RandomPerspective(size=(128, 128)),
    ):
        tracemalloc.start()
        drawn.run(step, [sample, *samples(0)[1:]], 0)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < side * side * 3 * 0.45, f"{step}: {peak / 1e6:.0f} MB for an image of {side * side * 3 / 1e6:.0f}"


@pytest.mark.parametrize("step", GEOMETRY + OTHERS, ids=str)
def test_settings_survive_a_round_trip(step: Step) -> None:
    assert read(step.model_dump(mode="json")) == step
    assert pickle.loads(pickle.dumps(step)) == step


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"type": "mosaic", "tiles": 5}, "4 or 9"),
        ({"type": "mosaic", "scale": [1.0, 0.5]}, "smaller number first"),
        ({"type": "mosaic", "size": [8, 640]}, "greater than or equal to 32"),
        ({"type": "mixup", "alpha": 0}, "greater than 0"),
        ({"type": "copy_paste", "by": "outline"}, "'mask' or 'box'"),
        ({"type": "cutout", "holes": [3, 1]}, "smaller number first"),
        ({"type": "random_perspective", "tilt": 0.9}, "less than or equal to 0.4"),
        ({"type": "mosaic", "when": {"after": 5, "until": 3}}, "until is 3, expected more than after, 5"),
        ({"type": "mosaic", "when": {"from": 5}}, "Extra inputs"),
    ],
)
def test_wrong_settings_are_refused(spec: dict[str, object], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        read(spec)
