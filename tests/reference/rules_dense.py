"""Further rules of label assignment as one would write them down: one image at a time, all priors against all objects.

The oracle of the tests and the yardstick of the benchmark, without what the base class settles (crowd regions, priors
outside the image).  Legend: R priors, n objects of one image, K classes, B images, P pairs.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from sklearn.exceptions import ConvergenceWarning
from sklearn.mixture import GaussianMixture
from torch import Tensor
from torchvision.ops import box_iou, generalized_box_iou

from detector.assign import (
    Assigner,
    CenterGaussian,
    CenterRegion,
    DualWeight,
    IqDet,
    Paa,
    PointScale,
    Uniform,
    YoloBest,
    YoloRatio,
)
from detector.assign.distribution import random_numbers
from detector.structures import Assignment, Objects, Predictions, Priors
from tests.reference.assign_dense import (
    all_ious,
    assign_image,
    best_column,
    level_strides,
    prior_centers,
    prior_sizes,
)


@dataclass
class Image:
    """One image and what the head says of it."""

    boxes: Tensor  # (n, 4)
    labels: Tensor  # (n,)
    logits: Tensor  # (R, K)
    said: Tensor  # (R, 4)
    quality: Tensor | None  # (R,)
    objects: Objects
    mixture: Tensor | None  # (n, L, M, 5)


@dataclass
class Answer:
    """Pairs may repeat."""

    prior: Tensor  # (P,)
    object: Tensor  # (P,) of the image
    quality: Tensor | None = None  # (P,); None: 1
    weight: Tensor | None = None  # (P,); None: 1
    ignored: Tensor | None = None  # (R,) bool
    background: Tensor | None = None  # (R, K)


def dense_rule(rule: Assigner, priors: Priors, objects: Objects, predictions: Predictions) -> Assignment:
    """What `rule(priors, objects, predictions)` has to be, but for padding and the order of pairs."""
    function = RULES[type(rule)]
    count, classes = len(priors), predictions.class_logits.shape[2]
    parts: list[tuple[Tensor, ...]] = []
    ignored = torch.zeros(objects.batch_size, count, dtype=torch.bool)
    background = torch.ones(objects.batch_size, count, classes)
    weighted = False
    for i in range(objects.batch_size):
        mine = (objects.image == i).nonzero().squeeze(1)
        quality = None if predictions.quality_logits is None else predictions.quality_logits[i]
        if not len(mine):
            if isinstance(rule, DualWeight):
                weighted = True
                background[i] = score_of(predictions.class_logits[i], quality) ** rule.score_power
            continue
        image = Image(
            objects.boxes[mine],
            objects.labels[mine],
            predictions.class_logits[i],
            predictions.boxes[i],
            quality,
            objects.select_image(i),
            None if predictions.mixture is None else predictions.mixture[mine],
        )
        answer = function(rule, priors, image)
        ones = torch.ones(len(answer.prior))
        parts.append(
            (
                answer.prior + i * count,
                mine[answer.object],
                ones if answer.quality is None else answer.quality,
                ones if answer.weight is None else answer.weight,
            )
        )
        if answer.ignored is not None:
            ignored[i] = answer.ignored
            ignored[i, answer.prior] = False
        if answer.background is not None:
            background[i], weighted = answer.background, True
    none = torch.zeros(0)
    columns = [torch.cat(c) for c in zip(*parts, strict=True)] or [none.long(), none.long(), none, none]
    prior, owner, quality_of_pair, weight = columns
    return Assignment(count, prior, owner, quality_of_pair, weight, ignored, background if weighted else None)


def from_mask(mask: Tensor, **more: Any) -> Answer:
    prior, owner = mask.nonzero(as_tuple=True)
    return Answer(prior, owner, **more)


# ------------------------------------------------------------------------------------------------ cells of the grid


def cells(priors: Priors) -> tuple[Tensor, Tensor]:
    """(R, 2) column, row of each prior and (R, 2) of the last of its level."""
    place, last = [], []
    for g in priors.grids:
        row, column = torch.meshgrid(torch.arange(g.height), torch.arange(g.width), indexing="ij")
        cell = torch.stack([column, row], -1).reshape(-1, 2).repeat_interleave(len(g.shapes), 0)
        place.append(cell)
        last.append(torch.tensor([g.width - 1, g.height - 1]).expand_as(cell))
    return torch.cat(place), torch.cat(last)


def offsets(priors: Priors, boxes: Tensor) -> Tensor:
    """(R, n, 2) float64: how many cells the object's centre is from the prior's."""
    center = ((boxes[:, :2] + boxes[:, 2:]) / 2).double()
    return (center - prior_centers(priors).double()[:, None]) / priors.stride.double()[:, None, None]


def holds(offset: Tensor, last: Tensor) -> Tensor:
    """Is the centre in the cell, along one axis?  The border belongs to the next cell, where there is one."""
    return (offset >= -0.5) & ((offset < 0.5) | ((offset == 0.5) & last))


def in_home(priors: Priors, boxes: Tensor) -> Tensor:
    """(R, n) bool."""
    place, last = cells(priors)
    return holds(offsets(priors, boxes), (place == last)[:, None]).all(-1)


def yolo_ratio(rule: YoloRatio, priors: Priors, image: Image) -> Answer:
    offset = offsets(priors, image.boxes)
    place, last = cells(priors)
    here = holds(offset, (place == last)[:, None])
    # The object's cell is the next one, or the one before, and nearer than `reach` to this prior's.
    before = holds(offset - 1, (place + 1 == last)[:, None]) & (place < last)[:, None] & (offset - 1 < rule.reach - 0.5)
    after = holds(offset + 1, (place - 1 == last)[:, None]) & (place > 0)[:, None] & (offset + 1 > 0.5 - rule.reach)
    beside = (before | after) & here.flip(-1)
    proportion = prior_sizes(priors)[:, None] / (image.boxes[:, 2:] - image.boxes[:, :2])
    fits = torch.maximum(proportion, 1 / proportion).amax(-1) < rule.ratio
    return from_mask(fits & (here.all(-1) | beside.any(-1)))


def yolo_best(rule: YoloBest, priors: Priors, image: Image) -> Answer:
    iou, home = all_ious(priors, image.boxes), in_home(priors, image.boxes)
    ranking = iou
    if rule.compare == "shape":
        own, other = prior_sizes(priors)[:, None], image.boxes[:, 2:] - image.boxes[:, :2]
        shared = torch.minimum(own, other).prod(-1)
        ranking = shared / (own.prod(-1) + other.prod(-1) - shared).clamp(min=1e-12)
    ranking = ranking.where(home & (ranking > 0), -1.0)
    best = (ranking == ranking.amax(0)) & (ranking > 0)
    best &= best.cumsum(0) == 1
    claims = best if rule.positive_iou is None else best | (home & (iou > rule.positive_iou))
    value, index = best_column(iou + 2 * best, claims)
    taken = (value > -torch.inf)[:, None] & (index[:, None] == torch.arange(len(image.boxes)))
    return from_mask(taken, ignored=iou.amax(1) > rule.ignore_iou)


# ---------------------------------------------------------------------------------------------- distances and regions


def uniform(rule: Uniform, priors: Priors, image: Image) -> Answer:
    def cxcywh(boxes: Tensor) -> Tensor:
        return torch.cat([(boxes[..., :2] + boxes[..., 2:]) / 2, boxes[..., 2:] - boxes[..., :2]], -1)

    def cost(a: Tensor, b: Tensor) -> Tensor:
        each = (a[:, None] - b).abs().unbind(-1)
        return each[0] + each[1] + each[2] + each[3]

    own = cxcywh(image.boxes)
    anchors = torch.cat([prior_centers(priors), prior_sizes(priors)], 1)
    costs = (cost(cxcywh(image.said), own), cost(anchors.double(), cxcywh(image.boxes.double())))
    found = torch.cat([c.sort(dim=0, stable=True).indices[: rule.topk] for c in costs])  # (2 k, n)
    objects = torch.arange(len(image.boxes)).expand_as(found)
    iou = all_ious(Priors(priors.boxes, priors.stride, priors.level_sizes), image.boxes)
    kept = iou[found, objects] >= rule.min_anchor_iou
    ignored = box_iou(image.said, image.boxes).amax(1) > rule.ignore_prediction_iou
    ignored[found[~kept]] = True
    return Answer(found[kept], objects[kept], ignored=ignored)


def level_by_size(priors: Priors, boxes: Tensor, scale: float) -> Tensor:
    """(n,)"""
    strides = level_strides(priors)
    found = []
    for w, h in (boxes[:, 2:] - boxes[:, :2]).clamp(min=1e-6):
        power = torch.stack([(w / scale).log2(), (h / scale).log2()]).mean().trunc()
        found.append(max([i for i, s in enumerate(strides) if math.floor(math.log2(s)) <= power], default=0))
    return torch.tensor(found)


def levels_of(priors: Priors) -> Tensor:
    return torch.arange(len(priors.level_sizes)).repeat_interleave(torch.tensor(priors.level_sizes))


def point_scale(rule: PointScale, priors: Priors, image: Image) -> Answer:
    unit = (image.boxes[:, 2:] - image.boxes[:, :2]).clamp(min=1e-6).double()
    center = ((image.boxes[:, :2] + image.boxes[:, 2:]) / 2).double()
    away = ((prior_centers(priors).double()[:, None] - center) / unit).square().sum(-1)
    level = levels_of(priors)[:, None] == level_by_size(priors, image.boxes, rule.scale)
    order = away.where(level, torch.inf).sort(dim=0, stable=True).indices[: rule.topk]
    near = torch.zeros_like(level).scatter_(0, order, True) & level
    value, index = best_column(-away, near)
    return from_mask((value > -torch.inf)[:, None] & (index[:, None] == torch.arange(len(image.boxes))))


def center_gaussian(rule: CenterGaussian, priors: Priors, image: Image) -> Answer:
    level = levels_of(priors)[:, None] == level_by_size(priors, image.boxes, rule.scale)
    place = cells(priors)[0]
    home = in_home(priors, image.boxes) & level
    own, other = prior_sizes(priors)[:, None], image.boxes[:, 2:] - image.boxes[:, :2]
    shared = torch.minimum(own, other).prod(-1)
    similar = (shared / (own.prod(-1) + other.prod(-1) - shared).clamp(min=1e-12)).where(home, -1.0)
    best = home & (similar == similar.amax(0))
    best &= best.cumsum(0) == 1
    heat = torch.zeros(len(priors), image.logits.shape[1])
    strides = torch.tensor(level_strides(priors))
    for j in range(len(image.boxes)):
        if not home[:, j].any():
            continue
        cell = place[home[:, j]][0]
        size = other[j] / strides[levels_of(priors)[level[:, j]][0]]
        radius = radius_of(float(size[0]), float(size[1]), rule.min_iou)
        away = place - cell
        value = (-away.square().sum(1) / (2 * ((2 * radius + 1) / 6) ** 2)).exp()
        value[(away.abs() > radius).any(1) | ~level[:, j] | (value < torch.finfo(torch.float32).eps)] = 0
        column = heat[:, image.labels[j]]
        heat[:, image.labels[j]] = torch.maximum(column, value)
    return from_mask(best, background=(1 - heat) ** rule.power)


def radius_of(w: float, h: float, t: float) -> int:
    """The smallest root of each of CornerNet's three cases, by the school's formula."""
    cases = [
        (1.0, -(w + h), w * h * (1 - t) / (1 + t)),
        (4.0, -2 * (w + h), (1 - t) * w * h),
        (-4 * t, -2 * t * (w + h), (1 - t) * w * h),
    ]
    roots = []
    for a, b, c in cases:
        root = math.sqrt(max(0.0, b * b - 4 * a * c))
        roots.append(min(r for r in ((-b - root) / (2 * a), (-b + root) / (2 * a)) if r >= -1e-9))
    return max(0, int(min(roots)))


def center_region(rule: CenterRegion, priors: Priors, image: Image) -> Answer:
    center, size = prior_centers(priors)[:, None], prior_sizes(priors)[:, None]
    middle, sides = (image.boxes[:, :2] + image.boxes[:, 2:]) / 2, image.boxes[:, 2:] - image.boxes[:, :2]
    inside = ((center > image.boxes[:, :2]) & (center < image.boxes[:, 2:])).all(-1)

    def within(side: float) -> Tensor:
        low = torch.maximum(center - size / 2, middle - sides * (side / 2))
        high = torch.minimum(center + size / 2, middle + sides * (side / 2))
        return ((high - low).clamp(min=0) / size).prod(-1) > rule.min_coverage

    area = sides.double().prod(1)
    value, index = best_column(-area.expand_as(inside), inside & within(rule.center))
    background = torch.ones(len(priors), image.logits.shape[1])
    shadow = within(rule.shadow)
    for j in range(len(image.boxes)):
        background[shadow[:, j], image.labels[j]] = 0
    owned = (value > -torch.inf)[:, None] & (index[:, None] == torch.arange(len(image.boxes)))
    return from_mask(owned, background=background)


# --------------------------------------------------------------------------------------------------- with predictions


def paa(rule: Paa, priors: Priors, image: Image) -> Answer:
    first = assign_image(rule.first, priors, image.boxes)
    level = levels_of(priors)
    row = (first >= 0).nonzero().squeeze(1)
    owner = first[row]
    loss = torch.full((len(priors),), torch.inf)
    loss[row] = rule.pair_loss(image.logits, image.said, row, image.labels[owner], image.boxes[owner])
    found = []
    for j in range(len(image.boxes)):
        rows = []
        for i in range(len(priors.level_sizes)):
            mine = ((first == j) & (level == i)).nonzero().squeeze(1)
            rows.append(mine[loss[mine].sort(stable=True).indices[: rule.topk]])
        chosen = torch.cat(rows)
        chosen = chosen[loss[chosen].sort(stable=True).indices]
        if len(chosen) >= 2:
            chosen = chosen[good_part(loss[chosen].double().numpy(), rule.iterations, rule.tolerance)]
        found.append(chosen)
    objects = torch.cat([torch.full_like(rows, j) for j, rows in enumerate(found)])
    return Answer(torch.cat(found), objects)


def good_part(losses: Any, iterations: int, tolerance: float) -> list[int]:
    """Indices of the positives among rising losses: scikit-learn's mixture for one object, as at the peers."""
    mixture = GaussianMixture(
        2,
        covariance_type="diag",
        weights_init=np.full(2, 0.5),
        means_init=losses[[0, -1], None],
        precisions_init=np.ones((2, 1)),
        max_iter=iterations,
        tol=tolerance,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        mixture.fit(losses[:, None])
    part, density = mixture.predict(losses[:, None]), mixture.score_samples(losses[:, None])
    good = [i for i in range(len(losses)) if part[i] == 0]
    if not good:
        return []
    highest = max(density[i] for i in good)
    last = max(i for i in good if density[i] >= highest - 1e-6)
    return [i for i in good if losses[i] <= losses[last]]


def dual_weight(rule: DualWeight, priors: Priors, image: Image) -> Answer:
    """As the authors' code has it, object by object, but for the lowest weight where objects of a class meet."""
    center, stride = priors.centers[:, None], priors.stride[:, None]
    middle = (image.boxes[:, :2] + image.boxes[:, 2:]) / 2
    inside = torch.cat([center - image.boxes[:, :2], image.boxes[:, 2:] - center], -1).amin(-1) > 0
    prior = (-((center - middle) / stride[..., None]).square().sum(-1) / (2 * rule.sigma**2)).exp() * inside
    score = score_of(image.logits, image.quality)
    p = score[:, image.labels] * (-rule.beta * (1 - generalized_box_iou(image.said, image.boxes))).exp()
    positive = (rule.mu * p).exp() * p * prior / ((rule.nu * p).exp() * p * prior).sum(0).clamp(min=1e-12)
    order = positive.sort(dim=0, descending=True, stable=True).indices[: rule.most]
    kept = torch.zeros_like(inside).scatter_(0, order, True) & (positive > 0)

    iou = box_iou(image.said, image.boxes)
    fall = torch.ones_like(score)
    limit = rule.negative_iou**rule.negative_power - 1
    for j in range(len(image.boxes)):
        rows = inside[:, j].nonzero().squeeze(1)
        if len(rows):
            x = iou[rows, j]
            t = (x**rule.negative_power - 1) / limit
            low, high = t.min(), t.max().clamp(max=1.0)
            y = ((t - low + 1e-12) / (high - low + 1e-12)).where(x >= rule.negative_iou, 1.0)
            label = image.labels[j]
            fall[rows, label] = torch.minimum(fall[rows, label], y)
    background = fall * score**rule.score_power
    row, owner = kept.nonzero(as_tuple=True)
    w, negative = positive[row, owner], background[row, image.labels[owner]]
    return Answer(row, owner, quality=w / (w + negative), weight=w + negative, background=background)


def iqdet(rule: IqDet, priors: Priors, image: Image) -> Answer:
    """The value of every object's distribution at every prior; of the points, the priors that they are nearest to."""
    middle, half = (image.boxes[:, :2] + image.boxes[:, 2:]) / 2, (image.boxes[:, 2:] - image.boxes[:, :2]) / 2
    half = half.clamp(min=1e-6)
    place = (prior_centers(priors)[:, None] - middle) / half  # (R, n, 2)
    inside = (place.abs() < 1).all(-1)
    level, best = levels_of(priors), best_shapes(priors, image.boxes)
    shape = torch.cat([torch.arange(len(g.shapes)).repeat(g.height * g.width) for g in priors.grids])
    counts = torch.stack([part.any(0) for part in inside.split(priors.level_sizes)])  # (L, n)
    counts[0] |= ~counts.any(0)
    mixture = static_mixture(rule, priors, image.boxes, counts) if image.mixture is None else image.mixture
    mean, deviation, share = mixture[..., :2], mixture[..., 2:4], mixture[..., 4] * counts.T[..., None]
    value = torch.zeros(len(priors), len(middle))
    for m in range(mixture.shape[2]):
        away = (place - mean[:, level, m].transpose(0, 1)) / deviation[:, level, m].transpose(0, 1)
        value += share[:, level, m].T * (away.square().sum(-1) / -2).exp()

    # Points: a component by its mass within the object, then both axes by the inverse of the cut off normal.
    mean, deviation, share = mean.double().flatten(1, 2), deviation.double().flatten(1, 2), share.double().flatten(1)
    low, high = (torch.special.ndtr((end - mean) / deviation) for end in (-1.0, 1.0))
    upto = (share * (deviation * (high - low)).prod(-1)).cumsum(1)
    random = random_numbers(image.objects, rule.samples)  # (n, S, 3)
    chosen = torch.searchsorted(upto, random[..., 0] * upto[:, -1:], right=True).clamp(max=upto.shape[1] - 1)
    row = torch.arange(len(middle))[:, None]
    mean, deviation, low, high = (t[row, chosen] for t in (mean, deviation, low, high))
    point = (mean + deviation * torch.special.ndtri(low + (high - low) * random[..., 1:])).clamp(-1, 1)
    point = middle.double()[:, None] + point * half.double()[:, None]  # (n, S, 2) pixels
    claims = torch.zeros_like(inside)
    start = 0
    for i, g in enumerate(priors.grids):
        cell = (point / g.stride - g.offset + 0.5).floor().long()
        cell = torch.minimum(cell.clamp(min=0), torch.tensor([g.width - 1, g.height - 1]))
        prior = start + (cell[..., 1] * g.width + cell[..., 0]) * len(g.shapes) + best[i][:, None]
        mine = chosen // mixture.shape[2] == i
        claims[prior[mine], row.expand_as(prior)[mine]] = True
        start += g.size
    highest, index = best_column(value, claims & inside)
    taken = (highest > -torch.inf)[:, None] & (index[:, None] == torch.arange(len(middle)))
    prior, owner = taken.nonzero(as_tuple=True)
    good = (value >= rule.negative_quality) & inside & (shape[:, None] == best[level])
    return Answer(prior, owner, quality=value[prior, owner], ignored=good.any(1))


def best_shapes(priors: Priors, boxes: Tensor) -> Tensor:
    """(L, n): which shape of a level overlaps the object most, both at one place."""
    own, found = boxes[:, 2:] - boxes[:, :2], []
    for g in priors.grids:
        size = torch.tensor(g.shapes)[:, None]
        shared = torch.minimum(size, own).prod(-1)
        iou = shared / (size.prod(-1) + own.prod(-1) - shared).clamp(min=1e-12)
        found.append((iou == iou.amax(0)).byte().argmax(0))
    return torch.stack(found)


def static_mixture(rule: IqDet, priors: Priors, boxes: Tensor, counts: Tensor) -> Tensor:
    """(n, L, 1, 5): a Gaussian at the centre, on levels by how many octaves their priors are from the object's size."""
    best = best_shapes(priors, boxes)
    size = torch.stack([torch.tensor(g.shapes)[b] for g, b in zip(priors.grids, best, strict=True)]).double()
    octaves = (boxes[:, 2:] - boxes[:, :2]).clamp(min=1e-6).double().log2().mean(-1) - size.log2().mean(-1)  # (L, n)
    fit = ((octaves / rule.level_deviation) ** 2 / -2).masked_fill(~counts, -torch.inf)
    share = (fit - fit.amax(0)).exp().float().T[..., None, None]
    return torch.cat(
        [torch.zeros_like(share).repeat(1, 1, 1, 2), (0 * share + rule.deviation).repeat(1, 1, 1, 2), share], -1
    )


def score_of(logits: Tensor, quality: Tensor | None) -> Tensor:
    return logits.sigmoid() if quality is None else logits.sigmoid() * quality.sigmoid()[:, None]


RULES: dict[type[Assigner], Callable[[Any, Priors, Image], Answer]] = {
    YoloRatio: yolo_ratio,
    YoloBest: yolo_best,
    Uniform: uniform,
    PointScale: point_scale,
    CenterGaussian: center_gaussian,
    CenterRegion: center_region,
    Paa: paa,
    DualWeight: dual_weight,
    IqDet: iqdet,
}
