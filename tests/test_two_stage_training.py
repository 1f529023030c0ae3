"""Two-stage detectors through the whole trainer: by heart, again to the bit, and in pictures, files and predictions."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import detector
from detector.config.load import load_config
from detector.config.run import RunConfig
from detector.data.images import read_image
from detector.errors import ConfigError
from detector.train.checkpoint import load_checkpoint
from detector.train.loop import train
from tests.train.compare import assert_same_training
from tests.train.test_loop import stop_after

SHORT_TRAINING = (
    "train.batch_size=3",
    "train.optimizer={type: adamw, lr: 2e-3, base_batch: null}",
    "train.schedule.warmup={steps: 2}",
    "train.ema=null",
    "train.evaluate_every=null",
    "train.pictures=0",
)


def recipe(name: str, folder: Path, *more: str, steps: int = 6) -> RunConfig:
    return load_config(
        Path(name),
        [
            f"data={{type: shapes, root: {folder}/data, size: [96, 128], train: 3, val: 1, test: 1, workers: 0}}",
            "data.resize={type: short_edge, short: 96, long: 128}",
            "augment=[]",
            "model.backbone.levels=[2, 3, 4]",
            "model.neck.channels=32",
            "model.rpn.channels=32",
            "model.head.channels=64",
            "model.roi.canonical_size=64",
            f"train.length={{steps: {steps}}}",
            *SHORT_TRAINING,
            f"run.dir={folder}/run",
            *more,
        ],
    )


def on_its_own_training_images(config: RunConfig) -> RunConfig:
    split = config.data.folder / "train"
    config.data.open("train")
    files = {"annotations": str(split / "annotations.json"), "images": str(split / "images")}
    seen: dict[str, Any] = config.data.model_dump(include={"resize", "workers"})
    return type(config).model_validate(
        config.model_dump() | {"data": {**seen, "type": "coco", "train": files, "val": files}}
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", ["faster_rcnn_r18", "cascade_rcnn_r18", "faster_rcnn_c4_r18"])
def test_shapes_by_heart(name: str, tmp_path: Path) -> None:
    light = ("model.backbone.name=resnet10t", "model.backbone.levels=[4]", "model.neck=null", "model.roi.size=[4, 4]")
    one_map = light if "c4" in name else ()
    config = recipe(f"bccd/{name}", tmp_path, "train.schedule.warmup={steps: 10}", *one_map, steps=150)
    assert train(on_its_own_training_images(config)).numbers["AP"] > 0.7


def test_stop_and_go_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The samplers of both stages draw the same again, whatever ran before and with an evaluation in between."""
    train(recipe("bccd/cascade_rcnn_r18", tmp_path, steps=4))
    folder = tmp_path / "stopped"
    stopping = recipe(
        "bccd/cascade_rcnn_r18", tmp_path, f"run.dir={folder}", "train.evaluate_every={steps: 2}", steps=4
    )
    with monkeypatch.context() as patch:
        stop_after(patch, 3, signal.SIGTERM)
        assert train(stopping).step == 3
    assert train(stopping, resume=folder).step == 4
    assert_same_training(load_checkpoint(tmp_path / "run" / "last.pt"), load_checkpoint(folder / "last.pt"))


def test_two_deterministic_runs_are_one(tmp_path: Path) -> None:
    runs = [tmp_path / name for name in ("one", "other")]
    try:
        for folder in runs:
            train(recipe("bccd/faster_rcnn_r18", tmp_path, f"run.dir={folder}", "train.deterministic=true", steps=3))
    finally:
        torch.use_deterministic_algorithms(False)
    assert_same_training(*(load_checkpoint(folder / "last.pt") for folder in runs))


def test_pictures_checkpoint_and_prediction(tmp_path: Path) -> None:
    config = recipe("bccd/cascade_rcnn_r18", tmp_path, "train.pictures=1", "decode.score_threshold=0.001")
    train(config)
    drawn = {p.name for p in (tmp_path / "run" / "pictures").iterdir()}
    assert {"train-samples.jpg", "assignment-rpn.jpg"} <= drawn
    find = detector.load(tmp_path / "run" / "best.pt", device="cpu")
    paths = sorted((config.data.folder / "train" / "images").iterdir())
    images: list[np.ndarray] = [read_image(p) for p in paths]
    together = find(images)
    assert len(together[0]) > 0
    for image, found in zip(images, together, strict=True):
        alone = find(image)
        torch.testing.assert_close(alone.scores, found.scores, atol=1e-5, rtol=0)
    low = detector.load(tmp_path / "run" / "best.pt", device="cpu", precision="bf16")
    assert len(low(images[0])) > 0


def test_micro_batches(tmp_path: Path) -> None:
    """Parts of a step go through; the statistics of every assignment are logged under its name."""
    config = recipe(
        "bccd/cascade_rcnn_r18", tmp_path, "train.batch_size=2", "train.accumulate=2", "train.log_every=2", steps=2
    )
    train(config)
    text = (tmp_path / "run" / "metrics.jsonl").read_text()
    assert all(f"{name}/positives_per_object/all" in text for name in ("rpn", "stage_1", "stage_2", "stage_3"))


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("criterion={type: dense}", "set criterion.type=two_stage"),
        ("criterion.stage_weights=[1]", "give one for each"),
        ("criterion.classification={type: focal}", "softmax goes with cross_entropy"),
        ("model.head.class_agnostic=false", "model.head.class_agnostic=true"),
        ("model.roi.type=lign", "unknown type 'lign' (did you mean 'align'?)"),
        ("model.sampler.count=0", "greater than or equal to 1"),
    ],
)
def test_mistakes_are_explained(override: str, said: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as raised:
        recipe("bccd/cascade_rcnn_r18", tmp_path, override)
    assert said in str(raised.value)


def test_a_dense_model_needs_the_dense_criterion() -> None:
    with pytest.raises(ConfigError, match=r"set criterion\.type=dense"):
        load_config(Path("quickstart"), ["criterion={type: two_stage}"])
