"""One-stage detectors: backbone, neck, dense head."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from detector.config.node import Node
from detector.models.any_head import AnyHead
from detector.models.backbones import Backbone, BackboneConfig
from detector.models.dense_head import DenseHeadConfig, GridHead
from detector.models.fpn import Fpn, FpnConfig
from detector.models.quality_encoder import QualityEncoder, QualityEncoderConfig
from detector.pixels import RGB, Pixels
from detector.structures import Objects, Outputs


class DenseConfig(Node):
    """RetinaNet, FCOS, ATSS, GFL, VarifocalNet, TOOD and what lies between them."""

    type: Literal["dense"] = "dense"
    backbone: BackboneConfig = Field(default_factory=BackboneConfig)
    neck: FpnConfig = Field(default_factory=FpnConfig)
    head: AnyHead = Field(default_factory=DenseHeadConfig)
    encoder: QualityEncoderConfig | None = Field(None, description="in training, for criterion.type=iqdet")

    def build(self, num_classes: int, *, load_weights: bool = True, pixels: Pixels = RGB) -> DenseDetector:
        """The network; `load_weights=False` leaves the backbone random, for a checkpoint that follows."""
        backbone = self.backbone.build(load_weights=load_weights, pixels=pixels)
        neck = self.neck.build(backbone.channels, backbone.strides)
        head = self.head.build(neck.channels, neck.strides, num_classes)
        encoder = None if self.encoder is None else self.encoder.build(neck.channels, neck.strides)
        return DenseDetector(backbone=backbone, neck=neck, head=head, encoder=encoder)


class DenseDetector(nn.Module):
    """The network alone: it knows no loss, no assigner and no decoding.

    Input: (B, C, H, W) in the images' own numbers (RGB: 0..255), any H and W; normalised here, on the device.
    """

    scale: Tensor
    shift: Tensor

    def __init__(self, *, backbone: Backbone, neck: Fpn, head: GridHead, encoder: QualityEncoder | None = None) -> None:
        super().__init__()
        self.backbone, self.neck, self.head, self.encoder = backbone, neck, head, encoder
        mean, std = torch.tensor(backbone.mean), torch.tensor(backbone.std)
        self.register_buffer("scale", (1 / std)[:, None, None], persistent=False)
        self.register_buffer("shift", (-mean / std)[:, None, None], persistent=False)

    def forward(self, images: Tensor, objects: Objects | None = None, sizes: Tensor | None = None) -> Outputs:
        """`objects` and `sizes` are for models whose forward pass depends on the truth, or on where images end."""
        images = images.contiguous(memory_format=torch.channels_last).to(self.scale.dtype)
        maps = self.neck(self.backbone(torch.addcmul(self.shift, images, self.scale)))
        outputs: Outputs = self.head(maps)
        if self.encoder is None or objects is None:
            return outputs
        return replace(outputs, mixture=self.encoder(maps, objects))
