"""What a step of a recipe's `augment:` is, when it is on, and how a list of steps is run on a sample.

A step changes one image (`Augmentation`) or puts several into one (`Combination`), whose partners it draws from a
`Pool` with the sample's own generator: so still (seed, epoch, index) decide everything.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence
from typing import Annotated, ClassVar, NamedTuple, Self

import numpy as np
from pydantic import AfterValidator, Field, model_validator

from detector.config.node import Node
from detector.data.index import CocoIndex
from detector.data.pool import Pool
from detector.data.sample import Sample
from detector.pixels import Pixels


def ordered(pair: tuple[float, float]) -> tuple[float, float]:
    """
    Raises:
        ValueError: the first number is the larger one.
    """
    if pair[0] > pair[1]:
        raise ValueError(f"expected the smaller number first, found {list(pair)}")
    return pair


Share = Annotated[float, Field(ge=0, le=1)]
_Scale = Annotated[float, Field(ge=0.01, le=100)]
ScaleRange = Annotated[tuple[_Scale, _Scale], AfterValidator(ordered)]
ShareRange = Annotated[tuple[Share, Share], AfterValidator(ordered)]
Extent = Annotated[int, Field(ge=32, le=16384)]  # pixels, of an image that a step makes


class When(Node):
    """When a step is on.  Epochs count from 0; a sample's strength depends on its epoch and the run's length alone."""

    probability: Share = Field(1.0, description="of the samples, once the strength is full")
    after: float = Field(0, ge=0, description="off in the first so many epochs")
    until: float | None = Field(None, gt=0, description="off from this epoch on")
    off_last: float = Field(0, ge=0, description="off in at least the run's last so many epochs")
    ramp: float = Field(0, ge=0, description="epochs that the strength takes to rise from nothing to full")

    @model_validator(mode="after")
    def _is_ever_on(self) -> When:
        if self.until is not None and self.until <= self.after:
            raise ValueError(f"until is {self.until:g}, expected more than after, {self.after:g}")
        return self

    def strength(self, epoch: int, epochs: float) -> float:
        """0 (off) to 1 (full) in `epoch` of a run of `epochs`."""
        # A run seldom ends with an epoch: 12 epochs of 100 images in steps of 32 are 12.16.
        late = self.off_last > 0 and epoch >= math.floor(epochs - self.off_last + 1e-9)
        if epoch < self.after or late or (self.until is not None and epoch >= self.until):
            return 0.0
        return min(1.0, (epoch - self.after + 1) / (self.ramp + 1))


class Step(Node):
    """What every step has."""

    # Whether it gives the same picture before and after a resize: then the loader does it where there are fewer pixels,
    # and a combination brings its partners to the same size by `Pool.zoom`.
    commutes: ClassVar[bool] = False
    # Whether the training device can do it to a whole batch; then the step is a `Deferrable`.
    on_device: ClassVar[bool] = False

    when: When | None = Field(None, description="probability, first and last epoch, rise; default: always")

    @property
    def uses_masks(self) -> bool:
        """Whether it does something better where the set has masks."""
        return False

    def check(self, index: CocoIndex) -> None:
        """
        Raises:
            DataError: the step cannot do anything on this data set: says why, and what to use instead.
        """

    def objection(self, pixels: Pixels) -> str | None:
        """Why the step cannot work on images that hold these, as a sentence of what to do; None: it can."""
        return None

    def weaker(self, strength: float) -> Self | None:
        """The step with its amounts at this share of theirs; None: it has none, so a rise makes it more frequent."""
        return None


class Augmentation(Step):
    """A sample and its generator to a new sample; the given one is not changed."""

    @abstractmethod
    def __call__(self, sample: Sample, rng: np.random.Generator) -> Sample: ...


class Deferrable(Augmentation):
    """A step that mirrors, or maps colours by a matrix: the training device can do it, too."""

    commutes: ClassVar[bool] = True
    on_device: ClassVar[bool] = True

    def mirrors(self, rng: np.random.Generator) -> tuple[bool, bool]:
        """Left and right, top and bottom; draws what a call would draw."""
        return False, False

    def colors(self, rng: np.random.Generator, channels: int) -> np.ndarray | None:
        """(C, 2 C): a matrix for the pixels and one for the image's mean, whose result is added; None: no change.

        Draws what a call would draw.
        """
        return None


class Combination(Step):
    """A sample, its generator and the others of the set to a new sample; none of those given is changed."""

    @abstractmethod
    def __call__(self, sample: Sample, rng: np.random.Generator, pool: Pool) -> Sample: ...


class Active(NamedTuple):
    """A step as it is in one epoch."""

    step: Step
    probability: float


def active(steps: Sequence[Step], epoch: int, epochs: float) -> tuple[Active, ...]:
    """The steps that are on in `epoch` of a run of `epochs`, as strong as they are by then."""
    found = []
    for step in steps:
        if step.when is None:
            found.append(Active(step, 1.0))
            continue
        strength, probability = step.when.strength(epoch, epochs), step.when.probability
        if strength == 0 or probability == 0:
            continue
        weaker = step.weaker(strength) if strength < 1 else step
        found.append(Active(step, probability * strength) if weaker is None else Active(weaker, probability))
    return tuple(found)


def never_on(steps: Sequence[Step], epochs: float) -> list[str]:
    """A sentence about each step that a run of `epochs` is too short for."""
    lines = []
    for i, step in enumerate(steps):
        when = step.when
        on = range(max(math.ceil(epochs), 1))
        if when is not None and not any(when.strength(epoch, epochs) for epoch in on):
            lines.append(f"augment.{i}.when: is never on in a run of {epochs:.3g} epochs")
    return lines
