"""The way from a loader's batches to the numbers, with models that know the answer."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from detector.coders import Deltas
from detector.data.coco import CocoData, CocoIndex
from detector.data.loader import eval_loader
from detector.data.resize import Fixed, Letterbox, Resize, ShortEdge
from detector.decode import DecodeConfig
from detector.evaluate.coco import CocoEvaluator
from detector.evaluate.runner import evaluate, to_original
from detector.structures import Batch, Detections, Objects, Outputs, Priors

CPU = torch.device("cpu")


class Knowing(nn.Module):
    """Puts a prior on every object of the loader's next batch and is sure of its class; also draws random numbers."""

    def __init__(self, data: CocoData, resize: Resize, batch_size: int, classes: int) -> None:
        super().__init__()
        self.batches = iter(eval_loader(data, resize=resize, batch_size=batch_size, workers=0))
        self.classes = classes
        self.norm = nn.BatchNorm2d(3)
        self.seen_training: list[bool] = []

    def forward(self, images: Tensor, *, sizes: Tensor) -> Outputs:
        self.seen_training.append(self.training)
        torch.rand(3)
        objects = next(self.batches).objects
        count = max(len(objects), 1)
        boxes, logits = torch.zeros(count, 4), torch.full((len(images), count, self.classes), -20.0)
        boxes[: len(objects)] = objects.boxes
        logits[objects.image, torch.arange(len(objects)), objects.labels] = 10.0
        priors = Priors(boxes, torch.ones(count), (count,))
        return Outputs(priors, logits, torch.zeros(len(images), count, 4), None, Deltas())


@pytest.fixture(scope="module")
def data(shared: Path) -> CocoData:
    root = shared / "datasets" / "coco_tiny"
    return CocoData(CocoIndex.load(root / "annotations" / "val.json", root / "images"))


@pytest.mark.parametrize(
    "resize", [ShortEdge(short=256, long=512), Letterbox(size=(320, 320)), Fixed(size=(256, 352))], ids=lambda r: r.type
)
def test_boxes_come_back_to_original_pixels(data: CocoData, resize: Resize) -> None:
    model = Knowing(data, resize, 8, len(data.index.classes))
    loader = eval_loader(data, resize=resize, batch_size=8, workers=0)
    evaluator = CocoEvaluator(data.index.annotations, category_ids=data.index.category_ids.tolist())
    config = DecodeConfig(nms_iou=1.0, max_detections=100)
    seen: list[int] = []
    result = evaluate(model, loader, config, evaluator, CPU, progress=lambda batch, found: seen.append(len(found)))
    assert result.numbers["AP"] == pytest.approx(1, abs=1e-9)
    assert result.numbers["AR_100"] == pytest.approx(1, abs=1e-9)
    assert sum(seen) == len(data)
    assert set(model.seen_training) == {False}


def test_leaves_no_trace(data: CocoData) -> None:
    """Modes, statistics and random numbers are as before: training goes on as if nothing had happened."""
    resize = Letterbox(size=(128, 128))
    model = Knowing(data, resize, 25, len(data.index.classes)).train()
    model.norm.eval()  # frozen by the user
    before = torch.get_rng_state()
    loader = eval_loader(data, resize=resize, batch_size=25, workers=0)
    evaluate(model, loader, DecodeConfig(), CocoEvaluator(data.index.annotations), CPU, "bf16")
    assert torch.equal(torch.get_rng_state(), before)
    assert model.training
    assert not model.norm.training
    assert torch.is_grad_enabled()


def test_an_error_leaves_the_mode_too(data: CocoData) -> None:
    class Broken(nn.Module):
        def forward(self, images: Tensor, *, sizes: Tensor) -> Outputs:
            raise RuntimeError("broken")

    model = Broken().train()
    loader = eval_loader(data, resize=Letterbox(size=(64, 64)), batch_size=2, workers=0)
    with pytest.raises(RuntimeError, match="broken"):
        evaluate(model, loader, DecodeConfig(), CocoEvaluator(data.index.annotations), CPU)
    assert model.training


def test_to_original_is_that_of_each_image() -> None:
    found = [
        Detections(torch.rand(3, 4) * 100, torch.rand(3), torch.zeros(3, dtype=torch.long)),
        Detections(torch.zeros(0, 4), torch.zeros(0), torch.zeros(0, dtype=torch.long)),
        Detections(torch.rand(2, 4) * 100, torch.rand(2), torch.ones(2, dtype=torch.long)),
    ]
    batch = Batch(
        images=torch.zeros(3, 3, 8, 8, dtype=torch.uint8),
        objects=Objects.collate([torch.zeros(0, 4)] * 3, [torch.zeros(0)] * 3),
        ids=torch.arange(3),
        original_sizes=torch.tensor([[30, 50], [10, 10], [70, 20]]),
        scale=torch.tensor([[2.0, 1.5], [1, 1], [0.5, 0.25]]),
        offset=torch.tensor([[3.0, 0], [0, 0], [0, 7]]),
    )
    for i, (now, before) in enumerate(zip(to_original(found, batch), found, strict=True)):
        expected = before.to_original(batch.scale[i], batch.offset[i], batch.original_sizes[i])
        assert torch.equal(now.boxes, expected.boxes)
        assert now.scores is before.scores
