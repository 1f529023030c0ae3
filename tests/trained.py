"""A checkpoint of a small network with random weights, for whatever starts from one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from detector.config.run import RunConfig
from detector.train.checkpoint import KEYS, save_checkpoint


def settings(folder: Path) -> dict[str, Any]:
    """The configuration as a snapshot: generated data below `folder`, a network that takes milliseconds."""
    return {
        "name": "small",
        "data": {
            "type": "shapes",
            "root": str(folder / "data"),
            "size": [64, 96],
            "train": 2,
            "val": 5,
            "test": 3,
            "workers": 0,
            "resize": {"type": "short_edge", "short": 64, "long": 96},
        },
        "model": {
            "backbone": {"name": "resnet18", "levels": [3, 4]},
            "neck": {"channels": 16},
            "head": {"convs": 1, "channels": 16, "norm": "batch", "prior_probability": 0.3},
        },
        "train": {"batch_size": 2},
        "decode": {"score_threshold": 0.1},
    }


def checkpoint(folder: Path, *, averaged: bool = True, classes: tuple[str, ...] | None = None) -> Path:
    """Writes `folder`/best.pt.  The raw weights are random and find much; the averaged ones find nothing."""
    config = RunConfig.model_validate(settings(folder))
    if classes is None:
        classes = config.data.open("val").index.classes
    torch.manual_seed(0)
    model = config.model.build(len(classes))
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, torch.nn.BatchNorm2d):  # statistics that folding must not get wrong
                module.running_mean.uniform_(-0.1, 0.1)
                module.running_var.uniform_(0.5, 2)
        model.head.classes.weight.normal_(std=0.3)
        model.head.box.weight.normal_(std=0.05)
    raw = model.state_dict()
    silent = {name: value.clone() for name, value in raw.items()}
    silent["head.classes.weight"].zero_()
    silent["head.classes.bias"].fill_(-20)
    content: dict[str, Any] = dict.fromkeys(KEYS)
    content |= {
        "model": raw,
        "ema": silent if averaged else None,
        "step": 7,
        "config": config.model_dump(mode="json"),
        "classes": list(classes),
    }
    path = folder / "best.pt"
    save_checkpoint(path, content)
    return path
