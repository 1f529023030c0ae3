"""Losses of the class logits: each class a yes or no of its own (sigmoid), targets in [0, 1].

For a logit x with p = sigmoid(x) and target t, all are weights on BCE(x, t), which the gradient sees as well:

    bce             1
    focal           (alpha t + (1 - alpha) (1 - t)) |p - t|^gamma        (Lin et al., ICCV 2017, for t in {0, 1})
    quality_focal   |p - t|^beta                                         (Li et al., NeurIPS 2020, equation 2)
    varifocal       t where t > 0, else alpha p^gamma                    (Zhang et al., CVPR 2021, equation 2)

A rule whose weights hold already how wrong the head is (DW) turns all of that off: `modulation=False` is plain BCE.

A dense detector has millions of logits of which all but some hundred are background.  So value and gradient are written
out together for "everything is background", in blocks that stay in the cache, and then set right at the listed cells.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor
from torch.autograd.function import once_differentiable

from detector.boxes import full_precision
from detector.config.node import Node
from detector.losses.targets import ClassTargets

# Logits handled at once: four blocks of them fit a core's cache; a GPU wants few, large launches instead.
CPU_BLOCK, GPU_BLOCK = 1 << 16, 1 << 24

SMOOTHING = "targets t become t (1 - s) + s / 2"


@dataclass(frozen=True)
class Curve:
    """The loss of one logit as a function of its target; the default is binary cross-entropy."""

    gamma: float = 0.0  # power of the focal factor
    alpha: float | None = None  # weight of positives, 1 - alpha of negatives; asymmetric: of negatives alone
    asymmetric: bool = False  # varifocal: positives weigh as much as their target, without a focal factor
    smoothing: float = 0.0  # targets t become t (1 - s) + s / 2

    @property
    def background(self) -> float:
        """Weight of a target of 0, beside the focal factor."""
        return 1.0 if self.alpha is None else self.alpha if self.asymmetric else 1 - self.alpha

    def smoothed(self, target: Tensor) -> Tensor:
        return target * (1 - self.smoothing) + self.smoothing / 2

    def __call__(self, x: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """Loss and its derivative, elementwise, for targets that are smoothed already.

        Exact at both ends of the logits (no 1 - p that rounds to 0).
        """
        p, not_p = x.sigmoid(), (-x).sigmoid()
        error = p * (1 - target) - not_p * target
        bce = F.relu(x) * (1 - target) + F.relu(-x) * target + torch.log1p(torch.exp(-x.abs()))
        if self.gamma == 0:
            value, slope = bce, error
        else:
            size = error.abs().clamp(min=1e-12)  # the derivative of |error|^gamma has a pole at 0 for gamma < 1
            focus = size.pow(self.gamma)
            value = focus * bce
            slope = focus * (self.gamma * error / size.square() * p * not_p * bce + error)
        if self.alpha is None:
            return value, slope
        if not self.asymmetric:
            balance = self.alpha * target + (1 - self.alpha) * (1 - target)
            return balance * value, balance * slope
        positive = target > 0
        return (
            torch.where(positive, target * bce, self.alpha * value),
            torch.where(positive, target * error, self.alpha * slope),
        )


class ClassLoss(Node):
    """Sum over all class logits of a batch."""

    weight: float = Field(1.0, ge=0, description="factor of this term in the total")

    @property
    @abstractmethod
    def curve(self) -> Curve:
        """What a single logit costs."""

    def __call__(self, logits: Tensor, targets: ClassTargets, *, modulation: bool = True) -> Tensor:
        """(B, R, K) logits of any floating type -> float32 scalar, undivided and without `weight`.

        `modulation=False`: binary cross-entropy with the weights of `targets` and no others.
        """
        curve = self.curve if modulation else Curve(smoothing=self.curve.smoothing)
        total: Tensor = _Sum.apply(logits, targets, curve.smoothed(targets.target), curve)
        return total

    def each(self, logits: Tensor, target: Tensor) -> Tensor:
        """The loss of single logits, same shapes, without weights."""
        return self.curve(full_precision(logits), self.curve.smoothed(target))[0]


class Focal(ClassLoss):
    """Sigmoid focal loss (Lin et al., "Focal Loss for Dense Object Detection", ICCV 2017), soft targets allowed."""

    type: Literal["focal"] = "focal"
    alpha: float | None = Field(0.25, gt=0, lt=1, description="weight of positives, 1 - alpha of negatives; null: none")
    gamma: float = Field(2.0, ge=0, description="how much well classified examples count less")
    label_smoothing: float = Field(0.0, ge=0, lt=1, description=SMOOTHING)

    @property
    def curve(self) -> Curve:
        return Curve(gamma=self.gamma, alpha=self.alpha, smoothing=self.label_smoothing)


class Bce(ClassLoss):
    """Binary cross-entropy."""

    type: Literal["bce"] = "bce"
    label_smoothing: float = Field(0.0, ge=0, lt=1, description=SMOOTHING)

    @property
    def curve(self) -> Curve:
        return Curve(smoothing=self.label_smoothing)


def _background(x: Tensor, weight: Tensor, curve: Curve, slope: Tensor | None) -> Tensor:
    """Weighted sum of the loss of (n, K) background logits; `slope` (n, K) takes the gradient, if wanted."""
    if curve.smoothing > 0:
        value, derivative = curve(x, x.new_full((), curve.smoothing / 2))
        if slope is not None:
            slope.copy_(derivative.mul_(weight))
        return value.mul_(weight).sum()
    # For t = 0 with s = softplus(x):  loss = b p^gamma s,  derivative = b p^gamma (gamma (1 - p) s + p).
    p, s = x.sigmoid(), F.softplus(x)
    factor = p.pow(curve.gamma).mul_(weight if curve.background == 1 else weight * curve.background)
    value = torch.dot(factor.view(-1), s.view(-1))
    if slope is not None:
        rest = torch.addcmul(s, p, s, value=-1, out=s)
        torch.mul(torch.add(p, rest, alpha=curve.gamma, out=rest), factor, out=slope)
    return value


class _Sum(torch.autograd.Function):
    """Value and gradient in one pass; backward only scales the gradient."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: ClassTargets, target: Tensor, curve: Curve) -> Tensor:
        classes = logits.shape[-1]
        rows = logits.reshape(-1, classes)
        count = rows.numel()
        work = torch.float64 if logits.dtype == torch.float64 else torch.float32
        row_weight = targets.prior_weight.reshape(-1, 1).to(work)
        full_weight = None if targets.background_weight is None else targets.background_weight.reshape(-1, classes)

        # bfloat16 has float32's range and can hold the gradient at half the memory; in float16 it would underflow.
        # One place more than there are logits takes the entries of `targets` without meaning.
        kept = torch.bfloat16 if logits.dtype == torch.bfloat16 else work
        wanted = ctx.needs_input_grad[0]
        gradient = torch.empty(count + 1, dtype=kept, device=logits.device) if wanted else None
        slopes = None if gradient is None else gradient[:count].view(-1, classes)

        sums = []
        block = max(1, (CPU_BLOCK if logits.device.type == "cpu" else GPU_BLOCK) // classes)
        for start in range(0, len(rows), block):
            part = slice(start, start + block)
            weight = row_weight[part] if full_weight is None else row_weight[part] * full_weight[part]
            out = None if slopes is None else slopes[part]
            direct = out if out is None or kept == work else torch.empty_like(out, dtype=work)
            sums.append(_background(rows[part].to(work), weight, curve, direct))
            if out is not None and direct is not None and direct is not out:
                out.copy_(direct)
        total = torch.stack(sums).sum()

        real, cell = targets.cell < count, targets.cell.clamp(max=count - 1)
        x = rows.reshape(-1)[cell].to(work)
        was_weight = row_weight.view(-1)[cell // classes]
        if full_weight is not None:
            was_weight = was_weight * full_weight.reshape(-1)[cell]
        was, _ = curve(x, x.new_full((), curve.smoothing / 2))
        now, slope = curve(x, target.to(work))
        weight = targets.weight.to(work)
        total = total + ((now * weight - was * was_weight) * real).sum()
        if gradient is not None:
            gradient.scatter_(0, targets.cell, (slope * weight).to(kept))
            ctx.save_for_backward(gradient)
            ctx.shape, ctx.dtype = logits.shape, logits.dtype
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, scale: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return (gradient[:-1].view(ctx.shape) * scale).to(ctx.dtype), None, None, None
