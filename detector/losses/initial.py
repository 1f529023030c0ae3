"""What the class loss must be before the first step."""

from __future__ import annotations

import math

import torch

from detector.losses.classification import ClassLoss


def expected_initial_loss(loss: ClassLoss, prior_probability: float, positives: float, negatives: float) -> float:
    """Closed form of the class loss's sum before training, when every logit says `prior_probability`.

    `positives` and `negatives` count logits (not priors).  A head initialised with that bias must begin near it.
    """
    logit = torch.full((2,), math.log(prior_probability / (1 - prior_probability)), dtype=torch.float64)
    positive, negative = loss.each(logit, torch.tensor([1.0, 0.0], dtype=torch.float64)).tolist()
    return float(loss.weight * (positives * positive + negatives * negative))
