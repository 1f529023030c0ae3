"""Samples to a batch: one padded block of uint8 pixels, and the truth flat over the batch."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import lru_cache
from multiprocessing.reduction import ForkingPickler
from typing import Any

import numpy as np
import torch
from torch.utils.data import get_worker_info

from detector.data.geometry import joined_weights
from detector.data.sample import Sample
from detector.structures import Batch, Objects

PADDING = (124, 116, 104)  # ImageNet's mean colour: about zero once the model has normalised it


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
    that, so (B, 3, H, W) in channels_last format.

    Args:
        count: how many samples there are, where `samples` has no length.  With a canvas each is then moved to its place
            as soon as it is made, while the processor's cache still holds it, and its memory serves the next.
        failures: read when all samples are there.
    """
    if canvas is None or count is None:
        samples = list(samples)
        count = len(samples)
        canvas = canvas or (max(s.image.shape[0] for s in samples), max(s.image.shape[1] for s in samples))
    pixels = _allocate((count, _up(canvas[0], pad_multiple), _up(canvas[1], pad_multiple), 3))
    placed = [_place(sample, picture) for sample, picture in zip(samples, pixels.numpy(), strict=True)]
    return Batch(
        images=pixels.permute(0, 3, 1, 2),
        objects=_objects(placed),
        ids=torch.tensor([s.image_id for s in placed], dtype=torch.int64),
        original_sizes=torch.tensor([s.original_size for s in placed], dtype=torch.int64),
        scale=torch.from_numpy(np.stack([s.scale for s in placed])),
        offset=torch.from_numpy(np.stack([s.offset for s in placed])),
        failures=tuple(failures),
    )


def _place(sample: Sample, picture: np.ndarray) -> Sample:
    """The sample with its image in `picture`, (H, W, 3), whose rest is padded."""
    h, w = sample.image.shape[:2]
    inside = picture[:h, :w]
    inside[:] = sample.image
    # Rows as flat numbers: numpy copies them whole, where a colour of three would be written one number at a time.
    rows = picture.reshape(len(picture), -1)
    padding = _padding(picture.shape[1])
    rows[h:] = padding
    rows[:h, 3 * w :] = padding[3 * w :]
    return replace(sample, image=inside)


@lru_cache(maxsize=64)
def _padding(width: int) -> np.ndarray:
    """(3 * width,) uint8: one row of it."""
    return np.tile(np.array(PADDING, dtype=np.uint8), width)


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
    return Objects(batch_size=len(samples), **{name: torch.from_numpy(array) for name, array in truth.items()})


def _up(length: int, multiple: int) -> int:
    return -(-length // multiple) * multiple


def _allocate(shape: tuple[int, int, int, int]) -> torch.Tensor:
    """uint8; in a worker in shared memory from the start, as torch's own collate does, which saves a copy."""
    if get_worker_info() is None:
        return torch.empty(shape, dtype=torch.uint8)
    storage = torch.UntypedStorage._new_shared(math.prod(shape))
    return torch.empty(0, dtype=torch.uint8).set_(storage).view(shape)


# A tensor sent from a worker costs a file handle and a system call or two, however small it is.  So of a batch's eleven
# tensors only the pixels go through shared memory; the others go as plain arrays.


def _send(batch: Batch) -> tuple[Any, ...]:
    fields = {name: getattr(batch, name) for name in ("ids", "original_sizes", "scale", "offset")}
    objects = batch.objects
    names = ("boxes", "labels", "image", "ignore", "ignore_image", "sizes", "weight")
    truth = {name: tensor for name in names if (tensor := getattr(objects, name)) is not None}
    arrays = [{name: tensor.numpy() for name, tensor in group.items()} for group in (fields, truth)]
    return _receive, (batch.images.permute(0, 2, 3, 1), *arrays, batch.failures)


def _receive(
    pixels: torch.Tensor, fields: dict[str, np.ndarray], truth: dict[str, np.ndarray], failures: tuple[str, ...]
) -> Batch:
    objects = Objects(batch_size=len(pixels), **{name: torch.from_numpy(array) for name, array in truth.items()})
    rest = {name: torch.from_numpy(array) for name, array in fields.items()}
    return Batch(images=pixels.permute(0, 3, 1, 2), objects=objects, failures=failures, **rest)


ForkingPickler.register(Batch, _send)
