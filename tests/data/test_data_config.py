"""The data section: what is missing is named, and what to set."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from pydantic import TypeAdapter, ValidationError

from detector.data.config import CocoFiles, Data, ShapesData, SplitFiles
from detector.data.resize import Letterbox
from detector.data.shapes import ShapeSet, ensure
from detector.errors import DataError

read = TypeAdapter(Data).validate_python


def coco(root: Path, **other: Any) -> CocoFiles:
    def split(name: str) -> SplitFiles:
        return SplitFiles(annotations=Path(name, "annotations.json"), images=Path(name, "images"))

    return CocoFiles(root=root, train=split("train"), val=split("val"), **other)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    ensure(tmp_path / "train", ShapeSet("plain", 3, (48, 64)))
    ensure(tmp_path / "val", ShapeSet("plain", 2, (48, 64), part=1))
    return tmp_path


def test_shapes_are_made_on_first_use(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    config = read({"type": "shapes", "suite": "tiny", "size": [48, 64], "train": 3, "val": 2, "test": 1})
    assert isinstance(config, ShapesData)
    assert not list(tmp_path.iterdir()), "reading a configuration writes nothing"
    train = config.open("train")
    assert len(train) == 3
    assert [len(config.open(s, train.index.classes)) for s in ("val", "test")] == [2, 1]
    assert [p.name for p in (tmp_path / "data" / "shapes-tiny-48x64").iterdir()] != []
    assert train[0].image.tobytes() != config.open("val")[0].image.tobytes()


def test_files_are_found_under_the_root(root: Path) -> None:
    config = coco(root)
    train = config.open("train")
    assert len(train) == 3
    assert len(config.open("val", train.index.classes)) == 2
    relative = read(config.model_dump(mode="json"))
    assert relative == config


def test_what_is_missing_is_named_with_its_key(root: Path) -> None:
    config = coco(root)
    with pytest.raises(DataError, match=r"data\.test is not set: give data\.test\.annotations"):
        config.open("test")
    (root / "val" / "annotations.json").rename(root / "val" / "other.json")
    with pytest.raises(DataError, match=r"data\.val\.annotations: .*annotations\.json: no such file; set data\.root"):
        config.open("val")
    with pytest.raises(DataError, match=r"data\.train\.annotations: .*elsewhere"):
        coco(root / "elsewhere").open("train")
    (root / "train" / "images").rename(root / "train" / "pictures")
    with pytest.raises(DataError, match=r"data\.train\.images: .*images: no such folder"):
        config.open("train")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.append({"id": 99, "name": "whale"}), r"4 classes, expected 3: class 'whale' is unexpected"),
        (lambda c: c[0].update(name="disc"), r"class 'disc' is unexpected and class 'circle' is missing"),
        (lambda c: c[0].update(id=9), r"in another order"),
    ],
)
def test_splits_must_have_equal_classes(root: Path, change: Any, message: str) -> None:
    path = root / "val" / "annotations.json"
    document = json.loads(path.read_text())
    document["annotations"] = []
    change(document["categories"])
    path.write_text(json.dumps(document))
    config = coco(root)
    classes = config.open("train").index.classes
    with pytest.raises(DataError, match=rf"val.annotations\.json: .*{message}"):
        config.open("val", classes)
    assert len(config.open("val")) == 2


def test_settings_are_checked() -> None:
    config = read({"type": "shapes", "resize": {"type": "letterbox", "size": [320, 320]}})
    assert config.resize == Letterbox(size=(320, 320))
    assert config.workers == 2
    for wrong in (
        {"type": "shapes", "suite": "plane"},
        {"type": "shapes", "size": [8, 8]},
        {"type": "shapes", "train": 0},
        {"type": "coco"},
        {"type": "coco", "train": {"annotations": "a.json"}, "val": {"annotations": "a", "images": "b"}},
        {"type": "shapes", "workers": -1},
    ):
        with pytest.raises(ValidationError):
            read(wrong)
