"""Runs a study's cells, several at a time; a cell that fails is named with its reason and does not stop the rest."""

from __future__ import annotations

import json
import os
import time
from collections import Counter, deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Protocol

from detector.errors import UserError
from detector.files import write_whole
from detector.lab.grid import Cell, settings_text
from detector.lab.process import CellProcess, Ended
from detector.lab.standing import identity_of, standing, task_of
from detector.lab.study import StudyConfig
from detector.train.signals import StopRequest

TRIES = 3  # of a cell whose place was lost each time


def prepare(cell: Cell, task: dict[str, Any]) -> None:
    """Writes what the cell's process reads, and what tells later calls which configuration this is.

    Raises:
        UserError: the folder cannot be written.
    """
    try:
        cell.failure.unlink(missing_ok=True)
    except OSError as error:
        raise UserError(f"{cell.folder}: cannot write the cell's folder ({error.strerror or error})") from None
    write_whole(cell.folder / "identity.json", json.dumps(identity_of(cell, task), indent=1).encode())
    write_whole(cell.folder / "task.json", json.dumps(task).encode())
    write_whole(cell.settings, settings_text(cell).encode())


class Work(Protocol):
    """A cell that is worked on somewhere."""

    def done(self) -> bool:
        """Looked at now and then."""

    def ask_to_stop(self) -> None:
        """Save and end; may be asked again."""

    def ended(self) -> Ended | None:
        """How, once it is done; None: the place where it was is gone."""


class Place(Protocol):
    """Where cells can be worked on."""

    def room(self) -> int:
        """So many at a time, as things are now."""

    def start(self, cell: Cell, slot: int) -> Work:
        """`slot`: the lowest number that no running cell has.  Raises `UserError` where it cannot."""


@dataclass(frozen=True)
class ThisMachine:
    """So many processes at a time, each with its share of the GPUs."""

    study: StudyConfig
    jobs: int
    gpus: tuple[str, ...] = ()  # as `CUDA_VISIBLE_DEVICES` calls them

    def room(self) -> int:
        return self.jobs

    def start(self, cell: Cell, slot: int) -> Work:
        environment = {**os.environ, "OMP_NUM_THREADS": str(self.study.threads)}
        if self.gpus:
            environment["CUDA_VISIBLE_DEVICES"] = self.gpus[slot % len(self.gpus)]
        prepare(cell, task_of(self.study))
        try:
            return CellProcess(cell.folder, environment)
        except OSError as error:
            raise UserError(f"{cell.folder}: cannot start a process ({error.strerror or error})") from None


@dataclass
class Runner:
    """Keeps cells going until all are done or a signal asks to stop; then the cells save and end."""

    study: StudyConfig
    place: Place
    say: Callable[[str], None]
    _stop: StopRequest = field(default_factory=StopRequest)
    _lost: Counter[str] = field(default_factory=Counter)  # how often, by the cell's name

    def __call__(self, cells: list[Cell], retry: bool = False) -> str | None:
        """Runs what is not finished; `retry`: also what has diverged.  Returns the signal that stopped it, or None."""
        states = [standing(cell, task_of(self.study)) for cell in cells]
        done = sum(s.state == "finished" for s in states)
        waiting = deque(s.cell for s in states if s.state != "finished" and (retry or s.state != "diverged"))
        for one in states:
            if one.state == "diverged" and not retry:
                self.say(f"{one.cell.name}: diverged before, left alone (--retry runs it again): {one.reason}")
        self.say(
            f"{len(cells)} cells: {done} finished, {len(waiting)} to run"
            + (f", {self.place.room()} at a time" if waiting else "")
        )
        running: dict[int, tuple[Cell, float, Work]] = {}
        with self._stop as stop:
            while waiting or running:
                if stop.name is not None:
                    waiting.clear()
                    for _, _, work in running.values():
                        work.ask_to_stop()
                for slot in range(self.place.room() if waiting else 0):
                    if slot not in running and waiting:
                        cell = waiting.popleft()
                        self.say(f"{cell.name}: {'going on' if cell.run.is_dir() else 'started'}")
                        try:
                            running[slot] = cell, time.time(), self.place.start(cell, slot)
                        except UserError as error:
                            self._failed(cell, Ended(None, (f"error: {error}",)))
                for slot, (cell, since, work) in list(running.items()):
                    if not work.done():
                        continue
                    del running[slot]
                    ended = work.ended()
                    if ended is not None and ended.code == 0 and cell.result.is_file():
                        self.say(f"{cell.name}: finished in {time.time() - since:.0f} s, {ended.last_line}")
                        done += 1
                    elif stop.name is not None:
                        self.say(f"{cell.name}: stopped; the next call goes on with it")
                    elif ended is not None:
                        self._failed(cell, ended)
                    elif self._again(cell):
                        waiting.append(cell)
                    self.say(f"{done} of {len(cells)} cells finished")
                time.sleep(0.1)
        return self._stop.name

    def _again(self, cell: Cell) -> bool:
        """Whether a cell is tried again whose place was lost."""
        self._lost[cell.name] += 1
        if self._lost[cell.name] < TRIES:
            self.say(f"{cell.name}: the machine that worked on it was lost; it is tried again")
            return True
        self._failed(cell, Ended(None, (f"error: the machines that worked on it were lost, {TRIES} times",)))
        return False

    def _failed(self, cell: Cell, ended: Ended) -> None:
        """Says it, and notes it for the report."""
        self.say(f"{cell.name}: failed: {ended.reason} (see {cell.folder / 'log.txt'})")
        if not cell.failure.exists():
            with suppress(UserError):  # a full disk; it has been said
                write_whole(cell.failure, json.dumps({"kind": "failed", "reason": ended.reason}).encode())
