"""What of a study over several machines runs on each of them: a look at the machine, and one cell at a time.

    python -m detector.lab.node PARENT KEEP CELL_FOLDER

is the cell's process there.  It saves and ends when its parent does, so that no cell is worked on twice.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import signal
import socket
import sys
import tempfile
import threading
import time
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import detector
from detector.errors import UserError
from detector.files import write_whole
from detector.lab import cell
from detector.lab.lock import locked
from detector.lab.process import CellProcess, Ended

# Those that decide what comes out.
PACKAGES = ("torch", "torchvision", "timm", "numpy", "scipy", "opencv-python-headless", "albumentations", "simplejpeg",
            "pillow", "pycocotools", "hotcoco", "pydantic", "safetensors")  # fmt: skip
CODE = Path(detector.__file__).parent
PATIENCE = 60.0  # seconds for which a cell that was here before may still be saving
RESULT = "result.json"


@dataclass(frozen=True)
class Machine:
    """What is to be known of a machine before it is given a cell."""

    name: str
    versions: dict[str, str]
    shares: bool  # the study's folder is this machine's, too
    missing: tuple[tuple[str, str], ...]  # (key, path) of the configuration that are not there


def versions() -> dict[str, str]:
    """Python's, the packages', and a hash of our own code."""
    found = {"Python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    code = hashlib.sha256()
    for path in sorted(CODE.rglob("*.py")):
        code.update(str(path.relative_to(CODE)).encode() + b"\0" + path.read_bytes() + b"\0")
    return {**found, "detector's code": code.hexdigest()[:12]}


def look(token: str, paths: tuple[tuple[str, str], ...]) -> Machine:
    """`token`: a file in the study's folder, whose name nobody else has.  `paths`: (key, path) that must be there."""
    missing = tuple((key, path) for key, path in paths if not Path(path).exists())
    return Machine(socket.gethostname(), versions(), Path(token).is_file(), missing)


class CellOnNode:
    """A Ray actor: the methods but `run` answer while that one runs."""

    def __init__(self) -> None:
        self._process: CellProcess | None = None
        self._stopped = False
        self._folder: Path | None = None
        self._known: dict[str, tuple[int, int]] = {}  # of each file that the study has: when written, how long
        self._lock = threading.Lock()

    def look(self, token: str, paths: tuple[tuple[str, str], ...]) -> Machine:
        return look(token, paths)

    def run(
        self, folder: str, current: str, threads: int, files: dict[str, bytes] | None
    ) -> tuple[Ended, dict[str, bytes]]:
        """Works on a cell until it ends.

        `current`: the study's current folder, from which relative paths are taken where there is such a folder here;
        elsewhere there are none but of generated data.  `files`: of the cell's folder, where that is not this machine's
        too; those that changed come back.
        """
        scratch = None if files is None else tempfile.mkdtemp(prefix="detector-cell-")
        try:
            here = Path(folder) if scratch is None else Path(scratch)
            if files is not None:
                put(here, files)
                self._folder, self._known = here, stamps(here)
            else:
                wait_until_free(here)
            own = [str(CODE.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
            environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "PYTHONPATH": os.pathsep.join(own)}
            keep = "keep" if scratch is None else "delete"
            command = ("-m", __name__, str(os.getpid()), keep)
            relative_to = Path(current) if Path(current).is_dir() else Path(tempfile.gettempdir())
            self._process = CellProcess(here, environment, command, relative_to)
            if self._stopped:
                self._process.ask_to_stop()
            ended = self._process.ended()
            return ended, self.changed()
        except (OSError, UserError) as error:
            return Ended(None, (f"error: {socket.gethostname()}: {error}",)), self.changed()
        finally:
            self._folder = None
            if scratch is not None:
                shutil.rmtree(scratch, ignore_errors=True)

    def stop(self) -> None:
        self._stopped = True
        if self._process is not None:
            self._process.ask_to_stop()

    def changed(self) -> dict[str, bytes]:
        """Files that the study does not have as they are now; nothing where it shares the folder."""
        with self._lock:
            if self._folder is None:
                return {}
            now = stamps(self._folder)
            files = content(self._folder, [name for name in now if self._known.get(name) != now[name]])
            self._known |= {name: now[name] for name in files}
            return files


def stamps(folder: Path) -> dict[str, tuple[int, int]]:
    """When each file of a cell was written and how long it is.

    Checkpoints come first: what is read after them is at least as new, and what is newer is cut when a run goes on.
    """
    found = {}
    for path in sorted(folder.rglob("*"), key=lambda p: (p.suffix != ".pt", p)):
        if path.name == "lock" or path.suffix in (".part", ".tmp"):
            continue
        with suppress(FileNotFoundError):
            if path.is_file():
                known = path.stat()
                found[str(path.relative_to(folder))] = (known.st_mtime_ns, known.st_size)
    return found


def content(folder: Path, names: list[str]) -> dict[str, bytes]:
    """Of those files that are still there, in the order of `names`."""
    found = {}
    for name in names:
        with suppress(FileNotFoundError):
            found[name] = (folder / name).read_bytes()
    return found


def put(folder: Path, files: dict[str, bytes]) -> None:
    """Writes files that came from elsewhere; the result, which says that a cell is finished, last.

    Raises:
        UserError: one cannot be written.
    """
    for name in sorted(files, key=lambda name: name == RESULT):
        write_whole(folder / name, files[name])


def wait_until_free(folder: Path) -> None:
    """A process whose parent was lost may still be saving.

    Raises:
        UserError: it does not come to an end.
    """
    until = time.monotonic() + PATIENCE
    while True:
        try:
            with locked(folder):
                return
        except UserError:
            if time.monotonic() > until:
                raise
        time.sleep(0.5)


def main(parent: int, keep: bool, folder: Path) -> int:
    """The cell's process; without `keep` it deletes the folder if nobody is left to fetch what is in it."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os.kill(os.getpid(), signal.SIGTERM)

    # Before training begins and while its result is recorded, the signal ends the process here, not in the system.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    threading.Thread(target=watch, daemon=True).start()
    try:
        return cell.main(folder)
    finally:
        if not keep and os.getppid() != parent:
            shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), sys.argv[2] == "keep", Path(sys.argv[3])))
