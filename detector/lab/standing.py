"""How far a cell is, from what is on the disk; and whether what is there is of this very configuration."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from detector.errors import DataError, UserError
from detector.lab.grid import Cell
from detector.lab.study import StudyConfig

State = Literal["finished", "diverged", "failed", "started", "open"]
# What tables and report take from `result.json` without asking.
NEEDED = ("numbers", "per_class", "seconds_per_step", "memory_mb", "assignment", "flips", "step")


@dataclass(frozen=True)
class Standing:
    """How far a cell is."""

    cell: Cell
    state: State
    reason: str = ""  # why it failed
    result: dict[str, Any] | None = None


def standing(cell: Cell, task: dict[str, Any]) -> Standing:
    """What is on the disk about a cell.

    Raises:
        UserError: what is there belongs to another configuration or is damaged, so it must not be counted.
    """
    known = cell.folder / "identity.json"
    if known.is_file():
        before = read_json(known, "which configuration the cell was run with", f"delete {cell.folder} to run it again")
        check_same(cell, task, before, f"{cell.folder}", "choose another folder with --out DIR, or delete this one")
    if cell.result.is_file():
        mend = "delete this file: the next call works it out again"
        result = read_json(cell.result, "the cell's result", mend)
        gone = [key for key in NEEDED if key not in result]
        if gone:
            raise DataError(f"{cell.result}: the cell's result has no {', '.join(gone)}; {mend}")
        return Standing(cell, "finished", result=result)
    if cell.failure.is_file():
        try:
            failure = read_json(cell.failure, "why the cell failed", "")
            return Standing(cell, "diverged" if failure["kind"] == "diverged" else "failed", str(failure["reason"]))
        except (DataError, KeyError):  # only a note; the cell is run again in any case
            return Standing(cell, "failed", f"{cell.failure}: cannot be read; the cell's log.txt may say why it failed")
    return Standing(cell, "started" if cell.run.is_dir() else "open")


def task_of(study: StudyConfig) -> dict[str, Any]:
    """What is asked of each cell beyond its configuration."""
    return {"split": study.split, "checkpoint": study.checkpoint}


def identity_of(cell: Cell, task: dict[str, Any]) -> dict[str, Any]:
    """What is remembered of a cell to know it again."""
    return {**cell.identity(), **{f"study.{k}": v for k, v in task.items()}}


def check_same(cell: Cell, task: dict[str, Any], before: dict[str, Any], where: str, mend: str) -> None:
    """Whether `before`, an earlier `identity_of`, is the cell's.

    Raises:
        UserError: it is not; names `where` it was found, the first key that differs, and how to `mend` it.
    """
    now = json.loads(json.dumps(identity_of(cell, task)))
    chosen = cell.chosen()  # a setting that is newer than the cell, left as it comes, changes nothing
    keys = [k for k in [*now, *before] if k in before or k in chosen]
    key = next((k for k in keys if now.get(k) != before.get(k)), None)
    if key is not None:
        raise UserError(
            f"{where}: was run with another configuration: {key} was {before.get(key)!r} and is now"
            f" {now.get(key)!r}; change it back, {mend}"
        )


def read_json(path: Path, what: str, mend: str) -> dict[str, Any]:
    """
    Raises:
        DataError: there is no such file, or it holds something else than keys and values.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot read {what} ({error}); {mend}") from None
    if not isinstance(found, dict):
        raise DataError(f"{path}: cannot read {what} (expected keys and values, found {type(found).__name__}); {mend}")
    return found
