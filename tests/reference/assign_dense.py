"""Label assignment as one would write it down: one image at a time, every prior against every object.

The oracle of the tests and the yardstick of the benchmark.  Legend: R priors, n objects of one image, B images.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from detector.assign import Assigner, Atss, Fcos, MaxIou
from detector.structures import BACKGROUND, IGNORED, Objects, Priors


def dense(rule: Assigner, priors: Priors, objects: Objects) -> Tensor:
    """(B, R) int64: what `rule(priors, objects).per_prior()` has to be."""
    rows = []
    for i in range(objects.batch_size):
        mine = (objects.image == i).nonzero().squeeze(1)
        boxes = objects.boxes[mine]
        index = torch.full((len(priors),), BACKGROUND, device=boxes.device)
        if len(mine):
            index = assign_image(rule, priors, boxes)
            index = torch.where(index >= 0, mine[index.clamp(min=0)], index)
        off = torch.zeros(len(priors), dtype=torch.bool, device=boxes.device)
        for region in objects.ignore[objects.ignore_image == i]:
            low = torch.maximum(priors.boxes[:, :2], region[:2])
            high = torch.minimum(priors.boxes[:, 2:], region[2:])
            share = (high - low).clamp(min=0).prod(1) / (priors.boxes[:, 2:] - priors.boxes[:, :2]).prod(1)
            off |= share > rule.crowd_coverage
        if objects.sizes is not None:
            height, width = objects.sizes[i]
            x, y = priors.centers.T
            half = priors.stride / 2
            off |= (x <= -half) | (y <= -half) | (x >= width + half) | (y >= height + half)
        rows.append(torch.where(off & (index < 0), IGNORED, index))
    return torch.stack(rows)


def assign_image(rule: Assigner, priors: Priors, boxes: Tensor) -> Tensor:
    """(R,) from the objects of one image (n, 4), n > 0."""
    if isinstance(rule, MaxIou):
        return max_iou(rule, priors, boxes)
    if isinstance(rule, Fcos):
        return fcos(rule, priors, boxes)
    assert isinstance(rule, Atss)
    return atss(rule, priors, boxes)


def max_iou(rule: MaxIou, priors: Priors, boxes: Tensor) -> Tensor:
    iou = all_ious(priors, boxes)
    value, index = best_column(iou, torch.ones_like(iou, dtype=torch.bool))
    positive = value >= rule.positive_iou
    index = torch.where(positive, index, torch.where(value < rule.negative_iou, BACKGROUND, IGNORED))
    if rule.low_quality == "none":
        return index
    away = distances(priors, boxes)
    best = iou.amax(0)
    claim = (iou >= best * (1 - 1e-5)) & (best > 0) & (best >= rule.min_positive_iou)
    claim &= away == away.where(claim, torch.inf).amin(0)
    if rule.low_quality == "first":
        claim &= claim.cumsum(0) == 1
    value, owner = best_column(iou, claim)
    return torch.where(~positive & (value > -torch.inf), owner, index)


def fcos(rule: Fcos, priors: Priors, boxes: Tensor) -> Tensor:
    limits = [*(rule.limits or [8 * float(s) for s in level_strides(priors)[:-1]]), math.inf]
    sizes = torch.tensor(priors.level_sizes, device=boxes.device)
    high = torch.tensor(limits, device=boxes.device).repeat_interleave(sizes)[:, None]
    low = torch.tensor([0.0, *limits[:-1]], device=boxes.device).repeat_interleave(sizes)[:, None]
    point = prior_centers(priors)[:, None]
    sides = torch.cat([point - boxes[:, :2], boxes[:, 2:] - point], -1)
    mask = (sides.amin(-1) > 0) & (sides.amax(-1) >= low) & (sides.amax(-1) <= high)
    if rule.center_radius:
        center = (boxes[:, :2] + boxes[:, 2:]) / 2
        mask &= (point - center).abs().amax(-1) < rule.center_radius * priors.stride[:, None]
    area = (boxes[:, 2:].double() - boxes[:, :2].double()).prod(1)
    value, index = best_column(-area.expand_as(mask), mask)
    return torch.where(value > -torch.inf, index, BACKGROUND)


def atss(rule: Atss, priors: Priors, boxes: Tensor) -> Tensor:
    away, iou = distances(priors, boxes), all_ious(priors, boxes)
    candidate, start = torch.zeros_like(iou, dtype=torch.bool), 0
    for size in priors.level_sizes:
        level, k = away[start : start + size], min(rule.topk, size)
        farthest = level.topk(k, 0, largest=False).values[-1]
        near, tied = level < farthest, level == farthest  # of those equally far, the first
        candidate[start : start + size] = near | (tied & (tied.cumsum(0) <= k - near.sum(0)))
        start += size
    count = sum(min(rule.topk, size) for size in priors.level_sizes)
    chosen = iou.T[candidate.T].view(len(boxes), count).double()
    deviation = chosen.std(1) if count > 1 else torch.zeros_like(chosen[:, 0])
    threshold = chosen.mean(1) + deviation
    if rule.reachable:
        threshold = torch.minimum(threshold, chosen.amax(1))
    point = prior_centers(priors)[:, None]
    inside = torch.cat([point - boxes[:, :2], boxes[:, 2:] - point], -1).amin(-1) > rule.center_margin
    value, index = best_column(iou, candidate & (iou >= threshold) & inside)
    return torch.where(value > -torch.inf, index, BACKGROUND)


def best_column(score: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """(R, n) -> the highest score of each row within the mask (-inf if none) and its first column."""
    score = score.masked_fill(~mask, -torch.inf)
    best = score.amax(1)
    return best, (score == best[:, None]).byte().argmax(1)


def all_ious(priors: Priors, boxes: Tensor) -> Tensor:
    """(R, n) from centres and sizes; corners would break ties between equal overlaps by rounding."""
    shared, area, own = 1.0, 1.0, 1.0
    centers, sizes = prior_centers(priors), prior_sizes(priors)
    for axis in range(2):
        gap = (centers[:, axis, None] - (boxes[:, axis] + boxes[:, axis + 2]) / 2).abs()
        a, b = sizes[:, axis, None], (boxes[:, axis + 2] - boxes[:, axis])[None]
        shared = shared * torch.minimum(torch.minimum(a, b), (a + b) / 2 - gap).clamp(min=0)
        area, own = area * a, own * b
    return shared / (area + own - shared).clamp(min=1e-12)


def distances(priors: Priors, boxes: Tensor) -> Tensor:
    """(R, n) float64, squared."""
    center = (boxes[:, :2] + boxes[:, 2:]) / 2
    return (prior_centers(priors).double()[:, None] - center.double()).square().sum(-1)


def prior_centers(priors: Priors) -> Tensor:
    """(R, 2) as the grids say; those of the boxes are rounded."""
    if not priors.grids:
        return priors.centers
    levels = []
    for g in priors.grids:
        y = (torch.arange(g.height, dtype=torch.float64) + g.offset) * g.stride
        x = (torch.arange(g.width, dtype=torch.float64) + g.offset) * g.stride
        y, x = torch.meshgrid(y, x, indexing="ij")
        levels.append(torch.stack([x, y], -1).reshape(-1, 1, 2).expand(-1, len(g.shapes), 2).reshape(-1, 2))
    return torch.cat(levels).to(priors.boxes)


def prior_sizes(priors: Priors) -> Tensor:
    """(R, 2) width, height, likewise."""
    if not priors.grids:
        return priors.boxes[:, 2:] - priors.boxes[:, :2]
    return torch.cat([torch.tensor(g.shapes).repeat(g.height * g.width, 1) for g in priors.grids]).to(priors.boxes)


def level_strides(priors: Priors) -> list[float]:
    starts = [sum(priors.level_sizes[:i]) for i in range(len(priors.level_sizes))]
    return [float(priors.stride[i]) for i in starts]
