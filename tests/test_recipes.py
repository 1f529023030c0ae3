"""Every recipe, shrunk, trains: two images, twenty-five or fifty steps, and the loss falls."""

from __future__ import annotations

import json
from operator import attrgetter
from pathlib import Path
from typing import get_args

import pytest

from detector.assign import Rule
from detector.config.load import load_config
from detector.train.loop import train
from tests.made_proposals import write_proposals

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
ASSIGN = CONFIGS / "assign"
QUICK = ("quickstart", "bccd/atss_r18", "bccd/cascade_rcnn_r18")


def named(path: Path) -> str:
    return path.relative_to(CONFIGS).with_suffix("").as_posix()


def recipes() -> list[object]:
    """All of them; a dense and a two-stage model in the default suite, the rest among the slow tests."""
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


# What papers and the authors' codes say and a slip of the pen would change without a test noticing.
PUBLISHED = {
    "gfl": {"criterion.classification.beta": 2, "criterion.box.weight": 2, "criterion.distribution.weight": 0.25,
            "model.head.coder.reg_max": 16, "assigner.topk": 9},
    "vfnet": {"criterion.classification.alpha": 0.75, "criterion.classification.gamma": 2, "model.head.start": 8,
              "criterion.initial_box.weight": 1.5, "criterion.box.weight": 2, "model.head.convs": 3},
    "tood": {"assigner.first.topk": 9, "assigner.then.topk": 13, "assigner.then.alpha": 1, "assigner.then.beta": 6,
             "assigner.after.epochs": 4, "criterion.box.weight": 2, "model.head.convs": 6},
    "paa": {"assigner.topk": 9, "assigner.first.positive_iou": 0.1, "assigner.pair_loss.box_weight": 1.3,
            "criterion.box.weight": 1.3, "criterion.quality.weight": 0.5, "decode.quality": "geometric",
            "decode.threshold_on": "score", "decode.score_voting": 0.025},
    "free_anchor": {"criterion.bag": 50, "criterion.gamma": 2, "criterion.box_iou": 0.6, "criterion.box.beta": 0.11,
                    "criterion.box.weight": 0.75, "criterion.positive_weight": 0.5, "criterion.negative_weight": 0.5},
    "auto_assign": {"criterion.positive_weight": 0.25, "criterion.negative_weight": 0.75, "criterion.box.weight": 5,
                    "criterion.center_weight": 0.75, "criterion.sharpness": 3, "model.head.start": 4,
                    "model.head.coder.activation": "relu", "model.head.prior_probability": 0.02},
    "ota": {"assigner.center_radius": 2.5, "assigner.topk": 20, "assigner.iou_weight": 1.5, "assigner.eps": 0.1,
            "assigner.iterations": 50, "criterion.box.weight": 2, "criterion.box_weighting": "iou",
            "criterion.quality.weight": 0.5, "decode.quality": "geometric", "model.head.coder.activation": "relu"},
    "iqdet": {"assigner.samples": 12, "model.encoder.components": 2, "criterion.encoder_weight": 1},
    "dw": {"assigner.beta": 5, "assigner.mu": 5, "assigner.nu": 3, "assigner.sigma": 1.11, "model.head.start": 4,
           "assigner.negative_iou": 0.5, "train.schedule.warmup.steps": 1000},
    "yolox_head": {"assigner.center_radius": 2.5, "assigner.candidate_topk": 10, "assigner.iou_weight": 3,
                   "criterion.box.weight": 5, "criterion.box.mode": "square", "decode.score_threshold": 0.01,
                   "decode.threshold_on": "score", "decode.nms_iou": 0.65},
    "rtmdet_head": {"assigner.center_radius": 3, "assigner.topk": 13, "assigner.iou_weight": 3,
                    "criterion.classification.beta": 2, "criterion.box.weight": 2},
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_numbers(name: str) -> None:
    config = load_config(CONFIGS / "published" / f"{name}_r50_fpn_1x_coco.yaml")
    for key, expected in PUBLISHED[name].items():
        assert attrgetter(key)(config) == expected, key
    assert config.train.optimizer.lr == 0.01  # for 16 images, as all of them have it
    assert config.train.batch_size == 16


def test_every_published_recipe_has_its_numbers_here() -> None:
    assert {path.stem.removesuffix("_r50_fpn_1x_coco") for path in (CONFIGS / "published").iterdir()} == set(PUBLISHED)


@pytest.mark.parametrize("path", recipes())
def test_the_loss_falls(path: Path, tmp_path: Path) -> None:
    whole = load_config(path)
    steps = 25 if named(path) in QUICK else 50
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
