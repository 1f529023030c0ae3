"""Finished cells in a folder that is small enough for a repository, so that a study goes on on another machine.

Of a cell all that tables and report count from, in one file; not its weights, without which the report has no pictures
of assignments for it.
"""

from __future__ import annotations

import io
import lzma
import zipfile
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from detector.errors import DataError
from detector.files import write_whole
from detector.lab.cell import ANNOTATIONS, MATCHES, TREATMENT
from detector.lab.grid import Cell

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


def take(cells: Iterable[Cell], folder: Path) -> int:
    """Puts kept cells where the study looks for them; how many.  What has begun there is left alone.

    Raises:
        DataError: a kept file is damaged: names it.
    """
    taken = 0
    for cell in cells:
        path = file_of(folder, cell)
        if not path.is_file() or cell.result.is_file() or cell.run.is_dir():
            continue
        try:
            with zipfile.ZipFile(path) as archive:
                files = {name: archive.read(name) for name in (*PLAIN, *_arrays(archive), LAST)}
        except DAMAGED as error:
            raise DataError(
                f"{path}: cannot read the kept cell ({error}); restore the file, or delete it to run the cell again"
            ) from None
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
        taken += 1
    return taken


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
