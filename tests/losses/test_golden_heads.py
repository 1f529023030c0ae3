"""Whole heads of mmdetection whose class score says how good the box is: losses and gradients.

Where the peer divides a term by a number of its own, the test divides our sum by that number; where it sums differently
the test says so.  Positives are ours where the rule is ours, and the peer's where only the losses are at stake.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from detector.assign import Atss
from detector.coders import Bins, Deltas, Distances
from detector.losses.classification import Bce, Focal
from detector.losses.dense import DenseCriterionConfig
from detector.losses.distribution import DistributionFocal
from detector.losses.objectness import Objectness
from detector.losses.quality import centerness
from detector.losses.regression import L1, Giou, Iou
from detector.losses.soft import QualityFocal, Varifocal
from detector.structures import Outputs, Priors

from .heads import given, golden_objects, golden_priors, own_objects


def check(parts: dict[str, Tensor], s: dict[str, Tensor], leaves: dict[str, Tensor], more: Tensor | float = 0) -> None:
    """`parts`: losses by the fixture's names; `leaves`: inputs by the fixture's names of their gradients."""
    for name, value in parts.items():
        assert_close(
            value.detach(), s[f"loss_{name}"].squeeze(), rtol=2e-5, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}"
        )
    total = torch.stack(list(parts.values())).sum() + more
    for name, leaf in leaves.items():
        (gradient,) = torch.autograd.grad(total, leaf, retain_graph=True)
        assert_close(gradient, s[f"grad_{name}"], rtol=1e-4, atol=2e-6, msg=lambda m, n=name: f"gradient of {n}: {m}")


def scenarios(data) -> list[dict[str, Tensor]]:  # type: ignore[no-untyped-def]
    return [data.scenario(name) for name in sorted(set(data.scenarios()) - {"setup"})]


def test_gfl(golden) -> None:  # type: ignore[no-untyped-def]
    """Boxes and distributions are divided by the sum of their weights, at least 1, which is `normalize_box_weights`."""
    data = golden("head_gfl")
    priors = golden_priors(data.scenario("setup"), 8, offset=0)
    config = DenseCriterionConfig(
        classification=QualityFocal(),
        class_target="iou",
        box=Giou(weight=2),
        box_weighting="score",
        distribution=DistributionFocal(),
        normalize_box_weights=True,
    )
    for s in scenarios(data):
        classes, boxes = s["in_cls"].requires_grad_(), s["in_box"].requires_grad_()
        outputs = Outputs(priors, classes, boxes, None, Bins())
        losses = config.build(Atss(), 5)(outputs, golden_objects(s))
        assert losses.normalizer == (s["t_labels"] < 5).sum()
        parts = {
            "cls": losses.sums["class"] / s["t_avg_factor"].item(),  # at least 1 an image there
            "bbox": losses.parts["box"],
            "dfl": losses.parts["distribution"],
        }
        check(parts, s, {"cls": classes, "box": boxes})


def test_vfnet(golden) -> None:  # type: ignore[no-untyped-def]
    """Class target and box loss come from the refined boxes, another loss from those before.

    Both are divided by the sum of their own IoUs, at least 1, which is `normalize_box_weights`; the peer's IoUs are at
    least 1e-6, ours can be 0.
    """
    data = golden("head_vfnet")
    setup = data.scenario("setup")
    priors = golden_priors({k: v for k, v in setup.items() if k != "points"}, 8, offset=0)
    pixels = replace(priors, stride=torch.ones_like(priors.stride))
    config = DenseCriterionConfig(
        classification=Varifocal(),
        class_target="iou",
        box=Giou(weight=2),
        initial_box=Giou(weight=1.5),
        box_weighting="iou",
        normalize_box_weights=True,
    )
    for s in scenarios(data):
        classes = s["in_cls"].requires_grad_()
        first, refined = s["in_box"].requires_grad_(), s["in_box_refined"].requires_grad_()
        objects = golden_objects(s)
        assignment = Atss()(priors, objects)
        assert (assignment.weight > 0).sum() == (s["t_labels"] < 5).sum()
        coder = Distances(activation="none")
        initial = Outputs(pixels, classes, first, None, coder)
        outputs = Outputs(pixels, classes, refined, None, coder, initial)
        found = config.build(given(assignment), 5)(outputs, objects).parts
        parts = {"cls": found["class"], "bbox": found["initial_box"], "bbox_rf": found["box"]}
        check(parts, s, {"cls": classes, "box": first, "box_refined": refined})


@pytest.mark.parametrize("name", ["head_tood", "head_tood_initial"])
def test_tood(golden, name: str) -> None:  # type: ignore[no-untyped-def]
    """The peer's head gives probabilities, ours logits; its boxes are corners in strides.

    Before it switches to its own rule, ATSS's pairs have hard class targets and boxes weighted by centerness, which is
    what a rule says here whose quality is centerness, with `class_target=one`.
    """
    data = golden(name)
    priors = golden_priors(data.scenario("setup"), 8, offset=0)
    initial = name.endswith("initial")
    config = DenseCriterionConfig(
        classification=Focal() if initial else QualityFocal(),
        class_target="one" if initial else "assignment",
        box=Giou(weight=2),
        box_weighting="assignment",
        normalizer="quality",
    )
    for s in scenarios(data):
        probabilities, corners = s["in_cls"].requires_grad_(), s["in_box"].requires_grad_()
        positive = s["t_labels"] < 5
        index = positive.view(-1).nonzero().squeeze(1)
        prior = index % len(priors)
        boxes = s["t_boxes"].view(-1, 4)[index]
        quality = centerness(priors.centers[prior], boxes) if initial else s["t_alignment"].view(-1)[index]
        objects, assignment = own_objects(positive, boxes, s["t_labels"].view(-1)[index], quality)
        center = priors.centers / priors.stride[:, None]
        raw = torch.cat([center - corners[..., :2], corners[..., 2:] - center], -1)
        outputs = Outputs(priors, torch.logit(probabilities), raw, None, Distances(activation="none"))
        losses = config.build(given(assignment), 5)(outputs, objects)
        alignment = s["t_alignment"].sum().clamp(min=1)
        parts = {
            "cls": losses.sums["class"] / alignment,
            "bbox": losses.sums["box"] / (quality.sum().clamp(min=1) if initial else alignment),
        }
        if not initial:
            assert_close(losses.normalizer, s["t_alignment"].sum())
        check(parts, s, {"cls": probabilities, "box": corners})


def points_as_priors(setup: dict[str, Tensor]) -> Priors:
    """Squares of one stride around the points."""
    centers, stride = setup["points_strides"][:, :2], setup["points_strides"][:, 2]
    half = stride[:, None] / 2
    sizes = tuple(int(h * w) for h, w in setup["featmaps"].tolist())
    return Priors(torch.cat([centers - half, centers + half], 1).contiguous(), stride.contiguous(), sizes)


def test_rtmdet(golden) -> None:  # type: ignore[no-untyped-def]
    data = golden("head_rtmdet")
    priors = points_as_priors(data.scenario("setup"))
    pixels = replace(priors, stride=torch.ones_like(priors.stride))
    config = DenseCriterionConfig(
        classification=QualityFocal(), box=Giou(weight=2), box_weighting="assignment", normalizer="quality"
    )
    for s in scenarios(data):
        classes, boxes = s["in_cls"].requires_grad_(), s["in_box"].requires_grad_()
        positive = s["t_labels"] < 5
        objects, assignment = own_objects(
            positive, s["t_boxes"][positive], s["t_labels"][positive], s["t_quality"][positive]
        )
        outputs = Outputs(pixels, classes, boxes, None, Distances(activation="none"))
        losses = config.build(given(assignment), 5)(outputs, objects)
        assert_close(losses.normalizer, s["t_quality"][positive].sum())
        check({"cls": losses.parts["class"], "bbox": losses.parts["box"]}, s, {"cls": classes, "box": boxes})


def test_yolox(golden) -> None:  # type: ignore[no-untyped-def]
    """All but the L1 term of its last epochs, which is added here by hand: we have one box loss."""
    data = golden("head_yolox")
    priors = points_as_priors(data.scenario("setup"))
    config = DenseCriterionConfig(
        classification=Bce(),
        class_target="iou",
        class_on="positives",
        box=Iou(mode="square", weight=5),
        quality=Objectness(),
    )
    for s in scenarios(data):
        classes, boxes = s["in_cls"].requires_grad_(), s["in_box"].requires_grad_()
        objectness = s["in_objectness"].requires_grad_()
        positive = torch.stack([s["t_foreground0"], s["t_foreground1"]]) > 0
        one_hot = torch.cat([s["t_class0"], s["t_class1"]])
        quality, label = one_hot.max(1)
        objects, assignment = own_objects(positive, torch.cat([s["t_boxes0"], s["t_boxes1"]]), label, quality)
        outputs = Outputs(priors, classes, boxes, objectness[..., 0], Deltas())
        losses = config.build(given(assignment), 5)(outputs, objects)
        assert losses.normalizer == positive.sum()
        parts = {"cls": losses.parts["class"], "bbox": losses.parts["box"], "obj": losses.parts["quality"]}
        l1 = L1()(boxes[positive], torch.cat([s["t_l10"], s["t_l11"]])).sum() / losses.normalizer.clamp(min=1)
        assert_close(l1.detach(), s["loss_l1"].squeeze(), rtol=2e-5, atol=1e-6)
        check(parts, s, {"cls": classes, "box": boxes, "objectness": objectness}, l1)
