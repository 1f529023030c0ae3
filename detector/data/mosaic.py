"""Several images in one: mosaic (Bochkovskiy et al., arXiv:2004.10934) and mixup for detection (Zhang et al.,
arXiv:1902.04103)."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import cv2
import numpy as np
from pydantic import Field

from detector.data.geometry import follow, weights
from detector.data.pool import Pool
from detector.data.resize import like
from detector.data.sample import Sample
from detector.data.steps import Combination, Extent, ScaleRange, Share, ShareRange
from detector.data.windows import added, canvas, choose, draw_scale, fitting, join, mirrored, show


class Mosaic(Combination):
    """The sample and 3 or 8 others as tiles of one image; each cell shows a part of its image at a scale of its own.

    The lines between the cells are drawn for each sample.  The publication cuts the mosaic out of a canvas of twice its
    size; here each tile's part is drawn directly, and no pixel is resampled that is not seen.
    """

    type: Literal["mosaic"] = "mosaic"
    size: tuple[Extent, Extent] = Field((640, 640), description="height, width of the mosaic")
    tiles: Literal[4, 9] = 4
    scale: ScaleRange = Field((0.4, 1.0), description="of a tile; 1: the whole image would just fill the mosaic")
    shift: float = Field(0.2, ge=0, le=0.3, description="of the lines, either way, as a share of the mosaic's side")
    visible: Share = Field(0.3, description="share of an object's box below which it is dropped where a cell cuts it")

    def __call__(self, sample: Sample, rng: np.random.Generator, pool: Pool) -> Sample:
        count = 2 if self.tiles == 4 else 3
        rows, columns = (_lines(side, count, self.shift, rng) for side in self.size)
        own = int(rng.integers(self.tiles))
        image = canvas(self.size, sample)
        parts = []
        for cell in range(self.tiles):
            row, column = divmod(cell, count)
            source = sample if cell == own else pool.draw(rng)
            height, width = source.image.shape[:2]
            scale = fitting((height, width), self.size) * draw_scale(self.scale, rng)
            # A tile that does not fill its cell lies towards the middle, where the images meet.
            down = choose(height, rows[row + 1] - rows[row], scale, rng, 1 - row / (count - 1))
            across = choose(width, columns[column + 1] - columns[column], scale, rng, 1 - column / (count - 1))
            tile = show(source, down, across, self.visible)
            top, left = rows[row] + down.at, columns[column] + across.at
            image[top : top + down.size, left : left + across.size] = tile.image
            parts.append(follow(tile, image, (1.0, 1.0), (left, top)))
        return join(sample, image, parts)


class Mixup(Combination):
    """The sample and another image shine through each other; the objects of both are kept.

    The sample keeps its shape; the other is scaled to fit it, times a drawn factor, and blended in where it lies.  With
    `weights` objects count in the losses as much as their image's share (Zhang et al., "Bag of Freebies for Training
    Object Detection Neural Networks", arXiv:1902.04103, section 3.1), else in full.
    """

    type: Literal["mixup"] = "mixup"
    alpha: float = Field(1.5, gt=0, le=1000, description="the sample's share is drawn from Beta(alpha, alpha)")
    share: ShareRange = Field((0.2, 0.8), description="and held within these, or objects would be labelled but unseen")
    scale: ScaleRange = Field((0.5, 1.5), description="of the other image; 1: it just fits into the sample")
    flip: Share = Field(0.5, description="how often the other image is mirrored")
    visible: Share = 0.3
    weights: bool = Field(False, description="objects count as much as their image's share; needs criterion.type=dense")

    def __call__(self, sample: Sample, rng: np.random.Generator, pool: Pool) -> Sample:
        share = float(np.clip(rng.beta(self.alpha, self.alpha), *self.share))
        other = pool.draw(rng)
        size = sample.image.shape[:2]
        scale = fitting(other.image.shape[:2], size) * draw_scale(self.scale, rng)
        down, across = (choose(other.image.shape[i], size[i], scale, rng) for i in (0, 1))
        tile = show(other, down, across, self.visible)
        if rng.random() < self.flip:
            tile = mirrored(tile)
        image = sample.image.copy()
        window = image[down.at : down.at + down.size, across.at : across.at + across.size]
        window[:] = like(cv2.addWeighted(window, share, tile.image, 1 - share, 0), window)
        sample = replace(sample, image=image)
        if self.weights:
            sample, tile = _weighed(sample, share), _weighed(tile, 1 - share)
        return added(sample, follow(tile, image, (1.0, 1.0), (across.at, down.at)))


def _weighed(sample: Sample, share: float) -> Sample:
    return replace(sample, weight=weights(sample) * np.float32(share))


def _lines(side: int, count: int, most: float, rng: np.random.Generator) -> list[int]:
    """Where the `count` cells begin, and where the last one ends."""
    shift = rng.uniform(-most, most)
    inner = np.round(side * (np.arange(1, count) / count + shift)).astype(int)
    return [0, *inner.tolist(), side]
