"""A checkpoint as a function from images to detections."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from PIL import Image

import detector
from detector.data.batch import collate
from detector.data.coco import CocoData
from detector.data.images import read_image
from detector.decode import decode
from detector.errors import CheckpointError, DataError, DeviceError
from detector.evaluate.runner import to_original
from detector.predict import Detector, as_array, restore
from detector.train.checkpoint import load_checkpoint
from tests.trained import checkpoint


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoint(tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def find(path: Path) -> Detector:
    return detector.load(path, device="cpu", weights="raw")


@pytest.fixture(scope="module")
def data(path: Path) -> CocoData:
    return restore(path).config.data.open("val")


def test_same_as_the_plain_network(path: Path, find: Detector, data: CocoData) -> None:
    """Folding changes nothing, and the boxes are in pixels of the file."""
    restored = restore(path, "raw")
    sample = restored.config.data.resize(data[0])
    batch = collate([sample], pad_multiple=32)
    with torch.no_grad():
        expected = to_original(decode(restored.model(batch.images), batch.sizes, restored.config.decode), batch)[0]
    found = find(data.index.image_path(0))
    assert len(found) == len(expected) == 100
    torch.testing.assert_close(found.scores, expected.scores, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(found.boxes[:10], expected.boxes[:10], atol=0.02, rtol=1e-4)
    assert found.names == tuple(data.index.classes[k] for k in found.labels.tolist())
    assert found.boxes.dtype == torch.float32


def test_kinds_of_images(find: Detector, data: CocoData) -> None:
    path = data.index.image_path(1)
    image = read_image(path)
    expected = find(path)
    for same in (str(path), image, Image.fromarray(image)):
        found = find(same)
        assert torch.equal(found.boxes, expected.boxes)
        assert found.names == expected.names
    assert find([]) == []
    pair = find([image, image[:40]])
    assert [len(f.boxes) for f in pair] == [100, 100]
    assert pair[1].boxes[:, 3].max() <= 40
    large = cv2.resize(image, None, fx=4, fy=4)
    assert find(large).boxes.max() > 100  # in pixels of what was given


@pytest.mark.parametrize(
    "image",
    [np.zeros((4, 4), np.uint8), np.zeros((4, 4, 4), np.uint8), np.zeros((4, 4, 3)), np.zeros((0, 4, 3), np.uint8)],
)
def test_wrong_arrays(find: Detector, image: Any) -> None:
    with pytest.raises(DataError, match="expected uint8"):
        find(image)


def test_unreadable_file(find: Detector, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nothing\.jpg: cannot read the image"):
        find(tmp_path / "nothing.jpg")


def test_pillow_orientation_and_grey() -> None:
    image = Image.fromarray(np.arange(6, dtype=np.uint8).reshape(2, 3))
    exif = image.getexif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    image.info["exif"] = exif.tobytes()
    turned = as_array(image)
    assert turned.shape == (3, 2, 3)
    assert turned[:, :, 0].tolist() == [[3, 0], [4, 1], [5, 2]]


def test_averaged_weights_come_first(path: Path) -> None:
    assert restore(path).averaged
    image = np.zeros((64, 96, 3), np.uint8)
    assert len(detector.load(path, device="cpu")(image)) == 0  # the averaged ones find nothing
    assert len(detector.load(path, device="cpu", weights="raw")(image)) == 100
    with pytest.raises(CheckpointError, match="expected 'ema' or 'raw'"):
        detector.load(path, weights="best")


def test_without_averaged_weights(tmp_path: Path) -> None:
    assert not restore(checkpoint(tmp_path, averaged=False, classes=("a", "b"))).averaged


def test_threshold_and_precision(path: Path, data: CocoData) -> None:
    image = data.index.image_path(0)
    find = detector.load(path, device="cpu", weights="raw", threshold=0.36)
    assert 0 < len(find(image)) < 100
    assert find(image).scores.min() > 0.36
    half = detector.load(path, device="cpu", weights="raw", precision="bf16")(image)
    full = detector.load(path, device="cpu", weights="raw")(image)
    assert half.boxes.dtype == torch.float32
    torch.testing.assert_close(half.scores[:10], full.scores[:10], atol=0.02, rtol=0)


def test_mistakes(path: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such checkpoint"):
        detector.load(tmp_path / "none.pt")
    (tmp_path / "cut.pt").write_bytes(path.read_bytes()[:1000])
    with pytest.raises(CheckpointError, match="damaged or truncated"):
        detector.load(tmp_path / "cut.pt")
    with pytest.raises(DeviceError, match="cuda:99"):
        detector.load(path, device="cuda:99")
    content = load_checkpoint(path)
    content["classes"] = content["classes"][:2]
    torch.save(content, tmp_path / "other.pt")
    with pytest.raises(CheckpointError, match=r"other\.pt: its weights do not fit.*size mismatch") as error:
        detector.load(tmp_path / "other.pt")
    assert "\n" not in str(error.value)


def test_as_json(find: Detector, data: CocoData) -> None:
    row = find(data.index.image_path(0)).as_json()[0]
    assert list(row) == ["box", "score", "label", "name"]
    assert row["name"] in data.index.classes
