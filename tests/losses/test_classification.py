"""Class losses: golden values of mmdetection and torchvision, the plain definition, and what sparsity leaves."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.testing import assert_close
from torchvision.ops import sigmoid_focal_loss

from detector.losses.classification import Bce, ClassLoss, Focal
from detector.losses.initial import expected_initial_loss
from detector.losses.soft import QualityFocal, Varifocal
from detector.losses.targets import ClassTargets, class_targets
from detector.structures import Assignment

LOSSES: list[ClassLoss] = [
    Focal(),
    Focal(label_smoothing=0.1),
    Focal(alpha=None, gamma=1.5),
    Focal(gamma=0.5, label_smoothing=0.02),
    Bce(),
    Bce(label_smoothing=0.2),
    QualityFocal(),
    QualityFocal(beta=1),
    Varifocal(),
    Varifocal(alpha=0.5, gamma=1.5),
]


def one_hot(labels: Tensor, classes: int, quality: Tensor | None = None, weight: Tensor | None = None) -> ClassTargets:
    """Targets of n priors from labels (n,) with `classes` as background."""
    n = len(labels)
    positive = labels < classes
    cell = torch.where(positive, torch.arange(n) * classes + labels, n * classes)
    ones = torch.ones(n)
    every = ones if weight is None else weight
    return ClassTargets((1, n, classes), cell, ones if quality is None else quality, every, every[None])


def value_and_gradient(loss: ClassLoss, logits: Tensor, targets: ClassTargets) -> tuple[Tensor, Tensor]:
    logits = logits.detach().clone().requires_grad_()
    value = loss(logits.view(targets.shape), targets)
    value.backward()
    assert logits.grad is not None
    return value.detach(), logits.grad


def random_targets(shape: tuple[int, int, int], pairs: int, dense_background: bool = False) -> ClassTargets:
    generator = torch.Generator().manual_seed(1)
    batch, priors, classes = shape
    prior = torch.randint(0, batch * priors, (pairs,), generator=generator)
    assignment = Assignment(
        num_priors=priors,
        prior=prior,
        object=torch.randint(0, 4, (pairs,), generator=generator),
        quality=torch.rand(pairs, generator=generator),
        weight=torch.rand(pairs, generator=generator) * (torch.rand(pairs, generator=generator) > 0.3),
        ignored=torch.rand(batch, priors, generator=generator) < 0.2,
        background_weight=torch.rand(shape, generator=generator) if dense_background else None,
    )
    return class_targets(assignment, torch.randint(0, classes, (4,), generator=generator), classes)


@pytest.mark.parametrize("scenario", ["typical", "extreme", "all_background", "one", "zero"])
def test_golden(golden, scenario: str) -> None:  # type: ignore[no-untyped-def]
    s = golden("cls_losses").scenario(scenario)
    logits, labels, weight = s["logits"], s["labels"].long(), s["weight"]
    classes, factor = logits.shape[-1], s["avg_factor"].item()

    unreduced = Focal().each(logits, F.one_hot(labels, classes + 1)[:, :classes].float())
    assert_close(unreduced, s["focal_none/loss"].view_as(unreduced), rtol=1e-5, atol=1e-6)
    if not len(logits):
        return
    for loss, name, targets in [
        (Focal(), "focal_none", one_hot(labels, classes)),
        (Focal(), "focal_weighted", one_hot(labels, classes, weight=weight)),
        (QualityFocal(), "qfl_none", one_hot(labels, classes, s["quality"])),
        (QualityFocal(), "qfl_weighted", one_hot(labels, classes, s["quality"], weight)),
    ]:
        divisor = factor if name.endswith("weighted") else 1
        value, gradient = value_and_gradient(loss, logits, targets)
        assert_close(value / divisor, s[f"{name}/loss"].sum(), rtol=1e-5, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")
        assert_close(gradient / divisor, s[f"{name}/grad"], rtol=1e-4, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("scenario", ["typical", "extreme", "one", "zero"])
def test_golden_varifocal(golden, scenario: str) -> None:  # type: ignore[no-untyped-def]
    """Soft targets in every cell: all of them are listed, those of 0 too."""
    s = golden("cls_losses").scenario(scenario)
    logits, target = s["logits"].requires_grad_(), s["dense_target"]
    each = Varifocal().each(logits, target)
    assert_close(each.detach(), s["varifocal_none/loss"].view_as(each), rtol=1e-5, atol=1e-6)
    n, classes = logits.shape
    if not n:
        return
    (gradient,) = torch.autograd.grad(each.sum(), logits)
    assert_close(gradient, s["varifocal_none/grad"], rtol=1e-4, atol=1e-6)
    weight = s["weight"][:, None].expand(n, classes).reshape(-1)
    targets = ClassTargets((1, n, classes), torch.arange(n * classes), target.reshape(-1), weight, torch.ones(1, n))
    value, gradient = value_and_gradient(Varifocal(), logits, targets)
    factor = s["avg_factor"].item()
    assert_close(value / factor, s["varifocal_weighted/loss"].squeeze(), rtol=1e-5, atol=1e-6)
    assert_close(gradient / factor, s["varifocal_weighted/grad"], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("loss", LOSSES, ids=repr)
def test_without_modulation_all_are_binary_cross_entropy(loss: ClassLoss) -> None:
    """DW's weights hold the squared score already: no focal factor, no balance; smoothing stays."""
    targets = random_targets((2, 40, 3), 60, dense_background=True)
    target, weight = targets.dense()
    logits = torch.randn(targets.shape, generator=torch.Generator().manual_seed(7)).requires_grad_()
    smoothing = loss.curve.smoothing
    soft = target * (1 - smoothing) + smoothing / 2
    expected = (F.binary_cross_entropy_with_logits(logits, soft, reduction="none") * weight).sum()
    expected.backward()
    other = logits.detach().clone().requires_grad_()
    value = loss(other, targets, modulation=False)
    value.backward()
    assert_close(value, expected, rtol=1e-5, atol=1e-5)
    assert_close(other.grad, logits.grad, rtol=1e-5, atol=1e-6)


def test_positives_alone() -> None:
    """YOLOX: priors without an object weigh nothing, those with one teach all their classes."""
    assignment = Assignment(
        num_priors=4,
        prior=torch.tensor([2, 0, 3]),
        object=torch.tensor([0, 0, 0]),
        quality=torch.tensor([0.7, 1, 1]),
        weight=torch.tensor([1.0, 0.0, 1.0]),
        ignored=torch.tensor([[False, False, False, True]]),
    )
    target, weight = class_targets(assignment, torch.tensor([1]), 2, positives_alone=True).dense()
    assert weight.tolist() == [[[0, 0], [0, 0], [1, 1], [0, 0]]]
    assert_close(target[0, 2], torch.tensor([0.0, 0.7]))


@pytest.mark.parametrize("scenario", ["typical", "extreme", "one"])
def test_golden_binary_cross_entropy_of_dense_targets(golden, scenario: str) -> None:  # type: ignore[no-untyped-def]
    s = golden("cls_losses").scenario(scenario)
    logits = s["logits"].requires_grad_()
    each = Bce().each(logits, s["dense_target"])
    total = each.sum() / s["avg_factor"].item()
    total.backward()
    assert_close(total.detach(), s["bce/loss"].squeeze(), rtol=1e-5, atol=1e-6)
    assert_close(logits.grad, s["bce/grad"], rtol=1e-4, atol=1e-6)


def test_against_torchvision() -> None:
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 12, (500,), generator=generator).clamp(max=7)
    logits = (torch.randn(500, 7, generator=generator) * 4).requires_grad_()
    value, gradient = value_and_gradient(Focal(), logits, one_hot(labels, 7))
    theirs = sigmoid_focal_loss(logits, F.one_hot(labels, 8)[:, :7].float(), reduction="sum")
    theirs.backward()
    assert_close(value, theirs.detach(), rtol=1e-5, atol=0)
    assert_close(gradient, logits.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("loss", LOSSES, ids=repr)
@pytest.mark.parametrize("dense_background", [False, True])
def test_sparse_sum_is_the_dense_definition(loss: ClassLoss, dense_background: bool) -> None:
    """Written out densely and differentiated by autograd: the same value and gradient; duplicates, padding, ignored."""
    shape = (2, 40, 3)
    targets = random_targets(shape, 60, dense_background)
    target, weight = targets.dense()
    generator = torch.Generator().manual_seed(2)
    logits = (torch.randn(shape, dtype=torch.float64, generator=generator) * 5).requires_grad_()
    smoothing = getattr(loss, "label_smoothing", 0.0)
    p, t = logits.sigmoid(), target.double() * (1 - smoothing) + smoothing / 2
    plain = F.binary_cross_entropy_with_logits(logits, t, reduction="none")
    if isinstance(loss, Focal):
        plain = plain * (p - t).abs() ** loss.gamma
        if loss.alpha is not None:
            plain = plain * (loss.alpha * t + (1 - loss.alpha) * (1 - t))
    elif isinstance(loss, QualityFocal):
        plain = plain * (p - t).abs() ** loss.beta
    elif isinstance(loss, Varifocal):
        plain = plain * torch.where(t > 0, t, loss.alpha * p**loss.gamma)
    expected = (plain * weight).sum()
    expected.backward()
    value, gradient = value_and_gradient(loss, logits, targets)
    assert_close(value, expected.detach(), rtol=1e-6, atol=1e-9)
    assert_close(gradient, logits.grad, rtol=1e-5, atol=1e-7)
    assert_close((loss.each(logits.detach(), target.double()) * weight).sum(), value, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("loss", LOSSES, ids=repr)
def test_gradient_of_the_custom_function(loss: ClassLoss) -> None:
    shape = (1, 5, 3)
    targets = random_targets(shape, 6)
    logits = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(3)).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: loss(x, targets) * 0.7, (logits,))


def test_blocks_do_not_show(monkeypatch: pytest.MonkeyPatch) -> None:
    shape = (2, 50, 3)
    targets, logits = random_targets(shape, 30), torch.randn(shape, generator=torch.Generator().manual_seed(4))
    whole = value_and_gradient(Focal(), logits, targets)
    monkeypatch.setattr("detector.losses.classification.CPU_BLOCK", 16)
    for a, b in zip(value_and_gradient(Focal(), logits, targets), whole, strict=True):
        assert_close(a, b, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("loss", LOSSES, ids=repr)
def test_half_precision_logits(loss: ClassLoss, dtype: torch.dtype) -> None:
    """The sum is that of float32; only the gradient, and only at the very end, has the logits' type."""
    shape = (2, 40, 3)
    targets = random_targets(shape, 60)
    logits = (torch.randn(shape, generator=torch.Generator().manual_seed(5)) * 3).to(dtype)
    value, gradient = value_and_gradient(loss, logits, targets)
    exact, exact_gradient = value_and_gradient(loss, logits.float(), targets)
    assert value.dtype == torch.float32
    assert gradient.dtype == dtype
    assert_close(value, exact)
    assert_close(gradient.float(), exact_gradient, rtol=2e-2, atol=1e-6)


def test_a_small_float16_gradient_survives_until_it_is_scaled() -> None:
    targets = one_hot(torch.tensor([1]), 1)
    logits = torch.full((1, 1, 1), -9.0, dtype=torch.float16, requires_grad=True)
    (Focal()(logits, targets) * 2.0**16).backward()  # unscaled it is about 1e-12, float16 ends at 6e-8
    assert logits.grad is not None
    assert logits.grad.item() > 0


@pytest.mark.parametrize("loss", LOSSES, ids=repr)
def test_certain_logits_are_finite(loss: ClassLoss) -> None:
    logits = torch.tensor([-1e4, -100, -30, 0, 30, 100, 1e4]).repeat(2).view(1, 14, 1)
    labels = torch.tensor([0] * 7 + [1] * 7)
    value, gradient = value_and_gradient(loss, logits, one_hot(labels, 1))
    assert value.isfinite()
    assert gradient.isfinite().all()


def test_without_a_graph() -> None:
    targets = random_targets((1, 20, 3), 10)
    logits = torch.randn(1, 20, 3, generator=torch.Generator().manual_seed(6))
    value = Focal()(logits, targets)
    assert not value.requires_grad
    assert_close(value, value_and_gradient(Focal(), logits, targets)[0])


def test_ignored_and_background_cells() -> None:
    """Exactly 0 where ignored; a pair of weight 0 is background."""
    assignment = Assignment(
        num_priors=3,
        prior=torch.tensor([0, 1, 2]),
        object=torch.tensor([0, 0, 0]),
        quality=torch.ones(3),
        weight=torch.tensor([1.0, 0.0, 1.0]),
        ignored=torch.tensor([[False, False, True]]),
    )
    target, weight = class_targets(assignment, torch.tensor([1]), 2).dense()
    assert target.tolist() == [[[0, 1], [0, 0], [0, 0]]]
    assert weight.tolist() == [[[1, 1], [1, 1], [0, 0]]]


def test_several_pairs_of_one_cell_are_one_target() -> None:
    """Two objects of one class on one prior: the highest quality and weight; of two classes: two targets."""
    assignment = Assignment(
        num_priors=2,
        prior=torch.tensor([1, 1, 1, 1]),
        object=torch.tensor([0, 1, 2, 1]),
        quality=torch.tensor([0.3, 0.8, 0.5, 0.9]),
        weight=torch.tensor([1.0, 0.5, 1.0, 0.0]),
        ignored=torch.zeros(1, 2, dtype=torch.bool),
    )
    targets = class_targets(assignment, torch.tensor([0, 0, 1]), 3)
    target, weight = targets.dense()
    assert_close(target[0], torch.tensor([[0.0, 0, 0], [0.8, 0.5, 0]]))
    assert_close(weight[0], torch.ones(2, 3))


def test_no_pair_at_all() -> None:
    none = torch.zeros(0)
    assignment = Assignment(4, none.long(), none.long(), none, none, torch.zeros(1, 4, dtype=torch.bool))
    targets = class_targets(assignment, none.long(), 2)
    logits = torch.zeros(1, 4, 2)
    value, _ = value_and_gradient(Focal(), logits, targets)
    assert_close(value, torch.tensor(8 * 0.75 * 0.25 * math.log(2)))


def test_expected_initial_loss() -> None:
    """RetinaNet's prior of 0.01: by hand, and by the loss of logits at that bias."""
    by_hand = 3 * 0.25 * 0.99**2 * -math.log(0.01) + 37 * 0.75 * 0.01**2 * -math.log(0.99)
    assert expected_initial_loss(Focal(), 0.01, 3, 37) == pytest.approx(by_hand)
    labels = torch.tensor([0, 1, 2, 4, 4, 4, 4, 4, 4, 4])
    logits = torch.full((1, 10, 4), -math.log(99))
    assert float(Focal()(logits, one_hot(labels, 4))) == pytest.approx(by_hand, rel=1e-5)
    assert expected_initial_loss(Bce(weight=2), 0.5, 3, 37) == pytest.approx(80 * math.log(2))
