"""YAML files and command-line overrides -> one plain dictionary that remembers where each key came from.

base.yaml     assigner: {type: atss, topk: 9}
mine.yaml     base: base.yaml
              assigner: {topk: 15}
command line  assigner.type=max_iou          (another `type` replaces the whole section)
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from detector.errors import ConfigError

COMMAND_LINE = "command line"
UNITS = {"epochs", "steps", "images"}  # a length is given in one of them


@dataclass(frozen=True)
class Document:
    """The merged values of a recipe and the source (file or command line) of every leaf, by dotted key."""

    values: dict[str, Any]
    sources: dict[str, str]
    path: str

    def source_of(self, key: str) -> str:
        """Who set `key`, or a key inside it; the recipe itself where nobody did."""
        for known, source in reversed(self.sources.items()):
            if known == key or known.startswith(key + "."):
                return source
        return self.path


def flat(values: Any, prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} -> {"a.b": 1}; lists are values, and an empty section is none."""
    if not isinstance(values, dict):
        return {prefix.rstrip("."): values}
    return {k: v for name, value in values.items() for k, v in flat(value, f"{prefix}{name}.").items()}


class _Loader(yaml.SafeLoader):
    """SafeLoader that reads 1e-3 as a number (YAML 1.1 reads a string) and refuses a key given twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, str):
                raise ConfigError(f"{_place(key_node.start_mark)}: key {key!r} is not text; write it in quotes")
            if key in seen:
                raise ConfigError(f"{_place(key_node.start_mark)}: key {key!r} is given twice; keep one of them")
            seen.add(key)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+(\.\d*)?|\.\d+)([eE][-+]?\d+)$"), list("-+0123456789.")
)


def read(path: Path, overrides: Iterable[str] = ()) -> Document:
    """A recipe, its `base:` (one level) and the overrides, merged in that order.

    Raises:
        ConfigError: a file is missing or is not YAML, a base has a base of its own, an override is not `key=value`.
    """
    values, sources = _read_file(path), {}
    base = values.pop("base", None)
    if base is not None:
        if not isinstance(base, str):
            raise ConfigError(f"{path}: base: expected the name of one file, found {base!r}")
        base_path = path.parent / base
        base_values = _read_file(base_path)
        if "base" in base_values:
            raise ConfigError(f"{base_path}: base: only one level is allowed, and {path} already builds on this file")
        sources = dict.fromkeys(_leaves(base_values), str(base_path))
        values, own = merge(base_values, values), values
        sources.update(dict.fromkeys(_leaves(own), str(path)))
    return apply(Document(values, sources, str(path)), overrides)


def apply(document: Document, overrides: Iterable[str]) -> Document:
    """The document with `key=value` overrides merged in, one after the other."""
    values, sources = document.values, dict(document.sources)
    for text in overrides:
        key, separator, value = text.partition("=")
        if not separator or not key:
            raise ConfigError(f"{COMMAND_LINE}: {text!r}: expected key=value, such as train.batch_size=16")
        values = _set(values, key.split("."), _parse(value, COMMAND_LINE, key), key)
        sources[key] = COMMAND_LINE
    return Document(values, sources, document.path)


def merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """Deep merge; a section whose `type` changes, or a length in another unit, is replaced as a whole, never mixed."""
    merged = dict(base)
    for key, value in over.items():
        old = merged.get(key)
        if isinstance(value, dict) and isinstance(old, dict) and _same_kind(value, old):
            value = merge(old, value)
        merged[key] = value
    return merged


def _same_kind(value: dict[str, Any], old: dict[str, Any]) -> bool:
    lengths = (value.keys() | old.keys()) <= UNITS
    return not lengths and value.get("type", old.get("type")) == old.get("type")


def _read_file(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read as text ({error})") from None
    values = _parse(text, str(path), "")
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: expected sections with keys, found {type(values).__name__}")
    return values


def _parse(text: str, name: str, key: str) -> Any:
    loader = _Loader(text)
    loader.name = name
    try:
        return loader.get_single_data()
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = name if key or mark is None else _place(mark)
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise ConfigError(f"{place}: {key + ': ' if key else ''}not valid YAML: {problem}") from None
    finally:
        loader.dispose()


def _set(node: Any, parts: list[str], value: Any, key: str) -> Any:
    """`node` with `value` merged in at the dotted place; numbers index into lists."""
    if isinstance(node, list):
        if not parts[0].isdigit() or int(parts[0]) >= len(node):
            raise ConfigError(f"{COMMAND_LINE}: {key}: expected a list index below {len(node)}, found {parts[0]!r}")
        changed = list(node)
        i = int(parts[0])
        changed[i] = _set(node[i], parts[1:], value, key) if len(parts) > 1 else value
        return changed
    old = node.get(parts[0]) if isinstance(node, dict) else None
    if len(parts) > 1 and isinstance(old, list):
        return {**node, parts[0]: _set(old, parts[1:], value, key)}
    leaf = value
    for part in reversed(parts):
        leaf = {part: leaf}
    return merge(node if isinstance(node, dict) else {}, leaf)


def _leaves(values: dict[str, Any], prefix: str = "") -> Iterator[str]:
    for key, value in values.items():
        if isinstance(value, dict) and value:
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}"


def _place(mark: yaml.Mark) -> str:
    return f"{mark.name}:{mark.line + 1}"
