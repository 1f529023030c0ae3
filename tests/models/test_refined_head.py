"""The refined head: its two refinements against plain loops over cells, gradients, and that it takes every rule."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
import torch.nn.functional as F
from pydantic import ValidationError
from torch import Tensor, nn
from torch.testing import assert_close

from detector.assign import Rule
from detector.boxes import centers
from detector.coders import Bins, Deltas, Distances
from detector.config.load import load_config
from detector.config.run import RunConfig
from detector.decode import DecodeConfig, decode
from detector.errors import ConfigError
from detector.losses.auto_assign import AutoAssignConfig
from detector.losses.dense import DenseCriterionConfig
from detector.losses.free_anchor import FreeAnchorConfig
from detector.losses.quality import QualityBce
from detector.losses.regression import L1, Giou
from detector.losses.soft import QualityFocal, Varifocal
from detector.models.corrections import product
from detector.models.dense import DenseConfig
from detector.models.fold import fold_batch_norm
from detector.models.priors import Anchors, Points
from detector.models.refined_head import RefinedHead, RefinedHeadConfig
from detector.models.refinement import (
    MOST_GROWTH,
    Boundary,
    Star,
    StarConvolution,
    StarRefiner,
    star_offsets,
)
from detector.structures import Objects, Outputs
from tests.losses.test_two_stage import NeverWaitsButFills
from tests.models.make import lively, random_maps

STRIDES, SIZES, IMAGE = (8, 16, 32), ((6, 7), (3, 4), (2, 2)), (48, 56)
PUBLISHED = Path(__file__).resolve().parents[2] / "configs" / "published"
REFINEMENTS = (Boundary(), Star())


def maps(batch: int = 2, channels: int = 16) -> list[Tensor]:
    return random_maps(SIZES, batch, channels)


def head(num_classes: int = 3, **changes: Any) -> RefinedHead:
    torch.manual_seed(0)
    return RefinedHeadConfig(**({"channels": 16, "convs": 2} | changes)).build(16, STRIDES, num_classes)


def some(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def read(field: Tensor, y: float, x: float, edge: bool) -> Tensor:
    """(C, H, W) at a place in cells: bilinear; beyond the map its last values if `edge`, else zeros."""
    height, width = field.shape[1:]
    if edge:
        y, x = min(max(y, 0.0), height - 1.0), min(max(x, 0.0), width - 1.0)
    result = torch.zeros(len(field), dtype=field.dtype)
    for row in (math.floor(y), math.floor(y) + 1):
        for column in (math.floor(x), math.floor(x) + 1):
            if 0 <= row < height and 0 <= column < width:
                result = result + (1 - abs(y - row)) * (1 - abs(x - column)) * field[:, row, column]
    return result


def boundary_reference(initial: Tensor, offsets: Tensor) -> Tensor:
    """As in the paper: the map of distances read at four points, and the way to the point added.

    initial: (H, W, A, 4) distances.  offsets: (A, 4, 2, H, W) x, y.  -> (H, W, A, 4)
    """
    height, width, per_cell, _ = initial.shape
    result = torch.empty_like(initial)
    for row in range(height):
        for column in range(width):
            for a in range(per_cell):
                left, top, right, bottom = initial[row, column, a].tolist()
                for side, (dx, dy) in enumerate([(-left, 0), (0, -top), (right, 0), (0, bottom)]):
                    x = column + dx + float(offsets[a, side, 0, row, column])
                    y = row + dy + float(offsets[a, side, 1, row, column])
                    x, y = min(max(x, 0.0), width - 1.0), min(max(y, 0.0), height - 1.0)
                    there = float(read(initial[:, :, a, side][None], y, x, edge=True))
                    shift = (column - x, row - y, x - column, y - row)[side]
                    result[row, column, a, side] = there + shift
    upright = (result[..., 0] + result[..., 2] >= 0) & (result[..., 1] + result[..., 3] >= 0)
    return torch.where(upright[..., None], result, initial)


@pytest.mark.parametrize("priors", [Points(), Anchors(ratios=(0.5, 1.0), octave_scales=1)], ids=["one", "two"])
def test_boundary_points_against_a_loop(priors: Any) -> None:
    a, height, width = priors.per_cell, 5, 6
    refiner = Boundary().build(RefinedHeadConfig(channels=16, priors=priors, refine=Boundary()), 1).double()
    nn.init.normal_(refiner.offsets.weight, std=0.1)
    for_class, for_box = some(2, 16, height, width), some(2, 16, height, width, seed=1)
    initial = some(2, height * width * a, 4, seed=2).abs() * 1.5
    features, refined = refiner(for_class, for_box, initial, 0)
    assert features is for_class
    learnt = refiner.offsets(for_box).detach()
    assert learnt.abs().mean() > 0.3
    moved = 0
    for i in range(2):
        first = initial[i].view(height, width, a, 4)
        expected = boundary_reference(first, learnt[i].view(a, 4, 2, height, width))
        assert_close(refined[i].view(height, width, a, 4), expected, atol=1e-9, rtol=1e-9)
        moved += int(((expected - first).abs() > 1e-3).any(-1).sum())
    assert moved > 0.5 * 2 * height * width * a


def test_boxes_that_agree_are_left_as_they_are() -> None:
    """Where all cells say the same box in the image, each side is read as it was, wherever the points move."""
    refiner = Boundary().build(RefinedHeadConfig(channels=8, refine=Boundary()), 1).double()
    nn.init.normal_(refiner.offsets.weight, std=0.3)
    y, x = torch.meshgrid(torch.arange(6.0), torch.arange(7.0), indexing="ij")
    initial = torch.stack([x - 1, y - 2, 5 - x, 4 - y], -1).view(1, 42, 4).double()
    _, refined = refiner(some(1, 8, 6, 7), some(1, 8, 6, 7, seed=1), initial, 0)
    assert_close(refined, initial)


def test_gradients_of_boundary_points() -> None:
    """Through the boxes that are read, the place where they are read, and the features that moved it."""
    refiner = Boundary().build(RefinedHeadConfig(channels=4, refine=Boundary()), 1).double()
    nn.init.normal_(refiner.offsets.weight, std=0.2)
    for_box = some(1, 4, 4, 5, seed=3).requires_grad_()
    initial = (some(1, 20, 4, seed=4).abs() + 0.5).requires_grad_()

    def refined(features: Tensor, boxes: Tensor) -> Tensor:
        result: Tensor = refiner(features, features, boxes, 0)[1]
        return result

    assert torch.autograd.gradcheck(refined, (for_box, initial))


def test_star_taps_lie_on_the_box() -> None:
    distances = some(2, 4, 3, 4).abs() + 0.5
    offsets = star_offsets(distances)
    assert offsets.shape == (2, 18, 3, 4)
    base = [(row, column) for row in (-1, 0, 1) for column in (-1, 0, 1)]
    for image in range(2):
        for row in range(3):
            for column in range(4):
                left, top, right, bottom = distances[image, :, row, column].tolist()
                found = [
                    (base[i][0] + float(offsets[image, 2 * i, row, column]),
                     base[i][1] + float(offsets[image, 2 * i + 1, row, column]))
                    for i in range(9)
                ]  # fmt: skip
                expected = [
                    (-top, -left), (-top, 0), (-top, right),
                    (0, -left), (0, 0), (0, right),
                    (bottom, -left), (bottom, 0), (bottom, right),
                ]  # fmt: skip
                assert_close(torch.tensor(found), torch.tensor(expected, dtype=torch.float64).to(torch.float32))


def star_reference(weight: Tensor, x: Tensor, distances: Tensor) -> Tensor:
    """(T, T, 3, 3), (T, H, W), (4, H, W) -> (T, H, W): nine products for each cell, zeros beyond the map, ReLU."""
    result = torch.zeros_like(x)
    for row in range(x.shape[1]):
        for column in range(x.shape[2]):
            left, top, right, bottom = distances[:, row, column].tolist()
            for i, y in enumerate((row - top, row, row + bottom)):
                for j, place in enumerate((column - left, column, column + right)):
                    result[:, row, column] += weight[:, :, i, j] @ read(x, y, place, edge=False)
    return result.clamp(min=0)


def test_star_convolution_against_a_loop() -> None:
    torch.manual_seed(0)
    star = StarConvolution(6).double()
    x, distances = some(2, 6, 5, 4), some(2, 4, 5, 4, seed=1).abs() * 1.5
    found = star(x, star_offsets(distances))
    for i in range(2):
        assert_close(found[i], star_reference(star.weight.detach(), x[i], distances[i]), atol=1e-9, rtol=1e-9)
    ones = torch.ones(2, 4, 5, 4, dtype=torch.float64)  # a box of two cells: a plain convolution
    assert_close(star(x, star_offsets(ones)), F.relu(F.conv2d(x, star.weight, padding=1)))


def test_gradients_of_the_star_convolution() -> None:
    torch.manual_seed(0)
    star = StarConvolution(3).double()
    x, distances = some(1, 3, 4, 4).requires_grad_(), (some(1, 4, 4, 4, seed=1).abs() + 0.3).requires_grad_()
    assert torch.autograd.gradcheck(lambda a, d: star(a, star_offsets(d)), (x, distances))


def star_refiner(gradient: float = 0.1) -> StarRefiner:
    torch.manual_seed(0)
    refine = Star(gradient=gradient)
    return lively(refine.build(RefinedHeadConfig(channels=4, refine=refine), 2)).double()  # type: ignore[return-value]


def test_sides_are_multiplied_and_keep_their_sign() -> None:
    refiner = star_refiner()
    initial = some(1, 20, 4, seed=5)
    for_box = some(1, 4, 4, 5, seed=4)
    with torch.no_grad():
        _, refined = refiner(some(1, 4, 4, 5, seed=3), for_box, initial, 1)
        offsets = star_offsets(initial.transpose(1, 2).view(1, 4, 4, 5))
        raw = refiner.factors(refiner.for_box(for_box, offsets))
        expected = initial * raw.flatten(2).transpose(1, 2).exp()
        upright = (expected[..., :2] + expected[..., 2:] >= 0).all(-1, keepdim=True)
        assert 0 < upright.double().mean() < 1
        assert_close(refined, torch.where(upright, expected, initial))
        assert refiner.level_scale is not None
        refiner.level_scale[1] = 1e6
        _, refined = refiner(some(1, 4, 4, 5, seed=3), for_box, initial, 1)
        assert refined.isfinite().all()
        assert (refined.abs() <= initial.abs() * MOST_GROWTH * (1 + 1e-9)).all()


def test_the_initial_box_gets_a_share_of_the_gradient() -> None:
    """From where the star looked; and none through the distances that are multiplied."""
    gradients = []
    for share in (0.0, 0.1, 1.0):
        refiner = star_refiner(share)
        initial = (some(1, 20, 4, seed=5).abs() + 0.3).requires_grad_()
        features, refined = refiner(some(1, 4, 4, 5, seed=3), some(1, 4, 4, 5, seed=4), initial, 0)
        (features.square().sum() + refined.square().sum()).backward()
        assert initial.grad is not None
        gradients.append(initial.grad)
    none, tenth, whole = gradients
    assert not none.any()
    assert (whole != 0).double().mean() > 0.7  # not where a side lies beyond the map
    assert_close(tenth, whole * 0.1)


@pytest.mark.parametrize("norm", ["group", "none"])
def test_the_head_of_varifocalnet_written_out(norm: str) -> None:
    built = lively(head(norm=norm, convs=3)).eval()
    with torch.no_grad():
        assert built.level_scale is not None
        assert built.refine.level_scale is not None
        built.level_scale.copy_(torch.tensor([0.8, 1.0, 1.3]))
        built.refine.level_scale.copy_(torch.tensor([1.2, 0.9, 1.1]))
        built.box.weight.mul_(0.3)
        outputs = built(maps())
        assert outputs.initial is not None
        start = 0
        for level, (x, stride) in enumerate(zip(maps(), STRIDES, strict=True)):
            for_class = for_box = x
            for layer in built.class_tower:
                for_class = F.relu(layer.norms[0](layer.convs[0](for_class)))
            for layer in built.box_tower:
                for_box = F.relu(layer.norms[0](layer.convs[0](for_box)))
            first = built.refine.first
            before = F.relu(first.norms[0](first.convs[0](for_box)))
            distances = (built.box(before) * built.level_scale[level]).exp()  # strides
            star, other = built.refine.for_box.weight, built.refine.for_class.weight
            box = torch.stack([star_reference(star, f, d) for f, d in zip(for_box, distances, strict=True)])
            classes = torch.stack([star_reference(other, f, d) for f, d in zip(for_class, distances, strict=True)])
            refined = (built.refine.factors(box) * built.refine.level_scale[level]).exp() * distances
            logits = built.classes(classes)

            part = slice(start, start + x.shape[2] * x.shape[3])
            start = part.stop
            assert_close(outputs.class_logits[:, part], logits.flatten(2).transpose(1, 2), atol=1e-4, rtol=1e-4)
            center = outputs.priors.centers[part]
            for boxes, said in ((outputs.initial.boxes, distances), (outputs.boxes, refined)):
                left_top, right_bottom = (said.flatten(2).transpose(1, 2) * stride).split(2, -1)
                expected = torch.cat([center - left_top, center + right_bottom], -1)
                assert_close(boxes[:, part], expected, atol=1e-3, rtol=1e-4)
    assert (outputs.boxes - outputs.initial.boxes).abs().mean() > 1


def test_the_head_of_dw_written_out() -> None:
    """Sides in pixels, as its authors say them, and the product of both probabilities."""
    built = lively(head(coder=Distances(activation="relu"), refine=Boundary(), objectness=True, start=1.5)).eval()
    with torch.no_grad():
        outputs = built(maps())
        x = maps()[0]
        for_class = for_box = x
        for layer, other in zip(built.class_tower, built.box_tower, strict=True):
            for_class, for_box = layer(for_class, 0), other(for_box, 0)
        score = built.classes(for_class).sigmoid() * built.objectness(for_box).sigmoid()
        assert_close(outputs.class_logits[:, :42].sigmoid(), score.flatten(2).transpose(1, 2), atol=1e-6, rtol=1e-4)
        distances = F.relu(built.box(for_box)).double()
        offsets = built.refine.offsets(for_box).double()
        for i in range(2):
            said = distances[i].permute(1, 2, 0)[:, :, None].contiguous()
            expected = boundary_reference(said, offsets[i].view(1, 4, 2, 6, 7)).reshape(42, 4)
            center = outputs.priors.centers[:42].double()
            boxes = torch.cat([center - 8 * expected[:, :2], center + 8 * expected[:, 2:]], 1)
            assert_close(outputs.boxes[i, :42].double(), boxes, atol=1e-3, rtol=1e-4)
            assert (outputs.boxes[i, 42:] - outputs.boxes[i, 42:].mean(0)).abs().max() > 1


def test_product_of_scores() -> None:
    a, b = (some(50, seed=i).float() * 5 for i in range(2))
    assert_close(product(a, b).double(), torch.logit(a.double().sigmoid() * b.double().sigmoid()), rtol=1e-4, atol=1e-5)
    ends = torch.tensor([-1e4, -200, -50, 0, 50, 200, 1e4])
    a, b = (x.flatten().requires_grad_() for x in torch.meshgrid(ends, ends, indexing="ij"))
    logit = product(a, b)
    assert logit.isfinite().all()
    F.binary_cross_entropy_with_logits(logit, torch.zeros_like(logit), reduction="sum").backward()
    assert a.grad is not None
    assert a.grad.isfinite().all()


@pytest.mark.parametrize("refine", REFINEMENTS, ids=lambda r: r.type)
@pytest.mark.parametrize("coder", [Deltas(), Distances(), Distances(activation="relu"), Bins()], ids=lambda c: c.type)
@pytest.mark.parametrize("quality", [False, True])
def test_every_combination_gives_boxes(refine: Any, coder: Any, quality: bool) -> None:
    priors = Anchors() if refine.type == "boundary" else Points()
    outputs = lively(head(refine=refine, coder=coder, quality=quality, priors=priors))(maps())
    count = sum(h * w for h, w in SIZES) * priors.per_cell
    assert outputs.class_logits.shape == (2, count, 3)
    assert outputs.box_raw.shape == (2, count, 4)
    assert (outputs.boxes[..., 2:] >= outputs.boxes[..., :2]).all()
    assert (outputs.quality_logits is not None) == quality
    assert outputs.initial.box_raw.shape == (2, count, coder.channels)
    assert outputs.initial.class_logits is outputs.class_logits
    assert outputs.initial.coder == coder


@pytest.mark.parametrize("coder", [Deltas(), Distances(), Distances(activation="relu"), Bins()], ids=lambda c: c.type)
@pytest.mark.parametrize("priors", [Points(), Anchors()], ids=["points", "nine"])
@pytest.mark.parametrize("conv", ["plain", "separable"])
def test_boxes_start_where_they_should(coder: Any, priors: Any, conv: str) -> None:
    refine = Star() if priors.per_cell == 1 else Boundary()
    built = head(coder=coder, priors=priors, refine=refine, start=3, conv=conv)
    outputs = built([x * 0 for x in maps()])
    distance = outputs.priors.stride[:, None] * 3
    center = centers(outputs.priors.boxes)
    expected = torch.cat([center - distance, center + distance], 1).expand(2, -1, -1)
    assert_close(outputs.initial.boxes, expected, atol=0.05, rtol=1e-3)
    if refine.type == "star":  # all factors start at 1; other boxes' sides are elsewhere
        assert_close(outputs.boxes, expected, atol=0.05, rtol=1e-3)


@pytest.mark.parametrize("objectness", [False, True])
@pytest.mark.parametrize("probability", [0.01, 0.2, 0.7])
def test_class_scores_start_at_the_prior_probability(probability: float, objectness: bool) -> None:
    outputs = head(prior_probability=probability, num_classes=20, objectness=objectness)(maps())
    assert outputs.class_logits.sigmoid().mean().item() == pytest.approx(probability, rel=0.1)


@pytest.mark.parametrize("refine", REFINEMENTS, ids=lambda r: r.type)
@pytest.mark.parametrize("norm", ["none", "batch", "group"])
@pytest.mark.parametrize("conv", ["plain", "separable"])
def test_every_parameter_gets_a_gradient(refine: Any, norm: str, conv: str) -> None:
    built = lively(head(quality=True, objectness=True, norm=norm, conv=conv, refine=refine))
    outputs = built(maps())
    assert outputs.quality_logits is not None
    (outputs.class_logits.sum() + outputs.box_raw.square().sum() + outputs.quality_logits.sum()).backward()
    for name, parameter in built.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.any(), name


CRITERION = DenseCriterionConfig(
    classification=QualityFocal(),
    box=Giou(),
    initial_box=Giou(),
    box_weighting="assignment",
    quality=QualityBce(),
    normalizer="quality",
)
RULES = [rule() for rule in get_args(get_args(Rule)[0])]


def batches() -> dict[str, Objects]:
    few, none = torch.tensor([[2.0, 3, 40, 45], [10, 10, 30, 22]]), torch.zeros(0, 4)
    sizes = torch.tensor([IMAGE, IMAGE]).float()
    two, no = torch.tensor([0, 2]), torch.zeros(0).long()
    return {
        "few and none": Objects.collate([few, none], [two, no], sizes=sizes),
        "none": Objects.collate([none, none], [no, no], sizes=sizes),
        "crowds": Objects.collate([none, none], [no, no], [torch.tensor([[0.0, 0, 56, 48]]), none], sizes),
    }


@pytest.mark.parametrize("refine", REFINEMENTS, ids=lambda r: r.type)
@pytest.mark.parametrize("rule", RULES, ids=lambda r: r.type)
def test_it_takes_every_rule(rule: Any, refine: Any) -> None:
    """With and without objects: finite losses and gradients; then the loss falls."""
    built = head(quality=True, refine=refine, convs=1)
    criterion = CRITERION.build(rule, 3)
    for kind, objects in batches().items():
        built.zero_grad()
        losses = criterion(built(maps()), objects)
        assert set(losses.sums) == {"class", "box", "initial_box", "quality"}
        assert bool(losses.sums["initial_box"] > 0) == bool(losses.sums["box"] > 0) == (kind == "few and none"), kind
        assert losses.total.isfinite(), kind
        losses.total.backward()
        for name, p in built.named_parameters():
            assert p.grad is not None, (kind, name)
            assert p.grad.isfinite().all(), (kind, name)
    optimizer = torch.optim.AdamW(built.parameters(), 3e-3)
    history = []
    for _ in range(14):
        optimizer.zero_grad()
        losses = criterion(built(maps()), batches()["few and none"])
        losses.total.backward()
        optimizer.step()
        history.append(losses.total.item())
    assert sum(history[-3:]) < 0.95 * sum(history[:3]), history


@pytest.mark.parametrize("config", [FreeAnchorConfig(box=Giou()), AutoAssignConfig()], ids=lambda c: c.type)
def test_it_takes_every_criterion(config: Any) -> None:
    built = head(refine=Boundary(), quality=config.uses_quality)
    losses = config.build(None, 3)(built(maps()), batches()["few and none"])
    losses.total.backward()
    assert losses.total.isfinite()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in built.parameters())


def test_initial_boxes_are_weighted_as_the_others() -> None:
    """By their own IoU where that counts, with their own normalisation."""
    built = lively(head())
    outputs, objects = built(maps()), batches()["few and none"]
    config = DenseCriterionConfig(
        classification=Varifocal(),
        class_target="iou",
        box=Giou(weight=2.0),
        initial_box=Giou(weight=1.5),
        box_weighting="iou",
        normalize_box_weights=True,
    )
    losses = config.build(RULES[0], 3)(outputs, objects)
    alone = config.model_copy(update={"initial_box": None, "box": Giou(weight=1.5)}).build(RULES[0], 3)
    assert_close(losses.sums["initial_box"], alone(outputs.initial, objects).sums["box"])
    assert_close(losses.sums["box"] * 0.75, alone(outputs, objects).sums["box"])
    assert_close(losses.sums["class"], alone(outputs, objects).sums["class"])
    assert losses.sums["initial_box"] != losses.sums["box"] * 0.75


@pytest.mark.parametrize("refine", REFINEMENTS, ids=lambda r: r.type)
def test_no_waiting_for_the_device(refine: Any) -> None:
    built = head(refine=refine, quality=True, objectness=True)
    criterion, objects, features = CRITERION.build(RULES[0], 3), batches()["few and none"], maps()
    criterion(built(features), objects)  # tables are made once
    with NeverWaitsButFills():
        criterion(built(features), objects)


def test_what_does_not_fit_is_said() -> None:
    with pytest.raises(ValidationError, match=r"looks at one box a cell, but the priors have 9.*type: boundary"):
        RefinedHeadConfig(priors=Anchors())
    outputs = head()(maps())
    plain = Outputs(outputs.priors, outputs.class_logits, outputs.box_raw, None, outputs.coder)
    config = DenseCriterionConfig(initial_box=Giou())
    with pytest.raises(ConfigError, match=r"does not refine its boxes: set model.head.type=refined"):
        config.build(RULES[0], 3)(plain, batches()["none"])
    bins = head(coder=Bins())(maps())
    with pytest.raises(ConfigError, match=r"criterion.initial_box compares raw .* criterion.initial_box.type=giou"):
        DenseCriterionConfig(initial_box=L1()).build(RULES[0], 3)(bins, batches()["none"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["criterion.initial_box=null"], r"nothing would train the boxes .*'star' .*criterion.initial_box=.*=boundary"),
        (["model.head.type=dense", "model.head.refine=null"], "refine"),
        (["model.head.coder={type: bins}", "criterion.initial_box={type: l1}"], "initial_box.type=giou"),
        (["model.head.coder={type: bins}", "criterion.distribution={type: dfl}"], "gives no distributions"),
    ],
)
def test_recipes_that_do_not_fit(changes: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(PUBLISHED / "vfnet_r50_fpn_1x_coco.yaml", changes)


def test_initial_boxes_need_a_head_that_refines() -> None:
    with pytest.raises(ConfigError, match="does not refine its boxes"):
        load_config(Path("atss_r50_fpn_1x_coco"), ["criterion.initial_box={type: giou}"])
    assert isinstance(load_config(PUBLISHED / "dw_r50_fpn_1x_coco.yaml", []), RunConfig)


def network(refine: Any) -> Any:
    torch.manual_seed(0)
    model = DenseConfig.model_validate(
        {
            "backbone": {"name": "resnet18", "levels": [3, 4]},
            "neck": {"channels": 16, "norm": "batch", "extra_levels": 1},
            "head": {"type": "refined", "channels": 16, "convs": 2, "norm": "batch", "refine": refine, "start": 2},
        }
    ).build(3)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.8, 1.5)
            nn.init.normal_(module.bias, std=0.1)
            module.momentum = 1.0
    for name, module in model.head.named_modules():
        if name in ("box", "classes", "refine.offsets", "refine.factors"):
            nn.init.normal_(module.weight, std=0.1)
    model.train()(images(4))
    return model.eval()


def images(batch: int = 1) -> Tensor:
    return torch.randint(0, 256, (batch, 3, 97, 130), generator=torch.Generator().manual_seed(1)).byte()


class Tensors(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: Tensor) -> tuple[Tensor, Tensor]:
        outputs = self.model(batch)
        return outputs.class_logits, outputs.boxes


@pytest.mark.parametrize("refine", REFINEMENTS, ids=lambda r: r.type)
class TestNetwork:
    def test_an_image_alone_and_among_others(self, refine: Any) -> None:
        model = Tensors(network(refine))
        with torch.no_grad():
            together = model(images(4))
            for i in range(4):
                for one, all_of_them in zip(model(images(4)[i : i + 1]), together, strict=True):
                    assert_close(one[0], all_of_them[i], atol=1e-3, rtol=1e-4)

    def test_detections_of_an_image_alone_and_among_others(self, refine: Any) -> None:
        model, config = network(refine), DecodeConfig(score_threshold=0.0, max_detections=10)
        size = torch.tensor([[97.0, 130]])
        with torch.no_grad():
            together = decode(model(images(4)), size.expand(4, 2), config)
            for i in range(4):
                (alone,) = decode(model(images(4)[i : i + 1]), size, config)
                assert len(alone) == 10
                assert_close(alone.boxes, together[i].boxes, atol=1e-2, rtol=1e-4)
                assert_close(alone.scores, together[i].scores, atol=1e-5, rtol=1e-4)

    def test_folded_batch_norms_change_nothing(self, refine: Any) -> None:
        model = network(refine)
        folded = fold_batch_norm(model)
        assert not [m for m in folded.modules() if "BatchNorm" in type(m).__name__]
        with torch.no_grad():
            a, b = model(images(2)), folded(images(2))
        assert_close(a.class_logits, b.class_logits, atol=1e-3, rtol=1e-3)
        assert_close(a.boxes, b.boxes, atol=1e-1, rtol=1e-3)

    @pytest.mark.filterwarnings("ignore")
    @pytest.mark.parametrize("how", ["trace", "export"])
    def test_exports(self, refine: Any, how: str) -> None:
        module = Tensors(network(refine))
        for batch in (1, 4):
            with torch.no_grad():
                exported = (
                    torch.jit.trace(module, images(batch), check_trace=False)
                    if how == "trace"
                    else torch.export.export(module, (images(batch),)).module()
                )
                for a, b in zip(exported(images(batch)), module(images(batch)), strict=True):
                    assert_close(a, b, atol=1e-3, rtol=1e-4)

    @pytest.mark.parametrize("way", ["autocast", "weights"])
    def test_half_precision(self, refine: Any, way: str) -> None:
        model = network(refine)
        with torch.no_grad():
            exact = model(images())
            if way == "autocast":
                with torch.autocast("cpu", torch.bfloat16):
                    half = model(images())
            else:
                half = model.to(torch.bfloat16)(images())
        assert half.boxes.dtype == torch.float32
        for a, b in ((half.class_logits, exact.class_logits), (half.boxes, exact.boxes)):
            assert torch.corrcoef(torch.stack([a.float().flatten(), b.flatten()]))[0, 1] > 0.9

    def test_trains_under_autocast(self, refine: Any) -> None:
        model = network(refine).train()
        with torch.autocast("cpu", torch.bfloat16):
            outputs = model(images(2))
        criterion = DenseCriterionConfig(initial_box=Giou()).build(RULES[0], 3)
        for objects in (batches()["few and none"], batches()["none"]):
            model.zero_grad()
            losses = criterion(outputs, objects)
            losses.total.backward(retain_graph=True)
            assert losses.total.isfinite()
            assert all(p.grad is not None and p.grad.isfinite().all() for p in model.head.parameters())
