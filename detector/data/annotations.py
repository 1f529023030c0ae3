"""Reading a COCO annotation file: JSON with its mistakes explained, and segmentations left where they are.

Nine tenths of a COCO file are polygons that detection rarely needs.  So each segmentation is replaced, before parsing,
by its number, and only its place in the file is kept; `read_span` fetches one when somebody asks.  That makes loading
several times faster and smaller.
"""

from __future__ import annotations

import gc
import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from detector.errors import DataError

_SEGMENTATION = re.compile(rb'"segmentation"\s*:\s*(?=[\[{])')
_LEAVES = re.compile(r"^[/\\]|^[A-Za-z]:|(^|[/\\])\.\.([/\\]|$)|\0")
_MORE = re.compile(r'[,:\[\]{}"]')  # JSON that is merely cut off breaks within its last word
_SHOWN = 60  # characters of a wrong value that an error message shows


def doctor(annotations: Path, images: Path | None = None) -> str:
    """The command that finds all mistakes of a file, for error messages."""
    folder = "IMAGE_FOLDER" if images is None else images
    return f"`python tools/check_data.py {annotations} --images {folder}`"


@contextmanager
def no_collection() -> Iterator[None]:
    """Garbage collection off while millions of objects are made, none of them garbage: looking for it takes long."""
    collecting = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collecting:
            gc.enable()


def read_document(path: Path) -> tuple[dict[str, Any], np.ndarray]:
    """The file's JSON object with the k-th segmentation replaced by [k], and (k, 2) int64 byte positions of them.

    Segmentations are not looked at; a mistake in one shows when it is read.

    Raises:
        DataError: the file is missing, unreadable, not JSON, cut off, or not a COCO annotation file.
    """
    content = _read(path)
    reduced, spans = take_out_segmentations(content, partial(end_by_search, content))
    try:
        document = _loads(reduced)
    except (ValueError, RecursionError):
        parse(content, path)  # says where, in terms of the true file, unless only a segmentation is strange
        text, decoder = content.decode("latin-1"), json.JSONDecoder()  # a character for each byte
        reduced, spans = take_out_segmentations(content, lambda start: decoder.raw_decode(text, start)[1])
        document = parse(reduced, path)
    del content, reduced
    check_is_coco(document, path)
    return document, spans


def read_full(path: Path) -> Any:
    """The file's JSON, segmentations included, whatever it is.

    Raises:
        DataError: the file is missing, unreadable, not JSON or cut off.
    """
    return parse(_read(path), path)


def read_span(path: Path, start: int, stop: int) -> Any:
    """One segmentation out of the file: a list of polygons or a run-length encoding.

    Raises:
        DataError: the file has gone or was changed since it was indexed.
    """
    try:
        with path.open("rb", buffering=0) as file:
            file.seek(start)
            return json.loads(file.read(stop - start))
    except (OSError, ValueError):
        raise DataError(
            f"{path}: the segmentation at bytes {start} to {stop} is not valid; "
            f"was the file changed while in use? Check it with {doctor(path)}"
        ) from None


def parse(content: bytes, path: Path) -> Any:
    """`content` as JSON.

    Raises:
        DataError: says in which line and column the JSON breaks, and whether the file looks cut off.
    """
    try:
        return _loads(content)
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path}: not UTF-8 text (byte {error.start}), expected a COCO annotation file in JSON; save it as UTF-8"
        ) from None
    except RecursionError:
        raise DataError(f"{path}: JSON nested too deeply, expected a COCO annotation file") from None
    except json.JSONDecodeError as error:
        rest = error.doc[error.pos :]
        cut = error.msg.startswith("Unterminated") or (error.msg != "Extra data" and not _MORE.search(rest))
        what = "the JSON ends too early; the file is cut off" if cut else f"not valid JSON ({error.msg})"
        advice = "copy or download it again" if cut else f"mend it there, then see {doctor(path)}"
        raise DataError(f"{path}: line {error.lineno}, column {error.colno}: {what}; {advice}") from None


def check_is_coco(document: Any, path: Path, entries: bool = True) -> None:
    """Nothing but the outermost shape: an object with lists `images`, `categories`, `annotations` of objects.

    `annotations` may be missing, and then `categories` too: test sets come so.  Without `entries` the lists may hold
    anything.

    Raises:
        DataError: says what the file is instead.
    """
    if isinstance(document, list):
        results = document and isinstance(document[0], dict) and "score" in document[0]
        what = "a list of detections" if results else "a list"
        raise DataError(
            f"{path}: {what}, expected a COCO annotation file: an object with `images`, `annotations` and `categories`"
        )
    if not isinstance(document, dict) or "images" not in document:
        found = f"an object with the keys {short(sorted(document))}" if isinstance(document, dict) else short(document)
        raise DataError(
            f"{path}: not a COCO annotation file: expected an object with `images`, `annotations` and "
            f"`categories`, found {found}"
        )
    if document.get("annotations") and "categories" not in document:
        raise DataError(f"{path}: `categories` is missing, expected a list of {{id, name}}")
    for key in ("images", "annotations", "categories"):
        value = document.get(key, [])
        if not isinstance(value, list):
            raise DataError(f"{path}: `{key}` is {short(value)}, expected a list")
        if entries and not set(map(type, value)) <= {dict}:
            wrong = next(i for i, item in enumerate(value) if not isinstance(item, dict))
            raise DataError(f"{path}: {key}[{wrong}] is {short(value[wrong])}, expected an object")


def leaves_folder(file_name: str) -> bool:
    """Whether a file name points out of its folder (absolute, a drive, or by `..`), on any operating system."""
    return _LEAVES.search(file_name) is not None


def short(value: Any) -> str:
    """`value` for an error message, cut to a readable length."""
    text = repr(value)
    return text if len(text) <= _SHOWN else text[: _SHOWN - 3] + "..."


def _read(path: Path) -> bytes:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: cannot read the annotation file ({error.strerror or error})") from None
    if not content.strip():
        raise DataError(f"{path}: the file is empty, expected COCO annotations; was it fully written or downloaded?")
    return content


def take_out_segmentations(content: bytes, end_of: Callable[[int], int], first: int = 0) -> tuple[bytes, np.ndarray]:
    """The text with the k-th segmentation, counted from `first`, replaced by [k], and (n, 2) int64 where each stood."""
    pieces: list[bytes] = []
    spans: list[tuple[int, int]] = []
    done = 0
    for match in _SEGMENTATION.finditer(content):
        start = match.end()
        if start < done:  # within the one before
            continue
        end = end_of(start)
        pieces += content[done:start], b"[%d]" % (first + len(spans))
        spans.append((start, end))
        done = end
    pieces.append(content[done:])
    return b"".join(pieces), np.array(spans, dtype=np.int64).reshape(-1, 2)


def end_by_search(content: bytes, start: int) -> int:
    """The end of a well-formed segmentation, found without parsing it.

    Polygons hold neither quotes nor braces, so a list of them ends at the last bracket before the next of these.  A
    run-length encoding is an object without objects in it, and its compressed text (ASCII 48 to 111) has no braces.
    Taking out less or more of anything else leaves brackets without their partner, which the parser then refuses.
    """
    brace = content.find(b"}", start)
    if content[start] == ord("{"):
        return brace + 1 if brace >= 0 else len(content)
    quote = content.find(b'"', start, brace)
    end = content.rfind(b"]", start, brace if quote < 0 else quote) + 1
    return end if end > start else start + 1


def _loads(content: bytes) -> Any:
    return json.loads(content.decode("utf-8-sig"))
