"""One-stage detectors: backbone, neck, dense head."""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from detector.config.node import Node, default_type
from detector.models.backbones import Backbone, BackboneConfig
from detector.models.dense_head import DenseHeadConfig, GridHead
from detector.models.fpn import Fpn, FpnConfig
from detector.models.task_aligned_head import TaskAlignedHeadConfig
from detector.pixels import RGB, Pixels
from detector.structures import Objects, Outputs

AnyHead = Annotated[DenseHeadConfig | TaskAlignedHeadConfig, Field(discriminator="type"), default_type("dense")]


class DenseConfig(Node):
    """RetinaNet, FCOS, ATSS, GFL, TOOD and what lies between them."""

    type: Literal["dense"] = "dense"
    backbone: BackboneConfig = Field(default_factory=BackboneConfig)
    neck: FpnConfig = Field(default_factory=FpnConfig)
    head: AnyHead = Field(default_factory=DenseHeadConfig)

    def build(self, num_classes: int, *, load_weights: bool = True, pixels: Pixels = RGB) -> DenseDetector:
        """The network; `load_weights=False` leaves the backbone random, for a checkpoint that follows."""
        backbone = self.backbone.build(load_weights=load_weights, pixels=pixels)
        neck = self.neck.build(backbone.channels, backbone.strides)
        head = self.head.build(neck.channels, neck.strides, num_classes)
        return DenseDetector(backbone=backbone, neck=neck, head=head)


class DenseDetector(nn.Module):
    """The network alone: it knows no loss, no assigner and no decoding.

    Input: (B, C, H, W) in the images' own numbers (RGB: 0..255), any H and W; normalised here, on the device.
    """

    scale: Tensor
    shift: Tensor

    def __init__(self, *, backbone: Backbone, neck: Fpn, head: GridHead) -> None:
        super().__init__()
        self.backbone, self.neck, self.head = backbone, neck, head
        mean, std = torch.tensor(backbone.mean), torch.tensor(backbone.std)
        self.register_buffer("scale", (1 / std)[:, None, None], persistent=False)
        self.register_buffer("shift", (-mean / std)[:, None, None], persistent=False)

    def forward(self, images: Tensor, objects: Objects | None = None, sizes: Tensor | None = None) -> Outputs:
        """`objects` and `sizes` are for models whose forward pass depends on the truth, or on where images end."""
        images = images.contiguous(memory_format=torch.channels_last).to(self.scale.dtype)
        return self.head(self.neck(self.backbone(torch.addcmul(self.shift, images, self.scale))))
