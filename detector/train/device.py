"""Which device a run or a command computes on."""

from __future__ import annotations

import os
import re

import torch

from detector.errors import DeviceError

DEVICES = r"^(auto|cpu|mps|cuda(:\d+)?)$"


def find_device(name: str) -> torch.device:
    """`cpu`, `cuda`, `cuda:1`, `mps`, or `auto` for a GPU if there is one.

    Raises:
        DeviceError: this machine does not have it, or there is no such name.
    """
    if not re.match(DEVICES, name):
        raise DeviceError(f"device {name!r}: expected auto, cpu, cuda, cuda:1 (the second GPU) or mps")
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    device = torch.device(name)
    if device.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if count == 0:
            raise DeviceError(f"device {name!r}: no CUDA GPU was found on this machine; use cpu or auto")
        if (device.index or 0) >= count:
            raise DeviceError(f"device {name!r}: this machine has {count} CUDA GPUs, numbered from 0")
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise DeviceError(f"device {name!r}: no Apple GPU was found on this machine; use cpu or auto")
    return device


def gpu_names() -> tuple[str, ...]:
    """The CUDA GPUs of this process as `CUDA_VISIBLE_DEVICES` calls them, for processes that shall have one each."""
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    given = [name.strip() for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name.strip()]
    return tuple(given[:count]) if len(given) >= count else tuple(map(str, range(count)))
