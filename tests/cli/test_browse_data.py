"""The command that shows samples: what it draws is what training sees, and wrong requests are told."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest

from detector import draw
from detector.cli.browse_data import main
from detector.config.load import load_config
from detector.data.batch import collate
from detector.structures import Batch
from detector.train.loop import _loader

RECIPE = """
data:
  type: shapes
  root: {root}
  size: [64, 96]
  train: 10
  val: 2
  resize: {{type: letterbox, size: [64, 64], multi_scale: [48, 64, 96]}}
  workers: 0
augment:
  - {{type: copy_paste}}
  - {{type: mosaic, size: [64, 96], when: {{probability: 0.7}}}}
  - {{type: flip}}
model:
  backbone: {{name: test_resnet}}
  neck: {{channels: 16, norm: batch}}
  head: {{convs: 1, channels: 16}}
train:
  length: {{epochs: 3}}
  batch_size: 4
  optimizer: {{type: sgd, lr: 0.02}}
"""


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.yaml"
    path.write_text(RECIPE.format(root=tmp_path / "shapes"), encoding="utf-8")
    return path


@pytest.mark.parametrize("overrides", [[], ["data.order={type: class_balanced}"], ["train.accumulate=2"]], ids=str)
def test_what_is_drawn_is_what_training_sees(
    recipe: Path, tmp_path: Path, overrides: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[Batch] = []

    def keep(before: Batch, after: Batch, *others: object) -> np.ndarray:
        drawn.extend((before, after))
        return original(before, after, *others)  # type: ignore[arg-type]

    original = draw.pair_sheet
    monkeypatch.setattr(draw, "pair_sheet", keep)
    out = tmp_path / "sheet.png"
    assert main([str(recipe), *overrides, "--epoch", "1", "--count", "10", "--out", str(out)]) == 0
    before, after = drawn
    assert cv2.imread(str(out)) is not None

    config = load_config(recipe, overrides)
    data = config.data.open("train")
    seen = list(_loader(config, data, 0, 7 * config.train.accumulate, 3.0))
    position = 0
    for batch in seen:
        for i in range(len(batch)):
            place = position - 10
            position += 1
            if not 0 <= place < 10:
                continue
            height, width = (int(n) for n in batch.sizes[i])
            assert torch_equal(batch.images[i, :, :height, :width], after.images[place, :, :height, :width])
            assert after.sizes[place].tolist() == [height, width]
            mine, drawn_objects = batch.objects.select_image(i), after.objects.select_image(place)
            assert torch_equal(mine.boxes, drawn_objects.boxes)
            assert int(batch.ids[i]) == int(before.ids[place])
    assert position >= 20


def torch_equal(a: object, b: object) -> bool:
    return np.array_equal(np.asarray(a), np.asarray(b))


def test_images_are_chosen_by_place_or_id(recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(recipe), "--id", "3", "7", "--out", str(tmp_path / "a.png"), "--columns", "1"]) == 0
    assert main([str(recipe), "--index", "2", "6", "--out", str(tmp_path / "b.png"), "--columns", "1"]) == 0
    a, b = (cv2.imread(str(tmp_path / name)) for name in ("a.png", "b.png"))
    assert np.array_equal(a, b)
    assert "2 images of epoch 0" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--epoch", "4"], "the run has 3.2 epochs, counted from 0"),
        (["--index", "10"], "holds 10 images, counted from 0"),
        (["--id", "99"], "no image of that id"),
        (["--out", "sheet.what"], "cannot write this kind of image"),
        (["augment.0.edges=1"], "unknown key (did you mean 'edge'?)"),
    ],
)
def test_wrong_requests(
    recipe: Path, tmp_path: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    assert main([str(recipe), *arguments]) == 2
    assert message in capsys.readouterr().err


def test_pairs_lie_beside_each_other(recipe: Path) -> None:
    data = load_config(recipe).data.open("train")
    batch = collate([data[i] for i in range(3)], pad_multiple=1)
    sheet = draw.pair_sheet(batch, batch, data.index.classes, ["one", "two", "three"], 2, 96)
    assert sheet.shape[1] > 4 * 96
    assert sheet.shape[0] > 2 * 64
