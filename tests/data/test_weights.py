"""Weights of single objects, from the annotation file through every step to the batch."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from detector.cli.check_data import main as check
from detector.data.batch import collate
from detector.data.coco import CocoData
from detector.data.copy_paste import CopyPaste, SmallCopyPaste
from detector.data.erase import Cutout
from detector.data.index import CocoIndex
from detector.data.loader import train_loader
from detector.data.mosaic import Mixup, Mosaic
from detector.data.perspective import LargeScaleJitter, RandomPerspective
from detector.data.resize import Letterbox
from detector.data.sample import Sample
from detector.data.steps import Step
from detector.data.transforms import Flip, FromAlbumentations, RandomScaleCrop
from detector.errors import DataError
from tests.data import drawn
from tests.data.small_coco import document, write
from tests.data.test_loader import same

STEPS: list[Step] = [
    Mosaic(size=(256, 224)),
    Mosaic(size=(256, 288), tiles=9),
    Mixup(),
    CopyPaste(),
    CopyPaste(by="box"),
    SmallCopyPaste(below=80, margin=0),
    LargeScaleJitter(size=(192, 224)),
    RandomPerspective(degrees=40),
    Cutout(),
    RandomScaleCrop(scale=(2, 3), probability=1),
    Flip(horizontal=1),
    FromAlbumentations(name="RandomSizedBBoxSafeCrop", arguments={"height": 90, "width": 90}),
]


def weight_of(rows: np.ndarray) -> np.ndarray:
    return ((rows % 7 + 1) / 8).astype(np.float32)


def samples(seed: int) -> list[Sample]:
    rng = np.random.default_rng(seed)
    made = [drawn.make((150, 190), 5, 10 * i, rng) for i in range(9)]
    return [replace(s, weight=weight_of(s.rows)) for s in made]


@pytest.mark.parametrize("step", STEPS, ids=str)
@pytest.mark.parametrize("seed", range(3))
def test_every_step_takes_weights_along(step: Step, seed: int) -> None:
    given = samples(seed)
    out = drawn.run(step, given, seed)
    assert out.weight is not None
    assert out.weight.dtype == np.float32
    assert np.array_equal(out.weight, weight_of(out.rows))
    plain = drawn.run(step, [replace(s, weight=None) for s in given], seed)
    assert plain.weight is None
    assert np.array_equal(plain.boxes, out.boxes)


def test_weights_of_some_are_joined_with_ones() -> None:
    given = samples(0)
    given = [given[0], *(replace(s, weight=None) for s in given[1:])]
    out = drawn.run(Mosaic(size=(256, 224)), given, 0)
    assert out.weight is not None
    assert np.array_equal(out.weight, np.where(out.rows < 10, weight_of(out.rows), 1))


@pytest.mark.parametrize("seed", range(5))
def test_mixup_weighs_by_the_share_of_the_pixels(seed: int) -> None:
    """White on black shows the share that was drawn."""
    first, second = (replace(s, weight=None) for s in samples(seed)[:2])
    first = replace(first, image=np.full_like(first.image, 255))
    second = replace(second, image=np.zeros_like(second.image))
    step = Mixup(weights=True, scale=(1.0, 1.0))
    out = drawn.run(step, [first, second], seed)
    share = out.image[75, 95, 0] / 255
    assert out.weight is not None
    assert 0.2 <= share <= 0.8
    assert out.weight == pytest.approx(np.where(out.rows < 10, share, 1 - share), abs=1 / 255)
    assert {*(out.rows < 10).tolist()} == {True, False}
    heavy = drawn.run(step, [replace(first, weight=weight_of(first.rows)), second], seed)
    assert heavy.weight == pytest.approx(np.where(out.rows < 10, weight_of(out.rows), 1) * out.weight)
    assert drawn.run(Mixup(scale=(1.0, 1.0)), [first, second], seed).weight is None


def annotated(tmp_path: Path, *weights: Any) -> tuple[Path, Path]:
    content = document()
    for annotation, weight in zip(content["annotations"], weights, strict=False):
        if weight != "none":
            annotation["weight"] = weight
    return write(tmp_path, content)


def test_the_files_weights_reach_the_batch(tmp_path: Path) -> None:
    data = CocoData(CocoIndex.load(*annotated(tmp_path, 0.25, "none", 0, 0.75)))
    assert data.index.weight is not None
    assert data.index.weight.dtype == np.float32
    assert data.index.annotation_ids.tolist() == [102, 105, 101, 103, 104]
    assert data.index.weight.tolist() == [1, 1, 0.25, 0, 0.75]
    assert data[1].weight is not None
    assert data[1].weight.tolist() == [0.25, 0], "the crowd region's is not used"
    batch = collate([data[i] for i in range(3)], pad_multiple=32)
    assert batch.objects.weight is not None
    assert batch.objects.weight.tolist() == [1, 1, 0.25, 0]
    assert batch.objects.select_image(1).weight is not None
    assert batch.objects.select_image(1).weight.tolist() == [0.25, 0]
    assert batch.to("cpu").objects.weight is not None


def test_without_weights_there_are_none(tmp_path: Path) -> None:
    data = CocoData(CocoIndex.load(*write(tmp_path)))
    assert data.index.weight is None
    assert data[0].weight is None
    assert collate([data[0], data[1]], pad_multiple=32).objects.weight is None


@pytest.mark.parametrize(
    ("weight", "said"),
    [(-0.5, "annotation id 101: weight is -0.5, expected 0 or more"), ("much", "annotation id 101: weight is 'much'")],
)
def test_wrong_weights_are_refused_and_mended(tmp_path: Path, capsys: Any, weight: Any, said: str) -> None:
    path, images = annotated(tmp_path, weight, 0.5)
    with pytest.raises(DataError, match=said):
        CocoIndex.load(path, images)
    assert check([str(path), "--images", str(images), "--fix", str(tmp_path / "fixed.json")]) == 0
    assert "a weight that is negative or no number" in " ".join(capsys.readouterr().out.split())
    fixed = json.loads((tmp_path / "fixed.json").read_text())
    assert [a.get("weight") for a in fixed["annotations"]] == [None, 0.5, None, None, None]
    index = CocoIndex.load(tmp_path / "fixed.json", images)
    assert index.weight is not None


def test_workers_and_restarts_change_no_weight(tmp_path: Path) -> None:
    data = CocoData(CocoIndex.load(*annotated(tmp_path, 0.25, 0.5, 0.75)))

    def batches(workers: int, start: int = 0) -> list[Any]:
        return list(
            train_loader(
                data,
                augment=(Mosaic(size=(48, 64)), Mixup(weights=True)),
                resize=Letterbox(size=(48, 64)),
                batch_size=2,
                seed=3,
                start_step=start,
                stop_step=8,
                workers=workers,
                epochs=6.0,
            )
        )

    straight = batches(0)
    assert any(batch.objects.weight is not None and len(batch.objects.weight) for batch in straight)
    for other, start in ((batches(2), 0), (batches(0, 3), 3)):
        assert same(other, straight[start:])
        for a, b in zip(other, straight[start:], strict=True):
            assert torch.equal(a.objects.weight, b.objects.weight)
