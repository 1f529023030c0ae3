"""Batched equals dense and one image at a time, for rules of pairs and weights."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from detector.assign import (
    Assigner,
    Atss,
    CenterGaussian,
    CenterRegion,
    DualWeight,
    IqDet,
    MaxIou,
    Paa,
    PointScale,
    Uniform,
    YoloBest,
    YoloRatio,
)
from detector.assign.cells import BLOCK, largest, smallest
from detector.assign.pair_loss import BcePairLoss
from detector.errors import ConfigError
from detector.structures import Assignment, Objects, Predictions, Priors
from tests.assign.make import EXACT, NINE_ANCHORS, ONE_ANCHOR, POINT, batch, pyramid, random_boxes, without_grids
from tests.assign.test_dense import grids, truth
from tests.reference.rules_dense import dense_rule

RULES: list[Assigner] = [
    YoloRatio(),
    YoloRatio(ratio=1.5, reach=0.2),
    YoloRatio(reach=0),
    YoloBest(),
    YoloBest(positive_iou=0.3, compare="box", ignore_iou=0.3),
    YoloBest(compare="box"),
    Uniform(),
    Uniform(topk=1, min_anchor_iou=0.5, ignore_prediction_iou=0.2),
    Uniform(topk=11),
    PointScale(),
    PointScale(topk=7, scale=2.5),
    CenterGaussian(),
    CenterGaussian(min_iou=0.7, power=2, scale=1.3),
    CenterRegion(),
    CenterRegion(center=0.4, shadow=0.8, min_coverage=0.2),
    Paa(),
    Paa(first=Atss(), topk=3, pair_loss=BcePairLoss(box="iou")),
    Paa(first=MaxIou(positive_iou=0.4, negative_iou=0.4), iterations=3),
    DualWeight(most=10_000),
    DualWeight(most=20),
    IqDet(),
    IqDet(samples=30, negative_quality=0.4),
    DualWeight(most=3, sigma=3, negative_iou=0.3, negative_power=1.5, score_power=1),
]
# Rules that give an object to cells have no meaning without them.
ANYWHERE = [r for r in RULES if not isinstance(r, YoloRatio | YoloBest | CenterGaussian | IqDet)]


def said(priors: Priors, objects: Objects, seed: int = 0, classes: int = 3) -> Predictions:
    """Boxes near the priors, or near an object; logits of any size."""
    random = torch.Generator().manual_seed(seed)
    shape = (objects.batch_size, len(priors))
    noise = torch.randn(*shape, 4, generator=random)
    boxes = priors.boxes + noise * 4
    if len(objects):
        pick = torch.randint(0, len(objects), shape, generator=random)
        near = objects.boxes[pick] + noise * 2
        boxes = torch.where(torch.rand(*shape, 1, generator=random) < 0.5, near, boxes)
    boxes = torch.cat(
        [torch.minimum(boxes[..., :2], boxes[..., 2:]), torch.maximum(boxes[..., :2], boxes[..., 2:])], -1
    )
    logits = torch.randn(*shape, classes, generator=random) * 2
    quality = torch.randn(*shape, generator=random)
    part = torch.rand(len(objects), len(priors.grids), 2, 5, generator=random)
    mixture = torch.cat([part[..., :2] * 2 - 1, part[..., 2:4].clamp(min=0.05), part[..., 4:] / 2], -1)
    return Predictions(logits, boxes, quality, mixture)


def rows(found: Assignment) -> Tensor:
    """(P, 3) of the pairs that count, in order: prior and object as one number, quality, weight."""
    kept = found.weight * found.quality > 1e-12
    key = found.prior[kept] * 100_000 + found.object[kept]
    key, order = key.sort(stable=True)
    values = torch.stack([found.quality[kept], found.weight[kept]], 1)[order]
    return torch.cat([key[:, None].double(), values.double()], 1)


def assert_same(found: Assignment, wanted: Assignment) -> None:
    a, b = rows(found), rows(wanted)
    assert torch.equal(a[:, 0], b[:, 0])
    torch.testing.assert_close(a[:, 1:], b[:, 1:], atol=1e-5, rtol=1e-5)
    assert torch.equal(found.ignored, wanted.ignored)
    assert (found.background_weight is None) == (wanted.background_weight is None)
    if found.background_weight is not None:
        torch.testing.assert_close(found.background_weight, wanted.background_weight, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("shapes", [POINT, ONE_ANCHOR, NINE_ANCHORS], ids=["points", "one", "nine"])
@pytest.mark.parametrize("rule", RULES, ids=str)
def test_random_batch(rule: Assigner, shapes: tuple[tuple[float, float], ...]) -> None:
    size = (150, 203)
    priors = pyramid(size, shapes=shapes)
    objects = batch(*(random_boxes(n, size, seed) for seed, n in enumerate((12, 0, 1, 60))))
    predictions = said(priors, objects)
    assert_same(rule(priors, objects, predictions), dense_rule(rule, priors, objects, predictions))


@pytest.mark.parametrize("rule", ANYWHERE, ids=str)
def test_priors_without_grids_give_the_same(rule: Assigner) -> None:
    size = (100, 140)
    priors = pyramid(size, shapes=EXACT)
    objects = batch(random_boxes(30, size, 1), random_boxes(3, size, 2))
    predictions = said(priors, objects)
    loose = without_grids(priors)
    assert_same(rule(loose, objects, predictions), rule(priors, objects, predictions))
    assert_same(rule(loose, objects, predictions), dense_rule(rule, loose, objects, predictions))


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_in_parts_gives_the_same(rule: Assigner, monkeypatch: pytest.MonkeyPatch) -> None:
    size = (100, 140)
    priors = pyramid(size, shapes=EXACT)
    objects = batch(random_boxes(30, size, 1), random_boxes(9, size, 2))
    predictions = said(priors, objects)
    whole = rule(priors, objects, predictions)
    monkeypatch.setattr("detector.assign.base.PAIRS_AT_ONCE", 1000)
    assert_same(rule(priors, objects, predictions), whole)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(grids(), truth(), st.sampled_from(RULES), st.integers(0, 3))
def test_any_grid_and_any_objects(priors: Priors, objects: Objects, rule: Assigner, seed: int) -> None:
    # In heights of an object without any, the plain sum rounds away how far a prior is to the side.
    assume(not isinstance(rule, PointScale) or bool((objects.boxes[:, 2:] > objects.boxes[:, :2]).all()))
    predictions = said(priors, objects, seed)
    assert_same(rule(priors, objects, predictions), dense_rule(rule, priors, objects, predictions))


@settings(max_examples=50, deadline=None, derandomize=True)
@given(st.integers(1, 40), st.integers(1, 2000), st.integers(0, 5), st.integers(1, 30))
def test_the_best_columns_come_in_order_of_value_then_column(k: int, columns: int, seed: int, levels: int) -> None:
    value = torch.randint(0, levels, (3, columns), generator=torch.Generator().manual_seed(seed)).float()
    value[0] = value[0] / 7
    assert torch.equal(smallest(value, k), value.sort(dim=1, stable=True).indices[:, :k])
    assert torch.equal(largest(value, k), value.sort(dim=1, descending=True, stable=True).indices[:, :k])


def test_the_best_columns_of_a_row_longer_than_a_block() -> None:
    value = torch.zeros(1, 100 * BLOCK + 1)
    value[0, 7 * BLOCK + 3] = 1
    value[0, -1] = 0.5
    assert largest(value, 3).tolist() == [[7 * BLOCK + 3, 100 * BLOCK, 0]]
    assert smallest(1 - value, 3).tolist() == [[7 * BLOCK + 3, 100 * BLOCK, 0]]
    assert smallest(value.fill_(torch.inf), 2).tolist() == [[0, 1]]


def test_a_rule_about_cells_refuses_priors_without() -> None:
    priors = without_grids(pyramid((64, 64)))
    objects = batch([[4.0, 4, 40, 40]])
    for rule in RULES:
        if rule not in ANYWHERE:
            with pytest.raises(ConfigError, match="lie on none"):
                rule(priors, objects, said(priors, objects))


def test_a_batch_that_nothing_is_proposed_to() -> None:
    priors, objects = pyramid((32, 32)), batch([[8.0, 8, 8, 8]], [])  # no area: no prior overlaps it
    predictions = said(priors, objects)
    found = Paa()(priors, objects, predictions)
    assert not (found.weight > 0).any()
    assert_same(found, dense_rule(Paa(), priors, objects, predictions))


@pytest.mark.parametrize("rule", [CenterGaussian(), CenterRegion()], ids=str)
def test_classes_come_from_the_setting_or_the_head(rule: Assigner) -> None:
    priors = pyramid((64, 64))
    objects = batch([[4.0, 4, 40, 40], [20, 20, 50, 50]])
    told = type(rule)(num_classes=3)
    predictions = said(priors, objects)
    assert rule.uses_predictions
    assert not told.uses_predictions
    assert_same(told(priors, objects), rule(priors, objects, predictions))
    with pytest.raises(ConfigError, match=r"num_classes is 3, but the head has 4 classes"):
        told(priors, objects, said(priors, objects, classes=4))
    with pytest.raises(RuntimeError, match="label beyond the 1 classes"):
        type(rule)(num_classes=1)(priors, replace(objects))


def test_rules_that_weigh_the_background_say_what_their_weights_hold() -> None:
    """DW's hold the focal factor, also in images without objects; geometric ones do not."""
    priors = pyramid((64, 64))
    for objects in (batch([[4.0, 4, 40, 40]]), batch([])):
        predictions = said(priors, objects)
        found = DualWeight()(priors, objects, predictions)
        assert found.modulated
        assert found.background_weight is not None
        score = predictions.class_logits.sigmoid() * predictions.quality_logits.sigmoid()[..., None]
        torch.testing.assert_close(found.background_weight[..., 1:], score[..., 1:] ** 2)
    for rule in (CenterGaussian(), CenterRegion()):
        assert rule(priors, batch([[4.0, 4, 40, 40]]), predictions).modulated is False
        assert rule(priors, batch([]), predictions).modulated is None
    assert YoloRatio()(priors, batch([[4.0, 4, 40, 40]])).modulated is None
