"""Runs small enough to train in a second or two."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from detector.config.load import load_config
from detector.config.run import RunConfig

RECIPE = """
data:
  type: shapes
  root: {root}
  size: [64, 64]
  train: 10
  val: 4
  resize: {{type: short_edge, short: 64, long: 64, multi_scale: [48, 64]}}
  workers: 0
augment: [{{type: flip}}, {{type: color}}]
model:
  backbone: {{name: test_resnet}}
  neck: {{channels: 16, norm: batch}}
  head: {{convs: 1, channels: 16, quality: true}}
criterion: {{quality: {{type: bce, target: iou}}, normalizer: ema}}
train:
  length: {{steps: 6}}
  batch_size: 4
  accumulate: 2
  optimizer: {{type: sgd, lr: 0.02, base_batch: null}}
  schedule: {{type: cosine, warmup: {{steps: 2}}}}
  ema: {{}}
  evaluate_every: null
  save_every: {{steps: 2}}
  log_every: 1
  pictures: 1
  device: cpu
run: {{dir: {folder}}}
"""


@pytest.fixture(scope="session")
def shapes_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("shapes")


@pytest.fixture
def recipe(tmp_path: Path, shapes_folder: Path) -> Path:
    """A recipe file whose run goes into `run` beside it."""
    path = tmp_path / "tiny.yaml"
    path.write_text(RECIPE.format(root=shapes_folder, folder=tmp_path / "run"), encoding="utf-8")
    return path


@pytest.fixture
def config(recipe: Path) -> Callable[..., RunConfig]:
    """The recipe with overrides."""

    def load(*overrides: str) -> RunConfig:
        return load_config(recipe, overrides)

    return load
