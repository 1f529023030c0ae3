"""A user's own part in a user's own file."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from detector.config.load import dump, from_snapshot, load_config
from detector.config.run import RunConfig
from detector.errors import CheckpointError, ConfigError
from detector.train.loop import train

DOCS = Path(__file__).resolve().parents[2] / "docs"


def write(folder: Path, name: str, text: str) -> Path:
    path = folder / name
    path.write_text(text)
    return path


def own_rule() -> str:
    """The rule that the documentation shows."""
    return re.findall(r"```python\n(.*?)```", (DOCS / "own_rule.md").read_text(), re.DOTALL)[0]


def test_the_documented_rule_joins_the_slot_and_trains(tmp_path: Path) -> None:
    rule = own_rule()
    assert len(rule.splitlines()) < 30
    write(tmp_path, "nearest.py", rule)
    path = write(
        tmp_path, "mine.yaml", "base: small.yaml\nimports: [nearest.py]\nassigner: {type: nearest}\nname: mine\n"
    )
    write(
        tmp_path,
        "small.yaml",
        f"""
run: {{dir: {tmp_path}/run}}
data:
  {{type: shapes, root: {tmp_path}/data, size: [64, 96], train: 2, val: 1, test: 1, workers: 0,
    resize: {{type: short_edge, short: 64, long: 96}}}}
model:
  {{backbone: {{name: resnet18, levels: [3, 4]}}, neck: {{channels: 16}}, head: {{convs: 1, channels: 16}}}}
train:
  length: {{steps: 30}}
  batch_size: 2
  log_every: 5
  evaluate_every: null
  optimizer: {{type: adamw, lr: 1e-3, base_batch: null}}
  schedule: {{type: multi_step, warmup: null}}
""",
    )
    config = load_config(path, ["assigner.radius=1.5"])
    assert (config.assigner.type, config.assigner.radius) == ("nearest", 1.5)
    snapshot = write(tmp_path, "config.yaml", dump(config))
    # The snapshot names the file by its absolute path; the widened classes are made anew, so compare what they say.
    assert load_config(snapshot).model_dump() == config.model_dump()

    outcome = train(config)
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    losses = [record["loss"] for record in map(json.loads, lines) if "loss" in record]
    assert losses[-1] < 0.8 * losses[0]
    assert outcome.step == 30

    # Nothing global changed: without the import the type is unknown.
    with pytest.raises(ConfigError, match="unknown type 'nearest'"):
        load_config(write(tmp_path, "other.yaml", "base: small.yaml\nassigner: {type: nearest}\n"))
    # A checkpoint does not run the file, and needs no assigner to predict.
    stored = config.model_dump(mode="json")
    assert from_snapshot(stored, "best.pt", plugins=False).assigner == RunConfig.model_fields["assigner"].default
    stored["model"]["type"] = "mine"
    with pytest.raises(CheckpointError, match="plug-in"):
        from_snapshot(stored, "best.pt", plugins=False)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "no such file"),
        ("import nowhere_to_be_found\n", "ModuleNotFoundError while it was imported"),
        ("x = 1 +\n", "SyntaxError while it was imported"),
        ("x = 1\n", "defines nothing that fits a slot"),
        (
            "from typing import Literal\nfrom detector.assign import Assigner\n"
            'class Mine(Assigner):\n    type: Literal["atss"] = "atss"\n',
            "type 'atss' already means Atss",
        ),
    ],
)
def test_a_file_that_cannot_join_is_explained(tmp_path: Path, text: str | None, message: str) -> None:
    if text is not None:
        write(tmp_path, "mine.py", text)
    path = write(tmp_path, "mine.yaml", "data: {type: shapes}\nmodel: {}\ntrain: {}\nimports: [mine.py]\n")
    with pytest.raises(ConfigError, match=message):
        load_config(path)


def test_a_loss_of_ones_own_joins_deep_inside(tmp_path: Path) -> None:
    write(
        tmp_path,
        "mine.py",
        "from typing import Literal\nfrom torch import Tensor\nfrom detector.losses.regression import BoxLoss\n"
        'class Half(BoxLoss):\n    type: Literal["half"] = "half"\n    power: float = 0.5\n'
        "    def __call__(self, predicted: Tensor, wanted: Tensor) -> Tensor:\n"
        "        return (predicted - wanted).abs().pow(self.power).sum(-1)\n",
    )
    path = write(
        tmp_path,
        "mine.yaml",
        "data: {type: shapes}\nmodel: {}\ntrain: {}\nimports: [mine.py]\ncriterion: {box: {type: half, power: 0.3}}\n",
    )
    assert load_config(path).criterion.box.power == 0.3
    with pytest.raises(ConfigError, match=r"criterion\.box\.powr: unknown key \(did you mean 'power'"):
        load_config(path, ["criterion.box.powr=1"])
