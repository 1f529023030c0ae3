"""The criterion: whole heads of mmdetection, and what holds for any rule."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar

import pytest
import torch
import torch.nn.functional as F
from pydantic import ValidationError
from torch import Tensor
from torch.testing import assert_close

from detector.assign import Atss, Fcos, MaxIou
from detector.assign.base import Assigner
from detector.coders import Bins, Coder, Deltas, Distances
from detector.errors import ConfigError
from detector.losses.classification import Bce, Focal
from detector.losses.dense import DenseCriterionConfig
from detector.losses.distribution import DistributionFocal
from detector.losses.objectness import Objectness
from detector.losses.quality import QualityBce, centerness
from detector.losses.regression import L1, Ciou, Diou, Giou, Iou, SmoothL1
from detector.losses.soft import QualityFocal, Varifocal
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


def soft(outputs: Outputs, objects: Objects, **changes: Any) -> Assignment:
    """ATSS's pairs as a soft rule would give them: qualities and weights between 0 and 1."""
    found = Atss()(outputs.priors, objects)
    random = torch.Generator().manual_seed(3)
    quality = torch.rand(len(found.prior), generator=random) * (found.weight > 0)
    return replace(found, quality=quality, weight=found.weight * (0.5 + quality / 2), **changes)


def iou_of(outputs: Outputs, objects: Objects, found: Assignment) -> Tensor:
    decoded, target = outputs.boxes.detach().view(-1, 4)[found.prior], objects.boxes[found.object]
    sides = (torch.minimum(decoded[:, 2:], target[:, 2:]) - torch.maximum(decoded[:, :2], target[:, :2])).clamp(min=0)
    area = (decoded[:, 2:] - decoded[:, :2]).prod(1) + (target[:, 2:] - target[:, :2]).prod(1)
    return sides.prod(1) / (area - sides.prod(1))


@pytest.mark.parametrize("source", ["assignment", "iou", "one"])
@pytest.mark.parametrize("loss", [QualityFocal(), Varifocal(), Focal(), Bce()], ids=lambda c: c.type)
def test_where_class_targets_come_from(source: Any, loss: Any) -> None:
    outputs, objects = some_outputs(), some_objects()
    found = soft(outputs, objects)
    config = DenseCriterionConfig(classification=loss, class_target=source, normalizer="quality")
    losses = config.build(given(found), 3)(outputs, objects)
    value = {"assignment": found.quality, "iou": iou_of(outputs, objects, found), "one": torch.ones(len(found.prior))}
    target, weight = torch.zeros(2, 20, 3), torch.ones(2, 20, 3)
    kept = found.weight > 0
    cell = (found.prior * 3 + objects.labels[found.object])[kept]
    target.view(-1)[cell], weight.view(-1)[cell] = value[source][kept], found.weight[kept]
    expected = (loss.each(outputs.class_logits, target) * weight).sum()
    assert_close(losses.sums["class"], expected)
    assert_close(gradient(losses.sums["class"], outputs.class_logits), gradient(expected, outputs.class_logits))
    assert_close(losses.normalizer, (value[source] * found.weight).sum())
    assert losses.assignments["dense"] is not None
    assert torch.equal(losses.assignments["dense"].quality, found.quality)  # what the rule said is reported


@pytest.mark.parametrize("weighting", ["uniform", "assignment", "iou", "score", "quality"])
def test_what_boxes_are_weighted_by(weighting: Any) -> None:
    outputs, objects = some_outputs(coder=Bins()), some_objects()
    found = soft(outputs, objects)
    config = DenseCriterionConfig(
        box=Giou(), box_weighting=weighting, distribution=DistributionFocal(weight=1), quality=QualityBce()
    )
    losses = config.build(given(found), 3)(outputs, objects)
    prior = found.prior % found.num_priors
    factor = {
        "uniform": torch.ones(len(prior)),
        "assignment": found.quality,
        "iou": iou_of(outputs, objects, found),
        "score": outputs.class_logits.detach().sigmoid().view(-1, 3)[found.prior].amax(1),
        "quality": centerness(outputs.priors.centers[prior], objects.boxes[found.object]),
    }[weighting]
    weight = found.weight * factor
    each = Giou()(outputs.boxes.view(-1, 4)[found.prior], objects.boxes[found.object])
    assert_close(losses.sums["box"], (each * weight).sum())
    true = Bins().distances(outputs.priors.boxes[prior], outputs.priors.stride[prior], objects.boxes[found.object])
    dfl = DistributionFocal()(outputs.box_raw.view(-1, 68)[found.prior], true, Bins())
    assert_close(losses.sums["distribution"], (dfl * weight).sum())


def test_a_rule_that_weighs_the_background_says_whether_that_holds_the_focal_factor() -> None:
    outputs, objects = some_outputs(), some_objects()
    background = torch.rand(2, 20, 3, generator=torch.Generator().manual_seed(1))
    config = DenseCriterionConfig(classification=Focal())

    def class_sum(modulated: bool | None) -> Tensor:
        found = soft(outputs, objects, background_weight=background, modulated=modulated)
        return config.build(given(found), 3)(outputs, objects).sums["class"]

    found = soft(outputs, objects)
    kept = found.weight > 0
    cell = (found.prior * 3 + objects.labels[found.object])[kept]
    target, weight = torch.zeros(2, 20, 3), background.clone()
    target.view(-1)[cell], weight.view(-1)[cell] = found.quality[kept], found.weight[kept]
    plain = F.binary_cross_entropy_with_logits(outputs.class_logits, target, reduction="none")
    assert_close(class_sum(True), (plain * weight).sum())
    assert_close(class_sum(False), (Focal().each(outputs.class_logits, target) * weight).sum())
    with pytest.raises(ConfigError, match="must set `modulated`"):
        class_sum(None)


@pytest.mark.parametrize("target", ["one", "iou"])
def test_objectness_teaches_every_prior(target: Any) -> None:
    """A prior with two objects is one target, an ignored one none."""
    outputs = some_outputs()
    objects = replace(some_objects(), ignore=torch.tensor([[0.0, 0, 12, 12]]), ignore_image=torch.tensor([1]))
    found = Atss()(outputs.priors, objects)
    kept = found.weight > 0
    prior = found.prior[kept][:1]
    twice = replace(
        found,
        prior=torch.cat([found.prior, prior]),
        object=torch.cat([found.object, 1 - found.object[kept][:1]]),  # the image's other object
        quality=torch.cat([found.quality, torch.ones(1)]),
        weight=torch.cat([found.weight, torch.ones(1)]),
    )
    config = DenseCriterionConfig(quality=Objectness(target=target), class_on="positives")
    losses = config.build(given(twice), 3)(outputs, objects)
    goal = torch.zeros(40)
    value = torch.ones(len(twice.prior)) if target == "one" else iou_of(outputs, objects, twice)
    goal.scatter_reduce_(0, twice.prior[twice.weight > 0], value[twice.weight > 0], "amax")
    assert outputs.quality_logits is not None
    each = F.binary_cross_entropy_with_logits(outputs.quality_logits.view(-1), goal, reduction="none")
    assert found.ignored.any()
    assert_close(losses.sums["quality"], each[~found.ignored.view(-1)].sum())
    slope = gradient(losses.sums["class"], outputs.class_logits).view(40, 3)
    positive = torch.zeros(40, dtype=torch.bool)
    positive[twice.prior[twice.weight > 0]] = True
    assert slope[positive].all()
    assert not slope[~positive].any()


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
    with pytest.raises(ConfigError, match=r"model\.head\.coder={type: bins}"):
        DenseCriterionConfig(distribution=DistributionFocal()).build(Atss(), 3)(outputs, objects)
    with pytest.raises(ConfigError, match=r"criterion\.box\.type=giou"):
        DenseCriterionConfig(box=L1()).build(Atss(), 3)(some_outputs(quality=False, coder=Bins()), objects)
    with pytest.raises(ConfigError, match="set assigner"):
        DenseCriterionConfig().build(None, 3)
    with pytest.raises(ValidationError, match="box_weighting"):
        DenseCriterionConfig(box_weighting="quality")
    with pytest.raises(ValidationError, match="type: objectness"):
        DenseCriterionConfig(class_on="positives", quality=QualityBce())


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
