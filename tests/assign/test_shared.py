"""What rules promise whose priors may learn several objects: of pairs, where test_guarantees.py looks at priors."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from detector.structures import Assignment, Objects, Predictions, Priors
from tests.assign.make import EXACT, ONE_ANCHOR, POINT, batch, pyramid, random_boxes
from tests.assign.test_guarantees import RULES, SIZE, Told, fitting

SHARED = [rule for rule in RULES if rule.shares]


@pytest.fixture(params=SHARED, ids=lambda rule: rule.type)
def rule(request: pytest.FixtureRequest) -> Told:
    return Told(request.param)


@pytest.fixture(params=[POINT, ONE_ANCHOR, EXACT], ids=["points", "one", "three"])
def priors(request: pytest.FixtureRequest) -> Priors:
    return pyramid(SIZE, shapes=request.param)


def pairs(found: Assignment, image: int, objects: Tensor | None = None) -> Tensor:
    """(P, 4) prior, object (by another name, if given), quality and weight of one image's pairs, in order."""
    kept = (found.weight > 0) & (found.prior // found.num_priors == image)
    owner = found.object[kept] if objects is None else objects[found.object[kept]]
    columns = (found.prior[kept] % found.num_priors, owner, found.quality[kept], found.weight[kept])
    rows = torch.stack([c.double() for c in columns], 1)
    for column in (3, 2, 1, 0):
        rows = rows[rows[:, column].sort(stable=True).indices]
    return rows


def same(found: Assignment, image: int, other: Assignment, of: int, objects: Tensor | None = None) -> None:
    """`found` of one image is `other` of another; `objects` says what other's objects are called in `found`."""
    mine, theirs = pairs(found, image), pairs(other, of, objects)
    assert torch.equal(mine[:, :2], theirs[:, :2])
    torch.testing.assert_close(mine[:, 2:], theirs[:, 2:], rtol=1e-5, atol=1e-6)
    assert torch.equal(found.ignored[image], other.ignored[of])
    if found.background_weight is not None and other.background_weight is not None:
        torch.testing.assert_close(found.background_weight[image], other.background_weight[of], rtol=1e-5, atol=1e-6)


def test_there_are_such_rules() -> None:
    assert {rule.type for rule in SHARED} == {"yolo_ratio", "uniform", "center_gaussian", "dw"}


def test_an_image_without_objects_among_others(rule: Told, priors: Priors) -> None:
    boxes = random_boxes(5, SIZE, 0)
    found = rule(priors, batch(boxes, [], boxes))
    assert not len(pairs(found, 1))
    same(found, 2, found, 0, torch.arange(10) + 5)
    assert len(pairs(found, 0))


def test_batch_equals_loop_over_images(rule: Told, priors: Priors) -> None:
    images = [random_boxes(n, SIZE, n) for n in (7, 0, 40, 1)]
    regions = [random_boxes(n, SIZE, 9 + n) for n in (0, 2, 1, 3)]
    sizes = torch.tensor([[200.0, 264], [120, 130], [199, 100], [64, 64]])
    objects = batch(*images, ignore=regions, sizes=sizes)
    whole = rule(priors, objects)
    start = 0
    for i, boxes in enumerate(images):
        same(whole, i, rule(priors, objects.select_image(i)), 0, torch.arange(len(boxes)) + start)
        start += len(boxes)


@pytest.mark.parametrize(
    "box",
    [
        [101.3, 57.2, 101.9, 57.6],
        [-300.0, -200, 900, 800],
        [0.0, 0, 264, 1],
        [50.0, 60, 50, 60],
        [300.0, 300, 310, 320],
    ],
    ids=["tiny", "larger than the image", "thin", "of no area", "outside"],
)
def test_odd_objects(rule: Told, priors: Priors, box: list[float]) -> None:
    plain = [[30.0, 30, 90, 90]]
    found, alone = rule(priors, batch([box], plain)), rule(priors, batch(plain))
    same(found, 1, alone, 0, torch.arange(1) + 1)
    for value in (found.quality, found.weight):
        assert value.isfinite().all()
        assert (value >= 0).all()
    if found.background_weight is not None:
        assert ((found.background_weight >= 0) & (found.background_weight <= 1)).all()


def test_twins_share_all(rule: Told, priors: Priors) -> None:
    twins = batch([[40.0, 40, 104, 104], [40.0, 40, 104, 104]])
    found = rule(priors, replace(twins, labels=torch.zeros_like(twins.labels)))
    rows = pairs(found, 0)
    one, two = (rows[rows[:, 1] == i] for i in (0, 1))
    assert len(one)
    assert torch.equal(one[:, 0], two[:, 0])
    # Not to the last bit: sums of an object's own are taken in whatever order its place in a table of objects gives.
    torch.testing.assert_close(one[:, 2:], two[:, 2:], rtol=1e-5, atol=1e-9)


def test_permuting_objects_permutes_the_result(rule: Told, priors: Priors) -> None:
    objects = batch(random_boxes(40, SIZE, 3))
    order = torch.randperm(40, generator=torch.Generator().manual_seed(0))
    permuted = replace(objects, boxes=objects.boxes[order], labels=objects.labels[order])
    same(rule(priors, objects), 0, rule(priors, permuted), 0, order)


def test_permuting_images_permutes_the_result(rule: Told, priors: Priors) -> None:
    a, b = random_boxes(8, SIZE, 3), random_boxes(5, SIZE, 4)
    one, two = rule(priors, batch(a, b)), rule(priors, batch(b, a))
    same(one, 0, two, 1, torch.arange(13) - 5)
    same(one, 1, two, 0, torch.arange(13) + 8)


def test_objects_need_no_order_by_image(rule: Told, priors: Priors) -> None:
    image = torch.tensor([1, 0, 1, 1, 0, 0])
    none = torch.zeros(0, dtype=torch.long)
    mixed = Objects(random_boxes(6, SIZE, 5), torch.arange(6) % 3, image, torch.zeros(0, 4), none, 2)
    order = image.argsort(stable=True)
    in_order = replace(mixed, boxes=mixed.boxes[order], image=image[order], labels=mixed.labels[order])
    for i in (0, 1):
        same(rule(priors, mixed), i, rule(priors, in_order), i, order)


def test_translation_by_a_stride_changes_nothing(rule: Told, priors: Priors) -> None:
    shapes = tuple((w / 8, h / 8) for w, h in priors.grids[0].shapes)
    wide = pyramid((1280, 1280), shapes=shapes)
    boxes = (random_boxes(20, (256, 256), 6) * 8).round() / 8 + 512
    said = fitting(wide, 1)
    one, two = (rule(wide, batch(boxes + by), said) for by in (0, 128))
    moved, start = [], 0
    for g in wide.grids:
        prior = torch.arange(g.size).view(g.height, g.width, -1) + start
        cells = 128 // g.stride
        table = torch.full_like(prior, -1)
        table[:-cells, :-cells] = prior[cells:, cells:]
        moved.append(table.flatten())
        start += g.size
    to = torch.cat(moved)
    rows, expected = pairs(one, 0), pairs(two, 0)
    rows[:, 0] = to[rows[:, 0].long()].double()
    rows = rows[(rows[:, 1] + rows[:, 0] * 100).sort(stable=True).indices]
    assert len(rows)
    assert torch.equal(rows[:, :2], expected[:, :2])
    torch.testing.assert_close(rows[:, 2:], expected[:, 2:], rtol=1e-4, atol=1e-5)


def test_several_objects_of_one_prior_are_several_pairs(rule: Told, priors: Priors) -> None:
    close = [[37.0, 37, 99, 99], [38.0, 37, 100, 99]]
    rows = pairs(rule(priors, batch(close)), 0)
    owners = [set(rows[rows[:, 1] == i][:, 0].tolist()) for i in (0, 1)]
    assert owners[0] & owners[1]


def test_predictions_are_used_where_they_are_said_to_be(rule: Told, priors: Priors) -> None:
    objects = batch(random_boxes(6, SIZE, 0))
    plain = fitting(priors, 1)
    other = Predictions(plain.class_logits.flip(1), plain.boxes.flip(1).contiguous(), plain.quality_logits)
    a, b = pairs(rule(priors, objects, plain), 0), pairs(rule(priors, objects, other), 0)
    assert torch.equal(a, b) == (rule.type in ("yolo_ratio", "center_gaussian"))
