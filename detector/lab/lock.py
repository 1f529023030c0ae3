"""One process at a time on a study's folder."""

from __future__ import annotations

import fcntl
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from detector.errors import UserError


class Busy(UserError):
    """Another process works on the study."""


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Holds the folder's lock, which ends with the process however that ends.

    Raises:
        Busy: another process holds it; says which.
        UserError: the folder cannot be written.
    """
    path = folder / "lock"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = path.open("a+b", buffering=0)
    except OSError as error:
        raise UserError(f"{path}: cannot write the study's folder ({error.strerror or error})") from None
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            file.seek(0)
            holder = file.read().decode(errors="replace").strip() or "another process"
            raise Busy(
                f"{folder}: {holder} is working on this study; wait for it, look at what is finished with"
                " --report-only, or choose another folder with --out DIR"
            ) from None
        with suppress(OSError):  # a full disk: the lock holds, if without a name
            file.truncate(0)
            file.write(f"process {os.getpid()} on {socket.gethostname()}".encode())
        yield
        with suppress(OSError):
            file.truncate(0)
