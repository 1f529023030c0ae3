"""Treatments of many objects, summed up by size, shape, class and level."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from detector.evaluate.treatment import Treatment

# Upper bounds; sizes are sides of a square of equal area, in pixels of the network's input.
SIZES = {"below 16": 16.0, "16 to 32": 32.0, "32 to 64": 64.0, "64 to 96": 96.0, "above 96": math.inf}
ASPECTS = {"below 1.5": 1.5, "1.5 to 3": 3.0, "3 to 6": 6.0, "above 6": math.inf}
POSITIVES = {"0": 0.5, "1": 1.5, "2 to 3": 3.5, "4 to 8": 8.5, "9 to 16": 16.5, "above 16": math.inf}

Group = dict[str, float]


def groups(values: np.ndarray, bounds: dict[str, float]) -> np.ndarray:
    """(N,) the index of the group that each value falls into."""
    return np.searchsorted(np.array(list(bounds.values())), values, side="right").clip(max=len(bounds) - 1)


def survey(treated: Treatment, classes: Sequence[str]) -> dict[str, dict[str, Group]]:
    """{"all" | "size" | "aspect" | "class": {group: numbers}, "level": ...}; groups without an object are left out."""
    kinds = {
        "all": (np.zeros(len(treated), dtype=np.int64), ["all"]),
        "size": (groups(np.sqrt(treated.area), SIZES), list(SIZES)),
        "aspect": (groups(treated.aspect, ASPECTS), list(ASPECTS)),
        "class": (treated.label, list(classes)),
    }
    found: dict[str, dict[str, Group]] = {}
    for kind, (index, names) in kinds.items():
        found[kind] = {name: _numbers(treated, index == i) for i, name in enumerate(names) if (index == i).any()}
    total = max(1, int(treated.levels.sum()))
    found["level"] = {str(i): {"share_of_positives": float(n / total)} for i, n in enumerate(treated.levels.sum(0))}
    return found


def _numbers(treated: Treatment, mine: np.ndarray) -> Group:
    positives = treated.positives[mine]
    count = max(1, int(positives.sum()))
    return {
        "objects": int(mine.sum()),
        "positives_per_object": float(positives.mean()),
        "without_positive": float((positives == 0).mean()),
        "contested": float(treated.contested[mine].sum() / count),
        "shared": float(treated.shared[mine].sum() / count),
        "quality": _mean(treated.quality[mine]),
        "iou_of_positives": _mean(treated.iou[mine]),
        "predicted_iou": _mean(treated.predicted_iou[mine]),
        "best_unassigned_iou": _mean(treated.best_unassigned[mine]),
        "entropy": _mean(treated.entropy[mine]),
    }


def _mean(values: np.ndarray) -> float:
    values = values[np.isfinite(values)]
    return float(values.mean()) if len(values) else math.nan
