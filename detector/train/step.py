"""One step of the optimiser: forward, losses, backward over all parts of the batch, clip, update, average.

The losses arrive as sums and one normaliser.  A step's gradient is that of all sums over the total of the normalisers,
however many parts it is computed in: every part is divided by the first part's normaliser (so that numbers stay in the
range of half precision), and the gradients are corrected once at the end.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from detector.evaluate.assignments import AssignmentStatistics
from detector.models.layers import Precision, autocast
from detector.structures import Batch, Losses
from detector.train.ema import Ema

if TYPE_CHECKING:
    from detector.assign import Assigner


class TrainingModule(nn.Module):
    """Network and criterion as one: what data-parallel training wraps and the optimiser sees.

    `.model` is what is averaged, evaluated and exported; the criterion may have parameters of its own.  `statistics`
    sums up what the assignments of the criterion were like, under their names; whoever logs them empties it.
    """

    def __init__(self, model: nn.Module, criterion: nn.Module, precision: Precision = "fp32") -> None:
        super().__init__()
        self.model, self.criterion, self.precision = model, criterion, precision
        self.statistics: dict[str, AssignmentStatistics] = {}

    def forward(self, batch: Batch) -> Losses:
        """The network under autocast, the criterion in float32 outside of it."""
        with autocast(batch.images.device, self.precision):
            outputs = self.model(batch.images, batch.objects)
        losses: Losses = self.criterion(outputs, batch.objects)
        for name, assignment in losses.assignments.items():
            statistics = self.statistics.setdefault(name, AssignmentStatistics())
            statistics.add(outputs.priors_of(name), batch.objects, assignment)
        return losses


@dataclass(frozen=True)
class StepResult:
    """What a step has to tell, still on the device."""

    terms: dict[str, Tensor]  # scalars, divided by the normaliser of the whole step; they add up to the loss
    gradient_norm: Tensor  # scalar, before clipping
    positives: Tensor  # scalar: the normaliser of the whole step


class Stepper:
    """Does steps.  Nothing in it waits for the device."""

    def __init__(
        self, module: nn.Module, optimizer: Optimizer, scaler: torch.amp.GradScaler, clip_norm: float | None
    ) -> None:
        self.module, self.optimizer, self.scaler, self.clip_norm = module, optimizer, scaler, clip_norm
        self.parameters = [p for group in optimizer.param_groups for p in group["params"]]

    def __call__(self, parts: Sequence[Batch], ema: Ema | None = None) -> StepResult:
        """One step on the parts of one batch, which are on the device."""
        self.optimizer.zero_grad(set_to_none=True)
        sums, normalizer = self._backward(parts)
        self.scaler.unscale_(self.optimizer)
        norm = nn.utils.get_total_norm([p.grad for p in self.parameters if p.grad is not None])
        if self.clip_norm is not None:
            nn.utils.clip_grads_with_norm_(self.parameters, self.clip_norm, norm)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if ema is not None:
            ema.update()
        divisor = normalizer.clamp(min=1)
        return StepResult({name: value / divisor for name, value in sums.items()}, norm, normalizer)

    def _backward(self, parts: Sequence[Batch]) -> tuple[dict[str, Tensor], Tensor]:
        """Gradients of the whole step; the sum of each loss term, and of the normalisers."""
        losses = [self._backward_part(parts[0], None)]
        first = losses[0].normalizer
        losses += [self._backward_part(part, first) for part in parts[1:]]
        if len(losses) == 1:
            return losses[0].sums, first
        total = torch.stack([part.normalizer for part in losses]).sum()
        correction = first.clamp(min=1) / total.clamp(min=1)
        torch._foreach_mul_([p.grad for p in self.parameters if p.grad is not None], correction)
        return {name: torch.stack([part.sums[name] for part in losses]).sum() for name in losses[0].sums}, total

    def _backward_part(self, batch: Batch, normalizer: Tensor | None) -> Losses:
        losses: Losses = self.module(batch)
        divisor = (losses.normalizer if normalizer is None else normalizer).clamp(min=1)
        self.scaler.scale(torch.stack(list(losses.sums.values())).sum() / divisor).backward()
        return Losses({k: v.detach() for k, v in losses.sums.items()}, losses.normalizer, losses.assignments)


def set_assigner(module: TrainingModule, assigner: Assigner) -> None:
    """The rule by which the criterion assigns from now on: given anew in each step, it is no state to be saved."""
    module.criterion.assigner = assigner  # type: ignore[assignment]


def set_lr(optimizer: Optimizer, factor: float) -> None:
    """The learning rate of every group: its own full rate times `factor`."""
    for group in optimizer.param_groups:
        group["lr"] = group["base_lr"] * factor
