"""The order of training: an endless stream of positions, cut into steps.

Position p is image order(seed, epoch)[p % n] of epoch p // n; the order is a permutation unless the recipe asks for
another (`order.py`).  Step s takes the positions from s * batch on, so
an epoch's last images share a step with the next one's first, nothing is dropped, and where a run stands is one number.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from torch.utils.data import Sampler

from detector import seeding
from detector.data.order import Order


class Key(NamedTuple):
    """What a worker needs to know to make one sample."""

    epoch: int
    image: int  # its place in the index
    choice: int | None  # which of `multi_scale`, the same in the whole batch
    repeat: int = 0  # how often the same epoch has shown this image before


class Stream(Sampler[list[Key]]):
    """The keys of each step from `start_step` to before `stop_step`, as one of `world` ranks.

    The ranks of a step take neighbouring pieces of `batch_size` positions: together they see what a single process with
    a batch of `world * batch_size` sees.
    """

    def __init__(
        self,
        length: int,
        *,
        batch_size: int,
        seed: int,
        start_step: int,
        stop_step: int,
        choices: int = 0,
        rank: int = 0,
        world: int = 1,
        order: Order | None = None,
    ) -> None:
        self.length = length
        self.order = Order(length, seed) if order is None else order
        self.batch_size = batch_size
        self.seed = seed
        self.start_step = start_step
        self.stop_step = stop_step
        self.choices = choices
        self.rank = rank
        self.world = world

    def __len__(self) -> int:
        return max(0, self.stop_step - self.start_step)

    def __iter__(self) -> Iterator[list[Key]]:
        epoch, images, repeats = -1, np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.int64)
        for step in range(self.start_step, self.stop_step):
            choice = self._choice(step)
            first = (step * self.world + self.rank) * self.batch_size
            keys = []
            for position in range(first, first + self.batch_size):
                if position // self.length != epoch:
                    epoch = position // self.length
                    images, repeats = self.order.epoch(epoch, self.batch_size * self.world)
                place = position % self.length
                keys.append(Key(epoch, int(images[place]), choice, int(repeats[place])))
            yield keys

    def _choice(self, step: int) -> int | None:
        if self.choices == 0:
            return None
        return int(seeding.generator(self.seed, seeding.SIZE, step).integers(self.choices))


class InOrder(Sampler[list[Key]]):
    """Every image once, in the file's order; of several ranks each takes every `world`-th."""

    def __init__(self, length: int, *, batch_size: int, rank: int = 0, world: int = 1) -> None:
        self.indices = range(rank, length, world)
        self.batch_size = batch_size

    def __len__(self) -> int:
        return -(-len(self.indices) // self.batch_size)

    def __iter__(self) -> Iterator[list[Key]]:
        for first in range(0, len(self.indices), self.batch_size):
            yield [Key(0, i, None) for i in self.indices[first : first + self.batch_size]]
