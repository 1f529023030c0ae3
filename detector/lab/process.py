"""A cell's process, and how it ended."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

TAIL = 200  # lines of a cell's output that are kept in memory, in case the disk takes no log
CELL = ("-m", "detector.lab.cell")


@dataclass(frozen=True)
class Ended:
    """How a cell's process ended, wherever it was."""

    code: int | None  # None: there was no process
    tail: tuple[str, ...]  # of its output; or `error: ...` of our own

    @property
    def last_line(self) -> str:
        return self.tail[-1] if self.tail else ""

    @property
    def reason(self) -> str:
        """Why it failed."""
        errors = [line for line in self.tail if line.startswith("error: ")]
        if errors:
            return errors[-1].removeprefix("error: ")
        if self.code is not None and self.code < 0:
            name = signal.Signals(-self.code).name
            return f"ended by {name}" + (", perhaps for lack of memory" if name == "SIGKILL" else "")
        return next((line for line in reversed(self.tail) if line.strip()), f"exit code {self.code}")


class CellProcess:
    """Works on the cell in `folder`; its output is kept in `log.txt` there as far as the disk takes it.

    Raises OSError where no process can be started.
    """

    def __init__(
        self, folder: Path, environment: Mapping[str, str], command: Sequence[str] = CELL, current: Path | None = None
    ) -> None:
        self._log = folder / "log.txt"
        self._asked = False
        self._tail: deque[str] = deque(maxlen=TAIL)
        # In a session of its own: an interruption from the keyboard reaches the study alone, which passes it on.
        self._process = subprocess.Popen(
            [sys.executable, *command, str(folder)],
            cwd=current, env=environment, start_new_session=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def ask_to_stop(self) -> None:
        """It finishes its step, saves, and ends."""
        if not self._asked:
            self._asked = True
            self._process.send_signal(signal.SIGTERM)

    def done(self) -> bool:
        return self._process.poll() is not None

    def ended(self) -> Ended:
        """Waits until it has."""
        code = self._process.wait()
        self._reader.join()
        return Ended(code, tuple(self._tail))

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._tail.append(line.rstrip("\n"))
            with suppress(OSError), self._log.open("a", encoding="utf-8") as log:
                log.write(line)
