"""Box losses: golden values and gradients of mmdetection and torchvision."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

from detector.losses.quality import QualityBce, centerness
from detector.losses.regression import L1, BoxLoss, Ciou, Diou, Giou, Iou, SmoothL1

BY_NAME: dict[str, BoxLoss] = {
    "giou": Giou(),
    "diou": Diou(),
    "ciou": Ciou(),
    "iou_linear": Iou(mode="linear"),
    "iou_log": Iou(),
    "iou_square": Iou(mode="square"),
    "smooth_l1_b1": SmoothL1(beta=1),
    "smooth_l1_b1_9": SmoothL1(),
    "l1": L1(),
}


@pytest.mark.parametrize("name", BY_NAME)
@pytest.mark.parametrize("scenario", ["typical", "one", "zero"])
def test_golden_with_gradients(golden, name: str, scenario: str) -> None:  # type: ignore[no-untyped-def]
    s, loss = golden("box_losses").scenario(scenario), BY_NAME[name]
    start = "delta_" if loss.on == "raw" else ""
    predicted, target = s[f"{start}pred"].requires_grad_(), s[f"{start}target"]
    each = loss(predicted, target)
    expected = s[f"{name}/each"].view(len(predicted), -1).sum(-1) if len(predicted) else torch.zeros(0)
    assert_close(each.detach(), expected, rtol=1e-5, atol=2e-6)
    (gradient,) = torch.autograd.grad(each.sum(), predicted, retain_graph=True)
    assert_close(gradient, s[f"{name}/grad"], rtol=1e-4, atol=1e-6)

    weighted = (each * s["weight"]).sum() / (s["avg_factor"].item() + torch.finfo(torch.float32).eps)
    (gradient,) = torch.autograd.grad(weighted, predicted)
    assert_close(weighted.detach(), s[f"{name}/weighted"].squeeze(), rtol=1e-5, atol=1e-6)
    assert_close(gradient, s[f"{name}/weighted_grad"], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", BY_NAME)
def test_golden_identical_disjoint_and_touching(golden, name: str) -> None:  # type: ignore[no-untyped-def]
    s, loss = golden("box_losses").scenario("edge"), BY_NAME[name]
    expected, peer_nan = s[f"{name}/each"], s[f"{name}/peer_nan"] > 0
    each = loss(s["pred"], s["target"])
    # mmdetection's CIoU of identical boxes is 0 / 0, and the fixture holds 0 there, which is what it should be.
    assert_close(each, (expected * ~peer_nan).sum(-1) if loss.on == "raw" else expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["giou", "diou", "ciou"])
def test_golden_torchvision(golden, name: str) -> None:  # type: ignore[no-untyped-def]
    s = golden("box_losses").scenario("tv")
    loss = Ciou(aspect_from_iou=0) if name == "ciou" else BY_NAME[name]
    predicted = s["pred"].requires_grad_()
    each = loss(predicted, s["target"])
    each.sum().backward()
    assert_close(each.detach(), s[f"{name}/each"], rtol=1e-5, atol=2e-6)
    assert_close(predicted.grad, s[f"{name}/grad"], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", BY_NAME)
def test_perfect_boxes_cost_nothing(name: str) -> None:
    boxes = torch.tensor([[0.0, 0, 10, 10], [3, 4, 50, 600]], requires_grad=True)
    each = BY_NAME[name](boxes, boxes.detach())
    assert_close(each.detach(), torch.zeros(2), rtol=0, atol=1e-6)
    each.sum().backward()
    assert boxes.grad is not None
    assert boxes.grad.isfinite().all()


def test_boxes_apart_are_pulled_by_giou_and_not_by_iou() -> None:
    apart, target = torch.tensor([[100.0, 0, 110, 10]], requires_grad=True), torch.tensor([[0.0, 0, 10, 10]])
    (gradient,) = torch.autograd.grad(Giou()(apart, target).sum(), apart)
    assert gradient[0, 0] > 0
    (gradient,) = torch.autograd.grad(Iou()(apart, target).sum(), apart)
    assert not gradient.any()


def test_centerness_by_hand() -> None:
    boxes = torch.tensor([[0.0, 0, 10, 20]]).expand(5, 4)
    points = torch.tensor([[5.0, 10], [2, 10], [2, 5], [0, 10], [11, 10]])
    expected = torch.tensor([1, 0.25**0.5, (0.25 / 3) ** 0.5, 0, 0])
    assert_close(centerness(points, boxes), expected)
    assert centerness(torch.zeros(1, 2), torch.zeros(1, 4)) == 0  # a box without area


def test_quality_target_of_the_box_now() -> None:
    decoded = torch.tensor([[0.0, 0, 10, 10]], requires_grad=True)
    target = QualityBce(target="iou").targets(torch.zeros(1, 2), decoded, torch.tensor([[5.0, 0, 15, 10]]))
    assert not target.requires_grad
    assert_close(target, torch.tensor([1 / 3]))
