"""Samplers: how many, which, what becomes of the rest, and that a step draws the same again."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, get_args

import pytest
import torch
from torch import Tensor

from detector.assign import MaxIou, from_index
from detector.assign.sample import AnySampler, IouBalanced, Ohem, Random, Sampler, paired
from detector.boxes import all_pairs_iou
from detector.structures import BACKGROUND, IGNORED, Assignment, Objects, Priors
from tests.assign.make import batch, random_boxes

KINDS: list[type[Sampler]] = list(get_args(get_args(AnySampler)[0]))


def scene(positives: list[int], negatives: list[int], total: int) -> tuple[Assignment, Priors, Objects]:
    """Images with so many positives, then negatives; the rest is ignored.  One object an image."""
    index = torch.full((len(positives), total), IGNORED)
    for i, (p, n) in enumerate(zip(positives, negatives, strict=True)):
        index[i, :p] = i
        index[i, p : p + n] = BACKGROUND
    priors = Priors(random_boxes(total, (100, 100), 0), torch.ones(total), (total,))
    return from_index(index), priors, batch(*[[[10.0, 10, 50, 60]]] * len(positives))


def counts(assignment: Assignment) -> tuple[list[int], list[int]]:
    positive = paired(assignment)
    negative = ~assignment.ignored & ~positive
    return positive.sum(1).tolist(), negative.sum(1).tolist()


def losses_of(assignment: Assignment) -> Tensor:
    return torch.rand(assignment.ignored.shape, generator=torch.Generator().manual_seed(4))


def run(sampler: Sampler, found: Assignment, priors: Priors, objects: Objects, stage: int = 0) -> Assignment:
    return sampler(found, priors, objects, stage=stage, losses=lambda: losses_of(found))


@pytest.mark.parametrize("kind", KINDS, ids=lambda k: k.model_fields["type"].default)
def test_as_many_as_the_peers_take(golden: Any, kind: type[Sampler]) -> None:
    """mmdetection's random sampler and torchvision's; objects that count as proposals are positives here."""
    rows = [(r[:5], int(r[6]) if r[5] else 0, r[7:]) for r in golden("samplers").scenario("random")["rows"].tolist()]
    rows += [([*r[:4], -1], 0, r[4:]) for r in golden("samplers").scenario("tv_balanced")["rows"].tolist()]
    for (there, others, count, fraction, ratio), objects, taken in rows:
        positives, negatives = int(there) + objects, int(others)
        made = scene([positives], [negatives], positives + negatives + 3)
        limit = None if ratio < 0 else ratio
        sampler = kind(count=int(count), positive_fraction=fraction, negatives_per_positive=limit)
        assert counts(run(sampler, *made)) == ([int(taken[0])], [int(taken[1])])


@pytest.mark.parametrize("kind", KINDS, ids=lambda k: k.model_fields["type"].default)
def test_what_is_not_picked_is_ignored(kind: type[Sampler]) -> None:
    found, priors, objects = scene([30, 0, 2, 500], [400, 300, 1, 0], 500)
    picked = run(kind(count=40, positive_fraction=0.5), found, priors, objects)
    assert counts(picked) == ([20, 0, 2, 20], [20, 40, 1, 0])
    before, after = found.per_prior(), picked.per_prior()
    assert torch.equal(after[after >= 0], before[after >= 0])
    assert ((after == IGNORED) | (after == before)).all()
    assert torch.equal(picked.ignored, after == IGNORED)
    assert torch.equal(picked.prior, found.prior)
    assert torch.equal(picked.object, found.object)


@pytest.mark.parametrize("kind", KINDS, ids=lambda k: k.model_fields["type"].default)
def test_next_to_nothing(kind: type[Sampler]) -> None:
    assert counts(run(kind(), *scene([0, 0, 1], [1, 0, 0], 1))) == ([0, 0, 1], [1, 0, 0])


def test_no_object_in_the_batch() -> None:
    found, priors, _ = scene([0, 0], [90, 5], 90)
    for kind in KINDS:
        picked = run(kind(count=10), found, priors, batch([], []))
        assert counts(picked) == ([0, 0], [10, 5])


def test_a_prior_keeps_all_its_pairs() -> None:
    pairs = Assignment(
        num_priors=3,
        prior=torch.tensor([0, 0, 1]),
        object=torch.tensor([0, 1, 1]),
        quality=torch.tensor([1.0, 0.5, 0.7]),
        weight=torch.tensor([1.0, 2.0, 1.0]),
        ignored=torch.zeros(1, 3, dtype=torch.bool),
    )
    objects = batch([[0.0, 0, 9, 9], [0, 0, 8, 8]])
    priors = Priors(random_boxes(3, (20, 20), 0), torch.ones(3), (3,))
    sampler = Ohem(count=2, positive_fraction=0.5)
    picked = sampler(pairs, priors, objects, losses=lambda: torch.tensor([[2.0, 1.0, 3.0]]))
    assert picked.weight.tolist() == [1, 2, 0]
    assert picked.ignored.tolist() == [[False, True, False]]


def test_draws_repeat_with_the_step_and_leave_the_global_generator_alone() -> None:
    made = scene([50, 50], [400, 400], 450)
    picks = []
    for step, stage in ((1, 0), (1, 0), (1, 1), (2, 0)):
        torch.manual_seed(step)
        torch.rand(stage)  # whatever was drawn before
        state = torch.get_rng_state()
        picks.append(run(Random(count=64), *made, stage=stage).ignored)
        assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(picks[0], picks[1])
    assert not torch.equal(picks[0], picks[2])
    assert not torch.equal(picks[0], picks[3])
    assert not torch.equal(picks[0][0], picks[0][1])


def test_every_prior_has_the_same_chance() -> None:
    made = scene([8], [40], 48)
    taken = torch.zeros(48)
    for step in range(600):
        torch.manual_seed(step)
        taken += (~run(Random(count=16, positive_fraction=0.25), *made).ignored[0]).float()
    share = taken / 600
    assert (share[:8] - 4 / 8).abs().max() < 0.1
    assert (share[8:] - 12 / 40).abs().max() < 0.1


def test_ohem_picks_the_highest_losses() -> None:
    found, priors, objects = scene([10], [50], 60)
    picked = run(Ohem(count=12, positive_fraction=0.25), found, priors, objects)
    loss, taken = losses_of(found)[0], ~picked.ignored[0]
    assert taken[:10].sum() == 3
    assert loss[:10][taken[:10]].min() >= loss[:10][~taken[:10]].max()
    assert loss[10:][taken[10:]].min() >= loss[10:][~taken[10:]].max()
    with pytest.raises(ValueError, match="pass `losses`"):
        Ohem()(found, priors, objects)


def test_iou_balanced_takes_as_many_of_each_range() -> None:
    objects = batch([[10.0, 10, 50, 60]], [[30.0, 30, 90, 80]])
    center = torch.rand(2, 900, 2, generator=torch.Generator().manual_seed(0)) * 100
    boxes = torch.cat([center - 20, center + 20], 2)  # an own set for each image
    priors = Priors(boxes, torch.ones(900), (900,))
    found = MaxIou(positive_iou=0.5, negative_iou=0.5, low_quality="none")(priors, objects)
    picked = run(IouBalanced(count=60, positive_fraction=0.0), found, priors, objects)
    for i in range(2):
        iou = all_pairs_iou(boxes[i], objects.boxes[i : i + 1])[:, 0]
        negative = ~paired(found)[i]
        edges = iou[negative].max() / 3
        taken = iou[~picked.ignored[i]]
        assert len(taken) == 60
        for k in range(3):
            inside = (taken >= k * edges) & (taken <= (k + 1) * edges * 1.0001)
            assert inside.sum() == 20
    plain = run(Random(count=60, positive_fraction=0.0), found, priors, objects)
    assert (all_pairs_iou(boxes[0], objects.boxes[:1])[~plain.ignored[0]] == 0).sum() > 20


def test_iou_balanced_fills_up_what_a_range_lacks() -> None:
    """Five negatives overlap the object, all the others do not: of those come the rest."""
    apart = torch.tensor([[60.0, 60, 70, 70]]).expand(95, 4) + torch.arange(95.0)[:, None] / 10
    near = torch.tensor([[0.0, 0, 10, 10]]).expand(5, 4) + torch.arange(5.0)[:, None]
    priors = Priors(torch.cat([near, apart]), torch.ones(100), (100,))
    found = from_index(torch.full((1, 100), BACKGROUND))
    picked = IouBalanced(count=30, bins=3)(found, priors, batch([[0.0, 0, 30, 30]]))
    assert counts(picked) == ([0], [30])
    # Each range would give ten; the upper ones hold fewer.
    assert (~picked.ignored[0, :5]).all()


def test_the_golden_assignment_survives_a_sampler_that_takes_all(golden: Any) -> None:
    for name in ("typical", "ignore", "zero", "one"):
        data = golden("samplers").scenario(f"{name}/pseudo")
        index = data["matched"].long()[None]
        found = from_index(index)
        boxes = data["gt"]
        priors = Priors(random_boxes(index.shape[1], (200, 200), 1), torch.ones(index.shape[1]), (index.shape[1],))
        picked = Random(count=10**6, positive_fraction=1.0)(found, priors, batch(boxes))
        assert torch.equal(picked.per_prior(), index)
        assert paired(picked)[0].nonzero()[:, 0].tolist() == data["pos"].tolist()
        assert (~picked.ignored & ~paired(picked))[0].nonzero()[:, 0].tolist() == data["neg"].tolist()


def test_background_weights_pass() -> None:
    found, priors, objects = scene([2], [6], 8)
    weights = torch.rand(1, 8, 3)
    picked = run(Random(count=4), replace(found, background_weight=weights), priors, objects)
    assert picked.background_weight is weights
