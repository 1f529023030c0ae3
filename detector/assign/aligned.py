"""Task-aligned assignment (Feng et al., "TOOD: Task-aligned One-stage Object Detection", ICCV 2021, section 3.2).

Legend: R priors of one image, N objects of the batch, n of a part of them, Q = `topk`, P = N * Q pairs.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from detector.assign import around
from detector.assign.base import Assigner, chunks
from detector.assign.order import index_of, keys
from detector.assign.predicted import AllPairs, scores
from detector.assign.tiles import BLOCK, SLACK, Bounds, entries, layout
from detector.boxes import pairwise_iou
from detector.structures import Assignment, Objects, Predictions, Priors

EPS = 1e-7  # added to the divisor
TINY = torch.finfo(torch.float32).smallest_normal  # the least that a prior can be aligned and count
SIDE = 4  # of a tile, in cells: with most priors the bounds of tiles cost more than looking at those that are left
LEAD = 4  # tiles that promise most, looked at first


class TaskAligned(Assigner):
    """Positive are the `topk` priors of each object where class score and box together fit it best, if inside it.

    The alignment is t = score^alpha * IoU^beta; the score is that of the object's class, with a quality branch the
    geometric mean of both probabilities.  All priors of the image compete, those outside the object too; what is
    outside, or has t = 0, is dropped afterwards, as in the authors' code.  A prior wanted by several goes to the
    highest IoU.  The class target is t scaled such that an object's best pair has the object's best IoU:
    t / (max t + 1e-7) * max IoU over the object's pairs.

    Ties: of equally aligned priors the first, of equal IoUs the first object.
    """

    uses_predictions: ClassVar[bool] = True
    soft_quality: ClassVar[bool] = True

    type: Literal["task_aligned"] = "task_aligned"
    topk: int = Field(default=13, ge=1)
    alpha: float = Field(default=1.0, ge=0)  # power of the class score
    beta: float = Field(default=6.0, ge=0)  # power of the IoU
    center_margin: float = Field(default=0.01, ge=0)  # pixels by which a prior's centre must be inside its object

    def assign(self, priors: Priors, objects: Objects, predictions: Predictions | None) -> Assignment:
        assert predictions is not None
        count = len(priors)
        find = self._best if around.may_ask(priors.boxes.device) else self._best_of_all
        prior, alignment = find(priors, objects, predictions, min(self.topk, count))  # (N, Q)
        flat = prior + objects.image[:, None] * count
        center, own = priors.centers[prior], objects.boxes[:, None]
        inside = torch.cat([center - own[..., :2], own[..., 2:] - center], -1).amin(-1) > self.center_margin
        iou = pairwise_iou(predictions.boxes.reshape(-1, 4)[flat], own)
        won = _to_the_highest(flat, iou, inside & (alignment > 0), objects.batch_size * count)

        alignment, iou = alignment * won, iou * won
        target = alignment / (alignment.amax(1, keepdim=True) + EPS) * iou.amax(1, keepdim=True)
        return Assignment(
            num_priors=count,
            prior=flat.view(-1),
            object=torch.arange(len(objects), device=flat.device)[:, None].expand_as(flat).reshape(-1),
            quality=target.view(-1),
            weight=won.float().view(-1),
            ignored=torch.zeros(objects.batch_size, count, dtype=torch.bool, device=flat.device),
        )

    def _best_of_all(self, priors: Priors, objects: Objects, predictions: Predictions, k: int) -> tuple[Tensor, Tensor]:
        """The k best aligned priors of each object, of equals the first, and their alignment, (N, k)."""
        pairs = AllPairs(priors, objects, predictions)
        every = torch.arange(len(priors), device=priors.boxes.device)
        plain = torch.zeros_like(every)
        picked, alignments = [], []
        for part in chunks(len(objects), len(priors)):
            alignment = pairs.own_scores(part).pow_(self.alpha).mul_(pairs.iou(part).pow_(self.beta))
            best = (keys(-alignment, plain) | every).topk(k, 1, largest=False).values
            picked.append(index_of(best))
            alignments.append(alignment.gather(1, picked[-1]))
        return torch.cat(picked), torch.cat(alignments)

    def _best(self, priors: Priors, objects: Objects, predictions: Predictions, k: int) -> tuple[Tensor, Tensor]:
        """The same from priors that could be as good as the k-th best of those in the tiles that promise most.

        What a prior could be at most follows from its box and its highest score of any class: fewer logits are read.
        """
        tiles, count = layout(priors, SIDE), len(priors)
        bounds = Bounds(tiles, predictions.boxes)
        (many, size), classes = tiles.prior.shape, predictions.class_logits.shape[2]
        logits, quality = predictions.class_logits.reshape(-1), predictions.quality_logits
        highest = scores(predictions.class_logits.amax(2), quality).pow_(self.alpha).mul_(1 + SLACK)  # (B, R)
        promised = tiles.rows(highest).amax(1)  # (B, T)

        def fit(tile: Tensor, image: Tensor, own: Tensor) -> tuple[Tensor, Tensor]:
            """(..., M) image * R + prior, and what the box is worth; image (...), own (..., 4)."""
            flat = tiles.priors_of(tile, image * count)
            return flat, bounds.exact_iou(image * many + tile, own).square_().pow_(self.beta / 2)

        def worth(flat: Tensor, label: Tensor) -> Tensor:
            """What the score is worth."""
            theirs = entries(logits, (flat * classes).add_(label))
            return scores(theirs, None if quality is None else quality.take(flat)).pow_(self.alpha)

        picked, alignments = [], []
        for part in chunks(len(objects), 2 * many):
            image, label, own = objects.image[part], objects.labels[part], objects.boxes[part]
            promise = bounds.iou(image, own).square_().pow_(self.beta / 2)
            promise.mul_(promised.index_select(0, image))  # (n, T)
            first = bounds.first(promise, min(max(LEAD, -(-k // size)), many // BLOCK))
            flat, box = fit(first, image[:, None], own[:, None])
            known = worth(flat, label[:, None, None]).mul_(box).mul_(tiles.real[first]).flatten(1)
            least = known.topk(min(k, known.shape[1]), 1).values[:, -1].clamp_(min=TINY)  # (n,)

            place = (promise >= least[:, None]).view(-1).nonzero().squeeze(1)
            row = place.div(many, rounding_mode="floor")
            tile = place - row * many
            flat, box = fit(tile, image[row], own[row])
            could = (highest.take(flat).mul_(box) >= least[row, None]) & tiles.real.index_select(0, tile)
            place = could.view(-1).nonzero().squeeze(1)
            row, flat, box = row.take(place.div(size, rounding_mode="floor")), flat.take(place), box.take(place)
            # Side by side in a table, as wide as the object with most of them needs.
            number = torch.zeros_like(label).scatter_add_(0, row, torch.ones_like(row))
            place = torch.arange(len(row)) - (number.cumsum(0) - number)[row]
            shape = (len(label), max(int(number.max()), k))
            prior, alignment = torch.zeros(shape, dtype=torch.int64), torch.zeros(shape)
            prior[row, place] = flat - image[row] * count
            alignment[row, place] = worth(flat, label[row]).mul_(box)
            best = keys(-alignment, torch.where(alignment > 0, 0, 1)).bitwise_or_(prior)
            best = best.topk(k, 1, largest=False).indices
            picked.append(prior.gather(1, best))
            alignments.append(alignment.gather(1, best))
        return torch.cat(picked), torch.cat(alignments)


def _to_the_highest(flat: Tensor, score: Tensor, valid: Tensor, count: int) -> Tensor:
    """(N, Q) bool: the pairs that get their prior.  flat: (N, Q) indices below `count`; each at most once in a row."""
    owner = torch.arange(len(flat), device=flat.device)[:, None]
    key = keys(-score, torch.where(valid, 0, 2)) | owner
    best = torch.full((count,), torch.iinfo(torch.int64).max, device=flat.device)
    best.scatter_reduce_(0, flat.view(-1), key.view(-1), "amin")
    return valid & (best[flat] == key)
