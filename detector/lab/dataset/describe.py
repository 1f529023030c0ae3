"""What is in a split: classes, sizes, shapes, how many, how crowded, where.

Legend: n images, N objects, K classes.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import numpy as np
from scipy import sparse

from detector.data.config import Resize
from detector.evaluate.survey import ASPECTS, groups
from detector.lab.dataset.overlap import Crowding, crowding
from detector.lab.dataset.split import Split

# COCO's own bounds: areas in pixels of the original image (of the mask, where there is one).
SMALL, LARGE = 32.0**2, 96.0**2
QUANTILES = {"1 %": 0.01, "5 %": 0.05, "25 %": 0.25, "median": 0.5, "75 %": 0.75, "95 %": 0.95, "99 %": 0.99}
CELLS = 24  # of a heat map, along each axis

Numbers = dict[str, float]


@dataclass(frozen=True)
class ClassFacts:
    name: str
    objects: int
    share: float  # of the split's objects
    images: int  # that hold at least one
    image_share: float
    per_image: float  # objects in an image that holds any
    side: float  # median square root of the area, pixels; 0 without objects
    aspect: float  # median width / height; 0 without objects


@dataclass(frozen=True, eq=False)
class Facts:
    """Of one split.  Dictionaries of numbers are quantiles (QUANTILES, least, most, mean)."""

    name: str
    images: int
    images_in_file: int
    objects: int
    crowd_regions: int
    empty_images: int
    notices: tuple[str, ...]
    classes: tuple[ClassFacts, ...]
    together: np.ndarray  # (K, K) int64: images that hold both; the diagonal: images that hold the class
    side: Numbers  # square root of the area, pixels of the original image
    width: Numbers
    height: Numbers
    relative_side: Numbers  # square root of the area over that of the image
    resized_side: Numbers  # pixels after the resize
    coco: dict[str, int]  # small, medium, large
    aspect: Numbers  # width / height
    elongation: dict[str, int]  # longer side over shorter side, objects in each group
    per_image: Numbers
    crowding: Crowding
    centers: np.ndarray  # (CELLS, CELLS) int64: objects by centre, relative to the image; row 0 is the top
    at_edge: float  # share of objects that touch the image's edge
    image_height: Numbers
    image_width: Numbers
    image_sizes: tuple[tuple[int, int, int], ...]  # height, width, images; the most frequent first


def spread(values: np.ndarray) -> Numbers:
    """Quantiles of (m,) values; empty without any."""
    if len(values) == 0:
        return {}
    found = {name: float(np.quantile(values, q)) for name, q in QUANTILES.items()}
    return {"least": float(values.min()), **found, "most": float(values.max()), "mean": float(values.mean())}


def describe(split: Split, resize: Resize | None) -> Facts:
    w, h = split.sides.T
    side = np.sqrt(w * h)
    image_area = split.sizes.prod(1)[split.image]
    area = split.index.area[split.rows]
    elongation = groups(np.maximum(w, h) / np.minimum(w, h), ASPECTS)
    sizes = Counter(map(tuple, split.index.sizes[split.images].tolist()))
    together = _together(split)
    resized = split.resized_sides(resize)
    return Facts(
        name=split.name,
        images=len(split.images),
        images_in_file=len(split.index),
        objects=len(split.rows),
        crowd_regions=len(split.crowd[0]),
        empty_images=int((split.per_image == 0).sum()),
        notices=split.index.notices,
        classes=_classes(split, together, side, w / h),
        together=together,
        side=spread(side),
        width=spread(w),
        height=spread(h),
        relative_side=spread(np.sqrt(w * h / image_area)),
        resized_side=spread(np.sqrt(resized.prod(1))),
        coco={
            "small": int((area < SMALL).sum()),
            "medium": int(((area >= SMALL) & (area < LARGE)).sum()),
            "large": int((area >= LARGE).sum()),
        },
        aspect=spread(w / h),
        elongation={name: int((elongation == i).sum()) for i, name in enumerate(ASPECTS)},
        per_image=spread(split.per_image),
        crowding=crowding(split),
        centers=_centers(split),
        at_edge=_at_edge(split),
        image_height=spread(split.sizes[:, 0]),
        image_width=spread(split.sizes[:, 1]),
        image_sizes=tuple((height, width, count) for (height, width), count in sizes.most_common()),
    )


def _classes(split: Split, together: np.ndarray, side: np.ndarray, aspect: np.ndarray) -> tuple[ClassFacts, ...]:
    count = np.bincount(split.labels, minlength=len(split.classes))
    order = np.argsort(split.labels, kind="stable")
    parts = np.split(order, np.cumsum(count)[:-1]) if len(count) else []
    found = []
    for k, mine in enumerate(parts):
        objects, images = int(count[k]), int(together[k, k])
        found.append(
            ClassFacts(
                name=split.classes[k],
                objects=objects,
                share=objects / max(1, len(split.rows)),
                images=images,
                image_share=images / len(split.images),
                per_image=objects / max(1, images),
                side=float(np.median(side[mine])) if objects else 0.0,
                aspect=float(np.median(aspect[mine])) if objects else 0.0,
            )
        )
    return tuple(found)


def _together(split: Split) -> np.ndarray:
    """(K, K) int64: in how many images both classes occur."""
    shape = (len(split.images), len(split.classes))
    pairs = np.unique(np.stack([split.image, split.labels], 1), axis=0)
    present = sparse.csr_matrix((np.ones(len(pairs), dtype=np.int64), (pairs[:, 0], pairs[:, 1])), shape=shape)
    return np.asarray((present.T @ present).todense(), dtype=np.int64)


def _centers(split: Split) -> np.ndarray:
    center = (split.boxes[:, :2] + split.boxes[:, 2:]) / 2 / split.sizes[split.image][:, ::-1]
    found, _, _ = np.histogram2d(center[:, 1], center[:, 0], bins=CELLS, range=[[0, 1], [0, 1]])
    return found.astype(np.int64)


def _at_edge(split: Split) -> float:
    """Within one pixel."""
    if not len(split.boxes):
        return 0.0
    far = split.sizes[split.image][:, ::-1] - split.boxes[:, 2:]
    return float(((split.boxes[:, :2] < 1) | (far < 1)).any(1).mean())
