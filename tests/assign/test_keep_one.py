"""No object without a prior, where that is asked for."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from detector.assign import Assigner, Atss, Fcos, MaxIou, Ota, SimOta, TaskAligned, around
from detector.assign.geometry import nearest_priors
from detector.structures import Assignment, Objects, Predictions, Priors
from tests.assign.make import EXACT, ONE_ANCHOR, POINT, batch, pyramid, random_boxes
from tests.assign.test_dense import grids, truth
from tests.assign.test_guarantees import NeverWaits, fitting

SIZE = (200, 264)
RULES: list[Assigner] = [MaxIou(low_quality="none"), Fcos(), Atss(), SimOta(), TaskAligned(), Ota()]


def asked(rule: Assigner) -> Assigner:
    return rule.model_copy(update={"keep_one": True})


def run(rule: Assigner, priors: Priors, objects: Objects, said: Predictions | None = None) -> Assignment:
    if rule.uses_predictions and said is None:
        said = fitting(priors, objects.batch_size)
    return rule(priors, objects, said)


def counts(found: Assignment, objects: Objects) -> torch.Tensor:
    """(N,) pairs of each object."""
    return torch.bincount(found.object[found.weight > 0], minlength=len(objects))


@pytest.mark.parametrize("shapes", [POINT, ONE_ANCHOR, EXACT], ids=["points", "one", "three"])
@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.type)
def test_every_object_has_a_prior(rule: Assigner, shapes: tuple[tuple[float, float], ...]) -> None:
    priors = pyramid(SIZE, shapes=shapes)
    tiny = torch.tensor([[101.3, 57.2, 101.9, 57.6], [10.1, 10.1, 10.4, 10.3]])
    objects = batch(random_boxes(30, SIZE, 0), [], tiny)
    plain, kept = run(rule, priors, objects), run(asked(rule), priors, objects)
    assert (counts(plain, objects) == 0).any(), "nothing to do: the test shows nothing"
    assert (counts(kept, objects) > 0).all()
    # No more than was needed: who had a prior keeps the best.
    before, after = plain.per_prior(), kept.per_prior()
    changed = before != after
    assert (counts(plain, objects)[after[changed]] == 0).all()
    assert changed.sum() == (counts(plain, objects) == 0).sum()
    mine = kept.prior[kept.weight > 0]
    assert len(mine.unique()) == len(mine)


def test_it_is_the_prior_that_overlaps_most_then_the_nearest() -> None:
    priors = pyramid((64, 64), strides=(8, 16), shapes=ONE_ANCHOR)
    # A tiny object in all anchors: those of the fine level overlap it more, and of them the nearest counts.
    found = asked(MaxIou(low_quality="none"))(priors, batch([[21.0, 29, 23, 31]]))
    pair = found.weight > 0
    assert pair.sum() == 1
    assert priors.centers[found.prior[pair]].tolist() == [[20.0, 28.0]]
    assert found.quality[pair].tolist() == [1.0]


def test_it_is_the_prediction_that_counts_where_the_rule_looks_at_it() -> None:
    priors = pyramid((64, 64), strides=(8,))
    box = torch.tensor([21.3, 29.0, 21.9, 30.0])  # no point inside
    boxes = priors.boxes[None].clone()
    boxes[0, 3 * 8 + 3] = box + torch.tensor([0.0, 0.0, 0.6, 0.0])  # IoU .5, at (28, 28)
    said = Predictions(torch.zeros(1, 64, 3), boxes)
    rule = asked(TaskAligned())
    found = rule(priors, batch([box.tolist()]), said)
    pair = found.weight > 0
    assert found.prior[pair].tolist() == [27]
    torch.testing.assert_close(found.quality[pair], torch.tensor([0.5]), atol=1e-4, rtol=0)
    hard = asked(Ota())(priors, batch([box.tolist()]), said)
    assert hard.per_prior()[0, 27] == 0
    assert hard.quality[hard.weight > 0].tolist() == [1.0]


def test_the_best_pair_of_another_is_left_alone() -> None:
    # One prior near, and it is the only one of the first object; the next best goes to the second.
    priors = pyramid((32, 64), strides=(16,), shapes=ONE_ANCHOR)
    objects = batch([[0.0, 0, 16, 16], [0.0, 0, 16, 16], [0.0, 0, 16, 15]])
    found = asked(MaxIou(low_quality="none"))(priors, objects)
    assert sorted(counts(found, objects).tolist()) == [1, 1, 1]
    assert found.per_prior()[0, 0] == 0  # of equals the first


def test_a_robbed_object_keeps_its_best() -> None:
    priors = pyramid(SIZE, shapes=POINT)
    big = [20.0, 20, 180, 180]
    inside = [[x + 0.1, 100.1, x + 0.4, 100.3] for x in range(40, 160, 4)]
    objects = batch([big, *inside])
    said = fitting(priors, 1)
    plain = SimOta()(priors, objects, said)
    kept = asked(SimOta())(priors, objects, said)
    assert (counts(kept, objects) > 0).all()
    own = (plain.object == 0) & (plain.weight > 0)
    best = plain.prior[own][plain.quality[own].argmax()]
    assert kept.per_prior().view(-1)[best] == 0


def test_where_all_are_taken_some_stay_without() -> None:
    priors = pyramid((32, 32), strides=(16,))  # 4 priors
    objects = batch([[3.0, 3, 3.5, 3.5]] * 9)
    found = asked(Fcos())(priors, objects)
    assert counts(found, objects).tolist() == [1] * 4 + [0] * 5


def test_half_of_the_weights_are_padding_and_nothing_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(around, "may_ask", lambda device: False)  # as on a device that is not its own host
    priors = pyramid(SIZE)
    objects = batch(random_boxes(500, SIZE, 0), random_boxes(3, SIZE, 1))
    for rule in RULES:
        run(asked(rule), priors, objects)
        said = fitting(priors, 2)
        with NeverWaits():
            found = asked(rule)(priors, objects, said)
        away = Predictions(*(t.to("meta") for t in (said.class_logits, said.boxes, said.quality_logits)))
        assert asked(rule)(priors.to("meta"), objects.to("meta"), away).prior.shape == found.prior.shape


@settings(max_examples=60, deadline=None, derandomize=True)
@given(grids(), truth(), st.sampled_from(RULES))
def test_any_grid_and_any_objects(priors: Priors, objects: Objects, rule: Assigner) -> None:
    """Who stays without has all of its candidates taken by others' best; nobody loses the last one."""
    plain, kept = run(rule, priors, objects), run(asked(rule), priors, objects)
    before, after = counts(plain, objects), counts(kept, objects)
    assert (after[before > 0] > 0).all()
    mine = kept.prior[kept.weight > 0]
    assert len(mine.unique()) == len(mine)
    without = (after == 0).nonzero()[:, 0]
    if len(without):
        candidates = nearest_priors(priors, objects.centers, 9).prior + objects.image[:, None] * len(priors)
        owner = kept.per_prior().view(-1)
        for i in without.tolist():
            assert (owner[candidates[i]] >= 0).all()


def test_permuting_objects_permutes_the_result() -> None:
    priors = pyramid(SIZE)
    objects = batch(random_boxes(80, SIZE, 3))
    order = torch.randperm(80, generator=torch.Generator().manual_seed(0))
    other = replace(objects, boxes=objects.boxes[order], labels=objects.labels[order])
    for rule in RULES:
        one, two = run(asked(rule), priors, objects).per_prior(), run(asked(rule), priors, other).per_prior()
        assert torch.equal(torch.where(two >= 0, order[two.clamp(min=0)], two), one)
