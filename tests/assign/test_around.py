"""Looking only at the priors that can matter gives what looking at all gives."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from detector.assign import Assigner, Atss, CenterRegion, DualWeight, Fcos, MaxIou, Paa, TaskAligned, around
from detector.assign.pair_loss import BcePairLoss
from detector.assign.tiles import Bounds, layout
from detector.boxes import all_pairs_iou
from detector.structures import Priors
from tests.assign.make import EXACT, ONE_ANCHOR, POINT, batch, pyramid, random_boxes
from tests.assign.test_guarantees import NeverWaits, pairs_in_order, predictions

SIZE = (200, 264)
ODD = torch.tensor([[-50.0, -50, -10, -10], [0, 0, 264, 200], [-99, -99, 999, 999], [8, 8, 8, 8], [3, 90, 260, 91]])


@pytest.mark.parametrize("shapes", [POINT, EXACT], ids=["points", "three"])
def test_all_priors_in_a_region_and_each_once(shapes: tuple[tuple[float, float], ...]) -> None:
    priors = pyramid(SIZE, shapes=shapes)
    boxes = torch.cat([random_boxes(90, SIZE, 3), ODD])
    x, y = priors.centers[:, 0], priors.centers[:, 1]
    seen = []
    for rows in around.around(priors.grids, len(priors), boxes[:, None, :2], boxes[:, None, 2:]):
        for i, prior, exists in zip(*rows, strict=True):
            found = prior[exists]
            x1, y1, x2, y2 = boxes[i]
            inside = ((x > x1) & (x < x2) & (y > y1) & (y < y2)).nonzero()[:, 0]
            assert len(found.unique()) == len(found)
            assert set(inside.tolist()) <= set(found.tolist())
            seen.append(int(i))
    assert sorted(seen) == list(range(len(boxes)))


@pytest.mark.parametrize("grids", [True, False])
def test_no_prior_of_a_tile_is_better_than_its_bound(grids: bool) -> None:
    priors = pyramid(SIZE, shapes=EXACT)
    priors = priors if grids else replace(priors, grids=())
    tiles, said = layout(priors), predictions(priors, 1)
    assert sorted(tiles.prior[tiles.real].tolist()) == list(range(len(priors)))
    objects = batch(torch.cat([random_boxes(40, SIZE, 4), ODD]))
    bound = Bounds(tiles, said.boxes).iou(objects.image, objects.boxes)
    iou = all_pairs_iou(objects.boxes, said.boxes[0])[:, tiles.prior]
    assert (bound >= iou.amax(2)).all()
    assert (bound == 0).any()


VARIANTS = [
    TaskAligned(topk=200),
    TaskAligned(topk=3, alpha=0, beta=1),
    TaskAligned(beta=0),
    Paa(first=MaxIou(positive_iou=0.3, negative_iou=0.2, low_quality="first")),
    Paa(first=MaxIou(positive_iou=0.3, negative_iou=0.3, low_quality="none")),
    Paa(first=Atss(topk=20), pair_loss=BcePairLoss(box="iou"), topk=3),
    Paa(first=Fcos(), iterations=7, tolerance=0),
    DualWeight(keep_one=True),
    TaskAligned(keep_one=True),
    DualWeight(most=5),
    CenterRegion(center=0.5, shadow=0.9, min_coverage=0.3),
]


@pytest.mark.parametrize("rule", VARIANTS, ids=str)
@pytest.mark.parametrize("on", ["points", "one", "no grid"])
def test_asking_the_device_changes_nothing(rule: Assigner, on: str, monkeypatch: pytest.MonkeyPatch) -> None:
    priors: Priors = pyramid(SIZE, shapes=ONE_ANCHOR if on == "one" else POINT)
    priors = replace(priors, grids=()) if on == "no grid" else priors
    objects = batch(random_boxes(40, SIZE, 0), [], ODD[1:])
    said = predictions(priors, 3)
    # Equal boxes and logits, so that ties are met.
    said.boxes[:, 10:14], said.class_logits[:, 10:14] = (
        said.boxes[:, 10:11].clone(),
        said.class_logits[:, 10:11].clone(),
    )
    asked = rule(priors, objects, said)
    monkeypatch.setattr(around, "may_ask", lambda device: False)
    never = rule(priors, objects, said)
    with NeverWaits():
        rule(priors, objects, said)
    assert torch.equal(pairs_in_order(asked)[0], pairs_in_order(never)[0])
    torch.testing.assert_close(pairs_in_order(asked)[1], pairs_in_order(never)[1], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(asked.background_weight, never.background_weight, rtol=1e-5, atol=1e-6)
