"""IQDet's criterion: interpolation and the encoder's loss by hand and against the plain reference; every head."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from detector.assign import Atss, IqDet, around
from detector.assign.iqdet import Drawn, best_kinds, halves
from detector.coders import Distances
from detector.errors import ConfigError
from detector.losses.dense import DenseCriterionConfig
from detector.losses.iqdet import IqDetCriterionConfig, encoder_losses, interpolated
from detector.losses.objectness import Objectness
from detector.losses.quality import QualityBce
from detector.models.quality_encoder import QualityEncoderConfig
from detector.structures import Losses, Objects, Outputs, Predictions
from tests.assign.make import EXACT, ONE_ANCHOR, batch, pyramid, random_boxes
from tests.assign.test_guarantees import NeverWaits
from tests.assign.test_iqdet import components_of, levels_of, mixture_of
from tests.losses.heads import some_objects, some_outputs
from tests.losses.test_every_rule import HEADS, SIZES, STRIDES, batches
from tests.reference import iqdet as plain


def drawn_at(points: list[list[float]], kind: int = 0, level: int = 0) -> Drawn:
    """One object's points, in pixels."""
    count = len(points)
    return Drawn(
        torch.full((1, count), level),
        torch.full((1, count), kind),
        torch.tensor([points]).double(),
        torch.ones(1, count),
    )


def with_mixture(outputs: Outputs, objects: Objects, components: int = 2) -> Outputs:
    mixture = mixture_of(objects, len(outputs.priors.grids), components)
    return replace(outputs, mixture=mixture.requires_grad_())


# Interpolation.


def test_between_four_cells_by_hand() -> None:
    """Cells of 8 px with centres at 4, 12, ...: (6, 10) is a quarter of the way right, three quarters down."""
    outputs = some_outputs(batch=1, classes=1)
    objects = batch([[0.0, 0, 32, 32]])
    logits = outputs.class_logits.detach()[0, :, 0]
    found = interpolated(outputs, objects, drawn_at([[6.0, 10.0], [1.0, 31.0], [12.0, 20.0]]))
    wanted = 0.75 * 0.25 * logits[0] + 0.25 * 0.25 * logits[1] + 0.75 * 0.75 * logits[4] + 0.25 * 0.75 * logits[5]
    # The second is beyond the outermost centres, the third on a cell's own.
    torch.testing.assert_close(found.class_logits[0, :, 0], torch.stack([wanted, logits[12], logits[2 * 4 + 1]]))
    found.class_logits[0, 0, 0].backward()
    shares = outputs.class_logits.grad[0, :, 0]  # type: ignore[index]
    assert shares[[0, 1, 4, 5]].tolist() == [0.1875, 0.0625, 0.5625, 0.1875]
    assert shares.count_nonzero() == 4
    assert found.priors.boxes[0].tolist() == [-2, 2, 14, 18]  # 16 px around the point, as the cells' own


def test_boxes_that_agree_stay_the_same() -> None:
    """Four cells that say the same box say it in between too: distances are linear in the prior's place."""
    outputs = some_outputs(batch=1, classes=1, coder=Distances(activation="relu"))
    box = torch.tensor([1.0, 2, 30, 29])
    priors = outputs.priors
    raw = outputs.coder.encode(priors.boxes, priors.stride, box.expand(len(priors), 4))
    found = interpolated(
        replace(outputs, box_raw=raw[None]), batch([[0.0, 0, 32, 32]]), drawn_at([[6.0, 10], [13, 21.5]])
    )
    torch.testing.assert_close(found.boxes[0], box.expand(2, 4))


def test_interpolation_is_the_reference() -> None:
    priors = pyramid((64, 96), (8, 16, 32), EXACT)
    objects = batch(random_boxes(4, (64, 96), 0), random_boxes(3, (64, 96), 1))
    random = torch.Generator().manual_seed(0)
    logits = torch.randn(2, len(priors), 3, generator=random)
    raw, quality = torch.randn(2, len(priors), 4, generator=random), torch.randn(2, len(priors), generator=random)
    outputs = Outputs(priors, logits, raw, quality, Distances())
    predictions = Predictions(logits, priors.boxes.expand(2, -1, 4), None, mixture_of(objects, 3))
    drawn = IqDet(samples=5).points(priors, objects, predictions)
    found, levels = interpolated(outputs, objects, drawn), levels_of(priors)
    for i in range(7):
        for s in range(5):
            level, (x, y) = int(drawn.level[i, s]), drawn.center[i, s].tolist()
            shape = plain.best_shape(objects.boxes[i].tolist(), levels[level][4])
            shares = plain.between(levels[level], plain.first_prior(levels, level), shape, x, y)
            for whole, mine in ((logits, found.class_logits), (raw, found.box_raw), (quality, found.quality_logits)):
                assert mine is not None
                wanted = sum(share * whole[objects.image[i], prior] for prior, share in shares.items())
                torch.testing.assert_close(mine[0, i * 5 + s], wanted, rtol=1e-4, atol=1e-5)


# The encoder's loss.


def test_the_encoder_loss_by_hand() -> None:
    """One cell inside, of IoU 0.25: where the value is 0.5, -log 0.5 whatever the IoU; at 0.8, 1 to 3 parts."""
    priors = pyramid((16, 16), (8,), ONE_ANCHOR)
    objects = batch([[0.0, 0, 8, 8]])
    boxes = priors.boxes.clone()[None]
    boxes[0, 0] = torch.tensor([0.0, 0, 4, 4])
    said = Predictions(torch.zeros(1, 4, 3), boxes)
    for share, wanted in ((0.5, 0.69314718), (0.8, 0.25 * 0.22314355 + 0.75 * 1.60943791)):
        mixture = torch.tensor([[[[0.0, 0.0, 0.5, 0.5, share]]]])
        assert encoder_losses(mixture, priors, objects, said, 7).tolist() == pytest.approx([wanted])


@pytest.mark.parametrize("shapes", [ONE_ANCHOR, EXACT], ids=["one", "three"])
def test_the_encoder_loss_is_the_reference(shapes: tuple[tuple[float, float], ...]) -> None:
    priors = pyramid((64, 96), (8, 16, 32), shapes)
    objects = batch(random_boxes(6, (64, 96), 0), random_boxes(5, (64, 96), 1))
    random = torch.Generator().manual_seed(0)
    shift = torch.rand(2, len(priors), 4, generator=random) * 6 * torch.tensor([-1.0, -1, 1, 1])
    said = Predictions(torch.zeros(2, len(priors), 3), priors.boxes + shift)
    mixture = mixture_of(objects, 3)
    found = encoder_losses(mixture, priors, objects, said, 12)  # 12 cells of 8 px reach over the image
    for i, components in enumerate(components_of(mixture)):
        boxes = said.boxes[objects.image[i]].tolist()
        wanted = plain.encoder_loss(levels_of(priors), objects.boxes[i].tolist(), components, boxes)
        assert found[i].item() == pytest.approx(wanted, abs=1e-5)
    assert (found > 0).sum() >= 6


def test_large_objects_are_looked_at_evenly() -> None:
    """16 cells along each axis, 4 looked at: the mean is near that of all, and no more is gathered."""
    priors = pyramid((128, 128), (8,), ONE_ANCHOR)
    objects = batch([[0.0, 0, 128, 128]])
    said = Predictions(torch.zeros(1, 256, 3), priors.boxes[None])
    mixture = torch.tensor([[[[0.1, -0.2, 0.4, 0.5, 0.9]]]])
    few, all_ = (encoder_losses(mixture, priors, objects, said, n).item() for n in (4, 16))
    assert few == pytest.approx(all_, rel=0.05)
    assert few != all_


def test_the_encoder_learns_the_map_of_ious() -> None:
    """Predictions that are right in the upper left quarter of one level alone: descent puts the peak there."""
    priors = pyramid((64, 64), (8, 16), ONE_ANCHOR)
    objects = batch([[0.0, 0, 64, 64]])
    good = (priors.centers < 32).all(1) & (priors.level == 0)
    boxes = torch.where(good[:, None], objects.boxes, torch.tensor([0.0, 0, 4, 4]))
    said = Predictions(torch.zeros(1, len(priors), 3), boxes[None])
    raw = torch.zeros(1, 2, 2, 5, requires_grad=True)
    with torch.no_grad():
        raw[..., 0].copy_(torch.tensor([-0.1, 0.1]))
    optimizer = torch.optim.Adam([raw], lr=0.05)

    def mixture() -> Tensor:
        return torch.cat([raw[..., :2].tanh(), 0.05 + 0.95 * raw[..., 2:4].sigmoid(), raw[..., 4:].sigmoid() / 2], -1)

    for _ in range(200):
        optimizer.zero_grad()
        encoder_losses(mixture(), priors, objects, said, 8).sum().backward()
        optimizer.step()
    level, place = IqDet(samples=2000).points(priors, objects, replace(said, mixture=mixture().detach()))[:3:2]
    inside = ((place < 32).all(-1) & (level == 0)).float().mean()
    assert inside > 0.7  # 0.125 at first
    assert best_kinds(priors, objects).tolist() == [[0, 1]]
    assert halves(objects).tolist() == [[32, 32]]


# The criterion.


def build(**changes: Any) -> Any:
    return IqDetCriterionConfig(**changes).build(IqDet(samples=4), 3)


def test_rounded_points_are_the_dense_criterion_and_the_encoder() -> None:
    objects = some_objects()
    outputs = with_mixture(some_outputs(), objects)
    config = IqDetCriterionConfig(points="rounded")
    found: Losses = config.build(IqDet(), 3)(outputs, objects)
    dense: Losses = config.dense.build(IqDet(), 3)(outputs, objects)
    assert {k: v.item() for k, v in found.sums.items() if k != "encoder"} == {
        k: v.item() for k, v in dense.sums.items()
    }
    assert found.normalizer == dense.normalizer
    assert found.sums["encoder"].item() > 0


def test_points_between_by_plain_sums() -> None:
    """The class term: focal loss of every class at every point, and of the background that is left."""
    objects = some_objects()
    outputs = with_mixture(some_outputs(cells=8), objects)
    rule = IqDet(samples=4, negative_quality=0.3)
    criterion = IqDetCriterionConfig().build(rule, 3)
    losses: Losses = criterion(outputs, objects)
    said = outputs.detached()
    drawn, found = rule.points(outputs.priors, objects, said), rule(outputs.priors, objects, said).per_prior()
    at = interpolated(outputs, objects, drawn)
    target = torch.zeros(12, 3)
    target[torch.arange(12), objects.labels.repeat_interleave(4)] = drawn.quality.flatten()

    def focal(x: Tensor, t: Tensor) -> Tensor:
        p = x.sigmoid()
        weight = (0.25 * t + 0.75 * (1 - t)) * (p - t).abs() ** 2
        return weight * -(t * p.log() + (1 - t) * (1 - p).log())

    background = outputs.class_logits[found == -1]
    assert 0 < len(background) < found.numel() - 4
    wanted = focal(at.class_logits[0], target).sum() + focal(background, torch.zeros_like(background)).sum()
    torch.testing.assert_close(losses.sums["class"], wanted)
    assert losses.normalizer == 12
    with torch.no_grad():
        each = encoder_losses(outputs.mixture, outputs.priors, objects, said, 7)  # type: ignore[arg-type]
    torch.testing.assert_close(losses.parts["encoder"].detach(), each.mean())


def test_parts_of_a_batch_add_up() -> None:
    objects = some_objects()
    outputs = with_mixture(some_outputs(), objects)
    criterion = build()
    whole: Losses = criterion(outputs, objects)
    parts = []
    for i in range(2):
        one = replace(
            outputs,
            class_logits=outputs.class_logits[i : i + 1],
            box_raw=outputs.box_raw[i : i + 1],
            quality_logits=outputs.quality_logits[i : i + 1],  # type: ignore[index]
            mixture=outputs.mixture[objects.image == i],  # type: ignore[index]
        )
        parts.append(criterion(one, objects.select_image(i)))
    for name, value in whole.sums.items():
        torch.testing.assert_close(value, parts[0].sums[name] + parts[1].sums[name], rtol=1e-5, atol=1e-5)
    assert whole.normalizer == parts[0].normalizer + parts[1].normalizer


def test_another_rule_trains_the_encoder_too() -> None:
    objects = some_objects()
    outputs = with_mixture(some_outputs(), objects)
    criterion = build()
    criterion.assigner = Atss()
    losses: Losses = criterion(outputs, objects)
    plainly: Losses = IqDetCriterionConfig().dense.build(Atss(), 3)(outputs, objects)
    assert losses.sums["class"].item() == plainly.sums["class"].item()
    losses.total.backward()
    assert outputs.mixture.grad.abs().sum() > 0  # type: ignore[union-attr]


@pytest.mark.parametrize("points", ["between", "rounded"])
@pytest.mark.parametrize("head", HEADS)
def test_every_head_and_the_encoder_learn(head: str, points: str) -> None:
    torch.manual_seed(0)
    network, encoder = HEADS[head].build(16, STRIDES, 3), QualityEncoderConfig(channels=16).build(16, STRIDES)
    criterion = IqDetCriterionConfig(points=points).build(IqDet(), 3)
    maps = [torch.randn(2, 16, *size, generator=torch.Generator().manual_seed(1)) for size in SIZES]
    for kind, objects in batches().items():
        network.zero_grad()
        encoder.zero_grad()
        losses = criterion(replace(network(maps), mixture=encoder(maps, objects)), objects)
        losses.total.backward()
        for which, parameter in [*network.named_parameters(), *encoder.named_parameters()]:
            assert parameter.grad is not None, (kind, which)
            assert parameter.grad.isfinite().all(), (kind, which)
        found = kind != "crowds"
        assert bool(losses.sums["encoder"] > 0) == bool(losses.sums["box"] > 0) == found
        assert bool(encoder.first.weight.grad.any()) == found  # type: ignore[union-attr]


def test_objects_of_no_area_are_padding() -> None:
    boxes = torch.tensor([[5.0, 5, 5, 20], [9, 9, 9, 9], [4, 4, 24, 28]])
    outputs = with_mixture(some_outputs(batch=1), batch(boxes))
    losses: Losses = build()(outputs, batch(boxes))
    alone: Losses = build()(replace(outputs, mixture=outputs.mixture[2:]), batch(boxes[2:]))  # type: ignore[index]
    assert losses.normalizer == 4
    torch.testing.assert_close(losses.sums["box"], alone.sums["box"])
    losses.total.backward()
    assert outputs.mixture.grad.isfinite().all()  # type: ignore[union-attr]


def test_nothing_waits_for_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(around, "may_ask", lambda device: False)  # as on a device that is not its own host
    objects = some_objects()
    outputs = with_mixture(some_outputs(), objects)
    criterion = build()
    criterion(outputs, objects)  # tables are made once
    with NeverWaits():
        criterion(outputs, objects)
    encoder = QualityEncoderConfig(channels=8).build(4, (8, 16))
    maps = [torch.randn(2, 4, 4, 4), torch.randn(2, 4, 2, 2)]
    with NeverWaits():
        encoder(maps, objects)


# The encoder.


def test_what_the_encoder_says_is_a_distribution() -> None:
    objects = batch(random_boxes(9, (64, 80), 0), [])
    encoder = QualityEncoderConfig(components=3, channels=16).build(8, STRIDES)
    for p in encoder.parameters():
        torch.nn.init.normal_(p)
    found = encoder([torch.randn(2, 8, *size) * 20 for size in SIZES], objects)
    assert found.shape == (9, 3, 3, 5)
    assert (found[..., :2].abs() <= 1).all()
    assert (found[..., 2:4] >= 0.05 - 1e-6).all()
    assert (found[..., 2:4] <= 1 + 1e-6).all()
    assert (found[..., 4] >= 0).all()
    assert (found[..., 4].sum(-1) <= 1 + 1e-6).all()
    assert encoder([torch.randn(2, 8, *size) for size in SIZES], batch([], [])).shape == (0, 3, 3, 5)


def test_objects_look_at_their_own_image() -> None:
    """The same box in another image, or over another part of the map, says something else; a bystander nothing."""
    encoder = QualityEncoderConfig(channels=16).build(8, STRIDES)
    maps = [torch.randn(2, 8, *size, generator=torch.Generator().manual_seed(0)) for size in SIZES]
    box = [8.0, 8, 40, 40]
    found = encoder(maps, batch([box, [30.0, 8, 62, 40]], [box]))
    alone = encoder([x[1:] for x in maps], batch([box]))
    torch.testing.assert_close(found[2], alone[0])
    assert not torch.allclose(found[0], found[2])
    assert not torch.allclose(found[0], found[1])


# What is refused.


def test_what_does_not_fit_is_named() -> None:
    with pytest.raises(ConfigError, match=r"the model has none: set model.encoder=\{\}"):
        build()(some_outputs(), some_objects())
    with pytest.raises(ConfigError, match=r"set assigner\.type=iqdet"):
        IqDetCriterionConfig().build(None, 3)
    with pytest.raises(ValueError, match="set points=rounded"):
        IqDetCriterionConfig(dense=DenseCriterionConfig(quality=Objectness()))
    with pytest.raises(ConfigError, match="3 class logits a prior, criterion expects 5"):
        IqDetCriterionConfig(dense=DenseCriterionConfig(quality=QualityBce())).build(IqDet(), 5)(
            with_mixture(some_outputs(), some_objects()), some_objects()
        )
