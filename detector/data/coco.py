"""A COCO-format data set as a sequence of samples, and how training reads them.

In training an image that cannot be read is named and replaced by the next readable one, whether it is the one whose
turn it is or the partner of another.
"""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import replace
from functools import cached_property

import numpy as np

from detector.data.cache import ImageCache
from detector.data.channels import read_pixels, stretched
from detector.data.frames import scaling
from detector.data.geometry import follow
from detector.data.images import read_image, read_reduced
from detector.data.index import CocoIndex as CocoIndex
from detector.data.outlines import Outlines
from detector.data.proposals import ProposalSet
from detector.data.sample import Sample
from detector.errors import DataError
from detector.pixels import PADDING, Pixels

MEBIBYTE = 1 << 20


class CocoData:
    """`data[i]` is image i of the index, decoded, with its objects and crowd regions; images without any are kept.

    Args:
        cache: keeps what `data.reduced(i)` decodes.
        least: to the (height, width) of an image what `data.reduced(i)` must leave of it; None: all.
        pixels: what the images hold, and how each is normalised by itself; default: 8-bit RGB.
        proposals: of all images of the index; default: none are given.
    """

    def __init__(
        self,
        index: CocoIndex,
        least: Callable[[tuple[int, int]], tuple[int, int]] | None = None,
        cache: ImageCache | None = None,
        pixels: Pixels | None = None,
        proposals: ProposalSet | None = None,
    ) -> None:
        self.index = index
        self.cache = cache
        self.proposals = proposals
        self.pixels = None if pixels is None or pixels.plain else pixels
        self.least = least if self.pixels is None else None
        self.ground = PADDING if pixels is None else pixels.ground

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, i: int) -> Sample:
        """
        Raises:
            DataError: the image is missing, unreadable, or not of the size that the annotations say.
        """
        if not 0 <= i < len(self.index):
            raise IndexError(f"image {i} of {len(self.index)}")
        return self._sample(i, self._decoded(i, whole=True)[0])

    def reduced(self, i: int) -> Sample:
        """`data[i]`, a JPEG perhaps decoded at 1/2, 1/4 or 1/8 of its size: boxes, `scale` and image agree.

        Raises:
            DataError: as `data[i]`.
        """
        if self.cache is None and self.least is None:
            return self[i]
        if self.cache is None:
            image, n = self._decoded(i)
        else:
            image, n = self.cache.read(i, self._path(i), lambda: self._decoded(i))
        sample = self._sample(i, image)
        return sample if n == 1 else follow(sample, image, (1 / n, 1 / n), (0.0, 0.0))

    def _decoded(self, i: int, whole: bool = False) -> tuple[np.ndarray, int]:
        """As the file has it, and by what its size is divided."""
        height, width = self.index.sizes[i].tolist()
        if self.pixels is not None:
            return read_pixels(self._path(i), self.pixels, (height, width)), 1
        if whole or self.least is None:
            return read_image(self._path(i), (height, width)), 1
        return read_reduced(self._path(i), (height, width), self.least((height, width)))

    def _path(self, i: int) -> str:
        return os.path.join(self.index.folder(i), self.index.file_name(i))

    def _sample(self, i: int, image: np.ndarray) -> Sample:
        index = self.index
        height, width = index.sizes[i].tolist()
        first = index.rows(i)
        if self.pixels is not None:
            image = stretched(image, self.pixels)
        crowd = index.crowd[first]
        rows = np.arange(first.start, first.stop)
        objects, regions = (rows[~crowd], rows[crowd]) if crowd.any() else (rows, rows[:0])
        return Sample(
            image=image,
            boxes=index.boxes[objects],
            labels=index.labels[objects].astype(np.int64),
            rows=objects,
            weight=None if index.weight is None else index.weight[objects],
            crowd=index.boxes[regions],
            image_id=int(index.image_ids[i]),
            original_size=(height, width),
            scale=np.ones(2, dtype=np.float32),
            offset=np.zeros(2, dtype=np.float32),
            ground=self.ground,
            proposals=None if self.proposals is None else self.proposals.of(int(index.image_ids[i])),
        )


class Reader:
    """Reads samples.  Those that may come again are kept, up to `keep` bytes, the least recently used given up first;
    what is kept decides how long reading takes and nothing else."""

    def __init__(self, data: CocoData, *, max_unreadable: int, masks: bool, keep: int) -> None:
        self.data = data
        self.max_unreadable = max_unreadable
        self.masks = masks
        self.keep = keep
        self._kept: OrderedDict[int, Sample] = OrderedDict()
        self._bytes = 0

    def read(self, index: int, failures: list[str], keep: bool = False) -> Sample:
        """Image `index`, or the next one that can be read; appends a line to `failures` for each that cannot.

        Raises:
            DataError: more than `max_unreadable` in a row cannot be read.
        """
        tries = min(len(self.data), self.max_unreadable + 1)
        for further in range(tries):
            i = (index + further) % len(self.data)
            if i in self._kept:
                self._kept.move_to_end(i)
                return self._kept[i]
            try:
                sample = self.data.reduced(i)
            except DataError as error:
                failures.append(str(error))
                continue
            if self.masks:
                stored = Outlines.stored(self.data.index, sample.rows)
                moved = (sample.scale != 1).any() or sample.offset.any()
                outlines = stored.mapped(scaling(sample.scale, sample.offset)) if moved else stored
                sample = replace(sample, outlines=outlines)
            if keep:
                self._keep(i, sample)
            return sample
        raise DataError(f"{tries} images in a row could not be read; the first: {failures[-tries]}")

    def _keep(self, i: int, sample: Sample) -> None:
        size = sample.image.nbytes
        if 4 * size > self.keep:  # a few huge images would only push each other out
            return
        sample.image.flags.writeable = False
        self._kept[i] = sample
        self._bytes += size
        while self._bytes > self.keep:
            self._bytes -= self._kept.popitem(last=False)[1].image.nbytes

    @cached_property
    def with_objects(self) -> np.ndarray:
        """Images that hold an object, rising."""
        return self._holding(~self.data.index.crowd)

    @cached_property
    def with_masks(self) -> np.ndarray:
        """Images that hold an object with a mask, rising."""
        return self._holding(~self.data.index.crowd & self.data.index.has_mask)

    def _holding(self, rows: np.ndarray) -> np.ndarray:
        offsets = self.data.index.offsets
        counts = np.concatenate([[0], np.cumsum(rows)])
        return np.flatnonzero(counts[offsets[1:]] > counts[offsets[:-1]])
