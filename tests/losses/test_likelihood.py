"""FreeAnchor and AutoAssign: mmdetection's losses and gradients, plain definitions, and what any criterion promises."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close
from torchvision.ops import box_iou

from detector.assign import Atss
from detector.coders import Bins, Deltas, Distances
from detector.errors import ConfigError
from detector.losses import auto_assign, free_anchor
from detector.losses.auto_assign import AutoAssign, AutoAssignConfig
from detector.losses.free_anchor import FreeAnchorConfig
from detector.losses.likelihood import negative_sum
from detector.losses.regression import L1, Giou
from detector.structures import IGNORED, Losses, Objects, Outputs, Priors
from detector.train.optim import decays
from tests.assign.test_guarantees import NeverWaits, pairs_in_order

from .heads import golden_objects, golden_priors, some_objects, some_outputs
from .test_golden_heads import check, scenarios

BOTH = [FreeAnchorConfig(), AutoAssignConfig()]


def outputs_for(config: Any, **settings: Any) -> Outputs:
    return some_outputs(quality=config.type == "auto_assign", **settings)


@pytest.mark.parametrize("quality", [False, True])
@pytest.mark.parametrize("gamma", [0.0, 1.5, 2.0])
def test_negative_sum_is_its_definition(quality: bool, gamma: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("detector.losses.likelihood.CPU_BLOCK", 16)
    random = torch.Generator().manual_seed(0)
    x = torch.randn(2, 9, 4, generator=random, dtype=torch.float64).mul(3).requires_grad_()
    y = torch.randn(2, 9, generator=random, dtype=torch.float64).requires_grad_() if quality else None
    belonging = torch.rand(2, 9, 4, generator=random, dtype=torch.float64).mul(2).sub(0.7).clamp(0, 1)
    weight = (torch.rand(2, 9, generator=random) > 0.2).double()
    q = x.sigmoid() * (1 - belonging) * (1 if y is None else y.sigmoid()[..., None])
    expected = (q**gamma * -torch.log1p(-q) * weight[..., None]).sum()
    leaves = [x] if y is None else [x, y]
    value = negative_sum(x, y, belonging, weight, gamma)
    assert_close(value, expected)
    wanted = torch.autograd.grad(expected, leaves)
    for found, right in zip(torch.autograd.grad(value * 0.5, leaves), wanted, strict=True):
        assert_close(found, right * 0.5)


@pytest.mark.parametrize("quality", [False, True])
def test_negative_sum_of_certain_logits_is_finite(quality: bool) -> None:
    x = torch.tensor([-1e4, -100, -30, 0, 30, 100, 1e4]).view(1, 7, 1).requires_grad_()
    y = torch.tensor([[100.0, 1e4, 0, 30, 1e4, 100, 1e4]]).requires_grad_() if quality else None
    for belonging in (torch.zeros(1, 7, 1), torch.full((1, 7, 1), 1e-6), torch.ones(1, 7, 1)):
        value = negative_sum(x, y, belonging, torch.ones(1, 7), 2.0)
        assert value.isfinite()
        for found in torch.autograd.grad(value, [x] if y is None else [x, y]):
            assert found.isfinite().all()
    right = negative_sum(torch.full((1, 1, 1), 30.0), None, torch.zeros(1, 1, 1), torch.ones(1, 1), 2.0)
    assert_close(right, torch.tensor(30.0))  # 1 - sigmoid(30) is 0 in float32


def test_free_anchor_golden(golden) -> None:  # type: ignore[no-untyped-def]
    data = golden("head_freeanchor")
    setup = data.scenario("setup")
    strides, maps = setup["strides"].tolist(), setup["featmaps"].tolist()
    sizes = tuple(9 * h * w for h, w in maps)
    stride = torch.cat([torch.full((n,), float(s)) for n, s in zip(sizes, strides, strict=True)])
    priors = Priors(setup["anchors"], stride, sizes)
    for s in scenarios(data):
        classes, boxes = s["in_cls"].requires_grad_(), s["in_box"].requires_grad_()
        outputs = Outputs(priors, classes, boxes, None, Deltas(std=(0.1, 0.1, 0.2, 0.2)))
        losses = FreeAnchorConfig().build(None, 5)(outputs, golden_objects(s))
        parts = {"positive_bag_loss": losses.parts["positive"], "negative_bag_loss": losses.parts["negative"]}
        check(parts, s, {"cls": classes, "box": boxes})


def plain_belongs(outputs: Outputs, objects: Objects, candidates: Any, last_wins: bool) -> Tensor:
    """AutoAssign's weights of the background, one object after the other."""
    out = torch.zeros_like(outputs.class_logits).detach()
    inside = candidates(slice(0, len(objects)))
    for i, boxes in enumerate(outputs.boxes.detach()):
        mine = (objects.image == i).nonzero().squeeze(1)
        if not len(mine):
            continue
        fit = 1 / (1 - box_iou(boxes, objects.boxes[mine]).amax(1)).clamp(min=1e-12)
        for j in mine[inside[mine].any(1)]:
            values, k = fit[inside[j]], objects.labels[j]
            share = (values - values.min() + 1e-12) / (values.max() - values.min() + 1e-12)
            before = torch.zeros(()) if last_wins else out[i, inside[j], k]
            out[i, inside[j], k] = torch.maximum(share, before)
    return out


@pytest.mark.parametrize("peer", [True, False], ids=["as the peer", "as ours"])
@pytest.mark.parametrize("name", ["head_autoassign", "head_autoassign_forced"])
def test_auto_assign_golden(golden, name: str, peer: bool, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    """Two differences, both ours on purpose.

    An object without any prior inside costs the peer a constant 100 (the floor of its log); here it costs nothing.  Of
    overlapping objects of one class the peer's last one says how much a prior is background, here the one that it fits
    best: in the scenarios that have them (four of six) only the peer's choice, put in place of ours, agrees.
    """
    if peer:
        monkeypatch.setattr(auto_assign, "belongs", lambda *given: plain_belongs(*given, last_wins=True))
    differing = [] if peer else ["many_ignore", "tiny_nested", "tiny_elongated", "zero_typical"]
    data = golden(name)
    setup = data.scenario("setup")
    priors = golden_priors(setup, 8, offset=0)
    config = AutoAssignConfig(nearest=9 if name.endswith("forced") else 0)
    for scenario in sorted(set(data.scenarios()) - {"setup", *differing}):
        s = data.scenario(scenario)
        criterion = config.build(None, 5)
        with torch.no_grad():
            criterion.center_prior.mean.copy_(setup["center_prior_mean"].flatten())
            criterion.center_prior.sigma.copy_(setup["center_prior_sigma"].flatten())
        classes, boxes = s["in_cls"].requires_grad_(), s["in_box"].requires_grad_()
        objectness = s["in_objectness"].requires_grad_()
        objects = golden_objects(s)
        strides = boxes / priors.stride[:, None]  # the fixture's are pixels
        losses = criterion(Outputs(priors, classes, strides, objectness[..., 0], Distances(activation="relu")), objects)
        inside = torch.cat([s["t_inside0"].T, s["t_inside1"].T])
        without = (inside.sum(1) == 0).sum()
        parts = {
            "pos": losses.parts["positive"] + 100 * config.positive_weight * without / max(1, len(objects)),
            "neg": losses.parts["negative"],
            "center": losses.parts["center"],
        }
        check(parts, s, {"cls": classes, "box": boxes, "objectness": objectness})
        total = torch.stack(list(parts.values())).sum()
        for which in ("mean", "sigma"):
            (gradient,) = torch.autograd.grad(total, getattr(criterion.center_prior, which), retain_graph=True)
            assert_close(gradient.view(5, 2), s[f"grad_param_center_prior_{which}"], rtol=1e-4, atol=1e-6)


def in_parts(config: Any, outputs: Outputs, objects: Objects) -> tuple[Losses, list[Tensor]]:
    criterion = config.build(None, 3)
    losses = criterion(outputs, objects)
    leaves = [outputs.class_logits, outputs.box_raw, *criterion.parameters()]
    if outputs.quality_logits is not None:
        leaves.append(outputs.quality_logits)
    return losses, list(torch.autograd.grad(losses.total, leaves, retain_graph=True))


@pytest.mark.parametrize("config", BOTH, ids=lambda c: c.type)
def test_parts_of_the_objects_do_not_show(config: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """One object at a time, computed again for the gradient: the same losses, gradients and report."""
    outputs, objects = outputs_for(config, cells=8), some_objects()
    whole, gradients = in_parts(config, outputs, objects)
    monkeypatch.setattr("detector.assign.base.PAIRS_AT_ONCE", 1)
    parts, others = in_parts(config, outputs, objects)
    assert_close(parts.sums, whole.sums)
    assert_close(others, gradients)
    assert torch.equal(parts.assignments["dense"].per_prior(), whole.assignments["dense"].per_prior())


@pytest.mark.parametrize("config", BOTH, ids=lambda c: c.type)
def test_the_order_of_objects_and_images_does_not_matter(config: Any) -> None:
    outputs, objects = outputs_for(config, cells=8), some_objects()
    losses, gradients = in_parts(config, outputs, objects)
    again, others = in_parts(config, outputs, objects)
    assert_close(again.sums, losses.sums, rtol=0, atol=0)
    assert_close(others, gradients, rtol=0, atol=0)
    order = torch.tensor([2, 1, 0])
    mixed = replace(objects, boxes=objects.boxes[order], labels=objects.labels[order], image=objects.image[order])
    other, moved = in_parts(config, outputs, mixed)
    assert_close(other.sums, losses.sums)
    assert_close(moved, gradients)
    mine, theirs = losses.assignments["dense"], other.assignments["dense"]
    (at, values), (other_at, other_values) = (
        pairs_in_order(replace(found, object=names[found.object]))
        for found, names in ((mine, torch.arange(3)), (theirs, order))
    )
    assert torch.equal(other_at, at)
    assert_close(other_values, values)


def test_free_anchor_bags_are_the_best_overlaps_then_the_nearest() -> None:
    outputs = some_outputs(cells=8)
    objects = Objects.collate([torch.tensor([[1.0, 2, 9, 11]])], [torch.tensor([0])])
    iou = box_iou(objects.boxes, outputs.priors.boxes)[0]
    overlapping = int((iou > 0).sum())
    bag = free_anchor.bags(outputs.priors, objects, overlapping + 1)[0]
    assert (iou[bag[:-1]] > 0).all()
    assert (iou[bag].diff() <= 0).all()
    away = (outputs.priors.centers - objects.centers).norm(dim=1)
    assert away[bag[-1]] == away[iou == 0].min()
    assert free_anchor.bags(outputs.priors, objects, 10_000).shape == (1, len(outputs.priors))


def test_free_anchor_by_hand() -> None:
    """One object, its bag of three: mean-max and the background, written out."""
    outputs, objects = some_outputs(batch=1, quality=False), some_objects(1).select_image(0)
    objects = replace(objects, boxes=objects.boxes[:1], labels=objects.labels[:1], image=objects.image[:1])
    config = FreeAnchorConfig(bag=3, box=Giou(weight=1.5), box_iou=0.1)
    losses = config.build(None, 3)(outputs, objects)
    iou = box_iou(objects.boxes, outputs.priors.boxes)[0]
    bag = iou.argsort(descending=True)[:3]
    score, boxes = outputs.class_logits.sigmoid()[0], outputs.boxes[0]
    joint = score[bag, 0] * (-1.5 * Giou()(boxes[bag], objects.boxes.expand(3, 4))).exp()
    weight = 1 / (1 - joint)
    assert_close(losses.sums["positive"], -0.5 * ((weight * joint).sum() / weight.sum()).log())
    now = box_iou(objects.boxes, boxes)[0]
    belonging = torch.zeros_like(score)
    belonging[:, 0] = ((now - 0.1) / (now.max() - 0.1)).clamp(0, 1)
    q = score * (1 - belonging.detach())
    assert_close(losses.sums["negative"], 0.5 / 3 * (q**2 * -torch.log1p(-q)).sum())
    reported = losses.assignments["dense"]
    assert set(reported.prior[reported.weight > 0].tolist()) == set(bag[weight >= weight.max() / 2].tolist())
    assert_close(reported.quality.max(), torch.ones(()))


def test_auto_assign_belonging_is_the_plain_loop() -> None:
    outputs, objects = some_outputs(cells=8), some_objects()
    crossing = replace(objects, labels=torch.zeros_like(objects.labels))  # two objects of one class overlap

    def inside(part: slice) -> Tensor:
        return auto_assign.in_boxes(outputs.priors, objects.boxes[part])

    for given in (objects, crossing):
        expected = plain_belongs(outputs, given, inside, last_wins=False)
        assert_close(auto_assign.belongs(outputs, given, inside).detach(), expected)
    assert (expected > 0).any()


def test_auto_assign_moves_its_centre_prior_to_where_the_confident_priors_are() -> None:
    """Only the priors left of the centre find the object: the mean goes left."""
    outputs = some_outputs(batch=1, cells=8, coder=Distances(activation="none"))
    objects = Objects.collate([torch.tensor([[4.0, 4, 28, 28]])], [torch.tensor([1])])
    right_box = outputs.coder.encode(outputs.priors.boxes, outputs.priors.stride, objects.boxes.expand(80, 4))
    left = outputs.priors.centers[:, 0] < 16
    outputs = replace(
        outputs,
        box_raw=right_box[None],
        class_logits=torch.where(left, 3.0, -6.0)[None, :, None].expand(1, 80, 3).clone().requires_grad_(),
        quality_logits=torch.full((1, 80), 3.0),
    )
    criterion = AutoAssignConfig(center_weight=0).build(None, 3)
    criterion(outputs, objects).total.backward()
    mean = criterion.center_prior.mean.grad.view(3, 2)
    assert mean[1, 0] > 0.01  # downhill is to the left
    assert mean[1, 1].abs() < 1e-4
    assert not mean[[0, 2]].any()


@pytest.mark.parametrize("config", BOTH, ids=lambda c: c.type)
@pytest.mark.parametrize("coder", [Deltas(), Distances(), Bins(reg_max=4)], ids=lambda c: c.type)
def test_every_coder(config: Any, coder: Any) -> None:
    config = config.model_copy(update={"box": Giou() if coder.type == "bins" else L1(weight=0.2)})
    outputs = outputs_for(config, coder=coder)
    losses, gradients = in_parts(config, outputs, some_objects())
    assert losses.total.isfinite()
    assert losses.total > 0
    for gradient in gradients:
        assert gradient.isfinite().all()
        assert gradient.any()


@pytest.mark.parametrize("config", BOTH, ids=lambda c: c.type)
def test_a_batch_without_objects(config: Any) -> None:
    """Only the background is learnt, and yet every output and parameter has a gradient, for DDP's sake."""
    outputs = outputs_for(config)
    losses, gradients = in_parts(config, outputs, some_objects(empty=True))
    assert losses.sums["positive"] == 0
    assert losses.sums["negative"] > 0
    assert losses.normalizer == 0
    assert losses.sums.get("center", 0) == 0
    assert gradients[0].any()
    assert not any(gradient.any() for gradient in gradients[1 : len(gradients) - (config.type == "auto_assign")])
    assert not (losses.assignments["dense"].per_prior() >= 0).any()


@pytest.mark.parametrize("config", BOTH, ids=lambda c: c.type)
def test_crowds_and_what_lies_outside_are_no_mistakes(config: Any) -> None:
    outputs = outputs_for(config, cells=8)
    boxes, labels = [torch.tensor([[2.0, 2, 12, 12]])], [torch.tensor([0])]
    crowd, sizes = [torch.tensor([[16.0, 0, 32, 16]])], torch.tensor([[20.0, 32]])
    outputs = replace(
        outputs,
        class_logits=outputs.class_logits[:1],
        box_raw=outputs.box_raw[:1],
        quality_logits=None if outputs.quality_logits is None else outputs.quality_logits[:1],
    )
    plain = config.build(None, 3)(outputs, Objects.collate(boxes, labels))
    losses = config.build(None, 3)(outputs, Objects.collate(boxes, labels, crowd, sizes))
    assert losses.sums["negative"] < plain.sums["negative"]
    assert_close(losses.sums["positive"], plain.sums["positive"])
    expected = Atss()(outputs.priors, Objects.collate(boxes, labels, crowd, sizes))
    ignored = losses.assignments["dense"].ignored
    inside = auto_assign.in_boxes(outputs.priors, boxes[0])
    assert torch.equal(ignored | inside, expected.ignored | inside)
    assert (losses.assignments["dense"].per_prior() == IGNORED).any()
    (slope,) = torch.autograd.grad(losses.sums["negative"], outputs.class_logits)
    assert not slope[ignored].any()


@pytest.mark.parametrize("config", BOTH, ids=lambda c: c.type)
@pytest.mark.parametrize("count", [1, 2000])
def test_any_number_of_objects_and_half_precision(config: Any, count: int) -> None:
    outputs = outputs_for(config, cells=8)
    random = torch.Generator().manual_seed(0)
    corner = torch.rand(count, 2, generator=random) * 28
    boxes = torch.cat([corner, corner + 1 + torch.rand(count, 2, generator=random) * 20], 1)
    objects = Objects.collate([boxes, boxes[:0]], [torch.zeros(count).long(), torch.zeros(0).long()])
    exact, gradients = in_parts(config, outputs, objects)
    assert exact.total.isfinite()
    assert all(gradient.isfinite().all() for gradient in gradients)
    half = replace(
        outputs,
        class_logits=outputs.class_logits.bfloat16(),
        box_raw=outputs.box_raw.bfloat16(),
        quality_logits=None if outputs.quality_logits is None else outputs.quality_logits.bfloat16(),
    )
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses = config.build(None, 3)(half, objects)
    assert all(value.dtype == torch.float32 for value in losses.sums.values())
    assert_close(losses.total, exact.total, rtol=2e-2, atol=0)


@pytest.mark.parametrize("config", BOTH, ids=lambda c: c.type)
@pytest.mark.parametrize("at_once", [1, 1 << 18], ids=["an object at a time", "all at once"])
def test_never_waits_for_the_device(config: Any, at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither forwards nor backwards, where objects are handled in parts that are computed again."""
    monkeypatch.setattr("detector.assign.base.PAIRS_AT_ONCE", at_once)
    outputs, given = outputs_for(config, cells=8), some_objects()
    crowd = [torch.tensor([[16.0, 0, 32, 16]]), torch.zeros(0, 4)]
    objects = replace(
        given,
        ignore=torch.cat(crowd),
        ignore_image=torch.zeros(1).long(),
        sizes=torch.tensor([[20.0, 32], [32, 32]]),
    )
    criterion = config.build(None, 3)
    criterion(outputs, objects).total.backward()  # tables are made once
    with NeverWaits():
        criterion(outputs, objects).total.backward()


def test_what_the_terms_are_divided_by_adds_up_over_micro_batches() -> None:
    """FreeAnchor's all; AutoAssign's negatives, whose normaliser is the sum of the centre priors."""
    objects = some_objects()
    for config, terms in ((FreeAnchorConfig(), ("positive", "negative")), (AutoAssignConfig(), ("negative",))):
        outputs = outputs_for(config)
        criterion = config.build(None, 3)
        whole = criterion(outputs, objects)
        parts = []
        for i in range(2):
            quality = None if outputs.quality_logits is None else outputs.quality_logits[i : i + 1]
            one = replace(
                outputs,
                class_logits=outputs.class_logits[i : i + 1],
                box_raw=outputs.box_raw[i : i + 1],
                quality_logits=quality,
            )
            parts.append(criterion(one, objects.select_image(i)))
        assert_close(parts[0].normalizer + parts[1].normalizer, whole.normalizer)
        for term in terms:
            assert_close(parts[0].sums[term] + parts[1].sums[term], whole.sums[term])


def test_what_does_not_fit_is_said() -> None:
    for config in BOTH:
        with pytest.raises(ConfigError, match="set assigner=null"):
            config.build(Atss(), 3)
        with pytest.raises(ConfigError, match="3 class logits"):
            config.build(None, 4)(outputs_for(config), some_objects())
    with pytest.raises(ConfigError, match=r"model\.head\.quality=true"):
        AutoAssignConfig().build(None, 3)(some_outputs(quality=False), some_objects())
    assert "criterion.box.type=giou" in str(FreeAnchorConfig().objection(Bins()))
    assert FreeAnchorConfig(box=Giou()).objection(Bins()) is None
    assert AutoAssignConfig().objection(Bins()) is None


def test_the_centre_prior_is_not_decayed() -> None:
    names = dict(AutoAssign(config=AutoAssignConfig(), num_classes=3).named_parameters())
    assert set(names) == {"center_prior.mean", "center_prior.sigma"}
    assert not any(decays(name, parameter) for name, parameter in names.items())
