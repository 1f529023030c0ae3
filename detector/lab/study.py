"""A study: one recipe, several arms that change it, seeds, data sets; and what shall be said about them.

name: assigners
recipe: quickstart.yaml
arms:
  atss: {}
  fcos: {assigner.type: fcos}
seeds: [0, 1, 2]
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, StringConstraints, model_validator

from detector.config import yaml as files
from detector.config.load import checked
from detector.config.node import Node
from detector.errors import ConfigError

Name = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.+-]*$", max_length=60)]  # also of a folder
Overrides = dict[str, Any]  # `assigner.type: fcos`, or `assigner: {type: fcos}`
# As the tables head their columns.
SHORT = {"AP_small": "APs", "AP_medium": "APm", "AP_large": "APl", "AR_100": "AR"}
_LONG = {short: name for name, short in SHORT.items()}
Metric = Annotated[
    Literal["AP", "AP50", "AP75", "AP_small", "AP_medium", "AP_large", "AR_100", "AR_small", "AR_medium", "AR_large"],
    BeforeValidator(lambda name: _LONG.get(name, name) if isinstance(name, str) else name),
]

# What the study itself decides for every cell.
OWN = ("name", "seed", "run", "train.threads", "train.pictures")


class StudyConfig(Node):
    """What `tools/compare.py` runs: every arm with every seed on every data set."""

    name: Name = Field(description="default: the study's file name")
    recipe: str = Field(description="a recipe file beside the study, or the name of one that ships with the package")
    common: Overrides = Field({}, description="{key: value} for every cell, below what data sets and arms set")
    arms: dict[Name, Overrides] = Field(
        min_length=1,
        description="name: {key: value}; an arm may name another `recipe` to start from",
    )
    baseline: Name | None = Field(None, description="the arm that the others are compared with; default: the first")
    varies: tuple[str, ...] | None = Field(
        None,
        description="keys in which arms are meant to differ; whatever else differs is shown. Default: the keys that the"
        " arms themselves give",
    )
    seeds: tuple[Annotated[int, Field(ge=0)], ...] = Field((0, 1, 2), min_length=1)
    datasets: dict[Name, Overrides] = Field(
        {"data": {}}, min_length=1, description="name: {key: value}; default: the recipe's data alone"
    )
    metrics: tuple[Metric, ...] = Field(
        ("AP", "AP50", "AP75"), min_length=1, description="what is compared; the first decides the verdict"
    )
    split: Literal["val", "test"] = "val"
    checkpoint: Literal["last", "best"] = Field(
        "last", description="which weights are compared; best.pt was chosen on the validation images themselves"
    )
    jobs: int = Field(1, ge=1, description="cells at a time; on GPUs one each")
    threads: int = Field(1, ge=1, description="CPU threads of a cell")
    resamples: int = Field(1000, ge=100, description="of the images, by bootstrap")
    probe: int = Field(
        8, ge=0, description="validation images whose assignment is noted after each epoch, for the flip rate"
    )
    pictures: int = Field(4, ge=0, description="images whose assignments the report shows")

    @property
    def reference(self) -> str:
        """The name of the baseline."""
        return self.baseline if self.baseline is not None else next(iter(self.arms))

    @model_validator(mode="after")
    def _consistent(self) -> StudyConfig:
        if self.baseline is not None and self.baseline not in self.arms:
            raise ValueError(f"baseline {self.baseline!r} is none of the arms: {', '.join(self.arms)}")
        for what, values in (("seeds", self.seeds), ("metrics", self.metrics)):
            twice = [v for i, v in enumerate(values) if v in values[:i]]
            if twice:
                raise ValueError(f"{what} names {twice[0]} twice: it would be counted twice; keep one")
        for kind, sections in (("", {"common": self.common}), ("arms.", self.arms), ("datasets.", self.datasets)):
            for name, changes in sections.items():
                own = next((k for k in keys_of(changes) if any(f"{k}.".startswith(f"{o}.") for o in OWN)), None)
                if own is not None:
                    raise ValueError(f"{kind}{name}: {own} is set by the study for every cell; leave it out")
                if "recipe" in changes and kind != "arms.":
                    raise ValueError(f"{kind}{name}: recipe: only the study itself and its arms name a recipe")
                if not isinstance(changes.get("recipe", ""), str):
                    raise ValueError(f"arms.{name}: recipe: expected a file's name, found {changes['recipe']!r}")
        return self


def load_study(path: Path, overrides: Iterable[str] = ()) -> StudyConfig:
    """A study file, with `key=value` overrides.

    Raises:
        ConfigError: one line for each mistake: file, key, what was found, what was expected.
    """
    if not path.is_file():
        raise ConfigError(f"{path}: no such study file; expected YAML such as configs/studies/quick.yaml")
    document = files.read(path, overrides)
    study = checked(StudyConfig, {"name": path.stem, **document.values}, document)
    beside = path.parent / study.recipe
    found: dict[str, Any] = {"recipe": str(beside)} if beside.is_file() else {}
    found["common"] = _with_imports(study.common, path.parent)
    for name, sections in (("arms", study.arms), ("datasets", study.datasets)):
        found[name] = {key: _with_imports(changes, path.parent) for key, changes in sections.items()}
    return study.model_copy(update=found)


def _with_imports(changes: Overrides, folder: Path) -> Overrides:
    """Plug-in files that lie beside the study by their full paths; a recipe looks for them beside itself."""
    if not isinstance(changes.get("imports"), list):
        return changes
    paths = [str((folder / str(p)).resolve()) if (folder / str(p)).is_file() else p for p in changes["imports"]]
    return {**changes, "imports": paths}


def as_arguments(changes: Overrides) -> list[str]:
    """`key=value` texts as the command line has them."""
    return [f"{key}={json.dumps(value)}" for key, value in changes.items() if key != "recipe"]


def keys_of(changes: Overrides) -> list[str]:
    """Dotted keys that overrides set: of a section with a `type` the section itself, as that replaces the whole."""
    keys = []
    for key, value in changes.items():
        if key == "recipe":
            continue
        if isinstance(value, dict) and value and "type" not in value:
            keys += [f"{key}.{inner}" for inner in keys_of(value)]
        else:
            keys.append(key.removesuffix(".type"))
    return keys


def flat(values: Any, prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} -> {"a.b": 1}; lists are values."""
    if not isinstance(values, dict) or not values:
        return {prefix.rstrip("."): values}
    return {k: v for name, value in values.items() for k, v in flat(value, f"{prefix}{name}.").items()}


def below(key: str, sections: Iterable[str]) -> bool:
    """Whether a dotted key is one of `sections` or inside one."""
    return any(f"{key}.".startswith(f"{section}.") for section in sections)
