"""The annotated truth of an evaluation as flat arrays, taken from a COCO annotation file as it stands.

Unlike the training index nothing is clipped or ordered anew, so that scores are those of COCO's own evaluation.

Legend: n images, K categories, m annotations.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from detector.data import columns
from detector.data.annotations import check_is_coco, read_document, read_full, short
from detector.data.index import CocoIndex
from detector.data.several import SeveralIndex

# Square pixels of the annotation's `area`, as COCO defines them; the borders belong to both sides.
AREAS = {"all": (0.0, 1e10), "small": (0.0, 32.0**2), "medium": (32.0**2, 96.0**2), "large": (96.0**2, 1e10)}


@dataclass(frozen=True, eq=False)
class Truth:
    """Images and categories by ascending id, annotations in the order of the file."""

    source: str  # file name, for messages
    image_ids: np.ndarray  # (n,) int64 ascending
    image_sizes: np.ndarray  # (n, 2) int64 height, width; 0 where the file does not say
    category_ids: np.ndarray  # (K,) int64 ascending
    names: tuple[str, ...]  # K
    ids: np.ndarray  # (m,) int64
    image: np.ndarray  # (m,) int64 index into image_ids
    category: np.ndarray  # (m,) int64 index into category_ids
    boxes: np.ndarray  # (m, 4) float64 x y width height
    area: np.ndarray  # (m,) float64; decides what is small, medium and large
    crowd: np.ndarray  # (m,) bool
    masks: list[Any] | None  # m polygons or run-length encodings; None where only boxes are scored
    notices: tuple[str, ...]  # what is not scored, a sentence each

    def __len__(self) -> int:
        return len(self.ids)

    @classmethod
    def load(cls, annotations: Path | dict[str, Any], masks: bool = False) -> Truth:
        """From a COCO file, or from its content.

        Raises:
            DataError: not a readable COCO file; names the entry and the key at fault.
        """
        place = columns.Place(Path("annotations"), Path("IMAGE_FOLDER"))
        if isinstance(annotations, dict):
            document = annotations
            check_is_coco(document, place.annotations)
        else:
            place = columns.Place(annotations, place.images)
            document = read_full(annotations) if masks else read_document(annotations)[0]
            check_is_coco(document, annotations)
        return _from_document(document, place, masks)

    @classmethod
    def of(cls, index: CocoIndex, masks: bool = False) -> Truth:
        """Of the annotation file behind an index; of several, with the ids and classes that the index gives them.

        Raises:
            DataError: as `load`.
        """
        if not isinstance(index, SeveralIndex):
            return cls.load(index.annotations, masks)
        return _join(index, [cls.load(part.annotations, masks) for part in index.parts])


def lookup(values: np.ndarray, known: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(index of each value in the ascending `known`, whether it is there)."""
    if len(known) == 0:
        return np.zeros(len(values), dtype=np.int64), np.zeros(len(values), dtype=bool)
    index = np.searchsorted(known, values).clip(max=len(known) - 1)
    return index, known[index] == values


def _from_document(document: dict[str, Any], place: columns.Place, with_masks: bool) -> Truth:
    images, categories, items = document["images"], document.get("categories", []), document.get("annotations", [])
    image_ids = columns.integers(images, "id", "images", place)
    columns.refuse_duplicates(image_ids, "image", place)
    category_ids = columns.integers(categories, "id", "categories", place)
    columns.refuse_duplicates(category_ids, "category", place)
    ids = columns.integers(items, "id", "annotations", place)
    columns.refuse_duplicates(ids, "annotation", place)
    by_id, named = np.argsort(image_ids), np.argsort(category_ids)
    if with_masks:  # without them, polygons cannot be drawn
        columns.integers(images, "height", "images", place)
        columns.integers(images, "width", "images", place)
    sizes = [
        [size if columns.is_integer(size := images[i].get(key)) else 0 for key in ("height", "width")] for i in by_id
    ]

    image, has_image = lookup(columns.integers(items, "image_id", "annotations", place), image_ids[by_id])
    category, has_category = lookup(columns.integers(items, "category_id", "annotations", place), category_ids[named])
    boxes = columns.boxes(items, place)
    area = columns.numbers(items, "area", "annotations", place)
    area = np.where(np.isfinite(area) & (area >= 0), area, boxes[:, 2] * boxes[:, 3])
    finite = np.isfinite(boxes).all(1)
    kept = np.flatnonzero(has_image & has_category & finite)
    masks = None
    if with_masks:
        masks = [item.get("segmentation") for item in (items[i] for i in kept)]
        wrong = next((k for k, mask in enumerate(masks) if not mask or not isinstance(mask, list | dict)), None)
        if wrong is not None:
            raise place.error(
                f"annotation id {ids[kept[wrong]]}: segmentation is {short(masks[wrong])}, expected polygons or a"
                " run-length encoding; to score boxes, use --iou-type bbox"
            )
    left_out = {"of unknown images": ~has_image, "of unknown categories": ~has_category, "with NaN in the box": ~finite}
    return Truth(
        source=str(place.annotations),
        image_ids=image_ids[by_id],
        image_sizes=np.array(sizes, dtype=np.int64).reshape(-1, 2),
        category_ids=category_ids[named],
        names=tuple(str(categories[k].get("name", category_ids[k])) for k in named),
        ids=ids[kept],
        image=image[kept],
        category=category[kept],
        boxes=boxes[kept],
        area=area[kept],
        crowd=np.array([item.get("iscrowd") in (1, True) for item in items], dtype=bool)[kept],
        masks=masks,
        notices=tuple(f"{n.sum()} annotations {why} are not scored" for why, n in left_out.items() if n.any()),
    )


def _join(index: SeveralIndex, truths: list[Truth]) -> Truth:
    """Objects of classes that are left out are not there."""
    ids, images, categories, kept = [], [], [], []
    order = np.argsort(index.image_ids)
    place = np.argsort(order)  # of the index's images among the ascending ids
    for s, (truth, part) in enumerate(zip(truths, index.parts, strict=True)):
        own = np.argsort(part.image_ids)
        category = index.label_maps[s][truth.category]
        kept.append(np.flatnonzero(category >= 0))
        images.append(place[index.first_image[s] + own[truth.image]][kept[s]])
        categories.append(category[kept[s]])
        # Boxes that the index leaves out have no id there; they get one below, past all others.
        rows = slice(index.first_row[s], index.first_row[s + 1])
        known, new = part.annotation_ids[index.part_rows[rows]], index.annotation_ids[rows]
        by_id = np.argsort(known)
        at, found = lookup(truth.ids[kept[s]], known[by_id])
        ids.append(np.where(found, new[by_id][at] if len(new) else 0, -1))
    together = np.concatenate(ids)
    nameless = together == -1
    together[nameless] = index.annotation_ids.max(initial=0) + 1 + np.arange(nameless.sum())

    def joined(name: str) -> np.ndarray:
        return np.concatenate([getattr(truth, name)[rows] for truth, rows in zip(truths, kept, strict=True)])

    masks = None
    if all(truth.masks is not None for truth in truths):
        masks = [(truth.masks or [])[k] for truth, rows in zip(truths, kept, strict=True) for k in rows]
    sizes = np.concatenate([truth.image_sizes for truth in truths])
    starts = np.repeat(index.first_image[:-1], np.diff(index.first_image))
    ranks = np.concatenate([np.argsort(np.argsort(part.image_ids)) for part in index.parts])
    return Truth(
        source=str(index.annotations),
        image_ids=index.image_ids[order],
        image_sizes=sizes[(starts + ranks)[order]],
        category_ids=index.category_ids,
        names=index.classes,
        ids=together,
        image=np.concatenate(images),
        category=np.concatenate(categories),
        boxes=joined("boxes"),
        area=joined("area"),
        crowd=joined("crowd"),
        masks=masks,
        notices=(*(f"{t.source}: {n}" for t in truths for n in t.notices), *index.notices),
    )
