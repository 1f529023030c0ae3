"""From a data set in one format to one in another: files are checked first, then written, each whole or not at all."""

from __future__ import annotations

import filecmp
import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import yaml

import detector
from detector.data.formats import coco, yolo
from detector.data.formats.records import Picture, Problems, Source, counted, pictures
from detector.errors import DataError, UserError
from detector.files import write_whole

Images = Literal["copy", "link", "keep"]


@dataclass(frozen=True)
class Target:
    """Where the result goes.  `images`: copied into it, linked from it, or left where they are."""

    folder: Path
    split: str
    images: Images
    force: bool  # files that are there already give way

    @property
    def annotations(self) -> Path:
        return self.folder / "annotations" / f"{self.split}.json"


@dataclass(frozen=True)
class Result:
    """What was written, for people."""

    written: Path
    images: Path  # the folder that file names are relative to
    counts: str
    lines: tuple[str, ...]


def to_coco(
    source: Source,
    target: Target,
    problems: Problems,
    origin: str,
    classes: Sequence[str] | None = None,
    progress: Callable[[], None] | None = None,
) -> Result:
    """`annotations/<split>.json` and, unless they are kept, `images/`.

    `origin`: the format, noted in the file.  `classes`: names in the order of their category ids; by default the
    format's own order, else sorted.

    Raises:
        UserError: a record is broken and not to be skipped, a file is in the way, or nothing is left to be written.
    """
    found = pictures(source, problems, progress)
    names = list(classes or source.classes or sorted({o.name for p in found for o in p.objects}))
    found = _of_classes(found, names, problems)
    _refuse_nothing(found, names, problems)
    info = {"description": f"converted from {origin} by detector {detector.__version__}"}
    content = coco.as_bytes(coco.document(found, names, info))
    refuse_existing([target.annotations], target.force)
    folder = source.folder if target.images == "keep" else target.folder / "images"
    _place(found, folder, target)
    write_whole(target.annotations, content)
    return Result(target.annotations, folder, _counts(found, names), (*source.notes, *problems.lines()))


def to_yolo(
    source: Source,
    target: Target,
    problems: Problems,
    segments: bool,
    progress: Callable[[], None] | None = None,
) -> Result:
    """`data.yaml`, `images/<split>/` and `labels/<split>/`.

    Images that are kept get their labels where YOLO looks for them: in the folder beside, `labels` in place of
    `images`, else in their own; `<split>.txt` lists them.  A `data.yaml` of the same classes gets the split added.

    Raises:
        UserError: a record is broken and not to be skipped, a file is in the way, or nothing is left to be written.
    """
    found = pictures(source, problems, progress)
    names = list(source.classes or [])
    _refuse_nothing(found, names, problems)
    clash = yolo.stems_that_clash([p.file_name for p in found])
    if clash is not None:
        raise DataError(
            f"images {clash[0]} and {clash[1]} would share one label file, expected names that differ before the suffix"
        )
    keep = target.images == "keep"
    folder = source.folder if keep else target.folder / "images" / target.split
    written = yolo.write(found, names, segments)
    labels = {yolo.label_file((folder / name).absolute()): text for name, text in written.labels.items()}
    listing = target.folder / f"{target.split}.txt"
    settings = target.folder / "data.yaml"
    content = _settings(settings, target, names, f"{target.split}.txt" if keep else f"images/{target.split}")
    refuse_existing([*labels, *([listing] if keep else [])], target.force)
    _place(found, folder, target)
    for path, text in labels.items():
        write_whole(path, text.encode())
    if keep:
        write_whole(listing, "".join(f"{(folder / p.file_name).resolve()}\n" for p in found).encode())
    write_whole(settings, content)
    lines = (*source.notes, *written.lines(), *problems.lines())
    return Result(settings, folder, _counts(found, names), lines)


def refuse_existing(paths: Sequence[Path], force: bool) -> None:
    """
    Raises:
        UserError: one of the files exists, and force is not asked for.
    """
    existing = [path for path in paths if path.exists() or path.is_symlink()]
    if existing and not force:
        more = f" (and {len(existing) - 1} more)" if len(existing) > 1 else ""
        raise UserError(f"{existing[0]}{more}: exists already; choose another --out, or replace it with --force")


def _of_classes(found: Sequence[Picture], names: Sequence[str], problems: Problems) -> list[Picture]:
    """Without objects of other classes, each of which is a problem."""
    known, kept = set(names), []
    for picture in found:
        for thing in picture.objects:
            if thing.name not in known:
                problems.add(
                    "object", f"{picture.path}: class {thing.name!r} is not among the expected ({', '.join(names)})"
                )
        kept.append(replace(picture, objects=[o for o in picture.objects if o.name in known]))
    return kept


def _refuse_nothing(found: Sequence[Picture], names: Sequence[str], problems: Problems) -> None:
    if not found:
        raise DataError("\n".join(["no image is left to be written", *problems.lines()]))
    if not names:
        raise DataError(
            "\n".join(["no object in any image, so there are no classes: give --classes", *problems.lines()])
        )


def _place(found: Sequence[Picture], folder: Path, target: Target) -> None:
    """Images into `folder`; what is there already and the same stays."""
    if target.images == "keep":
        return
    places = [(picture.path, folder / picture.file_name) for picture in found]
    todo = [(path, place) for path, place in places if not _is_there(path, place, target.images)]
    refuse_existing([place for _, place in todo], target.force)
    for path, place in todo:
        if target.images == "link":
            _link(path, place)
            continue
        if place.is_symlink():  # to be replaced, not to be written through
            place.unlink()
        try:
            content = path.read_bytes()
        except OSError as error:
            raise DataError(f"{path}: cannot read the image ({error.strerror or error})") from None
        write_whole(place, content)


def _is_there(path: Path, place: Path, images: Images) -> bool:
    try:
        if images == "link":
            return place.is_symlink() and place.resolve() == path.resolve()
        return not place.is_symlink() and place.is_file() and filecmp.cmp(path, place, shallow=False)
    except OSError:
        return False


def _link(path: Path, place: Path) -> None:
    part = place.with_name(place.name + ".part")
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        with suppress(FileNotFoundError):
            part.unlink()
        part.symlink_to(path.resolve())
        os.replace(part, place)
    except OSError as error:
        raise UserError(f"{place}: cannot make the link ({error.strerror or error}); use --images copy") from None


def _settings(path: Path, target: Target, names: Sequence[str], place: str) -> bytes:
    """`data.yaml` with this split; other splits of the same classes stay."""
    settings: dict[str, Any] = {"path": "."}
    if path.exists():
        found = yolo.read_settings(path)
        if yolo.class_names(found, path) == list(names):
            settings = found
            if settings.get(target.split) not in (None, place) and not target.force:
                raise UserError(f"{path}: has a split {target.split!r} already; replace it with --force")
        elif not target.force:
            raise UserError(
                f"{path}: has other classes than this split, expected equal ones; choose another --out, or replace it"
                " with --force"
            )
    settings |= {target.split: place, "names": dict(enumerate(names))}
    return yaml.safe_dump(settings, sort_keys=False, allow_unicode=True).encode()


def _counts(found: Sequence[Picture], names: Sequence[str]) -> str:
    objects = sum(len(p.objects) for p in found)
    return f"{counted(len(found), 'image')}, {counted(objects, 'object')}, {counted(len(names), 'class')}"
