"""A split as flat arrays of its objects, or of those of a sample of its images.

Legend: n images that are looked at, N objects in them, C crowd regions in them, K classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from detector import seeding
from detector.data.config import Resize
from detector.data.index import CocoIndex
from detector.errors import DataError


@dataclass(frozen=True, eq=False)
class Split:
    """What is looked at of one annotation file; crowd regions are no objects."""

    name: str
    index: CocoIndex
    images: np.ndarray  # (n,) int64 rising: places in the index

    @classmethod
    def of(cls, name: str, index: CocoIndex, most: int | None, seed: int) -> Split:
        """All images, or `most` of them, drawn by a generator that depends on the seed and the split's name.

        Raises:
            DataError: the file has no images, or no annotations at all.
        """
        if len(index) == 0:
            raise DataError(f"{index.annotations}: holds no images, expected at least one")
        if not index.annotated:
            raise DataError(
                f"{index.annotations}: has no `annotations` (a test set without its truth?), so there is nothing to"
                " analyse: leave it out"
            )
        images = np.arange(len(index))
        if most is not None and most < len(index):
            rng = seeding.generator(seed, seeding.ANALYSIS, *name.encode())
            images = np.sort(rng.choice(len(index), most, replace=False))
        return cls(name, index, images)

    @cached_property
    def _rows(self) -> tuple[np.ndarray, np.ndarray]:
        """Rows of the index, and for each the place in `images`."""
        start = self.index.offsets[self.images]
        count = self.index.offsets[self.images + 1] - start
        image = np.repeat(np.arange(len(self.images)), count)
        within = np.arange(len(image)) - np.repeat(np.cumsum(count) - count, count)
        return start[image] + within, image

    @cached_property
    def rows(self) -> np.ndarray:
        """(N,) int64 rows of the index, ordered by image."""
        rows = self._rows[0]
        return rows[~self.index.crowd[rows]]

    @cached_property
    def image(self) -> np.ndarray:
        """(N,) int64 place in `images` of each object."""
        rows, image = self._rows
        return image[~self.index.crowd[rows]]

    @cached_property
    def crowd(self) -> tuple[np.ndarray, np.ndarray]:
        """(C, 4) float32 xyxy crowd regions and (C,) int64 the place in `images` of each."""
        rows, image = self._rows
        mine = self.index.crowd[rows]
        return self.index.boxes[rows[mine]], image[mine]

    @cached_property
    def boxes(self) -> np.ndarray:
        """(N, 4) float64 xyxy, pixels of the original image."""
        return self.index.boxes[self.rows].astype(np.float64)

    @cached_property
    def labels(self) -> np.ndarray:
        """(N,) int64 in [0, K)."""
        return self.index.labels[self.rows].astype(np.int64)

    @cached_property
    def sizes(self) -> np.ndarray:
        """(n, 2) float64 height, width of the images."""
        return self.index.sizes[self.images].astype(np.float64)

    @cached_property
    def sides(self) -> np.ndarray:
        """(N, 2) float64 width, height of the objects."""
        return self.boxes[:, 2:] - self.boxes[:, :2]

    @cached_property
    def per_image(self) -> np.ndarray:
        """(n,) int64 objects of each image."""
        return np.bincount(self.image, minlength=len(self.images))

    def scale(self, resize: Resize | None) -> np.ndarray:
        """(n, 2) float64 x, y: what the resize multiplies coordinates by; None: nothing is resized."""
        return self.targets(resize)[:, ::-1] / self.sizes[:, ::-1]

    def targets(self, resize: Resize | None) -> np.ndarray:
        """(n, 2) float64 height, width of the images after the resize."""
        if resize is None:
            return self.sizes
        unique, place = np.unique(self.index.sizes[self.images], axis=0, return_inverse=True)
        found = np.array([resize.target((h, w)) for h, w in unique.tolist()], dtype=np.float64)
        return found[place.reshape(-1)]

    def resized_sides(self, resize: Resize | None) -> np.ndarray:
        """(N, 2) float64 width, height of the objects after the resize."""
        return self.sides * self.scale(resize)[self.image]

    @property
    def classes(self) -> tuple[str, ...]:
        return self.index.classes

    def file_name(self, i: int) -> str:
        """Of image i of those looked at."""
        return self.index.file_name(int(self.images[i]))

    @property
    def sampled(self) -> bool:
        """Whether some images of the file are left out."""
        return len(self.images) < len(self.index)


def check_together(splits: Sequence[Split]) -> None:
    """
    Raises:
        DataError: the splits have other classes, or there is no object in the first.
    """
    first = splits[0]
    for other in splits[1:]:
        if other.classes != first.classes:
            extra = sorted(set(other.classes) ^ set(first.classes))
            what = f"{extra[0]!r} is in one of them only" if extra else "their ids are in another order"
            raise DataError(
                f"{other.index.annotations}: its classes are not those of {first.index.annotations} ({what});"
                " splits of one data set have equal `categories`: analyse the files one at a time, or make them equal"
            )
    if not len(first.rows):
        raise DataError(
            f"{first.index.annotations}: the {len(first.images)} images looked at hold no object, so there is nothing"
            " to analyse" + ("; take a larger --max-images" if first.sampled else "")
        )
