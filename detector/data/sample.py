"""One image with its truth, as it travels from the files through the transforms to the batch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from detector.data.outlines import Outlines
from detector.pixels import PADDING

if TYPE_CHECKING:
    from detector.data.later import Later


@dataclass(frozen=True, eq=False)
class Sample:
    """An image and its objects.  n objects, c crowd regions.

    Boxes are xyxy in pixels of `image`, pixel edges.  `scale` and `offset` lead from original pixels to the present
    ones, x_now = x_original * scale + offset, so that detections find their way back.
    """

    image: np.ndarray  # (H, W, C) uint8 or uint16; RGB unless the set says otherwise
    boxes: np.ndarray  # (n, 4) float32 xyxy, none of them a crowd
    labels: np.ndarray  # (n,) int64 in [0, K)
    rows: np.ndarray  # (n,) int64: row of each object in the index's annotation arrays
    crowd: np.ndarray  # (c, 4) float32 xyxy: regions of many objects, neither object nor background
    image_id: int  # of the annotation file
    original_size: tuple[int, int]  # height, width of the image as the annotations describe it
    scale: np.ndarray  # (2,) float32 x, y
    offset: np.ndarray  # (2,) float32 x, y
    weight: np.ndarray | None = None  # (n,) float32: how much each object counts in the losses; None: 1
    ground: tuple[int, ...] = PADDING  # (C,) the colour where there is no image
    later: Later | None = None  # what the training device does once the sample is in its batch
    proposals: np.ndarray | None = None  # (m, 4) float32 xyxy in pixels of the ORIGINAL image; None: no file gives any
    outlines: Outlines | None = None  # the n objects' masks; None unless a step of the recipe uses them
