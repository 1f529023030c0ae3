"""A model over a whole loader, into an evaluator."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor, nn

from detector.decode import DecodeConfig, decode
from detector.evaluate.coco import CocoEvaluator, CocoResult
from detector.models.layers import Precision, autocast
from detector.structures import Batch, Detections


def evaluate(
    model: nn.Module,
    loader: Iterable[Batch],
    decode_config: DecodeConfig,
    evaluator: CocoEvaluator,
    device: torch.device,
    precision: Precision = "fp32",
    progress: Callable[[Batch, list[Detections]], None] | None = None,
) -> CocoResult:
    """Scores `model` on all batches of `loader`; training may go on afterwards as if nothing had happened.

    The model's modes (training or evaluation, of every module by itself) and the random number generators are left as
    they were.  `progress` is called after each batch with the batch on the device and its detections, by then in
    original pixels.

    Raises:
        UserError: the model yields boxes that are not finite, or the loader images that the annotations do not have.
    """
    with inference(model):
        for batch in loader:
            batch = batch.to(device)
            with autocast(device, precision):
                outputs = model(batch.images, **batch.known)
            found = to_original(decode(outputs, batch.sizes, decode_config), batch)
            evaluator.add(batch.ids, found)
            if progress is not None:
                progress(batch, found)
    return evaluator.result()


@contextmanager
def inference(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients and without a trace in the model or in the random number generators.

    Not torch's inference mode: what a model or a rule keeps for the next call must do for training, too.
    """
    modes = {module: module.training for module in model.modules()}
    cuda = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
    model.eval()
    try:
        with torch.random.fork_rng(cuda), torch.no_grad():
            yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def to_original(found: Sequence[Detections], batch: Batch) -> list[Detections]:
    """Detections of all images of a batch from network pixels to original pixels, clipped to their images."""
    counts = [len(d) for d in found]
    boxes = torch.cat([d.boxes for d in found])
    image = _image_of(counts, boxes.device)
    scale, offset = batch.scale.repeat(1, 2)[image], batch.offset.repeat(1, 2)[image]
    limit = batch.original_sizes.flip(1).repeat(1, 2)[image].to(boxes)
    boxes = torch.minimum(((boxes - offset) / scale).clamp(min=0), limit)
    return [replace(d, boxes=mine) for d, mine in zip(found, boxes.split(counts), strict=True)]


def _image_of(counts: list[int], device: torch.device) -> Tensor:
    """The image of each detection, made on the host and sent over, which costs no synchronisation."""
    image = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    return image.to(device, non_blocking=True)
