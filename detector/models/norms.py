"""What batch norms can become, and which convolution each follows."""

from __future__ import annotations

from collections.abc import Callable

import torch
from timm.layers import convert_sync_batchnorm
from torch import Tensor, nn

from detector.models.layers import BackboneNorm, FrozenBatchNorm2d, GroupNorm2d, ScaledConv2d

AnyBatchNorm = nn.BatchNorm2d | nn.SyncBatchNorm | FrozenBatchNorm2d


def affine_of(norm: AnyBatchNorm) -> tuple[Tensor, Tensor]:
    """(C,), (C,) float64: in inference the norm is `x * scale + shift`."""
    if isinstance(norm, FrozenBatchNorm2d):
        return norm.scale.double(), norm.shift.double()
    assert norm.running_mean is not None
    assert norm.running_var is not None
    scale = norm.weight.detach().double() / (norm.running_var.double() + norm.eps).sqrt()
    return scale, norm.bias.detach().double() - norm.running_mean.double() * scale


def activation_of(norm: nn.Module) -> nn.Module:
    """What a norm does after normalising: timm's mobile networks keep the activation inside the norm."""
    act = getattr(norm, "act", None)
    return act if isinstance(act, nn.Module) else nn.Identity()


def replace_batch_norms(module: nn.Module, kind: BackboneNorm) -> int:
    """Turns every batch norm below `module` into `kind`, in place; returns how many there were."""
    count = 0
    for name, child in module.named_children():
        if isinstance(child, nn.BatchNorm2d):
            setattr(module, name, _replacement(child, kind))
            count += 1
        else:
            count += replace_batch_norms(child, kind)
    return count


def _replacement(norm: nn.BatchNorm2d, kind: BackboneNorm) -> nn.Module:
    if kind == "frozen_batch":
        scale, shift = (x.to(norm.weight.dtype) for x in affine_of(norm))
        return FrozenBatchNorm2d(scale, shift, activation_of(norm))
    if kind == "group":
        return GroupNorm2d(norm.num_features, activation_of(norm))
    # Statistics over all ranks; where training is not distributed, it is an ordinary batch norm.
    return convert_sync_batchnorm(norm) if kind == "sync_batch" else norm


@torch.no_grad()
def merge_frozen(features: nn.Module, channels: int) -> None:
    """Lets each convolution do the work of the frozen batch norm that follows it, in place.

    Names in the state stay what they are.  Where a norm's convolution is none of torch's plain ones (or there is none),
    the norm goes on working by itself.
    """
    was_training = features.training
    found = pairs_of(features.eval(), lambda: features(torch.zeros(1, channels, 64, 64)))
    features.train(was_training)
    names = {module: name for name, module in features.named_modules()}
    for norm, conv in found:
        if isinstance(norm, FrozenBatchNorm2d) and type(conv) is nn.Conv2d and conv.padding_mode == "zeros":
            parent, _, name = names[conv].rpartition(".")
            setattr(features.get_submodule(parent), name, ScaledConv2d(conv, norm))


def pairs_of(model: nn.Module, run: Callable[[], object]) -> list[tuple[AnyBatchNorm, nn.Conv2d]]:
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
    with torch.no_grad():
        run()
    for handle in handles:
        handle.remove()
    return [(norm, conv) for norm, conv in pairs if calls[norm] == 1 and calls[conv] == 1]
