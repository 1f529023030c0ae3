from __future__ import annotations

import pytest
import torch

from detector.errors import DeviceError
from detector.train.device import find_device


def test_a_gpu_that_is_not_there_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert find_device("auto") == find_device("cpu") == torch.device("cpu")
    for name in ("cuda", "cuda:0"):
        with pytest.raises(DeviceError, match=f"device '{name}': no CUDA GPU was found"):
            find_device(name)


def test_gpus_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert find_device("auto") == torch.device("cuda")
    assert find_device("cuda:1") == torch.device("cuda:1")
    with pytest.raises(DeviceError, match="has 2 CUDA GPUs, numbered from 0"):
        find_device("cuda:2")


def test_apples_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    with pytest.raises(DeviceError, match="no Apple GPU"):
        find_device("mps")


@pytest.mark.parametrize("name", ["gpu", "cuda:x", "", "cpu:0x"])
def test_names_that_are_none(name: str) -> None:
    with pytest.raises(DeviceError, match="expected auto, cpu, cuda"):
        find_device(name)
