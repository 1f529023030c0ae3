"""The interval is honest: equal arms are seldom told apart, a true difference is found as often as promised."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from detector.evaluate.matches import Matches
from detector.lab.bootstrap import draw, resampled
from detector.lab.verdict import LEVEL, POWER, Estimate, holm, judge

IMAGES = 40


def test_a_worked_example() -> None:
    """Three seeds, images without influence: the paired t-test of the differences 1, 2, 3."""
    arm, base = np.array([11.0, 22, 33]), np.array([10.0, 20, 30])
    still = np.zeros((3, 50))
    estimate = Estimate.paired(arm, base, arm[:, None] + still, base[:, None] + still, images=30)
    expected = stats.ttest_rel(arm, base)
    assert estimate.difference == 2
    assert estimate.p() == pytest.approx(expected.pvalue, abs=1e-6)
    interval = expected.confidence_interval(0.95)
    (found,) = judge([estimate])
    assert (found.low, found.high) == pytest.approx((interval.low, interval.high))
    assert found.verdict == "not distinguishable"
    assert found.seeds_needed is not None
    assert estimate.power(2, seeds=found.seeds_needed) >= POWER > estimate.power(2, seeds=found.seeds_needed - 1)


def test_image_variance_alone_is_the_bootstraps() -> None:
    rng = np.random.default_rng(0)
    drawn = rng.normal(0, 0.02, (1, 20000)).repeat(4, 0)  # all seeds feel the same images
    arm = np.full(4, 0.5)
    estimate = Estimate.paired(arm, np.full(4, 0.45), arm[:, None] + drawn, np.full((4, 20000), 0.45), images=1000)
    assert estimate.seed_variance == 0
    assert estimate.half_width() == pytest.approx(1.962 * 0.02, rel=0.02)
    assert estimate.seeds_needed() is None or estimate.seeds_needed() == 2
    weak = Estimate(0.01, 1e-8, 0.02**2, 4, 1000)
    assert weak.seeds_needed() is None, "no number of seeds makes up for too few images"


def test_a_single_seed_says_nothing() -> None:
    (found,) = judge([Estimate.paired(np.array([0.9]), np.array([0.1]), np.zeros((1, 10)), np.zeros((1, 10)), 50)])
    assert found.verdict == "not distinguishable"
    assert math.isinf(found.high)
    assert math.isinf(found.smallest)
    assert found.seeds_needed is None


def test_the_same_numbers_twice_do_not_differ() -> None:
    same, drawn = np.array([0.4, 0.5, 0.45]), np.random.default_rng(0).normal(0.45, 0.1, (3, 200))
    (found,) = judge([Estimate.paired(same, same, drawn, drawn, 50)])
    assert (found.difference, found.verdict, found.p, found.smallest) == (0, "not distinguishable", 1, 0)


def test_holm() -> None:
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([]) == []
    arms = [Estimate(d, 1e-4, 1e-6, 5, 500) for d in (0.014, 0.05, 0.0)]
    alone, together = judge(arms[:1])[0], judge(arms)
    assert alone.verdict == "better"
    assert [c.verdict for c in together] == ["not distinguishable", "better", "not distinguishable"]
    assert together[0].p == alone.p
    assert together[0].smallest > alone.smallest


def tells_apart(estimate: Estimate) -> bool:
    """The verdict on a single comparison, without what is computed beside it."""
    return abs(estimate.difference) > estimate.half_width()


def test_the_verdict_is_whether_the_interval_holds_zero() -> None:
    study = np.random.default_rng(8)
    for _ in range(40):
        estimate = numbers_of(study, 0.03, 4)
        (found,) = judge([estimate])
        assert (found.verdict != "not distinguishable") == tells_apart(estimate) == (not found.low <= 0 <= found.high)
        assert found.corrected_p == found.p == estimate.p()


def numbers_of(study: np.random.Generator, difference: float, seeds: int, draws: int = 100) -> Estimate:
    """Scores that behave as scores do, without detections: per-image terms shared by the seeds, and own ones."""
    shared = study.normal(0, 0.15, (1, IMAGES))
    own = study.normal(0, 0.1, (seeds, IMAGES)) + study.normal(0, 0.02, (seeds, 1))
    each = shared + own + difference
    weights = study.multinomial(IMAGES, np.full(IMAGES, 1 / IMAGES), size=draws) / IMAGES
    return Estimate.paired(each.mean(1), np.zeros(seeds), each @ weights.T, np.zeros((seeds, draws)), IMAGES)


# What is true of the studies above: the seeds' own scatter, and the images' part that all seeds share.
def truth(seeds: int) -> Estimate:
    return Estimate(0.0, 0.02**2 + 0.1**2 / IMAGES, 0.15**2 / IMAGES, seeds, IMAGES)


@pytest.mark.parametrize("seeds", [2, 3, 5, 10])
def test_equal_arms_are_seldom_told_apart(seeds: int) -> None:
    study = np.random.default_rng(seeds)
    wrong = np.mean([tells_apart(numbers_of(study, 0.0, seeds)) for _ in range(1000)])
    assert wrong <= LEVEL + 0.007  # one standard error of 1,000 studies


@pytest.mark.parametrize("seeds", [3, 5, 10])
def test_a_difference_is_found_with_the_stated_power(seeds: int) -> None:
    study = np.random.default_rng(seeds)
    size = truth(seeds).smallest()
    found = np.mean([tells_apart(numbers_of(study, size, seeds)) for _ in range(500)])
    assert abs(found - POWER) < 0.06


def evaluation(rng: np.random.Generator, hard: np.ndarray, skill: float) -> Matches:
    """A model's detections on images of which each has its own difficulty: one category, ten objects an image."""
    images, objects, false = len(hard), 10, 6
    chance = 1 / (1 + np.exp(-(skill - hard)))
    image = np.repeat(np.arange(images), objects)
    quality = 2 * (chance[image] - rng.random(len(image)))  # IoU beyond 0.5, in halves; below 0 a miss
    score = np.concatenate([rng.beta(4, 2, len(image)), rng.beta(2, 4, images * false)])
    steps = np.arange(10) / 10
    hit = np.concatenate([quality > steps[:, None], np.zeros((10, images * false), bool)], axis=1)
    image = np.concatenate([image, np.repeat(np.arange(images), false)])
    order = np.argsort(-score, kind="stable")
    hit = np.stack([hit[:, order]] * 4)
    none = np.zeros(len(score), dtype=np.int32)
    return Matches(
        category=none,
        image=image[order].astype(np.int32),
        score=score[order],
        object=np.where(hit[0], 0, -1).astype(np.int32),
        hit=hit,
        ignored=np.zeros_like(hit),
        objects=np.full((4, images, 1), objects, dtype=np.int32),
    )


def study_of(rng: np.random.Generator, skills: tuple[float, float], seeds: int, images: int = 30) -> Estimate:
    """Two arms through detections, matches, AP50 and its bootstrap: the way of a real study from end to end."""
    hard = rng.normal(0, 1, images)
    arms = [[evaluation(rng, hard, skill + rng.normal(0, 0.15)) for _ in range(seeds)] for skill in skills]
    weights = draw(images, 60, seed=int(rng.integers(1 << 30)))
    once = np.ones((1, images))
    scores = [np.array([resampled(m, "AP50", once)[0] for m in arm]) for arm in arms]
    drawn = [np.stack([resampled(m, "AP50", weights) for m in arm]) for arm in arms]
    return Estimate.paired(scores[1], scores[0], drawn[1], drawn[0], images)


def test_200_studies_of_identical_arms() -> None:
    rng = np.random.default_rng(0)
    wrong = sum(judge([study_of(rng, (1.0, 1.0), 3)])[0].verdict != "not distinguishable" for _ in range(200))
    assert wrong <= 10  # 5 %


def test_a_true_difference_between_arms_is_found_with_the_stated_power() -> None:
    """The size comes from what many studies say about their own variances, never from how often they find it."""
    rng = np.random.default_rng(1)
    seeds = 5
    pilot = [study_of(rng, (1.0, 1.5), seeds) for _ in range(40)]
    size = float(np.mean([e.difference for e in pilot]))
    typical = Estimate(size, float(np.mean([e.seed_variance for e in pilot])),
                       float(np.mean([e.image_variance for e in pilot])), seeds, 30)  # fmt: skip
    promised = typical.power(size)
    assert 0.5 < promised < 0.99, "a size at which power says something"
    found = np.mean([tells_apart(study_of(rng, (1.0, 1.5), seeds)) for _ in range(200)])
    assert abs(found - promised) < 0.1
