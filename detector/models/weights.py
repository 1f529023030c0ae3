"""Backbone weights from a local file: nothing is executed, nothing is skipped in silence."""

from __future__ import annotations

import pickle
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from timm.models import adapt_input_conv
from torch import Tensor, nn

from detector.errors import CheckpointError

# Counters and lookup tables that a network computes itself; files of other versions have them or not.
COMPUTED = ("num_batches_tracked", "relative_position_index", "attn_mask")


@dataclass(frozen=True)
class LoadedWeights:
    """What came from a weights file."""

    loaded: tuple[str, ...]  # names in the network
    unused: tuple[str, ...]  # names in the file that the detector has no use for, such as the classifier

    def __str__(self) -> str:
        parts = sorted({key.split(".")[0] for key in self.unused})
        return f"{len(self.loaded)} tensors loaded, {len(self.unused)} not used" + (
            f" ({some(parts)})" if parts else ""
        )


def load_weights(features: nn.Module, path: Path, *, name: str, known: set[str], channels: int = 3) -> LoadedWeights:
    """Loads a whole network's weights file into its feature extractor.

    `known`: every name that the whole network `name` has, classifier included; a file with other names belongs to
    another network, even if all that we need is there (ResNet-101's file would fit ResNet-50).  Where the network takes
    images of other `channels` than RGB, the first convolution's weights for RGB are adapted as timm does it: summed for
    grey, repeated for more and scaled to the same reach.  Raises
    `CheckpointError` for a missing, damaged or unsafe file, and for one of another architecture.
    """
    state = read_state(path)
    wanted = features.state_dict()
    renamed = {_flattened(key) if key not in wanted else key: key for key in state}
    if channels != 3:
        for key, value in wanted.items():
            given = state[renamed[key]] if key in renamed else value
            if given.ndim == 4 and given.shape[1] == 3 and value.shape[1] == channels:
                state[renamed[key]] = adapt_input_conv(channels, given)
    missing = [key for key in wanted if key not in renamed and not key.endswith(COMPUTED)]
    foreign = [key for key in state if key not in known and key not in wanted and not key.endswith(COMPUTED)]
    misfits = [
        f"{key} {tuple(state[renamed[key]].shape)} instead of {tuple(value.shape)}"
        for key, value in wanted.items()
        if key in renamed and state[renamed[key]].shape != value.shape
    ]
    problems = []
    if missing:
        problems.append(f"{len(missing)} of {len(wanted)} tensors are missing ({some(missing)})")
    if misfits:
        problems.append(f"{len(misfits)} have another shape ({some(misfits)})")
    if foreign:
        problems.append(f"{len(foreign)} belong to no part of it ({some(foreign)})")
    if problems:
        raise CheckpointError(
            f"{path}: not the weights of {name}: {'; '.join(problems)};"
            f" set backbone.name to the network they were made with, or backbone.weights to another file"
        )
    found = {key: state[renamed[key]] for key in wanted if key in renamed}
    features.load_state_dict(found, strict=False)
    used = {renamed[key] for key in found}
    return LoadedWeights(tuple(found), tuple(key for key in state if key not in used))


def read_state(path: Path) -> dict[str, Tensor]:
    """Names and tensors of a `.safetensors` or a torch file; in a torch file also below `state_dict` or `model`."""
    if not path.is_file():
        raise CheckpointError(f"{path}: no such weights file; backbone.weights must name a .safetensors or .pth file")
    try:
        content = load_file(path) if path.suffix == ".safetensors" else torch.load(path, "cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path}: not a file of plain tensors (damaged, or holds code, which is never run); save the state_dict"
            " alone, or as .safetensors"
        ) from error
    except Exception as error:  # a damaged file makes its reader fail in any way
        raise CheckpointError(
            f"{path}: truncated, or not a weights file ({_first_line(error)}); get it anew"
        ) from error
    return _tensors(content, path)


def _tensors(content: Any, path: Path) -> dict[str, Tensor]:
    if isinstance(content, dict):
        for wrapper in ("state_dict", "model"):
            if isinstance(content.get(wrapper), dict):
                content = content[wrapper]
        if content and all(isinstance(value, Tensor) for value in content.values()):
            return content
    raise CheckpointError(f"{path}: expected names with tensors, found {type(content).__name__}; save the state_dict")


def _flattened(key: str) -> str:
    """timm's extractors call `stages.0.x` of the whole network `stages_0.x`."""
    return re.sub(r"^(\w+)\.(\d+)\.", r"\1_\2.", key)


def some(names: Sequence[str], count: int = 3) -> str:
    """The first of the names, for a message."""
    return ", ".join(names[:count]) + (", ..." if len(names) > count else "")


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
