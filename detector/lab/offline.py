"""Rules looked at without training: on the images of a split, with or without a trained network."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path

import numpy as np
import torch

from detector.assign.base import Assigner
from detector.config.load import load_config
from detector.config.run import RunConfig
from detector.data.batch import collate
from detector.data.coco import CocoData, CocoIndex
from detector.errors import DataError, UserError
from detector.evaluate.survey import survey
from detector.evaluate.treatment import Treatment, agreement, concatenate, treat
from detector.models import Network
from detector.models.dense import DenseDetector
from detector.predict import restore
from detector.structures import Assignment, Batch, Predictions, Priors


@dataclass(frozen=True)
class Scene:
    """A batch with what a rule sees of it."""

    batch: Batch
    priors: Priors
    predictions: Predictions | None  # None: there is no trained network


def rules_of(recipe: Path, overrides: Sequence[str], names: Sequence[str]) -> dict[str, Assigner]:
    """Rules by their `type`, with the recipe's parameters where it is the recipe's own; all others have the defaults.

    Raises:
        ConfigError: there is no such rule; names near ones.
    """
    rules: dict[str, Assigner] = {}
    for name in names:
        rule = load_config(recipe, [*overrides, f"assigner.type={name}"]).assigner
        assert rule is not None
        rules[name] = rule
    return rules


def network(config: RunConfig, classes: Sequence[str], checkpoint: Path | None) -> tuple[DenseDetector, bool]:
    """The network that makes priors and predictions, and whether it is trained.

    Raises:
        CheckpointError: the file is missing or damaged.
        UserError: the checkpoint knows other classes, or the network has no dense head.
    """
    if checkpoint is None:
        torch.manual_seed(0)
        return _dense(config.network(len(classes), load_weights=False).eval(), config.model.type), False
    restored = restore(checkpoint)
    if restored.classes != tuple(classes):
        raise UserError(
            f"{checkpoint}: was trained for the classes {', '.join(restored.classes)}, the data have"
            f" {', '.join(classes)}; use the data it was trained on"
        )
    return _dense(restored.model, restored.config.model.type), True


def _dense(model: Network, kind: str) -> DenseDetector:
    if not isinstance(model, DenseDetector):
        raise UserError(
            f"model.type {kind!r}: rules are looked at on a dense head, which this is not; take a recipe whose"
            " model.type is 'dense'"
        )
    return model


def scenes(
    model: DenseDetector, trained: bool, config: RunConfig, data: CocoData, images: Sequence[int], at_once: int = 4
) -> Iterator[Scene]:
    """Batches of these images of the index, resized as in evaluation."""
    resize = config.data.resize
    for start in range(0, len(images), at_once):
        samples = [resize(data[i]) for i in images[start : start + at_once]]
        batch = collate(samples, pad_multiple=config.data.pad_multiple, canvas=resize.canvas())
        with torch.no_grad():
            outputs = model(batch.images, batch.objects)
        yield Scene(batch, outputs.priors, outputs.detached() if trained else None)


def assign(rules: dict[str, Assigner], scene: Scene) -> dict[str, Assignment]:
    """What each rule makes of a batch.

    Raises:
        UserError: a rule looks at predictions and there is no checkpoint.
    """
    blind = [name for name, rule in rules.items() if rule.uses_predictions and scene.predictions is None]
    if blind:
        raise UserError(f"rule {blind[0]!r} looks at the network's predictions: give --checkpoint FILE.pt")
    return {name: rule(scene.priors, scene.batch.objects, scene.predictions) for name, rule in rules.items()}


@dataclass
class RuleStatistics:
    """Sums up several rules over the same scenes."""

    rules: dict[str, Assigner]
    treated: dict[str, list[Treatment]] = field(default_factory=dict)
    agreements: dict[tuple[str, str], list[float]] = field(default_factory=dict)

    def add(self, scene: Scene) -> None:
        found = assign(self.rules, scene)
        for name, assignment in found.items():
            self.treated.setdefault(name, []).append(
                treat(scene.priors, scene.batch.objects, assignment, scene.predictions)
            )
        for one, other in combinations(found, 2):
            self.agreements.setdefault((one, other), []).append(agreement(found[one], found[other]))

    def result(self, classes: Sequence[str]) -> dict[str, dict[str, dict[str, dict[str, float]]]]:
        """For each rule what `survey` says."""
        return {name: survey(concatenate(parts), classes) for name, parts in self.treated.items()}

    def agreement(self) -> dict[tuple[str, str], float]:
        """Mean over the batches of pairs that both make over pairs that either makes."""
        return {pair: float(np.mean(values)) for pair, values in self.agreements.items()}


def find_image(text: str, config: RunConfig, split: str, annotations: Path | None) -> tuple[CocoData, int]:
    """A data set and the index in it of an image named by its file or its id.

    Raises:
        DataError: it is not there; says where was looked.
    """
    path = Path(text)
    if annotations is not None:
        data = CocoData(CocoIndex.load(annotations, path.parent if path.parent.is_dir() else Path(".")))
    else:
        data = config.data.open(split)  # type: ignore[arg-type]
    index = data.index
    if text.isdigit() and int(text) in index.image_ids:
        return data, int(np.flatnonzero(index.image_ids == int(text))[0])
    for i in range(len(index)):
        if Path(index.file_name(i)).name == path.name:
            return data, i
    raise DataError(
        f"{text}: is no image of {index.annotations} (neither an id nor a file name); choose another --split or recipe,"
        " or name the image's COCO file with --annotations FILE"
    )
