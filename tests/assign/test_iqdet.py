"""IQDet's sampling: by hand, against the plain reference, and how often what is drawn."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from detector.assign import IqDet, around
from detector.assign.distribution import DRAW, Distribution, random_numbers
from detector.seeding import STEP, integer
from detector.structures import BACKGROUND, IGNORED, Objects, Predictions, Priors
from tests.assign.make import EXACT, ONE_ANCHOR, POINT, batch, pyramid, random_boxes, without_grids
from tests.assign.test_guarantees import NeverWaits
from tests.assign.test_rules_dense import assert_same
from tests.reference import iqdet as plain
from tests.reference.rules_dense import dense_rule

SIZE = (96, 128)
STRIDES = (8, 16, 32)


def levels_of(priors: Priors) -> list[plain.Level]:
    return [(g.height, g.width, g.stride, g.offset, list(g.shapes)) for g in priors.grids]


def mixture_of(objects: Objects, levels: int, components: int = 2, seed: int = 0) -> Tensor:
    """(N, L, M, 5) that depends on each object's size alone, so that permuting and moving objects permutes it."""
    random = torch.Generator().manual_seed(seed)
    wave = torch.rand(2, levels, components, 5, generator=random) * 6
    sides = objects.boxes[:, 2:] - objects.boxes[:, :2]
    number = (((sides[:, 0, None, None, None] * wave[0] + sides[:, 1, None, None, None] * wave[1]).sin()) + 1) / 2
    share = number[..., 4:] / components
    return torch.cat([number[..., :2] * 1.6 - 0.8, 0.1 + number[..., 2:4], share], -1)


def said(priors: Priors, objects: Objects, mixture: Tensor | None) -> Predictions:
    images = objects.batch_size
    return Predictions(
        torch.zeros(images, len(priors), 3),
        priors.boxes.expand(images, -1, -1),
        torch.zeros(images, len(priors)),
        mixture,
    )


def with_encoder(rule: IqDet, priors: Priors, objects: Objects) -> Tensor:
    return rule(priors, objects, said(priors, objects, mixture_of(objects, len(priors.grids)))).per_prior()


def components_of(mixture: Tensor) -> list[list[list[plain.Component]]]:
    return [[[tuple(c) for c in level] for level in one] for one in mixture.double().tolist()]  # type: ignore[misc]


def step_seed() -> int:
    return integer(torch.initial_seed(), STEP, DRAW)


# By hand.


def test_the_value_of_a_mixture_by_hand() -> None:
    # exp(-1/2) of 0.6 one deviation to the right of the first, and exp(-2) of 0.3 two deviations above the second.
    mixture = Distribution(
        mean=torch.tensor([[0.0, 0.0], [0.2, 0.9]]),
        deviation=torch.tensor([[0.2, 0.5], [1.0, 0.45]]),
        share=torch.tensor([0.6, 0.3]),
    )
    found = mixture.value(torch.tensor([0.2, 0.0]))
    assert found.item() == pytest.approx(0.6 * 0.60653066 + 0.3 * 0.13533528, abs=1e-6)


def test_points_by_hand() -> None:
    # Two levels of one component: masses 0.4 * 0.1^2 and 0.1 * 0.2^2 (nothing of them lies outside): half and half.
    mixture = Distribution(
        mean=torch.tensor([[[[0.5, 0.0]], [[0.0, -0.25]]]]),
        deviation=torch.tensor([[[[0.1, 0.1]], [[0.2, 0.2]]]]),
        share=torch.tensor([[[0.4], [0.1]]]),
    )
    random = torch.tensor([[[0.49, 0.5, 0.5], [0.51, 0.841344746, 0.5], [0.2, 0.5, 0.022750132]]], dtype=torch.float64)
    level, place = mixture.draw(random)
    assert level.tolist() == [[0, 1, 0]]
    wanted = torch.tensor([[0.5, 0.0], [0.2, -0.25], [0.5, -0.2]]).double()  # +1 deviation, -2 deviations
    torch.testing.assert_close(place[0], wanted, rtol=0, atol=1e-4)  # the box cuts off 1e-4 of one


def test_cells_by_hand() -> None:
    """A sharp peak at a quarter of the object: every point goes to one cell, whose neighbours are left alone."""
    priors = pyramid((32, 32), strides=(8,), shapes=ONE_ANCHOR)
    objects = batch([[0.0, 0, 32, 32]])
    # Centres are at 4, 12, 20, 28; the peak at (-0.25, 0.25) is pixel (12, 20), of value 0.8.
    mixture = torch.tensor([[[[-0.25, 0.25, 0.01, 0.01, 0.8]]]])
    found = IqDet()(priors, objects, said(priors, objects, mixture))
    kept = found.weight > 0
    assert found.prior[kept].tolist() == [2 * 4 + 1]
    assert found.quality[kept].item() == pytest.approx(0.8)
    assert not found.ignored.any()
    # Wider, of half a cell: beside the peak the value is 0.8 exp(-2) = 0.108, in diagonal cells 0.8 exp(-4) = 0.015.
    mixture = torch.tensor([[[[-0.25, 0.25, 0.25, 0.25, 0.8]]]])
    found = IqDet()(priors, objects, said(priors, objects, mixture)).per_prior()[0].view(4, 4)
    open_ = torch.tensor([[0, 0, 0, 0], [0, 1, 0, 0], [1, 1, 1, 0], [0, 1, 0, 0]]).bool()
    assert (found[open_] != BACKGROUND).all()
    assert (found[2, 1], found[0, 3]) == (0, BACKGROUND)
    assert (found[~open_] != IGNORED).all()


def test_a_static_level_by_hand() -> None:
    """Sides of 32 px suit squares of 32 px; those of 16 and 64 px are two deviations of half an octave off."""
    priors = pyramid((64, 64), strides=(2, 4, 8), shapes=((8.0, 8.0),))
    objects = batch([[8.0, 8, 40, 40]])
    rule = IqDet()
    shares = rule.distribution(priors, objects, None, torch.tensor([[0, 1, 2]])).share[0, :, 0]
    assert shares.tolist() == pytest.approx([0.13533528, 1, 0.13533528], abs=1e-6)


# Against the reference.


@pytest.mark.parametrize("shapes", [POINT, ONE_ANCHOR, EXACT], ids=["points", "one", "three"])
@pytest.mark.parametrize("encoder", [True, False], ids=["encoder", "static"])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_reference_assigns_the_same(shapes: tuple[tuple[float, float], ...], encoder: bool, seed: int) -> None:
    priors = pyramid(SIZE, STRIDES, shapes)
    boxes = random_boxes(9, SIZE, seed)
    boxes = torch.cat([boxes, boxes[:1]])  # twins
    objects = batch(boxes)
    rule = IqDet(samples=6, negative_quality=0.2)
    levels = levels_of(priors)
    mixture = mixture_of(objects, 3, seed=seed) if encoder else None
    found = rule(priors, objects, said(priors, objects, mixture))
    each = (
        [plain.static(b, levels, 0.35, 0.5) for b in boxes.double().tolist()]
        if mixture is None
        else components_of(mixture)
    )
    taken, ignored = plain.assign(levels, boxes.double().tolist(), each, step_seed(), 6, 0.2)
    kept = found.weight > 0
    ours = {p: (o, q) for p, o, q in zip(*(t[kept].tolist() for t in (found.prior, found.object, found.quality)))}  # noqa: B905
    assert len(taken) >= 5
    assert {p: o for p, (o, _) in ours.items()} == {p: o for p, (o, _) in taken.items()}
    for p, (_, quality) in ours.items():
        assert quality == pytest.approx(taken[p][1], abs=1e-5)
    assert set(found.ignored[0].nonzero().squeeze(1).tolist()) == ignored
    assert ignored or not encoder
    assert_same(dense_rule(rule, priors, objects, said(priors, objects, mixture)), found)  # and so does the dense form


def test_random_numbers_are_the_reference_hash() -> None:
    objects = batch(random_boxes(5, SIZE, 0))
    found = random_numbers(objects, 4)
    for box, mine in zip(objects.boxes.tolist(), found.tolist(), strict=True):
        assert mine == [list(t) for t in plain.numbers(step_seed(), box, 4)]


# How often what is drawn.


def test_points_follow_the_distribution() -> None:
    """20,000 points of one object: the share of each quarter on each level is that of the distribution's integral."""
    mixture = torch.tensor(
        [[[[0.5, 0.4, 0.3, 0.5, 0.3], [-0.7, 0, 0.2, 0.3, 0.5]], [[0.9, -0.9, 0.6, 0.4, 0.6], [0, 0, 1, 1, 0.1]]]]
    )
    distribution = Distribution.unpack(mixture)
    level, place = distribution.draw(random_numbers(batch([[0.0, 0, 37, 51]]), 20_000))
    assert (place.abs() <= 1).all()
    axis = (torch.arange(200) + 0.5) / 100 - 1
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    grid = torch.stack([x, y], -1)
    value = torch.stack([Distribution(*(t[0, i] for t in distribution)).value(grid) for i in range(2)])
    share = value.view(2, 2, 100, 2, 100).sum((2, 4)) / value.sum()
    corner = level[0] * 4 + (place[0, :, 1] > 0) * 2 + (place[0, :, 0] > 0)
    often = torch.bincount(corner, minlength=8) / 20_000
    torch.testing.assert_close(often, share.flatten(), rtol=0, atol=0.012)  # 3.4 deviations of a share of a half


def test_a_step_repeats_and_the_next_differs() -> None:
    objects = batch(random_boxes(20, SIZE, 0))
    before = torch.initial_seed()
    try:
        torch.manual_seed(5)
        one = random_numbers(objects, 12)
        torch.rand(100)  # what was drawn meanwhile does not matter
        two = random_numbers(objects, 12)
        state = torch.get_rng_state()
        random_numbers(objects, 12)
        assert torch.equal(state, torch.get_rng_state())
        torch.manual_seed(6)
        three = random_numbers(objects, 12)
    finally:
        torch.manual_seed(before)
    assert torch.equal(one, two)
    assert not (one == three).any()
    assert len(one.unique()) == one.numel()
    assert one.mean().item() == pytest.approx(0.5, abs=0.04)  # 720 numbers: a deviation is 0.011


# What every rule promises, with an encoder.

SHAPES = pytest.mark.parametrize("shapes", [POINT, ONE_ANCHOR, EXACT], ids=["points", "one", "three"])


@SHAPES
def test_order_and_company_change_nothing(shapes: tuple[tuple[float, float], ...]) -> None:
    priors = pyramid(SIZE, shapes=shapes)
    a, b = random_boxes(12, SIZE, 3), random_boxes(7, SIZE, 4)
    whole = with_encoder(IqDet(), priors, batch(a, b))
    assert torch.equal(whole[0], with_encoder(IqDet(), priors, batch(a))[0])
    alone = with_encoder(IqDet(), priors, batch(b))[0]
    assert torch.equal(whole[1], torch.where(alone >= 0, alone + 12, alone))
    order = torch.randperm(12, generator=torch.Generator().manual_seed(0))
    other = with_encoder(IqDet(), priors, batch(a[order]))[0]
    assert torch.equal(torch.where(other >= 0, order[other.clamp(min=0)], other), whole[0])
    assert (whole == IGNORED).any()


@SHAPES
def test_translation_by_a_stride(shapes: tuple[tuple[float, float], ...]) -> None:
    priors = pyramid((640, 640), shapes=shapes)
    boxes = (random_boxes(20, (256, 256), 6) * 8).round() / 8 + 128
    one, two = (with_encoder(IqDet(), priors, batch(b))[0] for b in (boxes, boxes + 128))
    start = 0
    for g in priors.grids:
        a, b = (x[start : start + g.size].view(g.height, g.width, -1) for x in (one, two))
        cells = 128 // g.stride
        assert torch.equal(a[:-cells, :-cells], b[cells:, cells:])
        start += g.size


def test_never_waits_and_shapes_are_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(around, "may_ask", lambda device: False)  # as on a device that is not its own host
    priors = pyramid(SIZE, shapes=EXACT)
    for count in (3, 2000):
        objects = batch(random_boxes(count, SIZE, 0), [])
        told = said(priors, objects, mixture_of(objects, 5))
        real = IqDet()(priors, objects, told)
        with NeverWaits():
            IqDet()(priors, objects, told)
        assert told.mixture is not None
        away = Predictions(told.class_logits.to("meta"), told.boxes.to("meta"), None, told.mixture.to("meta"))
        found = IqDet()(priors.to("meta"), objects.to("meta"), away)
        assert found.prior.shape == real.prior.shape


def test_half_precision_mixture_is_read_in_float32() -> None:
    priors, objects = pyramid(SIZE), batch(random_boxes(6, SIZE, 0))
    mixture = mixture_of(objects, 5).half()
    told = said(priors, objects, mixture)
    assert torch.equal(
        IqDet()(priors, objects, told).per_prior(),
        IqDet()(priors, objects, replace(told, mixture=mixture.float())).per_prior(),
    )


def test_bad_mixtures_are_named() -> None:
    priors, objects = pyramid(SIZE), batch(random_boxes(6, SIZE, 0))
    with pytest.raises(ValueError, match=r"mixture has shape \(6, 3, 2, 5\), expected \(6, 5, any, 5\)"):
        IqDet()(priors, objects, said(priors, objects, mixture_of(objects, 3)))
    with pytest.raises(RuntimeError, match="encoder's predictions hold NaN"):
        IqDet()(priors, objects, said(priors, objects, mixture_of(objects, 5) * torch.nan))
    with pytest.raises(Exception, match="iqdet gives objects to cells of a grid"):
        IqDet()(without_grids(priors), objects, said(priors, objects, None))
