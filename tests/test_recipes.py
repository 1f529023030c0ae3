"""Every recipe, shrunk, trains: two images, thirty or fifty steps, and the loss falls."""

from __future__ import annotations

import json
from pathlib import Path
from typing import get_args

import pytest

from detector.assign import Rule
from detector.config.load import load_config
from detector.train.loop import train
from tests.made_proposals import write_proposals

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
ASSIGN = CONFIGS / "assign"
QUICK = ("quickstart", "fcos_r50_fpn_1x_coco", "bccd/atss_r18", "bccd/cascade_rcnn_r18", "bccd/faster_rcnn_r18",
         "bccd/faster_rcnn_c4_r18", "bccd/fast_rcnn_r18", "bccd/r_cnn_r18")  # fmt: skip


def named(path: Path) -> str:
    return path.relative_to(CONFIGS).with_suffix("").as_posix()


def recipes() -> list[object]:
    """All of them; each kind of model once in the default suite, the rest among the slow tests."""
    return [
        pytest.param(p, id=name, marks=[] if name in QUICK else [pytest.mark.slow])
        for p in sorted(CONFIGS.rglob("*.yaml"))
        if p.parent.name != "studies"
        for name in [named(p)]
    ]


def test_every_rule_has_a_recipe_that_changes_nothing_else() -> None:
    """`configs/assign/<type>.yaml`, on top of base.yaml."""
    rules = {rule.model_fields["type"].default for rule in get_args(get_args(Rule)[0])}
    written = {path.stem for path in ASSIGN.glob("*.yaml")} - {"base"}
    assert rules - written == set(), "rules without a recipe in configs/assign"
    assert written - rules == set(), "recipes in configs/assign without a rule"
    base = load_config(ASSIGN / "base.yaml")
    for rule in rules:
        path = ASSIGN / f"{rule}.yaml"
        config = load_config(path)
        assert config.assigner is not None
        assert config.assigner.type == rule
        assert config.model_copy(update={"assigner": base.assigner, "name": base.name}) == base
        assert len(path.read_text().splitlines()) <= 12, f"{path}: a short file"


@pytest.mark.parametrize("path", recipes())
def test_the_loss_falls(path: Path, tmp_path: Path) -> None:
    whole = load_config(path)
    steps = 30 if named(path) in QUICK else 50
    neck = whole.model.neck
    shapes = {"type": "shapes", "root": f"{tmp_path}/data", "size": [64, 96], "train": 2, "val": 1, "test": 1}
    if whole.data.proposals is not None:
        shapes["proposals"] = write_proposals(shapes, tmp_path / "proposals")
    config = load_config(
        path,
        [
            f"data={json.dumps({**shapes, 'workers': 0})}",
            "data.resize={type: short_edge, short: 64, long: 96}",
            "model.backbone.name=resnet18" if "r50" in path.stem else "model.backbone.freeze_stages=0",
            # Without the weights that the recipe starts from, norms must learn.
            "weights=null",
            "model.backbone.pretrained=false",
            "model.backbone.norm=batch",
            *(["model.neck.channels=32"] if neck is not None else []),
            *(["model.roi.size=[2, 2]"] if neck is None and whole.model.type != "r_cnn" else []),
            *(["model.crop=32"] if whole.model.type == "r_cnn" else []),
            "model.head.channels=32",
            f"train.length={{steps: {steps}}}",
            "train.batch_size=2",
            # The published rates suit thousands of steps, and RetinaNet's towers without norms start slowly.
            "train.optimizer={type: adamw, lr: 1e-3, base_batch: null}",
            "train.schedule={type: cosine, warmup: {steps: 5}}",
            "train.evaluate_every=null",
            f"train.log_every={steps // 10}",
            "train.pictures=0",
            "train.clip_norm=10",
            f"run.dir={tmp_path}/run",
        ],
    )
    train(config)
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    losses = [record["loss"] for record in records if "loss" in record]
    assert sum(losses[-3:]) < 0.93 * sum(losses[:3])
