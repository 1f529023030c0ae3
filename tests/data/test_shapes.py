"""The generated sets: same bytes, sound annotations, and of each suite what it promises."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import cv2
import numpy as np
import pytest
from pycocotools.coco import COCO

from detector.cli.make_shapes import main
from detector.data.shape_drawing import SUB, png, rasterize
from detector.data.shape_suites import SUITES, SuiteName
from detector.data.shapes import Picture, ShapeSet, draw, ensure, run_lengths
from detector.errors import DataError

# Of the pixels and annotations of the first pictures of seed 0; they change only together with `shapes.VERSION`.
KNOWN = {
    "plain": "c8cb797e2d933ff8",
    "dense": "e2464d6540eeadea",
    "tiny": "b2cb7654a3f342df",
    "elongated": "c454506f7ebd0982",
    "nested": "f5e62f1f67f7d374",
    "crescent": "dc432a51592d86b0",
    "scales": "122c1422bef7e5d7",
}


def pictures(suite: SuiteName, count: int = 12, size: tuple[int, int] = (240, 320)) -> list[Picture]:
    settings = ShapeSet(suite, count, size)
    return [draw(settings, i) for i in range(count)]


def boxes(picture: Picture, crowd: int = 0) -> np.ndarray:
    """(n, 4) xyxy."""
    found = [a["bbox"] for a in picture.annotations if a["iscrowd"] == crowd]
    xywh = np.array(found, dtype=np.float64).reshape(-1, 4)
    return np.concatenate([xywh[:, :2], xywh[:, :2] + xywh[:, 2:]], 1)


def all_sides(suite: SuiteName, **how: int) -> np.ndarray:
    """(n, 2) width, height of every box of a suite's first pictures."""
    found = np.concatenate([boxes(p) for p in pictures(suite, **how)])
    return found[:, 2:] - found[:, :2]


@pytest.mark.parametrize("suite", list(SUITES))
def test_bytes_are_those_of_every_other_machine(suite: SuiteName) -> None:
    settings = ShapeSet(suite, 3, (96, 128))
    digest = hashlib.sha256()
    for i in range(3):
        picture = draw(settings, i)
        digest.update(png(picture.image))
        digest.update(json.dumps(picture.annotations).encode())
    assert digest.hexdigest()[:16] == KNOWN[suite]


def test_set_is_written_the_same_twice_and_grows_without_changing(tmp_path: Path) -> None:
    ensure(tmp_path / "a", ShapeSet("plain", 4, (64, 96)))
    ensure(tmp_path / "b", ShapeSet("plain", 4, (64, 96)))
    ensure(tmp_path / "c", ShapeSet("plain", 6, (64, 96)))
    names = sorted(p.relative_to(tmp_path / "a") for p in (tmp_path / "a").rglob("*") if p.is_file())
    assert len(names) == 6
    for name in names:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    first = Path("images/000003.png")
    assert (tmp_path / "a" / first).read_bytes() == (tmp_path / "c" / first).read_bytes()


def test_parts_and_seeds_share_no_picture() -> None:
    images = [
        draw(ShapeSet("plain", 1, (64, 96), seed, part), i).image.tobytes()
        for seed in range(2)
        for part in range(3)
        for i in range(2)
    ]
    assert len(set(images)) == len(images)


def test_written_once_and_again_when_the_settings_change(tmp_path: Path) -> None:
    folder = tmp_path / "set"
    ensure(folder, ShapeSet("plain", 2, (64, 96)))
    before = (folder / "annotations.json").stat().st_mtime_ns
    ensure(folder, ShapeSet("plain", 2, (64, 96)))
    assert (folder / "annotations.json").stat().st_mtime_ns == before
    ensure(folder, ShapeSet("plain", 3, (64, 96)))
    assert len(list((folder / "images").iterdir())) == 3
    assert [p.name for p in tmp_path.iterdir()] == ["set"], "nothing temporary is left"


def test_interrupted_writing_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("detector.data.shapes.draw", interrupt)
    with pytest.raises(KeyboardInterrupt):
        ensure(tmp_path / "set", ShapeSet("plain", 2, (64, 96)))
    assert list(tmp_path.iterdir()) == []


def test_a_folder_of_somebody_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "photo.jpg").write_bytes(b"mine")
    with pytest.raises(DataError, match="not a generated set"):
        ensure(tmp_path, ShapeSet("plain", 2, (64, 96)))
    assert (tmp_path / "photo.jpg").read_bytes() == b"mine"


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(DataError, match="cannot write"):
        ensure(tmp_path / "file" / "set", ShapeSet("plain", 2, (64, 96)))


@pytest.mark.parametrize("suite", list(SUITES))
def test_pycocotools_sees_the_masks_that_the_boxes_say(suite: SuiteName, tmp_path: Path) -> None:
    ensure(tmp_path / "set", ShapeSet(suite, 12, (160, 224), seed=3))
    coco = COCO(tmp_path / "set" / "annotations.json")
    assert [c["name"] for c in coco.loadCats(coco.getCatIds())] == list(SUITES[suite].classes)
    assert len(coco.getImgIds()) == 12
    for annotation in coco.loadAnns(coco.getAnnIds()):
        mask = coco.annToMask(annotation)
        rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
        x, y, w, h = annotation["bbox"]
        found = np.array([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1])
        exact = isinstance(annotation["segmentation"], dict)
        # pycocotools fills polygons by a rule of its own, which differs along the outline.
        assert np.abs(found - [x, y, x + w, y + h]).max() <= (0 if exact else 1)
        assert abs(int(mask.sum()) - annotation["area"]) <= (0 if exact else 4 * (w + h))
        assert annotation["area"] > 0
        assert x >= 0
        assert y >= 0
        assert x + w <= 224
        assert y + h <= 160


def test_files_hold_what_was_drawn(tmp_path: Path) -> None:
    settings = ShapeSet("scales", 2, (80, 100))
    ensure(tmp_path / "set", settings)
    for i in range(2):
        image = cv2.imread(str(tmp_path / "set" / "images" / f"{i + 1:06d}.png"), cv2.IMREAD_COLOR_RGB)
        assert np.array_equal(image, draw(settings, i).image)


def test_there_are_crowds_empty_images_and_occlusion() -> None:
    many = pictures("plain", 150, (96, 128))
    assert 1 <= sum(not p.annotations for p in many) <= 20
    assert 1 <= sum(len(boxes(p, crowd=1)) for p in many) <= 20
    kinds = [isinstance(a["segmentation"], list) for p in many for a in p.annotations if not a["iscrowd"]]
    assert 0.5 < np.mean(kinds) < 0.95
    labels = np.bincount([a["category_id"] - 1 for p in many for a in p.annotations])
    assert len(labels) == len(SUITES["plain"].classes)
    assert labels.min() > labels.max() / 2


def test_dense_has_dozens() -> None:
    counts = [len(boxes(p)) for p in pictures("dense") if p.annotations]
    assert min(counts) >= 20
    assert np.mean(counts) >= 30


def test_tiny_is_tiny() -> None:
    assert all_sides("tiny").max() <= 17


def test_elongated_is_long_and_thin() -> None:
    sides = all_sides("elongated")
    assert (sides.max(1) >= 3 * sides.min(1)).mean() > 0.9
    assert 0.2 < (sides[:, 0] > sides[:, 1]).mean() < 0.8, "both ways"


def test_scales_span_a_factor_of_twenty() -> None:
    low, high = SUITES["scales"].side
    assert high == 20 * low
    sides = all_sides("scales", count=60)
    assert np.percentile(sides.max(1), 99) >= 15 * np.percentile(sides.max(1), 2)


@pytest.mark.parametrize("size", [(48, 64), (240, 320), (600, 200)])
def test_objects_fit_into_images_of_any_size(size: tuple[int, int]) -> None:
    for suite in SUITES:
        for picture in pictures(suite, 3, size):
            assert picture.image.shape == (*size, 3)
            found = boxes(picture)
            assert (found >= 0).all()
            assert (found <= [size[1], size[0], size[1], size[0]]).all()


def test_nested_objects_share_their_centres() -> None:
    shared = total = 0
    for picture in pictures("nested"):
        found = boxes(picture)
        centers = (found[:, :2] + found[:, 2:]) / 2
        distance = np.abs(centers[:, None] - centers).max(2)
        shared += int(((distance <= 2).sum(1) > 1).sum())
        total += len(found)
    assert shared > 0.9 * total


def test_crescents_are_not_at_their_centres() -> None:
    hollow = total = 0
    for picture in pictures("crescent"):
        for annotation in picture.annotations:
            if annotation["iscrowd"] or isinstance(annotation["segmentation"], dict):
                continue
            polygon = np.round(np.array(annotation["segmentation"][0]).reshape(-1, 2) * SUB).astype(np.int64)
            mask = rasterize(polygon).mask
            hollow += not mask[mask.shape[0] // 2, mask.shape[1] // 2]
            total += 1
    assert total > 10
    assert hollow == total


def test_rasterize_fills_the_pixels_whose_centres_are_inside() -> None:
    # A right triangle of 4 pixels: row r has its centre at r + 0.5 and holds the columns below it.
    polygon = np.array([(0, 0), (4, 4), (0, 4)]) * SUB
    stamp = rasterize(polygon)
    expected = np.array([[1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0], [1, 1, 1, 1]], dtype=bool)
    # Centres exactly on the slope count as outside on the right of a crossing.
    assert stamp.mask.tolist() in (expected.tolist(), np.tril(expected, -1).tolist())
    square = np.array([(1.6, 2.4), (5.4, 2.4), (5.4, 6.6), (1.6, 6.6)])
    filled = rasterize(np.round(square * SUB).astype(np.int64))
    rows, columns = filled.window
    full = np.zeros((8, 8), dtype=bool)
    full[rows, columns] = filled.mask
    assert np.flatnonzero(full.any(1)).tolist() == [2, 3, 4, 5, 6]
    assert np.flatnonzero(full.any(0)).tolist() == [2, 3, 4]


def test_run_lengths_start_with_zeros_and_go_down_the_columns() -> None:
    assert run_lengths(np.array([[0, 1], [1, 1]], dtype=bool)) == [1, 3]
    assert run_lengths(np.array([[1, 0], [1, 0]], dtype=bool)) == [0, 2, 2]
    assert run_lengths(np.zeros((2, 3), dtype=bool)) == [6]


def test_command_writes_a_set_and_refuses_nonsense(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--suite", "tiny", "--out", str(tmp_path / "x"), "--images", "2", "--size", "48x64"]) == 0
    assert len(list((tmp_path / "x" / "images").iterdir())) == 2
    assert "2 images" in capsys.readouterr().out
    (tmp_path / "y").mkdir()
    (tmp_path / "y" / "mine").touch()
    assert main(["--out", str(tmp_path / "y"), "--images", "2"]) == 2
    assert "not a generated set" in capsys.readouterr().err
    for wrong in (["--size", "48"], ["--size", "8x8"], ["--images", "0"], ["--seed", "-1"], ["--suite", "plane"]):
        with pytest.raises(SystemExit) as caught:
            main(["--out", str(tmp_path / "z"), *wrong])
        assert caught.value.code == 2
