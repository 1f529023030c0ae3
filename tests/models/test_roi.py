"""Features of regions: the peers' numbers, plain definitions written out in loops, and boxes that are odd."""

from __future__ import annotations

import inspect
import math
import sys
from typing import Any, get_args

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor
from torch.testing import assert_close

from detector.models.roi import Align, AnyRoi, Pool, Precise, PsAlign, PsPool, RoiExtractor, RoiOperator

KINDS: list[type[RoiOperator]] = list(get_args(get_args(AnyRoi)[0]))

GOLDEN: dict[str, RoiOperator] = {
    "roi_align_7x7_aligned_sampling0": Align(sampling_ratio=0),
    "roi_align_7x7_aligned_sampling2": Align(),
    "roi_align_7x7_legacy_sampling0": Align(sampling_ratio=0, aligned=False),
    "roi_align_7x7_legacy_sampling2": Align(aligned=False),
    "roi_align_3x5_aligned_sampling2": Align(size=(3, 5)),
    "roi_align_3x5_legacy_sampling2": Align(size=(3, 5), aligned=False),
    "roi_pool_7x7": Pool(),
    "roi_pool_3x5": Pool(size=(3, 5)),
    "ps_roi_align_3x3_sampling2": PsAlign(size=(3, 3), bin_channels=2),
    "ps_roi_pool_3x3": PsPool(size=(3, 3), bin_channels=2),
}


def bilinear(map_: Tensor, y: float, x: float) -> Tensor:
    """(C,) of a (C, H, W) map; beyond one cell outside 0, in between the nearest cell's."""
    height, width = map_.shape[1:]
    if y < -1 or y > height or x < -1 or x > width:
        return map_.new_zeros(len(map_))
    y, x = min(max(y, 0.0), height - 1.0), min(max(x, 0.0), width - 1.0)
    top, left = min(int(y), max(height - 2, 0)), min(int(x), max(width - 2, 0))
    dy, dx = y - top, x - left
    below, right = min(top + 1, height - 1), min(left + 1, width - 1)
    upper = map_[:, top, left] * (1 - dx) + map_[:, top, right] * dx
    return upper * (1 - dy) + (map_[:, below, left] * (1 - dx) + map_[:, below, right] * dx) * dy


def plain_align(operator: Align, map_: Tensor, box: list[float], scale: float) -> Tensor:
    """(C, h, w) of one box."""
    shift = 0.5 if operator.aligned else 0.0
    x1, y1, x2, y2 = (v * scale - shift for v in box)
    width, height = x2 - x1, y2 - y1
    if not operator.aligned:
        width, height = max(width, 1.0), max(height, 1.0)
    rows, columns = operator.size
    n_y = operator.sampling_ratio or max(math.ceil(height / rows), 1)
    n_x = operator.sampling_ratio or max(math.ceil(width / columns), 1)
    found = map_.new_zeros(len(map_), rows, columns)
    bins = []
    for i in range(rows):
        for j in range(columns):
            samples = [
                bilinear(map_, y1 + (i + (a + 0.5) / n_y) * height / rows, x1 + (j + (b + 0.5) / n_x) * width / columns)
                for a in range(n_y)
                for b in range(n_x)
            ]
            stack = torch.stack(samples)
            bins.append(stack.mean(0) if operator.reduce == "average" else stack.amax(0))
    return torch.stack(bins, 1).view_as(found)


def plain_pool(operator: Pool, map_: Tensor, box: list[float], scale: float) -> Tensor:
    """The box's corners rounded (halves away from zero) to whole cells, the last one inside."""
    left, top, right, bottom = (math.floor(abs(v * scale) + 0.5) * (1 if v >= 0 else -1) for v in box)
    height, width = max(bottom - top + 1, 1), max(right - left + 1, 1)
    rows, columns = operator.size
    bins = []
    for i in range(rows):
        for j in range(columns):
            y = [math.floor(i * height / rows) + top, math.ceil((i + 1) * height / rows) + top]
            x = [math.floor(j * width / columns) + left, math.ceil((j + 1) * width / columns) + left]
            y = [min(max(v, 0), map_.shape[1]) for v in y]
            x = [min(max(v, 0), map_.shape[2]) for v in x]
            inside = map_[:, y[0] : y[1], x[0] : x[1]].flatten(1)
            bins.append(inside.amax(1) if inside.shape[1] else map_.new_zeros(len(map_)))
    return torch.stack(bins, 1).view(len(map_), rows, columns)


def plain_precise(operator: Precise, map_: Tensor, box: list[float], scale: float, steps: int = 400) -> Tensor:
    """The mean of the interpolated map over each bin, by many samples; cells outside the map are 0."""
    padded = torch.nn.functional.pad(map_, (30, 30, 30, 30))
    shift = 0.5 if operator.aligned else 0.0
    x1, y1, x2, y2 = (v * scale - shift for v in box)
    rows, columns = operator.size
    step = (torch.arange(steps, dtype=map_.dtype) + 0.5) / steps
    bins = []
    for i in range(rows):
        for j in range(columns):
            y = y1 + (i + step) * (y2 - y1) / rows + 30
            x = x1 + (j + step) * (x2 - x1) / columns + 30
            top, left = y.floor().long(), x.floor().long()
            dy, dx = (y - top)[:, None], x - left
            corner = [padded[:, (top + a)[:, None], left + b] for a in (0, 1) for b in (0, 1)]
            value = (corner[0] * (1 - dx) + corner[1] * dx) * (1 - dy) + (corner[2] * (1 - dx) + corner[3] * dx) * dy
            bins.append(value.mean((1, 2)))
    return torch.stack(bins, 1).view(len(map_), rows, columns)


def random_case(seed: int = 0) -> tuple[Tensor, Tensor, float]:
    """A (2, 3, 12, 15) map of stride 8, and boxes of both images, some beyond its edges."""
    random = torch.Generator().manual_seed(seed)
    features = torch.randn(2, 3, 12, 15, generator=random, dtype=torch.float64)
    center = torch.rand(8, 2, generator=random, dtype=torch.float64) * torch.tensor([120.0, 96])
    side = 4 + 70 * torch.rand(8, 2, generator=random, dtype=torch.float64)
    boxes = torch.cat([center - side / 2, center + side / 2], 1)
    image = (torch.arange(8) % 2).double()[:, None]
    return features.requires_grad_(), torch.cat([image, boxes], 1), 1 / 8


@pytest.mark.parametrize("case", GOLDEN)
def test_torchvision_agrees(golden: Any, case: str) -> None:
    data, setup = golden("roi_ops").scenario(case), golden("roi_ops").scenario("in")
    features = setup["features_ps" if case.startswith("ps") else "features"].requires_grad_()
    out = GOLDEN[case](features, setup["rois"], setup["spatial_scale"].item())
    assert_close(out, data["out"], rtol=1e-5, atol=1e-5)
    (out * data["out_grad"]).sum().backward()
    assert_close(features.grad, data["features_grad"], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "operator",
    [
        Align(size=(3, 4)),
        Align(size=(3, 4), sampling_ratio=0),
        Align(size=(2, 3), aligned=False),
        Align(size=(3, 4), reduce="max"),
        Align(size=(2, 2), reduce="max", sampling_ratio=3, aligned=False),
        Pool(size=(3, 4)),
    ],
    ids=["average", "adaptive", "legacy", "max of four", "max of nine", "pool"],
)
def test_the_definition_in_loops(operator: Align | Pool) -> None:
    features, rois, scale = random_case()
    plain = plain_align if isinstance(operator, Align) else plain_pool
    rows = [plain(operator, features[int(r[0])], r[1:].tolist(), scale) for r in rois]  # type: ignore[arg-type,operator]
    found, expected = operator(features, rois, scale), torch.stack(rows)
    assert_close(found, expected, rtol=1e-6, atol=1e-7)
    toward = torch.randn(found.shape, dtype=torch.float64)
    mine, theirs = (torch.autograd.grad((x * toward).sum(), features)[0] for x in (found, expected))
    assert_close(mine, theirs, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("aligned", [True, False])
def test_precise_is_the_integral(aligned: bool) -> None:
    features, rois, scale = random_case(1)
    operator = Precise(size=(3, 2), aligned=aligned)
    found = operator(features, rois, scale)
    expected = torch.stack([plain_precise(operator, features[int(r[0])], r[1:].tolist(), scale) for r in rois])
    assert_close(found, expected, rtol=1e-3, atol=2e-4)


def test_precise_has_exact_gradients_for_map_and_boxes() -> None:
    features, rois, scale = random_case(2)
    image, boxes = rois[:3, :1], rois[:3, 1:].clone().requires_grad_()
    operator = Precise(size=(2, 2))
    small = features[:, :1].detach().clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda f, b: operator(f, torch.cat([image, b], 1), scale), (small, boxes))


def test_precise_is_the_same_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    features, rois, scale = random_case(3)
    whole = Precise()(features, rois, scale)
    monkeypatch.setattr("detector.models.roi.MOST_AT_ONCE", 1)
    assert_close(Precise()(features, rois, scale), whole)


def test_max_of_a_constant_map_is_the_average_of_it() -> None:
    features, rois = torch.full((1, 2, 20, 20), 3.0), torch.tensor([[0.0, 20, 20, 90, 100]])
    for operator in (Align(), Align(reduce="max"), Pool(), Precise()):
        assert_close(operator(features, rois, 1 / 8), torch.full((1, 2, 7, 7), 3.0))


def test_max_needs_a_number_of_samples() -> None:
    with pytest.raises(ValidationError, match="set sampling_ratio to 1 or more"):
        Align(reduce="max", sampling_ratio=0)


@pytest.mark.parametrize("kind", KINDS, ids=lambda k: k.model_fields["type"].default)
@pytest.mark.parametrize(
    "box",
    [[10.0, 10, 10, 10], [10.0, 10, 40, 10], [-50.0, -60, -20, -30], [500.0, 500, 600, 600], [0.0, 0, 0, 0]],
    ids=["a point", "a line", "left of the map", "right of it", "padding"],
)
def test_odd_boxes_are_finite(kind: type[RoiOperator], box: list[float]) -> None:
    extractor = RoiExtractor(kind(), 4, (4, 8))
    maps = [torch.randn(2, 4, 16, 16, requires_grad=True), torch.randn(2, 4, 8, 8, requires_grad=True)]
    found = extractor(maps, torch.tensor([[box], [[3.0, 4, 50, 60]]]))
    assert found.shape == (2, extractor.channels, 7, 7)
    assert found.isfinite().all()
    found.sum().backward()
    assert all(x.grad is None or x.grad.isfinite().all() for x in maps)


@pytest.mark.parametrize("kind", KINDS, ids=lambda k: k.model_fields["type"].default)
def test_no_boxes(kind: type[RoiOperator]) -> None:
    extractor = RoiExtractor(kind(), 4, (4, 8))
    found = extractor([torch.zeros(3, 4, 16, 16), torch.zeros(3, 4, 8, 8)], torch.zeros(3, 0, 4))
    assert found.shape == (0, extractor.channels, 7, 7)


def test_levels_by_equation_1(golden: Any) -> None:
    data = golden("roi_ops").scenario("levels")
    assert torch.equal(Align().levels(data["boxes"], (4, 8, 16, 32)), data["tv_p2_p5"].long())
    exactly = torch.tensor([[0.0, 0, 111.9, 112], [0, 0, 112, 112], [0, 0, 224, 224], [0, 0, 448, 448], [0, 0, 0, 0]])
    assert Align().levels(exactly, (4, 8, 16, 32)).tolist() == [0, 1, 2, 3, 0]
    assert Align().levels(exactly, (8, 16)).tolist() == [0, 0, 1, 1, 0]


def test_several_levels_at_once(golden: Any) -> None:
    data = golden("roi_ops").scenario("multiscale_canonical32_level3")
    operator = Align(size=(5, 5), aligned=False, canonical_size=32, canonical_level=3)
    maps = [data[f"features_s{s}"].requires_grad_() for s in (4, 8, 16, 32)]
    boxes = torch.zeros(2, 10, 4)
    boxes[0], boxes[1, :7] = data["boxes0"], data["boxes1"]
    extractor = RoiExtractor(operator, 1, (4, 8, 16, 32))
    out = extractor([*maps, torch.zeros(2, 1, 2, 3)], boxes)  # the coarsest map is the RPN's alone
    out = torch.cat([out[:10], out[10:17]])
    assert_close(out, data["out"], rtol=1e-5, atol=1e-5)
    (out * data["out_grad"]).sum().backward()
    for x, s in zip(maps, (4, 8, 16, 32), strict=True):
        assert_close(x.grad, data[f"features_grad_s{s}"], rtol=1e-4, atol=1e-5)


def test_the_same_features_with_and_without_gradient() -> None:
    extractor = RoiExtractor(Align(canonical_size=32, canonical_level=3), 3, (4, 8))
    maps = [torch.randn(2, 3, 16, 16), torch.randn(2, 3, 8, 8)]
    boxes = torch.tensor([[[0.0, 0, 60, 60], [3, 3, 9, 12]], [[8, 8, 20, 20], [1, 2, 50, 64]]])
    with torch.no_grad():
        found = extractor(maps, boxes)
    assert torch.equal(found, extractor([x.requires_grad_() for x in maps], boxes))


@pytest.mark.parametrize("aligned", [True, False])
def test_the_form_for_a_deterministic_gpu_is_the_same(aligned: bool) -> None:
    """What torchvision takes on CUDA under `train.deterministic`: plain tensor operations, run here uncompiled."""
    plain = inspect.unwrap(sys.modules["torchvision.ops.roi_align"]._roi_align)
    rois = torch.tensor([[0.0, 3, 4, 50, 61], [1, -9, 10, 20, 90], [1, 5, 5, 5, 5], [0, 30, 2, 33, 60]])
    weight = torch.randn(4, 3, 7, 7)
    maps = [torch.randn(2, 3, 16, 16).requires_grad_()]
    maps.append(maps[0].detach().clone().requires_grad_())
    kernel = Align(aligned=aligned)(maps[0], rois, 0.25)
    inside = rois.clone()
    found = plain(maps[1], inside, 0.25, 7, 7, 2, aligned)
    assert_close(found[[0, 2, 3]], kernel[[0, 2, 3]], rtol=1e-5, atol=1e-5)
    keep = torch.tensor([1.0, 0, 1, 1])[:, None, None, None]  # of boxes that leave the image by more than a cell, below
    (kernel * weight * keep).sum().backward()
    (found * weight * keep).sum().backward()
    assert_close(maps[1].grad, maps[0].grad, rtol=1e-4, atol=1e-5)
    # The kernel reads 0 beyond a cell outside, the other the nearest cell: proposals never leave the image.
    assert not torch.allclose(found[1], kernel[1])


def scattered(count: int, side: float) -> Tensor:
    """(2, count, 4) boxes of all sizes, some of them outside of the image or without area."""
    corner, size = torch.rand(2, count, 2) * 1.4 * side - 0.2 * side, torch.rand(2, count, 2).square() * side
    size[:, 0] = 0
    return torch.cat([corner, corner + size], -1)


@pytest.mark.parametrize("aligned", [True, False])
@pytest.mark.parametrize("samples", [1, 2, 3])
def test_gathered_rows_equal_the_kernel(aligned: bool, samples: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """All levels at once, values and gradients; a box that is no number gives 0."""
    torch.manual_seed(samples)
    strides, boxes = (4, 8, 16), scattered(40, 100)
    operator = Align(size=(3, 5), sampling_ratio=samples, aligned=aligned, canonical_size=32, canonical_level=3)
    extractor = RoiExtractor(operator, 8, strides)
    maps = [torch.randn(2, 8, 104 // s, 96 // s, requires_grad=True) for s in strides]
    found = extractor(maps, boxes)
    weights = torch.randn(found.shape)
    gradients = torch.autograd.grad((found * weights).sum(), maps)
    empty = extractor(maps, boxes.new_full((2, 1, 4), torch.nan))
    assert torch.equal(empty, torch.zeros_like(empty))
    monkeypatch.setattr("detector.models.roi.gathers", lambda x: False)
    expected = extractor(maps, boxes)
    assert expected.is_contiguous()
    assert_close(found, expected, atol=1e-4, rtol=1e-4)
    assert_close(gradients, torch.autograd.grad((expected * weights).sum(), maps), atol=1e-3, rtol=1e-4)


def test_half_precision_keeps_coordinates() -> None:
    """At x 1001 float16 knows only every half pixel: computed in it, 1001.25 would read another place."""
    extractor = RoiExtractor(Align(size=(1, 1), sampling_ratio=1), 1, (4,))
    ramp = torch.arange(260.0).expand(1, 1, 20, 260)
    box = torch.tensor([[[1001.25, 10, 1003.0, 20]]])
    half = extractor([(ramp / 256).half()], box)
    assert half.dtype == torch.float16
    assert abs(half.float().item() * 256 - extractor([ramp], box).item()) < 0.2


def test_position_sensitive_bins_have_channels_of_their_own() -> None:
    """The map that is 1 in the channels of one bin alone fills that bin alone."""
    rois = torch.tensor([[0.0, 16, 16, 100, 100]])
    for operator in (PsAlign(size=(2, 2), bin_channels=3), PsPool(size=(2, 2), bin_channels=3)):
        for k in range(4):
            features = torch.zeros(1, 12, 20, 20)
            features[:, k::4] = 1  # channels lie: output channel, then bin
            out = operator(features, rois, 1 / 8)
            assert_close(out.flatten(2), torch.nn.functional.one_hot(torch.tensor(k), 4).float().expand(1, 3, 4))
