"""JPEGs decoded at a reduced scale: the pixels of a good filter, boxes that stay on their objects."""

from __future__ import annotations

import json
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from PIL import Image

from detector.data.coco import CocoData, CocoIndex
from detector.data.config import ShapesData
from detector.data.images import read_image, read_reduced
from detector.data.loader import eval_loader, train_loader
from detector.data.resize import Letterbox, ShortEdge
from detector.data.transforms import Color, Flip
from tests.data.test_loader import same

SIZE = (601, 803)


@pytest.fixture(scope="module")
def picture() -> np.ndarray:
    """SIZE, detail at every scale, less the finer it is, and a bright square whose corner is at 300, 200."""
    rng = np.random.default_rng(0)
    layers = (
        cv2.resize(rng.standard_normal((SIZE[0] // s + 1, SIZE[1] // s + 1, 3), np.float32), SIZE[::-1]) * s
        for s in (2, 8, 32)
    )
    pixels = (110 + 1.5 * sum(layers)).clip(0, 200).astype(np.uint8)
    pixels[200:400, 300:500] = 255
    return pixels


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory, picture: np.ndarray) -> CocoIndex:
    folder = tmp_path_factory.mktemp("reduced")
    names = ["a.jpg", "b.png", "c.jpg", "d.jpg"]
    for name in names:
        exif = Image.Exif()
        if name == "c.jpg":
            exif[0x0112] = 3
        Image.fromarray(picture).save(folder / name, quality=92, exif=exif)
    content = {
        "images": [{"id": i, "file_name": n, "height": SIZE[0], "width": SIZE[1]} for i, n in enumerate(names)],
        "annotations": [
            {"id": i, "image_id": i, "category_id": 1, "bbox": [300, 200, 200, 200], "area": 40000, "iscrowd": 0}
            for i in range(len(names))
        ],
        "categories": [{"id": 1, "name": "square"}],
    }
    (folder / "a.json").write_text(json.dumps(content))
    return CocoIndex.load(folder / "a.json", folder)


@pytest.mark.parametrize("n", [2, 4, 8])
def test_pixels_are_those_of_an_area_filter(data: CocoIndex, n: int) -> None:
    least = (SIZE[0] // n, SIZE[1] // n)
    found, factor = read_reduced(data.image_path(0), SIZE, least)
    assert factor == n
    assert found.shape == (-(-SIZE[0] // n), -(-SIZE[1] // n), 3)
    whole = read_image(data.image_path(0))[: SIZE[0] // n * n, : SIZE[1] // n * n]
    area = cv2.resize(whole, least[::-1], interpolation=cv2.INTER_AREA)
    difference = np.abs(found[: least[0], : least[1]].astype(int) - area)
    assert difference.mean() < 1
    shifted = np.abs(found[: least[0], 1 : least[1]].astype(int) - area[:, :-1])
    assert difference.mean() < shifted.mean() / 2


def test_only_as_far_as_asked_and_only_plain_jpegs(data: CocoIndex) -> None:
    path = data.image_path(0)
    assert read_reduced(path, SIZE, (301, 402))[1] == 2
    assert read_reduced(path, SIZE, (302, 402))[1] == 1
    assert read_reduced(path, SIZE, (301, 403))[1] == 1
    assert read_reduced(path, SIZE, (1, 1))[1] == 8
    for i in (1, 2):
        image, n = read_reduced(data.image_path(i), SIZE, (10, 10))
        assert n == 1
        assert np.array_equal(image, read_image(data.image_path(i)))


def test_damage_and_wrong_sizes_are_told_as_before(data: CocoIndex, tmp_path: Path) -> None:
    from detector.errors import DataError

    with pytest.raises(DataError, match="but the annotations say 600, 803"):
        read_reduced(data.image_path(0), (600, 803), (10, 10))
    content = data.image_path(0).read_bytes()
    (tmp_path / "x.jpg").write_bytes(content[: len(content) // 2])
    with pytest.raises(DataError, match="cut off"):
        read_reduced(tmp_path / "x.jpg", SIZE, (10, 10))
    with pytest.raises(DataError, match="cannot read"):
        read_reduced(tmp_path / "y.jpg", SIZE, (10, 10))


@pytest.mark.parametrize("resize", [ShortEdge(short=100, long=200), Letterbox(size=(150, 150))])
def test_boxes_stay_on_their_objects(data: CocoIndex, resize: ShortEdge | Letterbox) -> None:
    (whole,) = eval_loader(CocoData(data), resize=resize, batch_size=4, workers=0)
    (batch,) = eval_loader(CocoData(data, resize.largest), resize=resize, batch_size=4, workers=0)
    assert (batch.sizes - whole.sizes).abs().max() <= 1
    for i, box in enumerate(batch.objects.boxes):
        original = (box - batch.offset[i].repeat(2)) / batch.scale[i].repeat(2)
        assert torch.allclose(original, torch.tensor([300.0, 200.0, 500.0, 400.0]), atol=0.01)
        if i != 2:  # that one is turned, its box is not
            bright = (batch.images[i].amin(0) > 227).nonzero()
            left_top, right_bottom = bright.amin(0).flip(0), bright.amax(0).flip(0) + 1
            assert (torch.cat([left_top, right_bottom]) - box).abs().max() <= 1


def test_the_setting_covers_every_choice_and_both_loaders(data: CocoIndex) -> None:
    resize = ShortEdge(short=40, long=1000, multi_scale=(50, 290, 60))
    for margin, n in ((1.0, 2), (1.05, 1), (2.0, 1)):
        settings = ShapesData(resize=resize, reduced_decoding=margin)
        sample = CocoData(data, settings._least).reduced(0)
        assert sample.image.shape[0] == -(-SIZE[0] // n)
        assert sample.scale.tolist() == [1 / n, 1 / n]
    assert CocoData(data).reduced(0).image.shape[:2] == SIZE


def test_workers_and_restarts_change_no_byte(data: CocoIndex) -> None:
    resize = Letterbox(size=(64, 64), multi_scale=(64, 96))

    def batches(start: int, workers: int) -> list[object]:
        loader = train_loader(
            CocoData(data, resize.largest),
            augment=(Flip(), Color()), resize=resize, batch_size=3, seed=1, start_step=start, stop_step=5,
            workers=workers,
        )  # fmt: skip
        return list(loader)

    straight = batches(0, 0)
    assert same(straight, batches(0, 2))  # type: ignore[arg-type]
    assert same(straight[2:], batches(2, 1))  # type: ignore[arg-type]
