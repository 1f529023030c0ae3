"""The data section of a recipe: COCO-format files of one's own, generated shapes, or several such sets as one."""

from __future__ import annotations

import logging
import math
from abc import abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import BeforeValidator, Field, StringConstraints, model_validator

from detector.config.node import Node
from detector.data.cache import CacheKind, default_folder, open_cache
from detector.data.coco import CocoData, CocoIndex
from detector.data.index import class_names
from detector.data.order import AnyOrdering, BySource, Shuffle
from detector.data.places import PARTS, CocoPlace, Place, ShapesPlace, SplitFiles
from detector.data.places import SplitName as SplitName
from detector.data.proposals import ProposalFiles
from detector.data.resize import Resize, ShortEdge
from detector.data.several import Renaming, SeveralIndex, listed, merged, partly_labelled, renamed
from detector.errors import DataError
from detector.pixels import Pixels

_log = logging.getLogger(__name__)


class DataSource(Node):
    """What all sources of data share."""

    pixels: Pixels = Field(Pixels(), description="what the images hold, and how they are normalised")
    resize: Resize = ShortEdge()
    pad_multiple: int = Field(32, ge=1, description="height and width of a batch are multiples of this")
    workers: int = Field(2, ge=0, description="processes that read and augment; 0: the main process does")
    reduced_decoding: float | None = Field(
        None,
        ge=1,
        description="JPEGs are decoded at 1/2, 1/4 or 1/8 of their size where this leaves so many times the height and"
        " width that `resize` asks for: 1 saves most, 2 keeps detail for crops that enlarge; default: never",
    )
    max_unreadable: int = Field(10, ge=0, description="images that may turn out unreadable before the run stops")
    augment_on: Literal["workers", "device"] = Field(
        "workers",
        description="device: the training device does multi-scale, and flip and color at the end of `augment`, for"
        " machines with more GPU than CPU; from the same random numbers",
    )
    proposals: ProposalFiles | None = Field(
        None, description="boxes that may hold an object, for models that are given them (model.rpn=null)"
    )
    order: AnyOrdering = Field(Shuffle(), description="of the training images")
    partner_cache: int = Field(
        128, ge=0, description="MiB in each worker for images that mosaic, mixup and copy-paste have drawn before"
    )

    cache: CacheKind = Field(
        "none",
        description="decoded images are kept from their first use on, while training: memory: by this run, for all of"
        " its workers; file: in `cache_dir`, also for later runs",
    )
    cache_dir: Path | None = Field(None, description="default: $XDG_CACHE_HOME/detector, or ~/.cache/detector")

    @model_validator(mode="after")
    def _cache_has_a_folder(self) -> Self:
        if self.cache_dir is not None and self.cache != "file":
            raise ValueError(f"cache_dir is set, but cache is {self.cache!r}: set cache=file, or leave cache_dir out")
        return self

    @model_validator(mode="after")
    def _scales_in_reach(self) -> Self:
        """On the device an image is resampled once more, linearly, which skips pixels where it shrinks too far."""
        sizes = self.resize.multi_scale
        if self.augment_on == "device" and sizes and 2 * min(sizes) < self.resize.length:
            raise ValueError(
                f"resize.multi_scale: {min(sizes)} is less than half of {self.resize.length}, too far for augment_on:"
                " device, which resamples images of the set size: set a smaller size, or augment_on: workers"
            )
        return self

    def open(self, split: SplitName, classes: tuple[str, ...] | None = None, *, cached: bool = False) -> CocoData:
        """One split, indexed.

        Args:
            classes: what its classes must be, those of the training split or of a checkpoint; None: whatever they are.
            cached: with the `cache`, for whoever reads all images again and again.

        Raises:
            DataError: the split is not given, a file is missing or wrong, its classes are others, or the cache does not
                fit.
        """
        index = self.index(split)
        if classes is not None and index.classes != classes:
            raise DataError(
                f"{index.annotations}: {_difference(index.classes, classes)}; all splits must have equal classes"
            )
        least = None if self.reduced_decoding is None or not self.pixels.plain else self._least
        cache = None
        if cached and self.cache != "none":
            cache = open_cache(index, least, self.cache, self.cache_dir or default_folder(), self.pixels)
        proposals = None if self.proposals is None else self.proposals.load(split, index)
        return CocoData(index, least, cache, self.pixels, proposals)

    def _least(self, size: tuple[int, int]) -> tuple[int, int]:
        """(height, width) that decoding has to leave of an image of `size`, in training as in evaluation."""
        assert self.reduced_decoding is not None
        height, width = self.resize.largest(size)
        return math.ceil(height * self.reduced_decoding), math.ceil(width * self.reduced_decoding)

    @abstractmethod
    def parts(self, split: SplitName) -> dict[str, tuple[Path, Path]]:
        """(annotation file, image folder) of each source of a split, under "" where there is but one; made now where
        they are made on first use.

        Raises:
            DataError: the split is not given, or its files are missing.
        """

    @abstractmethod
    def gives(self, split: SplitName) -> bool:
        """Whether the split is there."""

    def index(self, split: SplitName) -> CocoIndex:
        """
        Raises:
            DataError: as `parts`, or something in a file is wrong.
        """
        ((annotations, images),) = self.parts(split).values()
        return CocoIndex.load(annotations, images)


class CocoFiles(CocoPlace, DataSource):
    """Annotation files in COCO's format and folders of images."""

    train: SplitFiles
    val: SplitFiles

    def parts(self, split: SplitName) -> dict[str, tuple[Path, Path]]:
        return {"": self.files(split)}

    def gives(self, split: SplitName) -> bool:
        return self.has(split)


class ShapesData(ShapesPlace, DataSource):
    """Generated shapes, written on first use: nothing to download."""

    resize: Resize = ShortEdge(short=192, long=256)

    def parts(self, split: SplitName) -> dict[str, tuple[Path, Path]]:
        return {"": self.files(split)}

    def gives(self, split: SplitName) -> bool:
        return self.has(split)


class Member(Place):
    """One of several sources: how its classes are called in the run."""

    rename: dict[str, str] = Field({}, description="{name in its files: name in the run}; may make several classes one")
    drop: tuple[str, ...] = Field((), description="classes, as in its files, whose objects are not used")

    @model_validator(mode="after")
    def _not_both(self) -> Member:
        both = next((name for name in self.drop if name in self.rename), None)
        if both is not None:
            raise ValueError(f"class {both!r} is both renamed and dropped: take it out of one of them")
        return self


class CocoMember(CocoPlace, Member):
    """A source in COCO's format; it takes part in the splits that it gives."""


class ShapesMember(ShapesPlace, Member):
    """A source of generated shapes."""


SourceName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]*$", max_length=60)]
Chosen = Annotated[
    Literal["all"] | tuple[SourceName, ...],
    BeforeValidator(lambda value: (value,) if isinstance(value, str) and value != "all" else value),
]


class SeveralData(DataSource):
    """Several data sets in one run; classes of equal names are one class."""

    type: Literal["several"] = "several"
    sources: dict[SourceName, Annotated[CocoMember | ShapesMember, Field(discriminator="type")]] = Field(
        min_length=1, description="name: {type: coco | shapes, where it is, rename, drop}; images come in this order"
    )
    classes: tuple[str, ...] | None = Field(
        None, min_length=1, description="all classes in the order of their labels; default: as they first appear"
    )
    partial: Literal["note", "refuse", "allow"] = Field(
        "note",
        description="classes that a training source does not label and that its images would teach as background",
    )
    train: Chosen = Field("all", description="the sources to train on: a name, names, or all that give this split")
    val: Chosen = "all"
    test: Chosen = "all"

    @model_validator(mode="after")
    def _consistent(self) -> SeveralData:
        if "all" in self.sources:
            raise ValueError("sources: none may be called 'all', which means all of them")
        if self.classes is not None and len(set(self.classes)) < len(self.classes):
            raise ValueError("classes: a name occurs twice")
        for split in PARTS:
            chosen = self._chosen(split)
            if chosen == "all":
                if split != "test" and not self.taking_part(split):
                    raise ValueError(f"no source gives the split {split}: give sources.NAME.{split}")
                continue
            for name in chosen:
                if name not in self.sources:
                    raise ValueError(f"{split}: there is no source {name!r}; there are {listed(tuple(self.sources))}")
                if not self.sources[name].has(split):
                    raise ValueError(
                        f"{split}: the source {name!r} does not give this split: set sources.{name}.{split}"
                    )
            if not chosen or len(set(chosen)) < len(chosen):
                raise ValueError(f"{split}: expected at least one source, each once")
        if isinstance(self.order, BySource):
            self.order.check(self.taking_part("train"))
        return self

    def taking_part(self, split: SplitName) -> tuple[str, ...]:
        """The sources of a split, in the order of `sources`."""
        chosen = self._chosen(split)
        return tuple(n for n, s in self.sources.items() if (s.has(split) if chosen == "all" else n in chosen))

    def gives(self, split: SplitName) -> bool:
        return bool(self.taking_part(split))

    def parts(self, split: SplitName) -> dict[str, tuple[Path, Path]]:
        names = self.taking_part(split)
        if not names:
            raise DataError(f"data.{split}: no source gives this split: give data.sources.NAME.{split}")
        return {name: self._paths(name, split) for name in names}

    def index(self, split: SplitName) -> SeveralIndex:
        parts = {}
        for name, paths in self.parts(split).items():
            with _of_source(name):
                parts[name] = CocoIndex.load(*paths)
        renaming = self.renaming()
        classes = merged(renaming, self.classes)
        for name, part in parts.items():
            strange = next((c for c in part.classes if c not in renaming[name]), None)
            if strange is not None:
                raise DataError(
                    f"source {name!r}: {part.annotations}: class {strange!r} is none of the source's first split; all"
                    " splits of a source must have equal classes"
                )
        if split == "train":
            self._judge({name: renaming[name] for name in parts}, classes)
        return SeveralIndex.merge(parts, classes, renaming)

    def renaming(self) -> dict[str, Renaming]:
        """Of every source, whether it takes part or not, so that the classes are the same in all splits.

        Raises:
            DataError: a file is missing or wrong, or a class is named that a source does not have.
        """
        found = {}
        for name, source in self.sources.items():
            split = next((split for split in PARTS if source.has(split)), None)
            if split is None:
                raise DataError(f"data.sources.{name}: gives no split: set data.sources.{name}.train")
            with _of_source(name):
                names = class_names(*self._paths(name, split))
            found[name] = renamed(name, names, source.rename, source.drop)
        return found

    def _judge(self, renaming: dict[str, Renaming], classes: tuple[str, ...]) -> None:
        """What `partial` asks for."""
        problem = partly_labelled(renaming, classes) if self.partial != "allow" else None
        if problem is not None and self.partial == "refuse":
            raise DataError(f"data.sources: {problem}")
        if problem is not None:
            _log.warning("data.sources: %s", problem)

    def _chosen(self, split: SplitName) -> Literal["all"] | tuple[str, ...]:
        return {"train": self.train, "val": self.val, "test": self.test}[split]

    def _paths(self, name: str, split: SplitName) -> tuple[Path, Path]:
        return self.sources[name].files(split, f"data.sources.{name}")


Data = Annotated[CocoFiles | ShapesData | SeveralData, Field(discriminator="type")]


@contextmanager
def _of_source(name: str) -> Iterator[None]:
    """Says which source's files are at fault."""
    try:
        yield
    except DataError as error:
        raise DataError(f"source {name!r}: {error}") from None


def _difference(found: tuple[str, ...], expected: tuple[str, ...]) -> str:
    extra = [c for c in found if c not in expected]
    missing = [c for c in expected if c not in found]
    if extra or missing:
        parts = [f"class {extra[0]!r} is unexpected"] if extra else []
        parts += [f"class {missing[0]!r} is missing"] if missing else []
        return f"{len(found)} classes, expected {len(expected)}: " + " and ".join(parts)
    return "the classes are in another order of their category ids"
