"""Files that appear whole or not at all, also where two processes write the same one."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from detector.errors import UserError
from detector.files import write_whole


def test_two_processes_write_the_same_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second one begins and ends after the first one has written and before it puts its file in place."""
    path, replace = tmp_path / "a" / "tables.md", os.replace

    def late(source: Path, target: Path) -> None:
        monkeypatch.setattr(os, "replace", replace)
        with monkeypatch.context() as other:
            other.setattr(os, "getpid", lambda: 1)
            write_whole(path, b"the other one's")
        assert path.read_bytes() == b"the other one's"
        replace(source, target)

    monkeypatch.setattr(os, "replace", late)
    write_whole(path, b"mine")
    assert path.read_bytes() == b"mine"
    assert [p.name for p in path.parent.iterdir()] == ["tables.md"]


def test_what_cannot_be_written_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "tables.md"
    write_whole(path, b"old")

    def full(source: Path, target: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(UserError, match=r"tables\.md: cannot write the file \(No space left on device\)"):
        write_whole(path, b"new")
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["tables.md"]
