from __future__ import annotations

import os
import pickle
import resource
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from detector.errors import CheckpointError, UserError
from detector.train import checkpoint as module
from detector.train.checkpoint import KEYS, check_classes, load_checkpoint, save_checkpoint


def content(**changes: Any) -> dict[str, Any]:
    values: dict[str, Any] = dict.fromkeys(KEYS)
    values |= {"model": {"w": torch.arange(50_000.0)}, "step": 3, "classes": ["cat", "dog"], "scores": [[1, 0.5]]}
    return values | changes


def test_comes_back_equal(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "a.pt", content())
    found = load_checkpoint(tmp_path / "a.pt")
    assert torch.equal(found["model"]["w"], torch.arange(50_000.0))
    assert found["scores"] == [[1, 0.5]]
    assert [p.name for p in tmp_path.iterdir()] == ["a.pt"]


class Code:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("executed",)


def damaged(tmp_path: Path) -> dict[str, Path]:
    good = tmp_path / "good.pt"
    save_checkpoint(good, content())
    whole = good.read_bytes()
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 1
    files = {
        "half": whole[: len(whole) // 2],
        "nearly": whole[:-100],
        "empty": b"",
        "text": b"hello",
        "flipped": bytes(flipped),
        "pickle": pickle.dumps({"a": Code()}),
    }
    for name, data in files.items():
        (tmp_path / f"{name}.pt").write_bytes(data)
    torch.save({**content(), "extra": Code()}, tmp_path / "code.pt")
    torch.save({"w": torch.zeros(2)}, tmp_path / "weights.pt")
    torch.save([1, 2], tmp_path / "list.pt")
    (tmp_path / "folder.pt").mkdir()
    return {p.stem: p for p in tmp_path.glob("*.pt")}


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("half", "damaged or truncated"),
        ("nearly", "damaged or truncated"),
        ("empty", "damaged or truncated"),
        ("text", "damaged or truncated"),
        ("flipped", "damaged or truncated"),
        ("pickle", "damaged or truncated, or not a checkpoint"),
        ("code", "holds code or objects"),
        ("weights", "not a checkpoint of training: 'model' is missing"),
        ("list", "not a checkpoint of training"),
        ("folder", "cannot read the checkpoint"),
        ("absent", "no such checkpoint"),
    ],
)
def test_what_is_no_checkpoint_is_refused_in_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    damaged(tmp_path)
    with pytest.raises(CheckpointError, match=message) as error:
        load_checkpoint(tmp_path / f"{name}.pt")
    assert "\n" not in str(error.value)
    assert str(tmp_path / f"{name}.pt") in str(error.value)
    assert not (tmp_path / "executed").exists()


@pytest.fixture
def small_files() -> Iterator[None]:
    """No file may grow past 100 kB: the operating system's own refusal, in the middle of writing."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    signal.signal(signal.SIGXFSZ, handler)


def test_a_full_disk_leaves_the_last_good_file(tmp_path: Path, small_files: None) -> None:
    path = tmp_path / "last.pt"
    save_checkpoint(path, content(model={"w": torch.zeros(10)}))
    with pytest.raises(UserError, match=r"last\.pt: cannot save the checkpoint: the disk is full; the one before"):
        save_checkpoint(path, content(step=4))
    assert load_checkpoint(path)["step"] == 3
    assert [p.name for p in tmp_path.iterdir()] == ["last.pt"]


def test_a_disk_that_is_full_only_when_syncing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    save_checkpoint(tmp_path / "last.pt", content())
    monkeypatch.setattr(module.os, "fsync", full)
    with pytest.raises(UserError, match="the disk is full"):
        save_checkpoint(tmp_path / "last.pt", content(step=4))
    monkeypatch.undo()
    assert load_checkpoint(tmp_path / "last.pt")["step"] == 3


def test_a_folder_that_is_gone(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot save the checkpoint: No such file or directory"):
        save_checkpoint(tmp_path / "no" / "last.pt", content())


def test_a_stop_while_writing_leaves_the_last_good_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_checkpoint(tmp_path / "last.pt", content())

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(module.os, "replace", stop)
    with pytest.raises(KeyboardInterrupt):
        save_checkpoint(tmp_path / "last.pt", content(step=4))
    assert load_checkpoint(tmp_path / "last.pt")["step"] == 3


@pytest.mark.parametrize(
    ("classes", "message"),
    [
        (["cat"], "trained for 2 classes, the data have 1"),
        (["cat", "cow"], "label 1 is 'dog' there, 'cow' in the data"),
        (["dog", "cat"], "label 0 is 'cat' there, 'dog' in the data"),
    ],
)
def test_classes_must_be_the_same(classes: list[str], message: str) -> None:
    check_classes(content(), ["cat", "dog"], Path("a.pt"))
    with pytest.raises(CheckpointError, match=f"a.pt: {message}"):
        check_classes(content(), classes, Path("a.pt"))
