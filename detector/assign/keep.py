"""No object without a prior: a setting of every rule (`keep_one: true`).

Legend: N objects, C candidates of an object, P pairs of the rule, R priors of one image, B images.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from detector.assign.geometry import iou_from, nearest_priors
from detector.assign.order import LAST, index_of, keys
from detector.boxes import pairwise_iou
from detector.structures import Assignment, Objects, Predictions, Priors

NEAREST = 9  # priors of each level that an object without one may take


def keep_one(
    found: Assignment, priors: Priors, objects: Objects, predictions: Predictions | None, soft: bool
) -> Assignment:
    """`found` and one more pair for each object (padding where it has one already).

    An object left without a pair takes the best of its candidates, the 9 nearest priors of each level: by the IoU of
    the predicted box, or without `predictions` of the prior; of equal ones (0 for a tiny object) the finest level, then
    the nearest, then the first.  It may take a prior from an object that has others, but never an object's best pair
    (highest quality, of equal ones the first).  Several that want one prior: the highest IoU gets it, of equals the
    first object; the others go on to their next.  An object whose candidates are all taken like that stays without.

    soft: the class target of the new pair is that IoU of the prediction, otherwise 1.
    """
    count, total = len(priors), found.ignored.numel()
    candidates = nearest_priors(priors, objects.centers, NEAREST)
    prior = candidates.prior + objects.image[:, None] * count
    own = objects.boxes[:, None]
    if predictions is not None:
        iou = pairwise_iou(predictions.boxes.reshape(-1, 4)[prior], own)
    else:
        iou = iou_from(candidates.center - objects.centers[:, None], candidates.size, own[..., 2:] - own[..., :2])
    iou, order = iou.sort(dim=1, descending=True, stable=True)
    prior = prior.gather(1, order)

    best, has = _best_pairs(found, len(objects))
    taken = torch.zeros(total + 1, dtype=torch.bool, device=prior.device)  # one place more, for nobody's
    taken.scatter_(0, best, True)
    taken[total:].fill_(False)
    one = torch.arange(len(objects), device=prior.device)
    mine = torch.full_like(one, total)  # where each object's new prior is; `total`: nowhere
    quality = torch.zeros_like(iou[:, 0])
    for _ in range(prior.shape[1]):
        # In every round each object either gets what it asks for or sees it taken: C rounds are enough.
        free = ~taken[prior]
        choice = free.byte().argmax(1)  # the first that is free
        ask = ~has & free.any(1)
        wish = prior.gather(1, choice[:, None])[:, 0].where(ask, total)
        value = iou.gather(1, choice[:, None])[:, 0]
        key = keys(-value, torch.zeros_like(one)) | one
        winner = torch.full((total + 1,), LAST, device=prior.device).scatter_reduce_(0, wish, key, "amin")
        won = ask & (index_of(winner[wish]) == one)
        mine, quality, has = torch.where(won, wish, mine), torch.where(won, value, quality), has | won
        taken.scatter_(0, wish.where(won, total), True)
        taken[total:].fill_(False)
    new = mine < total
    robbed = torch.zeros_like(taken).scatter_(0, mine, True)
    robbed[total:].fill_(False)
    kept = ~robbed[found.prior]
    weight = new.float()
    return replace(
        found,
        prior=torch.cat([found.prior, mine.where(new, 0)]),
        object=torch.cat([found.object, one]),
        quality=torch.cat([found.quality * kept, quality * weight if soft else weight]),
        weight=torch.cat([found.weight * kept, weight]),
    )


def _best_pairs(found: Assignment, count: int) -> tuple[Tensor, Tensor]:
    """(P,) the prior of each pair that is the best of its object, else one beyond all; (N,) bool which have a pair."""
    nowhere = found.ignored.numel()
    real = found.weight > 0
    quality = found.quality.where(real, -torch.inf)
    highest = quality.new_full((count,), -torch.inf).scatter_reduce_(0, found.object, quality, "amax")
    best = real & (quality == highest[found.object])
    first = torch.full((count,), LAST, device=best.device)
    first.scatter_reduce_(0, found.object, found.prior.where(best, LAST), "amin")
    return found.prior.where(best & (first[found.object] == found.prior), nowhere), highest > -torch.inf
