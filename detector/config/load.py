"""Recipe file and overrides -> `RunConfig`, with one clear line for every mistake; and back to YAML.

A configuration is checked completely before any data, weights or device is touched.
"""

from __future__ import annotations

import difflib
import types
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, TypeVar, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError

from detector.config import yaml as files
from detector.config.plugins import load_sections, tag_of, widen
from detector.config.run import RunConfig
from detector.errors import CheckpointError, ConfigError

M = TypeVar("M", bound=BaseModel)
MESSAGES = {  # where a validator's own words speak of Python
    "tuple_type": "expected a list, such as [a, b]",
    "dict_type": "expected {key: value}",
    "too_short": "expected at least one",
}


def load_config(path: Path, overrides: Iterable[str] = ()) -> RunConfig:
    """A recipe by path, or by the name of one that ships with the package, with `key=value` overrides.

    Raises:
        ConfigError: one line for each mistake: file, key, what was found, what was expected.
    """
    path = find_recipe(path)
    document = files.read(path, overrides)
    values = {"name": path.stem, **document.values}
    values["imports"] = [str(_find_import(i, path)) for i in values.get("imports") or []]
    return _validate(values, document)


def from_snapshot(
    values: dict[str, Any], source: str, overrides: Iterable[str] = (), plugins: bool = True
) -> RunConfig:
    """The configuration that a checkpoint holds.

    Without `plugins` no file named in it is executed (a checkpoint may come from a stranger); the assigner, which only
    training needs, then falls back to the default one.

    Raises:
        CheckpointError: the checkpoint's configuration does not fit this version.
    """
    values = dict(values)
    if not plugins:
        values.pop("assigner", None)
        values["imports"] = []
    document = files.apply(files.Document(values, {}, source), overrides)
    try:
        return _validate(document.values, document)
    except ConfigError as error:
        if document.sources:
            raise
        raise CheckpointError(f"{error} (was it written by another version, or with a plug-in?)") from None


def dump(config: RunConfig) -> str:
    """YAML that loads back to an equal configuration."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True, width=120)


def schema() -> dict[str, Any]:
    """The JSON schema of recipe files: as the configuration's, but `base` is allowed and `name` has a default."""
    described = RunConfig.model_json_schema()
    described["required"] = []  # a recipe with a base need not repeat anything
    described["properties"]["base"] = {"type": "string", "description": "another recipe that this one builds on"}
    return described


def find_recipe(path: Path) -> Path:
    """`path` itself, or the recipe of that name that ships with the package."""
    if path.is_file():
        return path
    if not path.name:
        raise ConfigError(f"{path}: no such file; expected a recipe such as quickstart.yaml")
    name = path if path.suffix else path.with_suffix(".yaml")
    relative = Path(*name.parts[1:]) if name.parts[0] == "configs" else name
    for folder in recipe_folders():
        if (folder / relative).is_file():
            return folder / relative
    known = recipe_names()
    near = difflib.get_close_matches(relative.as_posix(), known, 1, 0.4)
    raise ConfigError(f"{path}: no such file" + (f" (did you mean the recipe {near[0]!r}?)" if near else ""))


def recipe_folders() -> list[Path]:
    """Where recipes are: inside an installed package, or beside the package in a checkout."""
    package = Path(__file__).resolve().parents[1]
    return [f for f in (package / "recipes", package.parent / "configs") if f.is_dir()]


def recipe_names() -> list[str]:
    """All recipes, relative to their folders; `studies` holds files of another kind."""
    found = [p.relative_to(f) for f in recipe_folders() for p in f.rglob("*.yaml")]
    return sorted(p.as_posix() for p in found if p.parts[0] != "studies")


def _find_import(name: str, recipe: Path) -> Path:
    if not isinstance(name, str):
        raise ConfigError(f"{recipe}: imports: expected paths of Python files, found {name!r}")
    beside = recipe.parent / name
    return (beside if beside.is_file() else Path(name)).resolve()


def _validate(values: dict[str, Any], document: files.Document) -> RunConfig:
    sections = [s for i in values.get("imports") or [] for s in load_sections(Path(i))]
    return checked(widen(RunConfig, sections) if sections else RunConfig, values, document)


def checked(schema: type[M], values: dict[str, Any], document: files.Document) -> M:
    """`values` as a section; `document` knows where each of them came from.

    Raises:
        ConfigError: one line for each mistake.
    """
    try:
        return schema.model_validate(values)
    except ValidationError as error:
        lines = dict.fromkeys(_explain(item, schema, document) for item in error.errors())
        raise ConfigError("\n".join(lines)) from None


def _explain(item: Any, schema: type[BaseModel], document: files.Document) -> str:
    """One line for one of pydantic's complaints."""
    keys, node = _walk(schema, item["loc"])
    kind, where = item["type"], ".".join(keys)
    source = document.source_of(where)
    start = f"{source}: {where}: " if where else f"{source}: "
    if kind == "extra_forbidden":
        _, parent = _walk(schema, item["loc"][:-1])
        return start + "unknown key" + _nearest(keys[-1], list(_fields(parent)))
    if kind in ("union_tag_invalid", "union_tag_not_found"):
        known = [tag for tag in map(tag_of, _members(node)) if tag]
        if kind == "union_tag_not_found":
            return f"{start}needs a `type`, one of: {', '.join(known)}"
        found = item["ctx"]["tag"]
        return f"{document.source_of(where + '.type')}: {where}.type: unknown type {found!r}" + _nearest(found, known)
    if kind == "missing":
        return start + "is missing"
    if kind == "value_error":
        return start + str(item["ctx"]["error"])
    end = ""
    if kind == "literal_error" and isinstance(item["input"], str):
        near = difflib.get_close_matches(item["input"], [str(v) for v in get_args(_bare(node))], 1, 0.5)
        end = f" (did you mean {near[0]!r}?)" if near else ""
    message = MESSAGES.get(kind) or item["msg"][0].lower() + item["msg"][1:]
    return f"{start}{message.removeprefix('input ')}, found {_short(item['input'])}{end}"


def _walk(node: Any, location: tuple[Any, ...]) -> tuple[list[str], Any]:
    """(dotted key without the tags of unions, the annotation there)."""
    keys: list[str] = []
    for part in location:
        member = next((m for m in _members(node) if tag_of(m) == part), None)
        fields = _fields(node)
        if part in fields:
            keys.append(str(part))
            node = fields[part].annotation
        elif member is not None:
            node = member
        elif isinstance(part, int):
            keys.append(str(part))
            node = next(iter(get_args(_bare(node))), None)
        elif not (isinstance(part, str) and ("[" in part or "(" in part)):  # pydantic's names of validators
            keys.append(str(part))
            node = None
    return keys, node


def _bare(node: Any) -> Any:
    """Without Annotated and without `| None`."""
    if get_origin(node) is Annotated:
        return _bare(get_args(node)[0])
    if get_origin(node) in (Union, types.UnionType):
        kept = [a for a in get_args(node) if a is not type(None)]
        return _bare(kept[0]) if len(kept) == 1 else node
    return node


def _members(node: Any) -> list[Any]:
    node = _bare(node)
    return list(get_args(node)) if get_origin(node) in (Union, types.UnionType) else []


def _fields(node: Any) -> dict[str, Any]:
    node = _bare(node)
    return node.model_fields if isinstance(node, type) and issubclass(node, BaseModel) else {}


def _nearest(name: str, known: list[str]) -> str:
    near = difflib.get_close_matches(str(name), known, 1, 0.5)
    return f" (did you mean {near[0]!r}?)" if near else f"; known: {', '.join(known)}" if known else ""


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
