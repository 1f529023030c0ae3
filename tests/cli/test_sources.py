"""The commands on several sources in one run."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from detector.cli import browse_data, check_data, compare, eval, train
from detector.train.checkpoint import load_checkpoint

RECIPE = """
data:
  type: several
  sources:
    big: {{type: shapes, root: {root}/big, size: [64, 64], train: 8, val: 3}}
    small:
      type: coco
      root: {root}/small
      train: {{annotations: train/annotations.json, images: train/images}}
      val: {{annotations: val/annotations.json, images: val/images}}
      rename: {{circle: disc}}
  partial: allow
  order: {{type: by_source, shares: {{big: 1, small: 1}}}}
  resize: {{type: short_edge, short: 64, long: 64}}
  workers: 0
augment: [{{type: mosaic, size: [64, 64]}}, {{type: flip}}]
model:
  backbone: {{name: test_resnet}}
  neck: {{channels: 16, norm: batch}}
  head: {{convs: 1, channels: 16, norm: batch, priors: {{type: points}}, coder: {{type: distances}}}}
train:
  length: {{steps: 4}}
  batch_size: 4
  optimizer: {{type: sgd, lr: 0.02}}
  schedule: {{type: cosine, warmup: {{steps: 2}}}}
  evaluate_every: null
  device: cpu
decode: {{score_threshold: 0.0}}
run: {{dir: {root}/run}}
"""


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    from detector.data.config import ShapesData

    made = ShapesData(root=tmp_path / "small", size=(64, 64), train=4, val=3, test=1, seed=5)
    for split in ("train", "val"):
        made.files(split)
    path = tmp_path / "tiny.yaml"
    path.write_text(RECIPE.format(root=tmp_path), encoding="utf-8")
    return path


def test_train_evaluate_and_go_on_elsewhere(recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train.main([str(recipe), "train.length={steps: 2}"]) == 0
    run = tmp_path / "run"
    saved = load_checkpoint(run / "last.pt")
    assert saved["classes"][-1] == "disc"
    assert saved["category_ids"] == list(range(1, len(saved["classes"]) + 1))

    out = tmp_path / "found.json"
    assert eval.main([str(run), "--device", "cpu", "--detections-out", str(out)]) == 0
    assert "note: image ids occur in several sources: they are raised by 10 (small)" in capsys.readouterr().out
    both = {d["image_id"] for d in json.loads(out.read_text())}
    assert both == {1, 2, 3, 11, 12, 13}
    assert eval.main([str(run), "--device", "cpu", "--detections-out", str(out), "data.val=small"]) == 0
    assert {d["image_id"] for d in json.loads(out.read_text())} == {1, 2, 3}

    # Where a source lies may change when a run goes on; how its classes are called may not.
    shutil.move(tmp_path / "small", tmp_path / "moved")
    arguments = [str(recipe), "--resume", str(run), "train.length={steps: 4}"]
    assert train.main([*arguments, f"data.sources.small.root={tmp_path / 'moved'}"]) == 0
    moved = [
        *arguments,
        f"data.sources.small.root={tmp_path / 'moved'}",
        "data.sources.small.rename={circle: disc, cross: cross}",
    ]
    assert train.main(moved) == 2


def test_check_data_looks_at_every_source_and_shows_the_classes(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report = tmp_path / "report.json"
    assert check_data.main([str(recipe), "--quick", "--json", str(report)]) == 0
    out = capsys.readouterr().out
    for text in ("big, train: ", "big, val: ", "big, test: ", "small, train: ", "small, val: ", "(circle)"):
        assert text in out
    assert "small, test" not in out
    assert out.count("not labelled") == 2, "circle is big's alone, disc small's"
    assert [(r["source"], r["split"]) for r in json.loads(report.read_text())][-2:] == [
        ("small", "val"),
        ("big", "test"),
    ]

    path = tmp_path / "small" / "val" / "annotations.json"
    document: Any = json.loads(path.read_text())
    document["annotations"][0]["bbox"] = [1, 2, 0, 4]
    path.write_text(json.dumps(document))
    assert check_data.main([str(recipe), "--quick"]) == 2
    assert "box-no-area" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        check_data.main([str(recipe), "--fix", str(tmp_path / "fixed.json")])


def test_browse_data_names_the_source(recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from detector import draw

    titles: list[str] = []
    original = draw.pair_sheet

    def keep(before: Any, after: Any, classes: Any, names: list[str], *others: Any) -> Any:
        titles.extend(names)
        return original(before, after, classes, names, *others)

    monkeypatch.setattr(draw, "pair_sheet", keep)
    assert browse_data.main([str(recipe), "--count", "12", "--out", str(tmp_path / "sheet.png")]) == 0
    assert sum(title.startswith("big, index") for title in titles) == 6
    assert sum(title.startswith("small, index") for title in titles) == 6


@pytest.mark.slow
def test_compare_runs_on_several_sources(recipe: Path, tmp_path: Path) -> None:
    study = tmp_path / "study.yaml"
    study.write_text(
        "recipe: tiny.yaml\narms:\n  one: {}\n  two: {assigner: {type: fcos}}\nseeds: [0, 1]\nresamples: 100\n"
        "pictures: 2\nprobe: 2\n"
    )
    assert compare.main([str(study), "--out", str(tmp_path / "out")]) == 0
    summary = (tmp_path / "out" / "tables.md").read_text()
    assert "two" in summary
    assert "big, image" in (tmp_path / "out" / "report.html").read_text()
