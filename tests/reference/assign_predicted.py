"""The rules that look at predictions as one would write them down: one image, every prior against every object.

The oracle of the tests and the yardstick of the benchmark; after the formulas of the papers and the steps of
mmdetection's assigners, which compare every candidate with every object in every class.  Legend: R priors, n objects of
one image, V candidates, K classes.  Ties: the first prior, the first object.
"""

from __future__ import annotations

import math
from itertools import permutations

import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from detector.assign import Assigner, DynamicSoftLabel, Hungarian, Ota, SimOta, TaskAligned
from detector.structures import BACKGROUND, Objects, Predictions, Priors


def predicted_image(rule: Assigner, priors: Priors, objects: Objects, said: Predictions) -> tuple[Tensor, Tensor]:
    """(R,) object or BACKGROUND and (R,) class target, from the objects of one image, n > 0."""
    if isinstance(rule, SimOta):
        return simota(rule, priors, objects, said)
    if isinstance(rule, DynamicSoftLabel):
        return dynamic_soft_label(rule, priors, objects, said)
    if isinstance(rule, TaskAligned):
        return task_aligned(rule, priors, objects, said)
    if isinstance(rule, Ota):
        return ota(rule, priors, objects, said)
    assert isinstance(rule, Hungarian)
    return hungarian(rule, priors, objects, said)


def dense_predicted(rule: Assigner, priors: Priors, objects: Objects, said: Predictions) -> tuple[Tensor, Tensor]:
    """(B, R) each, without regard to crowds and borders."""
    found, quality = [], []
    for i in range(objects.batch_size):
        mine = (objects.image == i).nonzero().squeeze(1)
        index = torch.full((len(priors),), BACKGROUND, device=mine.device)
        target = torch.zeros(len(priors), device=mine.device)
        if len(mine):
            index, target = predicted_image(rule, priors, objects.select_image(i), said.select_image(i))
            index = torch.where(index >= 0, mine[index.clamp(min=0)], BACKGROUND)
        found.append(index)
        quality.append(target)
    return torch.stack(found), torch.stack(quality)


def simota(rule: SimOta, priors: Priors, objects: Objects, said: Predictions) -> tuple[Tensor, Tensor]:
    inside, near = inside_of(priors, objects, 0.0), near_of(priors, objects, rule.center_radius)
    rows = (inside | near).any(1).nonzero().squeeze(1)
    iou = all_ious(said.boxes[0, rows], objects.boxes)
    score = said.class_logits[0, rows].sigmoid()
    if said.quality_logits is not None:
        score = (score * said.quality_logits[0, rows, None].sigmoid()).sqrt()
    one_hot = F.one_hot(objects.labels, score.shape[1]).float().expand(len(rows), -1, -1)
    score = score[:, None].expand_as(one_hot)
    cost = rule.class_weight * F.binary_cross_entropy(score, one_hot, reduction="none").sum(-1)
    cost = cost - rule.iou_weight * (iou + 1e-7).log()
    last_resort = ~(inside & near)[rows]
    # Where cost alone decides, the others are so dear that they come last; 1e5 in float64 loses no digit of the cost.
    return cheapest(rows, cost.double() + 1e5 * last_resort, iou, rule.candidate_topk, len(priors))


def dynamic_soft_label(
    rule: DynamicSoftLabel, priors: Priors, objects: Objects, said: Predictions
) -> tuple[Tensor, Tensor]:
    rows = inside_of(priors, objects, 0.0).any(1).nonzero().squeeze(1)
    iou = all_ious(said.boxes[0, rows], objects.boxes)
    logits = said.class_logits[0, rows]
    target = F.one_hot(objects.labels, logits.shape[1]).float() * iou[..., None]
    logits = logits[:, None].expand_as(target)
    bce = F.binary_cross_entropy_with_logits(logits, target, reduction="none")
    cost = (bce * (target - logits.sigmoid()).abs() ** 2).sum(-1) - rule.iou_weight * (iou + 1e-7).log()
    away = (priors.centers[rows, None] - objects.centers).square().sum(-1).sqrt() / priors.stride[rows, None]
    cost = cost + 10.0 ** (away - rule.center_radius)
    return cheapest(rows, cost, iou, rule.topk, len(priors))


def cheapest(rows: Tensor, cost: Tensor, iou: Tensor, topk: int, count: int) -> tuple[Tensor, Tensor]:
    """SimOTA's dynamic number of priors, from the candidates `rows` (V,), their cost and IoU (V, n)."""
    match = torch.zeros_like(cost, dtype=torch.bool)
    if len(rows):
        number = iou.topk(min(topk, len(rows)), 0).values.sum(0).int().clamp(min=1)
        for j in range(cost.shape[1]):
            match[cost[:, j].sort(stable=True).indices[: number[j]], j] = True
        several = match.sum(1) > 1
        best = first_of(cost[several], -1)
        match[several] = F.one_hot(best, cost.shape[1]).bool()
    index, quality = torch.full((count,), BACKGROUND, device=cost.device), torch.zeros(count, device=cost.device)
    taken, owner = match.nonzero(as_tuple=True)
    index[rows[taken]] = owner
    quality[rows[taken]] = iou[taken, owner]
    return index, quality


def task_aligned(rule: TaskAligned, priors: Priors, objects: Objects, said: Predictions) -> tuple[Tensor, Tensor]:
    iou = all_ious(said.boxes[0], objects.boxes)
    score = said.class_logits[0].sigmoid()
    if said.quality_logits is not None:
        score = (score * said.quality_logits[0, :, None].sigmoid()).sqrt()
    aligned = score[:, objects.labels] ** rule.alpha * iou**rule.beta
    k = min(rule.topk, len(aligned))
    least = aligned.topk(k, 0).values[-1]
    above, tied = aligned > least, aligned == least  # of those that are equal, the first
    mask = (
        (above | (tied & (tied.cumsum(0) <= k - above.sum(0))))
        & (aligned > 0)
        & inside_of(priors, objects, rule.center_margin)
    )
    best = first_of((-iou).masked_fill(~mask, torch.inf), -1)
    mask &= F.one_hot(best, len(objects)).bool()
    target = aligned / ((aligned * mask).amax(0) + 1e-7) * (iou * mask).amax(0)
    return torch.where(mask.any(1), best, BACKGROUND), (target * mask).sum(1)


def ota(rule: Ota, priors: Priors, objects: Objects, said: Predictions) -> tuple[Tensor, Tensor]:
    cost, background, allowed, supply = ota_costs(rule, priors, objects, said)
    flow = sinkhorn(torch.cat([cost, background[:, None]], 1).T, supply, rule.eps, rule.iterations)
    share = flow - flow.amax(1, keepdim=True)
    share[:-1] = share[:-1].masked_fill(~allowed.T, -torch.inf)
    index = first_of(-share, 0)
    index = torch.where(index < len(objects), index, BACKGROUND)
    return index, (index >= 0).float()


def ota_costs(rule: Ota, priors: Priors, objects: Objects, said: Predictions) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """cost (R, n) float64, background's (R,), where an object may ship (R, n) bool, supply (n + 1,) with background."""
    logits = said.class_logits[0]
    p = logits.sigmoid()
    present = -rule.alpha * (1 - p) ** rule.gamma * F.logsigmoid(logits)
    absent = -(1 - rule.alpha) * p**rule.gamma * F.logsigmoid(-logits)
    background = absent.sum(1, dtype=torch.float64)
    iou = all_ious(said.boxes[0], objects.boxes)
    allowed = inside_of(priors, objects, rule.center_margin) & near_of(priors, objects, rule.center_radius)
    own = present[:, objects.labels] - absent[:, objects.labels] - rule.iou_weight * (iou + 1e-7).log()
    cost = (background[:, None] + own.double()).masked_fill(~allowed, torch.inf)
    supply = (iou * allowed).topk(min(rule.topk, len(iou)), 0).values.sum(0).long().clamp(min=1) * allowed.any(0)
    rest = (len(priors) - supply.sum()).clamp(min=0)
    return cost, background, allowed, torch.cat([supply, rest[None]]).double()


def sinkhorn(cost: Tensor, supply: Tensor, eps: float, iterations: int) -> Tensor:
    """Logarithm of the transport plan (suppliers, demanders); every demander takes 1, supply 0 ships nothing."""
    u, v = torch.zeros_like(cost[:, 0]), torch.zeros_like(cost[0])
    ships = cost.isfinite().any(1)
    for _ in range(iterations):
        u = torch.where(ships, eps * ((supply + 1e-8).log() - ((v - cost) / eps).logsumexp(1)), -torch.inf)
        v = eps * (math.log1p(1e-8) - ((u[:, None] - cost) / eps).logsumexp(0))
    return torch.where(ships[:, None], (u[:, None] + v - cost) / eps, -torch.inf)


def hungarian(rule: Hungarian, priors: Priors, objects: Objects, said: Predictions) -> tuple[Tensor, Tensor]:
    p = said.class_logits[0].sigmoid()
    present = -rule.alpha * (1 - p) ** rule.gamma * (p + 1e-12).log()
    absent = -(1 - rule.alpha) * p**rule.gamma * (1 - p + 1e-12).log()
    assert objects.sizes is not None
    height, width = objects.sizes[0].tolist()
    scale = torch.tensor([width, height, width, height], device=p.device)
    apart = (cxcywh(said.boxes[0] / scale)[:, None] - cxcywh(objects.boxes / scale)).abs().sum(-1)
    cost = rule.class_cost * (present - absent)[:, objects.labels] + rule.l1_cost * apart
    cost = cost - rule.giou_cost * all_gious(said.boxes[0], objects.boxes)
    rows, columns = linear_sum_assignment(cost.cpu().numpy())
    index = torch.full((len(priors),), BACKGROUND)
    index[torch.from_numpy(rows)] = torch.from_numpy(columns)
    index = index.to(p.device)
    return index, (index >= 0).float()


def least_total(cost: Tensor) -> float:
    """By trying every matching: the sum of costs of the best one; cost (n, R) with few of both, n <= R."""
    return min(
        sum(float(cost[i, j]) for i, j in enumerate(choice)) for choice in permutations(range(cost.shape[1]), len(cost))
    )


def first_of(values: Tensor, dim: int) -> Tensor:
    """Index of the lowest value, the first of equals."""
    return (values == values.amin(dim, keepdim=True)).byte().argmax(dim)


def inside_of(priors: Priors, objects: Objects, margin: float) -> Tensor:
    point = priors.centers[:, None]
    return torch.cat([point - objects.boxes[:, :2], objects.boxes[:, 2:] - point], -1).amin(-1) > margin


def near_of(priors: Priors, objects: Objects, radius: float) -> Tensor:
    return (priors.centers[:, None] - objects.centers).abs().amax(-1) < radius * priors.stride[:, None]


def all_ious(a: Tensor, b: Tensor) -> Tensor:
    shared = (torch.minimum(a[:, None, 2:], b[:, 2:]) - torch.maximum(a[:, None, :2], b[:, :2])).clamp(min=0).prod(-1)
    union = areas(a)[:, None] + areas(b) - shared
    return shared / union.clamp(min=1e-6)


def all_gious(a: Tensor, b: Tensor) -> Tensor:
    shared = (torch.minimum(a[:, None, 2:], b[:, 2:]) - torch.maximum(a[:, None, :2], b[:, :2])).clamp(min=0).prod(-1)
    union = areas(a)[:, None] + areas(b) - shared
    around = (torch.maximum(a[:, None, 2:], b[:, 2:]) - torch.minimum(a[:, None, :2], b[:, :2])).clamp(min=0).prod(-1)
    return shared / union.clamp(min=1e-6) - (around - union) / around.clamp(min=1e-6)


def areas(boxes: Tensor) -> Tensor:
    return (boxes[:, 2:] - boxes[:, :2]).clamp(min=0).prod(1)


def cxcywh(boxes: Tensor) -> Tensor:
    return torch.cat([(boxes[:, :2] + boxes[:, 2:]) / 2, boxes[:, 2:] - boxes[:, :2]], 1)
