"""The moving average of a model's weights, which usually scores better than the weights themselves."""

from __future__ import annotations

import copy

import torch
from pydantic import Field
from torch import Tensor, nn

from detector.config.node import Node


class EmaConfig(Node):
    """Exponential moving average of the weights (Polyak and Juditsky, 1992)."""

    decay: float = Field(0.9998, ge=0, lt=1, description="share of the average that stays in a step, at most")
    warmup: float = Field(10.0, ge=1, description="the share is at most (1 + n) / (warmup + n) in update n")

    def build(self, model: nn.Module) -> Ema:
        return Ema(self, model)


class Ema:
    """`model` holds the average.  Parameters and the statistics of batch norms are averaged, other buffers copied.

    The warm-up makes the average one of about the last 1 / (`warmup` - 1) of the run until `decay` sets in: early
    weights are soon forgotten and short runs need no decay of their own.
    """

    def __init__(self, config: EmaConfig, model: nn.Module) -> None:
        self.config = config
        self.count = 0
        self.model = copy.deepcopy(model).eval().requires_grad_(False)
        self._averaged, self._copied = _pairs(self.model, model)

    def decay(self) -> float:
        """The share of the average that stays in the next update."""
        return min(self.config.decay, (1 + self.count) / (self.config.warmup + self.count))

    @torch.no_grad()
    def update(self) -> None:
        """Moves towards the model's present weights; to be called after each step."""
        mine, theirs = self._averaged
        torch._foreach_lerp_(mine, theirs, 1 - self.decay())
        mine, theirs = self._copied
        if mine:
            torch._foreach_copy_(mine, theirs)
        self.count += 1

    def load(self, weights: dict[str, Tensor], count: int) -> None:
        """Goes on from `model.state_dict()` and `count` of a checkpoint."""
        self.model.load_state_dict(weights)
        self.count = count


Lists = tuple[list[Tensor], list[Tensor]]


def _pairs(average: nn.Module, model: nn.Module) -> tuple[Lists, Lists]:
    """(ours, theirs) of what is averaged, and of what is copied.  Frozen parameters are in neither: they stay equal."""
    ours: dict[str, Tensor] = dict(average.named_parameters()) | dict(average.named_buffers())
    averaged: Lists = ([], [])
    copied: Lists = ([], [])
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            averaged[0].append(ours[name])
            averaged[1].append(parameter)
    for name, buffer in model.named_buffers():
        target = averaged if name.endswith(("running_mean", "running_var")) else copied
        target[0].append(ours[name])
        target[1].append(buffer)
    return averaged, copied
