"""A COCO annotation file as lists of objects: in pieces where it is well formed, whole where it is not.

Read in pieces, a file of a million annotations needs little more memory than its text without the segmentations, and
only the keys that are used become Python objects.  Whatever this does not understand at once is read whole by
`annotations.read_document`, which takes its time and says what is wrong.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypedDict

import msgspec
import numpy as np

from detector.data.annotations import end_by_search, read_document, take_out_segmentations

_BLOCK = 1 << 23  # bytes that are read at a time
_PIECE = 1 << 14  # objects that exist at a time
_BYTE_ORDER_MARK = "\ufeff".encode()

Pieces = Iterable[list[dict[str, Any]]]


class Unusual(Exception):
    """The file has to be read whole."""


@dataclass(frozen=True)
class Document:
    """The three lists of a COCO file, each in pieces that follow one another; of the objects at least the used keys.

    The k-th segmentation of the file is replaced by [k] and stands at the bytes spans[k] of it.
    """

    images: Pieces
    annotations: Pieces
    categories: Pieces
    annotated: bool  # whether the file has `annotations`
    spans: np.ndarray  # (k, 2) int64


def read_whole(path: Path) -> Document:
    """
    Raises:
        DataError: the file is missing, unreadable, not JSON, cut off, or not a COCO annotation file.
    """
    document, spans = read_document(path)
    return Document(
        images=[document["images"]],
        annotations=[document.get("annotations", [])],
        categories=[document.get("categories", [])],
        annotated="annotations" in document,
        spans=spans,
    )


def read_in_pieces(path: Path) -> Document:
    """
    Raises:
        Unusual: the file is not plainly a COCO file in JSON, or cannot be read.
    """
    try:
        text, spans = _without_segmentations(path)
        outline = _OUTLINE.decode(text)
    except (OSError, ValueError, RecursionError) as error:  # msgspec's errors are ValueErrors
        raise Unusual from error
    if outline.annotations and outline.categories is msgspec.UNSET:
        raise Unusual
    return Document(
        images=_Objects(outline.images, _IMAGES),
        annotations=_Objects(outline.annotations or (), _ANNOTATIONS),
        categories=_Objects(outline.categories or (), _CATEGORIES),
        annotated=outline.annotations is not msgspec.UNSET,
        spans=spans,
    )


class _Outline(msgspec.Struct):
    images: list[msgspec.Raw]
    annotations: list[msgspec.Raw] | msgspec.UnsetType = msgspec.UNSET
    categories: list[msgspec.Raw] | msgspec.UnsetType = msgspec.UNSET


class _Image(TypedDict, total=False):
    id: Any
    height: Any
    width: Any
    file_name: Any


class _Annotation(TypedDict, total=False):
    id: Any
    image_id: Any
    category_id: Any
    bbox: Any
    area: Any
    iscrowd: Any
    weight: Any
    segmentation: Any


class _Category(TypedDict, total=False):
    id: Any
    name: Any


_OUTLINE = msgspec.json.Decoder(_Outline)
_IMAGES = msgspec.json.Decoder(list[_Image])
_ANNOTATIONS = msgspec.json.Decoder(list[_Annotation])
_CATEGORIES = msgspec.json.Decoder(list[_Category])


class _Objects:
    """Texts of JSON objects, parsed a piece at a time."""

    def __init__(self, texts: Sequence[msgspec.Raw], decoder: msgspec.json.Decoder[Any]) -> None:
        self.texts = texts
        self.decoder = decoder

    def __iter__(self) -> Iterator[list[dict[str, Any]]]:
        """
        Raises:
            Unusual: an entry is no object, or holds something that this does not understand.
        """
        for first in range(0, max(1, len(self.texts)), _PIECE):
            try:
                yield self.decoder.decode(b"[" + b",".join(self.texts[first : first + _PIECE]) + b"]")
            except (ValueError, RecursionError) as error:
                raise Unusual from error


def _without_segmentations(path: Path) -> tuple[bytearray, np.ndarray]:
    """The file with the k-th segmentation replaced by [k], and (k, 2) int64 where each stood.

    Blocks end after a brace, since none stands between a segmentation's key and its end but its own.

    Raises:
        UnicodeDecodeError: not UTF-8.
    """
    text, spans, count, done, rest = bytearray(), [], 0, 0, b""
    with path.open("rb", buffering=0) as file:
        while True:
            block = file.read(_BLOCK)
            content = rest + block
            end = content.rfind(b"}") + 1 if block else len(content)
            if len(content) - end > 4 * _BLOCK:
                raise Unusual
            content, rest = content[:end], content[end:]
            content.decode("utf-8")  # only looked at: the parser does not look into what it skips
            reduced, places = take_out_segmentations(content, partial(end_by_search, content), first=count)
            text += reduced
            spans.append(places + done)
            count += len(places)
            done += end
            if not block:
                break
    if text.startswith(_BYTE_ORDER_MARK):
        del text[: len(_BYTE_ORDER_MARK)]
    return text, np.concatenate(spans)
