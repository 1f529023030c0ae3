"""What every annotation format is read into, and what happens to records that are broken.

Boxes are x1 y1 x2 y2 in pixels, pixel edges (a box over the first pixel is 0 0 1 1), as Python floats: conversions are
exact to a billionth of a pixel.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from detector.data.check_images import Depth, look_at_all
from detector.errors import DataError

Box = tuple[float, float, float, float]
Size = tuple[int, int]  # height, width
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".gif")
_DIGITS = 9  # of a pixel, after the point: below them is rounding
_NAMED = 10  # broken records that are named


@dataclass(frozen=True)
class Object:
    """One annotated object."""

    name: str  # of its class
    box: Box
    segmentation: Any = None  # as in COCO: polygons or a run-length encoding; None where there is none
    crowd: bool = False
    more: dict[str, Any] = field(default_factory=dict)  # further keys of its COCO annotation


@dataclass(frozen=True)
class Picture:
    """One image with its objects."""

    path: Path
    file_name: str  # relative to the image folder, with forward slashes
    size: Size
    objects: Sequence[Object]


class Problems:
    """Broken records: the first one ends the conversion, or they are left out, counted and named."""

    def __init__(self, skip: bool) -> None:
        self.skip = skip
        self.counts: Counter[str] = Counter()
        self.named: list[str] = []

    def add(self, kind: Literal["image", "object"], message: str) -> None:
        """
        Raises:
            DataError: broken records are not to be skipped.
        """
        if not self.skip:
            raise DataError(f"{message}; mend it, or leave out what is broken with --skip")
        self.counts[kind] += 1
        if len(self.named) < _NAMED:
            self.named.append(message)

    def lines(self) -> list[str]:
        """What was left out, for people; empty where nothing was."""
        total = sum(self.counts.values())
        if not total:
            return []
        what = " and ".join(counted(n, kind) for kind, n in sorted(self.counts.items()))
        rest = [f"  ... and {total - len(self.named)} more"] if total > len(self.named) else []
        return [f"left out {what}:", *(f"  {message}" for message in self.named), *rest]


# Makes an image's objects once its size is known.
MakeObjects = Callable[[Size, Problems], Sequence[Object]]


@dataclass(frozen=True)
class Entry:
    """What a file says of one image, before the image was looked at."""

    where: str  # file and, where it helps, line: for messages
    image: Path
    size: Size | None  # what the file says; None where it says nothing
    objects: MakeObjects


@dataclass(frozen=True)
class Source:
    """A data set in another format, its image files not yet looked at."""

    entries: Sequence[Entry]
    folder: Path  # that file names are relative to
    classes: Sequence[str] | None = None  # where the format lists them
    notes: Sequence[str] = ()  # what was taken for granted


def pictures(source: Source, problems: Problems, progress: Callable[[], None] | None = None) -> list[Picture]:
    """All images of the source that can be used, in its order.

    Raises:
        DataError: something is broken and not to be skipped.
    """
    files = look_at_all([entry.image for entry in source.entries], Depth.QUICK, progress)
    folder, found, seen = source.folder.resolve(), [], dict[str, str]()
    for entry in source.entries:
        file = files[entry.image]
        resolved = entry.image.parent.resolve() / entry.image.name  # a link to an image is the image meant here
        if file.problem is not None:
            problems.add("image", f"{entry.where}: image {entry.image}: {file.problem}")
        elif entry.size is not None and entry.size not in (file.size, file.stored):
            problems.add(
                "image",
                f"{entry.where}: height, width are {entry.size[0]}, {entry.size[1]}, expected those of {entry.image},"
                f" {file.size[0]}, {file.size[1]}",
            )
        elif not resolved.is_relative_to(folder):
            problems.add(
                "image",
                f"{entry.where}: image {entry.image} is outside of the image folder {source.folder}, expected one in it"
                " (see --image-folder)",
            )
        elif (name := resolved.relative_to(folder).as_posix()) in seen:
            problems.add("image", f"{entry.where}: image {entry.image} is annotated already, in {seen[name]}")
        else:
            seen[name] = entry.where
            size = entry.size or file.size
            found.append(Picture(entry.image, name, size, entry.objects(size, problems)))
    return found


def usable(box: Sequence[float], size: Size, where: str, problems: Problems) -> Box | None:
    """The box rounded to a billionth of a pixel, or None where it is no box of this image."""
    if not all(map(math.isfinite, box)):
        problems.add("object", f"{where}: the box {_shown(box)} is not finite, expected numbers")
        return None
    x1, y1, x2, y2 = (round(float(c), _DIGITS) + 0.0 for c in box)  # + 0.0: no negative zero
    if x2 <= x1 or y2 <= y1:
        problems.add("object", f"{where}: the box x1 y1 x2 y2 = {_shown(box)} has no area, expected x1 < x2, y1 < y2")
    elif x1 >= size[1] or y1 >= size[0] or x2 <= 0 or y2 <= 0:
        problems.add(
            "object",
            f"{where}: the box x1 y1 x2 y2 = {_shown(box)} lies outside of its image (height, width {size[0]},"
            f" {size[1]}), expected pixels within it",
        )
    else:
        return x1, y1, x2, y2
    return None


def extent(polygons: Sequence[Sequence[float]]) -> Box:
    """The box around polygons `[x1, y1, x2, y2, ...]`."""
    xs = [x for polygon in polygons for x in polygon[0::2]]
    ys = [y for polygon in polygons for y in polygon[1::2]]
    return min(xs), min(ys), max(xs), max(ys)


def rounded(numbers: Iterable[float]) -> list[float]:
    """To a billionth of a pixel: what arithmetic with fractions of an image leaves over goes."""
    return [round(float(n), _DIGITS) + 0.0 for n in numbers]


def counted(n: int, what: str) -> str:
    plural = {"class": "classes"}.get(what, what + "s")
    return f"{n} {what if n == 1 else plural}"


def read_text(path: Path, what: str) -> str:
    """
    Raises:
        DataError: the file cannot be read, or is not UTF-8.
    """
    try:
        return path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise DataError(f"{path}: cannot read {what} ({error.strerror or error})") from None
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 text (byte {error.start}), expected {what}; save it as UTF-8") from None


def common_folder(files: Sequence[Path]) -> Path:
    """The deepest folder that holds all of them."""
    parents = {path.parent.resolve() for path in files}
    first = min(parents)
    return next(p for p in (first, *first.parents) if all(q.is_relative_to(p) for q in parents))


def _shown(box: Sequence[float]) -> str:
    return " ".join(f"{c:g}" for c in box)
