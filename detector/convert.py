"""Detectors that torchvision trained, as checkpoints of ours: the same network, weights renamed and reordered.

`docs/weights.md` lists where conventions differ.  Nothing in a weights file is executed, and every tensor of it is
accounted for.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import detector
from detector.config.run import RunConfig
from detector.errors import CheckpointError
from detector.models.weights import read_state
from detector.train.checkpoint import Checkpoint

EPS = 1e-5  # of our batch norms

# torchvision's mean and deviation in 0..255.
_BACKBONE = {"name": "resnet50", "mean": [123.675, 116.28, 103.53], "std": [58.395, 57.12, 57.375]}
_PLAIN_DELTAS = {"type": "deltas", "clamp": "above"}
_CORNERS = {"type": "anchors", "offset": 0, "whole_pixels": True}

# What every file has: backbone and pyramid.
_COMMON = (
    (r"backbone\.body\.(.+)", r"backbone.features.\1"),
    (r"backbone\.fpn\.inner_blocks\.(\d)(?:\.0)?\.(weight|bias)", r"neck.lateral.\1.\2"),
    (r"backbone\.fpn\.layer_blocks\.(\d)(?:\.0)?\.(weight|bias)", r"neck.output.\1.\2"),
    (r"backbone\.fpn\.extra_blocks\.p6\.(weight|bias)", r"neck.extra.0.\1"),
    (r"backbone\.fpn\.extra_blocks\.p7\.(weight|bias)", r"neck.extra.1.\1"),
)
_DENSE = (
    (r"head\.classification_head\.cls_logits\.(weight|bias)", r"head.classes.\1"),
    (r"head\.regression_head\.bbox_reg\.(weight|bias)", r"head.box.\1"),
    (r"head\.regression_head\.bbox_ctrness\.(weight|bias)", r"head.quality.\1"),
)


@dataclass(frozen=True)
class Architecture:
    """A network of torchvision's and how ours says the same."""

    sections: dict[str, Any]  # of the run configuration
    names: tuple[tuple[str, str], ...]  # pattern of a name there -> name here
    softmax: bool  # background is class 0 and competes; else class 0 is a logit that training never used


ARCHITECTURES = {
    "fasterrcnn_resnet50_fpn": Architecture(
        sections={
            "model": {
                "type": "two_stage",
                "backbone": {**_BACKBONE, "levels": [2, 3, 4, 5]},
                "neck": {"extra": "pool", "extra_levels": 1},
                "rpn": {
                    "priors": {**_CORNERS, "scale": 8, "octave_scales": 1},
                    "coder": _PLAIN_DELTAS,
                    "train": {"pre_nms": 2000, "post_nms": 2000},
                    "min_size": 1e-3,
                },
                "roi": {"type": "align", "aligned": False},
            },
            "assigner": {"type": "max_iou", "positive_iou": 0.7, "negative_iou": 0.3},
            "criterion": {"type": "two_stage", "box": {"type": "smooth_l1"}},
            "decode": {"nms_iou": 0.5, "pre_nms_topk": 100_000, "min_size": 1e-2},
        },
        names=(
            (r"rpn\.head\.conv(?:\.0\.0)?\.(weight|bias)", r"rpn.head.class_tower.0.convs.0.\1"),
            (r"rpn\.head\.cls_logits\.(weight|bias)", r"rpn.head.classes.\1"),
            (r"rpn\.head\.bbox_pred\.(weight|bias)", r"rpn.head.box.\1"),
            (r"roi_heads\.box_head\.fc6\.(weight|bias)", r"heads.0.linear.0.\1"),
            (r"roi_heads\.box_head\.fc7\.(weight|bias)", r"heads.0.linear.1.\1"),
            (r"roi_heads\.box_predictor\.cls_score\.(weight|bias)", r"heads.0.classes.\1"),
            (r"roi_heads\.box_predictor\.bbox_pred\.(weight|bias)", r"heads.0.box.\1"),
        ),
        softmax=True,
    ),
    "retinanet_resnet50_fpn": Architecture(
        sections={
            "model": {
                "backbone": _BACKBONE,
                "head": {"norm": "none", "priors": _CORNERS, "coder": _PLAIN_DELTAS},
            },
            "assigner": {"type": "max_iou"},
            "criterion": {"box": {"type": "l1"}},
            "decode": {"nms_iou": 0.5, "max_detections": 300},
        },
        names=(
            *_DENSE,
            (r"head\.classification_head\.conv\.(\d)(?:\.0)?\.(weight|bias)", r"head.class_tower.\1.convs.0.\2"),
            (r"head\.regression_head\.conv\.(\d)(?:\.0)?\.(weight|bias)", r"head.box_tower.\1.convs.0.\2"),
        ),
        softmax=False,
    ),
    "fcos_resnet50_fpn": Architecture(
        sections={
            "model": {
                "backbone": _BACKBONE,
                "head": {
                    "norm": "group",
                    "tower_bias": True,
                    "quality": True,
                    "priors": {"type": "points", "offset": 0},
                    "coder": {"type": "distances", "activation": "relu"},
                },
            },
            "assigner": {"type": "fcos"},
            "criterion": {"box": {"type": "giou"}, "quality": {"type": "bce", "target": "centerness"}},
            # There the root of class times centerness must be above 0.2: for that the class must be above 0.04.
            "decode": {"nms_iou": 0.6, "quality": "geometric", "score_threshold": 0.04},
        },
        names=(
            *_DENSE,
            *(
                (rf"head\.{theirs}_head\.conv\.{3 * i + j}\.(weight|bias)", rf"head.{ours}_tower.{i}.{kind}.0.\1")
                for theirs, ours in (("classification", "class"), ("regression", "box"))
                for i in range(4)
                for j, kind in ((0, "convs"), (1, "norms"))
            ),
        ),
        softmax=False,
    ),
}


def convert(
    path: Path, architecture: str, classes: Sequence[str] | None = None, norm_eps: float = EPS
) -> tuple[Checkpoint, list[str]]:
    """A checkpoint of ours from a file of torchvision's state dict, and lines that say what became of it.

    `classes`: the names of classes 1, 2, ...; by default COCO's 80, picked from the 91 that torchvision's own files
    have.  `norm_eps`: of the batch norms that the weights were trained with.

    Raises:
        CheckpointError: the file is missing, damaged, unsafe, of another architecture, or of another class count.
    """
    state = read_state(path)
    known = ARCHITECTURES[architecture]
    named = rename(state, architecture, path)
    count = _class_count(named, known)
    keep, names = _classes(count, classes, path)
    config = configuration(architecture, path.stem)
    weights = reorder(named, known, keep, norm_eps)
    network = config.model.build(len(names), load_weights=False)
    wanted = network.state_dict()
    misfits = [k for k in wanted if k in weights and wanted[k].shape != weights[k].shape]
    missing = [k for k in wanted if k not in weights and not k.endswith("num_batches_tracked")]
    if misfits or missing:
        problem = f"{missing[0]} is missing" if missing else f"{misfits[0]} is {tuple(weights[misfits[0]].shape)}"
        raise CheckpointError(f"{path}: not the weights of torchvision's {architecture}: {problem} (named as here)")
    weights = {k: weights.get(k, torch.zeros_like(v)) for k, v in wanted.items()}
    content: Checkpoint = {
        "model": weights,
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
        "classes": list(names),
        "category_ids": list(keep),
        "versions": {"detector": detector.__version__, "torch": str(torch.__version__)},
    }
    said = [
        f"{len(state)} tensors of {architecture}: all of them renamed",
        f"{len(names)} classes of {count - 1}, the background moved or dropped",
    ]
    return content, said


def configuration(architecture: str, name: str) -> RunConfig:
    """The run that the checkpoint claims to be of; its data are COCO's, to be overridden where they are elsewhere."""
    split = {
        kind: {"annotations": f"annotations/instances_{kind}2017.json", "images": f"{kind}2017"}
        for kind in ("train", "val")
    }
    resize = {"type": "short_edge", "short": 800, "long": 1333}
    data = {"type": "coco", "root": "data/coco", **split, "resize": resize}
    sections = ARCHITECTURES[architecture].sections
    return RunConfig.model_validate({"name": name, "data": data, "train": {"batch_size": 16}, **sections})


def rename(state: dict[str, Tensor], architecture: str, path: Path) -> dict[str, Tensor]:
    """Our names; raises `CheckpointError` where a tensor has none."""
    patterns = [(re.compile(p), to) for p, to in (*_COMMON, *ARCHITECTURES[architecture].names)]
    found = {}
    for key, value in state.items():
        match = next(((m, to) for p, to in patterns if (m := p.fullmatch(key))), None)
        if match is None:
            raise CheckpointError(
                f"{path}: {key} is no part of torchvision's {architecture}; known are {', '.join(ARCHITECTURES)}"
            )
        found[match[0].expand(match[1])] = value
    return found


def reorder(named: dict[str, Tensor], known: Architecture, keep: Sequence[int], norm_eps: float) -> dict[str, Tensor]:
    """Classes `keep` alone, background last where there is one; variances such that our epsilon gives the same."""
    weights = dict(named)
    for key, value in named.items():
        if key.endswith("running_var"):
            weights[key] = value + (norm_eps - EPS)
        elif known.softmax and key.startswith("heads.0.classes."):
            weights[key] = value[[*keep, 0]]
        elif known.softmax and key.startswith("heads.0.box."):
            weights[key] = value.unflatten(0, (-1, 4))[list(keep)].flatten(0, 1)
        elif not known.softmax and key.startswith("head.classes."):
            weights[key] = value.unflatten(0, (-1, _class_count(named, known)))[:, list(keep)].flatten(0, 1)
    return weights


def _class_count(named: dict[str, Tensor], known: Architecture) -> int:
    """With the background."""
    if known.softmax:
        bias = named.get("heads.0.classes.bias")
        return 0 if bias is None else len(bias)
    bias, box = named.get("head.classes.bias"), named.get("head.box.bias")
    return 0 if bias is None or box is None else len(bias) * 4 // len(box)


def _classes(count: int, classes: Sequence[str] | None, path: Path) -> tuple[list[int], list[str]]:
    """Which of the file's classes, by its numbers, and their names."""
    if classes is not None:
        if len(classes) != count - 1:
            raise CheckpointError(
                f"{path}: has {count - 1} classes beside the background, but {len(classes)} names were given"
            )
        return list(range(1, count)), list(classes)
    if count != 91:
        raise CheckpointError(
            f"{path}: has {count - 1} classes beside the background, so it is not of COCO: name them with --classes"
        )
    from torchvision.models.detection import FasterRCNN_ResNet50_FPN_Weights

    names = FasterRCNN_ResNet50_FPN_Weights.COCO_V1.meta["categories"]
    keep = [i for i, name in enumerate(names) if i > 0 and name != "N/A"]
    return keep, [names[i] for i in keep]
