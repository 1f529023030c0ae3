"""Pascal VOC: an XML file for each image.

VOC counts pixels from 1 and names the first and the last one of a box (Everingham et al., the VOC development kit,
section "Annotation"): `xmin` to `xmax` are the pixel edges xmin - 1 to xmax.  Many tools that write this format put
pixel edges from 0 instead, which is `edges`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal
from xml.etree.ElementTree import Element, ParseError

import defusedxml.ElementTree as ET  # an XML file can be made to fill the memory; this refuses
from defusedxml.common import DefusedXmlException

from detector.data.annotations import short
from detector.data.formats.records import (
    IMAGE_SUFFIXES,
    Entry,
    Object,
    Problems,
    Size,
    Source,
    read_text,
    usable,
)
from detector.errors import DataError

Pixels = Literal["inclusive", "edges"]
Difficult = Literal["keep", "crowd", "drop"]
_CORNERS = ("xmin", "ymin", "xmax", "ymax")
_FLAGS = ("difficult", "truncated", "occluded")


@dataclass(frozen=True)
class Voc:
    """How to read it.

    `difficult` objects are objects, regions that are neither object nor background (as VOC's own evaluation has them),
    or left out.
    """

    pixels: Pixels = "inclusive"
    difficult: Difficult = "keep"

    def read(self, folder: Path, images: Path | None, listed: Path | None, problems: Problems) -> Source:
        """All XML files of `folder`, or those whose names a file lists (`ImageSets/Main/train.txt`), one a line.

        `images`: the image folder; by default `JPEGImages` beside the folder where there is one, else the folder.

        Raises:
            DataError: nothing is there, or something is broken and not to be skipped.
        """
        if not folder.is_dir():
            raise DataError(f"{folder}: no such folder, expected one of VOC's XML files")
        if images is None:
            beside = folder.parent / "JPEGImages"
            images = beside if beside.is_dir() else folder
        files = sorted(folder.rglob("*.xml")) if listed is None else _listed(folder, listed)
        if not files:
            raise DataError(f"{folder}: holds no .xml file, expected VOC's annotations")
        entries = [entry for path in files if (entry := self._entry(path, folder, images, problems)) is not None]
        return Source(entries, images)

    def _entry(self, path: Path, folder: Path, images: Path, problems: Problems) -> Entry | None:
        try:
            root = ET.fromstring(path.read_bytes())
        except FileNotFoundError:
            problems.add("image", f"{path}: no such file, expected the XML file of a listed image")
            return None
        except OSError as error:
            raise DataError(f"{path}: cannot read the annotation ({error.strerror or error})") from None
        except ParseError as error:
            line, column = error.position
            problems.add(
                "image", f"{path}: line {line}, column {column + 1}: not valid XML, expected VOC's <annotation>"
            )
            return None
        except (DefusedXmlException, ValueError) as error:
            problems.add("image", f"{path}: refused, since it declares entities or an encoding unknown ({error})")
            return None
        if root.tag != "annotation":
            problems.add("image", f"{path}: the outermost element is <{root.tag}>, expected <annotation>")
            return None
        try:
            size = _size(root)
        except ValueError as error:
            problems.add("image", f"{path}: {error}")
            return None
        objects = root.findall("object")
        beside = images / path.parent.relative_to(folder)  # subfolders are those of the XML files, or there are none
        return Entry(str(path), _image(root, path, (beside, images)), size, partial(self._objects, path, objects))

    def _objects(self, path: Path, elements: Sequence[Element], size: Size, problems: Problems) -> list[Object]:
        found = []
        for number, element in enumerate(elements, 1):
            where = f"{path}: object {number}"
            try:
                name, box, flags = _text(element, "name"), self._box(element), _flags(element)
            except ValueError as error:
                problems.add("object", f"{where}: {error}")
                continue
            kept = usable(box, size, f"{where} ({name})", problems)
            if kept is None or (flags.get("difficult") and self.difficult == "drop"):
                continue
            crowd = bool(flags.get("difficult")) and self.difficult == "crowd"
            pose = element.findtext("pose", "").strip()
            found.append(Object(name, kept, crowd=crowd, more={**flags, **({"pose": pose} if pose else {})}))
        return found

    def _box(self, element: Element) -> tuple[float, float, float, float]:
        """Raises ValueError: says what is wrong."""
        box = element.find("bndbox")  # its own, not that of a <part>
        if box is None:
            raise ValueError("<bndbox> is missing, expected one with xmin, ymin, xmax, ymax")
        x1, y1, x2, y2 = (_number(box, corner) for corner in _CORNERS)
        return (x1 - 1, y1 - 1, x2, y2) if self.pixels == "inclusive" else (x1, y1, x2, y2)


def _listed(folder: Path, listed: Path) -> list[Path]:
    """VOC's lists of one class have a second column: 1 where the image holds the class, -1 where not."""
    names = [line.split()[0] for line in read_text(listed, "a list of image names").splitlines() if line.strip()]
    if not names:
        raise DataError(f"{listed}: the list is empty, expected an image name a line")
    return [folder / f"{name.removesuffix('.xml')}.xml" for name in dict.fromkeys(names)]


def _image(root: Element, path: Path, folders: Sequence[Path]) -> Path:
    """The file that <filename> names; where that has no suffix or does not exist, the one named as the XML file."""
    name = Path((root.findtext("filename") or "").strip().replace("\\", "/")).name
    candidates = [name] if Path(name).suffix else []
    stems = dict.fromkeys(stem for stem in (name, path.stem) if stem)
    candidates += [stem + suffix for stem in stems for suffix in IMAGE_SUFFIXES]
    existing = next((f / c for f in folders for c in candidates if (f / c).is_file()), None)
    return existing or folders[0] / (name or path.stem)


def _size(root: Element) -> Size | None:
    """None where it is left out, or written as zeros as some tools do.  Raises ValueError: says what is wrong."""
    size = root.find("size")
    if size is None:
        return None
    height, width = _number(size, "height"), _number(size, "width")
    if height == width == 0:
        return None
    if height < 1 or width < 1 or height % 1 or width % 1:
        raise ValueError(f"size: height, width are {height:g}, {width:g}, expected whole numbers of at least 1")
    return int(height), int(width)


def _flags(element: Element) -> dict[str, int]:
    """Raises ValueError: says what is wrong."""
    flags = {}
    for flag in _FLAGS:
        text = (element.findtext(flag) or "").strip()
        if text.lower() in ("1", "true"):
            flags[flag] = 1
        elif text.lower() in ("0", "false", "unspecified"):
            flags[flag] = 0
        elif text:
            raise ValueError(f"{flag} is {short(text)}, expected 0 or 1")
    return flags


def _text(element: Element, tag: str) -> str:
    text = (element.findtext(tag) or "").strip()
    if not text:
        raise ValueError(f"<{tag}> is missing or empty, expected a text")
    return text


def _number(element: Element, tag: str) -> float:
    text = _text(element, tag)
    try:
        return float(text)
    except ValueError:
        raise ValueError(f"{tag} is {short(text)}, expected a number") from None
