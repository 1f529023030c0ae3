"""The lab looks at a two-stage run: what it finds, and how its RPN's rule treats each object."""

from __future__ import annotations

from pathlib import Path

from detector.lab.record import observe
from detector.train.loop import train
from tests.test_two_stage_training import recipe


def test_a_two_stage_run_is_observed(tmp_path: Path) -> None:
    config = recipe("bccd/faster_rcnn_r18", tmp_path, "train.evaluate_every=null", steps=2)
    outcome = train(config)
    record = observe(config, tmp_path / "run" / "last.pt", "val")
    assert record.result.numbers == outcome.numbers
    assert len(record.treatment) == len(record.annotation) > 0
    assert record.treatment.levels.shape[1] == 4  # strides 4 to 32, those of the RPN
    assert record.treatment.positives.sum() > 0
