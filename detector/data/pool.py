"""The other images of a set, from which steps that put several into one draw their partners."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from detector.data.coco import Reader
from detector.data.sample import Sample
from detector.errors import DataError


@dataclass(frozen=True)
class Pool:
    """The other images of the set, for the sample of image `own`."""

    reader: Reader
    own: int
    failures: list[str]  # gets a line for each image that cannot be read
    zoom: tuple[float, float] = (1.0, 1.0)  # height, width: what the sample was resized by before the step's turn

    def draw(self, rng: np.random.Generator, holding: Literal["anything", "objects", "masks"] = "anything") -> Sample:
        """Another image, each with equal chance; the sample's own only where there is no other."""
        if holding == "anything":
            i = self._other(rng, len(self.reader.data), self.own)
        else:
            among = self.reader.with_masks if holding == "masks" else self.reader.with_objects
            if len(among) == 0:
                raise DataError(f"{self.reader.data.index.annotations}: no image holds {holding} to draw")
            place = int(np.searchsorted(among, self.own))
            present = place < len(among) and among[place] == self.own
            i = int(among[self._other(rng, len(among), place if present else None)])
        return self.reader.read(i, self.failures, keep=True)

    @staticmethod
    def _other(rng: np.random.Generator, count: int, own: int | None) -> int:
        if own is None or count == 1:
            return int(rng.integers(count))
        i = int(rng.integers(count - 1))
        return i + (i >= own)
