"""Image files to RGB arrays.

Whatever the file holds becomes (H, W, 3) uint8: grey is repeated, palettes are looked up, alpha is dropped (as Pillow's
`convert("RGB")` does), CMYK is converted, 16 bits are brought to 8 by the fixed range 0..65535, so that equal values
stay equal from image to image.

Common JPEGs are decoded by simplejpeg, which is libjpeg-turbo with less around it; whatever is not plain (another
format, a camera's orientation, damage, odd colour spaces) by cv2.  Where both can, they give the same bytes.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path

import cv2
import numpy as np
import simplejpeg
from PIL import Image

from detector.errors import DataError

_UPRIGHT = cv2.IMREAD_COLOR_RGB
_AS_STORED = cv2.IMREAD_COLOR_RGB | cv2.IMREAD_IGNORE_ORIENTATION
LARGEST = 178_000_000  # pixels of an image when decoded: half a GiB
_PNG_START = b"\x89PNG\r\n\x1a\n"
_JPEG_START, _JPEG_END, _JPEG_SCAN, _JPEG_APP1 = b"\xff\xd8", b"\xff\xd9", 0xDA, 0xE1
_EXIF, _ORIENTATION = b"Exif\0\0", 0x0112


def read_image(path: Path | str, expected_size: tuple[int, int] | None = None) -> np.ndarray:
    """(H, W, 3) uint8 RGB.

    A camera's EXIF orientation is applied, unless `expected_size`, the (height, width) that the annotations were made
    for, fits only the image as it is stored.

    Raises:
        DataError: the file is missing, no image, damaged or cut off, of another size than expected, or of more than
            `LARGEST` pixels.
    """
    return _read_whole(read_bytes(path), path, expected_size)


def read_reduced(path: Path | str, size: tuple[int, int], least: tuple[int, int]) -> tuple[np.ndarray, int]:
    """An image of `size` (height, width), decoded at the smallest of 1, 1/2, 1/4, 1/8 that leaves `least` of it.

    Only plain JPEGs are reduced, to (ceil(height / n), ceil(width / n)): their decoder then computes fewer pixels.  It
    cuts the fine frequencies off where an area filter averages; on photographs the two differ by half a level of 255.

    Returns:
        The image, (h, w, 3) uint8 RGB, and n.

    Raises:
        DataError: as `read_image`.
    """
    content = read_bytes(path)
    n = reduction(size, least)
    _refuse_huge((-(-size[0] // n), -(-size[1] // n)), path)
    reduced = None if n == 1 else _decode_reduced(content, size, n)
    return (_read_whole(content, path, size), 1) if reduced is None else (reduced, n)


def reduction(size: tuple[int, int], least: tuple[int, int]) -> int:
    """The largest of 1, 2, 4, 8 by which an image of `size` can be divided so that `least` is left of it."""
    return next((n for n in (8, 4, 2) if -(-size[0] // n) >= least[0] and -(-size[1] // n) >= least[1]), 1)


def is_cut_off(content: np.ndarray | bytes) -> bool:
    """Whether a JPEG lacks its end, so that its lower part would be plain grey without a word.

    What follows the end marker (padding, a phone's video) does not matter; the end marker of an embedded preview,
    which stands before the image's own data, does not count.

    Args:
        content: the file as bytes or as uint8 numbers.
    """
    if bytes(content[:2]) != _JPEG_START or bytes(content[-2:]) == _JPEG_END:
        return False
    data = bytes(content)
    for marker, at in _segments(data):
        if marker == _JPEG_SCAN:
            return data.find(_JPEG_END, at) < 0  # compressed data never holds the marker: FF is followed by 00 there
    return True


def read_bytes(path: Path | str) -> bytes:
    """A whole file.

    Raises:
        DataError: it cannot be read.
    """
    try:
        with open(path, "rb", buffering=0) as file:
            return file.read()
    except OSError as error:
        raise DataError(f"{path}: cannot read the image ({error.strerror or error})") from None


def _read_whole(content: bytes, path: Path | str, expected_size: tuple[int, int] | None) -> np.ndarray:
    _refuse_huge(_size_of(content, path), path)
    image = _decode(content, _UPRIGHT, path)
    if expected_size is None or image.shape[:2] == expected_size:
        return image
    stored = _decode(content, _AS_STORED, path)
    if stored.shape[:2] == expected_size:
        return stored
    raise DataError(
        f"{path}: the image has height, width {image.shape[0]}, {image.shape[1]}, but the annotations say "
        f"{expected_size[0]}, {expected_size[1]}; annotate the file that is used, or correct the sizes with "
        "`python tools/check_data.py --fix`"
    )


def _refuse_huge(size: tuple[int, int], path: Path | str) -> None:
    if size[0] * size[1] > LARGEST:
        raise DataError(
            f"{path}: the image has height, width {size[0]}, {size[1]}: {size[0] * size[1] / 1e6:,.0f} million pixels,"
            f" which would take {size[0] * size[1] * 3 / 2**30:.1f} GiB in each worker; at most {LARGEST / 1e6:,.0f}"
            " million are decoded: cut it into tiles (a plain JPEG may instead be read smaller, by"
            " data.reduced_decoding=1)"
        )


def _size_of(content: bytes, path: Path | str) -> tuple[int, int]:
    """(height, width) as the header says, at most a few microseconds for JPEG and PNG; 0, 0 if it says nothing."""
    try:
        if content[:2] == _JPEG_START:
            height, width = simplejpeg.decode_jpeg_header(content)[:2]
        elif content[:8] == _PNG_START:
            width, height = (int.from_bytes(content[at : at + 4], "big") for at in (16, 20))
        else:
            with Image.open(io.BytesIO(content)) as image:
                width, height = image.size
    except Image.DecompressionBombError as error:  # Pillow's own limit, which is a little above
        raise DataError(f"{path}: the image is too large to be decoded ({error}): cut it into tiles") from None
    except (ValueError, OSError, SyntaxError):
        return 0, 0
    return height, width


def _decode(content: bytes, flags: int, path: Path | str) -> np.ndarray:
    if not content:
        raise DataError(f"{path}: the image file is empty; restore it or take it out of the annotations")
    if is_cut_off(content):
        raise DataError(f"{path}: the JPEG is cut off (its end is missing); copy or download it again")
    image = _decode_plain_jpeg(content, flags)
    if image is not None:
        return image
    try:
        image = cv2.imdecode(np.frombuffer(content, dtype=np.uint8), flags)
    except cv2.error as error:  # for example an image of more than 2^30 pixels
        raise DataError(f"{path}: cannot decode the image ({error.err or error})") from None
    if image is None:
        raise DataError(
            f"{path}: damaged, cut off, or not an image that can be read (JPEG, PNG, WebP, BMP, GIF, TIFF "
            "of 8 or 16 bits); restore it, convert it, or take it out of the annotations"
        )
    return np.asarray(image)


def _decode_plain_jpeg(content: bytes, flags: int) -> np.ndarray | None:
    """None where cv2 has to look: no JPEG, perhaps to be turned, or not flawless."""
    if not _is_plain_jpeg(content, flags):
        return None
    try:
        return np.asarray(simplejpeg.decode_jpeg(content))
    except (ValueError, MemoryError):
        return None


def _decode_reduced(content: bytes, size: tuple[int, int], n: int) -> np.ndarray | None:
    """None where the image has to be decoded whole."""
    if not _is_plain_jpeg(content, _UPRIGHT) or is_cut_off(content):
        return None
    height, width = -(-size[0] // n), -(-size[1] // n)
    try:
        if tuple(simplejpeg.decode_jpeg_header(content)[:2]) != size:
            return None
        image = np.asarray(simplejpeg.decode_jpeg(content, min_height=height, min_width=width))
    except (ValueError, MemoryError):
        return None
    return image if image.shape[:2] == (height, width) else None


def _is_plain_jpeg(data: bytes, flags: int) -> bool:
    """Whether it is a JPEG that is not to be turned, as far as `flags` ask for that."""
    if data[:2] != _JPEG_START:
        return False
    return flags != _UPRIGHT or all(
        _is_upright(data[at + 4 : at + 2 + int.from_bytes(data[at + 2 : at + 4], "big")])
        for marker, at in _segments(data)
        if marker == _JPEG_APP1 and data.startswith(_EXIF, at + 4)
    )


def _is_upright(exif: bytes) -> bool:
    """Whether camera data, from their name on, give no orientation but the usual one; False also if they are odd."""
    found = Image.Exif()
    try:
        found.load(exif)
        return found.get(_ORIENTATION, 1) == 1
    except Exception:  # Pillow's parser raises many kinds
        return False


def _segments(data: bytes) -> Iterator[tuple[int, int]]:
    """(marker, where it stands) of a JPEG's segments, up to the compressed data at the first scan."""
    at = 2
    while at + 4 <= len(data) and data[at] == 0xFF:
        marker = data[at + 1]
        if marker == 0xFF:  # padding
            at += 1
            continue
        yield marker, at
        if marker == _JPEG_SCAN:
            return
        at += 2 + int.from_bytes(data[at + 2 : at + 4], "big")
