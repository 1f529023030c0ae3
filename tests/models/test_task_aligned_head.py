"""The T-head: written out as in the paper, its parts one by one, and that it takes every rule and criterion."""

from __future__ import annotations

from typing import Any, get_args

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.testing import assert_close
from torchvision.ops import deform_conv2d

from detector.assign import Rule
from detector.coders import Bins, Deltas, Distances
from detector.losses.auto_assign import AutoAssignConfig
from detector.losses.dense import DenseCriterionConfig
from detector.losses.free_anchor import FreeAnchorConfig
from detector.losses.quality import QualityBce
from detector.losses.regression import Giou
from detector.losses.soft import QualityFocal
from detector.models.corrections import geometric_mean, look_up
from detector.models.dense import DenseConfig
from detector.models.fold import fold_batch_norm
from detector.models.priors import Anchors, Points
from detector.models.task_aligned_head import TaskAlignedHead, TaskAlignedHeadConfig
from detector.structures import Objects
from tests.models.make import lively, random_maps

STRIDES, SIZES = (8, 16, 32), ((6, 7), (3, 4), (1, 2))
ONE = Anchors(scale=8, octave_scales=1, ratios=(1,))


def maps(batch: int = 2, channels: int = 16) -> list[Tensor]:
    return random_maps(SIZES, batch, channels)


def head(num_classes: int = 3, **changes: Any) -> TaskAlignedHead:
    torch.manual_seed(0)
    return TaskAlignedHeadConfig(**({"channels": 16, "convs": 3} | changes)).build(16, STRIDES, num_classes)


@pytest.mark.parametrize("priors", [Anchors(), ONE, Points()], ids=["nine", "one", "points"])
@pytest.mark.parametrize("coder", [Deltas(), Distances(), Bins()], ids=lambda c: c.type)
@pytest.mark.parametrize("quality", [False, True])
def test_every_combination_gives_boxes(priors: Any, coder: Any, quality: bool) -> None:
    outputs = head(priors=priors, coder=coder, quality=quality)(maps())
    count = sum(h * w for h, w in SIZES) * priors.per_cell
    assert outputs.class_logits.shape == (2, count, 3)
    assert outputs.box_raw.shape == (2, count, 4)
    assert len(outputs.priors) == count
    assert (outputs.boxes[..., 2:] >= outputs.boxes[..., :2]).all()
    assert (outputs.quality_logits is not None) == quality
    assert outputs.quality_logits is None or outputs.quality_logits.shape == (2, count)


@pytest.mark.parametrize("norm", ["group", "none"])
def test_the_whole_head_written_out(norm: str) -> None:
    """Attention as a kernel for each image (equation 2), products of probabilities, deformable sampling of the boxes.

    Where the samples reach beyond the map the authors' zeros differ from our edge, so those cells are left out.
    """
    built = lively(head(priors=ONE, norm=norm, quality=True)).double().eval()
    with torch.no_grad():
        assert built.level_scale is not None
        built.level_scale.copy_(torch.tensor([0.8, 1.0, 1.3]))
        built.box.weight.mul_(0.3)
    random = torch.Generator().manual_seed(2)
    x = torch.randn(2, 16, 12, 13, generator=random, dtype=torch.float64)
    level = [x, x[..., :6, :6], x[..., :3, :3]]
    outputs = built(level)

    layers, now = [], x
    for layer in built.tower:
        now = F.relu(layer.norms[0](layer.convs[0](now)))
        layers.append(now)
    stack = torch.cat(layers, 1)
    average = stack.mean((2, 3), keepdim=True)

    def task(part: Any) -> Tensor:
        attention = part.attention(average).view(2, 3)
        conv = part.mix.convs[0]
        kernel = conv.weight.view(1, 16, 3, 16) * attention[:, None, :, None]
        mixed = torch.einsum("bock,bckhw->bohw", kernel, stack.view(2, 3, 16, 12, 13))
        mixed = mixed if conv.bias is None else mixed + conv.bias[:, None, None]
        return F.relu(part.mix.norms[0](mixed))

    for_class, for_box = task(built.for_class), task(built.for_box)
    probability = (built.classes(for_class).sigmoid() * built.alignment(stack).sigmoid()).sqrt()
    flat = probability.permute(0, 2, 3, 1).reshape(2, -1, 3)
    assert_close(outputs.class_logits[:, : 12 * 13].sigmoid().double(), flat, atol=1e-6, rtol=1e-5)

    distances = (built.box(for_box) * 0.8).exp()
    y, column = torch.meshgrid(torch.arange(12) + 0.5, torch.arange(13) + 0.5, indexing="ij")
    center = torch.stack([column, y]).double()
    boxes = torch.cat([center - distances[:, :2], center + distances[:, 2:]], 1)  # in strides
    offsets = built.offsets(stack)
    swapped = offsets.view(2, 4, 2, 12, 13).flip(2).reshape(2, 8, 12, 13)  # torchvision's are y, x
    found = torch.cat(
        [
            deform_conv2d(boxes[:, i : i + 1], swapped[:, 2 * i : 2 * i + 2], torch.ones(1, 1, 1, 1).double())
            for i in range(4)
        ],
        1,
    )
    shift = offsets.view(2, 4, 2, 12, 13)
    sampled_x = torch.arange(13) + shift[:, :, 0]
    sampled_y = torch.arange(12)[:, None] + shift[:, :, 1]
    inside = ((sampled_x >= 0) & (sampled_x <= 12) & (sampled_y >= 0) & (sampled_y <= 11)).all(1)
    upright = (found[:, 0] < found[:, 2]) & (found[:, 1] < found[:, 3])
    expected = torch.where(upright[:, None], found, boxes) * 8
    ours = outputs.boxes[:, : 12 * 13].view(2, 12, 13, 4).permute(0, 3, 1, 2)
    compared = inside[:, None].expand_as(expected)
    assert 0.3 < inside.double().mean() < 1
    assert (upright & inside).any()
    assert_close(ours[compared].double(), expected[compared], atol=1e-3, rtol=1e-4)
    assert outputs.quality_logits is not None
    assert_close(outputs.quality_logits[:, :156], built.quality(for_box).flatten(1), atol=1e-6, rtol=1e-5)


def test_geometric_mean_of_scores() -> None:
    random = torch.Generator().manual_seed(0)
    a, b = (torch.randn(50, generator=random) * 5 for _ in range(2))
    expected = torch.logit((a.double().sigmoid() * b.double().sigmoid()).sqrt())
    assert_close(geometric_mean(a, b).double(), expected, rtol=1e-4, atol=1e-5)
    ends = torch.tensor([-1e4, -200, -50, 0, 50, 200, 1e4])
    a, b = (x.flatten().requires_grad_() for x in torch.meshgrid(ends, ends, indexing="ij"))
    logit = geometric_mean(a, b)
    assert logit.isfinite().all()
    F.binary_cross_entropy_with_logits(logit, torch.zeros_like(logit), reduction="sum").backward()
    assert a.grad is not None
    assert a.grad.isfinite().all()
    assert_close(geometric_mean(torch.tensor(-200.0), torch.tensor(-100.0)), torch.tensor(-150.0))
    assert_close(geometric_mean(torch.tensor(50.0), torch.tensor(50.0)), torch.tensor(50.0))


def grid_boxes(per_cell: int = 1) -> Tensor:
    """(1, 12 A, 4) boxes on a map of 3 x 4, all different."""
    corner = torch.arange(12.0 * per_cell)[:, None] + torch.tensor([0.0, 100])
    return torch.cat([corner, corner + 50], 1)[None]


def test_boxes_are_looked_up_side_by_side() -> None:
    boxes = grid_boxes()
    offsets = torch.zeros(1, 8, 3, 4)
    assert_close(look_up(boxes, offsets), boxes)
    offsets[0, 0] = 1  # x of the left side
    offsets[0, 7] = -1  # y of the bottom side
    found = look_up(boxes, offsets).view(3, 4, 4)
    here = boxes.view(3, 4, 4)
    assert_close(found[:, :3, 0], here[:, 1:, 0])
    assert_close(found[:, 3, 0], here[:, 3, 0])  # beyond the edge: the last
    assert_close(found[1:, :, 3], here[:-1, :, 3])
    assert_close(found[0, :, 3], here[0, :, 3])
    assert_close(found[..., 1:3], here[..., 1:3])
    half = torch.zeros(1, 8, 3, 4)
    half[0, 2], half[0, 3] = 0.5, 0.25  # of the top side
    found = look_up(boxes, half).view(3, 4, 4)
    assert_close(found[0, 0, 1], here[0, 0, 1] + 0.5 * 1 + 0.25 * 4)


def test_a_box_turned_inside_out_stays_where_it_was() -> None:
    boxes = grid_boxes()
    boxes[0, 0, :] = torch.tensor([0.0, 0, 1, 1])
    offsets = torch.zeros(1, 8, 3, 4)
    offsets[0, 0, 0, 0] = 3  # its left side from the fourth box: 3 > 1
    assert_close(look_up(boxes, offsets), boxes)


def test_each_prior_of_a_cell_has_its_own_offsets() -> None:
    boxes = grid_boxes(2)
    offsets = torch.zeros(1, 16, 3, 4)
    offsets[0, 8] = 1  # x of the second prior's left side
    found, here = look_up(boxes, offsets).view(3, 4, 2, 4), boxes.view(3, 4, 2, 4)
    assert_close(found[:, :, 0], here[:, :, 0])
    assert_close(found[:, :3, 1, 0], here[:, 1:, 1, 0])


@pytest.mark.parametrize("probability", [0.01, 0.2])
def test_class_scores_start_at_the_prior_probability(probability: float) -> None:
    outputs = head(prior_probability=probability, num_classes=20, level_scale=False)(maps())
    assert outputs.class_logits.sigmoid().mean().item() == pytest.approx(probability, rel=0.1)


@pytest.mark.parametrize("norm", ["none", "batch", "group"])
@pytest.mark.parametrize("conv", ["plain", "separable"])
def test_every_parameter_gets_a_gradient(norm: str, conv: str) -> None:
    built = lively(head(quality=True, norm=norm, conv=conv, priors=ONE))
    outputs = built(maps())
    assert outputs.quality_logits is not None
    (outputs.class_logits.sum() + outputs.box_raw.square().sum() + outputs.quality_logits.sum()).backward()
    for name, parameter in built.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        # The mean over channels that a group norm removes is a convolution bias's only effect.
        assert parameter.grad.any(), name


@pytest.mark.parametrize("rule", [r() for r in get_args(get_args(Rule)[0])], ids=lambda r: r.type)
@pytest.mark.parametrize("priors", [ONE, Points()], ids=["one", "points"])
def test_it_takes_every_rule(rule: Any, priors: Any) -> None:
    config = DenseCriterionConfig(
        classification=QualityFocal(),
        box=Giou(),
        box_weighting="assignment",
        quality=QualityBce(),
        normalizer="quality",
    )
    check_it_trains(config.build(rule, 3), head(priors=priors, quality=True))


@pytest.mark.parametrize("config", [FreeAnchorConfig(box=Giou()), AutoAssignConfig()], ids=lambda c: c.type)
def test_it_takes_every_criterion(config: Any) -> None:
    check_it_trains(config.build(None, 3), head(priors=ONE, quality=config.uses_quality))


def check_it_trains(criterion: nn.Module, built: TaskAlignedHead) -> None:
    boxes = [torch.tensor([[2.0, 3, 40, 45], [10, 10, 30, 22]]), torch.zeros(0, 4)]
    objects = Objects.collate(boxes, [torch.tensor([0, 2]), torch.zeros(0).long()])
    losses = criterion(built(maps()), objects)
    assert losses.total.isfinite()
    losses.total.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in built.parameters())


def network() -> Any:
    torch.manual_seed(0)
    model = DenseConfig.model_validate(
        {
            "backbone": {"name": "resnet18", "levels": [3, 4]},
            "neck": {"channels": 16, "norm": "batch", "extra_levels": 1},
            "head": {"type": "task_aligned", "channels": 16, "convs": 2, "norm": "batch", "priors": {"type": "points"}},
        }
    ).build(3)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.8, 1.5)
            nn.init.normal_(module.bias, std=0.1)
            module.momentum = 1.0
    model.train()(images(4))
    return model.eval()


def images(batch: int = 1) -> Tensor:
    return torch.randint(0, 256, (batch, 3, 97, 130), generator=torch.Generator().manual_seed(1)).byte()


def test_folded_batch_norms_change_nothing() -> None:
    model = network()
    folded = fold_batch_norm(model)
    assert not [m for m in folded.modules() if "BatchNorm" in type(m).__name__]
    with torch.no_grad():
        a, b = model(images(2)), folded(images(2))
    assert_close(a.class_logits, b.class_logits, atol=1e-4, rtol=1e-4)
    assert_close(a.boxes, b.boxes, atol=1e-2, rtol=1e-4)


class Tensors(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: Tensor) -> tuple[Tensor, Tensor]:
        outputs = self.model(batch)
        return outputs.class_logits, outputs.boxes


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("how", ["trace", "export"])
def test_exports(how: str) -> None:
    module = Tensors(network())
    with torch.no_grad():
        exported = (
            torch.jit.trace(module, images(), check_trace=False)
            if how == "trace"
            else torch.export.export(module, (images(),)).module()
        )
        for a, b in zip(exported(images()), module(images()), strict=True):
            assert_close(a, b, atol=1e-3, rtol=1e-4)


def test_half_precision() -> None:
    model = network()
    with torch.no_grad():
        exact = model(images())
        with torch.autocast("cpu", torch.bfloat16):
            half = model(images())
    assert half.class_logits.dtype == half.boxes.dtype == torch.float32
    assert torch.corrcoef(torch.stack([half.class_logits.flatten(), exact.class_logits.flatten()]))[0, 1] > 0.9
