"""Lengths of time, in exactly one of epochs, steps or images; counted in optimiser steps from then on."""

from __future__ import annotations

import math
from dataclasses import dataclass

from pydantic import Field, model_validator

from detector.config.node import Node


class Length(Node):
    """So many epochs, steps of the optimiser, or images; exactly one of them."""

    epochs: float | None = Field(None, gt=0, description="passes over the training images")
    steps: int | None = Field(None, ge=1, description="steps of the optimiser")
    images: int | None = Field(None, ge=1, description="training images seen")

    @model_validator(mode="after")
    def _exactly_one(self) -> Length:
        given = [unit for unit in ("epochs", "steps", "images") if getattr(self, unit) is not None]
        if len(given) > 1:
            raise ValueError(
                f"gives {' and '.join(given)}, expected one of them: set {', '.join(f'{u}=null' for u in given[1:])}"
            )
        if not given:
            raise ValueError("expected one of epochs, steps or images, such as {epochs: 12}")
        return self

    def count(self, images: int, batch: int) -> int:
        """Steps, at least 1, for a training set of `images` and steps of `batch` images; part of one counts."""
        if self.steps is not None:
            return self.steps
        seen = self.images if self.images is not None else (self.epochs or 0) * images
        return max(1, math.ceil(seen / batch - 1e-9))  # 0.1 epochs of 30 images are 3, not 3.0000000000000004

    def __str__(self) -> str:
        if self.steps is not None:
            return f"{self.steps} steps"
        return f"{self.images} images" if self.images is not None else f"{self.epochs:g} epochs"


@dataclass(frozen=True)
class Horizon:
    """How long a run is: what turns lengths into steps."""

    total: int  # steps of the whole run
    images: int  # in the training set
    batch: int  # images of a step

    def steps(self, length: Length) -> int:
        return length.count(self.images, self.batch)

    def epoch(self, step: int) -> float:
        """Passes over the training images before `step`."""
        return step * self.batch / self.images
