"""Holes in the image: cutout (DeVries and Taylor, arXiv:1708.04552) and grid mask (Chen et al., arXiv:2001.04086).

Both know the objects: one that is mostly covered is dropped, since nobody could find it; the others keep their whole
boxes, so that the network learns to infer an object from a part of it.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, Literal

import numpy as np
from pydantic import AfterValidator, Field

from detector.data.frames import Frame
from detector.data.pasting import cover_objects
from detector.data.sample import Sample
from detector.data.steps import Augmentation, Share, ShareRange, ordered

Counts = Annotated[tuple[Annotated[int, Field(ge=0, le=1000)], Annotated[int, Field(ge=0, le=1000)]],
                   AfterValidator(ordered)]  # fmt: skip


class Cutout(Augmentation):
    """Some rectangles of ground colour."""

    type: Literal["cutout"] = "cutout"
    holes: Counts = (1, 5)
    size: ShareRange = Field((0.05, 0.25), description="height and width of a hole, as shares of the image's")
    visible: Share = Field(0.4, description="share of an object below which it is dropped")

    @property
    def uses_masks(self) -> bool:
        return True

    def __call__(self, sample: Sample, rng: np.random.Generator) -> Sample:
        size = np.array(sample.image.shape[:2])
        count = int(rng.integers(self.holes[0], self.holes[1] + 1))
        sides = np.maximum(np.round(rng.uniform(*self.size, (count, 2)) * size), 1)
        corners = np.floor(rng.uniform(size=(count, 2)) * (size - sides + 1)).astype(int)
        cover = np.zeros(sample.image.shape[:2], dtype=np.uint8)
        for (top, left), (height, width) in zip(corners.tolist(), sides.astype(int).tolist(), strict=True):
            cover[top : top + height, left : left + width] = 1
        return _erased(sample, cover, self.visible)


class GridMask(Augmentation):
    """A grid of squares of ground colour all over the image."""

    type: Literal["grid_mask"] = "grid_mask"
    period: ShareRange = Field((0.1, 0.3), description="from square to square, as a share of the shorter side")
    share: float = Field(0.4, gt=0, lt=1, description="of a period that a square takes up, either way")
    visible: Share = Field(0.4, description="share of an object below which it is dropped")

    @property
    def uses_masks(self) -> bool:
        return True

    def __call__(self, sample: Sample, rng: np.random.Generator) -> Sample:
        height, width = sample.image.shape[:2]
        period = max(round(rng.uniform(*self.period) * min(height, width)), 2)
        side = min(max(round(self.share * period), 1), period - 1)
        top, left = rng.integers(period, size=2).tolist()
        rows, columns = (np.arange(height) + top) % period < side, (np.arange(width) + left) % period < side
        return _erased(sample, (rows[:, None] & columns).astype(np.uint8), self.visible)


def _erased(sample: Sample, cover: np.ndarray, visible: float) -> Sample:
    image = sample.image.copy()
    image[cover == 1] = sample.ground
    return cover_objects(replace(sample, image=image), cover, Frame.of(image), visible, shrink=False)
