"""Detectors that mmdetection 2 or 3 trained, with ResNet-50 and FPN: the same network, weights renamed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from detector.convert.common import Architecture, checkpoint, configuration, last_layer, named_classes, rename
from detector.convert.reading import assignments, read_mmdetection
from detector.errors import CheckpointError
from detector.train.checkpoint import Checkpoint

Style = Literal["pytorch", "caffe"]
_MISSING = object()

_CORNERS = {"type": "anchors", "offset": 0}
_ATSS = {"norm": "group", "level_scale": True, "priors": {**_CORNERS, "scale": 8, "octave_scales": 1, "ratios": [1]}}
_RCNN = {"type": "deltas", "std": [0.1, 0.1, 0.2, 0.2], "clamp": "both"}
_RPN_RULE = {"type": "max_iou", "positive_iou": 0.7, "negative_iou": 0.3, "min_positive_iou": 0.3}

_BACKBONE = ((r"backbone\.((?:conv1|bn1|layer\d)\..+)", r"backbone.features.\1"),)
_NECK = ((r"neck\.lateral_convs\.(\d)\.conv\.(weight|bias)", r"neck.lateral.\1.\2"),)
_ONE_STAGE = (
    *_BACKBONE,
    *_NECK,
    (r"neck\.fpn_convs\.([0-2])\.conv\.(weight|bias)", r"neck.output.\1.\2"),
    *((rf"neck\.fpn_convs\.{3 + i}\.conv\.(weight|bias)", rf"neck.extra.{i}.\1") for i in (0, 1)),
    *(
        (rf"bbox_head\.{theirs}_convs\.(\d)\.{kind}\.(weight|bias)", rf"head.{ours}_tower.\1.{kind2}.0.\2")
        for theirs, ours in (("cls", "class"), ("reg", "box"))
        for kind, kind2 in (("conv", "convs"), ("gn", "norms"))
    ),
    (r"bbox_head\.(?:retina_cls|conv_cls|atss_cls|gfl_cls)\.(weight|bias)", r"head.classes.\1"),
    (r"bbox_head\.(?:retina_reg|conv_reg|atss_reg|gfl_reg)\.(weight|bias)", r"head.box.\1"),
    (r"bbox_head\.(?:conv|atss)_centerness\.(weight|bias)", r"head.quality.\1"),
    (r"bbox_head\.scales\.(\d)\.scale", r"head.level_scale.\1"),
)
_TWO_STAGE = (
    *_BACKBONE,
    *_NECK,
    (r"neck\.fpn_convs\.(\d)\.conv\.(weight|bias)", r"neck.output.\1.\2"),
    (r"rpn_head\.rpn_conv\.(weight|bias)", r"rpn.head.class_tower.0.convs.0.\1"),
    (r"rpn_head\.rpn_cls\.(weight|bias)", r"rpn.head.classes.\1"),
    (r"rpn_head\.rpn_reg\.(weight|bias)", r"rpn.head.box.\1"),
)


def _box_head(theirs: str, ours: int) -> tuple[tuple[str, str], ...]:
    head = rf"roi_head\.bbox_head{theirs}"
    return (
        (rf"{head}\.shared_fcs\.(\d)\.(weight|bias)", rf"heads.{ours}.linear.\1.\2"),
        (rf"{head}\.fc_cls\.(weight|bias)", rf"heads.{ours}.classes.\1"),
        (rf"{head}\.fc_reg\.(weight|bias)", rf"heads.{ours}.box.\1"),
    )


@dataclass(frozen=True)
class MmdetectionArchitecture(Architecture):
    """One of mmdetection's."""

    type: str = ""  # what its configurations call it
    style: Style = "pytorch"  # of the backbone, where the file does not say it
    # Settings below `model` that our network has, (value, what mmdetection takes where it is not set).
    settings: Mapping[str, tuple[Any, Any]] = field(default_factory=dict)


def _dense(extra: str, relu: bool, head: dict[str, Any], **sections: Any) -> dict[str, Any]:
    neck = {"extra": extra, "extra_relu": relu}
    return {"model": {"neck": neck, "head": head}, **sections}


def _two_stage(kind: str, more: dict[str, Any], weights: list[float]) -> dict[str, Any]:
    return {
        "model": {
            "type": kind,
            "rpn": {"priors": {**_CORNERS, "scale": 8, "octave_scales": 1}},
            "roi": {"type": "align", "sampling_ratio": 0},
            **more,
        },
        "assigner": _RPN_RULE,
        "criterion": {"type": "two_stage", "stage_weights": weights},
        "decode": {"nms_iou": 0.5, "pre_nms_topk": 100_000},
    }


_FPN = {
    "backbone.depth": (50, 50),
    "backbone.dcn": (None, None),
    "backbone.plugins": (None, None),
    "neck.type": ("FPN", "FPN"),
}
_ROI = {
    **_FPN,
    "rpn_head.anchor_generator.scales": ([8], [8]),
    "rpn_head.anchor_generator.ratios": ([0.5, 1.0, 2.0], [0.5, 1.0, 2.0]),
    "rpn_head.anchor_generator.center_offset": (0.0, 0.0),
    "roi_head.bbox_roi_extractor.roi_layer.type": ("RoIAlign", "RoIAlign"),
    "roi_head.bbox_roi_extractor.roi_layer.sampling_ratio": (0, 0),
    "roi_head.bbox_roi_extractor.roi_layer.aligned": (True, True),
    "roi_head.bbox_roi_extractor.finest_scale": (56, 56),
}
_ANCHORS = {
    **_FPN,
    "neck.relu_before_extra_convs": (False, False),
    "bbox_head.anchor_generator.center_offset": (0.0, 0.0),
    "bbox_head.dcn_on_last_conv": (False, False),
}
_QUALITY = {"box": {"type": "giou", "weight": 2.0}, "quality": {"type": "bce", "target": "centerness"}}

ARCHITECTURES = {
    "mmdetection/faster_rcnn": MmdetectionArchitecture(
        title="mmdetection's Faster R-CNN R50 FPN",
        type="FasterRCNN",
        sections=_two_stage("two_stage", {"head": {"coder": _RCNN}}, [1.0]),
        names=(*_TWO_STAGE, *_box_head("", 0)),
        settings=_ROI,
    ),
    "mmdetection/cascade_rcnn": MmdetectionArchitecture(
        title="mmdetection's Cascade R-CNN R50 FPN",
        type="CascadeRCNN",
        sections=_two_stage(
            "cascade", {"head": {"class_agnostic": True, "coder": _RCNN}, "average": "logits"}, [1.0, 0.5, 0.25]
        ),
        names=(*_TWO_STAGE, *(line for i in range(3) for line in _box_head(rf"\.{i}", i))),
        settings=_ROI,
    ),
    "mmdetection/retinanet": MmdetectionArchitecture(
        title="mmdetection's RetinaNet R50 FPN",
        type="RetinaNet",
        sections=_dense(
            "from_c5",
            relu=False,
            head={"norm": "none", "priors": _CORNERS},
            assigner={"type": "max_iou"},
            criterion={"box": {"type": "l1"}},
            decode={"nms_iou": 0.5},
        ),
        names=_ONE_STAGE,
        settings=_ANCHORS,
    ),
    "mmdetection/fcos": MmdetectionArchitecture(
        title="mmdetection's FCOS R50 FPN with center, normbbox, centeronreg, giou",
        type="FCOS",
        style="caffe",
        sections=_dense(
            "from_p5",
            relu=True,
            head={
                "norm": "group",
                "tower_bias": True,
                "quality": True,
                "level_scale": True,
                "priors": {"type": "points"},
                "coder": {"type": "distances", "activation": "relu"},
            },
            assigner={"type": "fcos"},
            criterion={"box": {"type": "giou"}, "quality": {"type": "bce", "target": "centerness"}},
        ),
        names=_ONE_STAGE,
        settings={
            **_FPN,
            "neck.relu_before_extra_convs": (True, False),
            "bbox_head.norm_on_bbox": (True, False),
            "bbox_head.centerness_on_reg": (True, False),
            "bbox_head.dcn_on_last_conv": (False, False),
        },
    ),
    "mmdetection/atss": MmdetectionArchitecture(
        title="mmdetection's ATSS R50 FPN",
        type="ATSS",
        sections=_dense("from_p5", relu=False, head={**_ATSS, "quality": True, "coder": _RCNN}, criterion=_QUALITY),
        names=_ONE_STAGE,
        settings=_ANCHORS,
    ),
    "mmdetection/gfl": MmdetectionArchitecture(
        title="mmdetection's GFL R50 FPN",
        type="GFL",
        sections=_dense(
            "from_p5",
            relu=False,
            head={**_ATSS, "coder": {"type": "bins", "reg_max": 16}},
            criterion={
                "classification": {"type": "quality_focal"},
                "class_target": "iou",
                "box": {"type": "giou", "weight": 2.0},
                "box_weighting": "score",
                "distribution": {"type": "dfl"},
            },
        ),
        names=_ONE_STAGE,
        constants=(r"bbox_head\.integral\.project",),
        settings={**_ANCHORS, "bbox_head.reg_max": (16, 16)},
    ),
}


def convert(
    path: Path, name: str, classes: Sequence[str] | None = None, style: Style | None = None
) -> tuple[Checkpoint, list[str]]:
    """A checkpoint of ours from one of mmdetection's, and lines that say what became of it.

    Classes and the backbone's style (where it halves maps, and how images are normalised) are the file's own where it
    tells them; `classes` and `style` say them where it does not.

    Raises:
        CheckpointError: the file is missing, damaged, unsafe, of another architecture, or of another class count.
    """
    known = ARCHITECTURES[name]
    state, meta = read_mmdetection(path)
    text = next((meta[key] for key in ("config", "cfg") if isinstance(meta.get(key), str)), "")
    told = assignments(text)
    _check_settings(told, known, path)
    named = rename(state, known, path)
    scales = [named.pop(key) for key in sorted(k for k in named if k.startswith("head.level_scale."))]
    if scales:
        named["head.level_scale"] = torch.stack(scales)
    if known.type == "FCOS" and "head.class_tower.0.convs.0.bias" not in named:
        raise CheckpointError(
            f"{path}: FCOS as first published, with centerness beside the classes and distances in pixels, which no"
            " head here has: take the file whose name holds center-normbbox-centeronreg-giou"
        )
    found = named_classes(classes or _class_names(meta), _class_count(named, known, path), path)
    backbone, said, swap = _backbone(told, known, style, path)
    if swap and "backbone.features.conv1.weight" in named:
        named["backbone.features.conv1.weight"] = named["backbone.features.conv1.weight"].flip(1)
    levels = {"levels": [2, 3, 4, 5]} if known.type in ("FasterRCNN", "CascadeRCNN") else {}
    model = {**known.sections["model"], "backbone": {**backbone, **levels}}
    config = configuration({**known.sections, "model": model}, path.stem)
    lines = [f"{len(state)} tensors of {known.title}: all of them renamed", f"{len(found.names)} classes", said]
    return checkpoint(named, config, found, known, path), lines


def _check_settings(told: Mapping[str, Any], known: MmdetectionArchitecture, path: Path) -> None:
    """Raises `CheckpointError` where the file's configuration is of a network that we would compute otherwise."""
    model = told.get("model")
    if not isinstance(model, dict):
        return
    kind = model.get("type", known.type)
    if kind != known.type:
        raise CheckpointError(f"{path}: a {kind} by its own configuration, not {known.title}")
    for setting, (value, default) in known.settings.items():
        given = model
        for part in setting.split("."):
            given = given.get(part, _MISSING) if isinstance(given, dict) else _MISSING
        given = default if given is _MISSING else given
        if given != value:
            raise CheckpointError(
                f"{path}: its model.{setting} is {given!r}; only {value!r} is what {known.title} is converted to"
            )


def _backbone(
    told: Mapping[str, Any], known: MmdetectionArchitecture, style: Style | None, path: Path
) -> tuple[dict[str, Any], str, bool]:
    """The section, a line about it, and whether the network takes BGR."""
    model = told.get("model")
    model = model if isinstance(model, dict) else {}
    backbone, pixels = model.get("backbone"), model.get("data_preprocessor", told.get("img_norm_cfg"))
    own = backbone.get("style", "pytorch") if isinstance(backbone, dict) else None
    if own is not None and style is not None and own != style:
        raise CheckpointError(f"{path}: its configuration has a backbone of style {own}: leave --style out")
    used = own or style or known.style
    mean, std = [123.675, 116.28, 103.53], [58.395, 57.12, 57.375]
    swap = used == "caffe"
    if swap:
        mean, std = [103.53, 116.28, 123.675], [1.0, 1.0, 1.0]
    if isinstance(pixels, dict):
        # Version 3 swaps where it is told to, version 2 unless it is told not to.
        swap = not pixels.get("bgr_to_rgb", pixels.get("to_rgb", "img_norm_cfg" in told))
        for value in (pixels.get("mean"), pixels.get("std")):
            if not isinstance(value, list) or len(value) != 3 or not all(isinstance(v, int | float) for v in value):
                raise CheckpointError(f"{path}: its configuration normalises images by {value!r}, expected 3 numbers")
        mean, std = pixels["mean"], pixels["std"]
    source = "as its configuration says" if own is not None else "which the file does not say (--style)"
    said = f"backbone of style {used}, images in {'BGR' if swap else 'RGB'} with mean {mean}, std {std}, {source}"
    section: dict[str, Any] = {
        "name": "resnet50",
        "mean": mean[::-1] if swap else mean,
        "std": std[::-1] if swap else std,
    }
    return section | ({"stride_in": "1x1"} if used == "caffe" else {}), said, swap


def _class_names(meta: Mapping[str, Any]) -> list[str] | None:
    data = meta.get("dataset_meta")
    data = data if isinstance(data, dict) else {}
    names = next((v for v in (meta.get("CLASSES"), data.get("CLASSES"), data.get("classes")) if v), None)
    if isinstance(names, str):
        return [names]
    return [str(name) for name in names] if isinstance(names, list | tuple) else None


def _class_count(named: Mapping[str, Tensor], known: MmdetectionArchitecture, path: Path) -> int:
    if known.type in ("FasterRCNN", "CascadeRCNN"):
        return len(last_layer(named, "heads.0.classes.bias", known, path)) - 1
    priors = 9 if known.type == "RetinaNet" else 1
    return len(last_layer(named, "head.classes.bias", known, path)) // priors
