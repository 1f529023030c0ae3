"""Results and annotation files that are wrong: one sentence that names the file, the place and the key."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from detector.errors import DataError, UserError
from detector.evaluate.coco import CocoEvaluator, score_file

GOOD = {"image_id": 1, "category_id": 7, "bbox": [1, 2, 3, 4], "score": 0.5}
TRUTH: dict[str, Any] = {
    "images": [{"id": 1, "file_name": "1.jpg", "height": 10, "width": 10}],
    "categories": [{"id": 7, "name": "cat"}],
    "annotations": [{"id": 3, "image_id": 1, "category_id": 7, "bbox": [1, 2, 3, 4], "area": 12, "iscrowd": 0}],
}


def write(path: Path, content: Any) -> Path:
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def score(tmp_path: Path, detections: Any, truth: Any = TRUTH, iou_type: Any = None) -> Any:
    files = write(tmp_path / "truth.json", truth), write(tmp_path / "found.json", detections)
    return score_file(*files, "hotcoco", 100, iou_type, use_classes=True)


@pytest.mark.parametrize(
    ("detections", "message"),
    [
        ("", "the file is empty"),
        ("[{", "line 1"),
        ('{"a": 1}', "expected a list"),
        (TRUTH, "these are annotations"),
        ([GOOD, 3], "detection 1 is 3, expected an object"),
        ([GOOD, {**GOOD, "image_id": 2}], "detection 1: `image_id` 2 is no image of .*truth.json.*1 of 2"),
        ([{**GOOD, "image_id": "1"}], "detection 0: `image_id` is '1', expected an integer"),
        ([{**GOOD, "image_id": None}], "detection 0: `image_id` is None"),
        ([{**GOOD, "category_id": 1}], "detection 0: `category_id` 1 is no category of"),
        ([{**GOOD, "category_id": True}], "`category_id` is True, expected an integer"),
        ([GOOD, GOOD, {**GOOD, "score": float("nan")}], "detection 2: `score` is nan, expected a finite number"),
        ([{**GOOD, "score": "high"}], "`score` is 'high'"),
        ([{**GOOD, "bbox": [1, 2, 3]}], r"detection 0: `bbox` is \[1, 2, 3\], expected four finite numbers"),
        ([{**GOOD, "bbox": [1, 2, 3, float("inf")]}], "detection 0: `bbox`"),
        ([{**GOOD, "bbox": [1, 2, 3, 10**400]}], "detection 0: `bbox`"),
        ([{**GOOD, "bbox": [1, 2, -3, 4]}], "the last two of them not negative"),
        ([{**GOOD, "bbox": 5}], "detection 0: `bbox` is 5"),
        *(
            ([GOOD, {k: v for k, v in GOOD.items() if k != key}], f"detection 1: `{key}` is missing")
            for key in ("image_id", "category_id", "score", "bbox")
        ),
    ],
)
def test_wrong_results(tmp_path: Path, detections: Any, message: str) -> None:
    with pytest.raises(DataError, match=message) as error:
        score(tmp_path, detections)
    assert str(error.value).startswith(str(tmp_path / "found.json"))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("truth", "message"),
    [
        ("", "empty"),
        ("[]", "expected a COCO annotation file"),
        ({**TRUTH, "annotations": [{**TRUTH["annotations"][0], "bbox": [1, 2]}]}, "annotation id 3: bbox"),
        ({**TRUTH, "annotations": TRUTH["annotations"] * 2}, "annotation id 3 occurs more than once"),
        ({**TRUTH, "images": TRUTH["images"] * 2}, "image id 1 occurs more than once"),
        ({**TRUTH, "categories": [{"name": "cat"}]}, "id is missing"),
        ({**TRUTH, "annotations": [{**TRUTH["annotations"][0], "area": "big"}]}, "annotation id 3: area is 'big'"),
    ],
)
def test_wrong_annotations(tmp_path: Path, truth: Any, message: str) -> None:
    with pytest.raises(DataError, match=message) as error:
        score(tmp_path, [GOOD], truth)
    assert str(error.value).startswith(str(tmp_path / "truth.json"))


@pytest.mark.parametrize("name", ["truth.json", "found.json"])
def test_missing_file(tmp_path: Path, name: str) -> None:
    write(tmp_path / "truth.json", TRUTH)
    write(tmp_path / "found.json", [GOOD])
    (tmp_path / name).unlink()
    with pytest.raises(DataError, match=rf"{name}: cannot read .*No such file"):
        score_file(tmp_path / "truth.json", tmp_path / "found.json", "hotcoco", 100, None, use_classes=True)


def test_what_other_tools_leave_out(tmp_path: Path) -> None:
    """No area, no iscrowd: the box's area, no crowd."""
    bare = {key: TRUTH["annotations"][0][key] for key in ("id", "image_id", "category_id", "bbox")}
    result = score(tmp_path, [GOOD], {**TRUTH, "annotations": [bare]})
    assert [result.numbers["AP_small"], result.numbers["AR_100"]] == pytest.approx([1, 1])


def test_annotations_that_cannot_be_scored_are_told(tmp_path: Path) -> None:
    first = TRUTH["annotations"][0]
    wrong = [
        {**first, "id": 4, "image_id": 9},
        {**first, "id": 5, "category_id": 9},
        {**first, "id": 6, "bbox": [float("nan"), 1, 2, 3]},
    ]
    result = score(tmp_path, [GOOD], {**TRUTH, "annotations": [first, *wrong]})
    assert result.numbers["AP"] == pytest.approx(1)
    told = [note for note in result.notes if "not scored" in note]
    assert [note.split(" annotations ")[1] for note in told] == [
        "of unknown images are not scored",
        "of unknown categories are not scored",
        "with NaN in the box are not scored",
    ]


def test_masks(tmp_path: Path) -> None:
    square = [[1.0, 1.0, 5.0, 1.0, 5.0, 5.0, 1.0, 5.0]]
    truth = {**TRUTH, "annotations": [{**TRUTH["annotations"][0], "segmentation": square}]}
    only_mask = {key: value for key, value in GOOD.items() if key != "bbox"} | {"segmentation": square}
    assert score(tmp_path, [only_mask], truth).numbers["AP"] == pytest.approx(1)  # nothing but masks: masks are scored
    both = {**only_mask, "bbox": [6, 6, 1, 1]}
    assert score(tmp_path, [both], truth).numbers["AP"] == 0  # boxes are
    assert score(tmp_path, [both], truth, "segm").numbers["AP"] == pytest.approx(1)
    with pytest.raises(DataError, match="annotation id 3: segmentation is None"):
        score(tmp_path, [only_mask])
    with pytest.raises(DataError, match="detection 0: `segmentation` is missing"):
        score(tmp_path, [GOOD], truth, "segm")


def test_zero_annotation_id_is_told_for_pycocotools() -> None:
    truth = {**TRUTH, "annotations": [{**TRUTH["annotations"][0], "id": 0}]}
    assert any("annotation has the id 0" in note for note in CocoEvaluator(truth, "pycocotools").result().notes)
    assert not any("id 0" in note for note in CocoEvaluator(truth, "hotcoco").result().notes)


def test_unwritable(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file" / "x.json", tmp_path):
        with pytest.raises(UserError, match="cannot write the file"):
            CocoEvaluator(TRUTH).write_detections(path)
    assert not list(tmp_path.parent.glob("*.part"))
