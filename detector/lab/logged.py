"""What a run has logged, as curves, and how its probe's notes changed."""

from __future__ import annotations

import numpy as np

from detector.evaluate.treatment import flip_rate, read_note
from detector.train.folder import RunFiles


def flips(files: RunFiles) -> list[tuple[int, float]]:
    """(step, share of pairs that changed since the note before), from what the run's probe has noted.

    Raises:
        DataError: a note is damaged.
    """
    found: list[tuple[int, float]] = []
    before: dict[str, np.ndarray] | None = None
    for path in sorted(files.assignments.glob("step-*.npz")):
        note = read_note(path)
        name = next(iter(note)).split("/")[0]
        if before is not None and f"{name}/prior" in before:
            found.append((int(path.stem.removeprefix("step-")), flip_rate(before, note, name)))
        before = note
    return found


def curve(files: RunFiles, key: str, kind: str) -> list[tuple[float, float]]:
    """(epoch, value) of every line of a run's metrics that has `key`; kind: train or val."""
    rows: list[tuple[float, float]] = []
    for row in files.rows():
        if row.get("kind") == kind and key in row:
            rows.append((row["epoch"], row[key]))
    return rows
