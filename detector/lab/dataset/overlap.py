"""How much objects of an image overlap each other.

Legend: N objects, P pairs of objects of one image.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from detector.lab.dataset.split import Split

PAIRS_AT_ONCE = 1 << 20  # bounds the memory, some 100 bytes a pair
THRESHOLDS = (0.3, 0.5, 0.6, 0.7)


@dataclass(frozen=True, eq=False)
class Crowding:
    """N numbers each, and what follows from them; all 0 without objects."""

    iou: np.ndarray  # (N,) float64: highest IoU with another object of the image
    iou_of_class: np.ndarray  # (N,) float64: the same among objects of its own class
    holders: np.ndarray  # (N,) int64: other objects of the image that hold this one's centre
    pairs_per_image: float  # pairs with IoU above 0.5 in an image: CrowdHuman's measure (Shao et al., 2018, table 2)

    def above(self, threshold: float, same_class: bool = False) -> float:
        """Share of objects that overlap another by more than `threshold`."""
        values = self.iou_of_class if same_class else self.iou
        return float((values > threshold).mean()) if len(values) else 0.0

    @property
    def contested(self) -> float:
        """Share of objects whose centre another object holds too."""
        return float((self.holders > 0).mean()) if len(self.holders) else 0.0


def crowding(split: Split) -> Crowding:
    """Time and pairs grow with the sum over images of their objects squared; memory does not."""
    boxes, labels = split.boxes, split.labels
    area = split.sides.prod(1)
    center = (boxes[:, :2] + boxes[:, 2:]) / 2
    iou, own = np.zeros(len(boxes)), np.zeros(len(boxes))
    holders = np.zeros(len(boxes), dtype=np.int64)
    crowded = 0
    for first, one, other in _pairs(split):
        shared = np.minimum(boxes[one, 2:], boxes[other, 2:]) - np.maximum(boxes[one, :2], boxes[other, :2])
        both = shared.clip(min=0).prod(1)
        value = both / (area[one] + area[other] - both)
        crowded += int(((value > 0.5) & (one < other)).sum())
        np.maximum.at(iou, one, value)
        np.maximum.at(own, one, np.where(labels[one] == labels[other], value, 0.0))
        inside = ((center[one] > boxes[other, :2]) & (center[one] < boxes[other, 2:])).all(1)
        holders[first] += np.bincount(one - first.start, inside, first.stop - first.start).astype(np.int64)
    return Crowding(iou, own, holders, crowded / len(split.images))


def _pairs(split: Split) -> Iterator[tuple[slice, np.ndarray, np.ndarray]]:
    """Objects `first`, and each of them with every other object of its image: two (P,) int64."""
    count = split.per_image
    start = np.cumsum(count) - count
    partners = count[split.image]
    ends = np.cumsum(partners)
    done = 0
    while done < len(partners):
        limit = (ends[done - 1] if done else 0) + PAIRS_AT_ONCE
        stop = max(done + 1, int(np.searchsorted(ends, limit, side="right")))
        mine = partners[done:stop]
        one = np.repeat(np.arange(done, stop), mine)
        within = np.arange(len(one)) - np.repeat(np.cumsum(mine) - mine, mine)
        other = start[split.image[one]] + within
        differ = one != other
        yield slice(done, stop), one[differ], other[differ]
        done = stop
