"""How a rule treats each object: what it gets, how good that is, and what it is not given.

Legend: B images, R priors of an image, N objects of the batch, L levels, P pairs.
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from detector.assign.base import chunks
from detector.boxes import all_pairs_iou, pairwise_iou
from detector.errors import DataError
from detector.files import write_whole
from detector.structures import Assignment, Objects, Predictions, Priors


@dataclass(frozen=True, eq=False)
class Treatment:
    """One row for each object; NaN where there is nothing to say, such as the mean IoU of no positives."""

    label: np.ndarray  # (N,) int64
    boxes: np.ndarray  # (N, 4) float32 xyxy, pixels of the network's input
    positives: np.ndarray  # (N,) int64 priors that learn it, with a positive weight
    weight: np.ndarray  # (N,) float32 sum of their weights
    quality: np.ndarray  # (N,) float32 mean class target, by weight
    iou: np.ndarray  # (N,) float32 mean IoU of these priors with the object
    predicted_iou: np.ndarray  # (N,) float32 of the boxes predicted there; NaN without predictions
    best_unassigned: np.ndarray  # (N,) float32 best IoU of a prior that does not learn it
    contested: np.ndarray  # (N,) int64 of its priors, those whose centre lies in another object's box, too
    shared: np.ndarray  # (N,) int64 of its priors, those that learn another object, too
    entropy: np.ndarray  # (N,) float32 nats, of weight x quality over its priors; ln(positives) for a hard rule
    levels: np.ndarray  # (N, L) int64 positives on each level

    def __len__(self) -> int:
        return len(self.label)

    @property
    def area(self) -> np.ndarray:
        """(N,) square pixels of the network's input."""
        return np.asarray((self.boxes[:, 2:] - self.boxes[:, :2]).prod(1))

    @property
    def aspect(self) -> np.ndarray:
        """(N,) longer side over shorter side."""
        sides = (self.boxes[:, 2:] - self.boxes[:, :2]).clip(min=1e-6)
        return np.asarray(sides.max(1) / sides.min(1))

    def save(self, path: Path) -> None:
        """Raises UserError where the file cannot be written."""
        content = io.BytesIO()
        columns: dict[str, Any] = {f.name: getattr(self, f.name) for f in fields(self)}
        np.savez_compressed(content, **columns)
        write_whole(path, content.getvalue())

    @classmethod
    def load(cls, path: Path) -> Treatment:
        """Raises DataError where the file is missing or damaged."""
        try:
            with np.load(path, allow_pickle=False) as data:
                return cls(**{f.name: data[f.name] for f in fields(cls)})
        except Exception as error:  # whatever numpy and the zip reader raise on a damaged file
            raise DataError(f"{path}: cannot read the assignments ({error}); delete the cell's result.json") from None


def concatenate(parts: Sequence[Treatment]) -> Treatment:
    """All rows, in order.  At least one part."""
    return Treatment(**{f.name: np.concatenate([getattr(p, f.name) for p in parts]) for f in fields(Treatment)})


@torch.no_grad()
def treat(priors: Priors, objects: Objects, assignment: Assignment, predictions: Predictions | None) -> Treatment:
    """One batch.  All pairs of objects and priors of an image are looked at, a chunk at a time.

    Of priors that differ by image, as proposals do, what is predicted there is left out.
    """
    if not priors.per_image:
        return _treat(priors, objects, assignment, predictions)
    image = assignment.prior // assignment.num_priors
    parts = []
    for i in range(objects.batch_size):
        mine = (image == i) & (assignment.weight > 0)
        own = replace(
            assignment,
            prior=assignment.prior[mine] - i * assignment.num_priors,
            object=assignment.object[mine] - int((objects.image < i).sum()),
            quality=assignment.quality[mine],
            weight=assignment.weight[mine],
            ignored=assignment.ignored[i : i + 1],
            background_weight=None,
        )
        parts.append(_treat(priors.select_image(i), objects.select_image(i), own, None))
    return concatenate(parts)


def _treat(priors: Priors, objects: Objects, assignment: Assignment, predictions: Predictions | None) -> Treatment:
    count, device = len(objects), priors.boxes.device
    kept = (assignment.weight > 0).nonzero().squeeze(1)
    prior, owner = assignment.prior[kept], assignment.object[kept]
    weight, quality = assignment.weight[kept].float(), assignment.quality[kept].float()
    local = prior % assignment.num_priors
    own = objects.boxes[owner]

    def summed(values: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.zeros(count, dtype=dtype, device=device).index_add_(0, owner, values.to(dtype))

    positives, total = summed(torch.ones_like(owner), torch.int64), summed(weight)
    share = weight * quality
    share = share / summed(share)[owner].clamp(min=1e-12)
    predicted = torch.full((count,), torch.nan, device=device)
    if predictions is not None:
        found = predictions.boxes.flatten(0, 1)[prior]
        predicted = summed(pairwise_iou(found, own)) / positives
    levels = torch.zeros(count, len(priors.level_sizes), dtype=torch.int64, device=device)
    levels.index_put_((owner, priors.level[local]), torch.ones_like(owner), accumulate=True)
    inside, best = _all_pairs(priors, objects, prior, owner)
    crowd = torch.bincount(prior, minlength=assignment.ignored.numel())
    return Treatment(
        label=_array(objects.labels),
        boxes=_array(objects.boxes),
        positives=_array(positives),
        weight=_array(total),
        quality=_array(summed(weight * quality) / total),
        iou=_array(summed(pairwise_iou(priors.boxes[local], own)) / positives),
        predicted_iou=_array(predicted),
        best_unassigned=_array(best),
        contested=_array(summed((inside[prior] > 1).long(), torch.int64)),
        shared=_array(summed((crowd[prior] > 1).long(), torch.int64)),
        entropy=_array(torch.where(positives > 0, summed(-torch.xlogy(share, share)), torch.nan)),
        levels=_array(levels),
    )


def _all_pairs(priors: Priors, objects: Objects, prior: Tensor, owner: Tensor) -> tuple[Tensor, Tensor]:
    """(B * R,) in how many objects of its image each prior's centre lies; (N,) best IoU with a prior not its own."""
    count = len(priors)
    inside = torch.zeros(objects.batch_size, count, dtype=torch.int64, device=priors.boxes.device)
    best = torch.full((len(objects),), torch.nan, device=priors.boxes.device)
    x, y = priors.centers.unbind(1)
    by_owner = owner.argsort(stable=True)
    local, sorted_owner = (prior % count)[by_owner], owner[by_owner].contiguous()
    for part in chunks(len(objects), count):
        box = objects.boxes[part]
        left, top, right, bottom = box[:, :, None].unbind(1)
        holds = (x >= left) & (x < right) & (y >= top) & (y < bottom)
        inside.index_add_(0, objects.image[part], holds.long())
        iou = all_pairs_iou(box, priors.boxes)
        edges = torch.tensor([part.start, part.start + len(box)], device=owner.device)
        first, last = torch.searchsorted(sorted_owner, edges).tolist()
        iou[sorted_owner[first:last] - part.start, local[first:last]] = -1.0
        best[part] = iou.amax(1)
    return inside.view(-1), best


def agreement(one: Assignment, other: Assignment) -> float:
    """Pairs that both rules make over pairs that either makes (Jaccard); 1 where neither makes any."""
    return overlap(_pairs(one), _pairs(other))


def overlap(one: Iterable[int], other: Iterable[int]) -> float:
    """Jaccard's index of two sets of pairs."""
    a, b = set(one), set(other)
    return len(a & b) / len(a | b) if a | b else 1.0


def _pairs(assignment: Assignment) -> list[int]:
    kept = assignment.weight > 0
    pairs: list[int] = (assignment.object[kept] * assignment.ignored.numel() + assignment.prior[kept]).tolist()
    return pairs


def read_note(path: Path) -> dict[str, np.ndarray]:
    """What the trainer's probe has noted.  Raises DataError where the file is damaged."""
    try:
        with np.load(path, allow_pickle=False) as data:
            return {key: data[key] for key in data.files}
    except Exception as error:  # whatever numpy and the zip reader raise on a damaged file
        raise DataError(f"{path}: cannot read the noted assignment ({error}); delete it to go on without it") from None


def flip_rate(before: dict[str, np.ndarray], after: dict[str, np.ndarray], name: str) -> float:
    """Share of pairs that one of two notes of the trainer's probe makes and the other does not."""
    sets = []
    for note in (before, after):
        sets.append(zip(note[f"{name}/prior"].tolist(), note[f"{name}/object"].tolist(), strict=True))
    a, b = set(sets[0]), set(sets[1])
    return 1 - len(a & b) / len(a | b) if a | b else 0.0


def _array(values: Tensor) -> np.ndarray:
    return values.detach().cpu().numpy()
