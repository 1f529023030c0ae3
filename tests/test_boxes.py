"""Box geometry: golden values of mmdetection and torchvision, and what must hold for any boxes."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from detector import boxes as B

MEASURES = [B.pairwise_iou, B.pairwise_giou, B.pairwise_diou, B.pairwise_ciou]
coordinate = st.floats(-500, 1500, width=32, allow_subnormal=False)


@st.composite
def box_lists(draw: st.DrawFn, most: int = 6) -> torch.Tensor:
    """Any boxes, those without width or height included."""
    rows = draw(st.lists(st.tuples(coordinate, coordinate, coordinate, coordinate), min_size=1, max_size=most))
    corners = torch.tensor(rows, dtype=torch.float32)
    return torch.cat([corners[:, :2].minimum(corners[:, 2:]), corners[:, :2].maximum(corners[:, 2:])], 1)


def test_iou_by_hand() -> None:
    a = torch.tensor([[0.0, 0, 10, 10], [0, 0, 10, 10], [0, 0, 10, 10]])
    b = torch.tensor([[5.0, 0, 15, 10], [20, 20, 30, 30], [0, 0, 10, 10]])
    assert_close(B.pairwise_iou(a, b), torch.tensor([1 / 3, 0, 1]))
    assert_close(B.pairwise_giou(a, b), torch.tensor([1 / 3, -700 / 900, 1]))
    assert_close(B.pairwise_diou(a, b), torch.tensor([1 / 3 - 25 / 325, -800 / 1800, 1]))
    assert_close(B.coverage(a, b), torch.tensor([0.5, 0, 1]))


def test_golden_iou(golden) -> None:  # type: ignore[no-untyped-def]
    data = golden("iou")
    for name in data.scenarios():
        s = data.scenario(name)
        if name == "degenerate":
            a = b = s["boxes"]
        else:
            a, b = s["boxes1"], s["boxes2"]
            one, two = s["aligned1"], s["aligned2"]
            assert_close(B.pairwise_iou(one, two), s["iou_aligned"], rtol=1e-5, atol=1e-6)
            assert_close(B.pairwise_giou(one, two), s["giou_aligned"], rtol=1e-5, atol=1e-6)
            assert_close(B.coverage(one, two), s["iof_aligned"], rtol=1e-5, atol=1e-6)
            assert_close(B.pairwise_diou(a[:, None], b), s["tv_diou"], rtol=1e-5, atol=1e-6)
            assert_close(B.pairwise_ciou(a[:, None], b), s["tv_ciou"], rtol=1e-5, atol=1e-6)
        assert_close(B.all_pairs_iou(a, b), s["iou"], rtol=1e-5, atol=1e-6)
        assert_close(B.coverage(a[:, None], b), s["iof"], rtol=1e-5, atol=1e-6)
        assert_close(B.pairwise_giou(a[:, None], b), s["giou"], rtol=1e-5, atol=1e-6)


@settings(deadline=None, max_examples=150)
@given(box_lists(), box_lists())
def test_measures_of_any_boxes(a: torch.Tensor, b: torch.Tensor) -> None:
    iou, giou = B.all_pairs_iou(a, b), B.pairwise_giou(a[:, None], b)
    assert iou.shape == (len(a), len(b))
    assert ((iou >= 0) & (iou <= 1 + 1e-6)).all()
    assert_close(iou, B.all_pairs_iou(b, a).T)
    assert (giou <= iou + 1e-5).all()
    assert (giou >= -1 - 1e-5).all()
    assert (B.pairwise_diou(a[:, None], b) <= iou + 1e-6).all()
    assert ((B.coverage(a[:, None], b) >= 0) & (B.coverage(a[:, None], b) <= 1 + 1e-5)).all()
    large = (B.area(a) > 1).float()
    assert_close(B.pairwise_iou(a, a) * large, large)
    assert_close(B.pairwise_ciou(a, a) * large, large)


@settings(deadline=None, max_examples=80)
@given(box_lists(), st.data())
def test_gradients_are_finite_for_any_boxes(b: torch.Tensor, data: st.DataObject) -> None:
    """Identical, touching, without area: whatever a head says, it gets a gradient it can use."""
    other = data.draw(st.one_of(st.just(b), st.just(b[:, [0, 1, 0, 1]]), st.just(b + 10)))
    for measure in MEASURES:
        a = other.clone().requires_grad_()
        value = measure(a, b)
        value.sum().backward()
        assert value.isfinite().all()
        assert a.grad is not None
        assert a.grad.isfinite().all(), measure


@pytest.mark.parametrize("measure", MEASURES)
def test_inside_out_boxes_have_no_area(measure) -> None:  # type: ignore[no-untyped-def]
    turned, plain = torch.tensor([[10.0, 10, 0, 0]], requires_grad=True), torch.tensor([[0.0, 0, 10, 10]])
    assert B.area(turned) == 0
    value = measure(turned, plain)
    assert value <= 0
    (gradient,) = torch.autograd.grad(value.sum(), turned)
    assert gradient.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_left_before_anything_overflows(dtype: torch.dtype) -> None:
    b = torch.tensor([[0.0, 0, 512, 512]], dtype=dtype)  # 262,144 square pixels; float16 ends at 65,504
    assert B.area(b).dtype == torch.float32
    for measure in MEASURES:
        assert measure(b, b) == 1


def test_formats_and_back() -> None:
    b = torch.tensor([[1.0, 2, 5, 10], [0, 0, 3, 3]])
    assert_close(B.to_cxcywh(b), torch.tensor([[3.0, 6, 4, 8], [1.5, 1.5, 3, 3]]))
    assert_close(B.from_cxcywh(B.to_cxcywh(b)), b)


def test_clip_to_each_image() -> None:
    b = torch.tensor([[[-5.0, -5, 50, 50]], [[10, 20, 300, 400]]])
    sizes = torch.tensor([[40.0, 30], [100, 200]])  # height, width
    assert_close(B.clip(b, sizes[:, None]), torch.tensor([[[0.0, 0, 30, 40]], [[10, 20, 200, 100]]]))
