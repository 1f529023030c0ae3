"""Region proposals: the peer's boxes, a plain version, and images that give few."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close
from torchvision.ops import nms

from detector.boxes import clip
from detector.coders import Deltas, Distances
from detector.models.priors import Points
from detector.models.rpn import ProposalNumbers, Rpn, RpnConfig
from detector.structures import Outputs, Priors

STRIDES = (4, 8, 16, 32, 64)


def build(**settings: Any) -> Rpn:
    torch.manual_seed(0)
    return RpnConfig(channels=8, **settings).build(8, STRIDES)


def maps(size: int = 64, images: int = 2) -> list[Tensor]:
    random = torch.Generator().manual_seed(1)
    return [torch.randn(images, 8, -(-size // s), -(-size // s), generator=random) for s in STRIDES]


def loud(rpn: Rpn) -> Rpn:
    """With logits and deltas of order one."""
    with torch.no_grad():
        for module in (rpn.head.classes, rpn.head.box):
            module.weight.normal_(std=3.0)  # type: ignore[union-attr,operator]
    return rpn


def test_golden_proposals(golden: Any) -> None:
    """Top 300 a level, NMS 0.7 a level, the best 100; the peer's boxes are in original pixels."""
    file = golden("predict_rpn")
    setup, given = file.scenario("setup"), file.scenario("in")
    sizes = tuple((setup["featmaps"].prod(1) * 3).tolist())
    stride = setup["strides"].float().repeat_interleave(torch.tensor(sizes))
    outputs = Outputs(Priors(setup["anchors"], stride, sizes), given["cls"], given["box"], None, Deltas())
    numbers = ProposalNumbers(pre_nms=300, post_nms=100)
    boxes, valid = build().propose(outputs, setup["image_hw"].float(), numbers)
    assert valid.all()
    for i in range(2):
        mine = boxes[i] / setup["scale_factor_wh"][i].repeat(2)
        assert_close(mine, file.scenario(f"image{i}")["boxes"], atol=1e-3, rtol=1e-5)


def plain(rpn: Rpn, outputs: Outputs, i: int, size: Tensor, numbers: ProposalNumbers) -> Tensor:
    found, scores = [], []
    start = 0
    for count in outputs.priors.level_sizes:
        level = slice(start, start + count)
        logit, box = outputs.class_logits[i, level, 0], clip(outputs.boxes[i, level], size)
        order = logit.argsort(descending=True)[: numbers.pre_nms]
        order = order[((box[order, 2:] - box[order, :2]) > rpn.config.min_size).all(1)]
        order = order[nms(box[order], logit[order], rpn.config.nms_iou)]
        found.append(box[order])
        scores.append(logit[order])
        start += count
    best = torch.cat(scores).argsort(descending=True)[: numbers.post_nms]
    return torch.cat(found)[best]


@pytest.mark.parametrize("numbers", [ProposalNumbers(), ProposalNumbers(pre_nms=20, post_nms=30)])
@pytest.mark.parametrize("min_size", [0.0, 12.0])
def test_the_plain_version(numbers: ProposalNumbers, min_size: float) -> None:
    rpn = loud(build(nms_iou=0.5, min_size=min_size))
    outputs = rpn(maps())
    sizes = torch.tensor([[64.0, 64], [40, 52]])
    boxes, valid = rpn.propose(outputs, sizes, numbers)
    for i in range(2):
        expected = plain(rpn, outputs, i, sizes[i], numbers)
        assert_close(boxes[i][valid[i]], expected)
        assert valid[i].sum() == len(expected) > 0
        assert (boxes[i][~valid[i]] == 0).all()
        assert (boxes[i] <= sizes[i].flip(0).repeat(2)).all()


def test_proposals_do_not_depend_on_the_batch() -> None:
    rpn = loud(build())
    four = maps(images=4)
    sizes = torch.tensor([[64.0, 64], [40, 52], [64, 10], [30, 30]])
    numbers = ProposalNumbers(pre_nms=50, post_nms=40)
    together = rpn.propose(rpn(four), sizes, numbers)
    for i in range(4):
        alone = rpn.propose(rpn([x[i : i + 1] for x in four]), sizes[i : i + 1], numbers)
        assert_close(alone.boxes[0], together.boxes[i], atol=1e-3, rtol=0)
        assert torch.equal(alone.valid[0], together.valid[i])


def test_no_gradient_and_none_where_all_is_too_small() -> None:
    rpn = build(min_size=1000.0)
    boxes, valid = rpn.propose(rpn(maps()), torch.full((2, 2), 64.0), ProposalNumbers())
    assert not valid.any()
    assert not boxes.any()
    assert not boxes.requires_grad


def test_before_training_everything_may_be_an_object() -> None:
    outputs = build()(maps())
    assert outputs.class_logits.shape == (2, len(outputs.priors), 1)
    assert (outputs.class_logits.sigmoid() - 0.5).abs().max() < 0.05
    assert len(outputs.priors) == 3 * (16 * 16 + 8 * 8 + 4 * 4 + 2 * 2 + 1)


def test_points_and_distances_propose_too() -> None:
    rpn = loud(build(priors=Points(), coder=Distances(), convs=2))
    boxes, valid = rpn.propose(rpn(maps()), torch.full((2, 2), 64.0), ProposalNumbers(post_nms=10))
    assert boxes.shape == (2, 10, 4)
    assert valid.all()
