"""An own rule, written for one image, in a few lines."""

from __future__ import annotations

from typing import Literal

import pytest
import torch

from detector.assign import Assigner, from_index
from detector.structures import BACKGROUND, IGNORED, Assignment, Objects, Predictions, Priors
from tests.assign.make import batch, pyramid, random_boxes


class Nearest(Assigner):
    """Each prior for the object whose centre is nearest, within a radius."""

    type: Literal["nearest"] = "nearest"
    radius: float = 16.0

    def assign_image(self, priors: Priors, objects: Objects, predictions: Predictions | None) -> Assignment:
        distance, index = torch.cdist(priors.centers, objects.centers).min(1)
        return from_index(torch.where(distance < self.radius, index, BACKGROUND), quality=1 - distance / self.radius)


def test_the_base_does_the_rest() -> None:
    priors = pyramid((128, 160), strides=(8, 16))
    images = [random_boxes(n, (128, 160), n) for n in (5, 0, 9)]
    region = torch.tensor([[0.0, 0, 64, 64]])
    objects = batch(*images, ignore=[region, region, region])
    found = Nearest()(priors, objects)
    index, start = found.per_prior(), 0
    for i, boxes in enumerate(images):
        assert (
            (index[i] == IGNORED) | (index[i] == BACKGROUND) | ((index[i] >= start) & (index[i] < start + len(boxes)))
        ).all()
        start += len(boxes)
    assert (index[1] < 0).all()
    assert (index == IGNORED).any(1).all()
    kept = found.weight > 0
    near = (priors.centers[found.prior % len(priors)] - objects.centers[found.object]).norm(dim=1)
    torch.testing.assert_close(found.quality[kept], (1 - near / 16)[kept], atol=1e-4, rtol=0)


class Weighted(Nearest):
    """Only where there is something to say about the background."""

    def assign_image(self, priors: Priors, objects: Objects, predictions: Predictions | None) -> Assignment:
        one = super().assign_image(priors, objects, predictions)
        return Assignment(
            one.num_priors,
            one.prior,
            one.object,
            one.quality,
            one.weight,
            one.ignored,
            torch.full((1, len(priors), 3), 0.5),
        )


def test_background_weights_of_images_without_objects_are_one() -> None:
    found = Weighted()(pyramid((64, 64), strides=(8,)), batch([[0.0, 0, 20, 20]], []))
    assert found.background_weight is not None
    assert (found.background_weight[0] == 0.5).all()
    assert (found.background_weight[1] == 1).all()


class Empty(Assigner):
    type: Literal["empty"] = "empty"


def test_a_rule_without_a_method_says_what_is_missing() -> None:
    with pytest.raises(NotImplementedError, match="Empty must define `assign`"):
        Empty()(pyramid((64, 64)), batch([[0.0, 0, 20, 20]]))


class Said(Nearest):
    uses_predictions = True


def test_predictions_are_asked_for() -> None:
    with pytest.raises(ValueError, match="Said looks at the predictions"):
        Said()(pyramid((64, 64)), batch([[0.0, 0, 20, 20]]))
