"""What the data doctor can find: each kind with its severity, what it means and what its repair does."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any

_EXAMPLES = 5


class Severity(IntEnum):
    """An error is refused, or left out, by training; a warning is a likely mistake; a notice is good to know."""

    ERROR = 0
    WARNING = 1
    NOTICE = 2


@dataclass(frozen=True)
class Kind:
    severity: Severity
    meaning: str
    repair: str | None  # what `--fix` does; None where only a person can tell


_E, _W, _N = Severity

KINDS: dict[str, Kind] = {
    "file": Kind(_E, "the file cannot be used", None),
    "wrong-type": Kind(
        _E, "a value has the wrong type", 'converted where it is plain ("7", 7.0), else the entry is left out'
    ),
    "missing-key": Kind(_E, "a required key is missing", "filled in where it can be known, else the entry is left out"),
    "duplicate-image-id": Kind(_E, "an image id occurs twice", "the first image is kept"),
    "duplicate-category-id": Kind(_E, "a category id occurs twice", "the first category is kept"),
    "duplicate-annotation-id": Kind(_E, "an annotation id occurs twice", "the later annotation gets a new id"),
    "unknown-image": Kind(_E, "an annotation of an image that is not listed", "left out"),
    "unknown-category": Kind(_E, "an annotation of a category that is not listed", "left out"),
    "file-name-leaves-folder": Kind(
        _E, "a file_name points out of the image folder", "image and its annotations left out"
    ),
    "image-missing": Kind(_E, "the image file does not exist", "image and its annotations left out"),
    "all-images-missing": Kind(_E, "not one image file exists: is it the right image folder?", None),
    "image-unreadable": Kind(_E, "the image file is damaged or no image", "image and its annotations left out"),
    "image-size": Kind(
        _E,
        "width, height differ from the image file's",
        "set to the file's if all boxes lie within, else image and annotations left out",
    ),
    "box-not-finite": Kind(_E, "a box with NaN or infinite numbers", "taken from the mask, else left out"),
    "box-no-area": Kind(_E, "a box without width or height", "left out"),
    "box-outside": Kind(_E, "a box outside its image", "left out"),
    "boxes-are-fractions": Kind(_E, "all boxes lie within 0..1: fractions, expected pixels", None),
    "boxes-are-corners": Kind(_E, "boxes look like x1, y1, x2, y2, expected x, y, width, height", None),
    "box-sticks-out": Kind(_W, "a box sticks out of its image by more than a pixel", "clipped"),
    "duplicate-box": Kind(_W, "the same box, class and image as another annotation", "the first is kept"),
    "segmentation": Kind(
        _W, "a segmentation that cannot be drawn", "the wrong polygons or the run lengths are taken out"
    ),
    "mask-differs-from-box": Kind(_W, "the segmentation's extent differs from the box", None),
    "duplicate-file-name": Kind(_W, "two images have the same file_name", None),
    "duplicate-category-name": Kind(_W, "two categories have the same name", "the id is appended to the names"),
    "annotation-id-0": Kind(
        _W, 'annotation id 0, which pycocotools takes for "not found"', "the annotation gets a new id"
    ),
    "area": Kind(_W, "an area that is negative or no number", "taken from the mask, else from the box"),
    "weight": Kind(_E, "a weight that is negative or no number", "taken out, which is a weight of 1"),
    "missing-area": Kind(_N, "`area` is missing (training takes the box's)", "taken from the mask, else from the box"),
    "missing-iscrowd": Kind(_N, "`iscrowd` is missing (training takes 0)", "set to 0"),
    "box-under-one-pixel": Kind(_N, "a box narrower or lower than one pixel", None),
    "crowd-without-run-lengths": Kind(_N, "a crowd region without run-length mask (its box is used)", None),
    "class-without-objects": Kind(_N, "a class without any object here: its AP is undefined", None),
    "image-without-objects": Kind(_N, "an image without objects (kept: it teaches the background)", None),
    "id-0": Kind(_N, "ids start at 0 (fine here, a surprise to some tools)", None),
    "orientation": Kind(_N, "a camera orientation that the image size does not show: it is applied", None),
    "no-annotations": Kind(_N, "no annotations: a test set, fit for prediction only", None),
}


@dataclass
class Finding:
    """One kind of problem: how often, and where it was seen first."""

    name: str
    count: int = 0
    examples: list[str] = field(default_factory=list)

    @property
    def kind(self) -> Kind:
        return KINDS[self.name]


@dataclass
class Report:
    """All that was found in one file."""

    counts: dict[str, int] = field(default_factory=dict)  # images, annotations, categories in the file
    found: dict[str, Finding] = field(default_factory=dict)

    def add(self, name: str, example: str, count: int = 1) -> None:
        finding = self.found.setdefault(name, Finding(name))
        finding.count += count
        if len(finding.examples) < _EXAMPLES:
            finding.examples.append(example)

    def of(self, severity: Severity) -> list[Finding]:
        return [f for name in KINDS if (f := self.found.get(name)) is not None and f.kind.severity == severity]

    @property
    def errors(self) -> list[Finding]:
        return self.of(Severity.ERROR)

    @property
    def beyond_repair(self) -> list[Finding]:
        """The errors that only a person can mend."""
        return [f for f in self.errors if f.kind.repair is None]

    def as_json(self) -> dict[str, Any]:
        return {
            "counts": self.counts,
            "errors": sum(f.count for f in self.of(Severity.ERROR)),
            "warnings": sum(f.count for f in self.of(Severity.WARNING)),
            "findings": [
                {
                    "kind": f.name,
                    "severity": severity.name.lower(),
                    "count": f.count,
                    "meaning": f.kind.meaning,
                    "repair": f.kind.repair,
                    "examples": f.examples,
                }
                for severity in Severity
                for f in self.of(severity)
            ],
        }
