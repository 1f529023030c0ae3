"""The index of a COCO file: everything that training needs to know, in flat arrays.

No Python object for an annotation, so forked workers share the memory and nothing grows.  n images in the file's order,
m annotations ordered by image (then as in the file), K classes ordered by category id.
"""

from __future__ import annotations

import logging
from collections import Counter
from dataclasses import dataclass, fields
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from detector.data import columns, masks
from detector.data.annotations import doctor, leaves_folder, no_collection, read_span, short
from detector.data.pieces import Document, Unusual, read_in_pieces, read_whole
from detector.errors import DataError

_log = logging.getLogger(__name__)
_NAMED = 3  # examples in a notice


@dataclass(frozen=True, eq=False)
class CocoIndex:
    """Images, boxes and classes of one annotation file.

    A box that is left out (not finite, no area within the image) has no row; `notices` tells how many were.
    """

    annotations: Path  # the file
    images: Path  # the folder that file names are relative to
    classes: tuple[str, ...]  # K names; label k is classes[k]
    category_ids: np.ndarray  # (K,) int64 rising: label k is category_ids[k] in the file
    image_ids: np.ndarray  # (n,) int64
    sizes: np.ndarray  # (n, 2) int32 height, width
    offsets: np.ndarray  # (n + 1,) int64: image i has the rows offsets[i] to offsets[i + 1]
    boxes: np.ndarray  # (m, 4) float32 xyxy, clipped to the image
    labels: np.ndarray  # (m,) int32 in [0, K)
    crowd: np.ndarray  # (m,) bool
    area: np.ndarray  # (m,) float64 pixels, as the file says: of the mask where there is one
    annotation_ids: np.ndarray  # (m,) int64
    weight: np.ndarray | None  # (m,) float32: how much each counts in the losses; None where the file gives no weight
    annotated: bool  # False for a test set whose truth is not given
    notices: tuple[str, ...]  # what was filled in or left out, a sentence each
    names: bytes  # all file names, one after the other
    name_offsets: np.ndarray  # (n + 1,) int64
    spans: np.ndarray  # (m, 2) int64: where in the file each segmentation stands; 0 0 where there is none
    stamp: tuple[int, int]  # size and time of the file when it was read

    @classmethod
    def load(cls, annotations: Path, images: Path) -> CocoIndex:
        """Reads a COCO annotation file; images themselves are not touched.

        Missing `iscrowd` becomes 0 and missing `area` the box's area; boxes are clipped to their image; boxes without
        area are left out.  All this is counted in `notices` and logged once.

        Raises:
            DataError: the file or the folder is missing, or something in the file is wrong: names the annotation.
        """
        annotations, images = Path(annotations), Path(images)
        if not images.is_dir():
            raise DataError(f"{images}: no such image folder (for the annotations {annotations})")
        with no_collection():
            index = _build(annotations, images)
        for notice in index.notices:
            _log.warning("%s: %s", annotations, notice)
        return index

    def __len__(self) -> int:
        return len(self.image_ids)

    def file_name(self, i: int) -> str:
        """Of image i, relative to the image folder."""
        return self.names[self.name_offsets[i] : self.name_offsets[i + 1]].decode("utf-8")

    def image_path(self, i: int) -> Path:
        return self.folder(i) / self.file_name(i)

    def folder(self, i: int) -> Path:
        """That the file name of image i is relative to."""
        return self.images

    def title(self, i: int) -> str:
        """What goes before an image's id or place where a person reads it: its source, where there are several."""
        return ""

    def origin(self, row: int) -> tuple[CocoIndex, int]:
        """The index of the file that holds an annotation, and its row there."""
        return self, row

    def rows(self, i: int) -> slice:
        """Of image i in the annotation arrays, crowd regions included."""
        return slice(int(self.offsets[i]), int(self.offsets[i + 1]))

    def image_of(self, row: int) -> int:
        """The image that an annotation belongs to."""
        return int(np.searchsorted(self.offsets, row, side="right")) - 1

    def segmentation(self, row: int) -> Any:
        """Polygons `[[x1, y1, ...], ...]`, a run-length encoding, or None; read from the file now.

        Raises:
            DataError: the file was changed since it was indexed, or the segmentation is not valid JSON.
        """
        start, stop = self.spans[row].tolist()
        if start == stop:
            return None
        if _stamp(self.annotations) != self.stamp:
            raise DataError(f"{self.annotations}: the annotation file was changed while in use; start again")
        return read_span(self.annotations, start, stop)

    def mask(self, row: int) -> np.ndarray | None:
        """(height, width) bool in the original image's pixels, or None where the file has no segmentation.

        Raises:
            DataError: the segmentation is wrong: names the annotation.
        """
        segmentation = self.segmentation(row)
        if not segmentation:
            return None
        height, width = self.sizes[self.image_of(row)].tolist()
        try:
            return masks.decode(segmentation, (height, width))
        except DataError as error:
            raise self._wrong_mask(row, str(error)) from None

    def rings(self, row: int) -> tuple[np.ndarray, ...] | None:
        """(v, 2) float64 x, y corners of each polygon, or None where the segmentation is a run-length encoding.

        Raises:
            DataError: the segmentation is wrong: names the annotation.
        """
        segmentation = self.segmentation(row)
        if not isinstance(segmentation, list):
            return None
        problem = next((p for p in map(masks.polygon_problem, segmentation) if p is not None), None)
        if problem is not None:
            raise self._wrong_mask(row, problem)
        return tuple(np.array(ring, dtype=np.float64).reshape(-1, 2) for ring in segmentation)

    @property
    def has_mask(self) -> np.ndarray:
        """(m,) bool: the file gives a segmentation."""
        return np.asarray(self.spans[:, 1] > self.spans[:, 0])

    @property
    def doctor(self) -> str:
        """The command that finds all mistakes of the file."""
        return doctor(self.annotations, self.images)

    def _wrong_mask(self, row: int, problem: str) -> DataError:
        return DataError(
            f"{self.annotations}: annotation id {self.annotation_ids[row]}: segmentation: {problem}; see {self.doctor}"
        )


def class_names(annotations: Path, images: Path) -> tuple[str, ...]:
    """The classes of a COCO file by rising category id, and nothing else of it.

    Raises:
        DataError: the file is missing or wrong.
    """
    place = columns.Place(Path(annotations), Path(images))
    try:
        return _categories(list(chain.from_iterable(read_in_pieces(place.annotations).categories)), place, [])[1]
    except (Unusual, DataError):
        return _categories(list(chain.from_iterable(read_whole(place.annotations).categories)), place, [])[1]


def _build(annotations: Path, folder: Path) -> CocoIndex:
    stamp = _stamp(annotations)
    place = columns.Place(annotations, folder)
    try:
        return _from_document(read_in_pieces(annotations), place, stamp)
    except (Unusual, DataError):  # what is wrong, and where in the file, is said by the reading of the whole
        return _from_document(read_whole(annotations), place, stamp)


def _from_document(document: Document, place: columns.Place, stamp: tuple[int, int]) -> CocoIndex:
    notices: list[str] = []
    category_ids, classes = _categories(list(chain.from_iterable(document.categories)), place, notices)
    image_ids, sizes, names = _images(list(chain.from_iterable(document.images)), place)
    table = _Table.join([_Table.of(items, document.spans, place) for items in document.annotations])
    columns.refuse_duplicates(table.ids, "annotation", place)
    image = _lookup(image_ids, table.image_ids, "image_id", table.ids, place)
    label = _lookup(category_ids, table.category_ids, "category_id", table.ids, place)
    crowd = _crowd(table.crowd, notices)
    area = _area(table.area, table.xywh, notices)
    boxes, kept = _clip(table.xywh, sizes[image], table.ids, notices)
    rows = np.flatnonzero(kept)
    rows = rows[np.argsort(image[rows], kind="stable")]
    return CocoIndex(
        annotations=place.annotations,
        images=place.images,
        classes=classes,
        category_ids=category_ids,
        image_ids=image_ids,
        sizes=sizes,
        offsets=np.concatenate([[0], np.cumsum(np.bincount(image[rows], minlength=len(image_ids)))]).astype(np.int64),
        boxes=boxes[rows],
        labels=label[rows].astype(np.int32),
        crowd=crowd[rows],
        area=area[rows],
        annotation_ids=table.ids[rows],
        weight=_weight(table, rows, place),
        annotated=document.annotated,
        notices=tuple(notices),
        names=b"".join(names),
        name_offsets=np.concatenate([[0], np.cumsum([len(n) for n in names])]).astype(np.int64),
        spans=table.spans[rows],
        stamp=stamp,
    )


def _stamp(path: Path) -> tuple[int, int]:
    try:
        status = path.stat()
    except OSError as error:
        raise DataError(f"{path}: cannot read the annotation file ({error.strerror or error})") from None
    return status.st_size, status.st_mtime_ns


def _categories(items: list[Any], place: columns.Place, notices: list[str]) -> tuple[np.ndarray, tuple[str, ...]]:
    """Ids in rising order and their names; a name that occurs twice gets its id appended, so that classes differ."""
    ids = columns.integers(items, "id", "categories", place)
    columns.refuse_duplicates(ids, "category", place)
    names = columns.strings(items, "name", "categories", place)
    order = np.argsort(ids, kind="stable")
    twice = {name for name, count in Counter(names).items() if count > 1}
    if twice:
        notices.append(f"several categories are called {short(sorted(twice)[0])}; their ids are appended to the names")
    return ids[order], tuple(f"{names[k]} ({ids[k]})" if names[k] in twice else names[k] for k in order)


def _images(items: list[Any], place: columns.Place) -> tuple[np.ndarray, np.ndarray, list[bytes]]:
    ids = columns.integers(items, "id", "images", place)
    columns.refuse_duplicates(ids, "image", place)
    height = columns.integers(items, "height", "images", place)
    width = columns.integers(items, "width", "images", place)
    sizes = np.stack([height, width], 1)
    wrong = np.flatnonzero(((sizes < 1) | (sizes > np.iinfo(np.int32).max)).any(1))
    if len(wrong):
        i = wrong[0]
        raise place.error(f"image id {ids[i]}: height {height[i]}, width {width[i]}, expected at least 1")
    names = columns.strings(items, "file_name", "images", place)
    wrong_name = next((i for i, name in enumerate(names) if leaves_folder(name)), None)
    if wrong_name is not None:
        raise place.error(
            f"image id {ids[wrong_name]}: file_name {short(names[wrong_name])} leaves the image folder, "
            "expected a path inside it"
        )
    return ids, sizes.astype(np.int32), [name.encode("utf-8", "surrogatepass") for name in names]


@dataclass(frozen=True, eq=False)
class _Table:
    """Of m annotations, what the file says."""

    ids: np.ndarray  # (m,) int64
    image_ids: np.ndarray  # (m,) int64
    category_ids: np.ndarray  # (m,) int64
    xywh: np.ndarray  # (m, 4) float64
    crowd: np.ndarray  # (m,) int8: 0, 1, or -1 where it is missing
    area: np.ndarray  # (m,) float64, NaN where it is missing
    weight: np.ndarray  # (m,) float64, NaN where it is missing
    spans: np.ndarray  # (m, 2) int64: where the segmentation stands; 0 0 where there is none

    @classmethod
    def of(cls, items: list[Any], spans: np.ndarray, place: columns.Place) -> _Table:
        return cls(
            ids=columns.integers(items, "id", "annotations", place),
            image_ids=columns.integers(items, "image_id", "annotations", place),
            category_ids=columns.integers(items, "category_id", "annotations", place),
            xywh=columns.boxes(items, place),
            crowd=_given_crowd(items, place),
            area=columns.numbers(items, "area", "annotations", place),
            weight=columns.numbers(items, "weight", "annotations", place),
            spans=_spans(items, spans, place),
        )

    @classmethod
    def join(cls, tables: list[_Table]) -> _Table:
        return cls(**{f.name: np.concatenate([getattr(t, f.name) for t in tables]) for f in fields(cls)})


def _lookup(known: np.ndarray, ids: np.ndarray, key: str, own: np.ndarray, place: columns.Place) -> np.ndarray:
    """(m,) int64: where each id stands in `known`.  `own`: the annotations' ids, for the error."""
    if len(ids) == 0:
        return ids
    order = np.argsort(known)
    at = np.searchsorted(known[order], ids).clip(max=max(len(known) - 1, 0))
    wrong = np.flatnonzero(known[order][at] != ids) if len(known) else np.arange(len(ids))
    if len(wrong):
        i = int(wrong[0])
        kind = "images" if key == "image_id" else "categories"
        more = f" (and {len(wrong) - 1} more)" if len(wrong) > 1 else ""
        raise place.error(f"annotation id {own[i]}{more}: {key} {ids[i]} is not among `{kind}`")
    return order[at]


def _given_crowd(items: list[Any], place: columns.Place) -> np.ndarray:
    values = [a.get("iscrowd") for a in items]
    if not (set(map(type, values)) <= {int, bool, type(None)} and set(values) <= {None, 0, 1}):
        i, value = next((i, v) for i, v in enumerate(values) if type(v) is float or v not in (None, 0, 1))
        raise place.error(f"annotation id {items[i]['id']}: iscrowd is {short(value)}, expected 0 or 1")
    return np.array([-1 if value is None else value for value in values], dtype=np.int8)


def _crowd(given: np.ndarray, notices: list[str]) -> np.ndarray:
    missing = np.count_nonzero(given < 0)
    if missing:
        notices.append(f"`iscrowd` is missing in {missing} annotations; taken as 0")
    return given == 1


def _weight(table: _Table, rows: np.ndarray, place: columns.Place) -> np.ndarray | None:
    """(m,) float32 of the rows, 1 where the file does not say; None where it never does."""
    given = ~np.isnan(table.weight)
    with np.errstate(invalid="ignore"):
        wrong = np.flatnonzero(given & ~((table.weight >= 0) & (table.weight < np.inf)))
    if len(wrong):
        i = wrong[0]
        raise place.error(f"annotation id {table.ids[i]}: weight is {table.weight[i]:g}, expected 0 or more")
    return np.where(given, table.weight, 1).astype(np.float32)[rows] if given.any() else None


def _area(given: np.ndarray, xywh: np.ndarray, notices: list[str]) -> np.ndarray:
    missing = ~(np.isfinite(given) & (given >= 0))
    if missing.any():
        notices.append(f"`area` is missing or no area in {missing.sum()} annotations; the box's area is taken")
    return np.where(missing, xywh[:, 2] * xywh[:, 3], given)


def _clip(xywh: np.ndarray, sizes: np.ndarray, ids: np.ndarray, notices: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """xyxy float32 within the image, and which of them have an area there."""
    limit = sizes[:, [1, 0, 1, 0]]
    boxes = np.concatenate([xywh[:, :2], xywh[:, :2] + xywh[:, 2:]], 1)
    finite = np.isfinite(boxes).all(1)
    with np.errstate(invalid="ignore"):
        boxes = np.clip(boxes, 0, limit).astype(np.float32)
        has_area = (xywh[:, 2:] > 0).all(1)
        inside = (boxes[:, 2:] > boxes[:, :2]).all(1)
    for wrong, what in (
        (~finite, "with NaN or infinite numbers"),
        (finite & ~has_area, "without width or height"),
        (finite & has_area & ~inside, "outside their image"),
    ):
        if wrong.any():
            first = ", ".join(str(i) for i in ids[wrong][:_NAMED])
            notices.append(
                f"{wrong.sum()} boxes {what} are left out (annotation ids {first}"
                f"{', ...' if wrong.sum() > _NAMED else ''})"
            )
    return boxes, finite & has_area & inside


def _spans(items: list[Any], spans: np.ndarray, place: columns.Place) -> np.ndarray:
    """(m, 2) int64: the segmentation of each annotation; an empty list counts as none."""
    values = [a.get("segmentation") for a in items]
    if not set(map(type, values)) <= {list, type(None)}:
        i = next(i for i, v in enumerate(values) if not isinstance(v, list | None))
        raise place.error(
            f"annotation id {items[i]['id']}: segmentation is {short(values[i])}, "
            "expected a list of polygons or a run-length encoding"
        )
    has = np.array([v is not None for v in values], dtype=bool)
    found = np.zeros((len(items), 2), dtype=np.int64)
    found[has] = spans[[v[0] for v in values if v is not None]]
    found[found[:, 1] - found[:, 0] <= 2] = 0
    return found
