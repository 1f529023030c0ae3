"""`pseudo_label`: annotations from a checkpoint, which can be trained on."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch

import detector
from detector.cli.pseudo_label import main
from detector.cli.train import main as train
from detector.data.coco import CocoData, CocoIndex
from tests.data.formats.make import load
from tests.trained import checkpoint

CLASSES = ("cat", "big dog")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoint(tmp_path_factory.mktemp("run"), classes=CLASSES).parent


@pytest.fixture
def images(tmp_path: Path) -> Path:
    for i, name in enumerate(("a.png", "clip/b.png", "c.png")):
        (tmp_path / "images" / name).parent.mkdir(parents=True, exist_ok=True)
        picture = np.random.default_rng(i).integers(0, 255, (48, 64 + 4 * i, 3), dtype=np.uint8)
        cv2.imwrite(str(tmp_path / "images" / name), picture)
    return tmp_path / "images"


def call(*arguments: object) -> int:
    return main([*map(str, arguments), "--device", "cpu", "--raw"])


def test_a_folder(run: Path, images: Path, tmp_path: Path, capsys: Any) -> None:
    out = tmp_path / "labels.json"
    options = ("--threshold", "big dog=0.37", "0.35", "--weight", "score", "--batch-size", 2)
    assert call(run, images, "--out", out, *options) == 0
    said = capsys.readouterr().out
    document = load(out, images)
    names = {c["id"]: c["name"] for c in document["categories"]}
    assert names == {1: "cat", 2: "big dog"}
    assert {i["file_name"] for i in document["images"]} <= {"a.png", "clip/b.png", "c.png"}

    # The same as the detector itself finds, thresholds aside.
    find = detector.load(run / "best.pt", "cpu", weights="raw")
    wanted = []
    for image in document["images"]:
        found = find(str(images / image["file_name"]))
        for box, score, name in zip(found.boxes.tolist(), found.scores.tolist(), found.names, strict=True):
            if score >= {"cat": 0.35, "big dog": 0.37}[name]:
                wanted.append((image["file_name"], name, pytest.approx(box, abs=2e-3), pytest.approx(score, abs=1e-5)))
    files = {i["id"]: i["file_name"] for i in document["images"]}
    got = []
    for a in document["annotations"]:
        x, y, w, h = a["bbox"]
        got.append((files[a["image_id"]], names[a["category_id"]], [x, y, x + w, y + h], a["score"]))
        assert a["weight"] == a["score"]
    assert {g[1] for g in got} == set(CLASSES)
    assert got == wanted
    for name in CLASSES:
        assert f"{name}: {sum(g[1] == name for g in got)} (" in said
    origin = document["info"]["pseudo_labels"]
    assert origin["thresholds"] == {"cat": 0.35, "big dog": 0.37}
    assert origin["sha256"] == hashlib.sha256((run / "best.pt").read_bytes()).hexdigest()
    assert origin["weight"] == "score"


def test_a_coco_file_keeps_its_ids(run: Path, images: Path, tmp_path: Path, capsys: Any) -> None:
    source = tmp_path / "unlabelled.json"
    entries = [
        {"id": 71, "file_name": "c.png", "height": 48, "width": 72, "license": 3},
        {"id": 7, "file_name": "missing.png", "height": 48, "width": 64},
    ]
    source.write_text(json.dumps({"images": entries}))
    out = tmp_path / "labels.json"
    options = ("--threshold", 0.35, "--weight", 0.25)
    assert call(run, source, "--image-folder", images, "--out", out, *options) == 0
    captured = capsys.readouterr()
    assert "missing.png" in captured.err
    assert "1 could not be read" in captured.out
    document = load(out, images)
    assert document["images"] == entries[:1]
    assert {(a["image_id"], a["weight"]) for a in document["annotations"]} == {(71, 0.25)}
    index = CocoIndex.load(out, images)
    assert index.weight is not None
    assert set(index.weight.tolist()) == {0.25}
    weight = CocoData(index)[0].weight
    assert weight is not None
    assert len(weight) == len(document["annotations"])


def test_nms_of_ones_own(run: Path, images: Path, tmp_path: Path) -> None:
    counts = []
    for options in ((), ("--nms-iou", 0.05), ("--max-detections", 2)):
        out = tmp_path / "labels.json"
        assert call(run, images, "--out", out, "--threshold", 0.3, "--force", *options) == 0
        document = json.loads(out.read_text())
        counts.append(len(document["annotations"]))
        decode = document["info"]["pseudo_labels"]["decode"]
        assert (decode["nms_iou"], decode["max_detections"]) == (
            0.05 if "--nms-iou" in options else 0.6,
            2 if "--max-detections" in options else 100,
        )
    assert counts[1] < counts[0]
    assert counts[2] <= 6


def test_the_checkpoints_category_ids_are_used(images: Path, tmp_path: Path) -> None:
    path = checkpoint(tmp_path, classes=CLASSES)
    content = torch.load(path, weights_only=True)
    torch.save({**content, "category_ids": [17, 90]}, path)
    out = tmp_path / "labels.json"
    assert call(path, images, "--out", out, "--threshold", 0.35) == 0
    document = load(out, images)
    assert [(c["id"], c["name"]) for c in document["categories"]] == [(17, "cat"), (90, "big dog")]
    assert {a["category_id"] for a in document["annotations"]} == {17, 90}
    assert {a["weight"] for a in document["annotations"]} == {1.0}


def test_images_in_which_nothing_is_found(run: Path, images: Path, tmp_path: Path, capsys: Any) -> None:
    out = tmp_path / "labels.json"
    assert call(run, images, "--out", out, "--threshold", 0.3) == 0
    scores = {a["image_id"]: 0.0 for a in json.loads(out.read_text())["annotations"]}
    for a in json.loads(out.read_text())["annotations"]:
        scores[a["image_id"]] = max(scores[a["image_id"]], a["score"])
    between = sorted(scores.values())[-2:]
    threshold = str(sum(between) / 2)  # one image is above it
    assert call(run, images, "--out", out, "--threshold", threshold, "--force") == 0
    assert "2 images in which nothing was sure enough are left out" in " ".join(capsys.readouterr().out.split())
    assert len(load(out, images)["images"]) == 1
    assert call(run, images, "--out", out, "--threshold", threshold, "--force", "--keep-empty") == 0
    assert "2 images in which nothing was sure enough are kept as background" in capsys.readouterr().out
    assert len(load(out, images)["images"]) == 3


def test_nothing_found_is_said_and_nothing_written(run: Path, images: Path, tmp_path: Path, capsys: Any) -> None:
    out = tmp_path / "labels.json"
    assert call(run, images, "--out", out, "--threshold", 0.999) == 2
    message = capsys.readouterr().err
    assert "no object in 3 images reaches its threshold (the highest score is 0." in message
    assert not out.exists()
    for path in images.rglob("*.png"):
        path.write_bytes(b"broken")
    assert call(run, images, "--out", out) == 2
    assert "no image could be read" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["none.pt", "IMAGES"], "no such checkpoint"),
        (["RUN", "IMAGES", "--threshold", "cat=0.5"], "class 'big dog' has none"),
        (["RUN", "IMAGES", "--threshold", "cow=0.5", "0.5"], "no such class, expected one of cat, big dog"),
        (["RUN", "IMAGES", "--threshold", "1.5"], "expected a score between 0 and 1"),
        (["RUN", "IMAGES", "--nms-iou", "7"], "nms_iou"),
        (["RUN", "EMPTY"], "holds no image"),
        (["RUN", "none.json"], "give its images by --image-folder"),
        (["RUN", "LABELLED", "--image-folder", "IMAGES"], "has 1 annotations, expected none"),
        (["RUN", "IMAGES", "--out", "LABELLED"], "exists already"),
    ],
)
def test_mistakes(run: Path, images: Path, tmp_path: Path, capsys: Any, arguments: list[str], said: str) -> None:
    (tmp_path / "empty").mkdir()
    document = {
        "images": [{"id": 1, "file_name": "a.png", "height": 48, "width": 64}],
        "annotations": [{"id": 1, "image_id": 1, "category_id": 1, "bbox": [1, 1, 5, 5], "area": 25, "iscrowd": 0}],
        "categories": [{"id": 1, "name": "cat"}],
    }
    labelled = tmp_path / "labelled.json"
    labelled.write_text(json.dumps(document))
    places = {"RUN": run, "IMAGES": images, "EMPTY": tmp_path / "empty", "LABELLED": labelled}
    out = [] if "--out" in arguments else ["--out", tmp_path / "labels.json"]
    assert call(*(places.get(a, a) for a in arguments), *out) == 2
    captured = capsys.readouterr()
    assert said in captured.err
    assert "Traceback" not in captured.err
    assert not (tmp_path / "labels.json").exists()


@pytest.mark.parametrize("weight", ["-1", "much", "nan"])
def test_usage(run: Path, images: Path, weight: str) -> None:
    with pytest.raises(SystemExit) as left:
        call(run, images, "--out", "x.json", "--weight", weight)
    assert left.value.code == 2


def test_a_run_trains_on_it(run: Path, images: Path, tmp_path: Path, capsys: Any) -> None:
    out = tmp_path / "labels.json"
    assert call(run, images, "--out", out, "--threshold", 0.35, "--weight", "score") == 0
    split = f"{{annotations: {out}, images: {images}}}"
    overrides = [
        f"data={{type: coco, train: {split}, val: {split}, workers: 0}}",
        "data.resize={type: short_edge, short: 64, long: 96}",
        "augment=[{type: mixup, weights: true}]",
        "model.backbone={name: test_resnet, pretrained: false}",
        "model.neck={channels: 16, norm: batch}",
        "model.head={convs: 1, channels: 16}",
        "criterion={}",
        "train={length: {steps: 3}, batch_size: 2, device: cpu, pictures: 0}",
        f"run.dir={tmp_path / 'run'}",
    ]
    assert train(["retinanet_r50_fpn_1x_coco", *overrides]) == 0, capsys.readouterr().err
    assert (tmp_path / "run" / "last.pt").is_file()
