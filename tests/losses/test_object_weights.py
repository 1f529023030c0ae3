"""Weights of single objects in the dense criterion."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from detector.assign import Atss, Fcos, MaxIou
from detector.assign.base import Assigner
from detector.config.load import load_config
from detector.errors import ConfigError
from detector.losses.auto_assign import AutoAssignConfig
from detector.losses.classification import Bce, Focal
from detector.losses.dense import DenseCriterionConfig
from detector.losses.free_anchor import FreeAnchorConfig
from detector.losses.objectness import Objectness
from detector.losses.quality import QualityBce
from detector.losses.regression import Giou
from detector.losses.soft import Varifocal
from detector.structures import Assignment, Objects, Outputs
from detector.train.step import Stepper, TrainingModule
from tests.losses.heads import given, some_objects, some_outputs
from tests.losses.test_every_rule import CRITERIA, HEADS, RULES, SIZES, STRIDES, batches

CRITERION = DenseCriterionConfig(classification=Focal(), box=Giou(), quality=QualityBce(), box_weighting="quality")
YOLOX = CRITERIA["yolox"]


def weighed(objects: Objects, *weights: float) -> Objects:
    return replace(objects, weight=torch.tensor(weights, dtype=torch.float32))


def outputs_of(head: str) -> Outputs:
    torch.manual_seed(0)
    outputs: Outputs = HEADS[head].build(16, STRIDES, 3)([torch.randn(2, 16, *size) for size in SIZES])
    return outputs


def gradients(criterion: Any, outputs: Outputs, objects: Objects) -> tuple[Tensor, ...]:
    total = criterion(outputs, objects).total
    assert outputs.quality_logits is not None
    leaves = [outputs.class_logits, outputs.box_raw, outputs.quality_logits]
    return total.detach(), *torch.autograd.grad(total, leaves)


@pytest.mark.parametrize("rule", RULES, ids=lambda r: r.type)
@pytest.mark.parametrize(("head", "criterion"), [("points", "comparison"), ("points", "yolox"), ("bins", "gfl")])
def test_weights_of_one_change_no_bit(rule: Assigner, head: str, criterion: str) -> None:
    """Whatever the rule, the criterion and the head."""
    module = CRITERIA[criterion].build(rule, 3)
    for objects in batches().values():
        plain = gradients(module, outputs_of(head), objects)
        ones = gradients(module, outputs_of(head), replace(objects, weight=torch.ones(len(objects))))
        for a, b in zip(plain, ones, strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("rule", [MaxIou(), Fcos(), Atss()], ids=lambda r: r.type)
@pytest.mark.parametrize("config", [CRITERION, YOLOX], ids=["fcos", "yolox"])
@pytest.mark.parametrize("normalizer", ["positives", "quality", "objects"])
def test_weight_0_is_as_if_its_priors_were_ignored(rule: Assigner, config: Any, normalizer: Any) -> None:
    config = config.model_copy(update={"normalizer": normalizer})
    outputs, objects = some_outputs(), some_objects()
    assignment = rule(outputs.priors, objects)
    kept = (assignment.weight > 0) & (assignment.object != 1)
    mine = (assignment.weight > 0) & (assignment.object == 1)
    assert mine.any()
    ignored = assignment.ignored.clone()
    ignored.view(-1)[assignment.prior[mine]] = True
    without = replace(assignment, weight=assignment.weight * kept, ignored=ignored)
    found = gradients(config.build(rule, 3), outputs, weighed(objects, 1, 0, 1))
    if normalizer == "objects":
        wanted = gradients(config.build(given(without), 3), outputs, objects)
        scale = len(objects) / 2
        wanted = tuple(w * scale for w in wanted)
    else:
        wanted = gradients(config.build(given(without), 3), outputs, objects)
    for f, w in zip(found, wanted, strict=True):
        assert_close(f, w)
    for gradient in found[1:]:
        assert not gradient.reshape(outputs.class_logits.shape[0] * len(outputs.priors), -1)[
            assignment.prior[mine]
        ].any()


def one_by_one(outputs: Outputs, objects: Objects, assignment: Assignment) -> tuple[Tensor, Tensor, Tensor]:
    """Class sum, box sum and count of plain BCE and GIoU, by loops: every logit of a prior weighs as its heaviest
    object; that of an object's class, as the heaviest object of the class."""
    assert objects.weight is not None
    batch, priors, classes = outputs.class_logits.shape
    for_class, for_box, count = torch.zeros(()), torch.zeros(()), 0.0
    logits, boxes = outputs.class_logits.reshape(-1, classes), outputs.boxes.reshape(-1, 4)
    for prior in range(batch * priors):
        if assignment.ignored.view(-1)[prior]:
            continue
        own = [p for p in range(len(assignment.prior)) if assignment.prior[p] == prior and assignment.weight[p] > 0]
        heaviest = max((float(objects.weight[assignment.object[p]]) for p in own), default=1.0)
        for k in range(classes):
            mine = [p for p in own if objects.labels[assignment.object[p]] == k]
            weight = max((float(objects.weight[assignment.object[p]]) for p in mine), default=heaviest)
            for_class = for_class + weight * Bce().each(logits[prior, k], torch.tensor(float(bool(mine))))
        for p in own:
            weight = float(objects.weight[assignment.object[p]])
            for_box = for_box + weight * Giou()(boxes[prior][None], objects.boxes[assignment.object[p]][None])[0]
            count += weight
    return for_class, for_box, torch.tensor(count)


@pytest.mark.parametrize("weights", [(0.3, 0.7, 2.0), (0.0, 1.0, 0.5), (0.0, 0.0, 0.0)])
def test_every_term_is_weighed_also_where_objects_share_priors(weights: tuple[float, ...]) -> None:
    outputs, objects = some_outputs(quality=False), weighed(some_objects(), *weights)
    count = len(outputs.priors)
    shared = Assignment(
        num_priors=count,
        prior=torch.tensor([3, 3, 4, 7, count + 2, count + 5, 0]),
        object=torch.tensor([0, 1, 1, 0, 2, 2, 0]),
        quality=torch.ones(7),
        weight=torch.tensor([1.0, 1, 1, 1, 1, 1, 0]),  # the last is padding
        ignored=torch.zeros(2, count, dtype=torch.bool),
    )
    shared.ignored[1, 9] = True
    losses = DenseCriterionConfig(classification=Bce(), box=Giou()).build(given(shared), 3)(outputs, objects)
    for_class, for_box, normalizer = one_by_one(outputs, objects, shared)
    assert_close(losses.sums["class"], for_class)
    assert_close(losses.sums["box"], for_box)
    assert_close(losses.normalizer, normalizer)
    leaves = (outputs.class_logits, outputs.box_raw)
    found = torch.autograd.grad(losses.sums["class"] + losses.sums["box"], leaves, retain_graph=True)
    for f, w in zip(found, torch.autograd.grad(for_class + for_box, leaves), strict=True):
        assert_close(f, w)
    if weights[0] == 0:  # its class on the prior that it shares
        assert found[0][0, 3, 0] == 0


@pytest.mark.parametrize("classification", [Focal(), Bce(), Varifocal()], ids=lambda c: c.type)
def test_sums_grow_with_the_weight(classification: Any) -> None:
    config = DenseCriterionConfig(classification=classification, class_on="positives", quality=Objectness())
    criterion, outputs = config.build(Atss(), 3), some_outputs()
    one = criterion(outputs, weighed(some_objects(), 1, 1, 1))
    half = criterion(outputs, weighed(some_objects(), 0.5, 0.5, 0.5))
    for name in ("class", "box"):
        assert_close(half.sums[name], one.sums[name] / 2)
    assert_close(half.normalizer, one.normalizer / 2)
    assert half.sums["quality"] < one.sums["quality"], "the background's share stays"


def test_other_criteria_refuse_weights() -> None:
    objects = weighed(some_objects(), 1, 1, 1)
    for config in (AutoAssignConfig(), FreeAnchorConfig()):
        with pytest.raises(ConfigError, match="does not know weights of single objects"):
            config.build(None, 3)(some_outputs(quality=config.type == "auto_assign"), objects)


def test_a_recipe_that_weighs_for_nothing_is_refused() -> None:
    mixup = "augment=[{type: mixup, weights: true}]"
    assert load_config(Path("retinanet_r50_fpn_1x_coco"), [mixup]).augment
    with pytest.raises(ConfigError, match=r"augment\.0\.weights is true"):
        load_config(Path("faster_rcnn_r50_fpn_1x_coco"), [mixup])


def test_training_does_not_see_objects_of_weight_0() -> None:
    """Some steps with other classes for those objects end in the same weights; with weight 1 they do not."""

    def train(label: int, weight: float) -> list[Tensor]:
        torch.manual_seed(0)
        config = load_config(
            Path("fcos_r50_fpn_1x_coco"),
            [
                "model.backbone={name: test_resnet, pretrained: false}",
                "model.neck={channels: 16, norm: batch}",
                "model.head.convs=1",
                "model.head.channels=16",
                "model.head.norm=batch",
                "data={type: shapes, train: 1, val: 1}",
            ],
        )
        module = TrainingModule(config.model.build(3), config.criterion.build(config.assigner, 3)).train()
        optimizer = torch.optim.SGD(module.parameters(), lr=0.01)
        for group in optimizer.param_groups:
            group["base_lr"] = 0.01
        stepper = Stepper(module, optimizer, torch.amp.GradScaler("cpu", enabled=False), None)
        boxes = [torch.tensor([[4.0, 4, 50, 60], [30, 8, 60, 40]]), torch.tensor([[8.0, 8, 40, 40]])]
        objects = Objects.collate(boxes, [torch.tensor([0, label]), torch.tensor([1])], sizes=torch.full((2, 2), 64.0))
        batch = batch_of(weighed(objects, 1, weight, 0.5))
        for _ in range(3):
            result = stepper([batch])
            assert all(value.isfinite() for value in result.terms.values())
        return [p.detach().clone() for p in module.parameters()]

    first, other = train(1, 0.0), train(2, 0.0)
    assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True))
    first, other = train(1, 0.2), train(2, 0.2)
    assert not all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


def batch_of(objects: Objects) -> Any:
    from detector.structures import Batch

    generator = torch.Generator().manual_seed(0)
    return Batch(
        images=torch.randint(0, 256, (2, 3, 64, 64), generator=generator, dtype=torch.uint8),
        objects=objects,
        ids=torch.arange(2),
        original_sizes=torch.full((2, 2), 64),
        scale=torch.ones(2, 2),
        offset=torch.zeros(2, 2),
    )
