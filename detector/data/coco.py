"""A COCO-format data set as a sequence of samples."""

from __future__ import annotations

import os

import numpy as np

from detector.data.images import read_image
from detector.data.index import CocoIndex as CocoIndex
from detector.data.sample import Sample


class CocoData:
    """`data[i]` is image i of the index, decoded, with its objects and crowd regions; images without any are kept."""

    def __init__(self, index: CocoIndex) -> None:
        self.index = index

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, i: int) -> Sample:
        """
        Raises:
            DataError: the image is missing, unreadable, or not of the size that the annotations say.
        """
        if not 0 <= i < len(self.index):
            raise IndexError(f"image {i} of {len(self.index)}")
        index = self.index
        height, width = index.sizes[i].tolist()
        first = index.rows(i)
        crowd = index.crowd[first]
        rows = np.arange(first.start, first.stop)
        objects, regions = (rows[~crowd], rows[crowd]) if crowd.any() else (rows, rows[:0])
        return Sample(
            image=read_image(os.path.join(index.images, index.file_name(i)), (height, width)),
            boxes=index.boxes[objects],
            labels=index.labels[objects].astype(np.int64),
            rows=objects,
            crowd=index.boxes[regions],
            image_id=int(index.image_ids[i]),
            original_size=(height, width),
            scale=np.ones(2, dtype=np.float32),
            offset=np.zeros(2, dtype=np.float32),
        )
