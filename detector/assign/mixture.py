"""PAA (Kim and Lee, "Probabilistic Anchor Assignment with IoU Prediction for Object Detection", ECCV 2020).

Legend: N objects, L levels, T candidates of an object on a level, C = L * T, B images, R priors of one image, P pairs.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Annotated, ClassVar, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from detector.assign import around
from detector.assign.atss import Atss
from detector.assign.base import Assigner, from_index, nothing
from detector.assign.geometry import Owners, every_prior, iou_xy, kinds
from detector.assign.order import LAST, index_of, keys, tier_of
from detector.assign.overlap import ROUNDING, MaxIou
from detector.assign.pair_loss import AnyPairLoss, FocalPairLoss
from detector.assign.points import Fcos
from detector.structures import BACKGROUND, Assignment, Objects, Predictions, Priors

FIRST = MaxIou(positive_iou=0.1, negative_iou=0.1)


class Paa(Assigner):
    """A first rule proposes candidates; of each object those are kept whose loss belongs to the good of two Gaussians.

    Of the candidates on each level the `topk` of least loss remain (of equals the first prior).  Two Gaussians are
    fitted to an object's losses by expectation maximisation, started at the least and the greatest loss.  Positive are
    the candidates that belong to the lower one, up to the likeliest among them (the paper's Figure 3c); the others are
    background.  All objects are fitted at once; one whose fit has settled is left alone.

    Where two candidates are the whole of the good Gaussian they are equally likely in exact arithmetic, and rounding
    decides at the peers; here the last of those within `CLOSE` of the likeliest counts.  An object with a single
    candidate keeps it (mmdetection drops the object).
    """

    type: Literal["paa"] = "paa"
    uses_predictions: ClassVar[bool] = True
    first: Annotated[MaxIou | Atss | Fcos, Field(discriminator="type")] = Field(
        FIRST, description="proposes candidates, by geometry alone; PAA: max_iou with 0.1 for both IoUs"
    )
    pair_loss: AnyPairLoss = Field(FocalPairLoss(), description="scores candidates; best as the criterion's own losses")
    topk: int = Field(9, ge=1, description="candidates of an object on each level")
    iterations: int = Field(100, ge=1, description="of expectation maximisation, at most")
    tolerance: float = Field(1e-3, ge=0, description="a fit whose mean log likelihood changes by less has settled")

    @model_validator(mode="after")
    def _first_only_proposes(self) -> Self:
        for name, field in Assigner.model_fields.items():
            if getattr(self.first, name) != field.default:
                raise ValueError(f"first.{name} would do nothing, as `first` only proposes: set {name} of paa itself")
        return self

    def assign(self, priors: Priors, objects: Objects, predictions: Predictions | None) -> Assignment:
        assert predictions is not None
        first = self.first
        if isinstance(first, MaxIou) and priors.grids and around.may_ask(priors.boxes.device):
            return self.choose(priors, objects, predictions, overlapping(first, priors, objects))
        return self.choose(priors, objects, predictions, first.assign(priors, objects, None))

    def choose(self, priors: Priors, objects: Objects, predictions: Predictions, proposed: Assignment) -> Assignment:
        """Among pairs proposed by any rule."""
        if around.may_ask(proposed.weight.device):  # most pairs of a rule that gives each prior one are padding
            real = (proposed.weight > 0).nonzero().squeeze(1)
            if not len(real):
                return nothing(priors, objects)
            index = {name: getattr(proposed, name)[real] for name in ("prior", "object", "quality", "weight")}
            proposed = replace(proposed, **index)
        logits, said = predictions.class_logits.flatten(0, 1), predictions.boxes.flatten(0, 1)
        loss = self.pair_loss(
            logits, said, proposed.prior, objects.labels[proposed.object], objects.boxes[proposed.object]
        )
        prior, loss, valid = self.candidates(priors, len(objects), proposed, loss)
        good = split(loss, valid, self.iterations, self.tolerance)
        owners = Owners(priors, objects, prior.shape[1])
        owners.offer(slice(0, len(objects)), prior % len(priors), -loss.float(), good)
        return owners.assignment()

    def candidates(
        self, priors: Priors, count: int, proposed: Assignment, loss: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The best of each object and level: prior (N, C) image * R + prior, loss (N, C) float64, valid (N, C)."""
        levels, k = len(priors.level_sizes), min(self.topk, max(priors.level_sizes))
        by_prior = proposed.prior.sort(stable=True).indices
        by_loss = by_prior[loss[by_prior].sort(stable=True).indices]
        group = proposed.object * levels + priors.level[proposed.prior % len(priors)]
        group = group.where(proposed.weight > 0, count * levels)[by_loss]
        group, by_group = group.sort(stable=True)
        pair = by_loss[by_group]  # sorted by object, level, loss
        place = torch.arange(len(pair), device=pair.device)
        rank = place - torch.searchsorted(group, group)
        # Everything that is not among the best of a group lands in one more slot, which is cut off.
        slots = count * levels * k
        slot = (group * k + rank).where((rank < k) & (group < count * levels), slots)
        chosen = torch.zeros(slots + 1, dtype=torch.int64, device=pair.device).scatter_(0, slot, pair)[:-1]
        valid = torch.zeros(slots + 1, dtype=torch.bool, device=pair.device).scatter_(0, slot, slot < slots)[:-1]
        chosen, valid = chosen.view(count, -1), valid.view(count, -1)
        return proposed.prior[chosen], loss[chosen].double(), valid


def overlapping(first: MaxIou, priors: Priors, objects: Objects) -> Assignment:
    """The pairs of `first`, for priors on grids.

    Its own windows suit any object, and at an IoU of 0.1 are far larger than most need.
    """
    x, y, width, height = every_prior(priors.grids, objects.boxes.device)
    best = torch.full((objects.batch_size * len(priors),), LAST, device=x.device)
    for rows in around.around(priors.grids, len(priors), *_reached(priors, objects.boxes, first.positive_iou)):
        mine, prior = rows.object[:, None], rows.prior
        cx, cy = objects.centers[mine].unbind(-1)
        w, h = (objects.boxes[mine, 2:] - objects.boxes[mine, :2]).unbind(-1)
        iou = iou_xy(x[prior] - cx, y[prior] - cy, width[prior], height[prior], w, h)
        key = keys(-iou, torch.where(rows.exists & (iou >= first.positive_iou), 0, 2)) | mine
        best.scatter_reduce_(0, (prior + objects.image[mine] * len(priors)).view(-1), key.view(-1), "amin")
    index = index_of(best).where(tier_of(best) == 0, BACKGROUND).view(objects.batch_size, -1)
    # What objects take because it is the best they have; no prior overlaps as much as 1 but one that has its object.
    lowest = first.model_copy(update={"positive_iou": 1.0, "negative_iou": 1.0}).assign(priors, objects, None)
    return from_index(index.where(index >= 0, lowest.per_prior()))


def _reached(priors: Priors, boxes: Tensor, iou: float) -> tuple[Tensor, Tensor]:
    """(N, L, 2) from and to where the centre of a prior can lie that overlaps the objects (N, 4) by `iou`.

    Along an axis the two share at least iou * (larger area) / (smaller extent along the other axis).
    """
    size = kinds(priors.grids, boxes.device).size  # (S, 2)
    own = (boxes[:, 2:] - boxes[:, :2])[:, None]  # (N, 1, 2)
    area = torch.maximum(size.prod(1), own.prod(2))[..., None]
    shared = iou * (1 - ROUNDING) * area / torch.minimum(size, own).flip(2).clamp(min=1e-6)
    shared = shared.where(shared <= torch.minimum(size, own) * (1 + ROUNDING), torch.inf)
    reach = ((size + own) / 2 - shared).split([len(g.shapes) for g in priors.grids], 1)  # below 0: nowhere
    reach = torch.stack([level.amax(1) for level in reach], 1)
    center = (boxes[:, None, :2] + boxes[:, None, 2:]) / 2
    far = reach.where(reach >= 0, -torch.inf)
    return center - far, center + far


CLOSE = 1e-6  # log likelihoods this near are equal but for rounding
RESERVE = 1e-12  # of a part's share, so that an empty one divides by something
LEAST_VARIANCE = 1e-6  # added to the variance of each part, as everywhere
_LOG_TWO_PI = math.log(2 * math.pi)


def split(loss: Tensor, valid: Tensor, iterations: int, tolerance: float) -> Tensor:
    """Which candidates are positive, (N, C) bool, from their losses (N, C) float64 of which `valid` count."""
    real = valid.double()
    x = loss.where(valid, 0.0)
    count = real.sum(1, keepdim=True)
    low = loss.where(valid, torch.inf).amin(1).where(valid.any(1), 0.0)
    high = loss.where(valid, -torch.inf).amax(1).where(valid.any(1), 0.0)
    mean = torch.stack([low, high], 1)  # (N, 2) as all parameters
    variance, share = torch.ones_like(mean), torch.full_like(mean, 0.5)
    before = torch.full_like(count, -torch.inf)
    settled = torch.zeros_like(count, dtype=torch.bool)
    powers = torch.stack([real, x, x * x], 2)  # (N, C, 3)
    for _ in range(iterations):
        odds, density = _odds_and_density(x, mean, variance, share)
        fit = (density * real).sum(1, keepdim=True) / count.clamp(min=1)
        belongs = torch.stack([odds.sigmoid(), (-odds).sigmoid()], 1)  # (N, 2, C)
        total, first, second = (belongs @ powers).unbind(2)
        total = total + RESERVE
        new = first / total
        spread = (second - 2 * new * first + new * new * (total - RESERVE)) / total + LEAST_VARIANCE
        mean = torch.where(settled, mean, new)
        variance = torch.where(settled, variance, spread.clamp(min=LEAST_VARIANCE))
        share = torch.where(settled, share, total / count.clamp(min=1))
        settled = settled | ((fit - before).abs() < tolerance)
        before = fit
        if around.may_ask(x.device) and bool(settled.all()):
            break
    odds, density = _odds_and_density(x, mean, variance, share)
    good = valid & (odds >= 0)
    density = density.where(good, -torch.inf)
    likely = good & (density >= density.amax(1, keepdim=True) - CLOSE)
    limit = x.where(likely, -torch.inf).amax(1, keepdim=True)
    return torch.where(count < 2, valid, good & (x <= limit))


def _odds_and_density(x: Tensor, mean: Tensor, variance: Tensor, share: Tensor) -> tuple[Tensor, Tensor]:
    """(N, C) log odds of the first part against the second, and log density of both together."""
    constant = share.log() - 0.5 * (variance.log() + _LOG_TWO_PI)
    parts = [constant[:, i, None] - 0.5 * (x - mean[:, i, None]).square() / variance[:, i, None] for i in (0, 1)]
    return parts[0] - parts[1], torch.logaddexp(parts[0], parts[1])
