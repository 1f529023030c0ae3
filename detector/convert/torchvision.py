"""Detectors that torchvision trained: the same network, weights renamed and reordered."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from detector.convert.common import (
    Architecture,
    checkpoint,
    coco_classes,
    configuration,
    last_layer,
    named_classes,
    rename,
)
from detector.errors import CheckpointError
from detector.models.weights import read_state
from detector.train.checkpoint import Checkpoint

EPS = 1e-5  # of our batch norms
NORM = "weight|bias|running_mean|running_var|num_batches_tracked"

# torchvision's mean and deviation in 0..255.
_BACKBONE = {"name": "resnet50", "mean": [123.675, 116.28, 103.53], "std": [58.395, 57.12, 57.375]}
_PLAIN_DELTAS = {"type": "deltas", "clamp": "above"}
_CORNERS = {"type": "anchors", "offset": 0, "whole_pixels": True}

# What every file has: backbone and pyramid, in older files without the number of the convolution in its layer.
_COMMON = (
    (r"backbone\.body\.(.+)", r"backbone.features.\1"),
    (r"backbone\.fpn\.inner_blocks\.(\d)(?:\.0)?\.(weight|bias)", r"neck.lateral.\1.\2"),
    (r"backbone\.fpn\.layer_blocks\.(\d)(?:\.0)?\.(weight|bias)", r"neck.output.\1.\2"),
    (r"backbone\.fpn\.extra_blocks\.p6\.(weight|bias)", r"neck.extra.0.\1"),
    (r"backbone\.fpn\.extra_blocks\.p7\.(weight|bias)", r"neck.extra.1.\1"),
)
_NORMALISED = (
    (r"backbone\.body\.(.+)", r"backbone.features.\1"),
    (rf"backbone\.fpn\.inner_blocks\.(\d)\.([01])\.({NORM})", r"neck.lateral.\1.\2.\3"),
    (rf"backbone\.fpn\.layer_blocks\.(\d)\.([01])\.({NORM})", r"neck.output.\1.\2.\3"),
)
_DENSE = (
    (r"head\.classification_head\.cls_logits\.(weight|bias)", r"head.classes.\1"),
    (r"head\.regression_head\.bbox_reg\.(weight|bias)", r"head.box.\1"),
    (r"head\.regression_head\.bbox_ctrness\.(weight|bias)", r"head.quality.\1"),
)
_TWO_STAGE = (
    (r"rpn\.head\.cls_logits\.(weight|bias)", r"rpn.head.classes.\1"),
    (r"rpn\.head\.bbox_pred\.(weight|bias)", r"rpn.head.box.\1"),
    (r"roi_heads\.box_predictor\.cls_score\.(weight|bias)", r"heads.0.classes.\1"),
    (r"roi_heads\.box_predictor\.bbox_pred\.(weight|bias)", r"heads.0.box.\1"),
)


@dataclass(frozen=True)
class TorchvisionArchitecture(Architecture):
    """One of torchvision's."""

    softmax: bool = False  # background is class 0 and competes; else class 0 is a logit that training never used
    coco_eps: float = EPS  # of the batch norms that torchvision's own file was trained with


def _two_stage(neck: dict[str, Any], rpn: dict[str, Any], head: dict[str, Any]) -> dict[str, Any]:
    return {
        "model": {
            "type": "two_stage",
            "backbone": {**_BACKBONE, "levels": [2, 3, 4, 5]},
            "neck": {"extra": "pool", "extra_levels": 1, **neck},
            "rpn": {
                "priors": {**_CORNERS, "scale": 8, "octave_scales": 1},
                "coder": _PLAIN_DELTAS,
                "train": {"pre_nms": 2000, "post_nms": 2000},
                "min_size": 1e-3,
                **rpn,
            },
            "roi": {"type": "align", "aligned": False},
            "head": head,
        },
        "assigner": {"type": "max_iou", "positive_iou": 0.7, "negative_iou": 0.3},
        "criterion": {"type": "two_stage", "box": {"type": "smooth_l1"}},
        "decode": {"nms_iou": 0.5, "pre_nms_topk": 100_000, "min_size": 1e-2},
    }


def _retina(norm: str, loss: str) -> dict[str, Any]:
    return {
        "model": {
            "backbone": _BACKBONE,
            "neck": {"extra": "from_p5" if norm == "none" else "from_c5"},
            "head": {"norm": norm, "priors": _CORNERS, "coder": _PLAIN_DELTAS},
        },
        "assigner": {"type": "max_iou"},
        "criterion": {"box": {"type": loss}},
        "decode": {"nms_iou": 0.5, "max_detections": 300},
    }


ARCHITECTURES = {
    "fasterrcnn_resnet50_fpn": TorchvisionArchitecture(
        title="torchvision's fasterrcnn_resnet50_fpn",
        sections=_two_stage({}, {}, {}),
        names=(
            *_COMMON,
            *_TWO_STAGE,
            (r"rpn\.head\.conv(?:\.0\.0)?\.(weight|bias)", r"rpn.head.class_tower.0.convs.0.\1"),
            (r"roi_heads\.box_head\.fc6\.(weight|bias)", r"heads.0.linear.0.\1"),
            (r"roi_heads\.box_head\.fc7\.(weight|bias)", r"heads.0.linear.1.\1"),
        ),
        softmax=True,
        coco_eps=0.0,
    ),
    "fasterrcnn_resnet50_fpn_v2": TorchvisionArchitecture(
        title="torchvision's fasterrcnn_resnet50_fpn_v2",
        sections=_two_stage({"norm": "batch"}, {"convs": 2}, {"convs": 4, "linear": 1, "norm": "batch"}),
        names=(
            *_NORMALISED,
            *_TWO_STAGE,
            (r"rpn\.head\.conv\.([01])\.0\.(weight|bias)", r"rpn.head.class_tower.\1.convs.0.\2"),
            # Our convolutions, norms and ReLUs stand in one row.
            *(
                (rf"roi_heads\.box_head\.{i}\.{j}\.({NORM})", rf"heads.0.convs.{3 * i + j}.\1")
                for i in range(4)
                for j in (0, 1)
            ),
            (r"roi_heads\.box_head\.5\.(weight|bias)", r"heads.0.linear.0.\1"),
        ),
        softmax=True,
    ),
    "retinanet_resnet50_fpn": TorchvisionArchitecture(
        title="torchvision's retinanet_resnet50_fpn",
        sections=_retina("none", "l1"),
        names=(
            *_COMMON,
            *_DENSE,
            (r"head\.classification_head\.conv\.(\d)(?:\.0)?\.(weight|bias)", r"head.class_tower.\1.convs.0.\2"),
            (r"head\.regression_head\.conv\.(\d)(?:\.0)?\.(weight|bias)", r"head.box_tower.\1.convs.0.\2"),
        ),
        coco_eps=0.0,
    ),
    "retinanet_resnet50_fpn_v2": TorchvisionArchitecture(
        title="torchvision's retinanet_resnet50_fpn_v2",
        sections=_retina("group", "giou"),
        names=(
            *_COMMON,
            *_DENSE,
            *(
                (rf"head\.{theirs}_head\.conv\.(\d)\.{j}\.(weight|bias)", rf"head.{ours}_tower.\1.{kind}.0.\2")
                for theirs, ours in (("classification", "class"), ("regression", "box"))
                for j, kind in ((0, "convs"), (1, "norms"))
            ),
        ),
    ),
    "fcos_resnet50_fpn": TorchvisionArchitecture(
        title="torchvision's fcos_resnet50_fpn",
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
            *_COMMON,
            *_DENSE,
            *(
                (rf"head\.{theirs}_head\.conv\.{3 * i + j}\.(weight|bias)", rf"head.{ours}_tower.{i}.{kind}.0.\1")
                for theirs, ours in (("classification", "class"), ("regression", "box"))
                for i in range(4)
                for j, kind in ((0, "convs"), (1, "norms"))
            ),
        ),
    ),
}


def convert(
    path: Path, name: str, classes: Sequence[str] | None = None, norm_eps: float = EPS
) -> tuple[Checkpoint, list[str]]:
    """A checkpoint of ours from a file of torchvision's state dict, and lines that say what became of it.

    `classes`: the names of classes 1, 2, ...; by default COCO's 80, picked from the 91 that torchvision's own files
    have.  `norm_eps`: of the batch norms that the weights were trained with.

    Raises:
        CheckpointError: the file is missing, damaged, unsafe, of another architecture, or of another class count.
    """
    known = ARCHITECTURES[name]
    state = read_state(path)
    named = rename(state, known, path)
    count = _class_count(named, known, path)
    found = coco_classes() if classes is None and count == 91 else named_classes(classes, count - 1, path)
    weights = reorder(named, known, found.ids, norm_eps)
    said = [
        f"{len(state)} tensors of {known.title}: all of them renamed",
        f"{len(found.names)} classes of {count - 1}, the background moved or dropped",
    ]
    return checkpoint(weights, configuration(known.sections, path.stem), found, known, path), said


def reorder(
    named: dict[str, Tensor], known: TorchvisionArchitecture, keep: Sequence[int], norm_eps: float
) -> dict[str, Tensor]:
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
            priors = len(named["head.box.bias"]) // 4
            weights[key] = value.unflatten(0, (priors, -1))[:, list(keep)].flatten(0, 1)
    return weights


def _class_count(named: dict[str, Tensor], known: TorchvisionArchitecture, path: Path) -> int:
    """With the background."""
    if known.softmax:
        count, boxes = (len(last_layer(named, f"heads.0.{part}.bias", known, path)) for part in ("classes", "box"))
        fits = boxes == 4 * count
    else:
        logits, boxes = (len(last_layer(named, f"head.{part}.bias", known, path)) for part in ("classes", "box"))
        count = logits * 4 // max(1, boxes)
        fits = count * boxes == logits * 4
    if not fits or count < 2:
        raise CheckpointError(f"{path}: not the weights of {known.title}: classes and boxes are of different numbers")
    return count
