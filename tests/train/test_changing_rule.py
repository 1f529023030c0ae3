"""A run whose rule of assignment changes on the way."""

from __future__ import annotations

import math
import os
import signal
from pathlib import Path
from typing import Any

import pytest

from detector.assign import Atss, TaskAligned
from detector.train.checkpoint import load_checkpoint
from detector.train.loop import train
from detector.train.step import Stepper
from tests.train.compare import assert_same_training
from tests.train.test_loop import Load, lines

CHANGING = (
    "assigner={type: switch, first: {type: anneal, rule: {type: atss}, parameters: {topk: {start: 13, end: 1}}},"
    " then: {type: task_aligned}, after: {steps: 3}}"
)


def record(monkeypatch: pytest.MonkeyPatch, stop_in: int | None = None) -> list[Any]:
    """The rule of each step from now on; a signal in step `stop_in`."""
    whole, rules = Stepper.__call__, []

    def step(self: Stepper, *args: Any) -> Any:
        rules.append(self.module.criterion.assigner)  # type: ignore[union-attr]
        if len(rules) == stop_in:
            os.kill(os.getpid(), signal.SIGTERM)
        return whole(self, *args)

    monkeypatch.setattr(Stepper, "__call__", step)
    return rules


@pytest.mark.parametrize("steps", [2, 4], ids=["before the change", "after it"])
def test_stop_and_go_changes_nothing(config: Load, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, steps: int) -> None:
    wanted = [Atss(topk=13), Atss(topk=11), Atss(topk=9), TaskAligned(), TaskAligned(), TaskAligned()]
    with monkeypatch.context() as patch:
        rules = record(patch)
        train(config(CHANGING))
    assert rules == wanted

    folder = tmp_path / "stopped"
    with monkeypatch.context() as patch:
        rules = record(patch, stop_in=steps)
        assert train(config(CHANGING, f"run.dir={folder}")).step == steps
        train(config(CHANGING, f"run.dir={folder}"), resume=folder)
    assert rules == wanted
    straight, stopped = load_checkpoint(tmp_path / "run" / "last.pt"), load_checkpoint(folder / "last.pt")
    assert_same_training(straight, stopped)
    assert straight["criterion"].keys() == {"normalizer.average"}  # the rule is in no checkpoint's state


PREDICTED = ["simota", "dynamic_soft_label", "task_aligned", "ota", "hungarian", "fcos, keep_one: true"]
OTHERS = ["yolo_ratio", "yolo_best", "uniform", "point_scale", "center_gaussian", "center_region", "paa", "dw"]


@pytest.mark.parametrize("rule", [*PREDICTED, *OTHERS])
def test_every_rule_trains(config: Load, tmp_path: Path, rule: str) -> None:
    train(config(f"assigner={{type: {rule}}}", "train.length={steps: 2}"))
    rows = [r for r in lines(tmp_path / "run") if r["kind"] == "train"]
    assert len(rows) == 2
    for row in rows:
        assert all(math.isfinite(row[f"loss/{name}"]) and row[f"loss/{name}"] > 0 for name in ("class", "box"))
        assert row["dense/positives_per_object/all"] > 0


def test_a_rule_that_never_comes_is_noted(config: Load, capsys: pytest.CaptureFixture[str]) -> None:
    train(config("assigner={type: switch, after: {steps: 9}}", "train.length={steps: 1}"))
    assert "note: assigner.after is 9 steps, so the run ends before the second rule begins" in capsys.readouterr().out
