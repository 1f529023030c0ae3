"""A few steps of training under each rule of cells, regions, distances, mixtures and weights."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from detector.train.loop import train
from tests.train.test_loop import Load, lines

RULES = ["yolo_ratio", "yolo_best", "uniform", "point_scale", "center_gaussian", "center_region", "paa", "dw"]


@pytest.mark.parametrize("rule", RULES)
def test_every_rule_trains(config: Load, tmp_path: Path, rule: str) -> None:
    train(config(f"assigner={{type: {rule}}}", "train.length={steps: 2}"))
    rows = [r for r in lines(tmp_path / "run") if r["kind"] == "train"]
    assert len(rows) == 2
    for row in rows:
        assert all(math.isfinite(row[f"loss/{name}"]) and row[f"loss/{name}"] > 0 for name in ("class", "box"))
        assert row["dense/positives_per_object/all"] > 0
