"""Decoded images, kept from their first use on: in memory or in a file, for all workers in one copy.

What is kept is what decoding gives (`CocoData.reduced`), before any augmentation, so samples are the same bytes with
and without.  Both kinds are one mapped file, in memory without a name (memfd) or on disk:

    4096 bytes    what the file is for
    n records     `RECORD`: size and time of the image file, shape, checksum
    n slots       pixels; the k-th as large as image k will be, so the whole size is known before the first is decoded

A record is valid once `stored` is 1, which is written last.  Each process compares an image's checksum when it first
meets it: what a crash, a full disk or a writer in another process left half done is decoded anew, and so is an image
whose file has changed.  Several runs may use one file; what two of them write twice is the same.  n images.
"""

from __future__ import annotations

import hashlib
import logging
import mmap
import os
import shutil
import tempfile
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np
import psutil

from detector.data.images import reduction
from detector.data.index import CocoIndex
from detector.errors import DataError
from detector.pixels import RGB, Pixels

_log = logging.getLogger(__name__)
CacheKind = Literal["none", "memory", "file"]
Least = Callable[[tuple[int, int]], tuple[int, int]]
RECORD = np.dtype(
    [("stored", "<u4"), ("crc", "<u4"), ("time", "<i8"), ("bytes", "<i8")]
    + [(name, "<i4") for name in ("height", "width", "n", "_")]
)
_HEADER, _ALIGNED = 4096, 64
_MAGIC = b"images decoded by detector, form 1\n"
_MOST = 0.9  # of the memory or disk that is free
_GIB = 1 << 30


class ImageCache:
    """The images of one split, by their place in the index.  Passes to workers however they are started.

    Args:
        path: of the mapped file, which is there and of the right size.
        offsets: (n + 1,) int64, bytes: the slot of image i is offsets[i] to offsets[i + 1] of the pixels.
        pixels: what an image holds.
    """

    def __init__(self, path: str, offsets: np.ndarray, pixels: Pixels = RGB) -> None:
        self.path = path
        self.offsets = offsets
        self.pixels = pixels
        self._file = open(path, "r+b", buffering=0)  # noqa: SIM115 - workers may open it through /proc
        whole = np.frombuffer(mmap.mmap(self._file.fileno(), 0), dtype=np.uint8)
        start = _start(len(offsets) - 1)
        self._records = whole[_HEADER : _HEADER + (len(offsets) - 1) * RECORD.itemsize].view(RECORD)
        self._pixels = whole[start:]
        self._checked = np.full(len(offsets) - 1, -1, dtype=np.int64)  # the checksum that this process has compared

    def __getstate__(self) -> tuple[str, np.ndarray, Pixels]:
        return self.path, self.offsets, self.pixels

    def __setstate__(self, state: tuple[str, np.ndarray, Pixels]) -> None:
        self.__init__(*state)  # type: ignore[misc]

    @property
    def filled(self) -> int:
        """How many images are stored."""
        return int(np.count_nonzero(self._records["stored"]))

    def read(self, i: int, path: str, decode: Callable[[], tuple[np.ndarray, int]]) -> tuple[np.ndarray, int]:
        """Image i, whose file is at `path`: (h, w, C), perhaps not writable, and by what its size is divided.

        `decode` gives both where they are not stored, or its error.
        """
        try:
            status = os.stat(path)
        except OSError:
            return decode()  # which says what is wrong
        stamp = (status.st_mtime_ns, status.st_size)
        found = self._find(i, stamp)
        if found is None:
            found = decode()
            self._store(i, stamp, *found)
            found = self._find(i, stamp) or found  # the copy that is shared, so that the other one can go
        return found

    def _find(self, i: int, stamp: tuple[int, int]) -> tuple[np.ndarray, int] | None:
        stored, crc, changed, size, height, width, n, _ = self._records[i].item()
        if not stored or (changed, size) != stamp:
            return None
        first, count = int(self.offsets[i]), height * width * _depth(self.pixels)
        if not 0 < count <= self.offsets[i + 1] - first:
            return None
        pixels = self._pixels[first : first + count]
        if self._checked[i] != crc:
            if zlib.crc32(pixels.data) != crc:
                return None
            self._checked[i] = crc
        image = pixels.view(self.pixels.dtype).reshape(height, width, self.pixels.channels)
        image.flags.writeable = False
        return image, n

    def _store(self, i: int, stamp: tuple[int, int], image: np.ndarray, n: int) -> None:
        first, count = int(self.offsets[i]), image.nbytes
        if count > self.offsets[i + 1] - first:  # a JPEG that could not be reduced as foreseen: decoded each time
            return
        self._records["stored"][i] = 0
        self._pixels[first : first + count] = np.ascontiguousarray(image).reshape(-1).view(np.uint8)
        height, width = image.shape[:2]
        crc = zlib.crc32(self._pixels[first : first + count].data)
        self._records[i] = (0, crc, *stamp, height, width, n, 0)
        self._records["stored"][i] = 1
        self._checked[i] = crc


def open_cache(
    index: CocoIndex, least: Least | None, kind: Literal["memory", "file"], folder: Path, pixels: Pixels = RGB
) -> ImageCache:
    """The cache of an index's images; of a file, what earlier runs have left in it is used.

    Args:
        least: what decoding has to leave of an image, as `CocoData` has it.
        folder: of the files.
        pixels: what the images hold; percentiles are taken after the cache.

    Raises:
        DataError: it does not fit, says by how much; or the file cannot be written.
    """
    offsets = _slots(index, least, pixels)
    size = _start(len(index)) + int(offsets[-1])
    what = f"data.cache={kind}: the {len(index)} decoded images of {index.annotations} take {_gib(size)}"
    path = _in_memory(size, what) if kind == "memory" else _on_disk(folder, _key(index, offsets, pixels), size, what)
    cache = ImageCache(path, offsets, pixels)
    if kind == "memory":
        os.close(int(path.rpartition("/")[2]))  # the cache has opened the file by itself
        cache.path = f"/proc/{os.getpid()}/fd/{cache._file.fileno()}"
    _log.info("%s%s; %d are there", what, "" if kind == "memory" else f" in {path}", cache.filled)
    return cache


def default_folder() -> Path:
    """Where caches are files: $XDG_CACHE_HOME/detector, or ~/.cache/detector."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "detector"


def available_memory() -> int:
    """Bytes that may still be taken: of the machine, or of the container if that has less."""
    found = int(psutil.virtual_memory().available)
    for folder, most, used, pages in (
        ("/sys/fs/cgroup", "memory.max", "memory.current", "inactive_file"),
        ("/sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    ):
        try:
            limit, usage = (Path(folder, name).read_text().strip() for name in (most, used))
            lines = dict(line.split() for line in Path(folder, "memory.stat").read_text().splitlines())
        except (OSError, ValueError):
            continue
        if limit != "max":
            found = min(found, int(limit) - int(usage) + int(lines.get(pages, 0)))
    return max(found, 0)


def _slots(index: CocoIndex, least: Least | None, pixels: Pixels) -> np.ndarray:
    """(n + 1,) int64: where each image's pixels begin."""
    sizes = index.sizes.astype(np.int64)
    if least is not None:
        kinds, which = np.unique(sizes, axis=0, return_inverse=True)
        factors = np.array([reduction((h, w), least((h, w))) for h, w in kinds.tolist()], dtype=np.int64)
        names = (index.file_name(i).lower() for i in range(len(index)))
        jpeg = np.fromiter((name.endswith((".jpg", ".jpeg")) for name in names), dtype=bool, count=len(index))
        sizes = -(-sizes // np.where(jpeg, factors[which.reshape(-1)], 1)[:, None])
    lengths = -(-sizes.prod(1) * _depth(pixels) // _ALIGNED) * _ALIGNED
    return np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)


def _depth(pixels: Pixels) -> int:
    """Bytes of a pixel."""
    return pixels.channels * pixels.dtype.itemsize


def _start(count: int) -> int:
    """The byte at which the pixels begin."""
    return _HEADER + -(-count * RECORD.itemsize // _HEADER) * _HEADER


def _in_memory(size: int, what: str) -> str:
    """The path of a new file without a name; its memory is taken at once, so that it cannot run out later."""
    if not hasattr(os, "memfd_create"):
        raise DataError("data.cache=memory: needs Linux, where processes can share it: set data.cache=file")
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if ranks > 1:
        raise DataError(
            f"data.cache=memory: each of the {ranks} processes on this machine would hold a copy of its own: set"
            " data.cache=file, which they share (and which lies in memory as far as that is free)"
        )
    free = available_memory()
    if size > _MOST * free:
        raise DataError(f"{what}, but of memory {_gib(free)} are free: set data.cache=file, " + _SMALLER)
    handle = os.memfd_create("detector-images")
    try:
        os.posix_fallocate(handle, 0, size)
    except OSError as error:
        os.close(handle)
        raise DataError(f"{what}, and memory has run out ({error.strerror}): set data.cache=file, {_SMALLER}") from None
    return f"/proc/self/fd/{handle}"


_SMALLER = "data.reduced_decoding for JPEGs much larger than the network's input, or data.cache=none"


def _on_disk(folder: Path, key: str, size: int, what: str) -> str:
    """The path of the file of this key, made now unless it is there whole.

    Raises:
        DataError: it does not fit, or cannot be written.
    """
    path = folder / f"{key}.images"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if _is_whole(path, key, size):
            return str(path)
        for part in folder.glob(f".{key}.*"):  # of a process that was killed while it made one
            if time.time() - part.stat().st_mtime > 3600:
                part.unlink(missing_ok=True)
        free = shutil.disk_usage(folder).free
        if size > _MOST * free:
            raise DataError(
                f"{what}, but on the disk of {folder} {_gib(free)} are free: set data.cache_dir to a folder on another"
                f" disk, {_SMALLER}"
            )
        handle, name = tempfile.mkstemp(prefix=f".{key}.", dir=folder)
        try:
            with open(handle, "wb", buffering=0) as file:
                if hasattr(os, "posix_fallocate"):  # a disk that fills up later would end the process
                    os.posix_fallocate(file.fileno(), 0, size)
                else:
                    file.truncate(size)
                file.write(_label(key))
            _place(name, path, key, size)
        finally:
            Path(name).unlink(missing_ok=True)
    except OSError as error:
        raise DataError(
            f"{path}: cannot write the cache of decoded images ({error.strerror or error}): set data.cache_dir to a"
            " folder that can be written, or data.cache=none"
        ) from None
    return str(path)


def _place(made: str, path: Path, key: str, size: int) -> None:
    """Gives a new file its name, unless another process was faster."""
    for _ in range(10):
        try:
            os.link(made, path)
            return
        except FileExistsError:
            if _is_whole(path, key, size):
                return
            path.unlink(missing_ok=True)  # of another form, or cut off
        except OSError:  # a file system without links
            break
    os.replace(made, path)


def _is_whole(path: Path, key: str, size: int) -> bool:
    try:
        with open(path, "rb", buffering=0) as file:
            return os.fstat(file.fileno()).st_size == size and file.read(len(_label(key))) == _label(key)
    except FileNotFoundError:
        return False


def _label(key: str) -> bytes:
    return _MAGIC + key.encode() + b"\n"


def _key(index: CocoIndex, offsets: np.ndarray, pixels: Pixels) -> str:
    """Of the images' files and of their sizes when decoded; not of their content, which each record goes by."""
    digest = hashlib.blake2b(_MAGIC, digest_size=16)
    folders: dict[Any, str] = {}
    for i in range(len(index)):
        folder = index.folder(i)
        if folder not in folders:
            folders[folder] = os.path.abspath(folder)
        digest.update(f"{folders[folder]}\0{index.file_name(i)}\0".encode("utf-8", "surrogatepass"))
    digest.update(np.ascontiguousarray(index.sizes, dtype="<i4").tobytes())
    digest.update(offsets.astype("<i8").tobytes())
    if (pixels.channels, pixels.bits) != (RGB.channels, RGB.bits):
        digest.update(f"{pixels.channels} of {pixels.bits} bits".encode())
    return digest.hexdigest()


def _gib(size: int) -> str:
    return f"{size / _GIB:.1f} GiB" if size >= _GIB / 10 else f"{size / (1 << 20):.1f} MiB"
