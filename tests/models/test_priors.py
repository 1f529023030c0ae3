"""Anchors and points against the peers' own, and the grids that go with them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from detector.models.priors import Anchors, GridPriors, Points

RPN = Anchors(scale=8, octave_scales=1, offset=0)
NINE = Anchors(offset=0)
ONE = Anchors(scale=8, octave_scales=1, ratios=(1,), offset=0)


def _feature_sizes(arrays: dict[str, Tensor]) -> tuple[list[tuple[int, int]], list[int]]:
    height, width = arrays["image_hw"].tolist()
    strides = arrays["strides"].tolist()
    return [(-(-height // s), -(-width // s)) for s in strides], strides


def _case(golden, size: str, name: str) -> dict[str, Tensor]:  # type: ignore[no-untyped-def]
    start = f"{name}/"
    return {k[len(start) :]: v for k, v in golden("priors").scenario(size).items() if k.startswith(start)}


@pytest.mark.parametrize("size", ["size0", "size1"])
@pytest.mark.parametrize(("name", "config"), [("retinanet", NINE), ("rpn", RPN), ("atss", ONE)])
def test_golden_anchors(golden, size: str, name: str, config: Anchors) -> None:  # type: ignore[no-untyped-def]
    arrays = _case(golden, size, name)
    priors = config(*_feature_sizes(arrays))
    assert list(priors.level_sizes) == arrays["per_level"].tolist()
    torch.testing.assert_close(priors.boxes, arrays["anchors"], atol=2e-4, rtol=0)


@pytest.mark.parametrize("size", ["size0", "size1"])
def test_golden_anchors_in_the_middle_of_the_cell(golden, size: str) -> None:  # type: ignore[no-untyped-def]
    arrays = _case(golden, size, "retinanet")
    priors = Anchors()(*_feature_sizes(arrays))
    expected = _case(golden, size, "retinanet_center_offset0.5")["anchors_l3"]
    torch.testing.assert_close(priors.boxes.split(priors.level_sizes)[3], expected, atol=2e-4, rtol=0)


@pytest.mark.parametrize("size", ["size0", "size1"])
@pytest.mark.parametrize("offset", [0.0, 0.5])
def test_golden_points(golden, size: str, offset: float) -> None:  # type: ignore[no-untyped-def]
    arrays = _case(golden, size, f"points_offset{offset}")
    priors = Points(offset=offset)(*_feature_sizes(arrays))
    assert list(priors.level_sizes) == arrays["per_level"].tolist()
    torch.testing.assert_close(priors.centers, arrays["points"][:, :2])
    torch.testing.assert_close(priors.stride, arrays["points"][:, 2])


@pytest.mark.parametrize("size", ["size0", "size1"])
def test_torchvision_differs_by_rounding_and_guessed_strides_only(golden, size: str) -> None:  # type: ignore[no-untyped-def]
    """Its base anchors are rounded to integers, and its strides are padded image over feature map; ours are neither."""
    arrays = _case(golden, size, "tv_retinanet")
    theirs = arrays["anchors"].split(arrays["per_level"].tolist())
    sizes = [tuple(x) for x in arrays["featmaps"].tolist()]
    priors = NINE(sizes, [8, 16, 32, 64, 128])
    ours = priors.boxes.split(priors.level_sizes)
    for i, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        if arrays["true_strides"][i].tolist() == [8 * 2**i] * 2:
            assert (a - b).abs().max() <= 8 / 2, "torchvision writes the octaves as whole numbers of pixels too"
            torch.testing.assert_close((a[:, :2] + a[:, 2:]) / 2, (b[:, :2] + b[:, 2:]) / 2)


@pytest.mark.parametrize("config", [Anchors(), ONE, Points(), Points(scale=1, offset=0)])
def test_the_grids_say_where_every_prior_is(config: GridPriors) -> None:
    priors = config([(3, 5), (2, 3)], [8, 16])
    assert [grid.size for grid in priors.grids] == list(priors.level_sizes)
    assert len(priors) == sum(priors.level_sizes) == 21 * config.per_cell
    i = 0
    for grid in priors.grids:
        for row in range(grid.height):
            for column in range(grid.width):
                for width, height in grid.shapes:
                    x, y = (column + grid.offset) * grid.stride, (row + grid.offset) * grid.stride
                    expected = torch.tensor([x - width / 2, y - height / 2, x + width / 2, y + height / 2])
                    torch.testing.assert_close(priors.boxes[i], expected)
                    assert priors.stride[i] == grid.stride
                    i += 1
    assert priors.level.tolist() == [0] * priors.level_sizes[0] + [1] * priors.level_sizes[1]


def test_a_point_stands_for_a_square() -> None:
    assert Points().shapes(16) == ((128.0, 128.0),)
    assert Points(scale=1).shapes(16) == ((16.0, 16.0),)


def test_a_single_level_with_all_sizes() -> None:
    """Octaves of one level are the sizes of as many levels, each of one octave."""
    one = Anchors(scale=4, octave_scales=2, octaves=3, ratios=(1,))
    levels = [Anchors(scale=4, octave_scales=2, ratios=(1,)).shapes(16 * 2**i) for i in range(3)]
    flat = [side for level in levels for shape in level for side in shape]
    assert [side for shape in one.shapes(16) for side in shape] == pytest.approx(flat)
    assert one.per_cell == 6
