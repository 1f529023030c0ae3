"""Numbers from matches: those of the evaluator, whatever the weights of the images."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest

from detector.errors import DataError
from detector.evaluate.coco import CocoEvaluator
from detector.evaluate.engines import Found
from detector.evaluate.matches import Matches, match
from detector.evaluate.truth import Truth
from detector.lab.bootstrap import KINDS, ap_of_some, draw, resampled
from tests.lab.make import detections, document


def numbers(doc: dict, found: Found, engine: str = "pycocotools") -> dict[str, float]:  # type: ignore[type-arg]
    evaluator = CocoEvaluator(doc, engine=engine)  # type: ignore[arg-type]
    evaluator._parts.append(found)
    return evaluator.result().numbers


@pytest.mark.parametrize("seed", range(4))
def test_all_weights_one_is_the_evaluators_answer(seed: int) -> None:
    rng = np.random.default_rng(seed)
    doc = document(20, rng)
    truth = Truth.load(doc)
    found = detections(truth, rng)
    matches = match(truth, found)
    expected = numbers(doc, found)
    for metric in KINDS:
        value = resampled(matches, metric, np.ones((2, 20)))
        assert value[0] == value[1] == pytest.approx(expected[metric], abs=1e-12)


def test_weights_are_copies_of_images() -> None:
    """Against an evaluation in which the drawn images are really there as often as they were drawn."""
    rng = np.random.default_rng(5)
    doc = document(12, rng)
    truth = Truth.load(doc)
    found = detections(truth, rng)
    # Copies of an image lie side by side, so of equal scores those of one image still come together.
    found = Found(found.image, found.category, found.scores + np.arange(len(found)) * 1e-7, found.boxes)
    matches = match(truth, found)
    weights = draw(12, 5, seed=1)
    assert weights.sum(1).tolist() == [12] * 5
    for row in weights:
        copied, parts = copy.deepcopy(doc), []
        copied["images"], copied["annotations"] = [], []
        for i, count in enumerate(row.astype(int)):
            for _ in range(count):
                new = len(copied["images"]) + 1
                copied["images"].append({**doc["images"][i], "id": new})
                for a in doc["annotations"]:
                    if a["image_id"] == i + 1:
                        copied["annotations"].append({**a, "image_id": new, "id": len(copied["annotations"]) + 1})
                mine = found.image == i
                parts.append(
                    (np.full(mine.sum(), new - 1), found.category[mine], found.scores[mine], found.boxes[mine])
                )
        drawn = Found(*(np.concatenate(x) for x in zip(*parts, strict=True)))
        expected = numbers(copied, drawn)
        for metric in KINDS:
            value = resampled(matches, metric, row[None])[0]
            assert (-1 if np.isnan(value) else value) == pytest.approx(expected[metric], abs=1e-9), metric


def test_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(2)
    truth = Truth.load(document(10, rng))
    matches, weights = match(truth, detections(truth, rng)), draw(10, 30, seed=0)
    whole = resampled(matches, "AP", weights)
    monkeypatch.setattr("detector.lab.bootstrap.AT_ONCE", 100)
    assert np.array_equal(whole, resampled(matches, "AP", weights))


def test_ap_of_some_objects() -> None:
    rng = np.random.default_rng(3)
    doc = document(15, rng, crowds=False)
    truth = Truth.load(doc)
    matches = match(truth, detections(truth, rng))
    everything = np.ones(len(truth), dtype=bool)
    expected = resampled(matches, "AP", np.ones((1, 15)))[0]
    assert ap_of_some(matches, everything, matches.objects[0]) == pytest.approx(expected, abs=1e-12)
    assert np.isnan(ap_of_some(matches, ~everything, np.zeros_like(matches.objects[0])))
    # What was found at IoU 0.75 is the easier part.
    easy = matches.found_score(len(truth), 5) > 0
    objects = np.zeros_like(matches.objects[0])
    np.add.at(objects, (truth.image[easy], truth.category[easy]), 1)
    assert ap_of_some(matches, easy, objects) > expected


def test_nothing_found_and_nothing_to_find(tmp_path: Path) -> None:
    none = np.zeros(0, dtype=np.int64)
    empty = Found(none, none, np.zeros(0), np.zeros((0, 4)))
    truth = Truth.load(document(4, np.random.default_rng(0)))
    assert resampled(match(truth, empty), "AP", np.ones((1, 4)))[0] == 0
    doc = document(4, np.random.default_rng(0))
    doc["annotations"] = []
    assert np.isnan(resampled(match(Truth.load(doc), empty), "AP", np.ones((1, 4)))[0])


def test_files(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    truth = Truth.load(document(9, rng))
    matches = match(truth, detections(truth, rng))
    matches.save(tmp_path / "m.npz")
    again = Matches.load(tmp_path / "m.npz")
    for name in Matches.__dataclass_fields__:
        assert np.array_equal(getattr(matches, name), getattr(again, name)), name
    (tmp_path / "m.npz").write_bytes((tmp_path / "m.npz").read_bytes()[:200])
    with pytest.raises(DataError, match=r"m\.npz: cannot read"):
        Matches.load(tmp_path / "m.npz")
