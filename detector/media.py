"""Images, folders and videos in, pictures with detections out."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import cv2
import numpy as np

from detector import draw
from detector.data.channels import read_pixels
from detector.errors import DataError, UserError
from detector.predict import Detector, Found

IMAGES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"}
VIDEOS = {".mp4", ".avi", ".mov", ".mkv", ".webm", ".m4v", ".mpg", ".mpeg", ".wmv"}
T = TypeVar("T")
_SAME_KIND = {".jpg", ".jpeg", ".png", ".webp", ".bmp"}  # written as what they were; all others as PNG


@dataclass(frozen=True)
class Source:
    """A file to read and the picture or video to write."""

    path: Path
    target: Path

    @property
    def is_video(self) -> bool:
        return self.path.suffix.lower() in VIDEOS


def find_sources(inputs: Sequence[Path], out: Path) -> list[Source]:
    """All files of `inputs`, folders with everything below them, each with its own target under `out`.

    Targets keep names and subfolders; where two would be the same, or one would be an input, a number is added.
    What lies under `out` from an earlier time is no source unless it is named.

    Raises:
        DataError: an input does not exist, or a folder holds nothing to look at.
    """
    files: list[tuple[Path, Path]] = []  # path, name under `out`
    for path in inputs:
        if path.is_dir():
            inside = [p for p in sorted(path.rglob("*")) if p.suffix.lower() in IMAGES | VIDEOS and p.is_file()]
            inside = [p for p in inside if not _below(p, out)]
            if not inside:
                raise DataError(f"{path}: the folder holds no image or video ({', '.join(sorted(IMAGES | VIDEOS))})")
            files += [(p, p.relative_to(path)) for p in inside]
        elif path.is_file():
            files.append((path, Path(path.name)))
        else:
            raise DataError(f"{path}: no such file or folder")
    taken = {path.resolve() for path, _ in files}
    sources = []
    for path, name in files:
        target = _free(out / name.with_suffix(_suffix(path)), taken)
        taken.add(target.resolve())
        sources.append(Source(path, target))
    return sources


class Painter:
    """Runs a detector over sources, writes the pictures and keeps count."""

    def __init__(self, detector: Detector, batch_size: int) -> None:
        self.detector, self.batch_size = detector, batch_size
        self.images = self.videos = self.frames = self.found = 0
        self.failures: list[str] = []  # a sentence for each file that could not be read
        self.records: list[dict[str, Any]] = []  # what was found in each image or frame

    def paint(self, sources: Sequence[Source]) -> Iterator[int]:
        """Yields how many files are done since the last time.

        Raises:
            UserError: a picture cannot be written.
        """
        for is_video, group in itertools.groupby(sources, key=lambda source: source.is_video):
            if is_video:
                for source in group:
                    self._paint_video(source)
                    yield 1
            else:
                for batch in _batches(group, self.batch_size):
                    self._paint_images(batch)
                    yield len(batch)

    def _paint_images(self, sources: Sequence[Source]) -> None:
        pictures, readable = [], []
        for source in sources:
            try:
                pictures.append(read_pixels(source.path, self.detector.pixels))
                readable.append(source)
            except DataError as error:
                self.failures.append(str(error))
        for source, picture, found in zip(readable, pictures, self.detector(pictures), strict=True):
            draw.write(source.target, draw.detections(picture, found, self.detector.classes, 0.0))
            self._record({"file": str(source.path)}, picture, found)
            self.images += 1

    def _paint_video(self, source: Source) -> None:
        pixels = self.detector.pixels
        if (pixels.channels, pixels.bits) != (3, 8):
            has = f"{pixels.channels} channels of {pixels.bits} bits"
            self.failures.append(f"{source.path}: a video is RGB of 8 bits, but this detector takes {has}")
            return
        capture = cv2.VideoCapture(str(source.path))
        rate = capture.get(cv2.CAP_PROP_FPS) or 25.0
        frames = _batches(_frames(capture), self.batch_size)
        try:
            first = next(frames, None)
            if first is None:
                self.failures.append(f"{source.path}: damaged, cut off, or not a video that can be read")
                return
            with _Writer(source.target, rate, first[0].shape[:2]) as writer:
                count = 0
                for batch in itertools.chain([first], frames):
                    for picture, found in zip(batch, self.detector(batch), strict=True):
                        writer.add(draw.detections(picture, found, self.detector.classes, 0.0))
                        self._record({"file": str(source.path), "frame": count}, picture, found)
                        count += 1
        finally:
            capture.release()
        self.videos += 1
        self.frames += count

    def _record(self, where: dict[str, Any], picture: np.ndarray, found: Found) -> None:
        self.found += len(found)
        height, width = picture.shape[:2]
        self.records.append({**where, "height": height, "width": width, "detections": found.as_json()})


class _Writer:
    """An MP4 file that appears under its name once it is complete."""

    def __init__(self, path: Path, rate: float, size: tuple[int, int]) -> None:
        self.path, self.part = path, path.with_name(path.stem + ".part" + path.suffix)
        self.size = size
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"{path}: cannot write the video ({error.strerror or error})") from None
        self.writer = cv2.VideoWriter(str(self.part), cv2.VideoWriter.fourcc(*"mp4v"), rate, (size[1], size[0]))
        if not self.writer.isOpened():
            raise UserError(f"{path}: cannot write the video (is the folder writable and the disk not full?)")

    def __enter__(self) -> _Writer:
        return self

    def add(self, frame: np.ndarray) -> None:
        if frame.shape[:2] != self.size:  # a stream may change its size; a file of ours may not
            frame = cv2.resize(frame, (self.size[1], self.size[0]))
        self.writer.write(cv2.cvtColor(frame, cv2.COLOR_RGB2BGR))

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.writer.release()
        if kind is None:
            self.part.replace(self.path)
        else:
            self.part.unlink(missing_ok=True)


def _batches(items: Iterable[T], size: int) -> Iterator[list[T]]:
    items = iter(items)
    while batch := list(itertools.islice(items, size)):
        yield batch


def _frames(capture: Any) -> Iterator[np.ndarray]:
    """(H, W, 3) uint8 RGB."""
    while True:
        more, frame = capture.read()
        if not more:
            return
        yield cv2.cvtColor(frame, cv2.COLOR_BGR2RGB)


def _suffix(path: Path) -> str:
    if path.suffix.lower() in VIDEOS:
        return ".mp4"
    return path.suffix if path.suffix.lower() in _SAME_KIND else ".png"


def _free(target: Path, taken: set[Path]) -> Path:
    """`target`, or with the first number that makes it new."""
    numbered = (target.with_name(f"{target.stem}-{n}{target.suffix}") for n in itertools.count(2))
    return next(path for path in itertools.chain([target], numbered) if path.resolve() not in taken)


def _below(path: Path, folder: Path) -> bool:
    return path.resolve().is_relative_to(folder.resolve())
