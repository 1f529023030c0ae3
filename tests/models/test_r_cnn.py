"""R-CNN: what the crops show, that detections are whoever else is in the batch, and what it refuses."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor
from torch.testing import assert_close

from detector.losses.two_stage import TwoStageCriterionConfig
from detector.models.fold import fold_batch_norm
from detector.models.r_cnn import AT_ONCE, Crops, RCnnConfig, RCnnDetector
from detector.models.stages import TwoStageOutputs
from detector.structures import Objects, Outputs

SIZES = torch.tensor([[64.0, 90], [40, 60]])
LIGHT: dict[str, Any] = {
    "backbone": {"name": "resnet10t", "levels": [5]},
    "crop": 32,
    "context": 4,
    "rules": {"sampler": {"type": "random", "count": 12}},
    "head": {"linear": 1, "channels": 16},
}


def build(**changes: Any) -> RCnnDetector:
    torch.manual_seed(0)
    model = RCnnConfig.model_validate({**LIGHT, **changes}).build(3)
    with torch.no_grad():
        for head in model.heads:
            head.classes.weight.normal_(std=0.5)  # type: ignore[union-attr,operator]
            head.box.weight.normal_(std=0.5)  # type: ignore[union-attr,operator]
    return model


def images() -> Tensor:
    random = torch.Generator().manual_seed(2)
    found = torch.randint(0, 256, (2, 3, 64, 96), dtype=torch.uint8, generator=random)
    found[0, :, :, 90:], found[1, :, 40:], found[1, :, :, 60:] = 0, 0, 0
    return found


def proposals(count: int = 9) -> Tensor:
    random = torch.Generator().manual_seed(3)
    corner = torch.rand(2, count, 2, generator=random) * SIZES[:, None].flip(-1) * 0.6
    return torch.cat([corner, corner + 6 + torch.rand(2, count, 2, generator=random) * 14], -1)


def plain_crop(image: Tensor, box: Tensor, side: int, context: int) -> Tensor:
    """The mean over each pixel of the crop of samples so fine that their places do not matter; 0 outside."""
    fine, (height, width) = 24, image.shape[1:]
    inner = side - 2 * context
    steps = ((torch.arange(side * fine) + 0.5) / fine - context) / inner
    ys, xs = box[1] + steps * (box[3] - box[1]), box[0] + steps * (box[2] - box[0])
    framed = torch.nn.functional.pad(image, (50, 50, 50, 50))
    grid = torch.stack(torch.meshgrid(ys + 50, xs + 50, indexing="ij")[::-1], -1)
    grid = grid / torch.tensor([width + 100.0, height + 100.0]) * 2 - 1
    found = torch.nn.functional.grid_sample(framed[None], grid[None], align_corners=False)
    return torch.nn.functional.avg_pool2d(found, fine)[0]


@pytest.mark.parametrize("box", [(10.0, 8, 40, 50), (0, 0, 20, 12), (30.5, 20.25, 59, 39), (5, 5, 9, 37)])
def test_a_crop_is_the_warped_box_with_what_is_around_it(box: tuple[float, ...]) -> None:
    image = torch.rand(3, 40, 60, generator=torch.Generator().manual_seed(1))
    image = torch.nn.functional.avg_pool2d(image[None], 5, 1, 2)[0]  # smooth: both ways of sampling see the same
    (found,) = Crops(16, 2)([image[None]], torch.tensor([[box]]))
    # Where the image ends, its value jumps, and a bin's few samples are not its exact mean.
    atol = 0.07 if min(box) == 0 else 0.02
    assert_close(found, plain_crop(image, torch.tensor(box), 16, 2), atol=atol, rtol=0)


def test_one_image_alone_or_among_others() -> None:
    """And in parts or at once: more proposals than go through the backbone together."""
    model, boxes = build().eval(), proposals(AT_ONCE)
    with torch.no_grad():
        together = model(images(), sizes=SIZES, proposals=boxes)
    assert isinstance(together, Outputs)
    with torch.enable_grad():
        at_once = model(images(), sizes=SIZES, proposals=boxes)
    assert_close(at_once.class_logits, together.class_logits, atol=1e-4, rtol=1e-4)
    for i, (height, width) in enumerate(SIZES.int().tolist()):
        with torch.no_grad():
            alone = model(images()[i : i + 1, :, :height, :width], sizes=SIZES[i : i + 1], proposals=boxes[i : i + 1])
        assert_close(alone.class_logits[0], together.class_logits[i], atol=1e-4, rtol=1e-4)
        assert_close(alone.boxes[0], together.boxes[i], atol=1e-2, rtol=0)


def test_folded_for_inference() -> None:
    model = build().eval()
    with torch.no_grad():
        whole, folded = (m(images(), sizes=SIZES, proposals=proposals()) for m in (model, fold_batch_norm(model)))
    assert_close(folded.class_logits, whole.class_logits, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("empty", [False, True])
def test_every_part_learns(empty: bool) -> None:
    """With objects or without, and with proposals that are padding."""
    model, boxes = build(), proposals()
    boxes[1, 3:] = 0
    own = [torch.zeros(0, 4) if empty else each[:2] + 1 for each in boxes]
    truth = Objects.collate(own, [torch.zeros(len(each), dtype=torch.long) for each in own], None, SIZES)
    truth = replace(truth, proposals=boxes)
    outputs = model(images(), truth)
    assert isinstance(outputs, TwoStageOutputs)
    criterion = TwoStageCriterionConfig.model_validate({"rpn": None}).build(None, 3)
    losses = criterion(outputs, truth)
    losses.total.backward()
    assert [n for n, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()] == []
    assert sum(float(p.grad.abs().sum()) for p in model.backbone.parameters() if p.grad is not None) > 0


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"context": 16}, "leaves nothing of a crop of 32"),
        ({"backbone": {"name": "resnet10t", "levels": [4, 5]}}, "give one level"),
        ({"head": {"backbone_stage": True}}, "head.backbone_stage"),
        ({"head": {"convs": 1}}, "head.convs"),
    ],
)
def test_what_cannot_be_is_said(change: dict[str, Any], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        RCnnConfig.model_validate({**LIGHT, **change})
