"""The two stages' losses: mmdetection's numbers, and what there is to learn where there is nothing."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.testing import assert_close

from detector.assign import Atss, Fcos, MaxIou
from detector.assign.base import Assigner
from detector.assign.sample import Random
from detector.coders import Deltas
from detector.errors import ConfigError
from detector.losses.classification import Bce, Focal
from detector.losses.regression import L1, Giou, SmoothL1
from detector.losses.two_stage import CrossEntropy, RpnLossConfig, TwoStageCriterionConfig, box_sum
from detector.models.stages import Stage, TwoStageOutputs
from detector.structures import Assignment, Objects, Outputs, Priors
from tests.assign.test_guarantees import NeverWaits

from .heads import given, some_objects, some_outputs

ALL = Random(count=10**6, positive_fraction=1.0)
RCNN = Deltas(std=(0.1, 0.1, 0.2, 0.2))


def gradients(of: Tensor, *at: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(of, at, retain_graph=True)


def rpn_only(outputs: Outputs, stage: Stage) -> TwoStageOutputs:
    return TwoStageOutputs(outputs, (stage,))


def some_stage(batch: int = 2, proposals: int = 5, classes: int = 3, softmax: bool = True) -> Stage:
    """Random outputs on proposals that are all background."""
    random = torch.Generator().manual_seed(5)
    boxes = torch.rand(batch, proposals, 2, generator=random) * 20
    boxes = torch.cat([boxes, boxes + 8], -1)
    outputs = Outputs(
        priors=Priors(boxes, torch.ones(proposals), (proposals,)),
        class_logits=torch.randn(batch, proposals, classes + softmax, generator=random).requires_grad_(),
        box_raw=torch.randn(batch, proposals, classes, 4, generator=random).requires_grad_(),
        quality_logits=None,
        coder=RCNN,
    )
    none = torch.zeros(0)
    ignored = torch.zeros(batch, proposals, dtype=torch.bool)
    return Stage(outputs, Assignment(proposals, none.long(), none.long(), none, none, ignored))


def test_golden_rpn(golden: Any) -> None:
    """With the peer's own labels: our max-IoU differs on purpose in who gets a low-quality prior.

    The peer counts an image without positives as one with one, which we do not.
    """
    data = golden("head_rpn")
    setup = data.scenario("setup")
    sizes = tuple((setup["featmaps"].prod(1) * 3).tolist())
    priors = Priors(setup["anchors"], torch.ones(sum(sizes)), sizes)
    config = TwoStageCriterionConfig(rpn=RpnLossConfig(sampler=ALL, box=L1()))
    for scenario in sorted(set(data.scenarios()) - {"setup"}):
        s = data.scenario(scenario)
        outputs = Outputs(priors, s["in_cls"].requires_grad_(), s["in_box"].requires_grad_(), None, Deltas())
        prior = (s["t_box_weights"].view(-1) > 0).nonzero().squeeze(1)
        objects = Objects(
            boxes=Deltas().decode(setup["anchors"][prior % len(priors)], prior, s["t_boxes"].view(-1, 4)[prior]),
            labels=prior % 7,  # whichever: to an RPN all objects are alike
            image=prior // len(priors),
            ignore=torch.zeros(0, 4),
            ignore_image=torch.zeros(0).long(),
            batch_size=2,
        )
        ones = torch.ones(len(prior))
        rule = given(Assignment(len(priors), prior, torch.arange(len(prior)), ones, ones, s["t_label_weights"] == 0))
        losses = config.build(rule, 7)(rpn_only(outputs, some_stage(classes=7)), objects)
        sampled = (s["t_label_weights"] > 0).sum()
        assert s["t_avg_factor"][0] - sampled == {"zero_big": 1, "zero_zero": 2}.get(scenario, 0)
        factor = sampled / s["t_avg_factor"][0]
        assert_close(losses.parts["rpn_class"].detach() * factor, s["loss_rpn_cls"][0], rtol=1e-5, atol=1e-7)
        assert_close(losses.parts["rpn_box"].detach() * factor, s["loss_rpn_bbox"][0], rtol=1e-5, atol=1e-7)
        for_class, for_box = gradients(losses.total * factor, outputs.class_logits, outputs.box_raw)
        assert_close(for_class, s["grad_cls"], rtol=1e-4, atol=1e-8)
        assert_close(for_box, s["grad_box"], rtol=1e-4, atol=1e-8)


@pytest.mark.parametrize("case", ["per_class", "agnostic", "giou"])
@pytest.mark.parametrize("scenario", ["typical", "many", "zero", "one", "nested", "tiny"])
def test_golden_second_stage(golden: Any, scenario: str, case: str) -> None:
    """Labels, box targets, both losses and their gradients from proposals and objects alone."""
    file = golden("rcnn_targets")
    data, s = file.scenario(scenario), file.scenario(f"{scenario}/{case}")
    boxes = data["sampled"][None]
    count = boxes.shape[1]
    objects = Objects.collate([data["gt"]], [data["labels"]])
    priors = Priors(boxes, torch.ones(count), (count,))
    assignment = MaxIou(positive_iou=0.5, negative_iou=0.5, low_quality="none")(priors, objects)

    index = assignment.per_prior()[0]
    labels = objects.labels[index.clamp(min=0)] if len(objects) else index
    assert torch.equal(labels.where(index >= 0, 5), s["t_labels"].long())
    positive = index >= 0
    if positive.any() and case != "giou":  # the peer's GIoU targets are boxes in pixels
        targets = RCNN.encode(boxes[0][positive], torch.ones(1), objects.boxes[index[positive]])
        assert_close(targets, s["t_boxes"][positive], rtol=1e-4, atol=1e-4)

    logits, raw = s["in_cls"][None].requires_grad_(), s["in_box"][None].requires_grad_()
    coded = raw if case == "agnostic" else raw.unflatten(2, (5, 4))
    box = {"per_class": L1(), "agnostic": SmoothL1(beta=1.0), "giou": Giou(weight=10.0)}[case]
    stage = Stage(Outputs(priors, logits, coded, None, RCNN), assignment)
    criterion = TwoStageCriterionConfig(box=box).build(MaxIou(), 5)
    losses = criterion(rpn_only(some_outputs(batch=1, classes=1, quality=False), stage), objects)
    assert_close(losses.parts["stage_1_class"].detach(), s["loss_cls"][0], rtol=1e-5, atol=1e-6)
    assert_close(losses.parts["stage_1_box"].detach(), s["loss_bbox"][0], rtol=1e-5, atol=1e-6)
    total = losses.parts["stage_1_class"] + losses.parts["stage_1_box"]
    for_class, for_box = gradients(total, logits, raw)
    assert_close(for_class, s["grad_cls"][None], rtol=1e-4, atol=1e-7)
    assert_close(for_box, s["grad_box"][None], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("rule", [MaxIou(positive_iou=0.7, negative_iou=0.3), Atss(), Fcos()], ids=lambda r: r.type)
@pytest.mark.parametrize("empty", [True, False])
def test_any_rule_serves_the_rpn(rule: Assigner, empty: bool) -> None:
    outputs = some_outputs(classes=1, quality=False)
    objects = some_objects(empty=empty)
    losses = TwoStageCriterionConfig().build(rule, 3)(rpn_only(outputs, some_stage()), objects)
    assert set(losses.parts) == {"rpn_class", "rpn_box", "stage_1_class", "stage_1_box"}
    assert torch.isfinite(losses.total)
    assert losses.parts["stage_1_box"] == 0
    assert (losses.parts["rpn_box"] == 0) == empty
    for_class, for_box = gradients(losses.total, outputs.class_logits, outputs.box_raw)
    assert for_class.abs().sum() > 0
    assert (for_box.abs().sum() == 0) == empty


def test_each_term_is_the_mean_over_its_own_sample() -> None:
    outputs, stage, objects = some_outputs(classes=1, quality=False), some_stage(), some_objects(empty=True)
    config = TwoStageCriterionConfig(rpn=RpnLossConfig(sampler=Random(count=7)))
    losses = config.build(MaxIou(), 3)(rpn_only(outputs, stage), objects)
    assert losses.normalizer == 2
    picked = ~losses.assignments["rpn"].ignored
    assert picked.sum(1).tolist() == [7, 7]
    logits = outputs.class_logits[..., 0][picked]
    assert_close(losses.parts["rpn_class"], F.softplus(logits).mean())
    flat = stage.outputs.class_logits.flatten(0, 1)
    assert_close(losses.parts["stage_1_class"], F.cross_entropy(flat, torch.full((10,), 3)))


def test_micro_batches_are_the_whole_batch() -> None:
    stage, outputs, objects = some_stage(), some_outputs(classes=1, quality=False), some_objects()
    criterion = TwoStageCriterionConfig(rpn=RpnLossConfig(sampler=ALL)).build(Fcos(), 3)
    whole = criterion(rpn_only(outputs, stage), objects)
    sums, normalizer = 0.0, 0.0
    for i in range(2):
        one = replace(
            stage.outputs,
            priors=stage.outputs.priors.select_image(i),
            class_logits=stage.outputs.class_logits[i : i + 1],
            box_raw=stage.outputs.box_raw[i : i + 1],
        )
        found = replace(stage.assignment, ignored=stage.assignment.ignored[i : i + 1])
        rpn = replace(outputs, class_logits=outputs.class_logits[i : i + 1], box_raw=outputs.box_raw[i : i + 1])
        losses = criterion(rpn_only(rpn, Stage(one, found)), objects.select_image(i))
        sums, normalizer = sums + torch.stack(list(losses.sums.values())).sum(), normalizer + losses.normalizer
    assert_close(sums / normalizer, whole.total)


def test_padding_gives_neither_value_nor_gradient() -> None:
    """Pairs of weight 0 whose proposals and objects have no area, for every kind of box loss."""
    stage = some_stage(batch=1)
    boxes = stage.outputs.priors.boxes.clone()
    boxes[0, 3:] = 0
    outputs = replace(stage.outputs, priors=replace(stage.outputs.priors, boxes=boxes))
    objects = Objects.collate([torch.tensor([[1.0, 1, 1, 1], [2, 2, 9, 9]])], [torch.tensor([0, 2])])
    weight = torch.tensor([0.0, 1.0])
    found = Assignment(5, torch.tensor([4, 0]), torch.tensor([0, 1]), weight, weight, torch.zeros(1, 5).bool())
    for loss in (L1(), SmoothL1(), Giou()):
        value = box_sum(loss, outputs, objects, found)
        (gradient,) = gradients(value, outputs.box_raw)
        assert value.isfinite()
        assert value > 0
        assert gradient.isfinite().all()
        assert (gradient[0, 0, 2].abs() > 0).any()
        gradient[0, 0, 2] = 0
        assert not gradient.any()


@pytest.mark.parametrize("classification", [Bce(), Focal()], ids=lambda c: c.type)
def test_sigmoid_classes(classification: Any) -> None:
    stage = some_stage(softmax=False)
    criterion = TwoStageCriterionConfig(classification=classification).build(MaxIou(), 3)
    losses = criterion(rpn_only(some_outputs(classes=1, quality=False), stage), some_objects(empty=True))
    each = classification.each(stage.outputs.class_logits, torch.zeros(2, 5, 3))
    assert_close(losses.parts["stage_1_class"], each.sum() / 10)


def test_soft_targets_and_label_smoothing() -> None:
    logits = torch.tensor([[[1.0, -0.5, 0.3]]])
    outputs = replace(some_stage(1, 1, 2).outputs, class_logits=logits)
    one, quality = torch.ones(1), torch.tensor([0.7])
    found = Assignment(1, torch.zeros(1).long(), torch.zeros(1).long(), quality, one, torch.zeros(1, 1).bool())
    objects = Objects.collate([torch.tensor([[1.0, 1, 9, 9]])], [torch.tensor([1])])
    for smooth in (0.0, 0.3):
        config = TwoStageCriterionConfig(classification=CrossEntropy(label_smoothing=smooth))
        stage = Stage(outputs, found)
        losses = config.build(MaxIou(), 2)(rpn_only(some_outputs(batch=1, classes=1, quality=False), stage), objects)
        target = torch.tensor([0.0, 0.7, 0.3]) * (1 - smooth) + smooth / 3
        assert_close(losses.parts["stage_1_class"], -(logits[0, 0].log_softmax(0) * target).sum())


def test_outputs_that_do_not_fit_are_named() -> None:
    rpn, objects = some_outputs(classes=1, quality=False), some_objects()
    with pytest.raises(ConfigError, match="gives 4 class logits, but 'focal' needs 3"):
        TwoStageCriterionConfig(classification=Focal()).build(MaxIou(), 3)(rpn_only(rpn, some_stage()), objects)
    with pytest.raises(ConfigError, match="give one for each"):
        TwoStageCriterionConfig(stage_weights=(1, 0.5)).build(MaxIou(), 3)(rpn_only(rpn, some_stage()), objects)


class NeverWaitsButFills(NeverWaits):
    """A number written into a part of a tensor is a fill on the device, though it looks like a constant sent there."""

    forbidden = tuple(name for name in NeverWaits.forbidden if name != "lift_fresh")


def test_no_waiting_for_the_device() -> None:
    """Every tensor operation of the criterion has a shape known beforehand."""
    outputs, stage, objects = some_outputs(classes=1, quality=False), some_stage(), some_objects()
    criterion = TwoStageCriterionConfig().build(MaxIou(positive_iou=0.7, negative_iou=0.3), 3)
    criterion(rpn_only(outputs, stage), objects)  # tables are made once
    with NeverWaitsButFills():
        criterion(rpn_only(outputs, stage), objects)
