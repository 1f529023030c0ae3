from __future__ import annotations

import copy
import json
import random
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from detector.data.check import check, write_fixed
from detector.data.check_images import Depth
from detector.data.coco import CocoData, CocoIndex
from detector.data.findings import KINDS, Report, Severity
from detector.errors import DataError
from tests.data.small_coco import HEIGHT, WIDTH, document, write


def look(folder: Path, content: Any = None, depth: Depth = Depth.FULL) -> tuple[Report, Any]:
    path, images = write(folder, content)
    return check(path, images, depth)


def kinds(report: Report) -> dict[str, int]:
    return {f.name: f.count for f in report.found.values() if f.name != "image-without-objects"}


def repaired(folder: Path, content: Any, depth: Depth = Depth.FULL) -> Any:
    """The repaired document, after it was seen to be clean and to load without a notice of boxes left out."""
    _, fixed = look(folder, content, depth)
    path = folder / "fixed.json"
    write_fixed(fixed, path, folder / "annotations.json")
    again, twice = check(path, folder / "images", depth)
    assert again.errors == []
    assert twice == json.loads(path.read_text())
    index = CocoIndex.load(path, folder / "images")
    assert index.notices == ()
    if depth is not Depth.NONE:
        data = CocoData(index)
        for i in range(len(data)):
            assert data[i].image.shape[:2] == data[i].original_size
    return fixed


@pytest.mark.parametrize("name", ["aerial_cars", "balloon", "bccd", "coco_tiny", "nuclei"])
@pytest.mark.parametrize("split", ["train", "val"])
def test_real_sets_are_clean(shared: Path, name: str, split: str) -> None:
    folder = shared / "datasets" / name
    path = folder / "annotations" / f"{split}.json"
    report, fixed = check(path, folder / "images", Depth.QUICK)
    assert report.errors == []
    assert report.of(Severity.WARNING) == []
    assert fixed == json.loads(path.read_text())


def test_a_correct_file_is_clean_and_stays_as_it_is(tmp_path: Path) -> None:
    for depth in Depth:
        report, fixed = look(tmp_path, depth=depth)
        assert kinds(report) == {}
        assert report.counts == {"images": 3, "annotations": 5, "categories": 2}
        assert fixed == document()


def broken(path: str, value: Any, *expected: str, kept: int = 5, images: int = 3) -> Any:
    return pytest.param(path, value, set(expected), kept, images, id=f"{path}={str(value)[:30]}")


NAN = float("nan")


@pytest.mark.parametrize(
    ("path", "value", "expected", "kept", "images"),
    [
        broken("annotations/1/image_id", 8, "unknown-image", kept=4),
        broken("annotations/1/category_id", 8, "unknown-category", "class-without-objects", kept=4),
        broken("images/1/id", 7, "duplicate-image-id", "unknown-image", "class-without-objects", kept=2, images=2),
        broken("categories/1/id", 5, "duplicate-category-id", "unknown-category", kept=2),
        broken("annotations/1/id", 101, "duplicate-annotation-id"),
        broken("annotations/1/id", ..., "missing-key"),
        broken("annotations/1/id", "102", "wrong-type"),
        broken("annotations/1/id", 0, "annotation-id-0"),
        broken("annotations/1/bbox", [1, 2, 0, 4], "box-no-area", kept=4),
        broken("annotations/1/bbox", [5, 5, -3, -4], "box-no-area", kept=4),
        broken("annotations/1/bbox", [60, 2, 5, 4], "box-outside", kept=4),
        broken("annotations/1/bbox", [1, 2, 1e-12, 4], "box-outside", kept=4),
        broken("annotations/1/bbox", [-4, -4, 8, 8], "box-sticks-out"),
        broken("annotations/1/bbox", [NAN, 2, 3, 4], "box-not-finite", kept=4),
        broken("annotations/1/bbox", [1, 2, float("inf"), 4], "box-not-finite", kept=4),
        broken("annotations/1/bbox", ["nan", 2, 3, 4], "wrong-type", "box-not-finite", kept=4),
        broken("annotations/0/bbox", [NAN, 2, 3, 4], "box-not-finite"),  # there is a mask to take it from
        broken("annotations/0/bbox", ..., "missing-key"),
        broken("annotations/1/bbox", ..., "missing-key", kept=4),
        broken("annotations/1/bbox", ["1", "2", "3", "4"], "wrong-type"),
        broken("annotations/1/bbox", [1, 2, 3], "wrong-type", kept=4),
        broken("annotations/1/bbox", {"x": 1}, "wrong-type", kept=4),
        broken("annotations/1/bbox", [1, 2, 0.5, 4], "box-under-one-pixel"),
        broken("annotations/1/image_id", "7", "wrong-type"),
        broken("annotations/1/image_id", None, "wrong-type", kept=4),
        broken("annotations/1/category_id", 2.0, "wrong-type"),
        broken("annotations/1/category_id", [2], "wrong-type", kept=4),
        broken("annotations/1", "annotation", "wrong-type", kept=4),
        broken("annotations/1/iscrowd", ..., "missing-iscrowd"),
        broken("annotations/1/iscrowd", "no", "wrong-type"),
        broken("annotations/1/iscrowd", 1, "crowd-without-run-lengths"),
        broken("annotations/1/area", ..., "missing-area"),
        broken("annotations/1/area", "12", "wrong-type"),
        broken("annotations/1/area", -1, "area"),
        broken("annotations/0/area", NAN, "area"),
        broken("annotations/0/segmentation", [[1, 2, 3, 4]], "segmentation"),
        broken("annotations/0/segmentation", [[10, 5, 30, 5, 30]], "segmentation"),
        broken("annotations/0/segmentation", [[10, 5, 30, 5, 30, NAN]], "segmentation"),
        broken("annotations/0/segmentation", [[10, 5, 30, 5, 30, 25, 10, 25], "x"], "segmentation"),
        broken("annotations/0/segmentation", "mask.png", "wrong-type"),
        broken("annotations/0/segmentation", {"size": [4, 6], "counts": [24]}, "segmentation"),
        broken("annotations/0/segmentation", {"size": [40, 60], "counts": "PP"}, "segmentation"),
        broken("annotations/0/segmentation", [[40, 5, 50, 5, 50, 25, 40, 25]], "mask-differs-from-box"),
        broken("annotations/3/segmentation/counts", [1], "segmentation", "crowd-without-run-lengths"),
        broken("images/1/file_name", "../3.png", "file-name-leaves-folder", kept=2, images=2),
        broken("images/1/file_name", "/etc/passwd", "file-name-leaves-folder", kept=2, images=2),
        broken("images/1/file_name", "4.png", "image-missing", kept=2, images=2),
        broken("images/1/file_name", 4, "wrong-type", kept=2, images=2),
        broken("images/1/file_name", ..., "missing-key", kept=2, images=2),
        broken("images/1/file_name", "7.png", "duplicate-file-name"),
        broken("images/1/width", 61, "image-size"),
        broken("images/1/width", 0, "image-size"),
        broken("images/1/width", ..., "missing-key"),
        broken("images/1/height", "40", "wrong-type"),
        broken("images/1/id", ..., "missing-key", "unknown-image", kept=2, images=2),
        broken("images/1/id", "3", "wrong-type"),
        broken("images/2/id", 0, "id-0"),
        broken("images/1", [], "wrong-type", "unknown-image", kept=2, images=2),
        broken("categories/0/name", "cat", "duplicate-category-name"),
        broken("categories/0/name", ..., "missing-key"),
        broken("categories/0/id", "5", "wrong-type"),
        broken("annotations", ..., "no-annotations", kept=0),
    ],
)
def test_one_mistake_is_found_and_mended(
    tmp_path: Path, path: str, value: Any, expected: set[str], kept: int, images: int
) -> None:
    content = document()
    *parents, last = [int(p) if p.isdigit() else p for p in path.split("/")]
    place = content
    for key in parents:
        place = place[key]
    if value is ...:
        del place[last]
    else:
        place[last] = value
    before = json.dumps(content)
    report, _ = look(tmp_path, content)
    assert json.dumps(content) == before
    assert set(kinds(report)) - {"class-without-objects"} == expected - {"class-without-objects"}
    assert any(f.examples for f in report.found.values())
    mended = [name for name in expected if KINDS[name].repair is not None]
    fixed = repaired(tmp_path, content)
    assert (len(fixed.get("annotations", [])), len(fixed["images"])) == (kept, images)
    again, _ = look(tmp_path, fixed)
    assert not set(mended) & set(again.found)


def test_what_a_repair_writes(tmp_path: Path) -> None:
    content = document()
    first, second, third = content["annotations"][:3]
    first["bbox"] = None
    first["area"] = None
    second["bbox"] = [-4, 38, 8, 8]
    second["id"] = third["id"]
    del third["area"]
    fixed = repaired(tmp_path, content)["annotations"]
    assert fixed[0]["bbox"] == [10, 5, 20, 20]
    assert fixed[0]["area"] == 400
    assert fixed[1]["bbox"] == [0, 38, 4, 2]
    assert [a["id"] for a in fixed] == [101, 103, 106, 104, 105]
    assert fixed[2]["area"] == 240


def test_size_is_corrected_only_where_the_boxes_fit_the_file(tmp_path: Path) -> None:
    content = document()
    content["images"][1] |= {"width": HEIGHT, "height": WIDTH}  # exchanged
    assert repaired(tmp_path, content)["images"] == document()["images"]
    content["images"][1] |= {"width": 2 * WIDTH, "height": 2 * HEIGHT}  # the file was made smaller afterwards
    content["annotations"][2]["bbox"] = [60, 40, 50, 20]
    fixed = repaired(tmp_path, content)
    assert [i["id"] for i in fixed["images"]] == [7, 12]
    assert [a["id"] for a in fixed["annotations"]] == [102, 105]


def test_unreadable_images(tmp_path: Path) -> None:
    path, images = write(tmp_path)
    (images / "3.png").write_bytes((images / "3.png").read_bytes()[:60])
    (images / "7.png").write_text("<html>")
    report, fixed = check(path, images, Depth.FULL)
    assert kinds(report)["image-unreadable"] == 2
    assert [i["id"] for i in fixed["images"]] == [12]  # type: ignore[index]
    assert kinds(check(path, images, Depth.NONE)[0]) == {}


def test_a_cut_off_jpeg_is_found_without_decoding(tmp_path: Path) -> None:
    content = document()
    content["images"][0]["file_name"] = "x.jpg"
    path, images = write(tmp_path, content)
    noise = np.random.default_rng(0).integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)
    cv2.imwrite(str(images / "x.jpg"), noise)
    for depth in (Depth.QUICK, Depth.FULL):
        assert kinds(check(path, images, depth)[0]) == {}
    whole = (images / "x.jpg").read_bytes()
    (images / "x.jpg").write_bytes(whole[:-300])
    for depth in (Depth.QUICK, Depth.FULL):
        report, _ = check(path, images, depth)
        assert "cut off" in report.found["image-unreadable"].examples[0]


def test_camera_orientation(tmp_path: Path) -> None:
    content = document()
    content["images"][0]["file_name"] = "x.jpg"
    path, images = write(tmp_path, content)
    exif = Image.Exif()
    picture = Image.new("RGB", (WIDTH, HEIGHT))
    for orientation, expected in ((1, {}), (6, {}), (3, {"orientation": 1})):
        exif[0x0112] = orientation
        picture.save(images / "x.jpg", exif=exif)
        for depth in (Depth.QUICK, Depth.FULL):
            assert kinds(check(path, images, depth)[0]) == expected
    exif[0x0112] = 8
    picture.save(images / "x.jpg", exif=exif)
    content["images"][0] |= {"width": HEIGHT, "height": WIDTH}
    content["annotations"] = []
    for depth in (Depth.QUICK, Depth.FULL):
        assert "image-size" not in kinds(look(tmp_path, content, depth)[0])


def test_files_beyond_use(tmp_path: Path) -> None:
    whole = json.dumps(document())
    for text in ("", "[]", "7", '{"info": {}}', whole[:-40], whole[:100], "[" * 100_000, '{"images": 3}', "\0"):
        report, fixed = look(tmp_path, text)
        assert kinds(report) == {"file": 1}
        assert fixed is None
        assert report.beyond_repair
    report, fixed = check(tmp_path / "none.json", tmp_path, Depth.FULL)
    assert kinds(report) == {"file": 1}
    write(tmp_path)
    report, fixed = check(tmp_path / "annotations.json", tmp_path / "nowhere", Depth.FULL)
    assert kinds(report) == {"file": 1}


def many(boxes: list[list[float]]) -> dict[str, Any]:
    content = document()
    content["annotations"] = [
        {"id": 1 + k, "image_id": 7, "category_id": 2, "bbox": b, "area": 9.0, "iscrowd": 0}
        for k, b in enumerate(boxes)
    ]
    return content


def test_boxes_in_another_format_are_recognised_and_not_mended(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    corner, side = rng.uniform(0, [40, 20], (30, 2)), rng.uniform(5, 20, (30, 2))
    for boxes, expected in (
        (np.concatenate([corner, side], 1), None),
        (np.concatenate([corner, corner + side], 1), "boxes-are-corners"),
        (np.concatenate([corner, side], 1) / 60, "boxes-are-fractions"),
    ):
        report, _ = look(tmp_path, many(boxes.tolist()))
        assert [f.name for f in report.beyond_repair] == ([expected] if expected else [])


def test_the_same_box_twice(tmp_path: Path) -> None:
    content = many([[1, 2, 3, 4], [1, 2, 3, 4], [1.0, 2, 3, 4.0], [1, 2, 3, 5]])
    content["annotations"][3]["category_id"] = 5
    report, _ = look(tmp_path, content)
    assert report.found["duplicate-box"].count == 2
    assert [a["id"] for a in repaired(tmp_path, content)["annotations"]] == [1, 4]


def test_a_wrong_image_folder_is_not_mended_by_leaving_out_everything(tmp_path: Path) -> None:
    path, _ = write(tmp_path)
    report, _ = check(path, tmp_path, Depth.FULL)
    assert [f.name for f in report.beyond_repair] == ["all-images-missing"]


def test_the_corrected_file_never_replaces_the_checked_one(tmp_path: Path) -> None:
    path, _ = write(tmp_path)
    before = path.read_bytes()
    (tmp_path / "link.json").symlink_to(path)
    (tmp_path / "hard.json").hardlink_to(path)
    for name in ("annotations.json", "link.json", "hard.json", "images/../annotations.json"):
        with pytest.raises(DataError, match="another name"):
            write_fixed(document(), tmp_path / name, path)
    with pytest.raises(DataError, match="cannot write"):
        write_fixed(document(), path / "below" / "a.json", path)
    with pytest.raises(TypeError):
        write_fixed({"images": {1, 2}}, tmp_path / "new.json", path)
    assert path.read_bytes() == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["annotations.json", "hard.json", "images", "link.json"]


VALUES = [
    None,
    True,
    -1,
    0,
    3,
    7,
    1e9,
    0.5,
    NAN,
    float("-inf"),
    2**70,
    "",
    "7",
    "x/y",
    [],
    [[]],
    {},
    [1, 2, 3, 4],
    [[1] * 6],
]


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(0, 2**32), st.integers(1, 6))
def test_any_damage_is_mended_and_the_doctor_agrees_with_the_loader(tmp_path: Path, seed: int, changes: int) -> None:
    rng = random.Random(seed)
    content = document()
    for _ in range(changes):
        table = rng.choice([content["images"], content["annotations"], content["annotations"], content["categories"]])
        if not table:
            continue
        at = rng.randrange(len(table))
        entry = table[at]
        action = rng.random()
        if action < 0.1 or not isinstance(entry, dict) or not entry:
            table[at] = copy.deepcopy(rng.choice([*VALUES, table[0]]))
        elif action < 0.3:
            del entry[rng.choice(sorted(entry))]
        elif action < 0.5 and isinstance(entry.get("bbox"), list) and entry["bbox"]:
            entry["bbox"][rng.randrange(len(entry["bbox"]))] = rng.choice(VALUES)
        else:
            entry[rng.choice(sorted(entry))] = copy.deepcopy(rng.choice(VALUES))
    report, _ = look(tmp_path, content, Depth.NONE)
    try:
        left_out = any(
            "left out" in n for n in CocoIndex.load(tmp_path / "annotations.json", tmp_path / "images").notices
        )
        refused = False
    except DataError:
        left_out, refused = False, True
    assert (refused or left_out) == bool(report.errors)
    if not report.beyond_repair:
        repaired(tmp_path, content, Depth.NONE)
