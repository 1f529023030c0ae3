"""COCO's numbers of resampled images, from the records of one evaluation.

A resample gives each image a weight: how often it was drawn.  Precision and recall are then counted with weights, which
is what an evaluation of the drawn images (each as often as drawn) would give.  With all weights 1 the numbers are the
evaluator's.

Legend: W resamples, n images, d detections of a category, K categories, T IoU thresholds.
"""

from __future__ import annotations

import numpy as np

from detector.evaluate.matches import THRESHOLD_COUNT, Matches
from detector.evaluate.truth import AREAS

RECALLS = np.linspace(0.0, 1.0, 101)
ALL = tuple(range(THRESHOLD_COUNT))
# (area, IoU thresholds, whether recall instead of precision)
KINDS: dict[str, tuple[str, tuple[int, ...], bool]] = {
    "AP": ("all", ALL, False),
    "AP50": ("all", (0,), False),
    "AP75": ("all", (5,), False),
    "AP_small": ("small", ALL, False),
    "AP_medium": ("medium", ALL, False),
    "AP_large": ("large", ALL, False),
    "AR_100": ("all", ALL, True),
    "AR_small": ("small", ALL, True),
    "AR_medium": ("medium", ALL, True),
    "AR_large": ("large", ALL, True),
}
AT_ONCE = 1 << 22  # weights of detections looked at together; bounds the memory


def draw(images: int, count: int, seed: int) -> np.ndarray:
    """(W, n) float64: how often each image is drawn in `count` resamples of as many images as there are."""
    rng = np.random.default_rng(seed)
    return rng.multinomial(images, np.full(images, 1 / images), size=count).astype(np.float64)


def resampled(matches: Matches, metric: str, weights: np.ndarray) -> np.ndarray:
    """(W,) the metric of each resample (W, n); NaN where it holds no object to be found.

    A category without objects in a resample is left out of that resample's mean, as COCO does.
    """
    area, thresholds, recall = KINDS[metric]
    return _scores(matches, list(AREAS).index(area), thresholds, recall, weights)


def ap_of_some(matches: Matches, wanted: np.ndarray, objects: np.ndarray, thresholds: tuple[int, ...] = ALL) -> float:
    """AP of some of the objects: detections of the others count neither for nor against; what hits nothing counts.

    `wanted`: (m,) bool by annotation; `objects`: (n, K) how many of them there are.  NaN where there are none.
    """
    hits = matches.object >= 0
    mine = hits & wanted[matches.object.clip(min=0)] if len(wanted) else np.zeros_like(hits)
    chosen = Matches(
        category=matches.category,
        image=matches.image,
        score=matches.score,
        object=matches.object,
        hit=(mine & ~matches.ignored[0])[None],
        ignored=(matches.ignored[0] | (hits & ~mine))[None],
        objects=objects[None],
    )
    return float(_scores(chosen, 0, thresholds, False, np.ones((1, objects.shape[0])))[0])


def _scores(matches: Matches, area: int, thresholds: tuple[int, ...], recall: bool, weights: np.ndarray) -> np.ndarray:
    categories = matches.objects.shape[2]
    sums, counts = np.zeros(len(weights)), np.zeros(len(weights))
    for category in range(categories):
        total = weights @ matches.objects[area, :, category]  # (W,)
        if not total.any():
            continue
        mine = np.flatnonzero(matches.category == category)
        rows = max(1, AT_ONCE // max(1, len(mine)))
        for start in range(0, len(weights), rows):
            part = slice(start, start + rows)
            value = _category(matches, area, thresholds, recall, weights[part], mine, total[part])
            there = total[part] > 0
            sums[part][there] += value[there]
            counts[part] += there
    with np.errstate(invalid="ignore"):
        return np.where(counts > 0, sums / counts, np.nan)


def _category(
    matches: Matches, area: int, thresholds: tuple[int, ...], recall: bool, weights: np.ndarray, mine: np.ndarray,
    total: np.ndarray,
) -> np.ndarray:  # fmt: skip
    """(W,) mean over the thresholds for one category; anything where `total` is 0."""
    each = weights[:, matches.image[mine]]  # (W, d)
    so_far = each.cumsum(1)
    total = np.where(total > 0, total, 1.0)[:, None]
    sums = np.zeros(len(weights))
    for t in thresholds:
        hit, ignored = matches.hit[area, t, mine], matches.ignored[area, t, mine]
        places = np.flatnonzero(hit)
        if not len(places):
            continue
        right = each[:, places].cumsum(1)
        if recall:
            sums += right[:, -1] / total[:, 0]
            continue
        seen = so_far[:, places]
        gone = np.flatnonzero(ignored)
        if len(gone):
            before = np.concatenate([np.zeros((len(each), 1)), each[:, gone].cumsum(1)], axis=1)
            seen -= before[:, np.searchsorted(gone, places)]
        # Precision only rises at a hit, so the envelope's corners are all there.
        reached = right / total
        precision = right / (seen - right + right + np.spacing(1))
        envelope = np.maximum.accumulate(precision[:, ::-1], axis=1)[:, ::-1]
        # Each of the recalls is read off at the hit that reaches it: how many at each.
        read = np.diff(np.searchsorted(RECALLS, reached, side="right"), axis=1, prepend=0)
        sums += (envelope * read).sum(1) / len(RECALLS)
    return sums / len(thresholds)
