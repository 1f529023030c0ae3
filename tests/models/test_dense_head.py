"""The dense head: order, initialisation, sharing over levels, every combination of priors and coders."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from detector.coders import Bins, Deltas, Distances
from detector.models.dense_head import MOST_CACHED, DenseHead, DenseHeadConfig
from detector.models.priors import Anchors, Points
from detector.models.task_aligned_head import TaskAlignedHeadConfig

NINE, ONE, POINTS = Anchors(), Anchors(scale=8, octave_scales=1, ratios=(1,)), Points()
STRIDES, SIZES = (8, 16, 32), ((6, 7), (3, 4), (2, 2))


def _maps(batch: int = 2, channels: int = 16) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(batch, channels, *size, generator=generator) for size in SIZES]


def _head(num_classes: int = 3, **changes) -> DenseHead:  # type: ignore[no-untyped-def]
    torch.manual_seed(0)
    return DenseHeadConfig(**({"channels": 16, "convs": 2} | changes)).build(16, STRIDES, num_classes)


@pytest.mark.parametrize("priors", [NINE, ONE, POINTS])
@pytest.mark.parametrize("coder", [Deltas(), Distances(), Distances(activation="relu")])
@pytest.mark.parametrize("quality", [False, True])
def test_every_combination_gives_boxes(priors, coder, quality: bool) -> None:  # type: ignore[no-untyped-def]
    outputs = _head(priors=priors, coder=coder, quality=quality, level_scale=quality)(_maps())
    count = sum(h * w for h, w in SIZES) * priors.per_cell
    assert outputs.class_logits.shape == (2, count, 3)
    assert outputs.box_raw.shape == (2, count, coder.channels)
    assert outputs.boxes.shape == (2, count, 4)
    assert len(outputs.priors) == count
    assert (outputs.quality_logits is not None) == quality
    assert outputs.quality_logits is None or outputs.quality_logits.shape == (2, count)
    assert [(g.height, g.width, g.stride) for g in outputs.priors.grids] == [
        (*size, stride) for size, stride in zip(SIZES, STRIDES, strict=True)
    ]


@pytest.mark.parametrize("channels_last", [False, True])
def test_numbers_lie_in_the_order_of_the_priors(channels_last: bool) -> None:
    """Level, row, column, prior of the cell: the predicting layers are made to tell channel and place."""
    head = _head(priors=NINE, convs=0)
    for layer, numbers in ((head.classes, 3), (head.box, 4)):
        nn.init.zeros_(layer.weight)
        layer.weight.data[:, 0, 1, 1] = 100  # the map's first channel tells the place
        layer.bias.data = torch.arange(9.0 * numbers)
    maps = []
    for i, (height, width) in enumerate(SIZES):
        x = torch.zeros(1, 16, height, width)
        x[0, 0] = 1000 * i + 10 * torch.arange(height)[:, None] + torch.arange(width)
        maps.append(x.contiguous(memory_format=torch.channels_last) if channels_last else x)
    outputs = head(maps)
    for values, numbers in ((outputs.class_logits[0], 3), (outputs.box_raw[0], 4)):
        r = 0
        for i, grid in enumerate(outputs.priors.grids):
            for row in range(grid.height):
                for column in range(grid.width):
                    for anchor in range(9):
                        place = 100 * (1000 * i + 10 * row + column)
                        expected = [place + anchor * numbers + k for k in range(numbers)]
                        assert values[r].tolist() == expected
                        r += 1


@pytest.mark.parametrize("probability", [0.01, 0.2])
@pytest.mark.parametrize("conv", ["plain", "separable"])
@pytest.mark.parametrize("norm", ["none", "batch", "group"])
def test_class_scores_start_at_the_prior_probability(probability: float, conv: str, norm: str) -> None:
    outputs = _head(prior_probability=probability, conv=conv, norm=norm, num_classes=20)(_maps())
    scores = outputs.class_logits.sigmoid()
    assert scores.mean().item() == pytest.approx(probability, rel=0.1)
    # The focal loss of all-background, in expectation: (1 - a) p^2 (-log(1 - p)) a number.
    p = probability
    loss = (0.75 * scores**2 * -(1 - scores).log()).mean().item()
    assert loss == pytest.approx(0.75 * p**2 * -math.log(1 - p), rel=0.3)
    assert outputs.box_raw.abs().max() < 1


@pytest.mark.parametrize("kind", [DenseHeadConfig, TaskAlignedHeadConfig], ids=["dense", "task-aligned"])
@pytest.mark.parametrize("coder", [Deltas(), Distances(), Distances(activation="relu"), Bins()], ids=lambda c: c.type)
@pytest.mark.parametrize("priors", [NINE, POINTS], ids=["nine", "points"])
def test_boxes_start_where_they_should(kind, coder, priors) -> None:  # type: ignore[no-untyped-def]
    built = kind(channels=16, convs=2, coder=coder, priors=priors, start=3).build(16, STRIDES, 3)
    outputs = built([x * 0 for x in _maps()])
    distance, center = outputs.priors.stride[:, None] * 3, outputs.priors.centers
    expected = torch.cat([center - distance, center + distance], 1).expand(2, -1, -1)
    torch.testing.assert_close(outputs.boxes, expected, atol=0.05, rtol=1e-3)


def test_a_start_that_the_coder_cannot_say_is_refused() -> None:
    with pytest.raises(ValueError, match=r"start is 30 strides, but coder 'bins' says 16 for it"):
        DenseHeadConfig(coder=Bins(reg_max=16), priors=POINTS, start=30)
    assert DenseHeadConfig(coder=Bins(reg_max=16), priors=POINTS, start=15.5).start == 15.5


def test_weights_are_normal_with_the_published_deviation() -> None:
    head = _head(channels=64, norm="none")
    for conv in (head.class_tower[1].convs[0], head.box):
        assert conv.weight.std().item() == pytest.approx(0.01, rel=0.1)
        assert conv.bias.abs().max() == 0


def test_one_tower_for_all_levels() -> None:
    """The same map gives the same numbers whichever level it is, and the parameters do not grow with the levels."""
    head = _head(norm="group")
    x = torch.randn(1, 16, 5, 5)
    outputs = head([x, x, x])
    first, second, third = outputs.class_logits.split(25 * 9, dim=1)
    assert torch.equal(first, second)
    assert torch.equal(first, third)
    more = DenseHeadConfig(channels=16, convs=2).build(16, (8, 16, 32, 64, 128), 3)
    assert sum(p.numel() for p in head.parameters()) == sum(p.numel() for p in more.parameters())


def test_batch_norms_keep_the_levels_apart() -> None:
    """Levels of very different scale: what each trains on is what it infers with."""
    head = _head(norm="batch")
    assert len(head.class_tower[0].convs) == 1
    assert len(head.class_tower[0].norms) == 3
    maps = [torch.randn(2, 16, 32, 32) * 5**i + 5 * i for i in range(3)]
    for norm in [m for m in head.modules() if isinstance(m, nn.BatchNorm2d)]:
        norm.momentum = 1.0
    training = head.train()(maps)
    inference = head.eval()(maps)
    torch.testing.assert_close(training.class_logits, inference.class_logits, atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(training.box_raw, inference.box_raw, atol=1e-3, rtol=1e-3)


def test_a_map_of_one_cell_has_group_norms() -> None:
    for channels in (8, 16, 32, 64):
        head = _head(channels=channels)
        for values in (1, 2):
            outputs = head([torch.randn(values, 16, 1, 1) for _ in STRIDES])
        assert outputs.class_logits.std() > 1e-4


def test_the_levels_factors_scale_the_raw_boxes_alone() -> None:
    plain, scaled = _head(quality=True), _head(quality=True, level_scale=True)
    scaled.load_state_dict(plain.state_dict() | {"level_scale": torch.tensor([1.0, 2.0, 3.0])})
    a, b = plain(_maps()), scaled(_maps())
    factor = torch.tensor([1.0, 2.0, 3.0])[a.priors.level][:, None]
    torch.testing.assert_close(b.box_raw, a.box_raw * factor)
    assert torch.equal(a.class_logits, b.class_logits)
    assert torch.equal(a.quality_logits, b.quality_logits)
    b.box_raw.sum().backward()
    assert scaled.level_scale.grad.abs().min() > 0


def test_light_heads_have_few_parameters() -> None:
    def size(**changes) -> int:  # type: ignore[no-untyped-def]
        return sum(p.numel() for p in _head(channels=64, quality=True, **changes).parameters())

    assert size(shared_tower=True) < 0.75 * size()
    assert size(shared_tower=True, conv="separable") < 0.2 * size()


@pytest.mark.parametrize("shared_tower", [False, True])
def test_every_parameter_gets_a_gradient(shared_tower: bool) -> None:
    head = _head(quality=True, level_scale=True, norm="batch", shared_tower=shared_tower, conv="separable")
    outputs = head(_maps())
    (outputs.class_logits.sum() + outputs.boxes.square().sum() + outputs.quality_logits.sum()).backward()
    assert all(p.grad is not None for p in head.parameters())


def test_priors_are_made_once_for_each_size_and_can_be_trained_on() -> None:
    head = _head()
    with torch.inference_mode():
        first = head(_maps()).priors
    outputs = head(_maps())
    assert outputs.priors is first
    (outputs.boxes * outputs.boxes.detach()).sum().backward()  # tensors of inference mode would raise
    for side in range(1, 2 * MOST_CACHED):
        head([torch.zeros(1, 16, side, side) for _ in STRIDES])
    assert len(head._cache) == MOST_CACHED
    assert head(_maps()).priors is not first
