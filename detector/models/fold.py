"""Batch norms folded into the convolutions before them, for inference."""

from __future__ import annotations

import copy

import torch
from torch import nn

from detector.models import Network
from detector.models.dense_head import TowerLayer
from detector.models.layers import ScaledConv2d
from detector.models.norms import AnyBatchNorm, activation_of, affine_of, pairs_of

SIDE = 64  # pixels of the image that shows which norm follows which convolution


def fold_batch_norm(model: Network) -> Network:
    """A copy in evaluation mode, every batch norm folded that directly follows a convolution.

    Same outputs, but for rounding.  For inference: it cannot be trained further, and its state is no longer `model`'s.
    """
    folded = copy.deepcopy(model).eval()
    for module in folded.modules():
        if isinstance(module, TowerLayer) and len(module.norms) > len(module.convs):
            # A convolution that all levels share cannot take up the norm of each.
            module.convs = nn.ModuleList(copy.deepcopy(module.convs[0]) for _ in module.norms)
    names = {module: name for name, module in folded.named_modules()}
    image = torch.zeros(1, len(model.scale), SIDE, SIDE, dtype=torch.uint8, device=model.scale.device)
    given = {}
    if getattr(model, "rpn", True) is None:
        given["proposals"] = image.new_tensor([[[0, 0, SIDE, SIDE]]], dtype=torch.float32)
    for norm, conv in pairs_of(folded, lambda: folded(image, **given)):
        if isinstance(conv, ScaledConv2d):
            conv = _plain(folded, names[conv], conv)
        _fold(conv, norm)
        parent, _, name = names[norm].rpartition(".")
        setattr(folded.get_submodule(parent), name, activation_of(norm))
    return folded.to(memory_format=torch.channels_last)


def _fold(conv: nn.Conv2d, norm: AnyBatchNorm) -> None:
    scale, shift = affine_of(norm)
    old = 0.0 if conv.bias is None else conv.bias.detach().double()
    weight = conv.weight.detach().double() * scale[:, None, None, None]
    conv.bias = nn.Parameter((old * scale + shift).to(conv.weight.dtype))
    conv.weight = nn.Parameter(weight.to(conv.weight.dtype))


def _plain(model: nn.Module, name: str, scaled: ScaledConv2d) -> nn.Conv2d:
    """The convolution put in the place of the one that scales its weights in every pass."""
    conv = nn.Conv2d.__new__(nn.Conv2d)
    nn.Module.__init__(conv)
    conv.__dict__.update({key: value for key, value in scaled.__dict__.items() if key != "norm"})
    model.set_submodule(name, conv)
    return conv
