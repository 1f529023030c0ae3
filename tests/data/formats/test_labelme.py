from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from pycocotools import mask as rle

from tests.data.formats.make import HEIGHT, WIDTH, convert, image, load, things

TRIANGLE = {"label": "cat", "points": [[1.5, 2], [11, 2], [11, 12]], "group_id": None, "shape_type": "polygon"}
RECTANGLE = {"label": "dog", "points": [[30, 20], [10, 5]], "group_id": None, "shape_type": "rectangle"}


def labelme(folder: Path, *shapes: Any, **more: Any) -> Path:
    image(folder / "pictures" / "a.png")
    (folder / "json").mkdir(parents=True)
    document = {
        "version": "5.4.1",
        "flags": {},
        "shapes": list(shapes),
        "imagePath": "..\\pictures\\a.png",
        "imageData": None,
        "imageHeight": HEIGHT,
        "imageWidth": WIDTH,
        **more,
    }
    (folder / "json" / "a.json").write_text(json.dumps(document))
    return folder / "json"


def converted(tmp_path: Path, *shapes: Any, **more: Any) -> dict[str, Any]:
    assert convert("labelme", labelme(tmp_path / "labelme", *shapes, **more), "--out", tmp_path / "out") == 0
    return load(tmp_path / "out" / "annotations" / "train.json", tmp_path / "out" / "images")


def test_polygons_and_rectangles(tmp_path: Path) -> None:
    document = converted(tmp_path, TRIANGLE, RECTANGLE, imageHeight=None, imageWidth=None)
    assert things(document) == [
        ("a.png", "cat", (1.5, 2, 9.5, 10), "[[1.5, 2.0, 11.0, 2.0, 11.0, 12.0]]"),
        ("a.png", "dog", (10, 5, 20, 15), "[]"),
    ]


def test_a_group_is_one_object(tmp_path: Path) -> None:
    other = {**TRIANGLE, "points": [[30, 20], [40, 20], [40, 39]], "group_id": 1}
    document = converted(tmp_path, {**TRIANGLE, "group_id": 1}, other, TRIANGLE, {**other, "label": "dog"})
    assert [(t[1], t[2], len(json.loads(t[3]))) for t in things(document)] == [
        ("cat", (1.5, 2, 9.5, 10), 1),
        ("cat", (1.5, 2, 38.5, 37), 2),
        ("dog", (30, 20, 10, 19), 1),
    ]


def test_circles_are_exact_in_their_box(tmp_path: Path) -> None:
    (thing,) = things(converted(tmp_path, {"label": "ball", "points": [[20, 20], [23, 24]], "shape_type": "circle"}))
    assert thing[2] == (15, 15, 10, 10)
    outline = np.array(json.loads(thing[3])).reshape(-1, 2)
    assert np.hypot(*(outline - 20).T) == pytest.approx(5)


def test_masks_become_run_lengths(tmp_path: Path) -> None:
    pixels = np.zeros((6, 9), dtype=np.uint8)
    pixels[1:5, 2:9] = 255
    text = base64.b64encode(cv2.imencode(".png", pixels)[1].tobytes()).decode()
    shape = {"label": "cat", "points": [[10, 20], [18, 25]], "shape_type": "mask", "mask": text}
    document = converted(tmp_path, shape)
    (found,) = document["annotations"]
    assert found["bbox"] == [12, 21, 7, 4]
    assert found["area"] == 28
    whole = np.zeros((HEIGHT, WIDTH), dtype=np.uint8)
    whole[20:26, 10:19] = pixels > 0
    assert (rle.decode(found["segmentation"]) == whole).all()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"shape_type": "line"}, "shape_type is 'line', which has no area"),
        ({"points": [[1, 2], [3, 4]]}, "a polygon of 2 points, expected at least 3"),
        ({"points": [[1, 2], [3, "4"], [5, 6]]}, "expected a list of [x, y]"),
        ({"points": [[1, 2], [3, 2], [5, 2]]}, "has no area"),
        ({"label": ""}, "label is ''"),
        ({"shape_type": "circle"}, "a circle of 3 points"),
        ({"shape_type": "mask", "mask": "no"}, "mask cannot be read"),
    ],
)
def test_a_broken_shape_is_named(tmp_path: Path, capsys: Any, change: dict[str, Any], said: str) -> None:
    source = labelme(tmp_path / "labelme", RECTANGLE, {**TRIANGLE, **change})
    assert convert("labelme", source, "--out", tmp_path / "out") == 2
    message = capsys.readouterr().err
    assert said in message
    assert "a.json: shapes[1]" in message
    assert convert("labelme", source, "--out", tmp_path / "out", "--skip") == 0
    assert "left out 1 object" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"shapes": None}, "not labelme's"),
        ({"imagePath": None}, "imagePath is None"),
        ({"imagePath": "none.png"}, "no such file"),
        ({"imageHeight": 39}, "height, width are 39, 60, expected those of"),
        ({"imageHeight": "high"}, "expected whole numbers"),
    ],
)
def test_a_broken_file_is_named(tmp_path: Path, capsys: Any, change: dict[str, Any], said: str) -> None:
    assert convert("labelme", labelme(tmp_path / "labelme", TRIANGLE, **change), "--out", tmp_path / "out") == 2
    message = capsys.readouterr().err
    assert said in message
    assert "a.json" in message


def test_images_left_in_place(tmp_path: Path, capsys: Any) -> None:
    source = labelme(tmp_path / "labelme", TRIANGLE)
    assert convert("labelme", source, "--out", tmp_path / "out", "--images", "keep") == 0
    folder = tmp_path / "labelme" / "pictures"
    assert str(folder) in capsys.readouterr().out
    load(tmp_path / "out" / "annotations" / "train.json", folder)
    (tmp_path / "other").mkdir()
    arguments = ("labelme", source, "--out", tmp_path / "b", "--image-folder", tmp_path / "other")
    assert convert(*arguments) == 2
    assert "outside of the image folder" in capsys.readouterr().err
