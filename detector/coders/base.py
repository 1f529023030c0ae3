"""How a head's raw numbers mean a box: `encode` says what it should have said, `decode` what it did say.

Boxes are xyxy in pixels.  All arguments broadcast over their leading dimensions, so that R priors meet a batch's raw
(B, R, C), or P gathered priors P gathered boxes.  Half-precision raw numbers are taken to float32 before anything else.
"""

from __future__ import annotations

from abc import abstractmethod

from torch import Tensor

from detector.config.node import Node


class Coder(Node):
    """A box as C numbers relative to a prior.  Has no state; `Outputs` carries it to criterion and decoding."""

    @property
    def channels(self) -> int:
        """C, how many numbers the head gives for a prior."""
        return 4

    @abstractmethod
    def encode(self, prior_boxes: Tensor, stride: Tensor, boxes: Tensor) -> Tensor:
        """(..., 4), (...), (..., 4) -> (..., C) float32: the raw numbers that decode to `boxes`.

        Finite for every box; where the coder cannot express a box, the numbers of the nearest one it can.
        """

    @abstractmethod
    def decode(self, prior_boxes: Tensor, stride: Tensor, raw: Tensor) -> Tensor:
        """(..., 4), (...), (..., C) -> (..., 4) float32 xyxy, not clipped to the image; finite for finite `raw`."""
