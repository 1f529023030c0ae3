"""Generated COCO-format data: coloured shapes on textured ground, written on first use, the same bytes everywhere.

    folder/annotations.json     COCO: polygons, run-length masks where something lies in front, crowd regions
    folder/images/000001.png    ...
    folder/shapes.json          what it was made from; a set of other settings is made anew

The same bytes on every machine: all random numbers are integers of a seeded stream of their own per image, all drawing
is integer arithmetic, and the PNG files are stored without compression, whose result would depend on the library.
Boxes, masks and areas are those of the visible part.  How the pictures differ is said in `shape_suites.py`.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from detector import seeding
from detector.data.shape_drawing import SUB, Stamp, finish, ground, paint, png, rasterize
from detector.data.shape_suites import SIZE_STEPS, SUITES, TURN, UNIT, Suite, SuiteName, outline, size_at
from detector.errors import DataError

VERSION = 1  # of the pictures: raise it when the same settings give other bytes
SMALLEST = 4  # pixels, of a box's shorter side
SMALLEST_IMAGE = 32  # pixels, of an image's shorter side
TRIES = 30  # places tried for one object before it is left out


@dataclass(frozen=True)
class ShapeSet:
    """The settings of one generated set; equal settings give equal bytes."""

    suite: SuiteName
    images: int
    size: tuple[int, int]  # height, width in pixels
    seed: int = 0
    part: int = 0  # sets of equal seed and different part share no image: training 0, validation 1, test 2

    def marker(self) -> dict[str, Any]:
        return {
            "generator": VERSION,
            "suite": self.suite,
            "images": self.images,
            "size": list(self.size),
            "seed": self.seed,
            "part": self.part,
        }


def ensure(folder: Path, settings: ShapeSet) -> None:
    """The set in `folder`, written now unless it is there already.

    Written beside it and renamed, so that an interrupted run leaves nothing half done and several processes may call
    this at once.

    Raises:
        DataError: the folder holds something that this generator did not write, or cannot be written.
    """
    if _marker_of(folder) == settings.marker():
        return
    if folder.exists() and _marker_of(folder) is None and any(folder.iterdir()):
        raise DataError(f"{folder}: is not a generated set and is not empty: move it away or choose another folder")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    except OSError as error:
        raise DataError(f"{folder}: cannot write the generated set there: {error.strerror}") from None
    try:
        _write(temporary, settings)
        temporary.chmod(0o755)  # mkdtemp keeps others out
        _replace(folder, temporary, settings)
    except OSError as error:
        raise DataError(f"{folder}: cannot write the generated set there: {error.strerror}") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _marker_of(folder: Path) -> dict[str, Any] | None:
    try:
        found = json.loads((folder / "shapes.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def _replace(folder: Path, made: Path, settings: ShapeSet) -> None:
    """`made` takes the place of `folder`, or gives way to an equal set that another process has put there."""
    if folder.exists():
        old = Path(tempfile.mkdtemp(prefix=f".{folder.name}.old.", dir=folder.parent))
        try:
            os.rename(folder, old)  # onto an empty folder: replaces it
        except FileNotFoundError:
            pass  # another process was faster
        finally:
            shutil.rmtree(old, ignore_errors=True)
    try:
        os.rename(made, folder)
    except OSError:
        if _marker_of(folder) != settings.marker():
            raise


def _write(folder: Path, settings: ShapeSet) -> None:
    suite = SUITES[settings.suite]
    (folder / "images").mkdir()
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for index in range(settings.images):
        picture = draw(settings, index)
        name = f"{index + 1:06d}.png"
        (folder / "images" / name).write_bytes(png(picture.image))
        height, width = settings.size
        images.append({"id": index + 1, "file_name": name, "height": height, "width": width})
        for annotation in picture.annotations:
            annotations.append({"id": len(annotations) + 1, "image_id": index + 1, **annotation})
    document = {
        "info": {"description": f"generated shapes, suite {settings.suite}: {suite.about}"},
        "categories": [{"id": i + 1, "name": name} for i, name in enumerate(suite.classes)],
        "images": images,
        "annotations": annotations,
    }
    (folder / "annotations.json").write_text(json.dumps(document, separators=(",", ":")) + "\n", encoding="utf-8")
    (folder / "shapes.json").write_text(json.dumps(settings.marker(), indent=1) + "\n", encoding="utf-8")


# ------------------------------------------------------------------------------------------------------ one picture


@dataclass(frozen=True)
class Picture:
    image: np.ndarray  # (H, W, 3) uint8 RGB
    annotations: list[dict[str, Any]]  # COCO's, without `id` and `image_id`


@dataclass
class _Placed:
    label: int
    pixels: int  # of the whole outline, hidden ones included
    polygon: np.ndarray | None  # (v, 2) int64 in 1 / SUB pixels; None for a crowd


class _Canvas:
    """What lies where: `owner` holds for each pixel the number of the topmost object, -1 for the ground."""

    def __init__(self, size: tuple[int, int], rng: np.random.Generator) -> None:
        self.rng = rng
        self.size = size
        self.color = ground(size, rng)
        self.owner = np.full(size, -1, dtype=np.int64)
        self.placed: list[_Placed] = []
        self.shown = np.zeros(0, dtype=np.int64)  # visible pixels of each that is placed

    def hides_too_much(self, stamp: Stamp, visible: int) -> bool:
        """Would `stamp` leave less than `visible` percent of an object placed before?"""
        covered = self._count(stamp)
        whole = np.array([p.pixels for p in self.placed], dtype=np.int64)
        return bool(((covered > 0) & ((self.shown - covered) * 100 < whole * visible)).any())

    def add(self, stamps: list[Stamp], label: int, polygon: np.ndarray | None) -> None:
        """One more object, or crowd region, on top of all others."""
        number = len(self.placed)
        for stamp in stamps:
            self.shown -= self._count(stamp)[:number]
            self.owner[stamp.window][stamp.mask] = number
        pixels = int((self.owner == number).sum())
        self.shown = np.append(self.shown, pixels)
        self.placed.append(_Placed(label, pixels, polygon))

    def _count(self, stamp: Stamp) -> np.ndarray:
        """How many pixels of each placed object lie under `stamp`."""
        under = self.owner[stamp.window][stamp.mask]
        return np.bincount(under + 1, minlength=len(self.placed) + 1)[1:]


def draw(settings: ShapeSet, index: int) -> Picture:
    """The `index`-th image of a set; it depends on nothing else than the settings without `images`, and `index`."""
    suite, size = SUITES[settings.suite], settings.size
    rng = seeding.generator(settings.seed, seeding.SYNTHETIC, list(SUITES).index(settings.suite), settings.part, index)
    canvas = _Canvas(size, rng)
    empty = int(rng.integers(100)) < suite.empty
    crowd = int(rng.integers(100)) < suite.crowd
    if crowd and not empty:
        _add_crowd(canvas, suite)
    if not empty:
        for _ in range(int(rng.integers(suite.objects[0], suite.objects[1] + 1))):
            _add_nest(canvas, suite)
    image = finish(canvas.color, rng)
    return Picture(image, [_annotate(canvas, number, placed) for number, placed in enumerate(canvas.placed)])


def _add_nest(canvas: _Canvas, suite: Suite) -> None:
    """One object, or several with one centre, each at most 0.6 as large as the one around it."""
    rng = canvas.rng
    count = int(rng.integers(suite.nest[0], suite.nest[1] + 1))
    # A nest keeps clear of the others, or their boxes would not share their centres.
    visible = 100 if suite.nest[1] > 1 else suite.visible
    for _ in range(TRIES):
        box = _draw_box(canvas.size, suite, rng)
        center = _draw_place(canvas.size, box, rng)
        if _add_object(canvas, suite, box, center, visible):
            break
    else:
        return
    for _ in range(count - 1):
        percent = int(rng.integers(40, 61))
        # Even differences keep the centres exactly equal.
        box = (box[0] - _even(box[0] * (100 - percent) // 100), box[1] - _even(box[1] * (100 - percent) // 100))
        fits = min(box) >= SMALLEST and any(
            _add_object(canvas, suite, box, center, suite.visible) for _ in range(TRIES)
        )
        if not fits:
            return


def _add_object(canvas: _Canvas, suite: Suite, box: tuple[int, int], center: tuple[int, int], visible: int) -> bool:
    """An object of any class, unless it would leave less than `visible` percent of another one."""
    label = int(canvas.rng.integers(len(suite.classes)))
    polygon = _polygon(suite, label, box, center, canvas.rng)
    stamp = rasterize(polygon)
    if not stamp.mask.any() or canvas.hides_too_much(stamp, visible):
        return False
    paint(canvas.color, stamp, canvas.rng)
    canvas.add([stamp], label, polygon)
    return True


def _add_crowd(canvas: _Canvas, suite: Suite) -> None:
    """A cluster of small objects of one class, annotated as one region."""
    rng = canvas.rng
    height, width = canvas.size
    label = int(rng.integers(len(suite.classes)))
    extent = min(height, width) // 3
    side = max(SMALLEST, extent // 4)
    left, top = int(rng.integers(width - extent + 1)), int(rng.integers(height - extent + 1))
    stamps = []
    for _ in range(14):
        length = int(rng.integers(side, 2 * side))
        x = left + int(rng.integers(extent - length + 1))
        y = top + int(rng.integers(extent - length + 1))
        stamps.append(rasterize(_polygon(suite, label, (length, length), (2 * x + length, 2 * y + length), rng)))
        paint(canvas.color, stamps[-1], rng)
    canvas.add(stamps, label, None)


def _draw_box(size: tuple[int, int], suite: Suite, rng: np.random.Generator) -> tuple[int, int]:
    """(width, height) in pixels.  A suite too large for the image shrinks as a whole, so its range of scales stays."""
    longest, limit = suite.side[1], min(size) * 85 // 100
    long = size_at(int(rng.integers(SIZE_STEPS + 1)), suite.side) * min(longest, limit) // longest
    aspect = int(rng.integers(suite.aspect[0], suite.aspect[1] + 1))
    long = max(long, SMALLEST)
    short = max(long * 100 // aspect, SMALLEST)
    return (long, short) if rng.integers(2) else (short, long)


def _draw_place(size: tuple[int, int], box: tuple[int, int], rng: np.random.Generator) -> tuple[int, int]:
    """(x, y) of the centre in half pixels, the box inside the image."""
    x = int(rng.integers(size[1] - box[0] + 1))
    y = int(rng.integers(size[0] - box[1] + 1))
    return 2 * x + box[0], 2 * y + box[1]


def _polygon(
    suite: Suite, label: int, box: tuple[int, int], center: tuple[int, int], rng: np.random.Generator
) -> np.ndarray:
    """(v, 2) in 1 / SUB pixels: the class's outline, turned a little, filling the box."""
    turn = int(rng.integers(-suite.turn, suite.turn + 1)) % TURN
    if suite.aspect[0] >= 200 and box[0] < box[1]:
        turn = (turn + TURN // 4) % TURN  # long outlines lie along the longer side
    extent = np.array(box, dtype=np.int64)
    corner = (np.array(center, dtype=np.int64) - extent) * (SUB // 2)
    return corner + outline(suite.classes[label], turn) * extent * SUB // UNIT


def _even(number: int) -> int:
    return number - number % 2


# ------------------------------------------------------------------------------------------------------- annotation


def _annotate(canvas: _Canvas, number: int, placed: _Placed) -> dict[str, Any]:
    mask = canvas.owner == number
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    x, y = int(columns[0]), int(rows[0])
    area = int(mask.sum())
    segmentation: Any
    if placed.polygon is not None and area == placed.pixels:
        segmentation = [[value / SUB for value in placed.polygon.ravel().tolist()]]
    else:
        segmentation = {"size": [mask.shape[0], mask.shape[1]], "counts": run_lengths(mask)}
    return {
        "category_id": placed.label + 1,
        "bbox": [x, y, int(columns[-1]) + 1 - x, int(rows[-1]) + 1 - y],
        "area": area,
        "segmentation": segmentation,
        "iscrowd": int(placed.polygon is None),
    }


def run_lengths(mask: np.ndarray) -> list[int]:
    """COCO's uncompressed run lengths of an (H, W) bool mask: column by column, zeros first."""
    flat = mask.T.ravel()
    changes = np.flatnonzero(flat[1:] != flat[:-1]) + 1
    runs = np.diff(np.concatenate([[0], changes, [flat.size]])).tolist()
    return [0, *runs] if flat[0] else runs
