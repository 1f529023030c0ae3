"""Sparse and batched equals dense and one image at a time."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from detector.assign import Assigner, Atss, Fcos, MaxIou
from detector.structures import Grid, Objects, Priors
from tests.assign.make import (
    EXACT,
    NINE_ANCHORS,
    ONE_ANCHOR,
    POINT,
    batch,
    on_grids,
    pyramid,
    random_boxes,
    without_grids,
)
from tests.reference.assign_dense import dense

RULES: list[Assigner] = [
    MaxIou(),
    MaxIou(positive_iou=0.7, negative_iou=0.3, min_positive_iou=0.3),
    MaxIou(positive_iou=0.5, negative_iou=0.5, low_quality="first"),
    MaxIou(positive_iou=0.5, negative_iou=0.05, low_quality="none"),
    MaxIou(positive_iou=0.9, negative_iou=0.8, low_quality="all"),
    Fcos(),
    Fcos(center_radius=None),
    Fcos(center_radius=0.4),
    Fcos(center_radius=4.0),
    Atss(),
    Atss(topk=1),
    Atss(topk=4, reachable=False),
    Atss(topk=25),
]


def name(rule: Assigner) -> str:
    return str(rule)


@pytest.mark.parametrize("shapes", [POINT, ONE_ANCHOR, NINE_ANCHORS], ids=["points", "one", "nine"])
@pytest.mark.parametrize("rule", RULES, ids=name)
def test_random_batch(rule: Assigner, shapes: tuple[tuple[float, float], ...]) -> None:
    size = (150, 203)
    priors = pyramid(size, shapes=shapes)
    images = [random_boxes(n, size, seed) for seed, n in enumerate((12, 0, 1, 60))]
    objects = batch(*images)
    assert torch.equal(rule(priors, objects).per_prior(), dense(rule, priors, objects))


@pytest.mark.parametrize("rule", RULES, ids=name)
@pytest.mark.parametrize("shapes", [POINT, EXACT], ids=["points", "three"])
def test_priors_without_grids_give_the_same(rule: Assigner, shapes: tuple[tuple[float, float], ...]) -> None:
    size = (100, 140)
    priors = pyramid(size, shapes=shapes)
    objects = batch(random_boxes(30, size, 1), random_boxes(3, size, 2))
    loose = without_grids(priors)
    assert torch.equal(rule(loose, objects).per_prior(), rule(priors, objects).per_prior())
    assert torch.equal(rule(loose, objects).per_prior(), dense(rule, loose, objects))


@pytest.mark.parametrize("rule", RULES, ids=name)
def test_in_parts_gives_the_same(rule: Assigner, monkeypatch: pytest.MonkeyPatch) -> None:
    size = (100, 140)
    priors = pyramid(size, shapes=EXACT)
    region = torch.tensor([[20.0, 20, 120, 90]])
    objects = batch(random_boxes(30, size, 1), random_boxes(9, size, 2), ignore=[region, region / 2])
    whole = [rule(p, objects).per_prior() for p in (priors, without_grids(priors))]
    monkeypatch.setattr("detector.assign.base.PAIRS_AT_ONCE", 1000)
    parts = [rule(p, objects).per_prior() for p in (priors, without_grids(priors))]
    assert torch.equal(torch.stack(whole), torch.stack(parts))


@st.composite
def grids(draw: st.DrawFn) -> Priors:
    """Small and thin levels of any stride, some of a single cell."""
    shapes = draw(st.sampled_from([POINT, ONE_ANCHOR, EXACT, ((2.0, 1.0), (0.5, 0.5)), ((0.25, 16.0),)]))
    offset = draw(st.sampled_from([0.0, 0.5]))
    levels, stride = [], draw(st.sampled_from([4, 8, 12]))
    for _ in range(draw(st.integers(1, 4))):
        height, width = draw(st.integers(1, 12)), draw(st.integers(1, 12))
        levels.append(Grid(height, width, stride, tuple((w * stride, h * stride) for w, h in shapes), offset))
        stride *= draw(st.sampled_from([2, 3]))
    return on_grids(tuple(levels))


@st.composite
def truth(draw: st.DrawFn) -> Objects:
    """Coordinates in steps of half a pixel (ties on purpose), on and beyond the borders of any grid."""
    unit = draw(st.sampled_from([0.5, 4.0, 8.0]))
    number = st.integers(-8, 30)
    side = st.integers(0, 30)
    images = []
    for _ in range(draw(st.integers(1, 3))):
        rows = draw(st.lists(st.tuples(number, number, side, side), max_size=6))
        images.append([[x * unit, y * unit, (x + w) * unit, (y + h) * unit] for x, y, w, h in rows])
    return batch(*images)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(grids(), truth(), st.sampled_from(RULES))
def test_any_grid_and_any_objects(priors: Priors, objects: Objects, rule: Assigner) -> None:
    want = dense(rule, priors, objects)
    assert torch.equal(rule(priors, objects).per_prior(), want)
    if not any(w % 0.5 for g in priors.grids for shape in g.shapes for w in shape):
        assert torch.equal(rule(without_grids(priors), objects).per_prior(), want)
