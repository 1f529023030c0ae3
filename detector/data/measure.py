"""The mean and deviation of a set's pixels, measured exactly, one image after the other.

Every value of every channel is counted, so the memory is that of one image and of 2**bits counters for each channel,
and nothing is rounded before the end.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
import yaml

from detector.data.coco import CocoData
from detector.errors import DataError
from detector.pixels import Pixels, Statistics


@dataclass(frozen=True)
class Measured:
    """How often each value occurs.  c channels."""

    counts: np.ndarray  # (c, 2**bits) int64
    images: int
    unreadable: tuple[str, ...]  # a sentence for each image that could not be read

    @property
    def pixels(self) -> int:
        """Of all images, in each channel."""
        return int(self.counts[0].sum())

    def statistics(self) -> tuple[list[float], list[float]]:
        """Mean and deviation of each channel: sums of whole numbers, without rounding, then one division."""
        means, deviations = [], []
        for counts in self.counts:
            values = np.flatnonzero(counts).tolist()
            often = counts[values].tolist()
            total = sum(often)
            first = sum(n * v for n, v in zip(often, values, strict=True))
            second = sum(n * v * v for n, v in zip(often, values, strict=True))
            means.append(first / total)
            deviations.append(math.sqrt((total * second - first * first) / (total * total)))
        return means, deviations

    def percentile(self, percent: float) -> list[int]:
        """Of each channel the least value that so many percent of its pixels do not exceed."""
        return [int(np.searchsorted(c.cumsum(), math.ceil(percent / 100 * c.sum()) or 1)) for c in self.counts]

    def as_yaml(self, pixels: Pixels) -> str:
        """The section of a recipe that normalises by what was measured.

        Raises:
            DataError: a channel has one value only, by whose deviation nothing can be divided.
        """
        mean, std = self.statistics()
        for channel, deviation in enumerate(std):
            if deviation == 0:
                raise DataError(
                    f"channel {channel} has the value {mean[channel]:g} in all images, so it has no deviation to divide"
                    " by: take it out of the files, or normalise by a fixed range (data.pixels.normalize.type=fixed)"
                )
        rule = Statistics(mean=tuple(float(f"{m:.6g}") for m in mean), std=tuple(float(f"{s:.6g}") for s in std))
        section = {**pixels.model_dump(mode="json"), "normalize": rule.model_dump(mode="json")}
        return yaml.safe_dump({"data": {"pixels": section}}, sort_keys=False, default_flow_style=None)


def measure(data: CocoData, pixels: Pixels, progress: Callable[[Iterable[int]], Iterable[int]] = iter) -> Measured:
    """All pixels of a set, as they are before any normalisation.

    Raises:
        DataError: the set holds no image, or none that can be read.
    """
    raw = CocoData(data.index, pixels=Pixels(channels=pixels.channels, bits=pixels.bits))
    counts = np.zeros((pixels.channels, 2**pixels.bits), dtype=np.int64)
    images, unreadable = 0, []
    for i in progress(range(len(raw))):
        try:
            image = raw[i].image
        except DataError as error:
            unreadable.append(str(error))
            continue
        images += 1
        for channel, own in enumerate(counts):
            own += np.bincount(image[..., channel].ravel(), minlength=len(own))
    if images == 0:
        reason = f"; the first: {unreadable[0]}" if unreadable else ""
        raise DataError(f"{data.index.annotations}: no image to measure could be read{reason}")
    return Measured(counts, images, tuple(unreadable))
