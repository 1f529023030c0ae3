"""Where in an object the head's predictions are good, said from the object's own features (IQDet's encoder).

Ma et al., "IQDet: Instance-wise Quality Distribution Sampling for Object Detection", CVPR 2021, arXiv:2104.06936.

Legend: B images, N objects of the batch, L levels, M components, C channels of a map.

It runs where the truth is known, in training; inference never calls it.  From the paper: RoIAlign of the object's box
on every level of the neck, two fully connected layers shared by all levels, and from them mean, deviation and share
of each of M components.  Ours, since only an account of the paper's method was at hand, which leaves them open: the
width of the layers, and how numbers become parameters (`forward`).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from detector.boxes import full_precision
from detector.config.node import Node
from detector.models.roi import Align
from detector.structures import Objects


class QualityEncoderConfig(Node):
    """How the encoder looks at an object and what it says; any dense head goes with it."""

    components: int = Field(2, ge=1, le=16, description="Gaussians of an object on a level; the paper's 2")
    channels: int = Field(256, ge=1, description="width of both fully connected layers")
    roi: Align = Field(default_factory=Align, description="how an object's features are taken from a map")
    least_deviation: float = Field(0.05, gt=0, lt=1, description="of a component, in halves of the object's side")

    def build(self, in_channels: int, strides: Sequence[int]) -> QualityEncoder:
        """For maps of `in_channels` and these strides, fine to coarse."""
        return QualityEncoder(self, in_channels, strides)


class QualityEncoder(nn.Module):
    """L maps (B, C, H, W) and the N objects of the batch -> (N, L, M, 5) float32, as `assign/distribution.py` reads it.

    Mean and deviation are in halves of the object's width and height around its centre: the box reaches from -1 to 1.
    Memory: C * 7 * 7 numbers for each object and level.  Does not wait for the device.
    """

    def __init__(self, config: QualityEncoderConfig, in_channels: int, strides: Sequence[int]) -> None:
        super().__init__()
        self.config, self.strides = config, tuple(strides)
        rows, columns = config.roi.size
        self.first = nn.Linear(in_channels * rows * columns, config.channels)
        self.second = nn.Linear(config.channels, config.channels)
        # Mean x, y and deviation x, y of each component, then the logits of the shares and of what is left over.
        self.last = nn.Linear(config.channels, config.components * 5 + 1)
        for layer in (self.first, self.second):
            nn.init.kaiming_uniform_(layer.weight, nonlinearity="relu")
            nn.init.zeros_(layer.bias)
        nn.init.normal_(self.last.weight, std=0.01)
        nn.init.zeros_(self.last.bias)

    def forward(self, maps: Sequence[Tensor], objects: Objects) -> Tensor:
        """Means by tanh lie in the object; deviations by sigmoid between `least_deviation` and 1.

        Shares are a softmax over the components and one that is nowhere, so that the mixture's value is in [0, 1]
        everywhere and a level on which nothing is good can say so.
        """
        rois = torch.cat([objects.image[:, None].to(objects.boxes.dtype), objects.boxes], 1)
        seen = [
            self.config.roi(full_precision(x), rois, 1 / stride).flatten(1)
            for x, stride in zip(maps, self.strides, strict=True)
        ]
        hidden = F.relu(self.second(F.relu(self.first(torch.stack(seen, 1)))))
        said = full_precision(self.last(hidden))  # (N, L, 5 M + 1)
        place, share = said.split([4 * self.config.components, self.config.components + 1], -1)
        mean, deviation = place.unflatten(-1, (-1, 4)).split(2, -1)
        least = self.config.least_deviation
        share = share.softmax(-1)[..., :-1, None]
        return torch.cat([mean.tanh(), least + (1 - least) * deviation.sigmoid(), share], -1)
