"""Notices a loss that is not finite, at once on a CPU and without ever waiting for a GPU."""

from __future__ import annotations

import math
from contextlib import suppress

import torch
from torch import Tensor

from detector.errors import NonFiniteLoss
from detector.train.step import StepResult


class FiniteCheck:
    """Remembers the first bad step on the device and sends that to the host behind the step's own work.

    So a GPU's bad step is noticed some steps later, but before anything is saved: `check` waits for what is under way.
    """

    def __init__(self, device: torch.device, scaled: bool) -> None:
        self.device = device
        self.scaled = scaled  # with a gradient scaler, infinite gradients are normal: that step is skipped
        self._names: tuple[str, ...] = ()
        self._images: dict[int, tuple[int, ...]] = {}  # of the steps since the last check
        self._state = self._host = torch.full((1,), -1.0)

    def add(self, step: int, result: StepResult, image_ids: Tensor) -> None:
        """A step that was done, and the (B,) ids of its images on the CPU.

        Raises:
            NonFiniteLoss: this step, or on a GPU an earlier one, was not finite.
        """
        values = dict(result.terms) if self.scaled else {**result.terms, "gradient": result.gradient_norm}
        if tuple(values) != self._names:
            self.check()
            self._start(tuple(values))
        self._images[step] = tuple(image_ids.tolist())
        row = torch.stack(list(values.values())).float()
        is_first = ~row.isfinite().all() & (self._state[0] < 0)
        self._state = torch.where(is_first, torch.cat([row.new_full((1,), step), row]), self._state)
        self._host.copy_(self._state, non_blocking=self.device.type == "cuda")
        self._look()

    def check(self) -> None:
        """Waits for the device.

        Raises:
            NonFiniteLoss: a step since the last check was not finite.
        """
        self._wait()
        self._look()
        self._images.clear()

    def explain(self, error: RuntimeError, step: int, image_ids: Tensor) -> None:
        """Raises NonFiniteLoss if `error`, which came up while step `step` was done, comes from numbers not finite."""
        self._look()
        if "hold NaN" in str(error):
            raise NonFiniteLoss(_sentence(step, "the network's predictions are NaN", image_ids.tolist(), self.scaled))

    def _start(self, names: tuple[str, ...]) -> None:
        self._names = names
        self._state = torch.full((1 + len(names),), -1.0, device=self.device)
        self._host = torch.full((1 + len(names),), -1.0, pin_memory=self.device.type == "cuda")

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def _look(self) -> None:
        if self._host[0] < 0:
            return
        with suppress(RuntimeError):  # a GPU that has failed in the meantime; what it sent before is there
            self._wait()
        step, *values = self._host.tolist()
        bad = [f"{name} is {v}" for name, v in zip(self._names, values, strict=True) if not math.isfinite(v)]
        raise NonFiniteLoss(_sentence(int(step), " and ".join(bad), self._images.get(int(step), ()), self.scaled))


def _sentence(step: int, what: str, images: tuple[int, ...] | list[int], scaled: bool) -> str:
    advice = "lower train.optimizer.lr, lengthen the warm-up or set train.clip_norm"
    if scaled:
        advice += ", or use train.precision=bf16"
    return (
        f"step {step}: training has diverged: {what} (image ids {', '.join(map(str, images))}); {advice}."
        " What was saved before is intact"
    )
