"""What a run has logged: its metrics line by line, and how its probe's notes changed."""

from __future__ import annotations

import json
from typing import Any

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
    for row in metrics(files):
        if row.get("kind") == kind and key in row:
            rows.append((row["epoch"], row[key]))
    return rows


def metrics(files: RunFiles) -> list[dict[str, Any]]:
    """The lines of a run's metrics; one that was cut short is left out."""
    rows = []
    if files.metrics.is_file():
        for line in files.metrics.read_text(encoding="utf-8").splitlines():
            try:
                rows.append(json.loads(line))
            except ValueError:
                continue
    return rows
