"""Whether it learns at all: a few images by heart, through the whole trainer and COCO's own numbers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from detector.config.load import load_config
from detector.train.loop import train

RULES = ("atss", *(pytest.param(rule, marks=pytest.mark.slow) for rule in ("max_iou", "fcos", "iqdet")))
IQDET = ("assigner={type: iqdet}", "model.encoder={}")


@pytest.mark.parametrize("rule", RULES)
def test_shapes_by_heart(rule: str, tmp_path: Path) -> None:
    assert by_heart(tmp_path, f"assigner.type={rule}") > 0.7


@pytest.mark.slow
def test_shapes_by_heart_with_an_encoder(tmp_path: Path) -> None:
    """Boxes between cells are harder to learn by heart where objects are a few cells wide: 0.81; rounded 0.96."""
    assert by_heart(tmp_path / "between", *IQDET, "criterion={type: iqdet}") > 0.5
    assert by_heart(tmp_path / "rounded", *IQDET, "criterion={type: iqdet, points: rounded}") > 0.7


def by_heart(tmp_path: Path, *changes: str) -> float:
    """AP on three images after 120 steps on them."""
    config = load_config(
        Path("quickstart"),
        [
            f"data={{type: shapes, root: {tmp_path}/data, size: [96, 128], train: 3, val: 1, test: 1, workers: 0}}",
            "data.resize={type: short_edge, short: 96, long: 128}",
            "augment=[]",
            *changes,
            "model.neck.channels=32",
            "model.head.channels=32",
            "train.length={steps: 120}",
            "train.batch_size=3",
            "train.optimizer={type: adamw, lr: 2e-3, base_batch: null}",
            "train.schedule.warmup={steps: 10}",
            "train.ema=null",
            "train.evaluate_every=null",
            "train.pictures=0",
            f"run.dir={tmp_path}/run",
        ],
    )
    # Scored on what it trained on.
    train_split = config.data.folder / "train"
    config.data.open("train")
    files = {"annotations": str(train_split / "annotations.json"), "images": str(train_split / "images")}
    seen = config.data.model_dump(include={"resize", "workers"}) | {"type": "coco", "train": files, "val": files}
    config = type(config).model_validate(config.model_dump() | {"data": seen})
    return train(config).numbers["AP"]


@pytest.mark.slow
def test_eight_images_of_coco_by_heart(shared: Path, tmp_path: Path) -> None:
    """80 classes, ids with gaps, a crowd region among them."""
    root = shared / "datasets" / "coco_tiny"
    whole = json.loads((root / "annotations" / "train.json").read_text())
    objects: dict[int, list[dict]] = {image["id"]: [] for image in whole["images"]}
    for annotation in whole["annotations"]:
        objects[annotation["image_id"]].append(annotation)

    def clear(image: dict) -> bool:
        """Few objects, none of them tiny: 240 pixels of height do not hold more."""
        mine = [a for a in objects[image["id"]] if not a["iscrowd"]]
        return 1 <= len(mine) <= 6 and min(a["bbox"][2] * a["bbox"][3] for a in mine) > 32**2

    crowded = [i for i in whole["images"] if any(a["iscrowd"] for a in objects[i["id"]])]
    crowded.sort(key=lambda i: sum(a["area"] < 32**2 for a in objects[i["id"]]))
    images = [crowded[0], *[i for i in whole["images"] if clear(i) and i is not crowded[0]][:7]]
    chosen = {i["id"] for i in images}
    small = whole | {
        "images": images,
        "annotations": [a for a in whole["annotations"] if a["image_id"] in chosen],
    }
    path = tmp_path / "eight.json"
    path.write_text(json.dumps(small))
    files = f"{{annotations: {path}, images: {root / 'images'}}}"
    config = load_config(
        Path("coco_tiny"),
        [
            f"data.train={files}",
            f"data.val={files}",
            "data.workers=0",
            "augment=[]",
            "train.length={steps: 250}",
            "train.evaluate_every={steps: 125}",
            f"run.dir={tmp_path}/run",
        ],
    )
    assert train(config).numbers["AP"] > 0.9
