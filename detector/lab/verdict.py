"""Is the difference between two arms real?

Arm minus baseline is taken seed by seed (both started from the same weights and saw the same batches).  Two things make
the mean of these differences uncertain: other seeds would give others, and so would other validation images, which all
seeds share.  Their variances are estimated apart, since they have different amounts of data behind them:

    seeds    v1 = variance of the differences over S seeds / S, with S - 1 degrees of freedom
    images   v2 = variance of the mean difference over bootstrap resamples of the n images, less what the seeds'
             scatter already covers (how much more the seeds differ on resampled images)

The interval's half width is sqrt(t(S - 1)^2 v1 + t(n - 1)^2 v2): each part gets the quantile of its own degrees of
freedom, as in Cochran's test (Cochran, "Approximate significance levels of the Behrens-Fisher test", Biometrics 1964),
which errs to the safe side.  With three seeds t is 4.3; the percentile bootstrap would use the spread of three numbers
as it is and call far too many differences real.

Legend: S seeds, W resamples.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy import optimize, stats

LEVEL = 0.05
POWER = 0.8
MOST_SEEDS = 1000
Verdict = Literal["better", "worse", "not distinguishable"]


@dataclass(frozen=True)
class Estimate:
    """A difference and what it is made of."""

    difference: float
    seed_variance: float  # of one seed's difference
    image_variance: float  # of the mean difference, however many seeds
    seeds: int
    images: int

    @classmethod
    def paired(cls, arm: np.ndarray, base: np.ndarray, arm_drawn: np.ndarray, base_drawn: np.ndarray, images: int
               ) -> Estimate:  # fmt: skip
        """From scores (S,) of each seed and their resamples (S, W), both sides resampled alike.

        Resamples in which either side is NaN (nothing to be found) are left out.
        """
        each, drawn = arm - base, arm_drawn - base_drawn
        drawn = drawn[:, np.isfinite(drawn).all(0)]
        seeds = len(each)
        over_seeds = float(each.var(ddof=1)) if seeds > 1 else math.nan
        over_images = 0.0
        if drawn.shape[1] > 1:
            over_images = float(drawn.mean(0).var(ddof=1)) * images / max(1, images - 1)
            if seeds > 1:
                excess = max(0.0, float(drawn.var(0, ddof=1).mean()) - over_seeds)
                over_images = max(0.0, over_images - excess / seeds)
        return cls(float(each.mean()), over_seeds, over_images, seeds, images)

    def half_width(self, level: float = LEVEL) -> float:
        """Of the interval that holds the true difference but in `level` of all studies; infinite for a single seed."""
        if self.seeds < 2:
            return math.inf
        return float(_half_width(self.seed_variance / self.seeds, self.image_variance, self.seeds, self.images, level))

    def p(self) -> float:
        """The level at which the interval just touches zero."""
        if self.seeds < 2 or self.difference == 0:
            return 1.0
        distance = abs(self.difference)
        if self.half_width(1e-12) < distance:
            return 1e-12
        return float(optimize.brentq(lambda level: self.half_width(level) - distance, 1e-12, 1.0))

    def power(self, difference: float, level: float = LEVEL, seeds: int | None = None) -> float:
        """How often a study such as this would find a true difference of this size, with `seeds` seeds."""
        seeds = self.seeds if seeds is None else seeds
        if seeds < 2 or not math.isfinite(self.seed_variance):
            return 0.0
        own = self.seed_variance / seeds
        spread = math.sqrt(own + self.image_variance)
        if spread == 0:
            return 1.0 if difference else 0.0
        # The study's own estimate of the seeds' variance scatters as chi-squared: mean over its quantiles.
        scatter = stats.chi2.ppf((np.arange(200) + 0.5) / 200, seeds - 1) / (seeds - 1)
        half = _half_width(own * scatter, self.image_variance, seeds, self.images, level)
        found = stats.norm.cdf((difference - half) / spread) + stats.norm.cdf((-difference - half) / spread)
        return float(np.mean(found))

    def smallest(self, level: float = LEVEL) -> float:
        """The true difference that this study would find with a power of `POWER`; infinite for a single seed."""
        if self.seeds < 2:
            return math.inf
        high = math.sqrt(self.seed_variance / self.seeds + self.image_variance)
        if high == 0:
            return 0.0
        start = high
        while self.power(high, level) < POWER:
            high *= 2
            if high > 1e6 * start:
                return math.inf
        return float(optimize.brentq(lambda d: self.power(d, level) - POWER, 0.0, high, xtol=high * 1e-4))

    def seeds_needed(self, level: float = LEVEL) -> int | None:
        """Seeds with which a true difference of the size now seen would be found with `POWER`.

        None where no number of seeds would do: the validation images are too few, or the arms do not differ at all.
        """
        size = abs(self.difference)
        if self.seeds < 2 or size == 0 or self.power(size, level, MOST_SEEDS) < POWER:
            return None
        low, high = 1, MOST_SEEDS
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if self.power(size, level, middle) >= POWER else (middle, high)
        return high


@dataclass(frozen=True)
class Comparison:
    """What is said about one arm against the baseline."""

    difference: float
    low: float  # of the interval of 95 %, for this comparison alone
    high: float
    p: float
    corrected_p: float  # for all comparisons of the study (Holm)
    verdict: Verdict
    smallest: float  # the difference that the study would have found with a power of 0.8
    seeds: int
    seeds_needed: int | None
    seed_deviation: float  # of one seed's difference
    image_deviation: float  # of the mean difference over other sets of images


def holm(p: Sequence[float]) -> list[float]:
    """Corrected p-values (Holm, "A simple sequentially rejective multiple test procedure", 1979)."""
    corrected, worst = [0.0] * len(p), 0.0
    for rank, i in enumerate(sorted(range(len(p)), key=lambda i: p[i])):
        worst = max(worst, min(1.0, (len(p) - rank) * p[i]))
        corrected[i] = worst
    return corrected


def judge(estimates: Sequence[Estimate]) -> list[Comparison]:
    """All comparisons of one metric; they are one family."""
    level = LEVEL / max(1, len(estimates))
    corrected = holm([e.p() for e in estimates])
    return [_comparison(e, p, level) for e, p in zip(estimates, corrected, strict=True)]


def _comparison(estimate: Estimate, corrected: float, level: float) -> Comparison:
    verdict: Verdict = "not distinguishable"
    if corrected <= LEVEL:
        verdict = "better" if estimate.difference > 0 else "worse"
    half = estimate.half_width()
    return Comparison(
        difference=estimate.difference,
        low=estimate.difference - half,
        high=estimate.difference + half,
        p=estimate.p(),
        corrected_p=corrected,
        verdict=verdict,
        smallest=estimate.smallest(level),
        seeds=estimate.seeds,
        seeds_needed=estimate.seeds_needed(level),
        seed_deviation=math.sqrt(estimate.seed_variance) if estimate.seeds > 1 else math.nan,
        image_deviation=math.sqrt(estimate.image_variance),
    )


def _half_width(
    over_seeds: float | np.ndarray, over_images: float, seeds: int, images: int, level: float
) -> float | np.ndarray:
    by_seeds = stats.t.ppf(1 - level / 2, seeds - 1) if seeds > 1 else math.inf
    by_images = stats.t.ppf(1 - level / 2, max(1, images - 1))
    return np.sqrt(by_seeds**2 * over_seeds + by_images**2 * over_images)
