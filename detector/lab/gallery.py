"""The report's pictures: what each arm's rule assigns on the same images, and what each arm misses most."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from detector.canvas import visible
from detector.data.batch import collate
from detector.data.coco import CocoData
from detector.errors import CheckpointError, DataError
from detector.evaluate.runner import inference
from detector.evaluate.treatment import overlap
from detector.evaluate.truth import Truth
from detector.lab.grid import Cell
from detector.lab.misses import Miss, Seen, worst
from detector.lab.pictures import crop, jpeg, rule_row
from detector.lab.record import assignment_of, dense_part, restore
from detector.lab.study import StudyConfig
from detector.train.folder import RunFiles


@dataclass(frozen=True)
class Scene:
    """One image under every arm's rule."""

    title: str
    rows: dict[str, str]  # arm -> data URI of its panels, one a level


@dataclass(frozen=True)
class MissPicture:
    image: str  # data URI
    caption: str


def scenes(study: StudyConfig, cells: Sequence[Cell], dataset: str) -> tuple[list[Scene], list[str]]:
    """Of each arm's first finished cell on this data set, with its final weights; and what could not be drawn, why."""
    pictures: dict[int, dict[str, str]] = {}
    titles: dict[int, str] = {}
    notes: list[str] = []
    bare: list[str] = []
    for arm in study.arms:
        cell = next((c for c in cells if c.arm == arm and c.dataset == dataset), None)
        if cell is None:
            continue
        weights = cell.run / f"{study.checkpoint}.pt"
        if not weights.is_file():  # as of every kept cell: said once
            bare.append(arm)
            continue
        try:
            data = cell.config.data.open(study.split)
            module = restore(cell.config, weights, data.index.classes)
            for i in _choose(data, study.pictures):
                sample = cell.config.data.resize(data[i])
                batch = collate([sample], pad_multiple=cell.config.data.pad_multiple)
                with inference(module):
                    outputs = module.model(batch.images, batch.objects)
                    assignments = module.criterion(outputs, batch.objects).assignments
                dense = dense_part(outputs)
                assignment = assignment_of(dense, assignments)
                row = rule_row(batch, dense.priors, assignment, data.index.classes, arm, panel=260)
                pictures.setdefault(i, {})[arm] = uri(jpeg(row))
                titles[i] = f"{data.index.title(i)}image {int(data.index.image_ids[i])} of {dataset}"
        except (CheckpointError, DataError) as error:
            notes.append(f"{cell.name}: no pictures: {error}")
    if bare:
        notes.append(
            f"{dataset}: no pictures of assignments by {', '.join(bare)}: the cells' {study.checkpoint}.pt is not here"
            " (kept cells come without weights)"
        )
    return [Scene(titles[i], rows) for i, rows in pictures.items()], notes


def _choose(data: CocoData, count: int) -> list[int]:
    """Evenly spaced images that hold an object."""
    index = data.index
    filled = [i for i in range(len(index)) if (~index.crowd[index.rows(i)]).any()]
    return [filled[round(x)] for x in np.linspace(0, len(filled) - 1, min(count, len(filled)))] if count else []


def seen(cells: Sequence[Cell], split: str) -> dict[str, list[Seen]]:
    """For each arm what its finished cells on one data set saw.  Cells whose truth is gone are left out."""
    found: dict[str, list[Seen]] = {}
    truths: dict[str, Truth] = {}
    for cell in cells:
        key = cell.config.data.model_dump_json()
        if key not in truths:
            truths[key] = Truth.of(cell.config.data.open(split).index)  # type: ignore[arg-type]
        found.setdefault(cell.arm, []).append(Seen.of(cell, truths[key]))
    return found


def misses(study: StudyConfig, cells: Sequence[Cell], by_arm: dict[str, list[Seen]], count: int = 6
           ) -> dict[str, list[MissPicture]]:  # fmt: skip
    """For each arm crops of the objects that it misses and the others find."""
    found: dict[str, list[MissPicture]] = {}
    if not cells:
        return found
    data = cells[0].config.data.open(study.split)
    for arm, mine in by_arm.items():
        others = [s for name, each in by_arm.items() if name != arm for s in each]
        for miss in worst(mine, others, count):
            picture = _picture(data, miss, len(mine), len(others))
            if picture is not None:
                found.setdefault(arm, []).append(picture)
    return found


def _picture(data: CocoData, miss: Miss, seeds: int, others: int) -> MissPicture | None:
    index = data.index
    row = int(np.flatnonzero(index.annotation_ids == miss.annotation)[0])
    i = index.image_of(row)
    try:
        image = visible(data[i].image)
    except DataError:
        return None
    name = index.classes[int(index.labels[row])]
    caption = f"{name}, {index.title(i)}image {int(index.image_ids[i])}"
    caption += f": missed by {round(miss.missed * seeds)} of {seeds} seeds"
    if others:
        caption += f", by {round(miss.elsewhere * others)} of {others} other runs"
    caption += f"; {miss.positives:.1f} positives"
    return MissPicture(uri(jpeg(crop(image, index.boxes[row]))), caption)


def uri(content: bytes) -> str:
    return "data:image/jpeg;base64," + base64.b64encode(content).decode()


def agreements(cells: Sequence[Cell]) -> dict[tuple[str, str], float]:
    """Of any two arms: pairs that both make over pairs that either makes, in the last notes of their probes."""
    pairs: dict[str, set[int]] = {}
    for cell in cells:
        notes = sorted(RunFiles(cell.run).assignments.glob("step-*.npz"))
        if not notes or cell.arm in pairs:
            continue
        with np.load(notes[-1], allow_pickle=False) as data:
            name = data.files[0].split("/")[0]
            pairs[cell.arm] = set((data[f"{name}/object"] * (1 << 40) + data[f"{name}/prior"]).tolist())
    arms = list(pairs)
    return {(a, b): overlap(pairs[a], pairs[b]) for i, a in enumerate(arms) for b in arms[i + 1 :]}
