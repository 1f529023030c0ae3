"""Where one data set is: files of one's own in COCO's format, or shapes that are generated on first use."""

from __future__ import annotations

import re
from abc import abstractmethod
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from detector.config.node import Node
from detector.data.shape_suites import SUITES, SuiteName
from detector.data.shapes import SMALLEST_IMAGE, ShapeSet, ensure
from detector.errors import DataError

SplitName = Literal["train", "val", "test"]
Side = Annotated[int, Field(ge=SMALLEST_IMAGE, le=4096)]
PARTS: tuple[SplitName, ...] = ("train", "val", "test")


def place_key(key: str) -> str:
    """A configuration key, with the root of one of several sources named as that of a single one: both only say where
    the data are."""
    return re.sub(r"^data\.sources\.[^.]+\.root$", "data.root", key)


class SplitFiles(Node):
    """Where one split is, relative to the data's `root`."""

    annotations: Path
    images: Path


class Place(Node):
    """The splits of one data set."""

    @abstractmethod
    def has(self, split: SplitName) -> bool:
        """Whether the split is given."""

    @abstractmethod
    def files(self, split: SplitName, section: str = "data") -> tuple[Path, Path]:
        """(annotation file, image folder) of a split, made now where they are made on first use.

        `section`: the dotted key of this section, for messages.

        Raises:
            DataError: the split is not given, or its files are missing.
        """


class CocoPlace(Place):
    """Annotation files in COCO's format and folders of images."""

    type: Literal["coco"] = "coco"
    root: Path = Field(Path("."), description="the splits' paths are relative to this, and this to the current folder")
    train: SplitFiles | None = None
    val: SplitFiles | None = None
    test: SplitFiles | None = None

    def has(self, split: SplitName) -> bool:
        return self._given(split) is not None

    def files(self, split: SplitName, section: str = "data") -> tuple[Path, Path]:
        given, key = self._given(split), f"{section}.{split}"
        if given is None:
            raise DataError(f"{key} is not set: give {key}.annotations and {key}.images")
        annotations, images = self.root / given.annotations, self.root / given.images
        for what, name, path, found in (
            ("file", "annotations", annotations, annotations.is_file()),
            ("folder", "images", images, images.is_dir()),
        ):
            if not found:
                raise DataError(
                    f"{key}.{name}: {path}: no such {what}; set {section}.root (now {self.root}) to where the data"
                    f" are, or {key}.{name}"
                )
        return annotations, images

    def _given(self, split: SplitName) -> SplitFiles | None:
        return {"train": self.train, "val": self.val, "test": self.test}[split]


class ShapesPlace(Place):
    """Generated shapes, written on first use: nothing to download."""

    type: Literal["shapes"] = "shapes"
    suite: SuiteName = Field("plain", description="; ".join(f"{name}: {suite.about}" for name, suite in SUITES.items()))
    size: tuple[Side, Side] = Field((192, 256), description="height, width of the images")
    train: int = Field(240, ge=1, description="images of the training split")
    val: int = Field(60, ge=1)
    test: int = Field(60, ge=1)
    seed: int = Field(0, ge=0, description="of the pictures, not of the training")
    root: Path | None = Field(None, description="default: data/shapes-<suite>-<height>x<width>")

    @property
    def folder(self) -> Path:
        return self.root or Path("data") / f"shapes-{self.suite}-{self.size[0]}x{self.size[1]}"

    def has(self, split: SplitName) -> bool:
        return True

    def files(self, split: SplitName, section: str = "data") -> tuple[Path, Path]:
        count = {"train": self.train, "val": self.val, "test": self.test}[split]
        folder = self.folder / split
        ensure(folder, ShapeSet(self.suite, count, self.size, self.seed, PARTS.index(split)))
        return folder / "annotations.json", folder / "images"
