"""What other toolkits' files hold, by name and shape, and numbers to fill them with."""

from __future__ import annotations

import re
import zlib
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

Shapes = dict[str, tuple[int, ...]]
NORM = ("weight", "bias", "running_mean", "running_var")

# Pattern of a name, what is drawn, with which numbers; the first that matches.  Activations stay of order one, and some
# dozens of boxes pass the threshold.
RULES: tuple[tuple[str, str, tuple[float, ...]], ...] = (
    (r"running_mean$", "normal", (0.0, 0.1)),
    (r"running_var$", "uniform", (0.7, 1.3)),
    (r"backbone.*\b(bn3|conv3\.norm)\.weight$", "uniform", (0.2, 0.4)),
    (r"backbone\.conv1\.weight\.caffe$|stem\.conv1\.weight$", "fan", (0.03,)),
    (r"(bn\d|gn|norm|downsample\.1|shortcut\.norm)\.weight$", "uniform", (0.7, 1.1)),
    (r"scale$", "uniform", (0.8, 1.2)),
    (r"retina_cls\.weight$", "fan", (1.2,)),
    (r"(atss_cls|gfl_cls|conv_cls)\.weight$", "fan", (2.2,)),
    (r"(retina_cls|conv_cls)\.bias$", "normal", (-5.5, 0.5)),
    (r"(atss_cls|gfl_cls)\.bias$", "normal", (-4.5, 0.5)),
    (r"fc_cls\.weight$", "fan", (0.6,)),
    (r"fc_cls\.bias$", "last", (3.0, 0.3)),
    (r"conv_reg\.bias$", "normal", (2.0, 0.4)),
    (r"(retina_reg|atss_reg|fc_reg|rpn_reg)\.weight$", "fan", (0.5,)),
    (r"bias$", "normal", (0.0, 0.05)),
    (r"weight(\.caffe)?$", "fan", (1.3,)),
)


def fill(key: str, shape: tuple[int, ...], caffe: bool = False) -> Tensor:
    """float32 numbers that depend on the name and shape alone."""
    if key.endswith("num_batches_tracked"):
        return torch.zeros(shape, dtype=torch.int64)
    if key.endswith("integral.project"):
        return torch.arange(17.0)
    draw = np.random.RandomState(zlib.crc32(key.encode()))  # a stream that never changes
    name = key + ".caffe" * (caffe and key == "backbone.conv1.weight")
    _, kind, numbers = next(rule for rule in RULES if re.search(rule[0], name))
    if kind == "normal":
        values = draw.normal(*numbers, shape)
    elif kind == "uniform":
        values = draw.uniform(*numbers, shape)
    elif kind == "last":
        values = draw.normal(0, numbers[1], shape)
        values[-1] = numbers[0]
    else:
        values = draw.normal(0, numbers[0] / np.sqrt(max(1, np.prod(shape[1:]))), shape)
    return torch.from_numpy(np.asarray(values, dtype=np.float32))


def image(height: int, width: int) -> Tensor:
    """(3, height, width) uint8 RGB: smooth shapes with some texture."""
    draw = np.random.RandomState(7)
    y, x = np.mgrid[0:height, 0:width].astype(np.float64)
    out = np.stack(
        [110 + 40 * np.sin(x / draw.uniform(9, 40)) + 30 * np.cos(y / draw.uniform(9, 40)) for _ in range(3)]
    )
    for _ in range(12):
        cx, cy, r = draw.uniform(0, width), draw.uniform(0, height), draw.uniform(6, 40)
        out += draw.uniform(-90, 90, (3, 1, 1)) * np.exp(-((x - cx) ** 2 + (y - cy) ** 2) / (2 * r * r))
    out += draw.randint(-12, 13, out.shape)
    return torch.from_numpy(np.clip(np.round(out), 0, 255).astype(np.uint8))


def convolution(name: str, out: int, into: int, side: int, bias: bool = True) -> Shapes:
    return {f"{name}.weight": (out, into, side, side)} | ({f"{name}.bias": (out,)} if bias else {})


def linear(name: str, out: int, into: int) -> Shapes:
    return {f"{name}.weight": (out, into), f"{name}.bias": (out,)}


def blocks() -> Iterator[tuple[int, int, int, int, int]]:
    """Stage from 1, block, inputs, width, outputs of ResNet-50's bottlenecks."""
    into = 64
    for stage, count in enumerate((3, 4, 6, 3)):
        for block in range(count):
            width = 64 * 2**stage
            yield stage + 1, block, into, width, 4 * width
            into = 4 * width


def mmdetection(kind: str, classes: int) -> Shapes:
    """mmdetection 2 and 3, R50 FPN; `kind` as in `detector.convert.mmdetection`."""

    def norm(name: str, channels: int) -> Shapes:
        return {**{f"{name}.{p}": (channels,) for p in NORM}, f"{name}.num_batches_tracked": ()}

    found = convolution("backbone.conv1", 64, 3, 7, bias=False) | norm("backbone.bn1", 64)
    for stage, block, into, width, out in blocks():
        name = f"backbone.layer{stage}.{block}"
        for i, (a, b, side) in enumerate(((width, into, 1), (width, width, 3), (out, width, 1)), 1):
            found |= convolution(f"{name}.conv{i}", a, b, side, bias=False) | norm(f"{name}.bn{i}", a)
        if block == 0:
            found |= convolution(f"{name}.downsample.0", out, into, 1, bias=False) | norm(f"{name}.downsample.1", out)
    two_stage = kind in ("faster_rcnn", "cascade_rcnn")
    channels = (256, 512, 1024, 2048) if two_stage else (512, 1024, 2048)
    for i, c in enumerate(channels):
        found |= convolution(f"neck.lateral_convs.{i}.conv", 256, c, 1)
    for i in range(len(channels) + (0 if two_stage else 2)):
        into = 2048 if kind == "retinanet" and i == 3 else 256
        found |= convolution(f"neck.fpn_convs.{i}.conv", 256, into, 3)
    if two_stage:
        found |= convolution("rpn_head.rpn_conv", 256, 256, 3)
        found |= convolution("rpn_head.rpn_cls", 3, 256, 1) | convolution("rpn_head.rpn_reg", 12, 256, 1)
        for head in ("",) if kind == "faster_rcnn" else (".0", ".1", ".2"):
            name = f"roi_head.bbox_head{head}"
            found |= linear(f"{name}.fc_cls", classes + 1, 1024)
            found |= linear(f"{name}.fc_reg", 4 if head else 4 * classes, 1024)
            found |= linear(f"{name}.shared_fcs.0", 1024, 256 * 49) | linear(f"{name}.shared_fcs.1", 1024, 1024)
        return found
    grouped = kind != "retinanet"
    for tower in ("cls", "reg"):
        for i in range(4):
            name = f"bbox_head.{tower}_convs.{i}"
            found |= convolution(f"{name}.conv", 256, 256, 3, bias=kind in ("retinanet", "fcos"))
            if grouped:
                found |= {f"{name}.gn.weight": (256,), f"{name}.gn.bias": (256,)}
    last = {"retinanet": ("retina_cls", "retina_reg"), "fcos": ("conv_cls", "conv_reg")}
    cls, reg = last.get(kind, (f"{kind}_cls", f"{kind}_reg"))
    priors = 1 if grouped else 9
    found |= convolution(f"bbox_head.{cls}", priors * classes, 256, 3)
    found |= convolution(f"bbox_head.{reg}", 68 if kind == "gfl" else 4 * priors, 256, 3)
    if kind in ("fcos", "atss"):
        found |= convolution(f"bbox_head.{'conv' if kind == 'fcos' else 'atss'}_centerness", 1, 256, 3)
    if grouped:
        found |= {f"bbox_head.scales.{i}.scale": () for i in range(5)}
    return found | ({"bbox_head.integral.project": (17,)} if kind == "gfl" else {})


def detectron2(kind: str, classes: int) -> Shapes:
    """detectron2, R50-FPN; `kind` as in `detector.convert.detectron2`."""

    def layer(name: str, out: int, into: int, side: int) -> Shapes:
        return {f"{name}.weight": (out, into, side, side)} | {f"{name}.norm.{p}": (out,) for p in NORM}

    found = layer("backbone.bottom_up.stem.conv1", 64, 3, 7)
    for stage, block, into, width, out in blocks():
        name = f"backbone.bottom_up.res{stage + 1}.{block}"
        found |= layer(f"{name}.shortcut", out, into, 1) if block == 0 else {}
        found |= layer(f"{name}.conv1", width, into, 1) | layer(f"{name}.conv2", width, width, 3)
        found |= layer(f"{name}.conv3", out, width, 1)
    for level in range(2 if kind == "faster_rcnn" else 3, 6):
        found |= convolution(f"backbone.fpn_lateral{level}", 256, 64 * 2**level, 1)
        found |= convolution(f"backbone.fpn_output{level}", 256, 256, 3)
    if kind == "faster_rcnn":
        rpn = "proposal_generator.rpn_head"
        found |= convolution(f"{rpn}.conv", 256, 256, 3) | convolution(f"{rpn}.objectness_logits", 3, 256, 1)
        found |= convolution(f"{rpn}.anchor_deltas", 12, 256, 1)
        found |= {f"proposal_generator.anchor_generator.cell_anchors.{i}": (3, 4) for i in range(5)}
        found |= linear("roi_heads.box_head.fc1", 1024, 256 * 49) | linear("roi_heads.box_head.fc2", 1024, 1024)
        found |= linear("roi_heads.box_predictor.cls_score", classes + 1, 1024)
        return found | linear("roi_heads.box_predictor.bbox_pred", 4 * classes, 1024)
    found |= convolution("backbone.top_block.p6", 256, 2048, 3) | convolution("backbone.top_block.p7", 256, 256, 3)
    for tower in ("cls", "bbox"):
        for i in range(0, 8, 2):
            found |= convolution(f"head.{tower}_subnet.{i}", 256, 256, 3)
    found |= convolution("head.cls_score", 9 * classes, 256, 3) | convolution("head.bbox_pred", 36, 256, 3)
    return found | {f"anchor_generator.cell_anchors.{i}": (9, 4) for i in range(5)}
