"""Learning-rate schedules: pure functions of the step (and, for one of them, of the scores so far).

    factor = schedule.factor(step, horizon, scores)      # multiplies every group's learning rate

Nothing is counted up, so nothing has to be saved and resuming cannot get out of step.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence
from typing import Annotated, Literal

from pydantic import Field, model_validator

from detector.config.node import Node
from detector.train.length import Horizon, Length

Share = Annotated[float, Field(ge=0, le=1)]
Scores = Sequence[float]


class Schedule(Node):
    """What every schedule has."""

    @abstractmethod
    def factor(self, step: int, horizon: Horizon, scores: Scores = ()) -> float:
        """What the learning rate is multiplied by in step `step` (from 0), after evaluations with these `scores`."""

    def notes(self, horizon: Horizon) -> list[str]:
        """Sentences about what in the schedule does not fit the run's length."""
        return []


class WarmedUp(Schedule):
    """Starts low and rises linearly (Goyal et al., arXiv:1706.02677): large first gradients would do damage."""

    warmup: Length | None = Field(Length(steps=500), description="null: none")
    warmup_start: Share = Field(0.001, description="of the learning rate, in the first step")

    def factor(self, step: int, horizon: Horizon, scores: Scores = ()) -> float:
        return self._warm(step, self.warmup_steps(horizon)) * self.after_warmup(step, horizon, scores)

    def warmup_steps(self, horizon: Horizon) -> int:
        return 0 if self.warmup is None else horizon.steps(self.warmup)

    def notes(self, horizon: Horizon) -> list[str]:
        warmup = self.warmup_steps(horizon)
        if warmup < horizon.total:
            return []
        return [
            f"the warm-up takes {warmup} steps but the whole run only {horizon.total}, so the learning rate never gets"
            " full: set train.schedule.warmup lower"
        ]

    def _warm(self, step: int, warmup: int) -> float:
        return 1.0 if step >= warmup else self.warmup_start + (1 - self.warmup_start) * step / warmup

    @abstractmethod
    def after_warmup(self, step: int, horizon: Horizon, scores: Scores) -> float: ...


class MultiStep(WarmedUp):
    """Times `gamma` at each milestone; without milestones constant."""

    type: Literal["multi_step"] = "multi_step"
    milestones: tuple[Length, ...] = Field((), description="such as [{epochs: 8}, {epochs: 11}]")
    gamma: Share = 0.1

    def after_warmup(self, step: int, horizon: Horizon, scores: Scores) -> float:
        return self.gamma ** sum(step >= horizon.steps(milestone) for milestone in self.milestones)

    def notes(self, horizon: Horizon) -> list[str]:
        late = [str(m) for m in self.milestones if horizon.steps(m) >= horizon.total]
        if not late:
            return super().notes(horizon)
        after = f"the run ends after {horizon.total} steps, so the milestones at {', '.join(late)} are never reached"
        return [*super().notes(horizon), after]


class Cosine(WarmedUp):
    """Half a cosine from the end of the warm-up to the end of the run (Loshchilov and Hutter, arXiv:1608.03983)."""

    type: Literal["cosine"] = "cosine"
    end: Share = Field(0.0, description="of the learning rate, where the run ends")

    def after_warmup(self, step: int, horizon: Horizon, scores: Scores) -> float:
        start = min(self.warmup_steps(horizon), horizon.total - 1)
        return _cosine(1.0, self.end, (step - start) / (horizon.total - start))


class OneCycle(Schedule):
    """Up to the full learning rate and down to almost none, both by half a cosine (Smith, arXiv:1708.07120)."""

    type: Literal["one_cycle"] = "one_cycle"
    peak: float = Field(0.3, gt=0, lt=1, description="share of the run after which the learning rate is full")
    start: Share = Field(0.04, description="of the learning rate, in the first step")
    end: Share = Field(4e-6, description="of the learning rate, in the last step")

    def factor(self, step: int, horizon: Horizon, scores: Scores = ()) -> float:
        last = max(horizon.total - 1, 1)
        top = max(self.peak * horizon.total - 1, 1e-9)  # as torch counts: the first of n steps is number 0
        if step <= top:
            return _cosine(self.start, 1.0, step / top)
        return _cosine(1.0, self.end, (step - top) / (last - top))


class Plateau(WarmedUp):
    """Times `gamma` whenever the score has not improved for more than `patience` evaluations."""

    type: Literal["plateau"] = "plateau"
    patience: int = Field(2, ge=0, description="evaluations without improvement that are borne")
    gamma: Share = 0.1
    improvement: float = Field(1e-3, ge=0, description="AP above the best so far that counts as one")
    lowest: Share = Field(1e-3, description="of the learning rate; not lowered further")

    def after_warmup(self, step: int, horizon: Horizon, scores: Scores) -> float:
        best, without, factor = -math.inf, 0, 1.0
        for score in scores:
            best, without = (score, 0) if score > best + self.improvement else (best, without + 1)
            if without > self.patience:
                factor, without = max(factor * self.gamma, self.lowest), 0
        return factor

    @model_validator(mode="after")
    def _lowers(self) -> Plateau:
        if self.gamma == 1:
            raise ValueError("gamma is 1, so the learning rate would never change: expected less")
        return self


AnySchedule = Annotated[MultiStep | Cosine | OneCycle | Plateau, Field(discriminator="type")]


def _cosine(start: float, end: float, share: float) -> float:
    """From `start` to `end` while `share` goes from 0 to 1."""
    return end + (start - end) * (1 + math.cos(math.pi * min(max(share, 0.0), 1.0))) / 2
