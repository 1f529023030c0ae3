"""Every recipe, shrunk, trains: two images, some fifty steps, and the loss falls."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from detector.config.load import load_config
from detector.train.loop import train

CONFIGS = Path(__file__).resolve().parents[1] / "configs"


@pytest.mark.parametrize(
    "path", sorted(p for p in CONFIGS.rglob("*.yaml") if p.parent.name != "studies"), ids=lambda p: p.stem
)
def test_the_loss_falls(path: Path, tmp_path: Path) -> None:
    config = load_config(
        path,
        [
            f"data={{type: shapes, root: {tmp_path}/data, size: [64, 96], train: 2, val: 1, test: 1, workers: 0}}",
            "data.resize={type: short_edge, short: 64, long: 96}",
            "model.backbone.name=resnet18" if "r50" in path.stem else "model.backbone.freeze_stages=0",
            # Without the weights that the recipe starts from, norms must learn.
            "model.backbone.pretrained=false",
            "model.backbone.norm=batch",
            "model.neck.channels=32",
            "model.head.channels=32",
            "train.length={steps: 50}",
            "train.batch_size=2",
            # The published rates suit thousands of steps, and RetinaNet's towers without norms start slowly.
            "train.optimizer={type: adamw, lr: 1e-3, base_batch: null}",
            "train.schedule.warmup={steps: 5}",
            "train.evaluate_every=null",
            "train.log_every=5",
            "train.pictures=0",
            "train.clip_norm=10",
            f"run.dir={tmp_path}/run",
        ],
    )
    train(config)
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    losses = [record["loss"] for record in records if "loss" in record]
    assert sum(losses[-3:]) < 0.93 * sum(losses[:3])
