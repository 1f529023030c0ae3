"""The detectors that are timed: ours of three methods, and torchvision's of the same shape.

ResNet-50 with batch norm, all of it trained; FPN of 256 channels, P3 to P7, the two coarsest from P5; towers of four
convolutions of 256 channels, with group norm for FCOS and ATSS, without norm for RetinaNet; 80 classes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torchvision.models.detection import fcos_resnet50_fpn, retinanet_resnet50_fpn

from detector.assign import Atss, Fcos, MaxIou, Rule
from detector.coders import Deltas, Distances
from detector.decode import DecodeConfig
from detector.losses.dense import DenseCriterionConfig
from detector.losses.quality import QualityBce
from detector.losses.regression import L1, Giou
from detector.models.backbones import BackboneConfig
from detector.models.dense import DenseConfig
from detector.models.dense_head import DenseHeadConfig
from detector.models.fpn import FpnConfig
from detector.models.layers import Precision
from detector.models.priors import Anchors, Points
from detector.seeding import SYNTHETIC, generator
from detector.structures import Objects

NUM_CLASSES = 80
# Processors that have no instruction for bf16, so that it takes them many times as long as fp32.
WITHOUT_BF16 = ("NO AVX", "DEFAULT", "AVX2")


def precisions(device: torch.device) -> tuple[Precision, ...]:
    """Those that somebody would train or look for objects in on this device."""
    if device.type == "cpu" and torch.backends.cpu.get_cpu_capability() in WITHOUT_BF16:
        return ("fp32",)
    return ("fp32", "bf16")


@dataclass(frozen=True)
class Method:
    """One way to detect, and torchvision's detector nearest to it."""

    name: str
    model: DenseConfig
    assigner: Rule
    criterion: DenseCriterionConfig
    decode: DecodeConfig
    peer: Callable[..., nn.Module]
    peer_name: str


def methods(backbone: str = "resnet50", channels: int = 256) -> dict[str, Method]:
    """By name.  Another backbone or width is for trials: torchvision's side stays what it is."""

    def model(head: DenseHeadConfig) -> DenseConfig:
        return DenseConfig(
            backbone=BackboneConfig(name=backbone, norm="batch"), neck=FpnConfig(channels=channels), head=head
        )

    with_quality = DenseCriterionConfig(box=Giou(), quality=QualityBce(), box_weighting="quality")
    fcos = Method(
        name="FCOS",
        model=model(
            DenseHeadConfig(
                priors=Points(),
                coder=Distances(activation="relu"),
                channels=channels,
                level_scale=True,
                quality=True,
            )
        ),
        assigner=Fcos(),
        criterion=with_quality,
        decode=DecodeConfig(quality="geometric"),
        peer=fcos_resnet50_fpn,
        peer_name="FCOS",
    )
    atss = Method(
        name="ATSS",
        model=model(
            DenseHeadConfig(
                priors=Anchors(scale=8, octave_scales=1, ratios=(1.0,)),
                coder=Deltas(std=(0.1, 0.1, 0.2, 0.2)),
                channels=channels,
                level_scale=True,
                quality=True,
            )
        ),
        assigner=Atss(),
        criterion=with_quality,
        decode=DecodeConfig(quality="geometric"),
        peer=fcos_resnet50_fpn,  # torchvision has no ATSS; its FCOS has the same network
        peer_name="FCOS",
    )
    retinanet = Method(
        name="RetinaNet",
        model=model(DenseHeadConfig(priors=Anchors(), coder=Deltas(), channels=channels, norm="none")),
        assigner=MaxIou(),
        criterion=DenseCriterionConfig(box=L1()),
        decode=DecodeConfig(nms_iou=0.5),
        peer=retinanet_resnet50_fpn,
        peer_name="RetinaNet",
    )
    return {method.name: method for method in (fcos, atss, retinanet)}


def build_peer(method: Method, side: int) -> nn.Module:
    """torchvision's detector for square images of `side` pixels, which it leaves at that size."""
    return method.peer(weights=None, weights_backbone=None, num_classes=NUM_CLASSES, min_size=side, max_size=side)


def random_images(batch: int, side: int) -> Tensor:
    """(batch, 3, side, side) uint8 in the memory order that the loader gives; smooth, as photographs are."""
    rng = generator(0, SYNTHETIC)
    coarse = torch.from_numpy(rng.uniform(0, 255, size=(batch, 3, side // 16, side // 16))).float()
    images = nn.functional.interpolate(coarse, size=(side, side), mode="bilinear").byte()
    return images.contiguous(memory_format=torch.channels_last)


def random_objects(batch: int, each: int, size: tuple[int, int]) -> Objects:
    """`each` objects in every image of `size` (height, width), sides log-uniform from 8 pixels to half the image."""
    rng = generator(1, SYNTHETIC)
    limit = torch.tensor([size[1], size[0]], dtype=torch.float32)
    total = batch * each
    side = 8 * (limit / 16) ** torch.from_numpy(rng.random((total, 2))).float()
    corner = torch.from_numpy(rng.random((total, 2))).float() * (limit - side)
    boxes = torch.cat([corner, corner + side], 1)
    labels = torch.from_numpy(rng.integers(NUM_CLASSES, size=total))
    sizes = torch.tensor(size, dtype=torch.float32).expand(batch, 2).clone()
    return Objects.collate(list(boxes.split(each)), list(labels.split(each)), sizes=sizes)
