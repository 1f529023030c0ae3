"""SimOTA (YOLOX) and the dynamic soft label assigner (RTMDet): each object takes the cheapest priors, as many as fit.

Legend: B images, R priors of one image, N objects of the batch, n of a part of them, Q priors that an object may
ask for, P = N * Q pairs.

Both rules share the dynamic number of priors of SimOTA (Ge et al., "YOLOX", arXiv:2107.08430, section 2.1): an object
takes k = the sum of its Q highest IoUs, rounded down and at least 1, of the priors that cost it least.  A prior wanted
by several goes to the object of its image for which it is cheapest, also if that object did not ask; so it is in the
authors' code and in mmdetection.

Ties: of equally cheap priors the first, of equally cheap objects the first.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from detector.assign.base import Assigner, chunks
from detector.assign.order import LAST, index_of, keys, tier_of
from detector.assign.predicted import AllPairs, log_or_floor, over_classes, scores, softplus
from detector.boxes import pairwise_iou
from detector.structures import Assignment, Objects, Predictions, Priors

EPS = 1e-7  # added to an IoU whose logarithm is taken
PLAIN, LATE, NEVER = 0, 1, 2  # tiers of cost


def cheapest_priors(
    pairs: AllPairs,
    predictions: Predictions,
    *,
    may: Callable[[slice], Tensor],
    background: Tensor,
    cost: Callable[[slice, Tensor], tuple[Tensor, Tensor | None]],
    topk: int,
) -> Assignment:
    """What both rules share.  Class targets are the IoU of prediction and object.

    may(part): (n, R) bool; a candidate is what may for any object of its image.  background: (B, R) cost of all classes
    of a prior as background.  cost(part, iou): (n, R) cost of a pair over that, and which pairs (n, R) bool are a last
    resort.
    """
    objects, (images, count) = pairs.objects, background.shape
    candidate = pairs.of_any_object(may)
    topk = min(topk, count)
    every, rank = (torch.arange(n, device=background.device) for n in (count, topk))
    cheapest = torch.full((images, count), LAST, device=background.device)
    asked, wanted = [], []
    for part in chunks(len(objects), count):
        iou, among = pairs.iou(part), pairs.of_image(candidate, part)
        own, late = cost(part, iou)
        tier = torch.where(among, PLAIN if late is None else late.long(), NEVER)
        key = keys(own + pairs.of_image(background, part), tier)
        best = (key | every).topk(topk, 1, largest=False).values  # sorted
        number = iou.where(among, 0).topk(topk, 1).values.sum(1).int().clamp(min=1)
        asked.append(index_of(best))
        wanted.append((rank < number[:, None]) & (tier_of(best) < NEVER))
        owner = torch.arange(part.start, part.stop, device=key.device)[:, None]
        cheapest.scatter_reduce_(0, objects.image[part, None].expand_as(key), key | owner, "amin")
    prior = torch.cat(asked) + objects.image[:, None] * count
    mine = torch.arange(len(objects), device=prior.device)[:, None].expand_as(prior)
    return _settle(
        prior.view(-1), mine.reshape(-1), torch.cat(wanted).view(-1), cheapest.view(-1), objects, predictions
    )


def _settle(
    prior: Tensor, mine: Tensor, wanted: Tensor, cheapest: Tensor, objects: Objects, predictions: Predictions
) -> Assignment:
    """One object for each prior.  prior, mine, wanted: (P,); cheapest: (B * R,) keys of the cheapest object."""
    images, count = predictions.boxes.shape[:2]
    times = torch.zeros_like(cheapest).scatter_add_(0, prior, wanted.long())
    # Of several pairs with one prior the first stands for all.
    place = torch.arange(len(prior), device=prior.device)
    first = torch.full_like(cheapest, LAST).scatter_reduce_(0, prior, place.where(wanted, LAST), "amin")
    owner = torch.where(times[prior] > 1, index_of(cheapest[prior]), mine)
    weight = (wanted & (first[prior] == place)).float()
    return Assignment(
        num_priors=count,
        prior=prior,
        object=owner,
        quality=pairwise_iou(predictions.boxes.reshape(-1, 4)[prior], objects.boxes[owner]) * weight,
        weight=weight,
        ignored=torch.zeros(images, count, dtype=torch.bool, device=prior.device),
    )


class SimOta(Assigner):
    """Ge et al., "YOLOX: Exceeding YOLO Series in 2021", arXiv:2107.08430, section 2.1.

    cost = class_weight * BCE(score, one-hot label), summed over the classes, - iou_weight * log(IoU)

    where the score is the sigmoid of the logit, or with a quality branch (objectness) the geometric mean of both
    probabilities.  Candidates are the priors whose centre lies in any object of the image, or within `center_radius`
    strides of its centre along both axes.  Those for which both hold with the object itself come first, whatever the
    cost; the peers add 100,000 to the others' cost, in which float32 keeps but two digits of it after the point.
    """

    uses_predictions: ClassVar[bool] = True
    soft_quality: ClassVar[bool] = True

    type: Literal["simota"] = "simota"
    center_radius: float = Field(default=2.5, gt=0)  # strides
    candidate_topk: int = Field(default=10, ge=1)  # Q
    iou_weight: float = Field(default=3.0, ge=0)
    class_weight: float = Field(default=1.0, ge=0)

    def assign(self, priors: Priors, objects: Objects, predictions: Predictions | None) -> Assignment:
        assert predictions is not None
        pairs = AllPairs(priors, objects, predictions)

        def may(part: slice) -> Tensor:
            return pairs.inside(part) | pairs.near(part, self.center_radius)

        def background(logits: Tensor, quality_logits: Tensor | None) -> Tensor:
            return -self.class_weight * log_or_floor(1 - scores(logits, quality_logits))

        def cost(part: slice, iou: Tensor) -> tuple[Tensor, Tensor]:
            score = pairs.own_scores(part)
            own = log_or_floor(1 - score) - log_or_floor(score)
            outer = ~(pairs.inside(part) & pairs.near(part, self.center_radius))
            return self.class_weight * own - self.iou_weight * (iou + EPS).log(), outer

        return cheapest_priors(
            pairs,
            predictions,
            may=may,
            background=over_classes(predictions, background),
            cost=cost,
            topk=self.candidate_topk,
        )


class DynamicSoftLabel(Assigner):
    """RTMDet (Lyu et al., "RTMDet: An Empirical Study", arXiv:2212.07784, section 3.3).

    cost = BCE(logit, t) |t - p|^2, summed over the classes, - iou_weight * log(IoU) + 10^(distance - center_radius)

    with p the sigmoid of the logit, the target t = IoU at the object's label and 0 elsewhere, and the distance of the
    centres in strides.  Candidates are the priors whose centre lies in any object of the image.
    """

    uses_predictions: ClassVar[bool] = True
    soft_quality: ClassVar[bool] = True

    type: Literal["dynamic_soft_label"] = "dynamic_soft_label"
    center_radius: float = Field(default=3.0, ge=0)  # strides, from where on the distance costs more than 1
    topk: int = Field(default=13, ge=1)  # Q
    iou_weight: float = Field(default=3.0, ge=0)

    def assign(self, priors: Priors, objects: Objects, predictions: Predictions | None) -> Assignment:
        assert predictions is not None
        pairs = AllPairs(priors, objects, predictions)

        def background(logits: Tensor, _: Tensor | None) -> Tensor:
            return softplus(logits) * logits.sigmoid().square()

        def cost(part: slice, iou: Tensor) -> tuple[Tensor, None]:
            x = pairs.own_logits(part)
            p, nothing = x.sigmoid(), softplus(x)
            own = (nothing - x * iou) * (iou - p).square() - nothing * p.square()
            cx, cy = objects.centers[part, :, None].unbind(1)
            away = ((pairs.x - cx).square() + (pairs.y - cy).square()).sqrt() / pairs.stride
            return own - self.iou_weight * (iou + EPS).log() + torch.pow(10.0, away - self.center_radius), None

        return cheapest_priors(
            pairs,
            predictions,
            may=pairs.inside,
            background=over_classes(predictions, background),
            cost=cost,
            topk=self.topk,
        )
