"""Weights of "not of this class", for rules that treat the classes of a prior differently.

Legend: B images, R priors of one image, K classes, N objects, n of a part of them, M columns of a level.
"""

from __future__ import annotations

import torch
from torch import Tensor

from detector.errors import ConfigError
from detector.structures import Objects, Predictions


def count_classes(rule: str, num_classes: int | None, objects: Objects, predictions: Predictions | None) -> int:
    """K, from the rule's setting or the predictions.

    Raises ConfigError where both are missing or disagree; RuntimeError (on a GPU later) for a label beyond.
    """
    said = None if predictions is None else predictions.class_logits.shape[2]
    if num_classes is None and said is None:
        raise ConfigError(f"assigner.type={rule} needs to know the classes: set assigner.num_classes, or run a model.")
    if num_classes is not None and said is not None and num_classes != said:
        raise ConfigError(f"assigner.num_classes is {num_classes}, but the head has {said} classes: leave it out.")
    count = num_classes if num_classes is not None else said
    assert count is not None
    torch._assert_async((objects.labels < count).all(), f"objects.labels hold a label beyond the {count} classes")
    return count


def rows_of(objects: Objects, num_classes: int) -> Tensor:
    """(N,) row of each object's image and class in a table (B * K, ...)."""
    return objects.image * num_classes + objects.labels


def per_prior(table: Tensor, batch_size: int) -> Tensor:
    """(B * K, M) -> (B, M, K), a view."""
    return table.view(batch_size, -1, table.shape[1]).transpose(1, 2)
