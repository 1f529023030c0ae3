"""Boxes as shift and growth of their prior: R-CNN, RetinaNet, ATSS."""

from __future__ import annotations

import math
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from detector.boxes import from_cxcywh, full_precision, to_cxcywh
from detector.coders.base import Coder

Positive = Annotated[float, Field(gt=0)]


class Deltas(Coder):
    """Shift of the centre over the prior's size, and log of the size ratio (Girshick et al., "R-CNN", CVPR 2014).

    `raw = ((dx / w, dy / h, log(w' / w), log(h' / h)) - mean) / std`.  RetinaNet uses std 1 in Detectron; R-CNN and
    mmdetection's ATSS 0.1 0.1 0.2 0.2.
    """

    type: Literal["deltas"] = "deltas"
    std: tuple[Positive, Positive, Positive, Positive] = Field(
        (1.0, 1.0, 1.0, 1.0), description="dx, dy, dw, dh are divided by these, so that the raw targets are of order 1"
    )
    mean: tuple[float, float, float, float] = Field((0.0, 0.0, 0.0, 0.0), description="subtracted before the division")
    max_ratio: float = Field(1000 / 16, gt=1, description="a box is at most this many times as wide, high as its prior")
    clamp: Literal["both", "above"] = Field(
        "both", description="above: only growth is limited; both: shrinking too, to prior / max_ratio"
    )
    max_shift: float | None = Field(None, gt=0, description="pixels that a centre can leave its prior's (YOLOF: 32)")

    def encode(self, prior_boxes: Tensor, stride: Tensor, boxes: Tensor) -> Tensor:
        prior, box = to_cxcywh(full_precision(prior_boxes)), to_cxcywh(full_precision(boxes))
        shift = (box[..., :2] - prior[..., :2]) / prior[..., 2:]
        # A box without width would be log 0; a millionth of the prior is far below what `decode` gives back.
        ratio = (box[..., 2:] / prior[..., 2:]).clamp(min=1e-6).log()
        deltas = torch.cat([shift, ratio], dim=-1)
        return self._each_column(
            deltas, [((1 / std), -mean / std) for std, mean in zip(self.std, self.mean, strict=True)]
        )

    def decode(self, prior_boxes: Tensor, stride: Tensor, raw: Tensor) -> Tensor:
        prior, raw = to_cxcywh(full_precision(prior_boxes)), full_precision(raw)
        deltas = self._each_column(raw, list(zip(self.std, self.mean, strict=True)))
        shift = deltas[..., :2] * prior[..., 2:]
        if self.max_shift is not None:
            shift = shift.clamp(-self.max_shift, self.max_shift)
        limit = math.log(self.max_ratio)
        ratio = deltas[..., 2:].clamp(min=-limit if self.clamp == "both" else None, max=limit).exp()
        return from_cxcywh(torch.cat([prior[..., :2] + shift, prior[..., 2:] * ratio], dim=-1))

    def _each_column(self, values: Tensor, factor_and_term: list[tuple[float, float]]) -> Tensor:
        """Numbers instead of a tensor of four: making one on the GPU would wait for it."""
        if all(pair == (1, 0) for pair in factor_and_term):
            return values
        columns = zip(values.unbind(-1), factor_and_term, strict=True)
        return torch.stack([column * factor + term for column, (factor, term) in columns], dim=-1)
