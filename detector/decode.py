"""From a head's outputs to detections: threshold, best candidates of each level, NMS, limit.

Legend: B images, R priors, K classes, M candidates of an image, D of the batch that count.

The number of candidates is fixed until the threshold is applied, and only theirs are the scores and boxes that are
computed.  One NMS serves all images and classes of the batch.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor
from torchvision.ops import nms

from detector.boxes import all_pairs_iou, clip
from detector.config.node import Node
from detector.structures import Detections, Outputs

# NMS first sees this many times as many candidates of an image as it may give.
STARTS_WITH = 5
LEAST_VOTING_IOU = 0.01


class DecodeConfig(Node):
    """What counts as a detection.  The defaults are FCOS's and ATSS's; RetinaNet's NMS has IoU 0.5."""

    score_threshold: float = Field(0.05, ge=0, lt=1, description="class scores at or below it are dropped")
    pre_nms_topk: int = Field(1000, ge=1, description="best (prior, class) pairs kept of each level")
    quality: Literal["product", "geometric", "ignore"] = Field(
        "product", description="score = class * quality, its square root, or class alone; after threshold and topk"
    )
    threshold_on: Literal["class", "score"] = Field(
        "class", description="what `score_threshold` looks at: the class score alone, or the final score (PAA)"
    )
    min_size: float = Field(0.0, ge=0, description="network pixels; boxes not wider and higher than this are dropped")
    nms_iou: float = Field(0.6, ge=0, le=1, description="of two boxes with more than this, the lower-scored is dropped")
    class_aware: bool = Field(True, description="only boxes of one class suppress each other")
    max_detections: int = Field(100, ge=1, description="of an image")
    score_voting: float | None = Field(
        None,
        gt=0,
        description="sigma of PAA's score voting, 0.025 there: boxes are moved by those like them; null: off",
    )


@torch.no_grad()
def decode(outputs: Outputs, sizes: Tensor, config: DecodeConfig) -> list[Detections]:
    """One `Detections` for each image, in pixels of the network's input, clipped to the images.

    `sizes`: (B, 2) height, width of the images without padding.  Float32 whatever the model's precision; a candidate
    with a NaN anywhere is dropped.  IoU does not change when x or y are scaled, so NMS here is NMS in original pixels.
    """
    batch, num_classes = len(outputs.class_logits), outputs.class_logits.shape[2]
    prior, label = _candidates(outputs.class_logits, outputs.priors.level_sizes, config.pre_nms_topk)
    scores, above = _scores(outputs, prior, label, config)
    priors = _gather(outputs.priors.boxes, prior) if outputs.priors.per_image else outputs.priors.boxes[prior]
    raw = outputs.box_raw
    raw = _gather(raw, prior) if raw.dim() == 3 else _gather(raw.flatten(1, 2), prior * num_classes + label)
    boxes = outputs.coder.decode(priors, outputs.priors.stride[prior], raw)
    boxes = clip(boxes, sizes[:, None])
    width, height = (boxes[..., 2:] - boxes[..., :2]).unbind(-1)
    kept = above & (width > config.min_size) & (height > config.min_size)

    image = torch.arange(batch, device=kept.device)[:, None].expand_as(kept)[kept]
    boxes, scores, label = boxes[kept], scores[kept], label[kept]
    order = scores.argsort(descending=True, stable=True)
    order = order[image[order].argsort(stable=True)]  # by image, in each by falling score
    boxes, scores, label, image = boxes[order], scores[order], label[order], image[order]
    group = image * num_classes + label if config.class_aware else image
    chosen = _best(boxes, scores, group, image, batch, config)
    found = torch.bincount(image[chosen], minlength=batch).tolist()
    final = boxes[chosen]
    if config.score_voting is not None:
        counts = torch.bincount(image, minlength=batch).tolist()
        final = _vote(boxes, scores, label, chosen, list(zip(counts, found, strict=True)), config.score_voting)
    parts = (final.split(found), scores[chosen].split(found), label[chosen].split(found))
    return [Detections(*each) for each in zip(*parts, strict=True)]


def _candidates(logits: Tensor, level_sizes: tuple[int, ...], topk: int) -> tuple[Tensor, Tensor]:
    """(B, M) index of the prior and (B, M) label of the `topk` best (prior, class) pairs of each level."""
    num_classes = logits.shape[2]
    priors, labels, start = [], [], 0
    for size in level_sizes:
        level = logits[:, start : start + size]
        index = torch.arange(size, device=logits.device).expand(len(logits), -1)
        if size > topk and num_classes > 1:
            # The best pairs are among the priors whose own best class is best: a maximum instead of sorting all pairs.
            index = level.amax(-1).topk(topk, sorted=False).indices
            level = _gather(level, index)
        pairs = level.flatten(1)
        best = pairs.topk(min(topk, pairs.shape[1]), sorted=False).indices
        priors.append(start + index.gather(1, best // num_classes))
        labels.append(best % num_classes)
        start += size
    return torch.cat(priors, 1), torch.cat(labels, 1)


def _scores(outputs: Outputs, prior: Tensor, label: Tensor, config: DecodeConfig) -> tuple[Tensor, Tensor]:
    """(B, M) final scores, and (B, M) whether the one that `threshold_on` says passes the threshold."""
    num_classes = outputs.class_logits.shape[2]
    scores = outputs.class_logits.flatten(1).gather(1, prior * num_classes + label).float().sigmoid()
    above = scores > config.score_threshold
    if outputs.quality_logits is None or config.quality == "ignore":
        return scores, above
    scores = scores * outputs.quality_logits.gather(1, prior).float().sigmoid()
    scores = scores.sqrt() if config.quality == "geometric" else scores
    if config.threshold_on == "score":
        return scores, scores > config.score_threshold
    return scores, above & (scores >= 0)  # a NaN quality is not


def _best(boxes: Tensor, scores: Tensor, group: Tensor, image: Tensor, batch: int, config: DecodeConfig) -> Tensor:
    """Rising indices of the at most `max_detections` of each image that no better one of their group suppresses.

    What NMS keeps does not depend on what comes later, so the start of each image's candidates is enough where it fills
    the limit; NMS takes time by the square of their number.
    """
    counts = torch.bincount(image, minlength=batch)
    start = _rank(image, counts) < STARTS_WITH * config.max_detections
    first = start.nonzero().squeeze(1)
    kept = first[_nms(boxes[first], scores[first], group[first], config.nms_iou)]
    found = torch.bincount(image[kept], minlength=batch)
    if ((found < config.max_detections) & (counts > STARTS_WITH * config.max_detections)).any():
        kept = _nms(boxes, scores, group, config.nms_iou)
        found = torch.bincount(image[kept], minlength=batch)
    kept = kept.sort().values
    return kept[_rank(image[kept], found) < config.max_detections]


def _vote(
    boxes: Tensor, scores: Tensor, label: Tensor, chosen: Tensor, counts: list[tuple[int, int]], sigma: float
) -> Tensor:
    """(D, 4), ... and the chosen of them -> (n, 4): each box is the mean of all candidates of its image and class.

    They weigh score * exp(-(1 - IoU)^2 / sigma), from an IoU of 0.01 (Kim and Lee, "PAA", ECCV 2020).
    counts: of each image, how many candidates and how many chosen; both are sorted by image.
    """
    voted, start = [], 0
    for mine, (candidates, _) in zip(chosen.split([n for _, n in counts]), counts, strict=True):
        own, value = boxes[start : start + candidates], scores[start : start + candidates]
        iou = all_pairs_iou(boxes[mine], own)
        weight = value * (-(1 - iou).square() / sigma).exp()
        weight *= (iou > LEAST_VOTING_IOU) & (label[mine, None] == label[start : start + candidates])
        mean = weight @ own / weight.sum(1, keepdim=True).clamp(min=1e-12)
        # Below the precision of float32 (a score of 0) nobody votes.
        voted.append(torch.where(weight.sum(1, keepdim=True) > 0, mean, boxes[mine]))
        start += candidates
    return torch.cat(voted)


def _rank(image: Tensor, counts: Tensor) -> Tensor:
    """(D,) position within its image, for `image` sorted and (B,) `counts` of it."""
    return torch.arange(len(image), device=image.device) - (counts.cumsum(0) - counts)[image]


def _nms(boxes: Tensor, scores: Tensor, group: Tensor, iou: float) -> Tensor:
    """Indices of the boxes that no better one of their group suppresses.

    Groups are moved apart.  In float64: at the hundredth class of the tenth image, float32 would round to 0.1 pixel.
    """
    boxes = boxes.double()
    step = boxes.max() + 1 if len(boxes) else 0.0
    return nms(boxes + (group * step)[:, None], scores.double(), iou)


def _gather(values: Tensor, index: Tensor) -> Tensor:
    """(B, R, C), (B, M) -> (B, M, C)."""
    return values.gather(1, index[:, :, None].expand(-1, -1, values.shape[2]))
