"""COCO's numbers: known ones, pycocotools' on random data, and what has no number."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from detector.errors import UserError
from detector.evaluate.coco import NUMBERS, CocoEvaluator, CocoResult, score_file
from detector.structures import Detections

CASES = [
    ("cocoapi_val2014_100", "bbox"),
    ("cocoapi_val2014_100", "segm"),
    ("fastestdet_coco_val", "bbox"),
    ("stress", "bbox"),
    ("hotcoco_basic", "bbox"),
    ("hotcoco_edge", "bbox"),
    ("hotcoco_zero_ids", "bbox"),
]
ENGINES = ["hotcoco", "pycocotools"]


def image(i: int, size: int = 400) -> dict[str, Any]:
    return {"id": i, "file_name": f"{i}.jpg", "height": size, "width": size}


def annotation(i: int, image_id: int, category: int, box: list[float], crowd: int = 0) -> dict[str, Any]:
    area = box[2] * box[3]
    return {"id": i, "image_id": image_id, "category_id": category, "bbox": box, "area": area, "iscrowd": crowd}


def document(
    annotations: list[dict[str, Any]], images: int = 2, categories: tuple[int, ...] = (1, 2)
) -> dict[str, Any]:
    return {
        "images": [image(i + 1) for i in range(images)],
        "categories": [{"id": c, "name": f"class {c}"} for c in categories],
        "annotations": annotations,
    }


def found(boxes: list[list[float]], scores: list[float], labels: list[int]) -> Detections:
    return Detections(torch.tensor(boxes).reshape(-1, 4), torch.tensor(scores), torch.tensor(labels, dtype=torch.long))


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(("name", "iou_type"), CASES)
def test_known_scores(shared: Path, name: str, iou_type: str, engine: Any) -> None:
    folder = shared / "eval_fixtures" / name
    expected = json.loads((folder / "expected.json").read_text())[iou_type]
    files = folder / "gt.json", folder / f"dt_{iou_type}.json"
    result = score_file(*files, engine, 100, None, use_classes=True)
    if name == "hotcoco_zero_ids" and engine == "hotcoco":
        # pycocotools takes a match with the annotation of id 0 for none; every detection is perfect.
        perfect = {**dict.fromkeys(NUMBERS, 1.0), "AR_1": 2 / 3}  # one image has two of the three objects
        undefined = {n: -1.0 for n, value in expected["stats"].items() if value == -1}
        assert result.numbers == pytest.approx({**perfect, **undefined}, abs=1e-9)
        return
    assert list(result.numbers) == list(NUMBERS)
    assert result.numbers == pytest.approx(expected["stats"], abs=1e-9)
    assert result.per_iou == pytest.approx(expected["ap_per_iou"], abs=1e-9)
    for score in result.per_class:
        known = expected["per_category"][str(score.category_id)]
        assert (score.ap, score.ap50, score.ar) == pytest.approx(
            (known["AP"], known["AP50"], known["AR_100"]), abs=1e-9
        )
    assert len(result.per_class) == len(expected["per_category"])
    if "stats_classes_ignored" in expected:
        ignored = score_file(*files, engine, 100, None, use_classes=False)
        assert ignored.numbers == pytest.approx(expected["stats_classes_ignored"], abs=1e-9)
        assert ignored.per_class == ()


def random_case(seed: int) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Ties, crowds, copies, empty images, ids in no order, boxes on the borders of sizes."""
    rng = np.random.default_rng(seed)
    images = rng.permutation(50)[: rng.integers(1, 6)] + 1
    categories = rng.permutation(20)[: rng.integers(1, 4)] + 1
    annotations = []
    for i in range(int(rng.integers(1, 25))):
        box = np.concatenate([rng.integers(0, 200, 2), rng.choice([8, 32, 33, 96, 97, 150], 2)]).astype(float).tolist()
        place = int(rng.choice(images)), int(rng.choice(categories))
        annotations.append(annotation(1000 - i, *place, box, int(rng.random() < 0.15)))
    detections = []
    for _ in range(int(rng.integers(1, 60))):
        source = annotations[int(rng.integers(len(annotations)))]
        box = np.array(source["bbox"]) + (rng.normal(0, 6, 4) if rng.random() < 0.7 else 0)
        box[2:] = abs(box[2:])
        detections.append(
            {
                "image_id": int(rng.choice(images)) if rng.random() < 0.2 else source["image_id"],
                "category_id": int(rng.choice(categories)) if rng.random() < 0.2 else source["category_id"],
                "bbox": box.tolist(),
                "score": float(rng.choice([0.1, 0.5, 0.9]) if rng.random() < 0.5 else rng.random()),
            }
        )
    truth = document(annotations, 0, tuple(categories.tolist()))
    truth["images"] = [image(int(i)) for i in images]
    return truth, detections


def score(truth: dict[str, Any], detections: list[dict[str, Any]], engine: Any, max_dets: int = 100) -> CocoResult:
    evaluator = CocoEvaluator(truth, engine, max_dets)
    evaluator.add_list(detections, "detections")
    return evaluator.result()


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**31), st.sampled_from([1, 3, 100, 200]))
def test_engines_agree_to_the_last_bit(seed: int, max_dets: int) -> None:
    truth, detections = random_case(seed)
    assert score(truth, detections, "hotcoco", max_dets) == score(truth, detections, "pycocotools", max_dets)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**31))
def test_is_what_pycocotools_prints(seed: int) -> None:
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    truth, detections = random_case(seed)
    known = COCO()
    known.dataset = copy.deepcopy(truth)
    known.createIndex()
    evaluation = COCOeval(known, known.loadRes(copy.deepcopy(detections)), "bbox")
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    assert list(score(truth, detections, "hotcoco").numbers.values()) == evaluation.stats.tolist()


@pytest.mark.parametrize("engine", ENGINES)
def test_detections_of_a_model(engine: Any, tmp_path: Path) -> None:
    """Labels become category ids, corners become sizes, and the written file has the same scores."""
    truth = document(
        [annotation(1, 1, 7, [10, 20, 30.3, 40.7]), annotation(2, 2, 3, [5, 5, 100, 100])], categories=(7, 3)
    )
    evaluator = CocoEvaluator(truth, engine)
    evaluator.add([1], [found([[10, 20, 40.3, 60.7], [200, 200, 210, 210]], [0.9, 0.3], [1, 0])])
    evaluator.add(torch.tensor([2]), [found([[5, 5, 105, 90]], [0.8], [0])])
    result = evaluator.result()
    assert result.numbers["AP50"] == pytest.approx(1)
    assert [(c.category_id, c.name, c.objects) for c in result.per_class] == [(3, "class 3", 1), (7, "class 7", 1)]
    assert [c.ap for c in result.per_class] == pytest.approx([0.8, 1], abs=1e-9)  # IoU 0.85 passes 8 of 10 thresholds

    path = tmp_path / "new" / "found.json"
    evaluator.write_detections(path)
    assert json.loads(path.read_text())[0] == {
        "image_id": 1,
        "category_id": 7,
        "bbox": pytest.approx([10, 20, 30.3, 40.7], abs=1e-5),
        "score": pytest.approx(0.9),
    }
    again = CocoEvaluator(truth, engine)
    again.add_file(path)
    assert again.result() == result


def test_labels_may_have_an_order_of_their_own() -> None:
    truth = document([annotation(1, 1, 7, [10, 20, 30, 40])], categories=(3, 7))
    evaluator = CocoEvaluator(truth, category_ids=[7, 3])
    evaluator.add([1], [found([[10, 20, 40, 60]], [0.9], [0])])
    assert evaluator.result().numbers["AP"] == pytest.approx(1)
    with pytest.raises(UserError, match="no category with the id 5"):
        CocoEvaluator(truth, category_ids=[3, 5])


@pytest.mark.parametrize("seed", range(3))
def test_written_file_scores_the_same(seed: int, tmp_path: Path) -> None:
    truth, detections = random_case(seed)
    evaluator = CocoEvaluator(truth)
    ids = [d["image_id"] for d in detections]
    labels = {c: k for k, c in enumerate(sorted(c["id"] for c in truth["categories"]))}
    for image_id in sorted(set(ids)):
        mine = [d for d in detections if d["image_id"] == image_id]
        xywh = torch.tensor([d["bbox"] for d in mine])
        boxes = torch.cat([xywh[:, :2], xywh[:, :2] + xywh[:, 2:]], 1)
        scores = torch.tensor([d["score"] for d in mine])
        evaluator.add([image_id], [Detections(boxes, scores, torch.tensor([labels[d["category_id"]] for d in mine]))])
    result = evaluator.result()
    evaluator.write_detections(tmp_path / "found.json")
    for engine in ENGINES:
        assert score(truth, json.loads((tmp_path / "found.json").read_text()), engine) == result


@pytest.mark.parametrize("engine", ENGINES)
def test_nothing_found(engine: Any, tmp_path: Path) -> None:
    evaluator = CocoEvaluator(document([annotation(1, 1, 1, [10, 20, 30, 40])]), engine)
    evaluator.add([1, 2], [found([], [], []), found([], [], [])])
    evaluator.add([], [])
    result = evaluator.result()
    assert result.numbers["AP"] == result.numbers["AR_100"] == 0
    assert result.numbers["AP_small"] == -1
    evaluator.write_detections(tmp_path / "found.json")
    assert json.loads((tmp_path / "found.json").read_text()) == []
    assert CocoEvaluator(document([annotation(1, 1, 1, [10, 20, 30, 40])]), engine).result() == result


@pytest.mark.parametrize("engine", ENGINES)
def test_minus_one_is_explained(engine: Any) -> None:
    box = [10, 20, 20, 20]
    result = CocoEvaluator(document([annotation(1, 1, 1, box)]), engine).result()
    assert [n for n in result.notes if "AP_medium and AR_medium are -1" in n and "no medium object" in n]
    assert [n for n in result.notes if "AP_large and AR_large are -1" in n]
    assert len(result.notes) == 2
    for truth, what in (
        (document([]), "holds no object"),
        (document([annotation(1, 1, 1, box, crowd=1)]), "holds no object but crowd regions"),
        (document([], images=0), "holds no object"),
        (document([], categories=()), "holds no object"),
    ):
        result = CocoEvaluator(truth, engine).result()
        assert set(result.numbers.values()) == {-1.0}
        assert len(result.notes) == 1
        assert what in result.notes[0]


@pytest.mark.parametrize("engine", ENGINES)
def test_more_than_a_hundred_detections(engine: Any) -> None:
    """150 objects in one image, all found with falling score."""
    boxes = [[20.0 * (i % 15), 20.0 * (i // 15), 10.0, 10.0] for i in range(150)]
    truth = document([annotation(i + 1, 1, 1, box) for i, box in enumerate(boxes)], images=1)
    detections = [{"image_id": 1, "category_id": 1, "bbox": box, "score": 1 - i / 1000} for i, box in enumerate(boxes)]
    usual = score(truth, detections, engine).numbers
    assert usual["AR_100"] == pytest.approx(100 / 150)
    assert usual["AP"] == pytest.approx(67 / 101)
    more = score(truth, detections, engine, 300)
    assert list(more.numbers) == [*NUMBERS, "AR_300"]
    assert [more.numbers[n] for n in ("AP", "AR_300", "AR_small")] == pytest.approx([1, 1, 1])
    assert more.numbers["AR_100"] == pytest.approx(100 / 150)
    assert more.numbers["AR_10"] == pytest.approx(10 / 150)
    assert any("up to 300 detections" in note for note in more.notes)
    fewer = score(truth, detections, engine, 5).numbers
    assert list(fewer) == list(NUMBERS)
    assert fewer["AR_100"] == fewer["AR_10"] == pytest.approx(5 / 150)
    assert fewer["AR_1"] == pytest.approx(1 / 150)


def test_lines_and_json() -> None:
    result = CocoEvaluator(document([annotation(1, 1, 1, [10, 20, 30, 40])])).result()
    assert result.lines()[:4] == ["AP 0.000", "AP50 0.000", "AP75 0.000", "AP_small -1.000"]
    written = json.loads(json.dumps(result.as_json()))
    assert {name: written[name] for name in NUMBERS} == result.numbers
    assert written["per_class"][1]["name"] == "class 2"
    assert list(written["per_iou"])[::9] == ["0.50", "0.95"]


def test_mistakes_while_adding() -> None:
    evaluator = CocoEvaluator(document([annotation(1, 1, 1, [10, 20, 30, 40])]))
    with pytest.raises(UserError, match="no image with the id 9"):
        evaluator.add([9], [found([[0, 0, 1, 1]], [0.5], [0])])
    with pytest.raises(UserError, match=r"image 2: .*not finite"):
        evaluator.add([2], [found([[0, 0, float("nan"), 1]], [0.5], [0])])
    with pytest.raises(UserError, match="max_dets is 0"):
        CocoEvaluator(document([]), max_dets=0)


def test_scoring_files_needs_no_torch() -> None:
    code = (
        "import sys, detector.evaluate.coco, detector.evaluate.report, detector.cli.eval; print('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"
