"""Rules that change while training: one rule after another, or a rule's numbers gliding from one value to another.

Neither keeps any state: `rule.at(step, horizon)` is the plain rule of that step, so there is nothing to save, and a run
that goes on has the rule of the step at which it goes on.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from typing import TYPE_CHECKING, Any, Literal, Self, get_args

from pydantic import Field, ValidationError, model_validator

from detector.assign.aligned import TaskAligned
from detector.assign.atss import Atss
from detector.assign.base import Assigner
from detector.config.node import Node
from detector.errors import ConfigError
from detector.structures import Assignment, Objects, Predictions, Priors
from detector.train.length import Horizon, Length

if TYPE_CHECKING:
    from detector.assign import ConstantRule, GlidingRule

STAGES = 100  # rules keep tables on the device for each set of their numbers: so many sets at most, not one a step


class Glide(Node):
    """A number that goes from `start` to `end` and stays there."""

    start: float
    end: float
    shape: Literal["linear", "cosine"] = Field("linear", description="cosine: slow at both ends")
    begin: Length | None = Field(None, description="when it leaves `start`; null: at once")
    until: Length | None = Field(None, description="when it reaches `end`; null: where the run ends")

    def value(self, step: int, horizon: Horizon) -> float:
        """In step `step`, in one of 101 equally spaced stages."""
        first = 0 if self.begin is None else horizon.steps(self.begin)
        last = horizon.total if self.until is None else horizon.steps(self.until)
        share = 1.0 if last <= first else min(max((step - first) / (last - first), 0.0), 1.0)
        if step < first:
            share = 0.0
        share = math.floor(share * STAGES + 1e-9) / STAGES
        if self.shape == "cosine":
            share = (1 - math.cos(math.pi * share)) / 2
        return self.start + (self.end - self.start) * share

    @model_validator(mode="after")
    def _leaves_before_it_arrives(self) -> Self:
        """In one unit; others can be compared once the run's length is known."""
        if self.begin is not None and self.until is not None:
            for unit in Length.model_fields:
                first, last = getattr(self.begin, unit), getattr(self.until, unit)
                if first is not None and last is not None and first >= last:
                    raise ValueError(f"begin is {self.begin}, which must be before until, {self.until}")
        return self


class Changing(Assigner):
    """A rule that is another one in each step.

    Called as it is (pictures and statistics, where no step is known) it is what it ends as.
    """

    @abstractmethod
    def at(self, step: int, horizon: Horizon) -> Assigner: ...

    @abstractmethod
    def last(self) -> Assigner:
        """The rule of the last steps."""

    @property
    def uses_predictions(self) -> bool:  # type: ignore[override]
        return self.last().uses_predictions

    @property
    def soft_quality(self) -> bool:  # type: ignore[override]
        return self.last().soft_quality

    @property
    def synchronises(self) -> bool:  # type: ignore[override]
        return self.last().synchronises

    def __call__(self, priors: Priors, objects: Objects, predictions: Predictions | None = None) -> Assignment:
        return self.last()(priors, objects, predictions)

    @model_validator(mode="after")
    def _nothing_of_its_own(self) -> Self:
        for name, field in Assigner.model_fields.items():
            if getattr(self, name) != field.default:
                raise ValueError(f"{name} belongs to the rules inside: set it there")
        return self


class Anneal(Changing):
    """Any rule with some of its numbers gliding: `{type: anneal, rule: {type: atss}, parameters: {topk: {start: 15,
    end: 5}}}`.  Whole numbers are rounded to the nearest."""

    type: Literal["anneal"] = "anneal"
    rule: ConstantRule = TaskAligned()
    parameters: dict[str, Glide] = {"beta": Glide(start=1.0, end=6.0)}

    def at(self, step: int, horizon: Horizon) -> Assigner:
        return self._with({name: glide.value(step, horizon) for name, glide in self.parameters.items()})

    def last(self) -> Assigner:
        return self._with({name: glide.end for name, glide in self.parameters.items()})

    def notes(self, horizon: Horizon) -> list[str]:
        for step in range(0, horizon.total, max(1, horizon.total // (4 * STAGES))):
            self.at(step, horizon)  # better now than in the middle of the run
        notes = []
        for name, glide in self.parameters.items():
            key = f"assigner.parameters.{name}"
            begin = 0 if glide.begin is None else horizon.steps(glide.begin)
            until = horizon.total if glide.until is None else horizon.steps(glide.until)
            if glide.until is not None and begin >= until:
                raise ConfigError(f"{key}: begin is {glide.begin}, which must be before until, {glide.until}")
            if begin >= horizon.total:
                notes.append(f"{key} begins only after {begin} steps, the run ends after {horizon.total}")
            elif until > horizon.total:
                notes.append(f"{key} reaches its end only after {until} steps, the run ends after {horizon.total}")
        return notes

    @model_validator(mode="after")
    def _numbers_of_the_rule(self) -> Self:
        fields = type(self.rule).model_fields.items()
        # How many classes there are does not change while training.
        numbers = [name for name, field in fields if _number(field.annotation) and name != "num_classes"]
        if not self.parameters:
            raise ValueError(
                f"parameters is empty, so nothing would change; {self.rule_name()} has {', '.join(numbers)}"
            )
        for name in self.parameters:
            if name not in numbers:
                has = ", ".join(numbers)
                raise ValueError(f"parameters.{name}: {self.rule_name()} has no such number; it has {has}")
        for end in ("start", "end"):
            try:
                self._with({name: getattr(glide, end) for name, glide in self.parameters.items()})
            except ConfigError as error:
                raise ValueError(f"parameters, at their {end}: {error}") from None
        return self

    def rule_name(self) -> str:
        return str(getattr(self.rule, "type", type(self.rule).__name__))

    def _with(self, values: dict[str, float]) -> Assigner:
        fields = type(self.rule).model_fields
        fit = {name: round(x) if _number(fields[name].annotation) is int else x for name, x in values.items()}
        try:
            return type(self.rule).model_validate({**dict(self.rule), **fit})
        except ValidationError as error:
            first = error.errors()[0]
            raise ConfigError(f"assigner: {self.rule_name()} with {fit}: {first['msg']}") from None


class Switch(Changing):
    """One rule, and after some time another; as TOOD has it, ATSS for 4 epochs and then task-aligned."""

    type: Literal["switch"] = "switch"
    first: GlidingRule = Atss()
    then: GlidingRule = TaskAligned()
    after: Length = Field(Length(epochs=4), description="how long the first rule holds")

    def at(self, step: int, horizon: Horizon) -> Assigner:
        """Numbers that glide inside count from the start of the run."""
        return (self.first if step < horizon.steps(self.after) else self.then).at(step, horizon)

    @model_validator(mode="after")
    def _two_rules(self) -> Self:
        if self.first == self.then:
            raise ValueError("first and then are the same rule, so nothing would change: change one, or use it alone")
        return self

    def last(self) -> Assigner:
        return self.then

    def notes(self, horizon: Horizon) -> list[str]:
        notes = [*self.first.notes(horizon), *self.then.notes(horizon)]
        if horizon.steps(self.after) >= horizon.total:
            notes.append(f"assigner.after is {self.after}, so the run ends before the second rule begins")
        return notes


def _number(annotation: Any) -> type | None:
    """int or float, where a parameter is one (or none); None for anything else."""
    kinds = {annotation, *get_args(annotation)} - {type(None)}
    return float if float in kinds else int if int in kinds else None
