"""Dual weighting (Li et al., "A Dual Weighting Label Assignment Scheme for Object Detection", CVPR 2022).

Legend: N objects, n of a part of them, B images, R priors of one image, K classes, C priors of an object.
"""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from detector.assign.around import Rows, around
from detector.assign.base import Assigner, nothing
from detector.assign.cells import largest
from detector.structures import Assignment, Objects, Predictions, Priors

# A preference for the centre of exp(-40) or less, from 10 strides away, is none: numbers near float32's end are slow.
FAINT = 40.0
AT_ONCE = 1 << 16  # logits: what stays in a core's cache


class DualWeight(Assigner):
    """Every prior in an object has two weights: how much it is the object, and how much it is not.

    With s the score of the object's class (times the quality's, if the head has one) and u the overlap of the predicted
    box with the object:

        positive   exp(mu t) t c / sum of exp(nu t) t c over the object's priors     t = s exp(-beta (1 - GIoU))
                   c = exp(-d^2 / (2 sigma^2)), d strides from the object's centre
        negative   s^2 m(u)     m = 1 below `negative_iou`; from there a falling function of u^2, scaled so that the
                   object's worst prior has 1 and its best 0

    and s^2 everywhere else.  The exponent nu of the sum and GIoU instead of IoU are the authors' code's.

    How it is said here: a pair of positive weight p and negative weight q has weight p + q and quality p / (p + q), so
    that binary cross-entropy with that target is both terms at once, and weight times quality is p, by which the box
    loss is to be weighted (`criterion.box_weighting: assignment`).  Negative weights are `background_weight`, which
    holds the squared score: so `modulated` is set, and the class loss has no focal factor of its own.

    Of an object only the `most` priors of highest positive weight become pairs (of equals the first), since an object
    of half the image has thousands, nearly all of weight 0; the sum counts all.  Where several objects of one class
    hold a prior, its negative weight is the lowest (in the authors' code: the last object's).
    """

    type: Literal["dw"] = "dw"
    uses_predictions: ClassVar[bool] = True
    soft_quality: ClassVar[bool] = True
    shares: ClassVar[bool] = True
    most: int = Field(256, ge=1, description="pairs of an object; all of its priors take part in the sum")
    sigma: float = Field(1.11, gt=0, description="strides: width of the preference for the centre")
    beta: float = Field(5.0, ge=0, description="how much the box counts in what a prior is worth")
    mu: float = Field(5.0, ge=0, description="how sharply positive weights rise with what a prior is worth")
    nu: float = Field(3.0, ge=0, description="the same in the sum that they are divided by")
    negative_iou: float = Field(0.5, gt=0, lt=1, description="boxes below it are full negatives")
    negative_power: float = Field(2.0, gt=0, description="of the IoU in the falling function")
    score_power: float = Field(2.0, ge=0, description="of the score in negative weights")

    def assign(self, priors: Priors, objects: Objects, predictions: Predictions | None) -> Assignment:
        assert predictions is not None
        shape, count = predictions.class_logits.shape, len(priors)
        background = self.full_negatives(predictions)  # (B, R, K)
        boxes, all_logits = predictions.boxes.reshape(-1, 4), predictions.class_logits.reshape(-1)
        quality = None if predictions.quality_logits is None else predictions.quality_logits.reshape(-1)
        most = min(self.most, count)
        kept = torch.zeros(len(objects), most, dtype=torch.int64, device=boxes.device)
        weights = torch.zeros(len(objects), most, device=boxes.device)
        for rows in around(priors.grids, len(priors), objects.boxes[:, None, :2], objects.boxes[:, None, 2:]):
            mine, own = rows.object, objects.boxes[rows.object]
            flat = rows.prior + objects.image[mine, None] * count
            entry = flat * shape[2] + objects.labels[mine, None]
            score = all_logits[entry].sigmoid_()
            if quality is not None:
                score *= quality[flat].sigmoid_()
            inside, center = self._center(priors, rows, own)
            iou, giou = _ious(boxes[flat].unbind(-1), own)
            positive = self.positive(score, giou, center)
            best = largest(positive, most)
            kept[mine, : best.shape[1]] = rows.prior.gather(1, best)
            weights[mine, : best.shape[1]] = positive.gather(1, best)
            # Where several objects of a class hold a prior the lowest remains.
            lowest = self.falling(iou, inside).mul_(score.pow_(self.score_power)).where(inside, torch.inf)
            background.view(-1).scatter_reduce_(0, entry.view(-1), lowest.view(-1), "amin")

        prior = (kept + (objects.image * count)[:, None]).flatten()
        owner = torch.arange(len(objects), device=prior.device).repeat_interleave(most)
        positive = weights.flatten()
        negative = background.view(-1)[prior * shape[2] + objects.labels[owner]]
        both = (positive + negative).where(positive > 0, 0.0)
        return Assignment(
            num_priors=count,
            prior=prior,
            object=owner,
            quality=positive / both.clamp(min=1e-30),
            weight=both,
            ignored=torch.zeros(objects.batch_size, count, dtype=torch.bool, device=prior.device),
            background_weight=background,
            modulated=True,
        )

    def without_objects(self, priors: Priors, objects: Objects, predictions: Predictions | None) -> Assignment:
        assert predictions is not None
        return replace(nothing(priors, objects), background_weight=self.full_negatives(predictions), modulated=True)

    def full_negatives(self, predictions: Predictions) -> Tensor:
        """(B, R, K) the score of class and quality together, to its power: the weight where no object is near."""
        logits, quality = predictions.class_logits, predictions.quality_logits
        weight = torch.empty_like(logits, memory_format=torch.contiguous_format)
        rows, all_logits = weight.view(-1, logits.shape[2]), logits.reshape(-1, logits.shape[2])
        step = max(1, AT_ONCE // max(1, logits.shape[2]))
        for start in range(0, len(rows), step):
            part = torch.sigmoid(all_logits[start : start + step], out=rows[start : start + step])
            if quality is not None:
                part.mul_(quality.reshape(-1, 1)[start : start + step].sigmoid())
            part.pow_(self.score_power)
        return weight

    def positive(self, score: Tensor, giou: Tensor, center: Tensor) -> Tensor:
        """(n, C) weights; `center` is 0 for priors that are not in the object."""
        worth = score * ((giou - 1) * self.beta).exp()
        share = worth * center
        total = ((worth * self.nu).exp() * share).sum(1, keepdim=True)
        return (worth * self.mu).exp() * share / total.clamp(min=1e-12)

    def falling(self, iou: Tensor, inside: Tensor) -> Tensor:
        """(n, C) in [0, 1]: the negative weight without the score; 1 for priors that are not in the object."""
        limit = self.negative_iou**self.negative_power - 1

        def curve(value: Tensor) -> Tensor:
            return (value.pow(self.negative_power) - 1) / limit

        best, worst = (iou * inside).amax(1, keepdim=True), iou.where(inside, 1.0).amin(1, keepdim=True)
        low, high = curve(best), curve(worst).clamp(max=1)
        scaled = (curve(iou) - low + 1e-12) / (high - low + 1e-12)
        return scaled.where(inside & (iou >= self.negative_iou), 1.0)

    def _center(self, priors: Priors, rows: Rows, boxes: Tensor) -> tuple[Tensor, Tensor]:
        """(n, C) bool: is the prior's centre in the object (n, 4), and the preference for its centre, 0 if not."""
        x, y = (priors.centers[:, i].contiguous()[rows.prior] for i in (0, 1))
        x1, y1, x2, y2 = (side[:, None] for side in boxes.unbind(1))
        inside = rows.exists & (x > x1) & (x < x2) & (y > y1) & (y < y2)
        square = (x - (x1 + x2) / 2).square_().add_((y - (y1 + y2) / 2).square_())
        power = square.mul_((-1 / (2 * self.sigma**2 * priors.stride.square()))[rows.prior])
        return inside, power.clamp(min=-FAINT).exp_().mul_(inside & (power > -FAINT))


def _ious(said: tuple[Tensor, ...], boxes: Tensor) -> tuple[Tensor, Tensor]:
    """Four (n, C) and (n, 4) xyxy -> IoU and GIoU, (n, C); as in `detector.boxes`, by sides."""
    x1, y1, x2, y2 = said
    a1, b1, a2, b2 = (side[:, None] for side in boxes.unbind(1))
    shared = (torch.minimum(x2, a2) - torch.maximum(x1, a1)).clamp_(min=0)
    shared.mul_((torch.minimum(y2, b2) - torch.maximum(y1, b1)).clamp_(min=0))
    union = (x2 - x1).clamp_(min=0).mul_((y2 - y1).clamp_(min=0)).add_((a2 - a1) * (b2 - b1)).sub_(shared)
    iou = shared / union.clamp(min=1e-6)
    around = (torch.maximum(x2, a2) - torch.minimum(x1, a1)).clamp_(min=0)
    around.mul_((torch.maximum(y2, b2) - torch.minimum(y1, b1)).clamp_(min=0))
    return iou, iou - (around - union) / around.clamp(min=1e-6)
