"""One small study, run once for all tests that look at what it leaves."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from contextlib import redirect_stdout
from dataclasses import dataclass
from io import StringIO
from pathlib import Path

import pytest

from detector.cli.compare import main
from detector.lab import cell
from detector.lab.grid import cells
from detector.lab.process import Ended
from detector.lab.run import Runner, ThisMachine
from detector.lab.study import load_study
from tests.lab.browsing import browser as browser

RECIPE = """
data:
  type: shapes
  root: {root}
  size: [64, 64]
  train: 10
  val: 6
  resize: {{type: short_edge, short: 64, long: 64}}
  workers: 0
augment: [{{type: flip}}, {{type: color}}]
model:
  backbone: {{name: test_resnet}}
  neck: {{channels: 16, norm: batch}}
  head: {{convs: 1, channels: 16, norm: batch, quality: true, priors: {{type: points}}, coder: {{type: distances}}}}
criterion: {{quality: {{type: bce, target: iou}}}}
train:
  length: {{steps: 15}}
  batch_size: 4
  optimizer: {{type: adamw, lr: 2e-3, base_batch: null}}
  schedule: {{type: cosine, warmup: {{steps: 2}}}}
  ema: {{}}
  evaluate_every: null
  save_every: {{steps: 2}}
  log_every: 1
  device: cpu
decode: {{score_threshold: 0.0}}
"""
STUDY = """
name: small
recipe: tiny.yaml
arms:
  one: {assigner.type: atss}
  two: {assigner: {type: fcos}}
seeds: [0, 1]
metrics: [AP, AP50]
resamples: 100
pictures: 2
probe: 3
jobs: 2
"""


@dataclass(frozen=True)
class Place:
    """A folder with a recipe and a study, and what comes of it."""

    folder: Path

    @property
    def study(self) -> Path:
        return self.folder / "small.yaml"

    @property
    def out(self) -> Path:
        return self.folder / "out"

    def cell(self, arm: str, seed: int, dataset: str = "data") -> Path:
        return self.out / "cells" / dataset / arm / f"seed-{seed}"

    def compare(self, *arguments: str) -> int:
        return main([str(self.study), "--out", str(self.out), *arguments])

    def change(self, old: str, new: str) -> None:
        text = self.study.read_text(encoding="utf-8")
        assert old in text
        self.study.write_text(text.replace(old, new), encoding="utf-8")


def place(folder: Path, shapes: Path) -> Place:
    (folder / "tiny.yaml").write_text(RECIPE.format(root=shapes), encoding="utf-8")
    (folder / "small.yaml").write_text(STUDY, encoding="utf-8")
    return Place(folder)


@pytest.fixture(scope="session")
def lab_shapes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("lab-shapes")


class CellHere:
    """In the place of `CellProcess`: the cell is worked on in this process, where everything is imported already."""

    def __init__(self, folder: Path, environment: Mapping[str, str]) -> None:
        with redirect_stdout(StringIO()) as shown:
            self.code = cell.main(folder)
        self.lines = tuple(shown.getvalue().splitlines())

    def ask_to_stop(self) -> None:
        """It has ended."""

    def done(self) -> bool:
        return True

    def ended(self) -> Ended:
        return Ended(self.code, self.lines)


@pytest.fixture(scope="session")
def done(tmp_path_factory: pytest.TempPathFactory, lab_shapes: Path) -> Place:
    """Four cells, finished: those of seed 1 in this process, those of seed 0 in two of their own at the same time.

    Not to be changed: take `copy`.
    """
    made = place(tmp_path_factory.mktemp("study"), lab_shapes)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("detector.lab.run.CellProcess", CellHere)
        study = load_study(made.study)
        Runner(study, ThisMachine(study, 1), print)([c for c in cells(study, made.out) if c.seed == 1])
    assert made.compare() == 0
    return made


@pytest.fixture
def cells_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where it is not about processes: a study's cells run in this one."""
    monkeypatch.setattr("detector.lab.run.CellProcess", CellHere)


@pytest.fixture
def fresh(tmp_path: Path, lab_shapes: Path) -> Place:
    """Nothing has run yet."""
    return place(tmp_path, lab_shapes)


@pytest.fixture
def copy(done: Place, tmp_path: Path) -> Callable[[], Place]:
    """The finished study somewhere else."""

    def make() -> Place:
        folder = tmp_path / "copy"
        shutil.copytree(done.folder, folder)
        return Place(folder)

    return make
