"""Before the first step every class score is the prior probability, so the first loss is known in advance."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from detector.config.load import load_config
from detector.losses.initial import expected_initial_loss
from detector.models.priors import Anchors
from detector.structures import Objects

RECIPES = ("retinanet_r50_fpn_1x_coco", "fcos_r50_fpn_1x_coco", "atss_r50_fpn_1x_coco")


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("probability", [0.01, 0.05])
def test_the_first_class_loss_is_the_expected_one(recipe: str, probability: float) -> None:
    config = load_config(
        Path(recipe),
        [
            "model.backbone={name: resnet18, pretrained: false, norm: batch, freeze_stages: 0}",
            "model.neck.channels=32",
            "model.head.channels=32",
            f"model.head.prior_probability={probability}",
        ],
    )
    torch.manual_seed(0)
    model, criterion = config.model.build(20), config.criterion.build(config.assigner, 20)
    images = torch.randint(0, 256, (2, 3, 128, 160), dtype=torch.uint8)
    boxes = torch.tensor([[10.0, 10, 60, 70], [40, 30, 150, 120], [5, 5, 40, 30]])
    objects = Objects.collate([boxes[:2], boxes[2:]], [torch.tensor([3, 7]), torch.tensor([19])])
    losses = criterion(model(images), objects)
    assignment = losses.assignments["dense"]
    positives = int((assignment.per_prior() >= 0).sum())
    logits = int((~assignment.ignored).sum()) * 20
    expected = expected_initial_loss(config.criterion.classification, probability, positives, logits - positives)
    assert positives > 0
    assert losses.sums["class"].item() == pytest.approx(expected, rel=0.05)
    assert isinstance(config.model.head.priors, Anchors) == (recipe != "fcos_r50_fpn_1x_coco")
