"""Images that are not 8-bit RGB: grey, 16 bits, any number of channels; and percentiles of every image by itself.

TIFF files are read by tifffile (and imagecodecs where they are compressed), everything else by cv2.
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from detector.data.images import read_bytes, read_image
from detector.errors import DataError
from detector.pixels import Percentile, Pixels

TIFF_NAMES = (".tif", ".tiff")
_TIFF = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
_ENOUGH = 1 << 31  # pixels times channels of one image, more is refused before it is decoded


def read_pixels(path: Path | str, pixels: Pixels, expected_size: tuple[int, int] | None = None) -> np.ndarray:
    """(H, W, channels) uint8 or uint16, as `pixels` say, not normalised.

    Where RGB is asked for, grey is repeated and a fourth channel dropped; where grey is asked for, RGB is converted.

    Raises:
        DataError: the file is missing or damaged, holds other channels, bits or kinds of number, or has another height
            and width than `expected_size`.
    """
    if pixels.bits == 8 and pixels.channels in (1, 3):
        image = read_image(path, expected_size)
        return image if pixels.channels == 3 else cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)[..., None]
    content = read_bytes(path)
    image = _tiff(content, path) if content[:4] in _TIFF else _decoded(content, path)
    if image.dtype != pixels.dtype:
        raise DataError(
            f"{path}: the image holds {image.dtype} numbers, but data.pixels.bits is {pixels.bits} ({pixels.dtype}):"
            " set data.pixels.bits to what the set has, or convert the file"
        )
    image = _with_channels(image, pixels.channels, path)
    if expected_size is not None and image.shape[:2] != expected_size:
        raise DataError(
            f"{path}: the image has height, width {image.shape[0]}, {image.shape[1]}, but the annotations say "
            f"{expected_size[0]}, {expected_size[1]}; annotate the file that is used, or correct the sizes"
        )
    return np.ascontiguousarray(image)


def read_tiff(path: Path | str) -> np.ndarray:
    """(H, W, C) as stored, of whatever numbers.

    Raises:
        DataError: the file is missing or damaged, or holds no single image.
    """
    return _tiff(read_bytes(path), path)


def stretched(image: np.ndarray, pixels: Pixels) -> np.ndarray:
    """(H, W, C): with percentiles of the image itself, if the set is normalised by them, spread over the whole range.

    A percentile is the least value that so many percent of the pixels do not exceed.  Padding and what other images
    share a picture play no part, since it is done when an image is read.
    """
    rule = pixels.normalize
    if not isinstance(rule, Percentile):
        return image
    if not rule.each_channel:
        return np.asarray(_table(image, rule)[image])
    channels = [_table(image[..., c], rule)[image[..., c]] for c in range(image.shape[2])]
    return np.stack(channels, axis=2)


def _table(values: np.ndarray, rule: Percentile) -> np.ndarray:
    """(2**bits,) of the same kind: what each value becomes."""
    top = int(np.iinfo(values.dtype).max)
    below = np.bincount(values.ravel(), minlength=top + 1).cumsum()
    low, high = (int(np.searchsorted(below, np.ceil(q / 100 * values.size).clip(1))) for q in (rule.low, rule.high))
    steps = (np.arange(top + 1, dtype=np.float64) - low) / max(high - low, 1)
    return np.rint(steps.clip(0, 1) * top).astype(values.dtype)


def _with_channels(image: np.ndarray, channels: int, path: Path | str) -> np.ndarray:
    has = image.shape[2]
    if has == channels:
        return image
    if channels == 3 and has == 1:
        return np.repeat(image, 3, axis=2)
    if channels == 3 and has == 4:
        return image[..., :3]
    if channels == 1 and has in (3, 4):
        return np.asarray(cv2.cvtColor(np.ascontiguousarray(image[..., :3]), cv2.COLOR_RGB2GRAY))[..., None]
    raise DataError(
        f"{path}: the image has {has} channels, but data.pixels.channels is {channels}: set it to what the set has, or"
        " convert the file"
    )


def _decoded(content: bytes, path: Path | str) -> np.ndarray:
    """(H, W, c) as stored, RGB order."""
    try:
        image = cv2.imdecode(np.frombuffer(content, dtype=np.uint8), cv2.IMREAD_UNCHANGED) if content else None
    except cv2.error as error:
        raise DataError(f"{path}: cannot decode the image ({error.err or error})") from None
    if image is None:
        raise DataError(
            f"{path}: damaged, cut off, or not an image that can be read (PNG, TIFF, JPEG, WebP, BMP);"
            " restore it, convert it, or take it out of the annotations"
        )
    if image.ndim == 2:
        return np.asarray(image[..., None])
    order = {3: [2, 1, 0], 4: [2, 1, 0, 3]}.get(image.shape[2])  # cv2 puts blue first
    return np.asarray(image if order is None else image[..., order])


def _tiff(content: bytes, path: Path | str) -> np.ndarray:
    """(H, W, c) as stored: channels within a pixel, in planes or in pages."""
    try:
        import tifffile
    except ImportError:
        raise DataError(f"{path}: TIFF files need the package tifffile: pip install 'detector[tiff]'") from None
    try:
        with tifffile.TiffFile(io.BytesIO(content)) as file:
            series = file.series[0]
            if np.prod(series.shape, dtype=np.float64) > _ENOUGH:
                raise DataError(f"{path}: a TIFF of shape {series.shape}, more than can be held: cut it into tiles")
            image, axes = series.asarray(), series.axes
    except DataError:
        raise
    except Exception as error:  # tifffile and its codecs have many
        raise DataError(f"{path}: cannot read the TIFF ({_line(error)})") from None
    return _channels_last(image, axes, path)


def _channels_last(image: np.ndarray, axes: str, path: Path | str) -> np.ndarray:
    kept = [i for i, n in enumerate(image.shape) if n > 1 or axes[i] in "YX"]
    image, axes = image.reshape([image.shape[i] for i in kept]), "".join(axes[i] for i in kept)
    if "Y" not in axes or "X" not in axes or image.ndim > 3:
        raise DataError(f"{path}: a TIFF of shape {image.shape} (axes {axes}), expected height, width and channels")
    if image.ndim == 2:
        return np.asarray(image if axes == "YX" else image.T)[..., None]
    (channel,) = (i for i, axis in enumerate(axes) if axis not in "YX")
    return np.asarray(image.transpose(axes.index("Y"), axes.index("X"), channel))


def _line(error: Any) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
