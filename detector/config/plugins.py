"""A user's own part in a user's own file joins the slot that it fits.

The slots are unions written out in the packages (`Rule`, `AnyCoder`, ...).  `imports: [my_rule.py]` loads the file, and
`widen` gives a copy of the run configuration in which every union whose members share a base class with a section of
that file takes it as one more member.  Nothing global changes: another run in the same process does not see it.
"""

from __future__ import annotations

import importlib.util
import sys
import types
from functools import reduce
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin

from pydantic import BaseModel, create_model

from detector.config.node import Node
from detector.errors import ConfigError

M = TypeVar("M", bound=BaseModel)


def load_sections(path: Path) -> list[type[Node]]:
    """The sections (subclasses of Node with a literal `type`) that a Python file defines.

    Raises:
        ConfigError: the file is missing, fails while it is imported, or defines no section.
    """
    name = f"detector_plugin_{path.stem}"
    if not path.is_file():
        raise ConfigError(f"imports: {path}: no such file (paths are taken from the recipe's folder, then from here)")
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ConfigError(f"imports: {path}: expected a Python file that ends in .py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and pydantic look their module up while it runs
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise ConfigError(f"imports: {path}: {type(error).__name__} while it was imported: {error}") from error
    found = [
        value
        for value in vars(module).values()
        if isinstance(value, type) and issubclass(value, Node) and value.__module__ == name and tag_of(value)
    ]
    if not found:
        raise ConfigError(
            f"imports: {path}: defines nothing that fits a slot; expected a class such as"
            ' `class Mine(Assigner): type: Literal["mine"] = "mine"`'
        )
    return found


def tag_of(section: Any) -> str | None:
    """The value of a section's literal `type` field."""
    field = getattr(section, "model_fields", {}).get("type")
    return get_args(field.annotation)[0] if field is not None and get_origin(field.annotation) is Literal else None


def widen(model: type[M], sections: list[type[Node]]) -> type[M]:
    """`model` with `sections` as further members of every union that they fit, at any depth."""
    fields: dict[str, Any] = {}
    for name, info in model.model_fields.items():
        widened = _widen_annotation(info.annotation, sections)
        if widened is not info.annotation:
            fields[name] = (widened, info)
    return create_model(model.__name__, __base__=model, __module__=model.__module__, **fields) if fields else model


def _widen_annotation(annotation: Any, sections: list[type[Node]]) -> Any:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return widen(annotation, sections)
    arguments = get_args(annotation)
    if not arguments or get_origin(annotation) is Literal:
        return annotation
    widened = tuple(_widen_annotation(a, sections) for a in arguments)
    if get_origin(annotation) is Annotated:
        return annotation if widened[0] is arguments[0] else Annotated[(widened[0], *annotation.__metadata__)]
    if get_origin(annotation) in (Union, types.UnionType):
        members = [a for a in arguments if tag_of(a)]
        joining = [s for s in sections if members and issubclass(s, _common_bases(members))]
        for section in joining:
            taken = next((m for m in members if tag_of(m) == tag_of(section)), None)
            if taken is not None:
                raise ConfigError(
                    f"imports: {section.__name__}: type {tag_of(section)!r} already means {taken.__name__}"
                )
        if joining or any(a is not b for a, b in zip(widened, arguments, strict=True)):
            return Union[(*widened, *joining)]
        return annotation
    if all(a is b for a, b in zip(widened, arguments, strict=True)):
        return annotation
    return get_origin(annotation)[widened]


def _common_bases(members: list[type]) -> tuple[type, ...]:
    """What all members of a union are, beyond being sections."""
    shared = reduce(set.__and__, (set(m.__mro__) for m in members))
    return tuple(shared - set(Node.__mro__))
