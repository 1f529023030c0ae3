"""The data doctor: what is wrong with an annotation file and its images, and a corrected file.

It looks at everything and reports all of it, where training stops at the first mistake.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from detector.data.annotations import check_is_coco, no_collection, read_full
from detector.data.check_images import Depth, look_at_all
from detector.data.examine import examine, file_names
from detector.data.findings import Report
from detector.errors import DataError


def check(
    annotations: Path, images: Path | None, depth: Depth, progress: Callable[[int], Callable[[], None]] | None = None
) -> tuple[Report, dict[str, Any] | None]:
    """What was found, and the repaired document (None if the file cannot be used at all).

    Args:
        annotations: the COCO file.
        images: the folder that its file names are relative to; None (or `Depth.NONE`) leaves the images alone.
        depth: how closely image files are looked at.
        progress: given the number of image files, returns what is called after each of them.
    """
    report = Report()
    try:
        with no_collection():
            document = read_full(annotations)
        check_is_coco(document, annotations, entries=False)
        if images is not None and not images.is_dir():
            raise DataError(f"{images}: no such image folder")
    except DataError as error:
        report.add("file", str(error))
        return report, None
    files = {}
    if images is not None and depth is not Depth.NONE:
        names = list(dict.fromkeys(file_names(document)))
        step = None if progress is None else progress(len(names))
        paths = [images / name for name in names]
        found = look_at_all(paths, depth, step)
        files = {name: found[path] for name, path in zip(names, paths, strict=True)}
    with no_collection():
        return report, examine(document, files.get, report)


def write_fixed(document: dict[str, Any], target: Path, source: Path) -> None:
    """Writes the repaired document whole or not at all; never over the file it came from.

    Raises:
        DataError: `target` is the source itself, or cannot be written.
    """
    if target.resolve() == source.resolve() or (target.exists() and target.samefile(source)):
        raise DataError(f"{target}: is the file that was checked, expected another name for the corrected one")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                json.dump(document, file)
                file.flush()
                os.fsync(file.fileno())
            Path(name).chmod(0o644)
            Path(name).replace(target)
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise
    except OSError as error:
        raise DataError(f"{target}: cannot write the corrected file ({error.strerror or error})") from None
