"""Values of an annotation file that are not quite of their type: converted where it is plain what is meant."""

from __future__ import annotations

import re
from typing import Any

from detector.data.annotations import short
from detector.data.columns import is_integer, is_number
from detector.data.findings import Report

Entry = dict[str, Any]


def as_object(item: Any, where: str, report: Report) -> Entry | None:
    if isinstance(item, dict):
        return item
    report.add("wrong-type", f"{where}: {short(item)}, expected an object")
    return None


def as_id(entry: Entry, key: str, where: str, report: Report) -> int | None:
    """The id, converted where it is plain which is meant."""
    number = as_integer(entry.get(key))
    if number is None or not is_integer(entry[key]):
        report.add("wrong-type" if key in entry else "missing-key", f"{where}: {key} {found(entry, key)}")
    return number


def as_integer(value: Any) -> int | None:
    """7, 7.0 or "7" as 7; anything else as None."""
    if isinstance(value, str) and re.fullmatch(r"\s*-?[0-9]{1,18}\s*", value):
        return int(value)
    if isinstance(value, float) and value.is_integer() and abs(value) < 2**53:
        return int(value)
    return value if is_integer(value) else None


def as_box(value: Any) -> list[float] | None:
    """Four numbers, converted from text where they are written so."""
    if not isinstance(value, list) or len(value) != 4:
        return None
    try:
        return [float(v) if isinstance(v, str) else v for v in value] if all(map(_numeric, value)) else None
    except ValueError:
        return None


def _numeric(value: Any) -> bool:
    return is_number(value) or isinstance(value, str)


def found(entry: Entry, key: str) -> str:
    return f"is {short(entry[key])}" if key in entry else "is missing"
