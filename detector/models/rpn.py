"""Region proposals: a dense head with one class, and the boxes that it hands to a second stage.

Legend: B images, R priors of an image, L levels, T candidates of an image, M proposals of an image.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from pydantic import Field
from torch import Tensor, nn
from torchvision.ops import nms

from detector.boxes import clip
from detector.coders import AnyCoder, Deltas
from detector.config.node import Node
from detector.models.dense_head import DenseHead, DenseHeadConfig
from detector.models.priors import Anchors, AnyPriors
from detector.structures import Outputs


class ProposalNumbers(Node):
    """How many boxes survive."""

    pre_nms: int = Field(1000, ge=1, description="best of each level that enter NMS")
    post_nms: int = Field(1000, ge=1, description="best of an image, over all levels, that leave it")


class RpnConfig(Node):
    """Ren et al., "Faster R-CNN" (2015), on a pyramid as in Lin et al., "FPN" (CVPR 2017)."""

    priors: AnyPriors = Anchors(scale=8, octave_scales=1)
    coder: AnyCoder = Deltas()
    convs: int = Field(1, ge=0, description="3 x 3 convolutions before the two 1 x 1 that predict")
    channels: int = Field(256, ge=1)
    train: ProposalNumbers = ProposalNumbers(pre_nms=2000, post_nms=1000)
    test: ProposalNumbers = ProposalNumbers()
    nms_iou: float = Field(
        0.7, ge=0, le=1, description="of two boxes of a level with more, the lower-scored is dropped"
    )
    min_size: float = Field(0.0, ge=0, description="pixels; boxes not wider and higher than this are dropped")

    def build(self, in_channels: int, strides: Sequence[int]) -> Rpn:
        """For maps of `in_channels` and these strides, fine to coarse."""
        return Rpn(self, in_channels, strides)


class Proposals(NamedTuple):
    """Fixed in number for every image, by falling score; where an image has fewer, the rest is padding."""

    boxes: Tensor  # (B, M, 4) float32 xyxy inside the image; zeros where padded
    valid: Tensor  # (B, M) bool


class Rpn(nn.Module):
    """List of L maps (B, in_channels, H, W) -> `Outputs` of one class: object or not."""

    def __init__(self, config: RpnConfig, in_channels: int, strides: Sequence[int]) -> None:
        super().__init__()
        self.config = config
        head = DenseHeadConfig(
            priors=config.priors,
            coder=config.coder,
            convs=config.convs,
            channels=config.channels,
            norm="none",
            shared_tower=True,
            predict_kernel=1,
            prior_probability=0.5,
        )
        self.head = DenseHead(head, in_channels, strides, num_classes=1)

    def forward(self, maps: Sequence[Tensor]) -> Outputs:
        outputs: Outputs = self.head(maps)
        return outputs

    @torch.no_grad()
    def propose(self, outputs: Outputs, sizes: Tensor, numbers: ProposalNumbers) -> Proposals:
        """The best boxes of each level, clipped to the images, after NMS of each level by itself.

        `sizes`: (B, 2) height, width of the images without padding.  No gradient flows to the proposals.  NMS is what
        waits for the device: its time grows with the square of the number of boxes, so images and levels go one by one.
        """
        logits = outputs.class_logits.detach()[..., 0].float()
        chosen, counts, start = [], [], 0
        for size in outputs.priors.level_sizes:
            count = min(numbers.pre_nms, size)
            chosen.append(start + logits[:, start : start + size].topk(count, dim=1).indices)
            counts.append(count)
            start += size
        index = torch.cat(chosen, 1)  # (B, T), by falling score in each level
        scores = logits.gather(1, index)
        raw = outputs.box_raw.detach().gather(1, index[..., None].expand(-1, -1, outputs.box_raw.shape[-1]))
        boxes = outputs.coder.decode(outputs.priors.boxes[index], outputs.priors.stride[index], raw)
        boxes = clip(boxes, sizes[:, None])
        large = ((boxes[..., 2:] - boxes[..., :2]) > self.config.min_size).all(-1)
        # A box that is dropped must not suppress another: as a point it overlaps nothing.
        boxes = boxes.where(large[..., None], 0.0)
        kept = torch.zeros_like(large)
        for image in range(len(boxes)):
            start = 0
            for count in counts:
                level = slice(start, start + count)
                found = nms(boxes[image, level], scores[image, level], self.config.nms_iou)
                kept[image, found + start] = True
                start += count
        most = min(numbers.post_nms, sum(counts))
        best = scores.where(kept & large, -torch.inf).topk(most, dim=1)
        valid = best.values > -torch.inf
        boxes = boxes.gather(1, best.indices[..., None].expand(-1, -1, 4)).where(valid[..., None], 0.0)
        return Proposals(boxes, valid)
