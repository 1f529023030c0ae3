"""A COCO-format data set as a sequence of samples."""

from __future__ import annotations

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
        rows = index.rows(i)
        crowd = index.crowd[rows]
        return Sample(
            image=read_image(index.image_path(i), (height, width)),
            boxes=index.boxes[rows][~crowd],
            labels=index.labels[rows][~crowd].astype(np.int64),
            rows=np.arange(rows.start, rows.stop)[~crowd],
            crowd=index.boxes[rows][crowd],
            image_id=int(index.image_ids[i]),
            original_size=(height, width),
            scale=np.ones(2, dtype=np.float32),
            offset=np.zeros(2, dtype=np.float32),
        )
