"""The data section of a recipe: COCO-format files of one's own, or generated shapes."""

from __future__ import annotations

import math
from abc import abstractmethod
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from detector.config.node import Node
from detector.data.coco import CocoData, CocoIndex
from detector.data.order import AnyOrdering, Shuffle
from detector.data.resize import Resize, ShortEdge
from detector.data.shape_suites import SUITES, SuiteName
from detector.data.shapes import SMALLEST_IMAGE, ShapeSet, ensure
from detector.errors import DataError
from detector.pixels import Pixels

SplitName = Literal["train", "val", "test"]
Side = Annotated[int, Field(ge=SMALLEST_IMAGE, le=4096)]
PARTS: tuple[SplitName, ...] = ("train", "val", "test")


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
    order: AnyOrdering = Field(Shuffle(), description="of the training images")
    partner_cache: int = Field(
        128, ge=0, description="MiB in each worker for images that mosaic, mixup and copy-paste have drawn before"
    )

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

    def open(self, split: SplitName, classes: tuple[str, ...] | None = None) -> CocoData:
        """One split, indexed.

        `classes`: what its classes must be, those of the training split or of a checkpoint; None: whatever they are.

        Raises:
            DataError: the split is not given, a file is missing or wrong, or its classes are others.
        """
        annotations, images = self.files(split)
        index = CocoIndex.load(annotations, images)
        if classes is not None and index.classes != classes:
            raise DataError(f"{annotations}: {_difference(index.classes, classes)}; all splits must have equal classes")
        return CocoData(index, None if self.reduced_decoding is None else self._least, self.pixels)

    def _least(self, size: tuple[int, int]) -> tuple[int, int]:
        """(height, width) that decoding has to leave of an image of `size`, in training as in evaluation."""
        assert self.reduced_decoding is not None
        height, width = self.resize.largest(size)
        return math.ceil(height * self.reduced_decoding), math.ceil(width * self.reduced_decoding)

    @abstractmethod
    def files(self, split: SplitName) -> tuple[Path, Path]:
        """(annotation file, image folder) of a split, made now where they are made on first use.

        Raises:
            DataError: the split is not given, or its files are missing.
        """


class SplitFiles(Node):
    """Where one split is, relative to the data's `root`."""

    annotations: Path
    images: Path


class CocoFiles(DataSource):
    """Annotation files in COCO's format and folders of images."""

    type: Literal["coco"] = "coco"
    root: Path = Field(Path("."), description="the splits' paths are relative to this, and this to the current folder")
    train: SplitFiles
    val: SplitFiles
    test: SplitFiles | None = None

    def files(self, split: SplitName) -> tuple[Path, Path]:
        given = {"train": self.train, "val": self.val, "test": self.test}[split]
        if given is None:
            raise DataError(f"data.{split} is not set: give data.{split}.annotations and data.{split}.images")
        annotations, images = self.root / given.annotations, self.root / given.images
        for key, path, found in (
            ("annotations", annotations, annotations.is_file()),
            ("images", images, images.is_dir()),
        ):
            if not found:
                what = "file" if key == "annotations" else "folder"
                raise DataError(
                    f"data.{split}.{key}: {path}: no such {what}; set data.root (now {self.root}) to where the data"
                    f" are, or data.{split}.{key}"
                )
        return annotations, images


class ShapesData(DataSource):
    """Generated shapes, written on first use: nothing to download."""

    type: Literal["shapes"] = "shapes"
    suite: SuiteName = Field("plain", description="; ".join(f"{name}: {suite.about}" for name, suite in SUITES.items()))
    size: tuple[Side, Side] = Field((192, 256), description="height, width of the images")
    train: int = Field(240, ge=1, description="images of the training split")
    val: int = Field(60, ge=1)
    test: int = Field(60, ge=1)
    seed: int = Field(0, ge=0, description="of the pictures, not of the training")
    root: Path | None = Field(None, description="default: data/shapes-<suite>-<height>x<width>")
    resize: Resize = ShortEdge(short=192, long=256)

    @property
    def folder(self) -> Path:
        return self.root or Path("data") / f"shapes-{self.suite}-{self.size[0]}x{self.size[1]}"

    def files(self, split: SplitName) -> tuple[Path, Path]:
        count = {"train": self.train, "val": self.val, "test": self.test}[split]
        folder = self.folder / split
        ensure(folder, ShapeSet(self.suite, count, self.size, self.seed, PARTS.index(split)))
        return folder / "annotations.json", folder / "images"


Data = Annotated[CocoFiles | ShapesData, Field(discriminator="type")]


def _difference(found: tuple[str, ...], expected: tuple[str, ...]) -> str:
    extra = [c for c in found if c not in expected]
    missing = [c for c in expected if c not in found]
    if extra or missing:
        parts = [f"class {extra[0]!r} is unexpected"] if extra else []
        parts += [f"class {missing[0]!r} is missing"] if missing else []
        return f"{len(found)} classes, expected {len(expected)}: " + " and ".join(parts)
    return "the classes are in another order of their category ids"
