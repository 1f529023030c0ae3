"""What the criteria share that maximise a likelihood instead of following labels (FreeAnchor, AutoAssign).

Legend: B images, R priors of an image, N objects of the batch, K classes, S priors looked at for an object.

Both say for every object how likely it is that some prior found it (a weighted mean over many, which sharpens as the
network learns), and for every prior and class how likely it is that it is background.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from detector.assign.base import crowded, outside
from detector.errors import ConfigError
from detector.losses.classification import CPU_BLOCK, GPU_BLOCK
from detector.structures import Assignment, Objects, Outputs, Priors

LEAST = 1e-12  # likelihoods and divisors are at least this, as in the authors' codes
LEAST_TO_LOG = 1e-37  # a normal float32 number, so that no log is infinite: at least -85.2
COUNTS_FROM = 0.5  # what weighs at least so much of the heaviest prior of its object is reported as positive


def negative_sum(
    class_logits: Tensor, quality_logits: Tensor | None, belonging: Tensor, prior_weight: Tensor, gamma: float
) -> Tensor:
    """Sum of -q^gamma log(1 - q) over all priors and classes, q = (1 - belonging) sigmoid(class) sigmoid(quality).

    class_logits: (B, R, K).  quality_logits: (B, R) or None for 1.  belonging: (B, R, K) in [0, 1], how much a prior
    belongs to an object of the class and so is no mistake.  prior_weight: (B, R).  -> float32 scalar.

    Value and gradient are written out together, in blocks; the logits' gradient is all that is kept.
    """
    total: Tensor = _Negative.apply(class_logits, quality_logits, belonging, prior_weight, gamma)
    return total


class _Negative(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, quality: Tensor | None, belonging: Tensor, prior_weight: Tensor, gamma: float
    ) -> Tensor:
        classes = logits.shape[-1]
        work = torch.float64 if logits.dtype == torch.float64 else torch.float32
        rows, belongs = logits.reshape(-1, classes), belonging.reshape(-1, classes)
        weights = prior_weight.reshape(-1, 1)
        own = None if quality is None else quality.reshape(-1, 1)
        class_slope = torch.empty(rows.shape, dtype=work, device=logits.device)
        quality_slope = None if own is None else torch.empty(own.shape, dtype=work, device=logits.device)
        sums = []
        block = max(1, (CPU_BLOCK if logits.device.type == "cpu" else GPU_BLOCK) // classes)
        for start in range(0, len(rows), block):
            part = slice(start, start + block)
            x, b, w = rows[part].to(work), belongs[part].to(work), weights[part].to(work)
            p, not_p = x.sigmoid(), (-x).sigmoid()
            kept = 1 - b
            # 1 - q as a sum of what cannot be negative, for 1 - q itself would round to 0 where a logit is certain.
            if own is None:
                mistake, rest = p * kept, not_p + p * b
            else:
                y = own[part].to(work)
                other, not_other = y.sigmoid(), (-y).sigmoid()
                mistake, rest = p * other * kept, not_p + p * (not_other + other * b)
            rest = rest.clamp(min=LEAST_TO_LOG)
            surprise, power = -rest.log(), mistake.pow(gamma)
            sums.append((power * surprise * w).sum())
            # d/dx of q is q (1 - p), and that of q^gamma is q^gamma gamma (1 - p): no division by q.
            slope = power * (gamma * surprise + mistake / rest) * w
            class_slope[part] = slope * not_p
            if quality_slope is not None:
                quality_slope[part] = (slope * not_other).sum(1, keepdim=True)
        ctx.save_for_backward(class_slope, quality_slope)
        ctx.of_class, ctx.of_quality = (logits.shape, logits.dtype), quality if quality is None else quality.dtype
        return torch.stack(sums).sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, scale: Tensor) -> tuple[Tensor | None, ...]:
        class_slope, quality_slope = ctx.saved_tensors
        shape, dtype = ctx.of_class
        of_class = (class_slope.view(shape) * scale).to(dtype)
        of_quality = None if quality_slope is None else (quality_slope.view(shape[:2]) * scale).to(ctx.of_quality)
        return of_class, of_quality, None, None, None


def report(priors: Priors, objects: Objects, ignored: Tensor, prior: Tensor, share: Tensor) -> Assignment:
    """For statistics and pictures: the priors that count most for each object.

    prior: (N, S) index into the image's priors.  share: (N, S) how much each counts, 0 for none; quality is that in
    relation to the object's heaviest.  ignored: (B, R).
    """
    relative = share.detach() / share.detach().amax(1, keepdim=True).clamp(min=LEAST)
    counts = (relative >= COUNTS_FROM).float()
    owner = torch.arange(len(objects), device=prior.device)[:, None].expand_as(prior)
    return Assignment(
        num_priors=len(priors),
        prior=(prior + objects.image[:, None] * len(priors)).reshape(-1),
        object=owner.reshape(-1),
        quality=(relative * counts).reshape(-1),
        weight=counts.reshape(-1),
        ignored=ignored,
    )


def left_out(priors: Priors, objects: Objects, coverage: float) -> Tensor:
    """(B, R) bool: priors in crowd regions or outside their image, which are no mistakes whatever they say."""
    found = torch.zeros(objects.batch_size, len(priors), dtype=torch.bool, device=priors.boxes.device)
    if len(objects.ignore):
        found = found | crowded(priors, objects, coverage)
    if objects.sizes is not None:
        found = found | outside(priors, objects.sizes)
    return found


def check_classes(outputs: Outputs, num_classes: int) -> None:
    """Raises `ConfigError` where the head was built for another number of classes."""
    classes = outputs.class_logits.shape[-1]
    if classes != num_classes:
        raise ConfigError(f"the head gives {classes} class logits a prior, the criterion expects {num_classes}")
