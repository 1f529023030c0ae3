"""From image files to changed weights: at most 30 files of ours; the step itself, at most 3,000 lines."""

from __future__ import annotations

import sys
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch

from detector.config.load import load_config
from detector.data.loader import train_loader
from detector.data.sampler import Key
from detector.train.step import Stepper, TrainingModule, set_lr

PACKAGE = Path(__file__).resolve().parents[1] / "detector"
RECIPES = ("retinanet_r50_fpn_1x_coco", "fcos_r50_fpn_1x_coco", "atss_r50_fpn_1x_coco")


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_step_can_be_read(recipe: str, tmp_path: Path) -> None:
    config = load_config(
        Path(recipe),
        [
            f"data={{type: shapes, root: {tmp_path}, size: [64, 96], train: 2, val: 1, test: 1, workers: 0}}",
            "data.resize={type: short_edge, short: 64, long: 96}",
            "model.backbone.name=resnet18",
            "model.backbone.pretrained=false",
            "model.neck.channels=32",
            "model.head.channels=32",
            "train.ema={}",
            "train.clip_norm=10",
        ],
    )
    data = config.data.open("train")
    model = config.model.build(len(data.index.classes))
    module = TrainingModule(model, config.criterion.build(config.assigner, len(data.index.classes))).train()
    optimizer = config.train.optimizer.build(module, 2)
    assert config.train.ema is not None
    ema = config.train.ema.build(model)
    stepper = Stepper(module, optimizer, torch.amp.GradScaler("cpu", enabled=False), config.train.clip_norm)
    loader = train_loader(
        data, augment=config.augment, resize=config.data.resize, batch_size=2, seed=0, start_step=0, stop_step=1,
        workers=0, pad_multiple=32, max_unreadable=0,
    )  # fmt: skip

    dataset = loader._loader.dataset  # past torch's own loader: which image comes next is not part of a step

    with Trace() as reading:
        batch = dataset.__getitems__([Key(0, 0, None), Key(0, 1, None)])
    with Trace() as step:
        set_lr(optimizer, 1.0)
        result = stepper([batch], ema)
    assert all(torch.isfinite(value) for value in result.terms.values())
    names = "\n".join(f"{len(f.read_text().splitlines()):4} {f.relative_to(PACKAGE)}" for f in sorted(step.files))
    lines = sum(len(f.read_text().splitlines()) for f in step.files)
    assert lines <= 3000, f"{lines} lines in\n{names}"
    assert len(step.files | reading.files) <= 30, names


class Trace:
    """The files of ours in which a function was called."""

    def __enter__(self) -> Trace:
        self.files: set[Path] = set()
        sys.setprofile(self._see)
        return self

    def __exit__(self, *_: object) -> None:
        sys.setprofile(None)

    def _see(self, frame: FrameType, event: str, _: Any) -> None:
        if event == "call" and frame.f_code.co_filename.startswith(str(PACKAGE)):
            self.files.add(Path(frame.f_code.co_filename))
