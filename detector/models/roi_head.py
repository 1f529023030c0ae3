"""The second stage's head: features of boxes in, classes and refined boxes out.

Legend: B images, S proposals of an image, M proposals of all images, K classes, C channels, h w bins of a proposal.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from detector.coders import Deltas
from detector.config.node import Node
from detector.models.layers import NormKind, conv2d, norm2d
from detector.models.roi_gather import gathers

AS_CONVOLUTION = 512  # proposals from which on a fully connected layer is computed as a convolution
R_CNN = (0.1, 0.1, 0.2, 0.2)  # standard deviations of the deltas that Girshick's Fast R-CNN divides by


class BoxHeadConfig(Node):
    """Shared layers, then one for the classes and one for the boxes.

    The default is Faster R-CNN's of two fully connected layers; `convs: 4, linear: 1, norm: group` is Wu and He's
    ("Group Normalization", ECCV 2018).
    """

    backbone_stage: bool = Field(
        False,
        description="first the backbone's next stage, one for each head; what comes out of it is averaged over the bins"
        " at the end (C4)",
    )
    convs: int = Field(0, ge=0, description="3 x 3 convolutions before the fully connected layers")
    conv_channels: int = Field(256, ge=1)
    norm: NormKind = Field("none", description="of the convolutions")
    linear: int = Field(2, ge=0, description="fully connected layers before those that predict")
    channels: int = Field(1024, ge=1, description="of the fully connected layers")
    classifier: Literal["softmax", "sigmoid"] = Field(
        "softmax", description="softmax: classes and background compete; sigmoid: each class by itself"
    )
    class_agnostic: bool = Field(False, description="one box for a proposal instead of one for each class")
    coder: Deltas = Deltas(std=R_CNN, clamp="above")
    prior_probability: float = Field(0.01, gt=0, lt=1, description="of every class before training; sigmoid alone")

    @model_validator(mode="after")
    def _some_layer(self) -> BoxHeadConfig:
        if self.convs + self.linear == 0 and not self.backbone_stage:
            raise ValueError("convs and linear are both 0: the head needs at least one layer")
        return self

    def build(
        self, in_channels: int, size: tuple[int, int], num_classes: int, stage: nn.Module | None = None
    ) -> BoxHead:
        """For features (M, in_channels, *size); with a `stage` of the backbone, `in_channels` are what it gives."""
        return BoxHead(self, in_channels, size, num_classes, stage)


class BoxHead(nn.Module):
    """(M, C, h, w) -> class logits and raw boxes, (M, 4) or (M, K, 4).

    Logits are (M, K + 1), background last, or with sigmoid (M, K).
    """

    def __init__(
        self,
        config: BoxHeadConfig,
        in_channels: int,
        size: tuple[int, int],
        num_classes: int,
        stage: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.config, self.num_classes = config, num_classes
        convs: list[nn.Module] = []
        for i in range(config.convs):
            bias = config.norm == "none"
            convs.append(conv2d(config.conv_channels if i else in_channels, config.conv_channels, 3, bias=bias))
            convs.append(norm2d(config.norm, config.conv_channels))
            convs.append(nn.ReLU(inplace=True))
        self.convs = nn.Sequential(*convs)
        width = config.conv_channels if config.convs else in_channels
        width *= 1 if stage is not None else size[0] * size[1]
        self.linear = nn.ModuleList(
            nn.Linear(config.channels if i else width, config.channels) for i in range(config.linear)
        )
        width = config.channels if config.linear else width
        self.classes = nn.Linear(width, num_classes + (config.classifier == "softmax"))
        self.box = nn.Linear(width, 4 if config.class_agnostic else 4 * num_classes)
        self._initialise()
        self.stage = stage  # after that: it has its own first values, or weights

    def _initialise(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            elif isinstance(module, nn.Linear):
                nn.init.kaiming_uniform_(module.weight, a=1)
            if isinstance(module, nn.Conv2d | nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
        nn.init.normal_(self.classes.weight, std=0.01)
        nn.init.normal_(self.box.weight, std=0.001)
        if self.config.classifier == "sigmoid":
            nn.init.constant_(self.classes.bias, -math.log(1 / self.config.prior_probability - 1))

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        x = self.convs(features if self.stage is None else self.stage(features))
        if self.stage is not None:
            x = x.mean((2, 3))
        for layer in self.linear:
            x = F.relu(layer(x) if x.ndim == 2 else _of_all_bins(layer, x), inplace=True)
        x = x.flatten(1)
        raw = self.box(x)
        return self.classes(x), raw if self.config.class_agnostic else raw.unflatten(1, (self.num_classes, 4))

    def probabilities(self, logits: Tensor) -> Tensor:
        """(..., K + 1) or (..., K) logits as `forward` gives them -> (..., K) float32 in [0, 1]."""
        if self.config.classifier == "softmax":
            return logits.float().softmax(-1)[..., :-1]
        return logits.float().sigmoid()


def _of_all_bins(layer: nn.Module, x: Tensor) -> Tensor:
    """(M, C, h, w) -> (M, out): a fully connected layer on everything in a proposal's bins.

    In inference on a CPU, of many proposals, as the convolution with one bin as large as the map that it is: oneDNN
    needs about half of a matrix product's time, and no copy out of channels_last.  For few, preparing the weight costs
    more; with a gradient it takes twice the memory.
    """
    assert isinstance(layer, nn.Linear)
    if torch.is_grad_enabled() or not gathers(x) or len(x) < AS_CONVOLUTION:
        return F.linear(x.flatten(1), layer.weight, layer.bias)
    return F.conv2d(x, layer.weight.unflatten(1, x.shape[1:]), layer.bias).flatten(1)


def class_losses(classifier: str, logits: Tensor, target: Tensor) -> Tensor:
    """(B, S) what each proposal's classification costs now; `target` (B, S) int64, K for background.

    For samplers that mine by loss: plain cross-entropy, of softmax or summed over the sigmoids.
    """
    logits = logits.float()
    if classifier == "softmax":
        return F.cross_entropy(logits.flatten(0, 1), target.flatten(), reduction="none").view_as(target)
    goal = F.one_hot(target, logits.shape[-1] + 1)[..., :-1].to(logits)
    return F.binary_cross_entropy_with_logits(logits, goal, reduction="none").sum(-1)


def scores_as_logits(probabilities: Tensor) -> Tensor:
    """What decoding and assigners take: the numbers whose sigmoid is the probability."""
    return torch.logit(probabilities)
