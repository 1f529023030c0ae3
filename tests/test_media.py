"""Which files are read, where pictures go, and what happens to what cannot be read."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest

import detector
from detector.errors import DataError, UserError
from detector.media import Painter, find_sources
from detector.predict import Detector
from tests.trained import checkpoint


@pytest.fixture(scope="module")
def find(tmp_path_factory: pytest.TempPathFactory) -> Detector:
    return detector.load(
        checkpoint(tmp_path_factory.mktemp("run"), averaged=False, classes=("a", "b")), device="cpu", threshold=0.35
    )


def picture(path: Path, size: tuple[int, int] = (48, 64)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    cv2.imwrite(str(path), np.random.default_rng(0).integers(0, 255, (*size, 3), dtype=np.uint8))
    return path


def video(path: Path, frames: int = 5) -> Path:
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*"mp4v"), 10.0, (64, 48))
    for i in range(frames):
        writer.write(np.full((48, 64, 3), 40 * i, np.uint8))
    writer.release()
    return path


def test_folders_keep_their_shape(tmp_path: Path) -> None:
    for name in ("x.jpg", "deep/er/x.jpg", "y.TIF", "notes.txt"):
        picture(tmp_path / "in" / name) if not name.endswith("txt") else (tmp_path / "in" / name).write_text("")
    sources = find_sources([tmp_path / "in"], tmp_path / "out")
    assert [s.target.relative_to(tmp_path).as_posix() for s in sources] == [
        "out/deep/er/x.jpg",
        "out/x.jpg",
        "out/y.png",
    ]


def test_names_that_clash_are_numbered(tmp_path: Path) -> None:
    for name in ("a/x.jpg", "b/x.jpg", "c/x.jpg", "c/x-2.jpg"):
        picture(tmp_path / name)
    inputs = [tmp_path / name for name in ("a/x.jpg", "b/x.jpg", "c")]
    sources = find_sources(inputs, tmp_path / "out")
    assert len({s.target for s in sources}) == 4
    assert [s.target.name for s in sources] == ["x.jpg", "x-2.jpg", "x-2-2.jpg", "x-3.jpg"]


def test_inputs_are_never_overwritten(tmp_path: Path) -> None:
    path = picture(tmp_path / "x.jpg")
    assert find_sources([path], tmp_path)[0].target == tmp_path / "x-2.jpg"


def test_earlier_pictures_are_no_sources(tmp_path: Path) -> None:
    picture(tmp_path / "x.jpg")
    picture(tmp_path / "pictures" / "x.jpg")
    assert [s.path.name for s in find_sources([tmp_path], tmp_path / "pictures")] == ["x.jpg"]
    assert len(find_sources([tmp_path / "pictures" / "x.jpg"], tmp_path / "pictures")) == 1


def test_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such file or folder"):
        find_sources([tmp_path / "none.jpg"], tmp_path)
    with pytest.raises(DataError, match="holds no image or video"):
        find_sources([tmp_path], tmp_path / "out")


def test_images_and_videos(find: Detector, tmp_path: Path) -> None:
    picture(tmp_path / "in" / "a.png")
    picture(tmp_path / "in" / "b.png", (80, 40))
    video(tmp_path / "in" / "c.mp4")
    (tmp_path / "in" / "broken.jpg").write_bytes(b"no image")
    (tmp_path / "in" / "broken.mp4").write_bytes(b"no video")
    painter = Painter(find, batch_size=2)
    sources = find_sources([tmp_path / "in"], tmp_path / "out")
    assert sum(painter.paint(sources)) == 5
    assert (painter.images, painter.videos, painter.frames) == (2, 1, 5)
    assert len(painter.failures) == 2
    assert all("broken" in line for line in painter.failures)
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["a.png", "b.png", "c.mp4"]
    assert cv2.imread(str(tmp_path / "out" / "b.png")).shape == (80, 40, 3)
    capture = cv2.VideoCapture(str(tmp_path / "out" / "c.mp4"))
    assert capture.get(cv2.CAP_PROP_FRAME_COUNT) == 5
    assert capture.get(cv2.CAP_PROP_FPS) == 10
    records = painter.records
    assert [r.get("frame") for r in records if r["file"].endswith("c.mp4")] == [0, 1, 2, 3, 4]
    assert painter.found == sum(len(r["detections"]) for r in records) > 0
    assert {(r["height"], r["width"]) for r in records} == {(48, 64), (80, 40)}


def test_video_that_cannot_be_written(find: Detector, tmp_path: Path) -> None:
    path = video(tmp_path / "c.mp4")
    (tmp_path / "out").write_text("a file, not a folder")
    with pytest.raises(UserError, match="cannot write the video"):
        list(Painter(find, 2).paint(find_sources([path], tmp_path / "out")))
