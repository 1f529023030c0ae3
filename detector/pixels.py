"""What the numbers of a set's images mean: how many channels of how many bits, and how they are normalised.

Data and models both follow this one section, so that a network gets what its data hold.  c channels; `top` is the
largest number of so many bits.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal, Self

import numpy as np
from pydantic import Field, model_validator

from detector.config.node import Node

PADDING = (124, 116, 104)  # ImageNet's mean colour: about zero once the model has normalised it
_Percent = Annotated[float, Field(ge=0, le=100)]


class FixedRange(Node):
    """`low` to `high` becomes what 0 to 255 is for the network's weights; the same for all images."""

    type: Literal["fixed"] = "fixed"
    low: float = 0
    high: float | None = Field(None, description="default: the largest number of so many bits")


class Statistics(Node):
    """Mean 0 and deviation 1 of each channel over the whole set; `tools/measure_data.py` measures and prints them."""

    type: Literal["statistics"] = "statistics"
    mean: tuple[float, ...]
    std: tuple[Annotated[float, Field(gt=0)], ...]


class Percentile(Node):
    """Every image by itself, when it is read: its percentiles `low` and `high` become the ends of the range.

    What lies beyond them is cut off.  For sets whose images differ in exposure or gain, where a value means nothing.
    """

    type: Literal["percentile"] = "percentile"
    low: _Percent = 1
    high: _Percent = 99
    each_channel: bool = Field(True, description="every channel by its own percentiles, or all by common ones")

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.low >= self.high:
            raise ValueError(f"low is {self.low:g}, expected less than high, {self.high:g}")
        return self


class Pixels(Node):
    """Images as training, evaluation and prediction read them."""

    channels: int = Field(3, ge=1, le=64, description="1: grey, 3: RGB; others as the files have them")
    bits: Literal[8, 16] = 8
    normalize: Annotated[FixedRange | Statistics | Percentile, Field(discriminator="type")] = FixedRange()

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        rule = self.normalize
        if isinstance(rule, Statistics):
            for key, values in (("mean", rule.mean), ("std", rule.std)):
                if len(values) != self.channels:
                    raise ValueError(
                        f"normalize.{key} has {len(values)} numbers, expected {self.channels}, as channels"
                    )
        if isinstance(rule, FixedRange) and self.range[0] >= self.range[1]:
            raise ValueError(f"normalize.low is {rule.low:g}, expected less than high, {self.range[1]:g}")
        return self

    @property
    def plain(self) -> bool:
        """Whether these are the 8-bit RGB images that need nothing done when they are read."""
        return self.channels == 3 and self.bits == 8 and not isinstance(self.normalize, Percentile)

    @property
    def dtype(self) -> np.dtype[np.uint8] | np.dtype[np.uint16]:
        return np.dtype(np.uint8) if self.bits == 8 else np.dtype(np.uint16)

    @property
    def range(self) -> tuple[float, float]:
        """What stands for 0 and for 255 of a photograph."""
        top = float(2**self.bits - 1)
        if isinstance(self.normalize, FixedRange):
            return self.normalize.low, top if self.normalize.high is None else self.normalize.high
        return 0.0, top

    @property
    def ground(self) -> tuple[int, ...]:
        """(c,) the colour where there is no image: about zero once the model has normalised it."""
        if isinstance(self.normalize, Statistics):
            values = list(self.normalize.mean)
        else:
            values = self._scaled(PADDING, self.range[0])
        return tuple(min(max(round(v), 0), 2**self.bits - 1) for v in values)

    def standard(self, mean: Sequence[float], std: Sequence[float]) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Mean and deviation, (c,) each, in the images' own numbers: what the model subtracts and divides by.

        Args:
            mean: (3,) of the RGB images in 0..255 that the network's weights are used to; likewise `std`.  With another
                number of channels, each gets their average.
        """
        if isinstance(self.normalize, Statistics):
            return self.normalize.mean, self.normalize.std
        return tuple(self._scaled(mean, self.range[0])), tuple(self._scaled(std, 0.0))

    def _scaled(self, values: Sequence[float], low: float) -> list[float]:
        """(3,) numbers of 0..255 as (c,) numbers of the range, on top of `low`."""
        scale = (self.range[1] - self.range[0]) / 255
        if self.channels != len(values):
            values = [sum(values) / len(values)] * self.channels
        return [low + value * scale for value in values]


RGB = Pixels()
