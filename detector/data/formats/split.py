"""Parting one data set so that every part has its share of every class, and no group is torn apart.

Iterative stratification (Sechidis, Tsoumakas and Vlahavas, "On the stratification of multi-label data", ECML 2011,
algorithm 1): the rarest class first, each unit that holds it to the part that lacks most of that class.  A unit is a
group of images (the frames of a clip), or one image.  Units count as many images of a class as they hold; the large
ones are placed first, since the small ones can level out what they leave.

Legend: U units, S parts, K classes.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from detector.data.annotations import short
from detector.errors import DataError

Document = dict[str, Any]


@dataclass(frozen=True)
class Split:
    """Which part each image is in, and how the classes came out."""

    part: np.ndarray  # (n,) int64 in [0, S), images in the file's order
    parts: tuple[str, ...]  # S names
    shares: tuple[float, ...]  # S, asked for; they add up to 1
    classes: tuple[str, ...]  # K
    images: np.ndarray  # (S, K) int64: images of the part that hold the class
    objects: np.ndarray  # (S, K) int64, crowd regions aside
    groups: np.ndarray  # (S,) int64
    small: tuple[str, ...]  # a sentence for each class that some part has none of

    def document(self, source: Document, s: int, info: Mapping[str, Any]) -> Document:
        """The part as a COCO file: the source's entries as they are, all of its categories, its notes and `info`."""
        images = [image for image, part in zip(source["images"], self.part.tolist(), strict=True) if part == s]
        ids = {image["id"] for image in images}
        known = source.get("info")
        return {
            **source,
            "info": {**(known if isinstance(known, dict) else {}), **info},
            "images": images,
            "annotations": [a for a in source["annotations"] if a["image_id"] in ids],
        }


def split(document: Document, shares: Mapping[str, float], keys: Sequence[str], seed: int) -> Split:
    """Parts of a COCO document that has annotations.

    shares: of each part, adding up to 1.  keys: the group of each image.

    Raises:
        DataError: there are fewer groups than parts.
    """
    categories = sorted(document["categories"], key=lambda c: c["id"])
    row = {image["id"]: i for i, image in enumerate(document["images"])}
    column = {category["id"]: k for k, category in enumerate(categories)}
    objects = np.zeros((len(row), len(column)), dtype=np.int64)
    for a in document["annotations"]:
        objects[row[a["image_id"]], column[a["category_id"]]] += a.get("iscrowd", 0) == 0
    names, unit = np.unique(np.array(keys, dtype=object).astype(str), return_inverse=True)
    if len(names) < len(shares):
        raise DataError(
            f"{len(names)} groups of images (such as {short(str(names[0]))}), expected at least {len(shares)}, one for"
            f" each of {', '.join(shares)}; group by something finer, or make fewer parts"
        )
    holds = np.zeros((len(names), len(column)), dtype=np.int64)  # (U, K) images of the unit that hold the class
    np.add.at(holds, unit, (objects > 0).astype(np.int64))
    size = np.bincount(unit, minlength=len(names))  # (U,) images of the unit
    of_unit = stratify(holds, size, np.array(list(shares.values())), np.random.default_rng(seed))
    part = of_unit[unit]
    count = len(shares)
    parts = tuple(shares)
    class_names = tuple(str(c["name"]) for c in categories)
    return Split(
        part=part,
        parts=parts,
        shares=tuple(shares.values()),
        classes=class_names,
        images=np.stack([(objects[part == s] > 0).sum(0) for s in range(count)]),
        objects=np.stack([objects[part == s].sum(0) for s in range(count)]),
        groups=np.bincount(of_unit, minlength=count),
        small=tuple(_small(class_names, holds, of_unit, parts)),
    )


def stratify(holds: np.ndarray, size: np.ndarray, shares: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """(U,) int64: the part of each unit.

    holds: (U, K) images of the unit that hold each class.  size: (U,) images of the unit.  shares: (S,), S <= U.  A
    part that no unit chose gets the unit that is nearest to its share.
    """
    wanted = shares[:, None] * holds.sum(0)  # (S, K) images of the class that the part still lacks
    room = shares * size.sum()  # (S,) images that the part still lacks
    # Ties between units are broken by their place in a drawn order, ties between parts by a drawn number.
    order = rng.permutation(len(size))
    part = np.full(len(size), -1, dtype=np.int64)

    def place(u: int, lacking: np.ndarray) -> None:
        tie = rng.random(len(shares))
        s = int(np.lexsort((tie, -room, -lacking))[0])
        part[u] = s
        wanted[s] -= holds[u]
        room[s] -= size[u]

    while True:
        left = holds[part < 0].sum(0)
        if not left.any():
            break
        k = int(np.where(left > 0, left, np.iinfo(np.int64).max).argmin())
        units = order[(part[order] < 0) & (holds[order, k] > 0)]
        for u in units[np.argsort(-holds[units, k], kind="stable")].tolist():
            place(u, wanted[:, k])
    rest = order[part[order] < 0]
    for u in rest[np.argsort(-size[rest], kind="stable")].tolist():
        place(u, room)
    return _fill_empty(part, size, shares, order)


def group_keys(images: Sequence[Mapping[str, Any]], pattern: str | None, key: str | None) -> list[str]:
    """The group of each image: what `pattern` finds in its file name (its first parentheses, if it has any), or the
    value of its field `key`; by default each image is a group of its own.

    Raises:
        DataError: the pattern is wrong or an image does not fit it; an image lacks the field.
    """
    if pattern is None and key is None:
        return [str(i) for i in range(len(images))]
    keys = []
    expression = None if pattern is None else _compile(pattern)
    for image in images:
        where = f"image id {image['id']} ({image['file_name']})"
        if expression is not None:
            match = expression.search(image["file_name"])
            found = None if match is None else match[1] if expression.groups else match[0]
            if found is None:
                raise DataError(f"{where}: the file name does not fit --group {pattern!r}, expected every one to fit")
            keys.append(found)
        else:
            assert key is not None
            if image.get(key) is None:
                raise DataError(f"{where}: has no {key!r}, expected it in every image (--group-field)")
            keys.append(repr(image[key]))
    return keys


def _compile(pattern: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern)
    except re.error as error:
        raise DataError(f"--group {pattern!r}: not a regular expression ({error})") from None


def _fill_empty(part: np.ndarray, size: np.ndarray, shares: np.ndarray, order: np.ndarray) -> np.ndarray:
    """A part without any unit takes the one of a part with several whose size is nearest to what it should hold."""
    for s in np.flatnonzero(np.bincount(part, minlength=len(shares)) == 0).tolist():
        several = np.bincount(part, minlength=len(shares)) > 1
        free = order[several[part[order]]]
        if len(free):
            part[free[np.argmin(np.abs(size[free] - shares[s] * size.sum()))]] = s
    return part


def _small(classes: Sequence[str], holds: np.ndarray, of_unit: np.ndarray, parts: Sequence[str]) -> list[str]:
    found = []
    for k, name in enumerate(classes):
        units = int((holds[:, k] > 0).sum())
        without = [p for s, p in enumerate(parts) if not holds[of_unit == s, k].any()]
        if units == 0:
            found.append(f"class {name!r} has no object at all")
        elif without:
            few = f"{units} group{'' if units == 1 else 's'} of images, too few for its share in every part"
            missing = f"{' and '.join(without)} {'has' if len(without) == 1 else 'have'} none of it"
            found.append(f"class {name!r} is in {few}: {missing}")
    return found
