"""The data doctor's look at image files: do they exist, can they be read, what size are they."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

import numpy as np
from PIL import Image

from detector.data.channels import TIFF_NAMES, read_tiff
from detector.data.images import is_cut_off, read_image
from detector.errors import DataError

_ORIENTATION = 0x0112  # EXIF
_SIDEWAYS = 5  # this orientation and those above swap width and height


class Depth(StrEnum):
    """How closely image files are looked at."""

    NONE = "none"  # not at all
    QUICK = "quick"  # header and end of file
    FULL = "full"  # decoded


@dataclass(frozen=True)
class ImageFile:
    """What is known of an image file; `problem` says why it cannot be used."""

    size: tuple[int, int] = (0, 0)  # height, width, camera orientation applied
    stored: tuple[int, int] = (0, 0)  # height, width as stored
    turned: bool = False  # has a camera orientation other than upright
    missing: bool = False
    problem: str | None = None


def look_at_all(
    paths: Iterable[Path], depth: Depth, progress: Callable[[], None] | None = None
) -> dict[Path, ImageFile]:
    """Looks at each file in as many threads as there are cores; `progress` is called after each one."""
    unique = list(dict.fromkeys(paths))
    found = {}
    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        for path, image in zip(unique, pool.map(lambda p: look_at(p, depth), unique), strict=True):
            found[path] = image
            if progress is not None:
                progress()
    return found


def look_at(path: Path, depth: Depth) -> ImageFile:
    if not path.is_file():
        return ImageFile(missing=True, problem="no such file")
    try:
        if depth is Depth.FULL:
            height, width = read_image(path).shape[:2]
            decoded = (height, width)
        with Image.open(path) as header:
            stored = (header.height, header.width)
            orientation = header.getexif().get(_ORIENTATION, 1)
        if depth is Depth.QUICK and is_cut_off(np.memmap(path, dtype=np.uint8, mode="r")):
            return ImageFile(problem="the JPEG is cut off")
    except DataError as error:
        if depth is Depth.FULL and path.suffix.lower() in TIFF_NAMES:
            return _look_at_tiff(path)
        return ImageFile(problem=str(error).removeprefix(f"{path}: "))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        if depth is Depth.FULL and path.suffix.lower() in TIFF_NAMES:
            return _look_at_tiff(path)
        return ImageFile(problem=f"cannot be read ({type(error).__name__})")
    upright = stored[::-1] if orientation in range(_SIDEWAYS, 9) else stored
    return ImageFile(decoded if depth is Depth.FULL else upright, stored, orientation in range(2, 9))


def _look_at_tiff(path: Path) -> ImageFile:
    """One of channels that common readers do not know."""
    try:
        height, width = read_tiff(path).shape[:2]
    except DataError as error:
        return ImageFile(problem=str(error).removeprefix(f"{path}: "))
    return ImageFile((height, width), (height, width))
