"""Dual weighting computed by hand on a small example, equation by equation, and what the losses make of it."""

from __future__ import annotations

import math

import pytest
import torch

from detector.assign import DualWeight
from detector.losses.classification import Bce
from detector.losses.targets import class_targets
from detector.structures import Assignment, Grid, Objects, Predictions, Priors
from tests.assign.make import batch, on_grids, pyramid, random_boxes
from tests.assign.test_rules_dense import said

# One row of four priors, centred at x = 4, 12, 20, 28; the object holds the centres of the first three.
PRIORS = on_grids((Grid(1, 4, 8, ((8.0, 8.0),)),))
OBJECT = [0.0, 0.0, 24.0, 8.0]
CLASS = [[0.6, 0.1], [0.9, 0.2], [0.3, 0.5], [0.7, 0.4]]
QUALITY = [0.5, 0.8, 0.9, 0.5]
# Boxes as high as the object from 0, 24, 12 and 16 pixels wide, the last beside it.
BOXES = [[0.0, 0, 24, 8], [0.0, 0, 18, 8], [12.0, 0, 24, 8], [24.0, 0, 32, 8]]
OVERLAP = [1.0, 0.75, 0.5, 0.0]
GIOU = [1.0, 0.75, 0.5, 0.0]  # the box around both is the object itself, or both side by side


def example() -> tuple[Priors, Objects, Predictions]:
    logits = torch.tensor([CLASS], dtype=torch.float64).logit().float()
    quality = torch.tensor([QUALITY], dtype=torch.float64).logit().float()
    return PRIORS, batch([OBJECT]), Predictions(logits, torch.tensor([BOXES]), quality)


def by_hand() -> tuple[list[float], list[float]]:
    """Positive and negative weights of the object's class in the first three priors."""
    s = [c[0] * q for c, q in zip(CLASS, QUALITY, strict=True)]
    t = [s[i] * math.exp(-5 * (1 - GIOU[i])) for i in range(3)]
    c = [math.exp(-(d**2) / (2 * 1.11**2)) for d in (1, 0, 1)]  # strides from the object's centre, x = 12
    total = sum(math.exp(3 * t[i]) * t[i] * c[i] for i in range(3))
    positive = [math.exp(5 * t[i]) * t[i] * c[i] / total for i in range(3)]
    # (u^2 - 1) / (0.5^2 - 1) is 0, 0.5833 and 1 for the three boxes, so already from 0 to 1.
    fall = [(u**2 - 1) / (0.5**2 - 1) for u in OVERLAP[:3]]
    return positive, [fall[i] * s[i] ** 2 for i in range(3)]


def test_an_example_by_hand() -> None:
    found = DualWeight()(*example())
    positive, negative = by_hand()
    kept = found.weight > 0
    assert sorted(found.prior[kept].tolist()) == [0, 1, 2]
    for prior, quality, weight in zip(found.prior[kept], found.quality[kept], found.weight[kept], strict=True):
        assert float(quality * weight) == pytest.approx(positive[prior], rel=1e-5)
        assert float((1 - quality) * weight) == pytest.approx(negative[prior], rel=1e-5, abs=1e-7)
    background = found.background_weight
    assert background is not None
    assert background[0, :3, 0].tolist() == pytest.approx(negative, rel=1e-5, abs=1e-7)
    # Other classes, and the prior outside the object: the squared score alone.
    assert background[0, :, 1].tolist() == pytest.approx(
        [(c[1] * q) ** 2 for c, q in zip(CLASS, QUALITY, strict=True)], rel=1e-5
    )
    assert float(background[0, 3, 0]) == pytest.approx((0.7 * 0.5) ** 2, rel=1e-5)


def test_the_class_loss_is_both_terms() -> None:
    """Binary cross-entropy towards the pairs' qualities is - sum of p log(s) + q log(1 - s), over every class."""
    priors, objects, predictions = example()
    found = DualWeight()(priors, objects, predictions)
    loss = Bce()(predictions.class_logits, class_targets(found, objects.labels, 2))
    positive, negative = by_hand()
    background = found.background_weight
    assert background is not None
    s = predictions.class_logits[0].double().sigmoid()
    wanted = -sum(positive[i] * math.log(s[i, 0]) + negative[i] * math.log(1 - s[i, 0]) for i in range(3))
    rest = -(background[0].double() * (1 - s).log())
    wanted += float(rest.sum() - rest[:3, 0].sum())
    assert float(loss) == pytest.approx(wanted, rel=1e-5)


def test_the_lowest_negative_weight_of_several_objects_of_a_class_counts() -> None:
    priors, objects, predictions = example()
    # Of the second object the third prior is the best (IoU 0.75) and so no negative; the second is a full one (0.42).
    pair = batch([OBJECT, [8.0, 0, 24, 8]])
    both = Objects(
        pair.boxes, torch.zeros(2, dtype=torch.long), pair.image, pair.ignore, pair.ignore_image, pair.batch_size
    )
    alone = DualWeight()(priors, objects, predictions).background_weight
    together = DualWeight()(priors, both, predictions).background_weight
    assert alone is not None
    assert together is not None
    assert float(alone[0, 2, 0]) == pytest.approx((0.3 * 0.9) ** 2, rel=1e-5)
    assert float(together[0, 2, 0]) == pytest.approx(0, abs=1e-7)
    assert torch.equal(together[0, [0, 1, 3]], alone[0, [0, 1, 3]])


def test_a_lone_prior_is_wholly_negative_too() -> None:
    """The object's only prior is its worst as well as its best: the published scaling gives it the weight 1."""
    priors, _, predictions = example()
    found = DualWeight()(priors, batch([[1.0, 0, 7, 8]]), predictions)
    assert (found.weight > 0).sum() == 1
    assert found.background_weight is not None
    assert float(found.background_weight[0, 0, 0]) == pytest.approx((0.6 * 0.5) ** 2, rel=1e-5)


def test_only_the_heaviest_pairs_are_kept_and_the_sum_counts_all() -> None:
    priors = pyramid((200, 264))
    objects = batch(random_boxes(9, (200, 264), 0))
    predictions = said(priors, objects)
    every, few = (DualWeight(most=most)(priors, objects, predictions) for most in (10_000, 12))

    def positives(found: Assignment, i: int) -> torch.Tensor:
        mine = (found.object == i) & (found.weight > 0)
        return (found.weight * found.quality)[mine].sort(descending=True).values

    for i in range(len(objects)):
        torch.testing.assert_close(positives(few, i), positives(every, i)[:12])
    assert few.background_weight is not None
    assert every.background_weight is not None
    assert torch.equal(few.background_weight, every.background_weight)


def test_what_is_left_out_by_default_weighs_next_to_nothing() -> None:
    """A 400-pixel object has 3,300 priors here; the 256 kept hold all but a few thousandths of the weight."""
    priors = pyramid((416, 416))
    objects = batch([[5.0, 5, 410, 410]])
    predictions = said(priors, objects)
    every, kept = (DualWeight(most=most)(priors, objects, predictions) for most in (10_000, 256))
    total, held = (float((x.weight * x.quality).sum()) for x in (every, kept))
    assert (every.weight > 0).sum() > 400
    assert held > 0.995 * total
