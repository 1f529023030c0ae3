"""What a two-stage model says about a batch whose truth it was given: its RPN, then one box head after another.

Legend: B images, S sampled proposals of an image, K classes.
"""

from __future__ import annotations

from dataclasses import dataclass

from detector.structures import Assignment, Outputs, Priors


@dataclass(frozen=True)
class Stage:
    """What a box head says about its sample of proposals, and what these should learn."""

    outputs: Outputs  # priors: each image's S sampled proposals.  Class logits as the head gives them, (B, S, K + 1)
    assignment: Assignment  # of those proposals; padding is `ignored`


@dataclass(frozen=True)
class TwoStageOutputs:
    """All of it; a graph hangs on it."""

    rpn: Outputs | None  # of one class; None where proposals were given
    stages: tuple[Stage, ...]

    def priors_of(self, assignment: str) -> Priors:
        """What the assignment of this name labels: "rpn", "stage_1", "stage_2", ..."""
        if assignment == "rpn" and self.rpn is not None:
            return self.rpn.priors
        return self.stages[int(assignment.removeprefix("stage_")) - 1].outputs.priors
