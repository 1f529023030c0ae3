"""Batch norms folded into the convolutions before them, for inference."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from detector.models import Network
from detector.models.dense_head import TowerLayer
from detector.models.layers import AnyBatchNorm, activation_of, affine_of

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
    for norm, conv in _pairs(folded):
        _fold(conv, norm)
        parent, _, name = names[norm].rpartition(".")
        setattr(folded.get_submodule(parent), name, activation_of(norm))
    return folded.to(memory_format=torch.channels_last)


def _pairs(model: Network) -> list[tuple[AnyBatchNorm, nn.Conv2d]]:
    """Batch norms with the convolution whose output they take, both used once: seen in a run, whatever the names.

    A convolution's output that goes elsewhere as well would not be seen; no network normalises only one branch of it.
    """
    made_by: dict[int, nn.Conv2d] = {}
    alive: list[Tensor] = []  # else a freed tensor's id could be given to another
    calls: dict[nn.Module, int] = {}
    pairs = []

    def seen(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        calls[module] = calls.get(module, 0) + 1
        if isinstance(module, nn.Conv2d):
            made_by[id(output)] = module
            alive.append(output)
        elif id(inputs[0]) in made_by:
            assert isinstance(module, AnyBatchNorm)
            pairs.append((module, made_by[id(inputs[0])]))

    watched = [m for m in model.modules() if isinstance(m, nn.Conv2d | AnyBatchNorm)]
    handles = [module.register_forward_hook(seen) for module in watched]
    image = torch.zeros(1, len(model.scale), SIDE, SIDE, dtype=torch.uint8, device=model.scale.device)
    with torch.no_grad():
        if getattr(model, "rpn", True) is None:
            model(image, proposals=image.new_tensor([[[0, 0, SIDE, SIDE]]], dtype=torch.float32))
        else:
            model(image)
    for handle in handles:
        handle.remove()
    return [(norm, conv) for norm, conv in pairs if calls[norm] == 1 and calls[conv] == 1]


def _fold(conv: nn.Conv2d, norm: AnyBatchNorm) -> None:
    scale, shift = affine_of(norm)
    old = 0.0 if conv.bias is None else conv.bias.detach().double()
    weight = conv.weight.detach().double() * scale[:, None, None, None]
    conv.bias = nn.Parameter((old * scale + shift).to(conv.weight.dtype))
    conv.weight = nn.Parameter(weight.to(conv.weight.dtype))
