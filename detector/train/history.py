"""What follows from the scores so far: the best one, and when to stop.  Pure functions, so nothing else is saved."""

from __future__ import annotations

import math
from collections.abc import Sequence

from pydantic import Field

from detector.config.node import Node


class EarlyStopping(Node):
    """Stops when the score has not improved for `patience` evaluations."""

    patience: int = Field(5, ge=1, description="evaluations without improvement")
    improvement: float = Field(0.0, ge=0, description="AP above the best so far that counts as one")

    def stops(self, scores: Sequence[float]) -> bool:
        best, without = -math.inf, 0
        for score in scores:
            best, without = (score, 0) if score > best + self.improvement else (best, without + 1)
        return without >= self.patience


def is_best(scores: Sequence[float]) -> bool:
    """Whether the last score is better than all before it; of equal ones the first is the best."""
    return scores[-1] > max(scores[:-1], default=-math.inf)
