"""Samples to a batch: one padded block of uint8 (or uint16) pixels, and the truth flat over the batch."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import lru_cache
from itertools import chain
from multiprocessing.reduction import ForkingPickler
from typing import Any

import numpy as np
import torch
from torch.utils.data import get_worker_info

from detector.data.geometry import joined_weights
from detector.data.proposals import on_canvas
from detector.data.sample import Sample
from detector.pixels import PADDING as PADDING
from detector.structures import Batch, Objects


def collate(
    samples: Iterable[Sample],
    *,
    pad_multiple: int,
    canvas: tuple[int, int] | None = None,
    count: int | None = None,
    failures: Sequence[str] = (),
) -> Batch:
    """A batch whose height and width are `canvas`, or the largest image's, rounded up to a multiple.

    The pixels lie in memory as (B, H, W, 3), which decoders give and fast convolutions want; `images` is a view of
    that, so (B, C, H, W) in channels_last format.

    Args:
        count: how many samples there are, where `samples` has no length.  With a canvas each is then moved to its place
            as soon as it is made, while the processor's cache still holds it, and its memory serves the next.
        failures: read when all samples are there.
    """
    if canvas is None or count is None:
        samples = list(samples)
        count = len(samples)
        canvas = canvas or (max(s.image.shape[0] for s in samples), max(s.image.shape[1] for s in samples))
    samples = iter(samples)
    first = next(samples)
    shape = (count, up(canvas[0], pad_multiple), up(canvas[1], pad_multiple), len(first.ground))
    pixels = _allocate(shape, getattr(torch, first.image.dtype.name))
    placed = [_place(sample, picture) for sample, picture in zip(chain([first], samples), pixels.numpy(), strict=True)]
    batch = Batch(
        images=pixels.permute(0, 3, 1, 2),
        objects=_objects(placed),
        ids=torch.tensor([s.image_id for s in placed], dtype=torch.int64),
        original_sizes=torch.tensor([s.original_size for s in placed], dtype=torch.int64),
        scale=torch.from_numpy(np.stack([s.scale for s in placed])),
        offset=torch.from_numpy(np.stack([s.offset for s in placed])),
        failures=tuple(failures),
    )
    if first.later is None:
        return batch
    from detector.data.later import attach

    return attach(batch, placed, pad_multiple)


def _place(sample: Sample, picture: np.ndarray) -> Sample:
    """The sample with its image in `picture`, (H, W, C), whose rest is padded."""
    h, w = sample.image.shape[:2]
    inside = picture[:h, :w]
    inside[:] = sample.image
    # Rows as flat numbers: numpy copies them whole, where a colour of three would be written one number at a time.
    rows = picture.reshape(len(picture), -1)
    padding = _padding(picture.shape[1], sample.ground, picture.dtype)
    rows[h:] = padding
    rows[:h, len(sample.ground) * w :] = padding[len(sample.ground) * w :]
    return replace(sample, image=inside)


@lru_cache(maxsize=64)
def _padding(width: int, ground: tuple[int, ...], dtype: np.dtype[Any]) -> np.ndarray:
    """(C * width,): one row of it."""
    return np.tile(np.array(ground, dtype=dtype), width)


def _objects(samples: Sequence[Sample]) -> Objects:
    """As `Objects.collate`, from arrays."""
    places = np.arange(len(samples))
    truth = {
        "boxes": np.concatenate([s.boxes for s in samples]),
        "labels": np.concatenate([s.labels for s in samples]),
        "image": np.repeat(places, [len(s.boxes) for s in samples]),
        "ignore": np.concatenate([s.crowd for s in samples]),
        "ignore_image": np.repeat(places, [len(s.crowd) for s in samples]),
        "sizes": np.array([s.image.shape[:2] for s in samples], dtype=np.float32),
    }
    weight = joined_weights(samples)
    if weight is not None:
        truth["weight"] = weight
    if any(s.proposals is not None for s in samples):
        truth["proposals"] = on_canvas(samples)
    return Objects(batch_size=len(samples), **{name: torch.from_numpy(array) for name, array in truth.items()})


def up(length: int, multiple: int) -> int:
    """The next multiple, or the length itself."""
    return -(-length // multiple) * multiple


def _allocate(shape: tuple[int, int, int, int], dtype: torch.dtype) -> torch.Tensor:
    """In a worker in shared memory from the start, as torch's own collate does, which saves a copy."""
    if get_worker_info() is None:
        return torch.empty(shape, dtype=dtype)
    storage = torch.UntypedStorage._new_shared(math.prod(shape) * dtype.itemsize)
    return torch.empty(0, dtype=dtype).set_(storage).view(shape)


# A tensor sent from a worker costs a file handle and a system call or two, however small it is.  So of a batch's eleven
# tensors only the pixels go through shared memory; the others go as plain arrays.


def send(batch: Batch) -> tuple[Any, ...]:
    fields = {name: getattr(batch, name) for name in ("ids", "original_sizes", "scale", "offset")}
    objects = batch.objects
    names = ("boxes", "labels", "image", "ignore", "ignore_image", "sizes", "weight", "proposals")
    truth = {name: tensor for name in names if (tensor := getattr(objects, name)) is not None}
    arrays = [{name: tensor.numpy() for name, tensor in group.items()} for group in (fields, truth)]
    return receive, (batch.images.permute(0, 2, 3, 1), *arrays, batch.failures)


def receive(
    pixels: torch.Tensor, fields: dict[str, np.ndarray], truth: dict[str, np.ndarray], failures: tuple[str, ...]
) -> Batch:
    objects = Objects(batch_size=len(pixels), **{name: torch.from_numpy(array) for name, array in truth.items()})
    rest = {name: torch.from_numpy(array) for name, array in fields.items()}
    return Batch(images=pixels.permute(0, 3, 1, 2), objects=objects, failures=failures, **rest)


ForkingPickler.register(Batch, send)
