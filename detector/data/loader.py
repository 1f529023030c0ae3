"""Batches for training and for evaluation, from worker processes.

A sample is a function of (seed, epoch, index), a batch's images and size of (seed, step): the number of workers,
evaluation in between and resuming change no byte.
"""

from __future__ import annotations

import ctypes
import logging
import multiprocessing
import os
import signal
import threading
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import takewhile
from multiprocessing import connection
from multiprocessing.process import BaseProcess
from typing import Any

import cv2
import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from detector import seeding
from detector.data.batch import collate
from detector.data.coco import MEBIBYTE, CocoData, Reader
from detector.data.later import Later
from detector.data.order import Ordering, Shuffle
from detector.data.pool import Pool
from detector.data.resize import Sizing
from detector.data.sample import Sample
from detector.data.sampler import InOrder, Key, Stream
from detector.data.steps import Active, Augmentation, Combination, Deferrable, Step, active, never_on
from detector.errors import DataError, UserError
from detector.structures import Batch

_log = logging.getLogger(__name__)
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h
_KEPT = 1 << 28  # bytes


def train_loader(
    data: CocoData,
    *,
    augment: Sequence[Step],
    resize: Sizing,
    batch_size: int,
    seed: int,
    start_step: int,
    stop_step: int,
    workers: int = 2,
    pad_multiple: int = 32,
    max_unreadable: int = 10,
    rank: int = 0,
    world: int = 1,
    epochs: float | None = None,
    partner_cache: int = 128,
    order: Ordering | None = None,
    defer: bool = False,
) -> Loader:
    """The batches of the steps from `start_step` to before `stop_step`.

    Each sample goes through `augment` in order and then through `resize`; flips and colour at the end of `augment` come
    after it where that is cheaper.  An image that cannot be read is replaced by the next readable one and named in the
    batch's `failures`.

    Args:
        epochs: of the whole run, which steps of `augment` may go by; default: what ends with `stop_step`.
        partner_cache: MiB in each worker for images that steps combining several have drawn before.
        order: which images an epoch shows; default: each once, shuffled.
        defer: leave multi-scale, and flip and colour at the end of `augment`, to `later.finished(batch)`.

    Raises:
        DataError: the set has no image, or a step of `augment` cannot do anything on it; while
            iterating: more than `max_unreadable` images could not be read.
    """
    if len(data) == 0:
        raise DataError(f"{data.index.annotations}: holds no image to train on")
    keys = Stream(
        len(data),
        batch_size=batch_size,
        seed=seed,
        start_step=start_step,
        stop_step=stop_step,
        choices=len(resize.multi_scale),
        rank=rank,
        world=world,
        order=(Shuffle() if order is None else order).of(data.index, seed),
    )
    source = TrainSource(
        data,
        augment=tuple(augment),
        resize=resize,
        seed=seed,
        epochs=stop_step * batch_size * world / len(data) if epochs is None else epochs,
        pad_multiple=pad_multiple,
        max_unreadable=max_unreadable,
        partner_cache=partner_cache,
        defer=defer,
    )
    return Loader(source, keys, workers, max_unreadable)


def eval_loader(
    data: CocoData,
    *,
    resize: Sizing,
    batch_size: int,
    workers: int = 2,
    pad_multiple: int = 32,
    max_unreadable: int = 10,
    rank: int = 0,
    world: int = 1,
) -> Loader:
    """Every image once, in the file's order, the last batch perhaps smaller.  May be iterated again and again.

    An image that cannot be read becomes a plain one and is named in the batch's `failures`: its objects count as
    missed, so the score stays that of the whole set.

    Raises:
        DataError: while iterating: more than `max_unreadable` images could not be read.
    """
    keys = InOrder(len(data), batch_size=batch_size, rank=rank, world=world)
    return Loader(_EvalSource(data, resize, pad_multiple), keys, workers, max_unreadable)


class Loader:
    """Batches, with errors in workers turned into one sentence, and unreadable images counted."""

    def __init__(self, source: _Source, keys: Stream | InOrder, workers: int, max_unreadable: int) -> None:
        self.max_unreadable = max_unreadable
        self.unreadable: set[str] = set()  # one line for each image
        self._loader: DataLoader[Any] = DataLoader(
            source,
            batch_sampler=keys,
            num_workers=workers,
            collate_fn=_as_it_is,
            worker_init_fn=_start_worker,
            pin_memory=torch.cuda.is_available(),
            persistent_workers=workers > 0,
            generator=torch.Generator(),  # or else it would draw from the global one
        )

    def __len__(self) -> int:
        return len(self._loader)

    def __iter__(self) -> Iterator[Batch]:
        batches = iter(self._loader)
        while True:
            try:
                batch = next(batches)
            except StopIteration:
                return
            except (RuntimeError, ConnectionError, EOFError) as error:
                # The latter two: a batch's memory is handed over by its worker, which may be gone by then.
                if isinstance(error, RuntimeError) and "DataLoader worker" not in str(error):
                    raise
                raise DataError(
                    f"a data worker was ended from outside, most often because memory ran out ({self._end()}):"
                    " set data.workers lower, or to 0, and resume"
                ) from error
            if isinstance(batch, UserError):
                raise batch
            self._count(batch.failures)
            yield batch

    def _end(self) -> str:
        """Ends all workers; which of them were gone before."""
        iterator: Any = self._loader._iterator
        gone: dict[int, str] = {}
        for _ in range(2 + len(iterator._workers)):
            try:  # torch watches for workers that die and raises wherever the main process is, until they are ended
                if not gone:  # what a worker held breaks off a moment before it is gone
                    ended = connection.wait([worker.sentinel for worker in iterator._workers], timeout=5)
                    for worker in iterator._workers:
                        if worker.sentinel in ended:
                            worker.join(5)  # its files close a moment before it has an exit code
                for worker in iterator._workers:
                    if not worker.is_alive() and worker.pid not in gone:
                        how = f"signal {-worker.exitcode}" if worker.exitcode < 0 else f"exit code {worker.exitcode}"
                        gone[worker.pid] = f"process {worker.pid}: {how}"
                iterator._shutdown_workers()
                break
            except RuntimeError:
                continue
        return ", ".join(gone.values())

    def _count(self, failures: tuple[str, ...]) -> None:
        for line in failures:
            if line not in self.unreadable:
                self.unreadable.add(line)
                _log.warning("%s", line)
        if len(self.unreadable) > self.max_unreadable:
            raise DataError(
                f"{len(self.unreadable)} images could not be read, more than data.max_unreadable={self.max_unreadable};"
                f" the last: {failures[-1]}"
            )


class _Source(Dataset[Any], ABC):
    """Makes the batch of a list of keys; a user's mistake is returned, so that its text arrives without a traceback."""

    defer = False  # whether something is left to the training device

    def __init__(self, data: CocoData, resize: Sizing, pad_multiple: int) -> None:
        self.data = data
        self.resize = resize
        self.pad_multiple = pad_multiple

    def __getitems__(self, keys: list[Key]) -> Batch | UserError:
        failures: list[str] = []
        samples = (self.sample(key, failures) for key in keys)
        canvas = self.resize.canvas(None if self.defer else keys[0].choice)
        try:
            return collate(samples, pad_multiple=self.pad_multiple, canvas=canvas, count=len(keys), failures=failures)
        except UserError as error:
            return error

    @abstractmethod
    def sample(self, key: Key, failures: list[str]) -> Sample:
        """The sample of a key; appends a line to `failures` for each image that could not be read."""


class TrainSource(_Source):
    """Samples as training sees them.

    Raises:
        DataError: a step of `augment` cannot do anything on this set.
    """

    def __init__(
        self,
        data: CocoData,
        *,
        augment: tuple[Step, ...],
        resize: Sizing,
        seed: int,
        epochs: float,
        pad_multiple: int,
        max_unreadable: int,
        partner_cache: int,
        defer: bool = False,
    ) -> None:
        super().__init__(data, resize, pad_multiple)
        for change in augment:
            change.check(data.index)
        for line in never_on(augment, epochs):
            _log.warning("%s", line)
        self.augment = augment
        self.seed = seed
        self.epochs = epochs
        self.defer = defer
        self.combines = any(isinstance(change, Combination) for change in augment)
        masks = any(change.uses_masks for change in augment)
        self.reader = Reader(data, max_unreadable=max_unreadable, masks=masks, keep=partner_cache * MEBIBYTE)
        self.scheduled = any(change.when is not None for change in augment)
        self._active = (0, active(augment, 0, epochs))

    def sample(self, key: Key, failures: list[str]) -> Sample:
        # Also what has its own turn may be drawn by others: a set that fits into the memory for them is decoded once.
        sample = self.reader.read(key.image, failures, keep=self.combines)
        pool = Pool(self.reader, key.image, failures)
        again = (key.repeat,) if key.repeat else ()
        rng = seeding.generator(self.seed, seeding.SAMPLE, key.epoch, key.image, *again)
        changes = self.active(key.epoch)
        last = list(takewhile(lambda change: change.step.on_device, reversed(changes)))[::-1] if self.defer else []
        changes, choice = changes[: len(changes) - len(last)], None if self.defer else key.choice
        # The last steps, as far as they give the same after the resize, are done where the image is smaller.
        around = len(list(takewhile(lambda change: change.step.commutes, reversed(changes))))
        for change in changes[: len(changes) - around]:
            sample = _apply(change, sample, rng, pool)
        size = (sample.image.shape[0], sample.image.shape[1])
        height, width = self.resize.target(size, choice)
        shrinks = height * width < sample.image.shape[0] * sample.image.shape[1]
        if shrinks:
            sample = self.resize(sample, choice)
            pool = replace(pool, zoom=(height / size[0], width / size[1]))
        for change in changes[len(changes) - around :]:
            sample = _apply(change, sample, rng, pool)
        sample = sample if shrinks else self.resize(sample, choice)
        if not self.defer:
            return sample
        return replace(sample, later=_draw(last, rng, self.resize, size, key.choice, len(sample.ground)))

    def active(self, epoch: int) -> tuple[Active, ...]:
        """The steps that are on in an epoch."""
        if self.scheduled and self._active[0] != epoch:
            self._active = (epoch, active(self.augment, epoch, self.epochs))
        return self._active[1]


def _apply(change: Active, sample: Sample, rng: np.random.Generator, pool: Pool) -> Sample:
    """What one step makes of a sample; draws nothing beforehand where the step is always on."""
    if change.probability < 1 and rng.random() >= change.probability:
        return sample
    if isinstance(change.step, Combination):
        return change.step(sample, rng, pool)
    assert isinstance(change.step, Augmentation)
    return change.step(sample, rng)


def _draw(
    last: Sequence[Active],
    rng: np.random.Generator,
    resize: Sizing,
    size: tuple[int, int],
    choice: int | None,
    channels: int,
) -> Later:
    """What the device does, drawn as `_apply` would; `size`: height, width of the image before it was resized."""
    flip, colors = [False, False], []
    for change in last:
        if change.probability < 1 and rng.random() >= change.probability:
            continue
        assert isinstance(change.step, Deferrable)
        flip = [one != other for one, other in zip(flip, change.step.mirrors(rng), strict=True)]
        color = change.step.colors(rng, channels)
        colors += [] if color is None else [color]
    return Later(resize.target(size, choice), resize.canvas(choice), (flip[0], flip[1]), tuple(colors))


class _EvalSource(_Source):
    def sample(self, key: Key, failures: list[str]) -> Sample:
        try:
            return self.resize(self.data.reduced(key.image))
        except DataError as error:
            failures.append(str(error))
            return self.resize(_blank(self.data, key.image))


def _blank(data: CocoData, i: int) -> Sample:
    height, width = data.index.sizes[i].tolist()
    dtype = np.uint8 if data.pixels is None else data.pixels.dtype
    return Sample(
        image=np.full((height, width, len(data.ground)), data.ground, dtype=dtype),
        boxes=np.zeros((0, 4), dtype=np.float32),
        labels=np.zeros(0, dtype=np.int64),
        rows=np.zeros(0, dtype=np.int64),
        crowd=np.zeros((0, 4), dtype=np.float32),
        image_id=int(data.index.image_ids[i]),
        original_size=(height, width),
        scale=np.ones(2, dtype=np.float32),
        offset=np.zeros(2, dtype=np.float32),
        ground=data.ground,
    )


def _as_it_is(batch: Any) -> Any:
    """Torch would make tensors of it; it is a batch already."""
    return batch


def _start_worker(_: int) -> None:
    """One core for each worker (torch sees to its own threads).

    Signals are for the main process, which finishes its step and then ends the workers.

    A worker that gets a SIGTERM (schedulers send it to every process) leaves quietly: torch would otherwise raise in
    the middle of the main process's last step.

    A worker ends with the main process, also with one that is killed.  Torch's own watch looks at the parent's id,
    which is that of a third process where workers come from a fork server (Python's default on Linux from 3.14 on).
    """
    cv2.setNumThreads(0)
    main = multiprocessing.parent_process()
    if main is not None:
        threading.Thread(target=_end_with, args=(main,), daemon=True).start()
    _keep_memory()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0))


def _end_with(process: BaseProcess) -> None:
    process.join()
    os._exit(0)


def _keep_memory() -> None:
    """Lets this process keep the memory of one image for the next.

    glibc gives large blocks back to the system at once and gets them again page by page: of a worker's time for images
    of 800x1066 that was a sixth.  Larger blocks than these go back all the same.  Other libraries: nothing is done.
    """
    set_option = getattr(ctypes.CDLL(None), "mallopt", None) if os.name == "posix" else None
    if set_option is not None:
        set_option(_M_MMAP_THRESHOLD, _KEPT)
        set_option(_M_TRIM_THRESHOLD, _KEPT)
