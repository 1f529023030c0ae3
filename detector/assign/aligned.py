"""Task-aligned assignment (Feng et al., "TOOD: Task-aligned One-stage Object Detection", ICCV 2021, section 3.2).

Legend: R priors of one image, N objects of the batch, n of a part of them, Q = `topk`, P = N * Q pairs.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from detector.assign.base import Assigner, chunks
from detector.assign.order import index_of, keys
from detector.assign.predicted import AllPairs
from detector.boxes import pairwise_iou
from detector.structures import Assignment, Objects, Predictions, Priors

EPS = 1e-7  # added to the divisor


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
        pairs, count = AllPairs(priors, objects, predictions), len(priors)
        every = torch.arange(count, device=priors.boxes.device)
        plain = torch.zeros_like(every)
        picked, alignments = [], []
        for part in chunks(len(objects), count):
            alignment = pairs.own_scores(part).pow_(self.alpha).mul_(pairs.iou(part).pow_(self.beta))
            best = (keys(-alignment, plain) | every).topk(min(self.topk, count), 1, largest=False).values
            picked.append(index_of(best))
            alignments.append(alignment.gather(1, picked[-1]))
        prior, alignment = torch.cat(picked), torch.cat(alignments)  # (N, Q)
        center, own = priors.centers[prior], objects.boxes[:, None]
        inside = torch.cat([center - own[..., :2], own[..., 2:] - center], -1).amin(-1) > self.center_margin
        flat = prior + objects.image[:, None] * count
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


def _to_the_highest(flat: Tensor, score: Tensor, valid: Tensor, count: int) -> Tensor:
    """(N, Q) bool: the pairs that get their prior.  flat: (N, Q) indices below `count`; each at most once in a row."""
    owner = torch.arange(len(flat), device=flat.device)[:, None]
    key = keys(-score, torch.where(valid, 0, 2)) | owner
    best = torch.full((count,), torch.iinfo(torch.int64).max, device=flat.device)
    best.scatter_reduce_(0, flat.view(-1), key.view(-1), "amin")
    return valid & (best[flat] == key)
