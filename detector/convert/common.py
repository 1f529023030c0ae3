"""What all toolkits' weights need: names translated, shapes checked, a checkpoint made of them."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import detector
from detector.config.run import RunConfig
from detector.errors import CheckpointError
from detector.models.weights import COMPUTED
from detector.train.checkpoint import Checkpoint


@dataclass(frozen=True)
class Architecture:
    """A network of another toolkit and how ours says the same."""

    title: str  # for messages: whose and which
    sections: Mapping[str, Any]  # of the run configuration
    names: tuple[tuple[str, str], ...]  # pattern of a name there -> name here
    constants: tuple[str, ...] = ()  # patterns of what is no weight: numbers that the configuration says here


@dataclass(frozen=True)
class Classes:
    """What a network finds, by label."""

    names: tuple[str, ...]
    ids: tuple[int, ...]  # in annotation files


def coco_classes() -> Classes:
    """COCO's 80, with their ids among 1..90."""
    from torchvision.models.detection import FasterRCNN_ResNet50_FPN_Weights

    names = FasterRCNN_ResNet50_FPN_Weights.COCO_V1.meta["categories"]
    ids = tuple(i for i, name in enumerate(names) if i > 0 and name != "N/A")
    return Classes(tuple(names[i] for i in ids), ids)


def named_classes(names: Sequence[str] | None, count: int, path: Path) -> Classes:
    """For `count` classes: these names, or COCO's where there are 80 and none were given.

    Raises:
        CheckpointError: there are more or fewer.
    """
    if names is None:
        if count == 80:
            return coco_classes()
        raise CheckpointError(
            f"{path}: has {count} classes beside the background, so it is not of COCO: name them with --classes"
        )
    if len(names) != count:
        raise CheckpointError(f"{path}: has {count} classes beside the background, but {len(names)} names were given")
    return Classes(tuple(names), tuple(range(1, count + 1)))


def configuration(sections: Mapping[str, Any], name: str) -> RunConfig:
    """The run that the checkpoint claims to be of; its data are COCO's, to be overridden where they are elsewhere."""
    split = {
        kind: {"annotations": f"annotations/instances_{kind}2017.json", "images": f"{kind}2017"}
        for kind in ("train", "val")
    }
    resize = {"type": "short_edge", "short": 800, "long": 1333}
    data = {"type": "coco", "root": "data/coco", **split, "resize": resize}
    return RunConfig.model_validate({"name": name, "data": data, "train": {"batch_size": 16}, **sections})


def rename(state: Mapping[str, Tensor], known: Architecture, path: Path) -> dict[str, Tensor]:
    """Our names, without the constants.

    Raises:
        CheckpointError: a tensor has no name here.
    """
    patterns = [(re.compile(p), to) for p, to in known.names]
    found = {}
    for key, value in state.items():
        if any(re.fullmatch(pattern, key) for pattern in known.constants):
            continue
        match = next(((m, to) for p, to in patterns if (m := p.fullmatch(key))), None)
        if match is None:
            raise CheckpointError(
                f"{path}: {key} is no part of {known.title}: is it of another architecture (--from), or changed?"
            )
        found[match[0].expand(match[1])] = value
    return found


def last_layer(named: Mapping[str, Tensor], key: str, known: Architecture, path: Path) -> Tensor:
    """One that tells the number of classes; raises `CheckpointError` where it is missing."""
    if key not in named:
        raise CheckpointError(f"{path}: not the weights of {known.title}: {key} is missing (named as here)")
    return named[key]


def checkpoint(
    weights: Mapping[str, Tensor], config: RunConfig, classes: Classes, known: Architecture, path: Path
) -> Checkpoint:
    """A checkpoint of ours, for evaluation, prediction and as the start of a training.

    Raises:
        CheckpointError: a tensor is missing, too many, or of another shape.
    """
    with torch.device("meta"):
        wanted = config.network(len(classes.names), load_weights=False).state_dict()
    missing = [k for k in wanted if k not in weights and not k.endswith(COMPUTED)]
    misfits = [k for k in wanted if k in weights and wanted[k].shape != weights[k].shape]
    foreign = [k for k in weights if k not in wanted]
    problem = None
    if missing:
        problem = f"{missing[0]} is missing"
    elif misfits:
        first = misfits[0]
        problem = f"{first} is {tuple(weights[first].shape)} instead of {tuple(wanted[first].shape)}"
    elif foreign:
        problem = f"{foreign[0]} belongs to no part of it"
    if problem is not None:
        raise CheckpointError(f"{path}: not the weights of {known.title}: {problem} (named as here)")
    return {
        "model": {
            k: weights[k].to(v.dtype, copy=True) if k in weights else torch.zeros(v.shape, dtype=v.dtype)
            for k, v in wanted.items()
        },
        "ema": None,
        "ema_count": 0,
        "criterion": {},
        "optimizer": {},
        "scaler": {},
        "step": 0,
        "seed": config.seed,
        "scores": [],
        "numbers": {},
        "config": config.model_dump(mode="json"),
        "classes": list(classes.names),
        "category_ids": list(classes.ids),
        "versions": {"detector": detector.__version__, "torch": str(torch.__version__)},
    }
