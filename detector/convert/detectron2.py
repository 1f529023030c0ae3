"""Detectors that detectron2 trained, with ResNet-50 and FPN: the same network, weights renamed and reordered."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from detector.convert.common import Architecture, checkpoint, configuration, last_layer, named_classes, rename
from detector.convert.reading import read_arrays
from detector.errors import CheckpointError
from detector.models.weights import read_state
from detector.train.checkpoint import Checkpoint

NORM = "weight|bias|running_mean|running_var|num_batches_tracked"
MEAN, STD = (103.53, 116.28, 123.675), (1.0, 1.0, 1.0)  # BGR, of all of its model zoo's R50

_BACKBONE = (
    (r"backbone\.bottom_up\.stem\.conv1\.weight", "backbone.features.conv1.weight"),
    (rf"backbone\.bottom_up\.stem\.conv1\.norm\.({NORM})", r"backbone.features.bn1.\1"),
    *(
        line
        for stage in range(2, 6)
        for line in (
            (
                rf"backbone\.bottom_up\.res{stage}\.(\d)\.conv(\d)\.weight",
                rf"backbone.features.layer{stage - 1}.\1.conv\2.weight",
            ),
            (
                rf"backbone\.bottom_up\.res{stage}\.(\d)\.conv(\d)\.norm\.({NORM})",
                rf"backbone.features.layer{stage - 1}.\1.bn\2.\3",
            ),
            (
                rf"backbone\.bottom_up\.res{stage}\.0\.shortcut\.weight",
                f"backbone.features.layer{stage - 1}.0.downsample.0.weight",
            ),
            (
                rf"backbone\.bottom_up\.res{stage}\.0\.shortcut\.norm\.({NORM})",
                rf"backbone.features.layer{stage - 1}.0.downsample.1.\1",
            ),
        )
    ),
)


def _fpn(first: int) -> tuple[tuple[str, str], ...]:
    return tuple(
        (rf"backbone\.fpn_{kind}{level}\.(weight|bias)", rf"neck.{kind}.{level - first}.\1")
        for kind in ("lateral", "output")
        for level in range(first, 6)
    )


_PIXELS = (r"pixel_(mean|std)",)
_CAFFE = {"name": "resnet50", "stride_in": "1x1", "mean": list(MEAN[::-1]), "std": list(STD)}
_CORNERS = {"type": "anchors", "offset": 0}
_DELTAS = {"type": "deltas", "clamp": "above"}

ARCHITECTURES = {
    "detectron2/faster_rcnn": Architecture(
        title="detectron2's Faster R-CNN R50-FPN",
        sections={
            "model": {
                "type": "two_stage",
                "backbone": {**_CAFFE, "levels": [2, 3, 4, 5]},
                "rpn": {"priors": {**_CORNERS, "scale": 8, "octave_scales": 1}, "coder": _DELTAS},
                "roi": {"type": "align", "sampling_ratio": 0},
            },
            "assigner": {"type": "max_iou", "positive_iou": 0.7, "negative_iou": 0.3, "min_positive_iou": 0.3},
            "criterion": {"type": "two_stage"},
            "decode": {"nms_iou": 0.5, "pre_nms_topk": 100_000},
        },
        names=(
            *_BACKBONE,
            *_fpn(2),
            (r"proposal_generator\.rpn_head\.conv\.(weight|bias)", r"rpn.head.class_tower.0.convs.0.\1"),
            (r"proposal_generator\.rpn_head\.objectness_logits\.(weight|bias)", r"rpn.head.classes.\1"),
            (r"proposal_generator\.rpn_head\.anchor_deltas\.(weight|bias)", r"rpn.head.box.\1"),
            *((rf"roi_heads\.box_head\.fc{i + 1}\.(weight|bias)", rf"heads.0.linear.{i}.\1") for i in (0, 1)),
            (r"roi_heads\.box_predictor\.cls_score\.(weight|bias)", r"heads.0.classes.\1"),
            (r"roi_heads\.box_predictor\.bbox_pred\.(weight|bias)", r"heads.0.box.\1"),
        ),
        constants=(*_PIXELS, r"proposal_generator\.anchor_generator\.cell_anchors\.\d"),
    ),
    "detectron2/retinanet": Architecture(
        title="detectron2's RetinaNet R50-FPN",
        sections={
            "model": {
                "backbone": _CAFFE,
                "neck": {"extra": "from_c5"},
                "head": {"norm": "none", "priors": _CORNERS, "coder": _DELTAS},
            },
            "assigner": {"type": "max_iou"},
            "criterion": {"box": {"type": "smooth_l1", "beta": 0.1}},
            "decode": {"nms_iou": 0.5},
        },
        names=(
            *_BACKBONE,
            *_fpn(3),
            *((rf"backbone\.top_block\.p{6 + i}\.(weight|bias)", rf"neck.extra.{i}.\1") for i in (0, 1)),
            *(
                (rf"head\.{theirs}_subnet\.{2 * i}\.(weight|bias)", rf"head.{ours}_tower.{i}.convs.0.\1")
                for theirs, ours in (("cls", "class"), ("bbox", "box"))
                for i in range(4)
            ),
            (r"head\.cls_score\.(weight|bias)", r"head.classes.\1"),
            (r"head\.bbox_pred\.(weight|bias)", r"head.box.\1"),
        ),
        constants=(*_PIXELS, r"anchor_generator\.cell_anchors\.\d"),
    ),
}


def convert(path: Path, name: str, classes: Sequence[str] | None = None) -> tuple[Checkpoint, list[str]]:
    """A checkpoint of ours from one of detectron2's (.pkl of its model zoo, or .pth), and lines that say what became of
    it.

    Raises:
        CheckpointError: the file is missing, damaged, unsafe, of another architecture, or of another class count.
    """
    known = ARCHITECTURES[name]
    state = read_arrays(path) if path.suffix == ".pkl" else read_state(path)
    for key, expected in (("pixel_mean", MEAN), ("pixel_std", STD)):
        if key in state and not torch.allclose(state[key].flatten().float(), torch.tensor(expected), atol=1e-3):
            raise CheckpointError(
                f"{path}: {key} is {state[key].flatten().tolist()}, expected {list(expected)}: of the ResNet-50 with"
                " BGR images and strides in 1x1 convolutions, the only one that is converted"
            )
    named = rename(state, known, path)
    two_stage = "heads.0.classes.bias" in named
    priors = 1 if "faster" in name else 9
    last = "heads.0.classes.bias" if "faster" in name else "head.classes.bias"
    count = len(last_layer(named, last, known, path)) // priors - two_stage
    found = named_classes(classes, count, path)
    conv1 = "backbone.features.conv1.weight"
    if conv1 in named:
        named[conv1] = named[conv1].flip(1)
    if not two_stage:
        named |= _by_shape(named)
    said = [f"{len(state)} tensors of {known.title}: all of them renamed", f"{count} classes"]
    return checkpoint(named, configuration(known.sections, path.stem), found, known, path), said


def _by_shape(named: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """RetinaNet's nine anchors of a cell, there size by size and in each shape by shape, here the other way round."""
    return {
        key: value.unflatten(0, (3, 3, -1)).transpose(0, 1).flatten(0, 2)
        for key, value in named.items()
        if key.startswith(("head.classes.", "head.box.")) and len(value) % 9 == 0
    }
