"""Priors that differ by image (proposals) under the contract: the same as image by image, for every rule."""

from __future__ import annotations

from dataclasses import replace
from typing import get_args

import pytest
import torch

from detector.assign import Assigner, MaxIou, Rule
from detector.errors import ConfigError
from detector.structures import IGNORED, Predictions, Priors
from tests.assign.make import batch, random_boxes
from tests.assign.test_guarantees import NeverWaits

SIZE = (200, 264)
RULES: list[Assigner] = [rule() for rule in get_args(get_args(Rule)[0])]
OF_CELLS = ("yolo_ratio", "yolo_best", "center_gaussian", "iqdet")
RCNN = MaxIou(positive_iou=0.5, negative_iou=0.5, low_quality="none")


def proposals(images: int = 4, count: int = 60) -> Priors:
    """Each image's own boxes, without a grid; among them the objects of `truth`."""
    boxes = torch.stack([random_boxes(count, SIZE, 20 + i) for i in range(images)])
    for i, n in enumerate((7, 0, 30, 1)[:images]):
        boxes[i, :n] = random_boxes(n, SIZE, n)
    return Priors(boxes, torch.full((count,), 8.0), (count,))


def truth():  # type: ignore[no-untyped-def]
    images = [random_boxes(n, SIZE, n) for n in (7, 0, 30, 1)]
    regions = [random_boxes(n, SIZE, 9 + n) for n in (0, 2, 1, 3)]
    sizes = torch.tensor([[200.0, 264], [120, 130], [199, 100], [64, 64]])
    return batch(*images, ignore=regions, sizes=sizes)


@pytest.mark.parametrize("rule", [r for r in RULES if r.type in OF_CELLS], ids=lambda r: r.type)
def test_rules_of_cells_say_that_proposals_lie_on_none(rule: Assigner) -> None:
    priors, objects = proposals(), truth()
    said = Predictions(torch.zeros(4, 60, 3), priors.boxes)
    with pytest.raises(ConfigError, match=f"{rule.type} gives objects to cells of a grid.*choose a rule"):
        rule(priors, objects, said)


@pytest.mark.parametrize("rule", [*(r for r in RULES if r.type not in OF_CELLS), RCNN], ids=lambda r: r.type)
def test_the_batch_is_its_images(rule: Assigner) -> None:
    priors, objects = proposals(), truth()
    random = torch.Generator().manual_seed(0)
    logits = torch.randn(4, 60, 3, generator=random)
    said = Predictions(logits, priors.boxes + 1, logits[..., 0])
    whole = rule(priors, objects, said).per_prior()
    start = 0
    for i, n in enumerate((7, 0, 30, 1)):
        alone = rule(priors.select_image(i), objects.select_image(i), said.select_image(i)).per_prior()[0]
        assert torch.equal(whole[i], torch.where(alone >= 0, alone + start, alone))
        start += n
    assert (whole >= 0).any()


def test_max_iou_takes_the_batch_at_once() -> None:
    priors, objects = proposals(), truth()
    found = RCNN(priors, objects).per_prior()
    assert torch.equal(found[2, :30].sort().values, torch.arange(7, 37))  # each object's own box
    assert (found == IGNORED).any()
    with NeverWaits():
        RCNN(priors, objects)


def test_shapes_are_checked() -> None:
    priors = proposals(images=3)
    with pytest.raises(ValueError, match=r"priors.boxes has shape \(3, 60, 4\), expected \(4, any, 4\)"):
        RCNN(priors, truth())
    broken = replace(proposals(), boxes=proposals().boxes.flip(-1))
    with pytest.raises(RuntimeError, match="not x1 y1 x2 y2"):
        RCNN(broken, truth())


def test_boxes_of_pairs() -> None:
    priors = proposals()
    prior = torch.tensor([0, 61, 239])
    assert torch.equal(
        priors.boxes_of(prior), torch.stack([priors.boxes[0, 0], priors.boxes[1, 1], priors.boxes[3, 59]])
    )
    shared = priors.select_image(2)
    assert torch.equal(shared.boxes_of(prior), shared.boxes[[0, 1, 59]])
    assert priors.centers.shape == (4, 60, 2)
    assert len(priors) == len(shared) == 60
