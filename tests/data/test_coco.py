from __future__ import annotations

import copy
import json
import logging
import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pycocotools import mask as rle
from pycocotools.coco import COCO

from detector.data.coco import CocoData, CocoIndex
from detector.errors import DataError
from tests.data.small_coco import HEIGHT, WIDTH, document, write

# set, split: images, images without objects, boxes, crowd regions, segmentations, classes
REAL = {
    ("aerial_cars", "train"): (103, 5, 1311, 0, 0, 4),
    ("aerial_cars", "val"): (22, 0, 333, 0, 0, 4),
    ("aerial_cars", "test"): (26, 0, 433, 0, 0, 4),
    ("balloon", "train"): (44, 0, 187, 0, 187, 1),
    ("balloon", "val"): (10, 0, 40, 0, 40, 1),
    ("balloon", "test"): (20, 0, 78, 0, 78, 1),
    ("bccd", "train"): (205, 0, 2804, 0, 0, 3),
    ("bccd", "val"): (87, 0, 1137, 0, 0, 3),
    ("bccd", "test"): (72, 0, 945, 0, 0, 3),
    ("coco_tiny", "train"): (119, 2, 984, 9, 993, 80),
    ("coco_tiny", "val"): (50, 2, 377, 5, 382, 80),
    ("nuclei", "train"): (123, 0, 3671, 0, 3671, 1),
    ("nuclei", "val"): (29, 0, 819, 0, 819, 1),
    ("nuclei", "test"): (38, 0, 1420, 0, 1420, 1),
}


def load(folder: Path, content: Any = None) -> CocoIndex:
    return CocoIndex.load(*write(folder, content))


@pytest.mark.parametrize(("name", "split"), REAL)
def test_real_sets_have_the_counts_of_their_readme(shared: Path, name: str, split: str) -> None:
    folder = shared / "datasets" / name
    index = CocoIndex.load(folder / "annotations" / f"{split}.json", folder / "images")
    images, empty, boxes, crowd, segmented, classes = REAL[name, split]
    per_image = np.diff(index.offsets)
    assert len(index) == images
    assert (per_image == 0).sum() == empty
    assert (~index.crowd).sum() == boxes
    assert index.crowd.sum() == crowd
    assert (index.spans[:, 1] > 0).sum() == segmented
    assert len(index.classes) == len(index.category_ids) == classes
    assert index.notices == ()


def test_equal_to_pycocotools_on_real_coco(shared: Path) -> None:
    folder = shared / "datasets" / "coco_tiny"
    for split in ("train", "val"):
        path = folder / "annotations" / f"{split}.json"
        index, coco = CocoIndex.load(path, folder / "images"), COCO(path)
        assert index.image_ids.tolist() == [i["id"] for i in coco.dataset["images"]]
        assert index.classes == tuple(coco.cats[c]["name"] for c in sorted(coco.cats))
        assert sorted(index.annotation_ids.tolist()) == sorted(coco.anns)
        for i, image_id in enumerate(index.image_ids.tolist()):
            rows = index.rows(i)
            assert index.annotation_ids[rows].tolist() == coco.getAnnIds(image_id)
            assert index.file_name(i) == coco.imgs[image_id]["file_name"]
            for row in range(rows.start, rows.stop):
                truth = coco.anns[int(index.annotation_ids[row])]
                x, y, w, h = truth["bbox"]
                height, width = index.sizes[i]
                expected = np.clip([x, y, x + w, y + h], 0, [width, height, width, height]).astype(np.float32)
                assert np.array_equal(index.boxes[row], expected)
                assert index.area[row] == truth["area"]
                assert index.crowd[row] == truth["iscrowd"]
                assert index.category_ids[index.labels[row]] == truth["category_id"]
                assert index.image_of(row) == i
                mask = index.mask(row)
                assert mask is not None
                assert mask.dtype == bool
                assert np.array_equal(mask, coco.annToMask(truth))


def test_every_real_image_is_read(shared: Path) -> None:
    for name in ("coco_tiny", "aerial_cars"):
        folder = shared / "datasets" / name
        data = CocoData(CocoIndex.load(folder / "annotations" / "val.json", folder / "images"))
        for i in range(len(data)):
            sample = data[i]
            assert sample.image.shape == (*sample.original_size, 3)
            assert sample.image_id == data.index.image_ids[i]


def test_the_answer_for_a_small_file(tmp_path: Path) -> None:
    data = CocoData(load(tmp_path))
    index = data.index
    assert index.classes == ("cat", "dog")  # by rising category id, whatever the file's order
    assert index.category_ids.tolist() == [2, 5]
    assert index.image_ids.tolist() == [7, 3, 12]  # in the file's order
    assert index.offsets.tolist() == [0, 2, 5, 5]
    assert index.annotation_ids.tolist() == [102, 105, 101, 103, 104]
    assert index.annotated
    assert index.image_path(2) == tmp_path / "images" / "12.png"

    sample = data[1]
    assert sample.image.shape == (HEIGHT, WIDTH, 3)
    assert sample.image.dtype == np.uint8
    assert sample.boxes.tolist() == [[10, 5, 30, 25], [30.5, 10.25, 50.5, 22.25]]
    assert sample.boxes.dtype == np.float32
    assert sample.labels.tolist() == [1, 0]
    assert sample.labels.dtype == np.int64
    assert sample.rows.tolist() == [2, 3]
    assert sample.crowd.tolist() == [[0, 0, 10, 40]]
    assert sample.image_id == 3
    assert sample.original_size == (HEIGHT, WIDTH)

    empty = data[2]
    assert empty.boxes.shape == empty.crowd.shape == (0, 4)
    assert empty.rows.shape == empty.labels.shape == (0,)
    with pytest.raises(IndexError):
        data[3]


def test_masks_of_polygons_and_of_run_lengths_as_numbers_and_as_text(tmp_path: Path) -> None:
    content = document()
    counts = content["annotations"][3]["segmentation"]
    text = rle.frPyObjects(counts, HEIGHT, WIDTH)["counts"].decode()
    content["annotations"][4]["segmentation"] = {"size": [HEIGHT, WIDTH], "counts": text}
    index = load(tmp_path, content)
    square = np.zeros((HEIGHT, WIDTH), dtype=bool)
    square[5:25, 10:30] = True
    left = np.zeros((HEIGHT, WIDTH), dtype=bool)
    left[:, :10] = True
    masks = {int(i): index.mask(row) for row, i in enumerate(index.annotation_ids)}
    assert np.array_equal(masks[101], square)
    assert np.array_equal(masks[104], left)
    assert np.array_equal(masks[105], left)
    assert masks[102] is None
    assert index.segmentation(0) is None


@pytest.mark.parametrize("layout", [{"indent": 2}, {"separators": (",", ":")}, {"sort_keys": True}, {"indent": 0}])
def test_segmentations_are_found_in_any_layout_of_the_file(tmp_path: Path, layout: dict[str, Any]) -> None:
    content = document()
    content["info"] = {"description": 'é "segmentation": [1, 2] \\ { } ]', "segmentation": [[3]]}
    content["annotations"][0]["note"] = "größer"
    content["annotations"][1]["segmentation"] = None
    del content["annotations"][4]["segmentation"]
    for annotation in content["annotations"][:3:2]:
        annotation["segmentation"] = annotation.pop("segmentation")  # now the last key
    for bom in ("", "\ufeff"):
        index = load(tmp_path, bom + json.dumps(content, ensure_ascii=False, **layout))
        found = {int(i): index.segmentation(row) for row, i in enumerate(index.annotation_ids)}
        expected = {a["id"]: a.get("segmentation") or None for a in content["annotations"]}
        assert found == expected


def test_missing_area_and_iscrowd_are_filled_in_with_a_notice(tmp_path: Path, caplog: Any) -> None:
    content = document()
    for annotation in content["annotations"][:3]:
        del annotation["area"], annotation["iscrowd"]
    content["annotations"][4]["area"] = None
    with caplog.at_level(logging.WARNING):
        index = load(tmp_path, content)
    assert index.area[index.annotation_ids == 103] == 240
    assert index.area[index.annotation_ids == 105] == 400
    assert index.crowd.sum() == 1
    assert len(index.notices) == 2
    assert "`iscrowd` is missing in 3" in index.notices[0]
    assert "missing or no area in 4" in index.notices[1]
    assert [r.getMessage().count("annotations.json") for r in caplog.records] == [1, 1]


def test_boxes_are_clipped_and_those_without_area_left_out_with_a_notice(tmp_path: Path) -> None:
    content = document()
    boxes = [
        [-5, -5, 10, 10],
        [50, 30, 100, 100],
        [1, 1, 0, 5],
        [10, 10, -5, 5],
        [float("nan"), 0, 1, 1],
        [0, 0, float("inf"), 1],
        [60, 0, 5, 5],
        [5, -9, 4, 9],
    ]
    content["annotations"] = [
        {"id": 1 + k, "image_id": 7, "category_id": 2, "bbox": b, "area": 1, "iscrowd": 0} for k, b in enumerate(boxes)
    ]
    index = load(tmp_path, content)
    assert index.boxes.tolist() == [[0, 0, 5, 5], [50, 30, 60, 40]]
    assert index.annotation_ids.tolist() == [1, 2]
    assert index.notices == (
        "2 boxes with NaN or infinite numbers are left out (annotation ids 5, 6)",
        "2 boxes without width or height are left out (annotation ids 3, 4)",
        "2 boxes outside their image are left out (annotation ids 7, 8)",
    )


def test_categories_of_the_same_name_stay_apart(tmp_path: Path) -> None:
    content = document()
    content["categories"].append({"id": 9, "name": "cat"})
    index = load(tmp_path, content)
    assert index.classes == ("cat (2)", "dog", "cat (9)")
    assert "'cat'" in index.notices[0]


def test_a_test_split_without_annotations(tmp_path: Path) -> None:
    content = document()
    del content["annotations"]
    index = load(tmp_path, content)
    assert not index.annotated
    assert len(index) == 3
    assert index.boxes.shape == (0, 4)
    assert index.classes == ("cat", "dog")
    del content["categories"]
    assert load(tmp_path, content).classes == ()
    content = document() | {"annotations": []}
    assert load(tmp_path, content).annotated
    assert len(CocoData(load(tmp_path, content))[0].boxes) == 0
    assert len(load(tmp_path, {"images": [], "annotations": [], "categories": []})) == 0


def change(path: str, value: Any) -> Any:
    """A change of one place in the small file, such as annotations/0/bbox; `...` takes it out."""

    def apply(content: dict[str, Any]) -> None:
        *parents, last = [int(p) if p.isdigit() else p for p in path.split("/")]
        for key in parents:
            content = content[key]
        if value is ...:
            del content[last]
        else:
            content[last] = copy.deepcopy(value)

    return apply


BROKEN = {
    "image_id is not among `images`": change("annotations/1/image_id", 8),
    "annotation id 102: category_id 77 is not among `categories`": change("annotations/1/category_id", 77),
    "image id 7 occurs more than once": change("images/1/id", 7),
    "category id 5 occurs more than once": change("categories/1/id", 5),
    "annotation id 101 occurs more than once": change("annotations/1/id", 101),
    "annotation id 102: bbox is missing": change("annotations/1/bbox", ...),
    "annotation id 102: bbox is '1,2,3,4', expected [x, y, width, height]": change("annotations/1/bbox", "1,2,3,4"),
    "annotation id 102: bbox is [1, 2, 3], expected": change("annotations/1/bbox", [1, 2, 3]),
    "annotation id 102: bbox is [1, 2, 3, '4'], expected": change("annotations/1/bbox", [1, 2, 3, "4"]),
    "annotation id 102: bbox is [1, 2, 3, None], expected": change("annotations/1/bbox", [1, 2, 3, None]),
    "annotation id 102: bbox is [1, 2, 3, True], expected": change("annotations/1/bbox", [1, 2, 3, True]),
    "annotation id 102: image_id is '7', expected a whole number": change("annotations/1/image_id", "7"),
    "annotation id 102: image_id is 7.5, expected a whole number": change("annotations/1/image_id", 7.5),
    "annotation id 102: category_id is None, expected": change("annotations/1/category_id", None),
    "annotation id 102: category_id is missing": change("annotations/1/category_id", ...),
    "annotations[1]: id is missing": change("annotations/1/id", ...),
    "annotations[1]: id is [], expected a whole number": change("annotations/1/id", []),
    "annotations[1]: id is 9223372036854775808, expected": change("annotations/1/id", 2**63),
    "annotation id 102: iscrowd is 2, expected 0 or 1": change("annotations/1/iscrowd", 2),
    "annotation id 102: iscrowd is [0], expected 0 or 1": change("annotations/1/iscrowd", [0]),
    "annotation id 102: iscrowd is '1', expected 0 or 1": change("annotations/1/iscrowd", "1"),
    "annotation id 102: area is 'big', expected a number": change("annotations/1/area", "big"),
    "annotation id 102: segmentation is 0, expected": change("annotations/1/segmentation", 0),
    "annotation id 102: segmentation is 'text', expected": change("annotations/1/segmentation", "text"),
    "annotations[1] is 5, expected an object": change("annotations/1", 5),
    "images[0] is None, expected an object": change("images/0", None),
    "`images` is {}, expected a list": change("images", {}),
    "`annotations` is None, expected a list": change("annotations", None),
    "`categories` is missing": change("categories", ...),
    "image id 3: height is missing": change("images/1/height", ...),
    "image id 3: height is '40', expected a whole number": change("images/1/height", "40"),
    "image id 3: height 40, width 0, expected at least 1": change("images/1/width", 0),
    "image id 3: file_name is missing": change("images/1/file_name", ...),
    "image id 3: file_name is '', expected a text": change("images/1/file_name", ""),
    "category id 5: name is 3, expected a text": change("categories/0/name", 3),
    "not a COCO annotation file": change("images", ...),
}


@pytest.mark.parametrize("message", BROKEN)
def test_broken_files_are_refused_with_the_place_and_what_to_do(tmp_path: Path, message: str) -> None:
    content = document()
    BROKEN[message](content)
    with pytest.raises(DataError) as error:
        load(tmp_path, content)
    said = str(error.value).replace("image_id 8 is", "image_id is")
    assert said.startswith(f"{tmp_path / 'annotations.json'}: ")
    assert message in said
    assert "\n" not in said


@pytest.mark.parametrize(
    "name",
    ["../secret.png", "a/../../b.png", "/etc/passwd", "C:\\x.png", "c:x.png", "..\\x.png", "\\\\host\\x", "a/..", "\0"],
)
def test_a_file_name_that_leaves_the_folder_is_refused(tmp_path: Path, name: str) -> None:
    content = document()
    content["images"][1]["file_name"] = name
    with pytest.raises(DataError, match=r"image id 3: file_name .* leaves the image folder.*check_data\.py"):
        load(tmp_path, content)


def test_harmless_file_names_are_not_refused(tmp_path: Path) -> None:
    content = document()
    names = ["sub/dir/x..y.png", "..hidden.png", "größe 1.png"]
    for image, name in zip(content["images"], names, strict=True):
        image["file_name"] = name
    index = load(tmp_path, content)
    assert [index.file_name(i) for i in range(3)] == names


def test_files_that_are_not_coco_or_not_json(tmp_path: Path) -> None:
    path, images = write(tmp_path)
    whole = path.read_text()

    def message(text: str | bytes) -> str:
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        with pytest.raises(DataError) as error:
            CocoIndex.load(path, images)
        assert str(error.value).startswith(str(path))
        return str(error.value)

    for stop in range(1, len(whole), 37):
        assert "the file is cut off" in message(whole[:stop]), whole[:stop][-30:]
    assert "line 1, column" in message(whole[:200])
    assert "line 3, column 1: not valid JSON" in message('{"images": [],\n\n]}')
    assert "check_data.py" in message('{"images": [],\n\n]}')
    assert "empty" in message("")
    assert "empty" in message(" \n ")
    assert "UTF-8" in message(whole.encode("utf-16"))
    assert "a list of detections" in message('[{"image_id": 1, "score": 0.5}]')
    assert "a list, expected" in message("[]")
    assert "keys ['shapes', 'version']" in message('{"version": 1, "shapes": []}')
    assert "not a COCO" in message("7")
    assert "nested too deeply" in message("[" * 100_000)
    path.unlink()
    with pytest.raises(DataError, match=r"annotations\.json: cannot read .*No such file"):
        CocoIndex.load(path, images)
    with pytest.raises(DataError, match="no such image folder"):
        CocoIndex.load(path, tmp_path / "nowhere")


def test_a_wrong_segmentation_is_named_when_its_mask_is_asked_for(tmp_path: Path) -> None:
    wrong = {
        "4 numbers, expected at least 6": [[1, 2, 3, 4]],
        "expected an even count": [[1, 2, 3, 4, 5, 6, 7]],
        "NaN or infinite": [[1, 2, 3, 4, 5, float("nan")]],
        "not a list of numbers": [[1, 2, 3, 4, 5, "6"]],
        "size [40, 61], expected": {"size": [40, 61], "counts": [2440]},
        "of 7 pixels, expected 2400": {"size": [40, 60], "counts": [7]},
        "invalid counts": {"size": [40, 60], "counts": [-2400, 4800]},
        "without `counts`": {"size": [40, 60]},
        "a run-length encoding of": {"size": [40, 60], "counts": "04"},
        "encoding with invalid counts": {"size": [40, 60], "counts": "oooooooooooo"},
        "encoding without": {"size": [40, 60], "counts": {"a": {}}},
    }
    for message, segmentation in wrong.items():
        content = document()
        content["annotations"][0]["segmentation"] = segmentation
        index = load(tmp_path, content)
        row = index.annotation_ids.tolist().index(101)
        with pytest.raises(DataError) as error:
            index.mask(row)
        assert "annotation id 101: segmentation" in str(error.value)
        assert message in str(error.value)
        other = index.mask(index.annotation_ids.tolist().index(104))
        assert other is not None
        assert other.sum() == 400


def test_a_file_that_changes_while_in_use_is_noticed(tmp_path: Path) -> None:
    index = load(tmp_path)
    index.annotations.write_text(index.annotations.read_text() + " ")
    with pytest.raises(DataError, match="was changed while in use"):
        index.segmentation(2)


def test_an_image_of_another_size_is_refused(tmp_path: Path) -> None:
    content = document()
    content["images"][0]["width"] = WIDTH - 1
    data = CocoData(load(tmp_path, content))
    with pytest.raises(DataError, match=r"7\.png: the image has height, width 40, 60, but the annotations say 40, 59"):
        data[0]


def test_the_index_is_flat_and_travels_to_workers(tmp_path: Path) -> None:
    index = load(tmp_path)
    again = pickle.loads(pickle.dumps(index))
    assert np.array_equal(again.boxes, index.boxes)
    assert again.mask(2).sum() == 400
    for value in vars(index).values():
        assert not isinstance(value, list | dict)
        assert not isinstance(value, np.ndarray) or value.dtype != object


def test_twenty_thousand_images(tmp_path: Path) -> None:
    """Against a plain construction of the same arrays."""
    rng = np.random.default_rng(0)
    n, m = 20_000, 150_000
    ids = rng.permutation(10 * n)[:n].tolist()
    image = rng.integers(0, n, m)
    xywh = np.round(rng.uniform([0, 0, 1, 1], [300, 200, 300, 200], (m, 4)), 2)
    category = rng.integers(1, 91, m).tolist()
    content = {
        "images": [{"id": i, "file_name": f"{i:012d}.jpg", "height": 480, "width": 640} for i in ids],
        "categories": [{"id": c, "name": f"class {c}"} for c in range(90, 0, -1)],
        "annotations": [
            {"segmentation": [[x, y, x + w, y, x, y + h]], "id": k + 1, "image_id": ids[i], "category_id": c,
             "bbox": [x, y, w, h], "area": w * h / 2, "iscrowd": int(k % 100 == 0)}
            for k, (i, (x, y, w, h), c) in enumerate(zip(image.tolist(), xywh.tolist(), category, strict=True))
        ],
    }  # fmt: skip
    path = tmp_path / "large.json"
    path.write_text(json.dumps(content))
    index = CocoIndex.load(path, tmp_path)
    order = np.argsort(image, kind="stable")
    assert index.image_ids.tolist() == ids
    assert np.array_equal(index.annotation_ids, order + 1)
    assert np.array_equal(index.offsets, np.searchsorted(image[order], np.arange(n + 1)))
    assert np.array_equal(index.labels, np.array(category)[order] - 1)
    corners = np.concatenate([xywh[:, :2], xywh[:, :2] + xywh[:, 2:]], 1)[order].astype(np.float32)
    assert np.array_equal(index.boxes, corners)
    assert index.file_name(n - 1) == f"{ids[-1]:012d}.jpg"
    assert index.segmentation(77)[0][:2] == xywh[order[77], :2].tolist()
    assert index.notices == ()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_without_permission(tmp_path: Path) -> None:
    path, images = write(tmp_path)
    path.chmod(0)
    with pytest.raises(DataError, match="Permission denied"):
        CocoIndex.load(path, images)
