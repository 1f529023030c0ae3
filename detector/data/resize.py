"""From images of any size to the network's input size: `short_edge`, `letterbox` or `fixed`.

All three put the image's corner at 0, 0; what is missing to the batch's shape is filled at the right and at the bottom
when the batch is put together, so that padding is never inside an image's true size.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Annotated, Literal

import cv2
import numpy as np
from pydantic import Field

from detector.config.node import Node
from detector.data.geometry import follow
from detector.data.sample import Sample

Pixels = Annotated[int, Field(ge=1, le=16384)]


class Sizing(Node):
    """How an image is brought to size.  Called on a sample with the number of a choice of `multi_scale`, or None."""

    multi_scale: tuple[Pixels, ...] = Field(
        (), description="training only: one of these is drawn for each batch in place of the set length"
    )

    def __call__(self, sample: Sample, choice: int | None = None) -> Sample:
        height, width = sample.image.shape[:2]
        size = self.target((height, width), choice)
        if size == (height, width):
            return sample
        return follow(sample, resample(sample.image, size), (size[1] / width, size[0] / height), (0.0, 0.0))

    @property
    @abstractmethod
    def length(self) -> int:
        """What a choice of `multi_scale` takes the place of."""

    @abstractmethod
    def target(self, size: tuple[int, int], choice: int | None = None) -> tuple[int, int]:
        """(height, width) that an image of `size` gets."""

    def largest(self, size: tuple[int, int]) -> tuple[int, int]:
        """(height, width): the most that an image of `size` gets by any choice."""
        targets = [self.target(size, choice) for choice in (None, *range(len(self.multi_scale)))]
        return max(t[0] for t in targets), max(t[1] for t in targets)

    @abstractmethod
    def canvas(self, choice: int | None = None) -> tuple[int, int] | None:
        """(height, width) that every image of the batch is padded to; None: what the largest of them needs."""


class ShortEdge(Sizing):
    """The shorter side gets `short` pixels, or fewer where the longer one would exceed `long`; the shape is kept."""

    type: Literal["short_edge"] = "short_edge"
    short: Pixels = 800
    long: Pixels = 1333

    @property
    def length(self) -> int:
        return self.short

    def target(self, size: tuple[int, int], choice: int | None = None) -> tuple[int, int]:
        short = self.short if choice is None else self.multi_scale[choice]
        return _scaled(size, min(short / min(size), self.long / max(size)))

    def canvas(self, choice: int | None = None) -> tuple[int, int] | None:
        return None


class Letterbox(Sizing):
    """As large as fits into `size`, the shape kept; the rest is padding.  Every batch has the same shape."""

    type: Literal["letterbox"] = "letterbox"
    size: tuple[Pixels, Pixels] = Field((640, 640), description="height, width; multi_scale gives the longer of them")

    @property
    def length(self) -> int:
        return max(self.size)

    def target(self, size: tuple[int, int], choice: int | None = None) -> tuple[int, int]:
        height, width = self.canvas(choice)
        return _scaled(size, min(height / size[0], width / size[1]))

    def canvas(self, choice: int | None = None) -> tuple[int, int]:
        return _canvas(self.size, None if choice is None else self.multi_scale[choice])


class Fixed(Sizing):
    """Stretched to exactly `size`; the shape of objects changes with it."""

    type: Literal["fixed"] = "fixed"
    size: tuple[Pixels, Pixels] = Field((640, 640), description="height, width; multi_scale gives the longer of them")

    @property
    def length(self) -> int:
        return max(self.size)

    def target(self, size: tuple[int, int], choice: int | None = None) -> tuple[int, int]:
        return self.canvas(choice)

    def canvas(self, choice: int | None = None) -> tuple[int, int]:
        return _canvas(self.size, None if choice is None else self.multi_scale[choice])


Resize = Annotated[ShortEdge | Letterbox | Fixed, Field(discriminator="type")]


def resample(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """(H, W, ...) to `size` (height, width).

    Halved as long as that does not fall below `size`, then linear: a single linear step would skip pixels when it
    shrinks more than twofold, and cv2's area filter takes several times as long for a result that differs little.
    """
    (height, width), whole = size, image
    while image.shape[0] >= 2 * height and image.shape[1] >= 2 * width:
        image = cv2.resize(image, (image.shape[1] // 2, image.shape[0] // 2), interpolation=cv2.INTER_LINEAR)
    if image.shape[:2] != size:
        image = cv2.resize(image, (width, height), interpolation=cv2.INTER_LINEAR)
    return like(image, whole)


def like(image: np.ndarray, before: np.ndarray) -> np.ndarray:
    """What cv2 made of the (H, W, C) image `before`, with the axis that it drops where C is 1."""
    return image if image.ndim == before.ndim else image[..., None]


def _scaled(size: tuple[int, int], scale: float) -> tuple[int, int]:
    return max(1, round(size[0] * scale)), max(1, round(size[1] * scale))


def _canvas(size: tuple[int, int], longest: int | None) -> tuple[int, int]:
    return size if longest is None else _scaled(size, longest / max(size))
