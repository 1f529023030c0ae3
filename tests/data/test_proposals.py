"""Proposals from files: read, checked, and carried along to where the image ends up."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from detector.data.batch import collate
from detector.data.coco import CocoData, CocoIndex
from detector.data.loader import eval_loader, train_loader
from detector.data.mosaic import Mosaic
from detector.data.perspective import LargeScaleJitter
from detector.data.proposals import ProposalSet, read_proposals
from detector.data.resize import Fixed, ShortEdge
from detector.data.steps import Step
from detector.data.transforms import Flip, FromAlbumentations, RandomScaleCrop
from detector.errors import DataError


@pytest.fixture
def index(tmp_path: Path) -> CocoIndex:
    """Three images of 40 x 60, ids not in order, with one object each."""
    folder = tmp_path / "images"
    folder.mkdir()
    ids = (30, 10, 20)
    for i in ids:
        Image.fromarray(np.full((40, 60, 3), i, dtype=np.uint8)).save(folder / f"{i}.png")
    document = {
        "images": [{"id": i, "file_name": f"{i}.png", "height": 40, "width": 60} for i in ids],
        "categories": [{"id": 1, "name": "thing"}],
        "annotations": [
            {"id": i, "image_id": i, "category_id": 1, "bbox": [i / 2, 5, 20, 10], "area": 200, "iscrowd": 0}
            for i in ids
        ],
    }
    (tmp_path / "a.json").write_text(json.dumps(document))
    return CocoIndex.load(tmp_path / "a.json", folder)


def rows(*items: tuple[Any, list[Any], Any]) -> list[dict[str, Any]]:
    return [{"image_id": i, "bbox": box, "score": score} for i, box, score in items]


GOOD = rows((10, [1, 2, 30, 10], 0.2), (30, [0, 0, 10, 10], 0.5), (10, [5, 5, 100, 10], 0.9), (10, [2, 2, 4, 4], 0.1))


def write(path: Path, content: list[dict[str, Any]]) -> Path:
    if path.suffix == ".json":
        path.write_text(json.dumps(content))
    else:
        columns = {key: np.array([row[key] for row in content]) for key in ("image_id", "bbox", "score")}
        np.savez(path, **columns)
    return path


@pytest.mark.parametrize("name", ["p.json", "p.npz"])
def test_best_first_clipped_and_by_image(name: str, index: CocoIndex, tmp_path: Path) -> None:
    found = read_proposals(write(tmp_path / name, GOOD), index, most=2)
    assert found.of(10).tolist() == [[5, 5, 60, 15], [1, 2, 31, 12]]
    assert found.of(30).tolist() == [[0, 0, 10, 10]]
    assert found.of(20).shape == (0, 4)
    assert found.of(10).dtype == np.float32


def test_what_is_left_out_is_said(index: CocoIndex, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    bad = rows((10, [80, 5, 10, 10], 0.9), (20, [5, 5, 0, 10], 0.9), (30, [5, 5, -3, 10], 0.9))
    with caplog.at_level(logging.WARNING):
        found = read_proposals(write(tmp_path / "p.json", GOOD + bad), index, 300)
    assert len(found.boxes) == 4
    assert "3 of 7 proposals have no area inside their image" in caplog.text
    assert "1 of 3 images have no proposal" in caplog.text


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ([], "holds no proposal at all"),
        (rows((10, [1, 2, 3, 4], 0.5), (11, [1, 2, 3, 4], 0.5)), "proposal 1: `image_id` 11 is no image of"),
        (rows((10, [100, 2, 3, 4], 0.5)), "none of its 1 proposals has an area"),
        (rows((10, [1, float("nan"), 3, 4], 0.5)), "finite|not valid JSON"),
        (rows((10, [1, 2, 3], 0.5)), "`bbox` is .*expected four numbers"),
        (rows((10, [1, 2, 3, 4], "high")), "`score` is .*expected a number"),
        ([{"image_id": 10, "bbox": [1, 2, 3, 4]}], "`score` is missing"),
        ({"annotations": []}, "expected a list"),
        ([3], "proposal 0 is 3, expected an object"),
    ],
)
def test_mistakes_in_json(content: Any, said: str, index: CocoIndex, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=said):
        read_proposals(write(tmp_path / "p.json", content), index, 300)


@pytest.mark.parametrize(
    ("columns", "said"),
    [
        ({"image_id": [10], "bbox": [[1, 2, 3, 4]]}, "has no array 'score'"),
        ({"image_id": [10.5], "bbox": [[1, 2, 3, 4]], "score": [1]}, "expected integers"),
        ({"image_id": [10], "bbox": [[1, 2, 3]], "score": [1]}, r"expected numbers of shape \(1, 4\)"),
        ({"image_id": [10], "bbox": [[1, np.nan, 3, 4]], "score": [1]}, "proposal 0: `bbox`"),
        ({"image_id": [10], "bbox": [[1, 2, 3, 4]], "score": [np.inf]}, "proposal 0: `score`"),
        ({"image_id": np.zeros(0, int), "bbox": np.zeros((0, 4)), "score": np.zeros(0)}, "holds no proposal at all"),
    ],
)
def test_mistakes_in_npz(columns: dict[str, Any], said: str, index: CocoIndex, tmp_path: Path) -> None:
    np.savez(tmp_path / "p.npz", **columns)
    with pytest.raises(DataError, match=said):
        read_proposals(tmp_path / "p.npz", index, 300)


def test_missing_and_damaged_files(index: CocoIndex, tmp_path: Path) -> None:
    for name in ("none.npz", "none.json"):
        with pytest.raises(DataError, match=r"no such file|cannot read"):
            read_proposals(tmp_path / name, index, 300)
    (tmp_path / "broken.npz").write_bytes(b"PK not a zip file")
    with pytest.raises(DataError, match=r"expected an \.npz file"):
        read_proposals(tmp_path / "broken.npz", index, 300)


def own_boxes(index: CocoIndex) -> CocoData:
    """Every image's proposals are its object's box."""
    order = np.argsort(index.image_ids)
    boxes = np.concatenate([index.boxes[index.rows(int(i))] for i in order])
    return CocoData(index, proposals=ProposalSet(index.image_ids[order], np.arange(4), boxes))


@pytest.mark.parametrize(
    "augment",
    [
        (),
        (Flip(horizontal=0.5, vertical=0.5),),
        (RandomScaleCrop(scale=(0.6, 1.6), visible=0.0, probability=1.0), Flip(horizontal=0.5)),
        (LargeScaleJitter(visible=0.0), Flip(horizontal=1.0)),
    ],
    ids=["none", "flip", "crop", "jitter"],
)
@pytest.mark.parametrize("defer", [False, True], ids=["workers", "device"])
def test_proposals_follow_the_image(augment: tuple[Step, ...], defer: bool, index: CocoIndex) -> None:
    """A proposal that is an object's box stays where the object's box is, whatever is done to the image."""
    from detector.data.later import finished

    loader = train_loader(
        own_boxes(index), augment=augment, resize=ShortEdge(short=64, long=200), batch_size=3, seed=1, start_step=0,
        stop_step=6, workers=0, pad_multiple=32, max_unreadable=0, defer=defer and len(augment) > 0,
    )  # fmt: skip
    seen = 0
    for batch in loader:
        objects = finished(batch).objects
        assert objects.proposals is not None
        for i in range(3):
            given = objects.proposals[i]
            given = given[(given[:, 2:] > given[:, :2]).all(1)]
            mine = objects.boxes[objects.image == i]
            if len(mine) == len(given):
                np.testing.assert_allclose(given.numpy(), mine.numpy(), atol=1e-3)
                seen += len(mine)
            else:  # the object was dropped as too thin; of the proposal a sliver may be left
                assert len(mine) < len(given)
    assert seen >= 9


def test_workers_send_them(index: CocoIndex) -> None:
    batches = [
        next(iter(eval_loader(own_boxes(index), resize=Fixed(size=(80, 120)), batch_size=3, workers=workers,
                              pad_multiple=32, max_unreadable=0)))
        for workers in (0, 1)
    ]  # fmt: skip
    one, other = (batch.objects.proposals for batch in batches)
    assert one is not None
    assert other is not None
    assert one.equal(other)
    assert batches[0].known.keys() == {"sizes", "proposals"}
    assert one[:, 0].equal(batches[0].objects.boxes)


@pytest.mark.parametrize(
    "step", [FromAlbumentations(name="HorizontalFlip", arguments={"p": 1.0}), Mosaic()], ids=["dual", "mosaic"]
)
def test_what_they_cannot_follow_is_refused(step: Step, index: CocoIndex) -> None:
    loader = train_loader(
        own_boxes(index), augment=(step,), resize=ShortEdge(short=64, long=200), batch_size=3, seed=1, start_step=0,
        stop_step=1, workers=0, pad_multiple=32, max_unreadable=0,
    )  # fmt: skip
    with pytest.raises(DataError, match="in a way that proposals cannot follow"):
        next(iter(loader))


def test_nothing_where_nothing_is_given(index: CocoIndex) -> None:
    sample = CocoData(index)[0]
    assert collate([sample], pad_multiple=1).known.keys() == {"sizes"}
