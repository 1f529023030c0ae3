"""Optimisers and which parameter gets which learning rate and weight decay."""

from __future__ import annotations

from abc import abstractmethod
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import nn
from torch.optim import Optimizer

from detector.config.node import Node

# In `TrainingModule`, the weights that usually come from another task.
BACKBONE = "model.backbone."


class OptimizerConfig(Node):
    """What every optimiser has."""

    lr: float = Field(0.01, gt=0, description="of all but the backbone, for steps of `base_batch` images")
    base_batch: int | None = Field(
        16, ge=1, description="lr is multiplied by train.batch_size / base_batch; null: it stays as it is"
    )
    weight_decay: float = Field(1e-4, ge=0, description="not for norms, biases and learnt factors")
    backbone_lr_scale: float = Field(1.0, ge=0, description="the backbone's learning rate is lr times this")

    def scaled_lr(self, batch: int) -> float:
        """The learning rate for steps of `batch` images: linear (Goyal et al., arXiv:1706.02677)."""
        return self.lr if self.base_batch is None else self.lr * batch / self.base_batch

    def explain(self, batch: int) -> str:
        """How the learning rate came about, for people."""
        lr = self.scaled_lr(batch)
        if self.base_batch is None or self.base_batch == batch:
            text = f"learning rate {lr:g}"
        else:
            text = (
                f"learning rate {lr:g} = {self.lr:g} * {batch}/{self.base_batch}: given for steps of"
                f" {self.base_batch} images and scaled linearly to train.batch_size={batch}"
                " (train.optimizer.base_batch=null turns that off)"
            )
        if self.backbone_lr_scale != 1:
            text += f"; backbone {lr * self.backbone_lr_scale:g}"
        return text

    def build(self, module: nn.Module, batch: int) -> Optimizer:
        """For all parameters of `module` that take a gradient; each group keeps its full rate as `base_lr`."""
        groups = parameter_groups(module, self.scaled_lr(batch), self.backbone_lr_scale, self.weight_decay)
        # One kernel for all parameters where there is one; the same results every time.
        fused = all(p.device.type in ("cpu", "cuda") for p in module.parameters())
        return self.create(groups, fused)

    @abstractmethod
    def create(self, groups: list[dict[str, Any]], fused: bool) -> Optimizer: ...


class Sgd(OptimizerConfig):
    """Stochastic gradient descent with momentum."""

    type: Literal["sgd"] = "sgd"
    momentum: float = Field(0.9, ge=0, lt=1)
    nesterov: bool = False

    def create(self, groups: list[dict[str, Any]], fused: bool) -> Optimizer:
        nesterov = self.nesterov and self.momentum > 0
        return torch.optim.SGD(groups, lr=self.lr, momentum=self.momentum, nesterov=nesterov, fused=fused)


class AdamW(OptimizerConfig):
    """Adam with decoupled weight decay (Loshchilov and Hutter, arXiv:1711.05101)."""

    type: Literal["adamw"] = "adamw"
    lr: float = Field(1e-4, gt=0, description="of all but the backbone, for steps of `base_batch` images")
    weight_decay: float = Field(0.05, ge=0, description="not for norms, biases and learnt factors")
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.9, 0.999)
    eps: float = Field(1e-8, gt=0)

    def create(self, groups: list[dict[str, Any]], fused: bool) -> Optimizer:
        return torch.optim.AdamW(groups, lr=self.lr, betas=self.betas, eps=self.eps, fused=fused)


AnyOptimizer = Annotated[Sgd | AdamW, Field(discriminator="type")]


def parameter_groups(
    module: nn.Module, lr: float, backbone_lr_scale: float, weight_decay: float
) -> list[dict[str, Any]]:
    """Every parameter that takes a gradient, in exactly one of four groups: backbone or not, decayed or not.

    Frozen parameters are left out, and with `backbone_lr_scale` 0 the backbone stays in its groups at rate 0.
    """
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            groups.setdefault((name.startswith(BACKBONE), decays(name, parameter)), []).append(parameter)
    return [
        {
            "name": f"{'backbone' if backbone else 'rest'}, {'with' if decayed else 'without'} decay",
            "params": parameters,
            "base_lr": lr * (backbone_lr_scale if backbone else 1.0),
            "lr": lr * (backbone_lr_scale if backbone else 1.0),
            "weight_decay": weight_decay if decayed else 0.0,
        }
        for (backbone, decayed), parameters in sorted(groups.items(), key=lambda item: item[0])
    ]


def decays(name: str, parameter: nn.Parameter) -> bool:
    """Whether weight decay makes sense: for weights that multiply many inputs.

    Norms, biases and learnt factors have one dimension at most; transformers' tables of position biases have more and
    are known by their names.
    """
    own_name = name.rpartition(".")[2]
    return parameter.ndim > 1 and "bias" not in own_name and "pos_embed" not in own_name
