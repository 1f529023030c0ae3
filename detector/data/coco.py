"""A COCO-format data set as a sequence of samples."""

from __future__ import annotations

import os
from collections.abc import Callable

import numpy as np

from detector.data.geometry import follow
from detector.data.images import read_image, read_reduced
from detector.data.index import CocoIndex as CocoIndex
from detector.data.sample import Sample


class CocoData:
    """`data[i]` is image i of the index, decoded, with its objects and crowd regions; images without any are kept.

    Args:
        least: to the (height, width) of an image what `data.reduced(i)` must leave of it; None: all.
    """

    def __init__(self, index: CocoIndex, least: Callable[[tuple[int, int]], tuple[int, int]] | None = None) -> None:
        self.index = index
        self.least = least

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, i: int) -> Sample:
        """
        Raises:
            DataError: the image is missing, unreadable, or not of the size that the annotations say.
        """
        if not 0 <= i < len(self.index):
            raise IndexError(f"image {i} of {len(self.index)}")
        height, width = self.index.sizes[i].tolist()
        return self._sample(i, read_image(self._path(i), (height, width)))

    def reduced(self, i: int) -> Sample:
        """`data[i]`, a JPEG perhaps decoded at 1/2, 1/4 or 1/8 of its size: boxes, `scale` and image agree.

        Raises:
            DataError: as `data[i]`.
        """
        if self.least is None:
            return self[i]
        height, width = self.index.sizes[i].tolist()
        image, n = read_reduced(self._path(i), (height, width), self.least((height, width)))
        sample = self._sample(i, image)
        return sample if n == 1 else follow(sample, image, (1 / n, 1 / n), (0.0, 0.0))

    def _path(self, i: int) -> str:
        return os.path.join(self.index.images, self.index.file_name(i))

    def _sample(self, i: int, image: np.ndarray) -> Sample:
        index = self.index
        height, width = index.sizes[i].tolist()
        first = index.rows(i)
        crowd = index.crowd[first]
        rows = np.arange(first.start, first.stop)
        objects, regions = (rows[~crowd], rows[crowd]) if crowd.any() else (rows, rows[:0])
        return Sample(
            image=image,
            boxes=index.boxes[objects],
            labels=index.labels[objects].astype(np.int64),
            rows=objects,
            crowd=index.boxes[regions],
            image_id=int(index.image_ids[i]),
            original_size=(height, width),
            scale=np.ones(2, dtype=np.float32),
            offset=np.zeros(2, dtype=np.float32),
        )
