"""The criterion: whole heads of mmdetection, and what holds for any rule."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor
from torch.testing import assert_close

from detector.assign import Atss, Fcos, MaxIou
from detector.assign.base import Assigner
from detector.coders import Coder, Deltas, Distances
from detector.errors import ConfigError
from detector.losses.classification import Bce, Focal
from detector.losses.dense import DenseCriterionConfig
from detector.losses.quality import QualityBce, centerness
from detector.losses.regression import L1, Ciou, Diou, Giou, Iou, SmoothL1
from detector.structures import Assignment, Losses, Objects, Outputs, Predictions, Priors

from .heads import given, golden_objects, golden_priors, some_objects, some_outputs

BOX_LOSSES = [L1(), SmoothL1(), Iou(), Iou(mode="linear"), Iou(mode="square"), Giou(), Diou(), Ciou()]
TERMS = {"class": "cls", "box": "bbox", "quality": "centerness"}  # our names of the terms and the fixture's


def gradient(of: Tensor, at: Tensor) -> Tensor:
    (found,) = torch.autograd.grad(of, at, retain_graph=True)
    return found


def check_against(s: dict[str, Tensor], losses: Losses, outputs: Outputs, divisors: dict[str, Tensor | float]) -> None:
    """Values and gradients, after dividing each sum by what the peer divides it by."""
    parts = {name: losses.sums[name] / divisors[name] for name in losses.sums}
    for name, value in parts.items():
        assert_close(value.detach(), s[f"loss_{TERMS[name]}"].squeeze(), rtol=2e-5, atol=1e-6)
    total = torch.stack(list(parts.values())).sum()
    assert_close(gradient(total, outputs.class_logits), s["grad_cls"], rtol=1e-4, atol=1e-6)
    assert_close(gradient(total, outputs.box_raw), s["grad_box"], rtol=1e-4, atol=1e-6)
    if outputs.quality_logits is not None:
        assert_close(gradient(total, outputs.quality_logits), s["grad_centerness"][..., 0], rtol=1e-4, atol=1e-6)


def sum_of_centerness(losses: Losses, outputs: Outputs, objects: Objects) -> Tensor:
    found = losses.assignments["dense"]
    target = centerness(outputs.priors.centers[found.prior % found.num_priors], objects.boxes[found.object])
    return (target * found.weight).sum()


@pytest.mark.parametrize(
    ("name", "rule", "box"),
    [
        ("head_fcos", Fcos(center_radius=None), Iou()),
        ("head_fcos_tricks", Fcos(center_radius=1.5), Giou()),
        ("head_atss", Atss(), Giou(weight=2)),
    ],
)
def test_golden_heads_with_centerness(golden, name: str, rule: Assigner, box: Any) -> None:  # type: ignore[no-untyped-def]
    """The peer divides the box loss by the sum of centerness, where we divide all terms by one number.

    Its number of positives is at least 1, and in ATSS at least 1 an *image*, which we do not copy: an image without
    objects is not a positive.
    """
    data = golden(name)
    setup = data.scenario("setup")
    atss = name == "head_atss"
    priors = golden_priors(setup, 8, offset=0 if atss else 0.5)
    coder: Coder = Deltas(std=(0.1, 0.1, 0.2, 0.2)) if atss else Distances(activation="relu")
    pixels = name == "head_fcos"  # what this one's boxes are said in; the others' in strides
    priors_of_coder = replace(priors, stride=torch.ones_like(priors.stride)) if pixels else priors
    config = DenseCriterionConfig(
        classification=Focal(), box=box, quality=QualityBce(), box_weighting="quality", normalizer="positives"
    )
    for scenario in sorted(set(data.scenarios()) - {"setup"}):
        s = data.scenario(scenario)
        outputs = Outputs(
            priors=priors_of_coder,
            class_logits=s["in_cls"].requires_grad_(),
            box_raw=s["in_box"].requires_grad_(),
            quality_logits=s["in_centerness"][..., 0].requires_grad_(),
            coder=coder,
        )
        objects = golden_objects(s)
        assignment = rule(priors, objects)
        losses = config.build(given(assignment), 5)(outputs, objects)
        positives = (s["t_labels"] < 5).sum()
        assert losses.normalizer == positives
        divisor = s["t_avg_factor"].item() if atss else positives.clamp(min=1)
        weights = sum_of_centerness(losses, outputs, objects)
        weights = weights.clamp(min=1) if atss else weights.clamp(min=1e-6)
        check_against(s, losses, outputs, {"class": divisor, "box": weights, "quality": divisor})


def test_golden_retina_head(golden) -> None:  # type: ignore[no-untyped-def]
    """With the peer's own labels: our max-IoU differs on purpose in who gets a low-quality prior."""
    data = golden("head_retina")
    setup = data.scenario("setup")
    strides, maps = setup["strides"].tolist(), setup["featmaps"].tolist()
    sizes = tuple(9 * h * w for h, w in maps)
    stride = torch.cat([torch.full((n,), float(s)) for n, s in zip(sizes, strides, strict=True)])
    priors = Priors(setup["anchors"], stride, sizes)
    config = DenseCriterionConfig(box=L1())
    for scenario in sorted(set(data.scenarios()) - {"setup"}):
        s = data.scenario(scenario)
        outputs = Outputs(priors, s["in_cls"].requires_grad_(), s["in_box"].requires_grad_(), None, Deltas())
        positive = s["t_labels"].view(-1) < 5
        prior = positive.nonzero().squeeze(1)
        # Each positive is an object of its own, with the box that it was told to learn.
        targets = s["t_boxes"].view(-1, 4)[prior]
        anchors = setup["anchors"][prior % len(priors)]
        objects = Objects(
            boxes=Deltas().decode(anchors, stride[prior % len(priors)], targets),
            labels=s["t_labels"].view(-1)[prior].long(),
            image=prior // len(priors),
            ignore=torch.zeros(0, 4),
            ignore_image=torch.zeros(0).long(),
            batch_size=2,
        )
        ones = torch.ones(len(prior))
        ignored = s["t_label_weights"] == 0
        assignment = Assignment(len(priors), prior, torch.arange(len(prior)), ones, ones, ignored)
        losses = config.build(given(assignment), 5)(outputs, objects)
        divisor = s["t_avg_factor"].item()
        check_against(s, losses, outputs, {"class": divisor, "box": divisor})


@pytest.mark.parametrize("rule", [MaxIou(), Fcos(), Atss()], ids=lambda r: r.type)
@pytest.mark.parametrize("coder", [Deltas(), Distances()], ids=lambda c: c.type)
@pytest.mark.parametrize("box", BOX_LOSSES, ids=repr)
def test_every_rule_with_every_box_loss(rule: Assigner, coder: Coder, box: Any) -> None:
    outputs = some_outputs(coder=coder)
    config = DenseCriterionConfig(box=box, quality=QualityBce())
    losses = config.build(rule, 3)(outputs, some_objects())
    assert set(losses.sums) == set(losses.parts) == {"class", "box", "quality"}
    assert losses.total.isfinite()
    assert losses.total.dtype == torch.float32
    assert losses.normalizer >= 1
    losses.total.backward()
    for leaf in (outputs.class_logits, outputs.box_raw, outputs.quality_logits):
        assert leaf is not None
        assert leaf.grad is not None
        assert leaf.grad.isfinite().all()
        assert leaf.grad.any()


@pytest.mark.parametrize("box", BOX_LOSSES, ids=repr)
def test_a_batch_without_objects(box: Any) -> None:
    """Only background is learnt; box and quality are exactly 0 and yet reach the head, for DDP's sake."""
    outputs = some_outputs()
    criterion = DenseCriterionConfig(box=box, quality=QualityBce(), box_weighting="quality").build(Atss(), 3)
    losses = criterion(outputs, some_objects(empty=True))
    assert losses.sums["box"].item() == 0
    assert losses.sums["quality"].item() == 0
    assert losses.normalizer == 0  # no image is counted as one positive
    assert losses.parts["class"] == losses.sums["class"] > 0
    losses.total.backward()
    assert outputs.box_raw.grad is not None
    assert not outputs.box_raw.grad.any()
    assert outputs.quality_logits is not None
    assert outputs.quality_logits.grad is not None


def test_micro_batches_add_up_to_the_batch() -> None:
    """One of the two images is empty: it adds nothing to the count."""
    config = DenseCriterionConfig(box=Giou(), quality=QualityBce())
    criterion = config.build(Atss(), 3)
    outputs, objects = some_outputs(), some_objects()
    objects = objects.select_image(0)
    whole = criterion(outputs, replace(objects, batch_size=2))
    expected = gradient(whole.total, outputs.box_raw), gradient(whole.total, outputs.class_logits)
    count, sums = torch.zeros(()), []
    for i in range(2):
        part = replace(
            outputs,
            class_logits=outputs.class_logits[i : i + 1],
            box_raw=outputs.box_raw[i : i + 1],
            quality_logits=None if outputs.quality_logits is None else outputs.quality_logits[i : i + 1],
        )
        losses = criterion(part, objects if i == 0 else some_objects(1, empty=True))
        count = count + losses.normalizer
        sums.append(torch.stack(list(losses.sums.values())).sum())
    total = torch.stack(sums).sum() / count.clamp(min=1)
    assert_close(total, whole.total)
    assert_close((gradient(total, outputs.box_raw), gradient(total, outputs.class_logits)), expected)


def test_padding_pairs_change_nothing() -> None:
    outputs, objects = some_outputs(), some_objects()
    real = Atss()(outputs.priors, objects)
    nothing = torch.zeros(7)
    padded = replace(
        real,
        prior=torch.cat([nothing.long(), real.prior]),
        object=torch.cat([torch.ones(7).long(), real.object]),
        quality=torch.cat([nothing, real.quality]),
        weight=torch.cat([nothing, real.weight]),
    )
    config = DenseCriterionConfig(quality=QualityBce(), normalizer="quality")
    a, b = (config.build(given(x), 3)(outputs, objects) for x in (real, padded))
    assert_close(a.sums, b.sums)
    assert_close(a.normalizer, b.normalizer)
    assert_close(gradient(a.total, outputs.box_raw), gradient(b.total, outputs.box_raw))


def test_a_target_of_exactly_zero_is_learnt() -> None:
    """An object that is its prior: all four deltas should be 0, and the loss sees it."""
    outputs = some_outputs(batch=1)
    objects = Objects.collate([outputs.priors.boxes[:1]], [torch.tensor([1])])
    one = torch.ones(1)
    shape = (1, len(outputs.priors))
    assignment = Assignment(shape[1], torch.zeros(1).long(), torch.zeros(1).long(), one, one, torch.zeros(shape) > 0)
    losses = DenseCriterionConfig(box=L1()).build(given(assignment), 3)(outputs, objects)
    assert_close(losses.sums["box"], outputs.box_raw[0, 0].abs().sum())
    assert gradient(losses.total, outputs.box_raw)[0, 0].all()


def test_targets_stay_in_float32_under_autocast() -> None:
    """Logits and raw numbers in half precision; coordinates, sums and count never."""
    outputs, objects = some_outputs(), some_objects()
    objects = replace(objects, boxes=objects.boxes + 0.3)
    exact = DenseCriterionConfig(quality=QualityBce()).build(Atss(), 3)(outputs, objects)
    for dtype in (torch.bfloat16, torch.float16):
        half = replace(
            outputs,
            class_logits=outputs.class_logits.to(dtype),
            box_raw=outputs.box_raw.to(dtype),
            quality_logits=None if outputs.quality_logits is None else outputs.quality_logits.to(dtype),
        )
        rounded = replace(
            half,
            class_logits=half.class_logits.float(),
            box_raw=half.box_raw.float(),
            quality_logits=None if half.quality_logits is None else half.quality_logits.float(),
        )
        criterion = DenseCriterionConfig(quality=QualityBce()).build(Atss(), 3)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            losses = criterion(half, objects)
        assert all(x.dtype == torch.float32 for x in losses.sums.values())
        assert_close(losses.sums, criterion(rounded, objects).sums)
        assert_close(losses.total, exact.total, rtol=2e-2, atol=0)


def test_weights_of_the_terms() -> None:
    outputs, objects = some_outputs(), some_objects()
    plain = DenseCriterionConfig(box=Giou(), quality=QualityBce()).build(Atss(), 3)(outputs, objects)
    config = DenseCriterionConfig(
        classification=Focal(weight=3), box=Giou(weight=0.5), quality=QualityBce(weight=0), box_weighting="uniform"
    )
    weighted = config.build(Atss(), 3)(outputs, objects)
    assert_close(weighted.sums["class"], 3 * plain.sums["class"])
    assert_close(weighted.sums["box"], 0.5 * plain.sums["box"])
    assert weighted.sums["quality"] == 0


def test_box_weighting_by_iou_by_hand() -> None:
    outputs, objects = some_outputs(), some_objects()
    config = DenseCriterionConfig(
        box=Iou(mode="linear"), quality=QualityBce(target="iou"), box_weighting="quality", classification=Bce()
    )
    losses = config.build(Atss(), 3)(outputs, objects)
    found = losses.assignments["dense"]
    decoded = outputs.boxes.view(-1, 4)[found.prior]
    target = objects.boxes[found.object]
    sides = (torch.minimum(decoded[:, 2:], target[:, 2:]) - torch.maximum(decoded[:, :2], target[:, :2])).clamp(min=0)
    area = (decoded[:, 2:] - decoded[:, :2]).prod(1) + (target[:, 2:] - target[:, :2]).prod(1)
    iou = sides.prod(1) / (area - sides.prod(1))
    assert_close(losses.sums["box"], ((1 - iou) * iou.detach() * found.weight).sum())


class Looks(Assigner):
    """Uses the predictions, and says what it saw."""

    uses_predictions: ClassVar[bool] = True
    seen: ClassVar[list[Predictions]] = []

    def assign(self, priors: Priors, objects: Objects, predictions: Predictions | None) -> Assignment:
        assert predictions is not None
        self.seen.append(predictions)
        return Atss()(priors, objects)


def test_a_rule_that_looks_at_the_predictions_gets_them_detached() -> None:
    outputs, objects = some_outputs(), some_objects()
    losses = DenseCriterionConfig().build(Looks(), 3)(outputs, objects)
    (seen,) = Looks.seen
    assert not seen.boxes.requires_grad
    assert_close(seen.boxes, outputs.boxes.detach())
    assert_close(losses.sums, DenseCriterionConfig().build(Atss(), 3)(outputs, objects).sums)


def test_what_does_not_fit_is_said() -> None:
    outputs, objects = some_outputs(quality=False), some_objects()
    with pytest.raises(ConfigError, match="no quality branch"):
        DenseCriterionConfig(quality=QualityBce()).build(Atss(), 3)(outputs, objects)
    with pytest.raises(ConfigError, match="3 class logits"):
        DenseCriterionConfig().build(Atss(), 4)(outputs, objects)
    with pytest.raises(ValidationError, match="box_weighting"):
        DenseCriterionConfig(box_weighting="quality")


def test_without_a_quality_branch() -> None:
    losses = DenseCriterionConfig().build(Atss(), 3)(some_outputs(quality=False), some_objects())
    assert set(losses.sums) == {"class", "box"}


def test_configuration_by_type_and_back() -> None:
    config = DenseCriterionConfig.model_validate(
        {
            "classification": {"type": "focal", "gamma": 1.5, "label_smoothing": 0.1},
            "box": {"type": "smooth_l1", "beta": 1},
            "quality": {"target": "iou"},
            "normalizer": "ema",
        }
    )
    assert config.box == SmoothL1(beta=1)
    assert DenseCriterionConfig.model_validate(config.model_dump(mode="json")) == config
