"""Which images an epoch shows, and in which order: a pure function of (seed, epoch), so nothing has to be saved.

An epoch always has as many places as the set has images, n.  Where some images count for more than others, an image of
weight w (mean 1) gets floor(w) or ceil(w) places, w on average: budgets stay comparable whatever the order.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Annotated, Literal

import numpy as np
from pydantic import Field

from detector import seeding
from detector.config.node import Node
from detector.data.index import CocoIndex
from detector.data.several import SeveralIndex
from detector.errors import DataError


class Ordering(Node):
    """What every order has."""

    group_shapes: bool = Field(
        False, description="wide and tall images in batches of their own, which need less padding"
    )

    @abstractmethod
    def weights(self, index: CocoIndex) -> np.ndarray | None:
        """(n,) float64 of mean 1: how often an epoch shows each image, on average; None: each exactly once."""

    def strata(self, index: CocoIndex) -> np.ndarray | None:
        """(n,) int64: groups of images whose places in an epoch are their summed weights, rounded down or up."""
        return None

    def of(self, index: CocoIndex, seed: int) -> Order:
        wide = index.sizes[:, 1] >= index.sizes[:, 0] if self.group_shapes else None
        return Order(len(index), seed, self.weights(index), wide, self.strata(index))


class Shuffle(Ordering):
    """Every image once an epoch."""

    type: Literal["shuffle"] = "shuffle"

    def weights(self, index: CocoIndex) -> np.ndarray | None:
        return None


class RepeatFactor(Ordering):
    """Images of rare classes more often (Gupta et al., arXiv:1908.03195, section 5).

    A class in the share f of the images has the factor max(1, sqrt(threshold / f)), an image that of its rarest class.
    """

    type: Literal["repeat_factor"] = "repeat_factor"
    threshold: float = Field(1e-3, gt=0, le=1, description="classes in a smaller share of the images are repeated")

    def weights(self, index: CocoIndex) -> np.ndarray:
        image, label = _pairs(index)
        share = np.bincount(label, minlength=len(index.classes)) / len(index)
        factor = np.sqrt(self.threshold / np.maximum(share, 1e-12)).clip(min=1)
        weights = np.ones(len(index))
        np.maximum.at(weights, image, factor[label])
        return np.asarray(weights / weights.mean())


class ClassBalanced(Ordering):
    """Each class equally often: a class is drawn, then one of its images.

    Images without objects keep the share that they have in the set.
    """

    type: Literal["class_balanced"] = "class_balanced"

    def weights(self, index: CocoIndex) -> np.ndarray:
        image, label = _pairs(index)
        if len(image) == 0:
            raise DataError(f"{index.annotations}: no object to balance classes by: set data.order.type=shuffle")
        images_of = np.bincount(label, minlength=len(index.classes))
        chance = np.zeros(len(index))
        np.add.at(chance, image, 1 / images_of[label])
        chance /= chance.sum()
        empty = chance == 0
        return np.asarray(np.where(empty, 1.0, chance * (len(index) - empty.sum())))


class BySource(Ordering):
    """Each of several data sets with a share of its own, whatever its size; within a set every image alike."""

    type: Literal["by_source"] = "by_source"
    shares: dict[str, Annotated[float, Field(ge=0)]] = Field(
        min_length=1, description="source: its share of the samples, relative to the others'; 0: none"
    )

    def check(self, sources: Sequence[str]) -> None:
        """
        Raises:
            ValueError: the shares are not those of exactly these sources, or all of them are 0.
        """
        strange = next((name for name in self.shares if name not in sources), None)
        if strange is not None:
            raise ValueError(f"order.shares: {strange!r} is no source to train on; they are {', '.join(sources)}")
        lacking = next((name for name in sources if name not in self.shares), None)
        if lacking is not None:
            raise ValueError(f"order.shares: the source {lacking!r} has none: give one for each, 0 to leave it out")
        if not any(self.shares.values()):
            raise ValueError("order.shares: all are 0, expected one above")

    def weights(self, index: CocoIndex) -> np.ndarray:
        """
        Raises:
            DataError: the data are not of several sources, or one that is to have samples has no image.
        """
        if not isinstance(index, SeveralIndex):
            raise DataError("data.order.type=by_source needs several sources: set data.type=several, or another order")
        shares = np.array([self.shares[name] for name in index.sources])
        counts = np.diff(index.first_image)
        empty = np.flatnonzero((counts == 0) & (shares > 0))
        if len(empty):
            name = index.sources[empty[0]]
            raise DataError(f"data.order.shares: the source {name!r} holds no image: set {name}: 0")
        return np.asarray((len(index) * shares / shares.sum() / np.maximum(counts, 1))[index.source])

    def strata(self, index: CocoIndex) -> np.ndarray | None:
        return index.source if isinstance(index, SeveralIndex) else None


AnyOrdering = Annotated[Shuffle | RepeatFactor | ClassBalanced | BySource, Field(discriminator="type")]


class Order:
    """The images of each epoch.  n images, b images of a step on all ranks together.

    Of images with weights, those of one of the `strata` together get as many places as their weights sum to, rounded
    down or up.
    """

    def __init__(
        self,
        length: int,
        seed: int,
        weights: np.ndarray | None = None,
        wide: np.ndarray | None = None,
        strata: np.ndarray | None = None,
    ) -> None:
        self.length = length
        self.seed = seed
        self.weights = weights
        self.wide = wide
        self.strata = strata

    def epoch(self, epoch: int, batch: int = 1) -> tuple[np.ndarray, np.ndarray]:
        """((n,) images in their order, (n,) how often each was shown before in this epoch).

        `batch`: b; images of one shape fill the steps that begin and end within the epoch, as far as they go.
        """
        rng = seeding.generator(self.seed, seeding.ORDER, epoch)
        images = rng.permutation(self.length)
        if self.strata is not None:
            images = images[np.argsort(self.strata[images], kind="stable")]
        if self.weights is not None:
            images = rng.permutation(_resample(images, self.weights[images], rng))
        if self.wide is not None:
            images = self._grouped(images, -epoch * self.length % batch, batch, rng)
        repeats = np.zeros(self.length, dtype=np.int64) if self.weights is None else _earlier(images)
        return images, repeats

    def _grouped(self, images: np.ndarray, head: int, batch: int, rng: np.random.Generator) -> np.ndarray:
        """The first `head` places belong to a step that the epoch before has begun; from there on, step by step."""
        assert self.wide is not None
        steps = max(self.length - head, 0) // batch
        kinds = [images[self.wide[images]], images[~self.wide[images]]]
        full = [kind[: len(kind) // batch * batch].reshape(-1, batch) for kind in kinds]
        blocks = rng.permutation(np.concatenate(full))[:steps]
        # What fills no step of its own, in one row, wide before tall: it gives the mixed steps, the head and the tail.
        rest = np.concatenate([kinds[0], kinds[1]])
        used = np.zeros(self.length, dtype=np.int64)
        np.add.at(used, blocks.ravel(), 1)
        rest = rest[_earlier(rest) >= used[rest]]
        mixed = steps - len(blocks)
        middle, ends = rest[: mixed * batch].reshape(-1, batch), rest[mixed * batch :]
        ordered = rng.permutation(np.concatenate([blocks, middle]))
        ends = rng.permutation(ends)
        return np.concatenate([ends[:head], ordered.ravel(), ends[head:]])


def _pairs(index: CocoIndex) -> tuple[np.ndarray, np.ndarray]:
    """((p,), (p,)): image and label of each class in each image, crowd regions aside."""
    image = np.repeat(np.arange(len(index)), np.diff(index.offsets))[~index.crowd]
    pairs = np.unique(image * len(index.classes) + index.labels[~index.crowd])
    return pairs // max(len(index.classes), 1), pairs % max(len(index.classes), 1)


def _resample(images: np.ndarray, weights: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """(n,) of n images: each floor(w) or ceil(w) times, w on average (systematic sampling: equal steps along the
    cumulated weights, from a drawn start)."""
    ends = np.cumsum(weights)
    ends *= len(images) / ends[-1]
    return np.asarray(
        images[np.searchsorted(ends, np.arange(len(images)) + rng.uniform(), side="right").clip(max=len(images) - 1)]
    )


def _earlier(images: np.ndarray) -> np.ndarray:
    """(n,): how often the same number stands before each place."""
    order = np.argsort(images, kind="stable")
    ordered = images[order]
    first = np.searchsorted(ordered, ordered, side="left")
    earlier = np.empty(len(images), dtype=np.int64)
    earlier[order] = np.arange(len(images)) - first
    return earlier
