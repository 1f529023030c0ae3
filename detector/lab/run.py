"""Runs a study's cells, several at a time; a cell that fails is named with its reason and does not stop the rest."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Literal

from detector.errors import UserError
from detector.files import write_whole
from detector.lab.grid import Cell, settings_text
from detector.lab.study import StudyConfig
from detector.train.signals import StopRequest

State = Literal["finished", "diverged", "failed", "started", "open"]
TAIL = 200  # lines of a cell's output that are kept in memory, in case the disk takes no log


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
        UserError: what is there belongs to another configuration, so it must not be counted.
    """
    _check_same(cell, task)
    if cell.result.is_file():
        return Standing(cell, "finished", result=json.loads(cell.result.read_text(encoding="utf-8")))
    if cell.failure.is_file():
        failure = json.loads(cell.failure.read_text(encoding="utf-8"))
        return Standing(cell, "diverged" if failure["kind"] == "diverged" else "failed", failure["reason"])
    return Standing(cell, "started" if cell.run.is_dir() else "open")


def task_of(study: StudyConfig) -> dict[str, Any]:
    """What is asked of each cell beyond its configuration."""
    return {"split": study.split, "checkpoint": study.checkpoint}


def _check_same(cell: Cell, task: dict[str, Any]) -> None:
    known = cell.folder / "identity.json"
    if not known.is_file():
        return
    before = json.loads(known.read_text(encoding="utf-8"))
    now = json.loads(json.dumps({**cell.identity(), **{f"study.{k}": v for k, v in task.items()}}))
    chosen = cell.chosen()  # a setting that is newer than the cell, left as it comes, changes nothing
    keys = [k for k in [*now, *before] if k in before or k in chosen]
    key = next((k for k in keys if now.get(k) != before.get(k)), None)
    if key is not None:
        raise UserError(
            f"{cell.folder}: was run with another configuration: {key} was {before.get(key)!r} and is now"
            f" {now.get(key)!r}; change it back, choose another folder with --out DIR, or delete this one"
        )


@dataclass
class Runner:
    """Keeps `jobs` cells going until all are done or a signal asks to stop; then the cells save and end."""

    study: StudyConfig
    jobs: int
    say: Callable[[str], None]
    gpus: int = 0
    _stop: StopRequest = field(default_factory=StopRequest)

    def __call__(self, cells: list[Cell], retry: bool = False) -> str | None:
        """Runs what is not finished; `retry`: also what has diverged.  Returns the signal that stopped it, or None."""
        task = task_of(self.study)
        states = [standing(cell, task) for cell in cells]
        done = sum(s.state == "finished" for s in states)
        waiting = deque(s for s in states if s.state != "finished" and (retry or s.state != "diverged"))
        for one in states:
            if one.state == "diverged" and not retry:
                self.say(f"{one.cell.name}: diverged before, left alone (--retry runs it again): {one.reason}")
        self.say(f"{len(cells)} cells: {done} finished, {len(waiting)} to run, {self.jobs} at a time")
        running: dict[int, _Process] = {}
        with self._stop as stop:
            while waiting or running:
                if stop.name is not None:
                    waiting.clear()
                    for process in running.values():
                        process.ask_to_stop()
                for slot in range(self.jobs):
                    if slot not in running and waiting:
                        running[slot] = self._start(waiting.popleft(), task, slot)
                for slot, process in list(running.items()):
                    if process.poll():
                        del running[slot]
                        done += process.report(self.say, stopped=stop.name is not None)
                        self.say(f"{done} of {len(cells)} cells finished")
                time.sleep(0.1)
        return self._stop.name

    def _start(self, one: Standing, task: dict[str, Any], slot: int) -> _Process:
        cell = one.cell
        environment = {**os.environ, "OMP_NUM_THREADS": str(self.study.threads)}
        if self.gpus:
            environment["CUDA_VISIBLE_DEVICES"] = str(slot % self.gpus)
        self.say(f"{cell.name}: {'going on' if cell.run.is_dir() else 'started'}")
        return _Process(cell, task, environment)


class _Process:
    """A cell's process, whose output is kept in `log.txt` as far as the disk takes it."""

    def __init__(self, cell: Cell, task: dict[str, Any], environment: dict[str, str]) -> None:
        self.cell, self._since, self._asked = cell, time.time(), False
        self._tail: deque[str] = deque(maxlen=TAIL)
        self._process: subprocess.Popen[str] | None = None
        try:
            cell.failure.unlink(missing_ok=True)
            identity = {**cell.identity(), **{f"study.{k}": v for k, v in task.items()}}
            write_whole(cell.folder / "identity.json", json.dumps(identity, indent=1).encode())
            write_whole(cell.folder / "task.json", json.dumps(task).encode())
            write_whole(cell.settings, settings_text(cell).encode())
            # In a session of its own: an interruption from the keyboard reaches the study alone, which passes it on.
            self._process = subprocess.Popen(
                [sys.executable, "-m", "detector.lab.cell", str(cell.folder)],
                env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
            )  # fmt: skip
            self._reader = threading.Thread(target=self._read, daemon=True)
            self._reader.start()
        except OSError as error:
            self._tail.append(f"error: {cell.folder}: cannot write the cell's folder ({error.strerror or error})")
        except UserError as error:
            self._tail.append(f"error: {error}")

    def poll(self) -> bool:
        """Whether it has ended."""
        return self._process is None or self._process.poll() is not None

    def ask_to_stop(self) -> None:
        if not self._asked and self._process is not None:
            self._asked = True
            self._process.send_signal(signal.SIGTERM)

    def report(self, say: Callable[[str], None], stopped: bool) -> bool:
        """Says how the process ended, and notes a failure; whether the cell is finished."""
        if self._process is not None:
            self._reader.join()
            if self._process.returncode == 0 and self.cell.result.is_file():
                say(f"{self.cell.name}: finished in {time.time() - self._since:.0f} s, {self._tail[-1]}")
                return True
        if stopped:
            say(f"{self.cell.name}: stopped; the next call goes on with it")
            return False
        reason = self._reason()
        say(f"{self.cell.name}: failed: {reason} (see {self.cell.folder / 'log.txt'})")
        if not self.cell.failure.exists():
            with suppress(UserError):  # a full disk; it has been said
                write_whole(self.cell.failure, json.dumps({"kind": "failed", "reason": reason}).encode())
        return False

    def _reason(self) -> str:
        errors = [line for line in self._tail if line.startswith("error: ")]
        if errors:
            return errors[-1].removeprefix("error: ")
        code = None if self._process is None else self._process.returncode
        if code is not None and code < 0:
            name = signal.Signals(-code).name
            return f"ended by {name}" + (", perhaps for lack of memory" if name == "SIGKILL" else "")
        return next((line for line in reversed(self._tail) if line.strip()), f"exit code {code}")

    def _read(self) -> None:
        assert self._process is not None
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._tail.append(line.rstrip("\n"))
            with suppress(OSError), (self.cell.folder / "log.txt").open("a", encoding="utf-8") as log:
                log.write(line)
