"""Samples to a batch: one padded block of uint8 pixels, and the truth flat over the batch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from multiprocessing.reduction import ForkingPickler
from typing import Any

import numpy as np
import torch
from torch.utils.data import get_worker_info

from detector.data.sample import Sample
from detector.structures import Batch, Objects

PADDING = (124, 116, 104)  # ImageNet's mean colour: about zero once the model has normalised it


def collate(
    samples: Sequence[Sample],
    *,
    pad_multiple: int,
    canvas: tuple[int, int] | None = None,
    failures: tuple[str, ...] = (),
) -> Batch:
    """A batch whose height and width are `canvas`, or the largest image's, rounded up to a multiple.

    The pixels lie in memory as (B, H, W, 3), which decoders give and fast convolutions want; `images` is a view of
    that, so (B, 3, H, W) in channels_last format.
    """
    height, width = canvas or (
        max(s.image.shape[0] for s in samples),
        max(s.image.shape[1] for s in samples),
    )
    shape = (len(samples), _up(height, pad_multiple), _up(width, pad_multiple), 3)
    pixels = _allocate(shape)
    block = pixels.numpy()
    # Rows as flat numbers: numpy copies them whole, where a colour of three would be written one number at a time.
    rows, padding = block.reshape(len(samples), shape[1], -1), np.tile(np.array(PADDING, np.uint8), shape[2])
    for picture, flat, sample in zip(block, rows, samples, strict=True):
        h, w = sample.image.shape[:2]
        picture[:h, :w] = sample.image
        flat[h:] = padding
        flat[:h, 3 * w :] = padding[3 * w :]
    sizes = torch.tensor([s.image.shape[:2] for s in samples], dtype=torch.float32)
    return Batch(
        images=pixels.permute(0, 3, 1, 2),
        objects=Objects.collate(
            [torch.from_numpy(s.boxes) for s in samples],
            [torch.from_numpy(s.labels) for s in samples],
            [torch.from_numpy(s.crowd) for s in samples],
            sizes,
        ),
        ids=torch.tensor([s.image_id for s in samples], dtype=torch.int64),
        original_sizes=torch.tensor([s.original_size for s in samples], dtype=torch.int64),
        scale=torch.from_numpy(np.stack([s.scale for s in samples])),
        offset=torch.from_numpy(np.stack([s.offset for s in samples])),
        failures=failures,
    )


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
    truth = {name: getattr(objects, name) for name in ("boxes", "labels", "image", "ignore", "ignore_image", "sizes")}
    arrays = [{name: tensor.numpy() for name, tensor in group.items()} for group in (fields, truth)]
    return _receive, (batch.images.permute(0, 2, 3, 1), *arrays, batch.failures)


def _receive(
    pixels: torch.Tensor, fields: dict[str, np.ndarray], truth: dict[str, np.ndarray], failures: tuple[str, ...]
) -> Batch:
    objects = Objects(batch_size=len(pixels), **{name: torch.from_numpy(array) for name, array in truth.items()})
    rest = {name: torch.from_numpy(array) for name, array in fields.items()}
    return Batch(images=pixels.permute(0, 3, 1, 2), objects=objects, failures=failures, **rest)


ForkingPickler.register(Batch, _send)
