"""What the regression losses see: the head's numbers and the truth, gathered pair by pair.

Legend: B images, R priors of an image, P pairs, C raw numbers of a box.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from torch import Tensor

from detector import boxes
from detector.boxes import full_precision
from detector.coders import Coder
from detector.structures import Assignment, Objects, Outputs


@dataclass(frozen=True)
class Pairs:
    """P (prior, object) pairs; boxes are decoded for them alone, and only if a loss asks."""

    weight: Tensor  # (P,) float32, 0 for padding and for ignored priors
    prior_boxes: Tensor  # (P, 4) float32 xyxy
    stride: Tensor  # (P,) float32 pixels
    raw: Tensor  # (P, C) float32, with graph
    quality_logits: Tensor | None  # (P,) float32, with graph
    boxes: Tensor  # (P, 4) float32 xyxy of the objects
    coder: Coder

    @classmethod
    def gather(cls, outputs: Outputs, objects: Objects, assignment: Assignment) -> Pairs:
        prior = assignment.prior % len(outputs.priors)
        quality = outputs.quality_logits
        return cls(
            weight=assignment.weight * ~assignment.ignored.view(-1)[assignment.prior],
            prior_boxes=outputs.priors.boxes[prior],
            stride=outputs.priors.stride[prior],
            raw=full_precision(outputs.box_raw.flatten(0, 1)[assignment.prior]),
            quality_logits=None if quality is None else full_precision(quality.reshape(-1)[assignment.prior]),
            boxes=objects.boxes[assignment.object],
            coder=outputs.coder,
        )

    @cached_property
    def centers(self) -> Tensor:
        """(P, 2) x, y of the priors."""
        return boxes.centers(self.prior_boxes)

    @cached_property
    def decoded(self) -> Tensor:
        """(P, 4) float32 xyxy that the head says, with graph."""
        return self.coder.decode(self.prior_boxes, self.stride, self.raw)

    @cached_property
    def raw_target(self) -> Tensor:
        """(P, C) float32 that the head should say."""
        return self.coder.encode(self.prior_boxes, self.stride, self.boxes)
