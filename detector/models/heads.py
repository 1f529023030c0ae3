"""What heads over all levels have in common before they run: their settings, and how their weights start."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence
from typing import Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from detector.coders import AnyCoder, Coder, Deltas
from detector.config.node import Node
from detector.models.layers import ConvKind, NormKind
from detector.models.priors import Anchors, AnyPriors


class HeadConfig(Node):
    """What heads over all levels with the same weights have in common."""

    priors: AnyPriors = Anchors()
    coder: AnyCoder = Deltas()
    channels: int = Field(256, ge=1)
    norm: NormKind = Field("group", description="batch: each level has its own statistics, see TowerLayer")
    conv: ConvKind = Field("plain", description="separable: light 3 x 3 convolutions, the predicting ones included")
    tower_bias: bool = Field(False, description="a bias before a norm too, as torchvision's FCOS has it")
    level_scale: bool = Field(False, description="a learnt factor for the raw boxes of each level (FCOS)")
    quality: bool = Field(False, description="predict a centerness or IoU from the features of the boxes")
    prior_probability: float = Field(0.01, gt=0, lt=1, description="class score of every prior before training")
    start: float | None = Field(
        None,
        gt=0,
        description="strides from the prior's centre to each side of its box (before any refinement) before training;"
        " null: whatever the coder makes of 0",
    )

    @model_validator(mode="after")
    def _start_can_be_said(self) -> Self:
        if self.start is not None:
            prior, size, box = _first_boxes(self, self.start, 8)
            said = self.coder.decode(prior, size, self.coder.encode(prior, size, box))
            if not torch.allclose(said, box, rtol=0.05):
                raise ValueError(
                    f"start is {self.start:g} strides, but coder {self.coder.type!r} says {said[0, 2] / 8:.3g} for it;"
                    " start nearer, or change the coder"
                )
        return self

    @property
    def output_coder(self) -> Coder:
        """What the boxes of the outputs are said in."""
        return self.coder

    @property
    def initial_coder(self) -> Coder | None:
        """What the boxes before refinement are said in; None: the head does not refine."""
        return None

    @abstractmethod
    def build(self, in_channels: int, strides: Sequence[int], num_classes: int) -> nn.Module:
        """For maps of `in_channels` and these strides, fine to coarse."""


def initialise(head: nn.Module) -> None:
    """Small normal weights, as in RetinaNet, and biases of 0."""
    for module in head.modules():
        if isinstance(module, nn.Conv2d):
            # Depthwise: as many inputs as taps, so 0.01 twice in a row would leave no signal.
            nn.init.normal_(module.weight, std=1 / 3 if module.groups > 1 else 0.01)
            if module.bias is not None:
                nn.init.zeros_(module.bias)


def say(probability: float, predictor: nn.Module) -> None:
    """Makes the sigmoid of what `predictor` gives start at `probability`."""
    last = [module for module in predictor.modules() if isinstance(module, nn.Conv2d)][-1]
    assert last.bias is not None
    nn.init.constant_(last.bias, -math.log((1 - probability) / probability))


@torch.no_grad()
def start_at(predictor: nn.Module, config: HeadConfig, stride: int) -> None:
    """Makes the boxes that `predictor` says start as `config.start` asks, if it does."""
    if config.start is None:
        return
    prior, size, box = _first_boxes(config, config.start, stride)
    last = [module for module in predictor.modules() if isinstance(module, nn.Conv2d)][-1]
    assert last.bias is not None
    last.bias.copy_(config.coder.encode(prior, size, box).flatten())


def _first_boxes(config: HeadConfig, distance: float, stride: int) -> tuple[Tensor, Tensor, Tensor]:
    """The priors of a cell about 0 (A, 4), their strides (A,), and the boxes that they shall start with (A, 4)."""
    half = torch.tensor(config.priors.shapes(stride)) / 2  # (A, 2)
    side = torch.full_like(half, distance * stride)
    return torch.cat([-half, half], 1), half.new_full((len(half),), stride), torch.cat([-side, side], 1)
