"""Files that appear whole or not at all."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from detector.errors import UserError


def write_whole(path: Path, content: bytes) -> None:
    """Replaces `path` in one step; folders above it are made.

    Raises:
        UserError: the file cannot be written; an old one is as it was.
    """
    part = path.with_name(f"{path.name}.{os.getpid()}.part")  # two processes may write the same file
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part.write_bytes(content)
        os.replace(part, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            part.unlink()
        raise UserError(f"{path}: cannot write the file ({error.strerror or error})") from None
