"""Whether this machine has what cells need, asked before any of them runs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from detector.config.run import RunConfig
from detector.data.config import SeveralData, SplitName
from detector.data.places import CocoPlace
from detector.errors import UserError
from detector.lab.grid import Cell, blamed
from detector.train.device import find_device


def check_machine(cells: Sequence[Cell], split: SplitName) -> None:
    """Looks for the device, the data and the weights of cells that are to run here.

    Raises:
        UserError: one line for each thing that is missing, with the arms and data sets that need it.
    """
    wrong: dict[str, list[tuple[str, str]]] = {}
    for cell in cells:
        for line in objections(cell.config, split):
            wrong.setdefault(line, []).append((cell.arm, cell.dataset))
    if wrong:
        raise UserError(blamed(wrong, [(cell.arm, cell.dataset) for cell in cells]))


def objections(config: RunConfig, split: SplitName) -> list[str]:
    """What is missing here for a run that is scored on `split`; generated data are made when they are first used."""
    found = []
    try:
        find_device(config.train.device)
    except UserError as error:
        found.append(f"train.device: {error}")
    for part in dict.fromkeys(("train", "val", split)):
        try:
            _look(config, part)
        except UserError as error:
            found.append(str(error))
    weights = config.model.backbone.weights
    if weights is not None and not Path(weights).is_file():
        found.append(f"model.backbone.weights: {weights}: no such file; set it to where the weights are")
    return found


def _look(config: RunConfig, split: SplitName) -> None:
    """Raises `DataError` where files of a split are missing."""
    data = config.data
    if isinstance(data, SeveralData):
        for name in data.taking_part(split):
            source = data.sources[name]
            if isinstance(source, CocoPlace):
                source.files(split, f"data.sources.{name}")
    elif isinstance(data, CocoPlace):
        data.files(split)
