"""Notes of assignments: at the right steps, of the right pairs, and without a trace in the training."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from detector.config.run import RunConfig
from detector.data.batch import collate
from detector.structures import Assignment
from detector.train.checkpoint import load_checkpoint
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


def test_an_image_that_cannot_be_read_is_left_out(config: Load, tmp_path: Path) -> None:
    folder = tmp_path / "shapes"
    train(config("train.length={steps: 1}", f"data.root={folder}"))
    sorted((folder / "val" / "images").iterdir())[0].write_bytes(b"broken")
    train(config("train.length={steps: 1}", f"data.root={folder}", EVERY_TWO), overwrite=True)
    assert (tmp_path / "run" / "assignments" / "step-000001.npz").is_file()
