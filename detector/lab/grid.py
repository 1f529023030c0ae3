"""A study's cells: arm x data set x seed, each the complete configuration of an ordinary run."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from detector.config.load import find_recipe, load_config
from detector.config.run import RunConfig
from detector.config.yaml import COMMAND_LINE
from detector.data.places import place_key
from detector.errors import ConfigError
from detector.lab.study import StudyConfig, as_arguments, below, flat, keys_of

MAX_DETS = 100
# Where things are and how fast they go: may change between two calls without making it another run.
FREE = ("name", "run", "imports", "data.root", "data.workers", "data.cache", "data.cache_dir",
        "data.max_unreadable", "train.device", "train.threads",
        "train.log_every", "train.save_every", "train.pictures", "train.probe")  # fmt: skip

WEIGHTS = "model.backbone.weights"


@dataclass(frozen=True)
class Cell:
    """One run of the study."""

    arm: str
    dataset: str
    seed: int
    config: RunConfig = field(hash=False)
    folder: Path  # the cell's; the run itself is in `run` below it

    @property
    def name(self) -> str:
        return f"{self.dataset}/{self.arm}/seed-{self.seed}"

    @property
    def run(self) -> Path:
        return self.folder / "run"

    @property
    def settings(self) -> Path:
        return self.folder / "cell.json"

    @property
    def result(self) -> Path:
        """There once the cell is finished, and whole."""
        return self.folder / "result.json"

    @property
    def failure(self) -> Path:
        return self.folder / "failure.json"

    def identity(self) -> dict[str, Any]:
        """What makes it this run: the configuration, but for places and speed; of a file of weights what it holds."""
        settings = flat(self.config.model_dump(mode="json"))
        found = {k: v for k, v in settings.items() if not below(place_key(k), FREE)}
        weights = found.get(WEIGHTS)
        if weights is not None and Path(weights).is_file():
            found[WEIGHTS] = f"sha256 {_digest(Path(weights), Path(weights).stat().st_mtime_ns)}"
        return found

    def chosen(self) -> set[str]:
        """The keys of the identity whose value is not the default."""
        return set(flat(self.config.model_dump(mode="json", exclude_defaults=True)))


@dataclass(frozen=True)
class Difference:
    """A key in which an arm's resolved configuration is not the baseline's."""

    arm: str
    key: str
    baseline: Any
    value: Any
    announced: bool  # whether the study says so

    def __str__(self) -> str:
        return f"{self.arm}: {self.key}: {_short(self.baseline)} -> {_short(self.value)}"


def cells(study: StudyConfig, out: Path) -> list[Cell]:
    """All cells, seeds outermost, so that a study that is stopped early has whole seeds.

    Every configuration is checked here, before anything runs.

    Raises:
        ConfigError: names the arm or data set at fault; one line for each mistake.
    """
    found = []
    wrong: dict[str, list[tuple[str, str]]] = {}
    for seed in study.seeds:
        for dataset in study.datasets:
            for arm in study.arms:
                folder = out / "cells" / dataset / arm / f"seed-{seed}"
                try:
                    found.append(Cell(arm, dataset, seed, resolve(study, arm, dataset, seed, folder / "run"), folder))
                except ConfigError as error:
                    for line in str(error).splitlines():
                        wrong.setdefault(_bare(line), []).append((arm, dataset))
    if wrong:
        raise ConfigError(blamed(wrong, [(arm, dataset) for dataset in study.datasets for arm in study.arms]))
    return found


def blamed(wrong: dict[str, list[tuple[str, str]]], looked_at: Sequence[tuple[str, str]]) -> str:
    """A line for each thing that is wrong and each (arm, data set) where it is, in as few lines as will do."""
    lines = []
    for line, places in wrong.items():
        if len(set(looked_at)) > 1 and set(places) == set(looked_at):
            lines.append(f"every arm on every data set: {line}")
            continue
        for dataset in dict.fromkeys(d for _, d in places):
            arms = dict.fromkeys(a for a, d in places if d == dataset)
            every = {a for a, d in looked_at if d == dataset}
            whole = len(arms) == len(every) > 1
            lines += (
                [f"datasets.{dataset}: {line}"] if whole else [f"arms.{a} on datasets.{dataset}: {line}" for a in arms]
            )
    return "\n".join(lines)


def resolve(study: StudyConfig, arm: str, dataset: str, seed: int, run: Path) -> RunConfig:
    """The recipe, changed by what is common to all cells, by the data set, by the arm, by what the study decides."""
    recipe = study.arms[arm].get("recipe", study.recipe)
    beside = Path(study.recipe).parent / recipe
    own = {
        "name": f"{study.name}-{dataset}-{arm}-{seed}",
        "seed": seed,
        "run.dir": str(run),
        "train.threads": study.threads,
        "train.pictures": 0,
    }
    if study.probe:
        own["train.probe"] = {"images": study.probe}
    config = load_config(
        beside if beside.is_file() else find_recipe(Path(recipe)),
        [
            text
            for changes in (study.common, study.datasets[dataset], study.arms[arm], own)
            for text in as_arguments(changes)
        ],
    )
    if config.evaluate.max_dets != MAX_DETS:
        raise ConfigError(f"evaluate.max_dets is {config.evaluate.max_dets}: a study scores with COCO's {MAX_DETS}")
    return config


def differences(study: StudyConfig, grid: list[Cell]) -> list[Difference]:
    """How each arm's resolved configuration differs from the baseline's; of all data sets each difference once."""
    base_keys = keys_of(study.arms[study.reference])
    found: dict[tuple[str, str, str, str], Difference] = {}
    first = [cell for cell in grid if cell.seed == study.seeds[0]]
    for cell in first:
        base = next(c for c in first if c.dataset == cell.dataset and c.arm == study.reference)
        announced = study.varies if study.varies is not None else (*keys_of(study.arms[cell.arm]), *base_keys)
        one, other = base.identity(), cell.identity()
        for key in [*other, *(k for k in one if k not in other)]:
            if one.get(key) != other.get(key):
                difference = Difference(cell.arm, key, one.get(key), other.get(key), below(key, announced))
                found.setdefault((cell.arm, key, repr(difference.baseline), repr(difference.value)), difference)
    return list(found.values())


def settings_text(cell: Cell) -> str:
    """The configuration as JSON, which is YAML too: what the cell's process is given."""
    return json.dumps(cell.config.model_dump(mode="json"), indent=1) + "\n"


@lru_cache(maxsize=64)
def _digest(path: Path, _changed: int) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _bare(line: str) -> str:
    """Without the source of overrides, which are the study's."""
    return line.removeprefix(f"{COMMAND_LINE}: ")


def _short(value: Any) -> str:
    text = "nothing" if value is None else str(value)
    return text if len(text) <= 60 else text[:57] + "..."
