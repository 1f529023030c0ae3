"""Finished cells in a folder that is small enough for a repository, so that a study goes on on another machine.

Of a cell all that tables and report count from, in one file; not its weights, without which the report has no pictures
of assignments for it.
"""

from __future__ import annotations

import io
import json
import lzma
import zipfile
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from detector.errors import DataError, UserError
from detector.files import write_whole
from detector.lab.cell import ANNOTATIONS, MATCHES, TREATMENT
from detector.lab.grid import Cell
from detector.lab.standing import check_same

PLAIN = ("identity.json", "task.json", ANNOTATIONS)
ARRAYS = (MATCHES, TREATMENT)
LAST = "result.json"  # its presence says that a cell is finished
DAMAGED = (zipfile.BadZipFile, lzma.LZMAError, KeyError, OSError, EOFError)
DATE = (1980, 1, 1, 0, 0, 0)  # the same cell gives the same bytes


def file_of(folder: Path, cell: Cell) -> Path:
    return folder / "cells" / cell.dataset / cell.arm / f"seed-{cell.seed}.zip"


def keep(cells: Iterable[Cell], folder: Path) -> int:
    """Writes what finished cells have left to `folder`, where it is not there yet; how many were new.

    Raises:
        UserError: a file cannot be written.
    """
    new = 0
    for cell in cells:
        path = file_of(folder, cell)
        if _holds(path, cell):
            continue
        content = io.BytesIO()
        with zipfile.ZipFile(content, "w") as archive:
            for name in (*PLAIN, LAST):
                _add(archive, name, (cell.folder / name).read_bytes())
            for name in ARRAYS:  # unpacked, since LZMA makes less of them than they are
                with np.load(cell.folder / name) as arrays:
                    for key in arrays.files:
                        member = io.BytesIO()
                        np.save(member, arrays[key])
                        _add(archive, f"{name}/{key}.npy", member.getvalue())
        write_whole(path, content.getvalue())
        new += 1
    return new


def take(cells: Iterable[Cell], folder: Path, task: dict[str, Any]) -> int:
    """Puts kept cells where the study looks for them; how many.  What has begun there is left alone.

    `task`: what is asked of each cell beyond its configuration.  All are looked at before any is put there.

    Raises:
        DataError: a kept file is damaged: names it.
        UserError: a kept cell is of another configuration, or the folder cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--keep {folder}: cannot make this folder ({error.strerror or error})") from None
    found = [(cell, file_of(folder, cell)) for cell in cells]
    missing = []
    for cell, path in found:
        if not path.is_file():
            continue
        here = cell.result.is_file()
        try:
            before = _identity(path)
        except DataError:
            if here:  # it is kept anew
                continue
            raise
        # Also of what is here already, which would otherwise be kept in the place of the other one.
        check_same(cell, task, before, f"{path}", "choose another folder with --keep DIR, or delete this file")
        if not here and not cell.run.is_dir():
            missing.append((cell, path))
    for cell, path in missing:
        files = _read(path)
        for name in PLAIN:
            write_whole(cell.folder / name, files[name])
        for name in ARRAYS:
            arrays = {
                Path(key).stem: np.load(io.BytesIO(content), allow_pickle=False)
                for key, content in files.items()
                if key.startswith(f"{name}/")
            }
            packed = io.BytesIO()
            np.savez_compressed(packed, **arrays)
            write_whole(cell.folder / name, packed.getvalue())
        write_whole(cell.folder / LAST, files[LAST])
    return len(missing)


def _identity(path: Path) -> dict[str, Any]:
    """What tells which configuration a kept cell was run with.  Raises DataError where the file is damaged."""
    with suppress(ValueError):
        found = json.loads(_read(path, ("identity.json",))["identity.json"])
        if isinstance(found, dict):
            return found
    raise DataError(
        f"{path}: its identity.json holds no keys and values; restore the file, or delete it to run the cell again"
    )


def _read(path: Path, names: Sequence[str] = ()) -> dict[str, bytes]:
    """{name: content} of `names`, or of all that a cell has.  Raises DataError where the file is damaged."""
    try:
        with zipfile.ZipFile(path) as archive:
            return {name: archive.read(name) for name in names or (*PLAIN, *_arrays(archive), LAST)}
    except DAMAGED as error:
        raise DataError(
            f"{path}: cannot read the kept cell ({error}); restore the file, or delete it to run the cell again"
        ) from None


def _holds(path: Path, cell: Cell) -> bool:
    """Whether the file is whole and of this very cell; its arrays, which take long to pack, are of its result."""
    if not path.is_file():
        return False
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.testzip() is None and all(
                archive.read(name) == (cell.folder / name).read_bytes() for name in (*PLAIN, LAST)
            )
    except DAMAGED:
        return False


def _arrays(archive: zipfile.ZipFile) -> list[str]:
    return [name for name in archive.namelist() if name.endswith(".npy")]


def _add(archive: zipfile.ZipFile, name: str, content: bytes) -> None:
    archive.writestr(zipfile.ZipInfo(name, DATE), content, zipfile.ZIP_LZMA)
