"""A run's folder: its files, and the care that none of them is lost by accident."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from detector.errors import CheckpointError, UserError


@dataclass(frozen=True)
class RunFiles:
    """The files of the run in `folder`."""

    folder: Path

    @property
    def best(self) -> Path:
        return self.folder / "best.pt"

    @property
    def last(self) -> Path:
        return self.folder / "last.pt"

    @property
    def config(self) -> Path:
        return self.folder / "config.yaml"

    @property
    def metrics(self) -> Path:
        return self.folder / "metrics.jsonl"

    @property
    def pictures(self) -> Path:
        return self.folder / "pictures"

    @property
    def curves(self) -> Path:
        return self.folder / "tensorboard"

    @property
    def assignments(self) -> Path:
        return self.folder / "assignments"

    def check_free(self) -> None:
        """Raises `UserError` where a run is already."""
        present = self._present()
        if present:
            raise UserError(
                f"{self.folder}: holds a run already ({present[0].name}): continue it with --resume {self.folder},"
                " replace it with --overwrite, or choose another folder with run.dir=DIR"
            )

    def start(self, config: str) -> None:
        """Makes the folder for a new run, deletes the files of one that was there, writes the configuration.

        Raises:
            UserError: the folder cannot be written.
        """
        try:
            for path in self._present():
                shutil.rmtree(path) if path.is_dir() else path.unlink()
            self.folder.mkdir(parents=True, exist_ok=True)
            _write(self.config, config)
        except OSError as error:
            raise UserError(f"{self.folder}: cannot write the run's folder ({error.strerror or error})") from None

    def _present(self) -> list[Path]:
        own = [self.best, self.last, self.metrics, self.config, self.pictures, self.curves, self.assignments]
        return [path for path in own if path.exists()]

    def check_resumable(self) -> None:
        """Raises `CheckpointError` where there is no run to go on with."""
        if not self.folder.is_dir():
            raise CheckpointError(f"{self.folder}: no such run folder; start a run without --resume")
        if not (self.last.exists() or self.config.exists()):
            raise CheckpointError(
                f"{self.folder}: holds no run (neither last.pt nor config.yaml); start one without --resume"
            )

    def rows(self) -> list[dict[str, Any]]:
        """The lines of the metrics; one that was cut short is left out."""
        return [row for _, row in self._lines()]

    def _lines(self) -> Iterator[tuple[str, dict[str, Any]]]:
        if not self.metrics.is_file():
            return
        for line in self.metrics.read_text(encoding="utf-8").splitlines():
            try:
                row = json.loads(line)
            except json.JSONDecodeError:
                continue
            yield line, row

    def truncate_metrics(self, step: int) -> None:
        """Drops the lines of steps after `step`, which will be done again, and a line that was cut short.

        Raises:
            UserError: the file cannot be written.
        """
        if not self.metrics.exists():
            return
        kept = [line + "\n" for line, row in self._lines() if row["step"] <= step]
        try:
            _write(self.metrics, "".join(kept))
        except OSError as error:
            raise UserError(f"{self.metrics}: cannot write the metrics ({error.strerror or error})") from None


def _write(path: Path, text: str) -> None:
    part = path.with_name(path.name + ".part")
    part.write_text(text, encoding="utf-8")
    os.replace(part, path)
