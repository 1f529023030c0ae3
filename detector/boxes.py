"""Geometry of boxes: free functions on plain `x1 y1 x2 y2` tensors in pixels, pixel edges (no "+1" anywhere).

All broadcast over the leading dimensions.  `pairwise_*` compare box i with box i: (P, 4), (P, 4) -> (P,); given
(N, 1, 4) and (M, 4) they compare all pairs, which for the plain IoU `all_pairs_iou` does.  Half-precision boxes are
taken to float32 first: in float16 an area overflows at 256 x 256 pixels and 701.3 becomes 701.5.

A box without area has IoU 0 with everything, itself included; a box turned inside out counts as one without area.
Everything has finite values and finite gradients for every finite input.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

# Least divisor, in square pixels (CIoU's aspect: pixels): far below any object, far above float32's rounding to 0.
EPS = 1e-6


def from_cxcywh(boxes: Tensor) -> Tensor:
    """(..., 4) centre x, centre y, width, height -> xyxy."""
    center, half = boxes[..., :2], boxes[..., 2:] / 2
    return torch.cat([center - half, center + half], dim=-1)


def to_cxcywh(boxes: Tensor) -> Tensor:
    """(..., 4) xyxy -> centre x, centre y, width, height."""
    return torch.cat([centers(boxes), boxes[..., 2:] - boxes[..., :2]], dim=-1)


def centers(boxes: Tensor) -> Tensor:
    """(..., 4) xyxy -> (..., 2) x, y."""
    return (boxes[..., :2] + boxes[..., 2:]) / 2


def area(boxes: Tensor) -> Tensor:
    """(..., 4) xyxy -> (...) square pixels, 0 for boxes turned inside out."""
    boxes = full_precision(boxes)
    sides = (boxes[..., 2:] - boxes[..., :2]).clamp(min=0)
    return sides[..., 0] * sides[..., 1]


def clip(boxes: Tensor, size: Tensor) -> Tensor:
    """(..., 4) xyxy limited to images of `size` (..., 2) height, width; the far edges 0 and width are inclusive."""
    limit = size.flip(-1).to(boxes)
    return torch.minimum(boxes.clamp(min=0), torch.cat([limit, limit], dim=-1))


def intersection(a: Tensor, b: Tensor) -> Tensor:
    """(..., 4), (..., 4) xyxy -> (...) square pixels common to both."""
    a, b = full_precision(a), full_precision(b)
    sides = torch.minimum(a[..., 2:], b[..., 2:]) - torch.maximum(a[..., :2], b[..., :2])
    sides = sides.clamp(min=0)
    return sides[..., 0] * sides[..., 1]


def coverage(a: Tensor, b: Tensor) -> Tensor:
    """(..., 4), (..., 4) xyxy -> (...) in [0, 1]: how much of `a` lies inside `b`; 0 where `a` has no area."""
    return intersection(a, b) / area(a).clamp(min=EPS)


def edge_distances(points: Tensor, boxes: Tensor) -> Tensor:
    """(..., 2), (..., 4) xyxy -> (..., 4) pixels from a point to the left, top, right, bottom edge; < 0 outside."""
    return torch.cat([points - boxes[..., :2], boxes[..., 2:] - points], dim=-1)


def pairwise_iou(a: Tensor, b: Tensor) -> Tensor:
    """(..., 4), (..., 4) xyxy -> (...) in [0, 1]: intersection over union."""
    return _iou_and_union(a, b)[0]


def all_pairs_iou(a: Tensor, b: Tensor) -> Tensor:
    """(N, 4), (M, 4) xyxy -> (N, M): IoU of every box of `a` with every box of `b`."""
    return pairwise_iou(a[:, None], b)


def pairwise_giou(a: Tensor, b: Tensor) -> Tensor:
    """(..., 4), (..., 4) xyxy -> (...) in [-1, 1]: IoU less the empty share of the enclosing box.

    Rezatofighi et al., "Generalized Intersection over Union", CVPR 2019.
    """
    iou, union = _iou_and_union(a, b)
    sides = _enclosing_sides(a, b)
    enclosing = sides[..., 0] * sides[..., 1]
    return iou - (enclosing - union) / enclosing.clamp(min=EPS)


def pairwise_diou(a: Tensor, b: Tensor) -> Tensor:
    """(..., 4), (..., 4) xyxy -> (...) in [-1, 1]: IoU less squared centre distance over squared enclosing diagonal.

    Zheng et al., "Distance-IoU Loss", AAAI 2020.
    """
    a, b = full_precision(a), full_precision(b)
    distance = (centers(a) - centers(b)).square().sum(-1)
    diagonal = _enclosing_sides(a, b).square().sum(-1)
    return pairwise_iou(a, b) - distance / diagonal.clamp(min=EPS)


def pairwise_ciou(a: Tensor, b: Tensor, aspect_from_iou: float = 0.0) -> Tensor:
    """(..., 4), (..., 4) xyxy -> (...): DIoU less a penalty for different aspect ratios.

    The penalty counts where the IoU is at least `aspect_from_iou`: 0 in Zheng et al., AAAI 2020; 0.5 in their
    "Enhancing Geometric Factors", IEEE Trans. Cybernetics 2021.  Its trade-off weight carries no gradient, as in both.
    """
    a, b = full_precision(a), full_precision(b)
    difference = (_aspect_angle(b) - _aspect_angle(a)).square() * (4 / math.pi**2)
    with torch.no_grad():
        iou = pairwise_iou(a, b)
        # Identical boxes are 0 / 0 without the floor.
        trade_off = difference / (1 - iou + difference).clamp(min=EPS) * (iou >= aspect_from_iou)
    return pairwise_diou(a, b) - trade_off * difference


def full_precision(values: Tensor) -> Tensor:
    """float16 and bfloat16 -> float32; float32 and float64 as they are."""
    return values.float() if values.dtype in (torch.float16, torch.bfloat16) else values


def _iou_and_union(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    common = intersection(a, b)
    union = area(a) + area(b) - common
    return common / union.clamp(min=EPS), union


def _enclosing_sides(a: Tensor, b: Tensor) -> Tensor:
    """(..., 2) width, height of the smallest box around both."""
    a, b = full_precision(a), full_precision(b)
    return (torch.maximum(a[..., 2:], b[..., 2:]) - torch.minimum(a[..., :2], b[..., :2])).clamp(min=0)


def _aspect_angle(boxes: Tensor) -> Tensor:
    """(...) angle of the diagonal; the floor keeps the gradient of a box without area finite."""
    sides = (boxes[..., 2:] - boxes[..., :2]).clamp(min=EPS)
    return torch.atan2(sides[..., 0], sides[..., 1])
