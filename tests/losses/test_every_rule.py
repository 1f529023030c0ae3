"""Every rule of the union with every kind of head and criterion: finite losses and gradients, whatever the batch."""

from __future__ import annotations

from typing import Any, get_args

import pytest
import torch

from detector.assign import Assigner, Rule, around
from detector.coders import Bins, Deltas, Distances
from detector.losses.classification import Bce
from detector.losses.dense import DenseCriterionConfig
from detector.losses.distribution import DistributionFocal
from detector.losses.objectness import Objectness
from detector.losses.quality import QualityBce
from detector.losses.regression import Giou, Iou
from detector.losses.soft import QualityFocal, Varifocal
from detector.models.dense_head import DenseHeadConfig
from detector.models.priors import Anchors, Points
from detector.models.task_aligned_head import TaskAlignedHeadConfig
from detector.structures import Objects
from tests.assign.test_guarantees import NeverWaits

RULES: list[Assigner] = [rule() for rule in get_args(get_args(Rule)[0])]
STRIDES, SIZES, IMAGE = (8, 16, 32), ((8, 10), (4, 5), (2, 3)), (64, 80)
ONE = Anchors(scale=8, octave_scales=1, ratios=(1,))
SMALL: dict[str, Any] = {"channels": 16, "convs": 1, "quality": True}
HEADS = {
    "points": DenseHeadConfig(priors=Points(), coder=Distances(), **SMALL),
    "nine anchors": DenseHeadConfig(priors=Anchors(), coder=Deltas(), **SMALL),
    "bins": DenseHeadConfig(priors=ONE, coder=Bins(), **SMALL),
    "task-aligned": TaskAlignedHeadConfig(priors=ONE, **SMALL),
}
CRITERIA = {
    "comparison": DenseCriterionConfig(  # configs/assign/base.yaml
        classification=QualityFocal(),
        box=Giou(weight=2),
        box_weighting="assignment",
        quality=QualityBce(target="iou"),
        normalizer="quality",
    ),
    "gfl": DenseCriterionConfig(
        classification=QualityFocal(),
        class_target="iou",
        box_weighting="score",
        normalize_box_weights=True,
        quality=QualityBce(),
    ),
    "vfnet": DenseCriterionConfig(
        classification=Varifocal(), class_target="iou", box_weighting="iou", quality=QualityBce()
    ),
    "yolox": DenseCriterionConfig(
        classification=Bce(), class_on="positives", box=Iou(mode="square", weight=5), quality=Objectness()
    ),
}


def batches() -> dict[str, Objects]:
    random = torch.Generator().manual_seed(0)
    few = [torch.tensor([[4.0, 6, 40, 50], [50, 10, 78, 60]]), torch.tensor([[20.0, 20, 60, 55]])]
    corner = torch.rand(300, 2, generator=random) * 60
    many = torch.cat([corner, corner + 1 + torch.rand(300, 2, generator=random) * 30], 1)
    none, sizes = torch.zeros(0, 4), torch.tensor([IMAGE, IMAGE]).float()

    def labels(boxes: torch.Tensor) -> torch.Tensor:
        return torch.arange(len(boxes)) % 3

    return {
        "few": Objects.collate(few, [labels(b) for b in few], sizes=sizes),
        "many and none": Objects.collate([many, none], [labels(many), labels(none)], sizes=sizes),
        "crowds": Objects.collate([none, none], [labels(none)] * 2, [torch.tensor([[0.0, 0, 80, 64]]), none], sizes),
    }


TOGETHER = [("points", criterion) for criterion in CRITERIA] + [
    ("nine anchors", "comparison"),
    ("bins", "gfl"),
    ("task-aligned", "comparison"),
]


@pytest.mark.parametrize(("name", "criterion"), TOGETHER)
@pytest.mark.parametrize("rule", RULES, ids=lambda r: r.type)
def test_losses_and_gradients_are_finite(rule: Assigner, name: str, criterion: str) -> None:
    torch.manual_seed(0)
    head = HEADS[name].build(16, STRIDES, 3)
    config = CRITERIA[criterion]
    if name == "bins":
        config = config.model_copy(update={"distribution": DistributionFocal()})
    losses_of = config.build(rule, 3)
    maps = [torch.randn(2, 16, *size, generator=torch.Generator().manual_seed(1)) for size in SIZES]
    positives = 0
    for kind, objects in batches().items():
        head.zero_grad()
        losses = losses_of(head(maps), objects)
        assert losses.total.isfinite(), kind
        losses.total.backward()
        for which, parameter in head.named_parameters():
            assert parameter.grad is not None, (kind, which)
            assert parameter.grad.isfinite().all(), (kind, which)
        found = bool((losses.assignments["dense"].weight > 0).any())
        positives += found
        assert bool(losses.sums["box"] > 0) == found, kind
        assert head.box.weight.grad is not None
        assert bool(head.box.weight.grad.any()) == found, kind
    assert 1 <= positives <= 2  # never in crowds alone


@pytest.mark.parametrize("rule", [rule for rule in RULES if not rule.synchronises], ids=lambda r: r.type)
def test_no_step_waits_for_the_device(rule: Assigner, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the head's outputs to gradients, as on a device that is not its own host."""
    monkeypatch.setattr(around, "may_ask", lambda device: False)
    head = HEADS["points"].build(16, STRIDES, 3)
    losses_of = CRITERIA["comparison"].build(rule, 3)
    maps = [torch.randn(2, 16, *size, generator=torch.Generator().manual_seed(1)) for size in SIZES]
    for objects in batches().values():
        losses_of(head(maps), objects).total.backward()  # tables are made once
        outputs = head(maps)
        with NeverWaits():
            losses_of(outputs, objects).total.backward()
