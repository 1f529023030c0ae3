"""What the training device does to a batch in place of the workers: multi-scale resize, flips and colour.

The workers draw the random numbers where they would have used them, so (seed, epoch, index) decide them and the same
samples come out, wherever the pixels are changed: mirrored to the bit, coloured to a level.  Nothing here waits for the
device.

Legend: B images, C channels, H W of the batch's canvas, N objects, n colour steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from multiprocessing.reduction import ForkingPickler
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from detector.data.batch import receive, send, up
from detector.data.sample import Sample
from detector.structures import Batch


@dataclass(frozen=True, eq=False)
class Later:
    """What is still to be done to a sample, in this order."""

    target: tuple[int, int]  # height, width that the image gets
    canvas: tuple[int, int] | None  # height, width that its batch gets; None: what the largest target needs
    flip: tuple[bool, bool]  # left and right, top and bottom
    colors: tuple[np.ndarray, ...]  # (C, 2 C) each: a matrix for the pixels, and one for their mean that is added


@dataclass(frozen=True, kw_only=True)
class LaterBatch(Batch):
    """A batch with what is still to be done to it: `finished(batch)` does it."""

    flip: Tensor  # (B, 2) bool: left and right, top and bottom
    colors: Tensor  # (B, n, C, 2 C) float32
    target: Tensor  # (B, 2) int64 height, width
    resizes: bool  # whether any image gets another size
    canvas: tuple[int, int]
    ground: Tensor  # (C,) of the images' kind


def attach(batch: Batch, samples: Sequence[Sample], pad_multiple: int) -> LaterBatch:
    """The batch of these samples with what is still to be done to each of them."""
    laters = [sample.later for sample in samples if sample.later is not None]
    ground = samples[0].ground
    channels = len(ground)
    nothing = np.eye(channels, 2 * channels)
    count = max(len(later.colors) for later in laters)
    colors = [[*later.colors, *[nothing] * (count - len(later.colors))] for later in laters]
    canvas = laters[0].canvas or (max(later.target[0] for later in laters), max(later.target[1] for later in laters))
    return LaterBatch(
        **{field.name: getattr(batch, field.name) for field in fields(batch)},
        flip=torch.tensor([later.flip for later in laters]),
        colors=torch.from_numpy(np.array(colors, dtype=np.float32).reshape(len(laters), count, channels, 2 * channels)),
        target=torch.tensor([later.target for later in laters]),
        resizes=any(s.image.shape[:2] != later.target for s, later in zip(samples, laters, strict=True)),
        canvas=(up(canvas[0], pad_multiple), up(canvas[1], pad_multiple)),
        ground=torch.from_numpy(np.array(ground, dtype=batch.images.numpy().dtype)),
    )


@torch.no_grad()
def finished(batch: Batch) -> Batch:
    """The batch with everything done, on the device where it is; a batch with nothing to do as it is."""
    if not isinstance(batch, LaterBatch):
        return batch
    before, after = batch.sizes, batch.target.to(batch.sizes.dtype)
    images = batch.images
    if batch.resizes:
        images = _resized(images, before, after, batch.canvas)
    factor = (after / before).flip(1)
    sign = torch.where(batch.flip, -1.0, 1.0)
    factor, shift = factor * sign, torch.where(batch.flip, after.flip(1), 0.0)
    inside = _inside(after, images)
    for i in range(batch.colors.shape[1]):
        images = _colored(images, batch.colors[:, i], inside)
    images = _mirrored(images, batch.flip, batch.target, inside, batch.ground)
    objects, proposals = batch.objects, batch.objects.proposals
    if proposals is not None:
        each = [x.repeat_interleave(proposals.shape[1], 0) for x in (factor, shift)]
        proposals = _moved(proposals.flatten(0, 1), each[0], each[1]).view_as(proposals)
    return Batch(
        images=images,
        objects=replace(
            objects,
            boxes=_moved(objects.boxes, factor[objects.image], shift[objects.image]),
            ignore=_moved(objects.ignore, factor[objects.ignore_image], shift[objects.ignore_image]),
            sizes=after,
            proposals=proposals,
        ),
        ids=batch.ids,
        original_sizes=batch.original_sizes,
        scale=batch.scale * factor,
        offset=batch.offset * factor + shift,
        failures=batch.failures,
    )


def _moved(boxes: Tensor, factor: Tensor, shift: Tensor) -> Tensor:
    """(N, 4) xyxy times (N, 2) plus (N, 2); a negative factor mirrors."""
    corners = torch.addcmul(shift[:, None], boxes.view(-1, 2, 2), factor[:, None])
    return torch.cat([corners.amin(1), corners.amax(1)], 1)


def _resized(images: Tensor, before: Tensor, after: Tensor, canvas: tuple[int, int]) -> Tensor:
    """(B, C, *canvas): each image, (B, 2) `before` high and wide, linearly resampled to `after`, as OpenCV does it.

    What lies beyond `after` is no image.
    """
    grids = []
    for axis in (0, 1):
        places = torch.arange(canvas[axis], device=images.device) + 0.5
        source = places * (before[:, axis] / after[:, axis])[:, None] - 0.5
        source = torch.minimum(source.clamp(min=0), before[:, axis, None] - 1)  # the image's own edge, not the batch's
        grids.append((2 * source + 1) / images.shape[2 + axis] - 1)
    rows, columns = torch.broadcast_tensors(grids[0][:, :, None], grids[1][:, None, :])
    grid = torch.stack([columns, rows], 3)
    found = F.grid_sample(images.float(), grid, mode="bilinear", padding_mode="border", align_corners=False)
    return found.round_().to(images.dtype).contiguous(memory_format=torch.channels_last)


def _inside(sizes: Tensor, images: Tensor) -> Tensor:
    """(B, 1, H, W) bool: where the images are."""
    rows = torch.arange(images.shape[2], device=images.device) < sizes[:, :1]
    columns = torch.arange(images.shape[3], device=images.device) < sizes[:, 1:]
    return (rows[:, :, None] & columns[:, None, :])[:, None]


def _colored(images: Tensor, change: Tensor, inside: Tensor) -> Tensor:
    """Every image by its own (B, C, 2 C) map of its pixels and of its mean colour, padding aside."""
    channels = images.shape[1]
    matrix, of_mean = change.split(channels, dim=2)
    pixels = images.permute(0, 2, 3, 1).float()
    some, within = pixels[:, ::4], inside[:, 0, ::4, :, None].float()  # every fourth row is enough
    mean = (some * within).sum((1, 2)) / within.sum((1, 2))
    offset = of_mean @ mean[..., None]
    changed = torch.baddbmm(offset.transpose(1, 2), pixels.flatten(1, 2), matrix.transpose(1, 2))
    changed = changed.round_().clamp_(0, torch.iinfo(images.dtype).max).to(images.dtype)
    return changed.unflatten(1, images.shape[-2:]).permute(0, 3, 1, 2)


def _mirrored(images: Tensor, flip: Tensor, sizes: Tensor, inside: Tensor, ground: Tensor) -> Tensor:
    """Every image mirrored within its own height and width, left and right or top and bottom; ground around it."""
    lines = []
    for axis, own in ((0, flip[:, 1:]), (1, flip[:, :1])):
        place, length = torch.arange(images.shape[2 + axis], device=images.device), sizes[:, axis, None]
        lines.append(torch.where(own & (place < length), length - 1 - place, place))
    image = torch.arange(len(images), device=images.device)[:, None, None]
    pixels = _movable(images.permute(0, 2, 3, 1))[image, lines[0][:, :, None], lines[1][:, None, :]]
    pixels = torch.where(inside[:, 0, :, :, None], pixels, _movable(ground))
    return pixels.view(images.dtype).permute(0, 3, 1, 2)


def _movable(pixels: Tensor) -> Tensor:
    """The same bytes as a kind of number that torch can index and choose from, where it cannot do so with uint16."""
    return pixels.view(torch.int16) if pixels.dtype == torch.uint16 else pixels


def _send(batch: LaterBatch) -> tuple[Any, ...]:
    """As `batch.send`: what is small goes as arrays."""
    rest = {name: getattr(batch, name).numpy() for name in ("flip", "colors", "target", "ground")}
    return _receive, (send(batch)[1], rest, batch.canvas, batch.resizes)


def _receive(sent: tuple[Any, ...], rest: dict[str, np.ndarray], canvas: tuple[int, int], resizes: bool) -> LaterBatch:
    batch = receive(*sent)
    tensors: dict[str, Any] = {name: torch.from_numpy(array) for name, array in rest.items()}
    return LaterBatch(
        **{field.name: getattr(batch, field.name) for field in fields(batch)}, canvas=canvas, resizes=resizes, **tensors
    )


ForkingPickler.register(LaterBatch, _send)
