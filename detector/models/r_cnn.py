"""R-CNN (Girshick et al., CVPR 2014): each proposal is cut out, warped to a square and classified by itself.

Legend: B images, S proposals of an image, M proposals of all images, C channels, K classes.

The historical baseline, for teaching and comparison: a whole pass of the backbone for every proposal, some hundred
times the work of Fast R-CNN.  As in the paper, a crop shows `context` pixels around its box, and the mean colour where
the image ends.  Unlike there, one training learns everything: softmax and box deltas in place of SVMs and a regression
fitted afterwards, and crops are averaged over the pixels that they shrink instead of resized by another program.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn
from torchvision import ops

from detector.boxes import centers, full_precision
from detector.config.node import Node
from detector.models.backbones import BackboneConfig
from detector.models.roi_head import BoxHeadConfig
from detector.models.single_level import NoNeck
from detector.models.two_stage import StageRules, TwoStageDetector
from detector.pixels import RGB, Pixels

AT_ONCE = 64  # crops that go through the backbone together outside of training


class RCnnConfig(Node):
    """On given proposals (`data.proposals`) alone."""

    rpn: ClassVar[None] = None
    neck: ClassVar[None] = None

    type: Literal["r_cnn"] = "r_cnn"
    backbone: BackboneConfig = Field(default_factory=lambda: BackboneConfig(levels=(5,)))
    crop: int = Field(224, ge=16, le=1024, description="side in pixels that every proposal is warped to")
    context: int = Field(16, ge=0, description="pixels of the crop, on each side, that lie around the box")
    rules: StageRules = Field(default_factory=StageRules)
    head: BoxHeadConfig = Field(default_factory=lambda: BoxHeadConfig(linear=1))

    @model_validator(mode="after")
    def _fits(self) -> RCnnConfig:
        if 2 * self.context >= self.crop:
            raise ValueError(f"context {self.context} on both sides leaves nothing of a crop of {self.crop} pixels")
        if len(self.backbone.levels) > 1:
            raise ValueError(
                f"backbone.levels are {list(self.backbone.levels)}: a crop is classified by one map, so give one level"
            )
        if self.head.backbone_stage or self.head.convs:
            raise ValueError(
                "head.backbone_stage and head.convs have no place here: the backbone's map is averaged before the head;"
                " set model.head.backbone_stage=false and model.head.convs=0"
            )
        return self

    @property
    def stages(self) -> tuple[tuple[BoxHeadConfig, StageRules], ...]:
        return ((self.head, self.rules),)

    def build(self, num_classes: int, *, load_weights: bool = True, pixels: Pixels = RGB) -> RCnnDetector:
        """The network; `load_weights=False` leaves the backbone random, for a checkpoint that follows."""
        return RCnnDetector(self, num_classes, load_weights=load_weights, pixels=pixels)


class RCnnDetector(TwoStageDetector):
    """A two-stage detector whose only map is the image itself, and whose backbone looks at crops."""

    def __init__(self, config: RCnnConfig, num_classes: int, *, load_weights: bool, pixels: Pixels) -> None:
        backbone = config.backbone.build(load_weights=load_weights, pixels=pixels)
        super().__init__(
            backbone=backbone,
            neck=NoNeck(pixels.channels, 1),
            rpn=None,
            extractor=Crops(config.crop, config.context),
            heads=[config.head.build(backbone.channels[0], (1, 1), num_classes)],
            rules=[config.rules],
        )

    def _maps(self, images: Tensor, sizes: Tensor) -> list[Tensor]:
        """The normalised images; their padding has the mean colour, as all that lies outside."""
        rows, columns = (torch.arange(n, device=images.device) for n in images.shape[-2:])
        inside = (rows < sizes[:, :1])[:, None, :, None] & (columns < sizes[:, 1:])[:, None, None]
        return [torch.addcmul(self.shift, images.to(self.scale.dtype), self.scale).where(inside, 0.0)]

    def _look(self, stage: int, maps: Sequence[Tensor], boxes: Tensor) -> tuple[Tensor, Tensor]:
        if torch.is_grad_enabled():
            features = self._features(maps, boxes)
        else:
            parts = boxes.split(max(1, AT_ONCE // len(boxes)), 1)
            features = torch.cat([self._features(maps, part).unflatten(0, part.shape[:2]) for part in parts], 1)
            features = features.flatten(0, 1)
        logits, raw = self._head(stage)(features)
        return logits.unflatten(0, boxes.shape[:2]), raw.unflatten(0, boxes.shape[:2])

    def _features(self, maps: Sequence[Tensor], boxes: Tensor) -> Tensor:
        """(B, S, 4) -> (B * S, C, 1, 1)."""
        crops = self.extractor(maps, boxes).contiguous(memory_format=torch.channels_last)
        return self.backbone(crops)[0].mean((2, 3), keepdim=True)


class Crops(nn.Module):
    """[(B, C, H, W) images] and (B, S, 4) xyxy pixels -> (B * S, C, side, side): boxes and what is around them, warped.

    0 outside of the images.
    """

    def __init__(self, side: int, context: int) -> None:
        super().__init__()
        self.side, self.context = side, context

    def forward(self, maps: Sequence[Tensor], boxes: Tensor) -> Tensor:
        half = (boxes[..., 2:] - boxes[..., :2]) / 2 * (self.side / (self.side - 2 * self.context))
        middle = centers(boxes)
        # A frame of one pixel: else what lies less than a pixel outside would repeat the edge.
        around = torch.cat([middle - half, middle + half], -1) + 1
        image = torch.arange(len(boxes), device=boxes.device, dtype=boxes.dtype).repeat_interleave(boxes.shape[1])
        rois = torch.cat([image[:, None], around.flatten(0, 1)], 1)
        framed = F.pad(full_precision(maps[0]), (1, 1, 1, 1))
        return ops.roi_align(framed, rois, self.side, sampling_ratio=0, aligned=True)
