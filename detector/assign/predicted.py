"""What the head says, laid out for rules in which every object meets every prior of its image, a part at a time.

Legend: B images, R priors of one image, N objects of the batch, n of a part of them, K classes.

Where a prediction ends up is not known beforehand, so no arithmetic on the grid says which predictions overlap an
object; all pairs are looked at, `base.chunks` of them at a time.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from detector.assign.base import chunks
from detector.boxes import EPS
from detector.structures import Objects, Predictions, Priors

LOGITS_AT_ONCE = 1 << 20  # of which a temporary copy is made


class AllPairs:
    """Objects against all priors of their images; every method takes a part of the objects and gives (n, R)."""

    def __init__(self, priors: Priors, objects: Objects, predictions: Predictions) -> None:
        self.objects, self.logits, self.quality_logits = objects, predictions.class_logits, predictions.quality_logits
        self.x, self.y = priors.centers.unbind(1)
        self.stride = priors.stride
        sides = predictions.boxes.transpose(1, 2)  # (B, 4, R)
        area = (sides[:, 2] - sides[:, 0]).clamp(min=0) * (sides[:, 3] - sides[:, 1]).clamp(min=0)
        self.boxes = torch.cat([sides, area[:, None]], 1)  # (B, 5, R)

    def sides(self, part: slice) -> tuple[Tensor, ...]:
        """x1, y1, x2, y2 of the objects, (n, 1) each."""
        return self.objects.boxes[part, :, None].unbind(1)

    def iou(self, part: slice) -> Tensor:
        """IoU of the objects with the predicted boxes."""
        x1, y1, x2, y2, area = self.of_image(self.boxes, part).unbind(1)
        left, top, right, bottom = self.sides(part)
        shared = (torch.minimum(x2, right) - torch.maximum(x1, left)).clamp_(min=0)
        shared *= (torch.minimum(y2, bottom) - torch.maximum(y1, top)).clamp_(min=0)
        return shared / (area + (right - left) * (bottom - top) - shared).clamp_(min=EPS)

    def of_image(self, values: Tensor, part: slice) -> Tensor:
        """(B, ...) -> (n, ...): those of the objects' images."""
        return values.index_select(0, self.objects.image[part])

    def own_logits(self, part: slice) -> Tensor:
        """The logit of each object's class."""
        return self.logits[self.objects.image[part], :, self.objects.labels[part]]

    def own_scores(self, part: slice) -> Tensor:
        """The score of each object's class."""
        quality = self.quality_logits
        return scores(self.own_logits(part), None if quality is None else self.of_image(quality, part))

    def inside(self, part: slice, margin: float = 0.0) -> Tensor:
        """Is the prior's centre in the object, more than `margin` pixels from every side?"""
        left, top, right, bottom = self.sides(part)
        x = torch.minimum(self.x - left, right - self.x)
        return torch.minimum(x, torch.minimum(self.y - top, bottom - self.y)) > margin

    def near(self, part: slice, radius: float) -> Tensor:
        """Is the prior's centre within `radius` strides of the object's along both axes?"""
        cx, cy = self.objects.centers[part, :, None].unbind(1)
        return torch.maximum((self.x - cx).abs(), (self.y - cy).abs()) < radius * self.stride

    def of_any_object(self, mask: Callable[[slice], Tensor]) -> Tensor:
        """(B, R) bool: the priors for which `mask(part)` (n, R) holds with any object of their image."""
        found = torch.zeros(self.boxes.shape[0], len(self.x), dtype=torch.uint8, device=self.x.device)
        for part in chunks(len(self.objects), len(self.x)):
            holds = mask(part).to(torch.uint8)
            found.scatter_reduce_(0, self.objects.image[part, None].expand_as(holds), holds, "amax")
        return found > 0


def scores(logits: Tensor, quality_logits: Tensor | None) -> Tensor:
    """sigmoid, or the geometric mean of both probabilities; `quality_logits` broadcasts."""
    p = logits.sigmoid()
    return p if quality_logits is None else (p * quality_logits.sigmoid()).sqrt()


def softplus(x: Tensor) -> Tensor:
    """log(1 + e^x) to within 1e-7; torch's own takes five times as long on a CPU, for digits that no cost needs."""
    return x.clamp(min=0) + (x.abs().neg_().exp_() + 1).log_()


def log_or_floor(probability: Tensor) -> Tensor:
    """The logarithm, but not below -100, as in torch's cross-entropy of probabilities."""
    return probability.log().clamp_(min=-100)


def over_classes(
    predictions: Predictions, term: Callable[[Tensor, Tensor | None], Tensor], dtype: torch.dtype = torch.float32
) -> Tensor:
    """(B, R): `term(logits (n, K), quality_logits (n, 1) or None)` (n, K), summed over the classes, in parts."""
    logits, quality = predictions.class_logits, predictions.quality_logits
    rows = logits.reshape(-1, logits.shape[-1])
    extra = None if quality is None else quality.reshape(-1, 1)
    step = max(1, LOGITS_AT_ONCE // max(1, rows.shape[1]))
    sums = [
        term(rows[start : start + step], None if extra is None else extra[start : start + step]).sum(1, dtype=dtype)
        for start in range(0, len(rows), step)
    ]
    return torch.cat(sums).view(logits.shape[:2])
