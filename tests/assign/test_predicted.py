"""Rules that look at predictions: sparse and batched equals dense and one image at a time."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from detector.assign import Assigner, DynamicSoftLabel, Hungarian, Ota, SimOta, TaskAligned
from detector.structures import Assignment, Objects, Predictions, Priors
from tests.assign.make import EXACT, NINE_ANCHORS, ONE_ANCHOR, POINT, batch, pyramid, random_boxes, without_grids
from tests.assign.test_dense import grids, truth
from tests.reference.assign_predicted import dense_predicted, least_total

SIZE = (150, 203)
CLASSES = 3
RULES: list[Assigner] = [
    SimOta(),
    SimOta(center_radius=1.2, candidate_topk=5, iou_weight=2.0, class_weight=1.5),
    DynamicSoftLabel(),
    DynamicSoftLabel(center_radius=1.0, topk=4, iou_weight=1.0),
    TaskAligned(),
    TaskAligned(topk=5, alpha=0.5, beta=2.0),
    Ota(),
    Ota(center_radius=1.5, topk=8, iou_weight=3.0, eps=0.3, iterations=20),
    Hungarian(),
    Hungarian(class_cost=1.0, l1_cost=2.0, giou_cost=5.0),
]


def predictions(priors: Priors, objects: Objects, seed: int, quality: bool = True) -> Predictions:
    """Boxes near objects of their image or near their priors, of all degrees of fit."""
    random = torch.Generator().manual_seed(seed)
    images, count = objects.batch_size, len(priors)
    logits = torch.randn(images, count, CLASSES, generator=random) * 2 - 1
    boxes = priors.boxes.expand(images, -1, -1).clone()
    for i in range(images):
        mine = objects.boxes[objects.image == i]
        if len(mine):
            near = torch.cdist(priors.centers, (mine[:, :2] + mine[:, 2:]) / 2).argmin(1)
            boxes[i] = torch.where(torch.rand(count, 1, generator=random) < 0.7, mine[near], boxes[i])
    side = (boxes[..., 2:] - boxes[..., :2]).repeat(1, 1, 2)
    boxes = boxes + torch.randn(boxes.shape, generator=random) * side * 0.1
    boxes = torch.cat(
        [torch.minimum(boxes[..., :2], boxes[..., 2:]), torch.maximum(boxes[..., :2], boxes[..., 2:])], -1
    )
    return Predictions(logits, boxes, torch.randn(images, count, generator=random) if quality else None)


def with_sizes(objects: Objects, size: tuple[int, int]) -> Objects:
    sizes = torch.tensor([size] * objects.batch_size, dtype=torch.float32)
    return Objects(**{**vars(objects), "sizes": sizes})


def qualities(found: Assignment) -> Tensor:
    """(B, R) class target of each prior, 0 for background."""
    flat = torch.zeros(found.ignored.numel())
    kept = found.weight > 0
    flat[found.prior[kept]] = found.quality[kept]
    return flat.view_as(found.ignored)


def check(rule: Assigner, priors: Priors, objects: Objects, said: Predictions) -> None:
    found = rule(priors, objects, said)
    index, quality = dense_predicted(rule, priors, objects, said)
    mine = found.per_prior()
    assert torch.equal(mine.clamp(min=-1), index)
    torch.testing.assert_close(qualities(found), quality, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("quality", [True, False], ids=["quality", "plain"])
@pytest.mark.parametrize("shapes", [POINT, ONE_ANCHOR, NINE_ANCHORS], ids=["points", "one", "nine"])
@pytest.mark.parametrize("rule", RULES, ids=str)
def test_random_batch(rule: Assigner, shapes: tuple[tuple[float, float], ...], quality: bool) -> None:
    priors = pyramid(SIZE, shapes=shapes)
    for seed in range(3):
        images = [random_boxes(n, SIZE, 10 * seed + i) for i, n in enumerate((12, 0, 1, 60))]
        objects = with_sizes(batch(*images), SIZE)
        check(rule, priors, objects, predictions(priors, objects, seed, quality))


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_priors_without_grids_give_the_same(rule: Assigner) -> None:
    priors = pyramid(SIZE, shapes=EXACT)
    objects = with_sizes(batch(random_boxes(30, SIZE, 1), random_boxes(3, SIZE, 2)), SIZE)
    said = predictions(priors, objects, 5)
    one, two = rule(priors, objects, said), rule(without_grids(priors), objects, said)
    assert torch.equal(one.per_prior(), two.per_prior())
    torch.testing.assert_close(qualities(one), qualities(two))


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_in_parts_gives_the_same(rule: Assigner, monkeypatch: pytest.MonkeyPatch) -> None:
    priors = pyramid(SIZE, shapes=EXACT)
    objects = with_sizes(batch(random_boxes(30, SIZE, 1), random_boxes(9, SIZE, 2)), SIZE)
    said = predictions(priors, objects, 6)
    whole = rule(priors, objects, said)
    monkeypatch.setattr("detector.assign.base.PAIRS_AT_ONCE", 3000)
    monkeypatch.setattr("detector.assign.predicted.LOGITS_AT_ONCE", 100)
    parts = rule(priors, objects, said)
    assert torch.equal(whole.per_prior(), parts.per_prior())
    assert torch.equal(whole.quality, parts.quality)


@settings(max_examples=120, deadline=None, derandomize=True)
@given(grids(), truth(), st.sampled_from(RULES), st.integers(0, 1000), st.booleans())
def test_any_grid_and_any_objects(priors: Priors, objects: Objects, rule: Assigner, seed: int, quality: bool) -> None:
    objects = with_sizes(objects, (100, 120))
    said = predictions(priors, objects, seed, quality)
    if isinstance(rule, Hungarian):
        # Twins make several matchings equally good: what counts is that none is better.
        mine, (theirs, _) = rule(priors, objects, said).per_prior(), dense_predicted(rule, priors, objects, said)
        for i in objects.image.unique().tolist():
            cost = rule.cost(priors, objects.select_image(i), said.select_image(i))
            first = int((objects.image < i).sum())
            totals = []
            for row in (mine[i], theirs[i]):
                prior = (row >= 0).nonzero()[:, 0]
                totals.append(cost[row[prior] - first, prior].double().sum())
            assert (mine[i] >= 0).sum() == (theirs[i] >= 0).sum() == min(cost.shape)
            torch.testing.assert_close(*totals, atol=1e-4, rtol=1e-5)
        return
    check(rule, priors, objects, said)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.integers(0, 10_000), st.integers(1, 4))
def test_hungarian_is_the_best_of_all_matchings(seed: int, count: int) -> None:
    size = (40, 24)
    priors = pyramid(size, strides=(16, 32))  # 6 + 2
    objects = with_sizes(batch(random_boxes(count, size, seed)), size)
    said = predictions(priors, objects, seed)
    found = Hungarian()(priors, objects, said)
    cost = Hungarian().cost(priors, objects, said)
    mine = float(cost[found.object, found.prior].double().sum())
    assert len(found.object.unique()) == len(found.prior.unique()) == count
    assert mine == pytest.approx(least_total(cost), abs=1e-4)


@pytest.mark.parametrize("flat", [False, True])
def test_hungarian_finds_the_optimum_where_all_objects_want_the_same_priors(flat: bool) -> None:
    """Far more objects than the priors that are tried first, at one place and of one class: it has to ask again."""
    size = (160, 96)
    priors = pyramid(size, strides=(8, 16, 32))
    boxes = random_boxes(1, size, 3) + 0.01 * torch.arange(150)[:, None]
    objects = with_sizes(batch(boxes), size)
    objects = replace(objects, labels=torch.zeros_like(objects.labels))
    said = predictions(priors, objects, 5)
    if flat:  # a head that has learnt nothing: only the boxes tell priors apart
        said = replace(said, class_logits=torch.full_like(said.class_logits, -4.6))
    found, cost = Hungarian()(priors, objects, said), Hungarian().cost(priors, objects, said)
    assert len(found.object.unique()) == len(found.prior.unique()) == len(found.prior) == 150
    row, column = linear_sum_assignment(cost.numpy())
    least = float(cost[row, column].double().sum())
    assert float(cost[found.object, found.prior].double().sum()) == pytest.approx(least, abs=1e-5)


def test_hungarian_with_more_objects_than_priors_uses_every_prior() -> None:
    priors = pyramid((40, 24), strides=(16,))
    objects = with_sizes(batch(random_boxes(9, (40, 24), 0)), (40, 24))
    found = Hungarian()(priors, objects, predictions(priors, objects, 0))
    assert sorted(found.prior.tolist()) == list(range(len(priors)))
    assert len(found.object.unique()) == len(priors)
