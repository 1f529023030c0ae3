"""Notes of assignments: at the right steps, of the right pairs, and without a trace in the training."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from detector.config.run import RunConfig
from detector.data.batch import collate
from detector.errors import DataError
from detector.lab.logged import flips
from detector.structures import Assignment
from detector.train.checkpoint import load_checkpoint
from detector.train.folder import RunFiles
from detector.train.loop import train
from tests.train.compare import assert_same_training

Load = Callable[..., RunConfig]
EVERY_TWO = "train.probe={images: 3, every: {steps: 4}}"


def test_notes_change_nothing_and_go_on_after_a_resume(config: Load, tmp_path: Path) -> None:
    train(config())
    folder = tmp_path / "probed"
    train(config(EVERY_TWO, f"run.dir={folder}"))
    assert_same_training(load_checkpoint(tmp_path / "run" / "last.pt"), load_checkpoint(folder / "last.pt"))
    names = sorted(p.name for p in (folder / "assignments").iterdir())
    assert names == ["step-000000.npz", "step-000004.npz", "step-000006.npz"]  # and after the last step
    train(config(EVERY_TWO, "train.length={steps: 9}"), resume=folder)
    assert sorted(p.name for p in (folder / "assignments").iterdir())[-2:] == ["step-000008.npz", "step-000009.npz"]
    train(config(f"run.dir={folder}"), overwrite=True)
    assert not (folder / "assignments").exists()  # a new run does not keep an old one's


def test_what_is_noted(config: Load, tmp_path: Path) -> None:
    """The pairs that the rule makes of the first, a middle and the last validation image."""
    settings = config(EVERY_TWO)
    train(settings)
    data = settings.data.open("val")
    batch = collate([settings.data.resize(data[i]) for i in (0, 2, 3)], pad_multiple=settings.data.pad_multiple)
    model = settings.model.build(len(data.index.classes))
    with torch.no_grad():
        outputs = model(batch.images)
    expected: Assignment = settings.assigner(outputs.priors, batch.objects)
    kept = expected.weight > 0
    with np.load(tmp_path / "run" / "assignments" / "step-000006.npz") as note:
        assert set(note.files) == {f"dense/{key}" for key in ("prior", "object", "weight", "quality")}
        pairs = set(zip(note["dense/prior"].tolist(), note["dense/object"].tolist(), strict=True))
    assert pairs == set(zip(expected.prior[kept].tolist(), expected.object[kept].tolist(), strict=True))


def test_what_is_logged(config: Load, tmp_path: Path) -> None:
    """Lines and curves of their own: by size, shape, class and level, quality, and what changed since the last note."""
    settings = config(EVERY_TWO, "assigner={type: simota}")
    train(settings)
    files = RunFiles(tmp_path / "run")
    rows = [row for row in files.rows() if row["kind"] == "probe"]
    assert [row["step"] for row in rows] == [0, 4, 6]
    assert "dense/flip_rate" not in rows[0]
    assert [(row["step"], row["dense/flip_rate"]) for row in rows[1:]] == flips(files)
    last = rows[-1]
    with np.load(files.assignments / "step-000006.npz") as note:
        pairs = len(note["dense/prior"])
    assert last["dense/positives_per_object/all"] * last["dense/objects/all"] == pytest.approx(pairs)
    for key in ("without_positive", "contested", "shared", "quality", "iou_of_positives", "predicted_iou",
                "best_unassigned_iou", "entropy"):  # fmt: skip
        assert math.isfinite(last[f"dense/{key}/all"])
    for kind in ("size_", "aspect_", "class_"):
        assert any(key.startswith(f"dense/positives_per_object/{kind}") for key in last)
    assert sum(v for k, v in last.items() if k.startswith("dense/share_of_positives/level_")) == pytest.approx(1)
    events = EventAccumulator(str(files.curves))
    events.Reload()
    assert {"probe/dense/flip_rate", "probe/dense/entropy/all"} <= set(events.Tags()["scalars"])


def test_a_note_is_logged_once_over_a_resume(config: Load, tmp_path: Path) -> None:
    train(config(EVERY_TWO))
    files = RunFiles(tmp_path / "run")
    train(config(EVERY_TWO, "train.length={steps: 9}"), resume=files.folder)  # step 6, the last, is looked at again
    assert [row["step"] for row in files.rows() if row["kind"] == "probe"] == [0, 4, 6, 8, 9]


def test_a_damaged_note_is_named(config: Load, tmp_path: Path) -> None:
    train(config(EVERY_TWO))
    files = RunFiles(tmp_path / "run")
    (files.assignments / "step-000006.npz").write_bytes(b"broken")
    with pytest.raises(DataError, match=r"step-000006\.npz: .*delete it to go on"):
        train(config(EVERY_TWO, "train.length={steps: 9}"), resume=files.folder)


def test_an_image_that_cannot_be_read_is_left_out(config: Load, tmp_path: Path) -> None:
    folder = tmp_path / "shapes"
    train(config("train.length={steps: 1}", f"data.root={folder}"))
    sorted((folder / "val" / "images").iterdir())[0].write_bytes(b"broken")
    train(config("train.length={steps: 1}", f"data.root={folder}", EVERY_TWO), overwrite=True)
    assert (tmp_path / "run" / "assignments" / "step-000001.npz").is_file()
