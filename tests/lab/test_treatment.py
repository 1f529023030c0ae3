"""What a rule does to each object: worked examples, and a plain loop over pairs."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from detector.assign import Atss, Fcos, MaxIou
from detector.assign.base import Assigner
from detector.boxes import all_pairs_iou
from detector.errors import DataError
from detector.evaluate.survey import POSITIVES, SIZES, groups, survey
from detector.evaluate.treatment import Treatment, agreement, concatenate, flip_rate, treat
from detector.lab.logged import flips
from detector.structures import Assignment, Objects, Predictions
from detector.train.folder import RunFiles
from tests.assign.make import NINE_ANCHORS, batch, pyramid, random_boxes

PRIORS = pyramid((128, 160), shapes=NINE_ANCHORS)


def plain(assignment: Assignment, objects: Objects, predictions: Predictions) -> list[dict[str, float]]:
    """One object and one pair after the other."""
    rows = []
    count = len(PRIORS)
    columns = (assignment.prior, assignment.object, assignment.weight, assignment.quality)
    pairs = [(int(p), int(o), w, q) for p, o, w, q in zip(*(c.tolist() for c in columns), strict=True) if w > 0]
    for o in range(len(objects)):
        mine = [(p, w, q) for p, owner, w, q in pairs if owner == o]
        iou = all_pairs_iou(objects.boxes[o : o + 1], PRIORS.boxes)[0]
        own = {p % count for p, _, _ in mine}
        weights = [w * q for _, w, q in mine]
        alike = [k for k in range(len(objects)) if objects.image[k] == objects.image[o]]

        def holders(p: int, alike: list[int] = alike) -> int:
            x, y = PRIORS.centers[p % count].tolist()
            return sum(bool(b[0] <= x < b[2] and b[1] <= y < b[3]) for b in objects.boxes[alike].tolist())

        predicted = [
            float(all_pairs_iou(predictions.boxes.view(-1, 4)[p][None], objects.boxes[o][None])) for p, _, _ in mine
        ]
        rows.append({
            "positives": len(mine),
            "weight": sum(w for _, w, _ in mine),
            "quality": sum(weights) / sum(w for _, w, _ in mine) if mine else math.nan,
            "iou": float(np.mean([float(iou[p % count]) for p, _, _ in mine])) if mine else math.nan,
            "predicted_iou": float(np.mean(predicted)) if mine else math.nan,
            "best_unassigned": max(float(v) for p, v in enumerate(iou) if p not in own),
            "contested": sum(holders(p) > 1 for p, _, _ in mine),
            "shared": sum(sum(p == other for other, _, _, _ in pairs) > 1 for p, _, _ in mine),
            "entropy": -sum(w / sum(weights) * math.log(w / sum(weights)) for w in weights) if mine else math.nan,
        })  # fmt: skip
    return rows


def soft(rule: Assigner, objects: Objects) -> Assignment:
    """A rule's pairs with weights and qualities that differ, one pair more that shares its prior, and padding."""
    found = rule(PRIORS, objects)
    random = torch.Generator().manual_seed(0)
    weight = found.weight * (0.1 + torch.rand(len(found.weight), generator=random))
    quality = found.quality * (0.1 + torch.rand(len(found.weight), generator=random))
    kept = weight.nonzero().squeeze(1)[:1]
    other = (found.object[kept] + 1) % int((objects.image == 0).sum())
    return Assignment(
        num_priors=found.num_priors,
        prior=torch.cat([found.prior, found.prior[kept]]),
        object=torch.cat([found.object, other]),
        quality=torch.cat([quality, quality[kept]]),
        weight=torch.cat([weight, weight[kept]]),
        ignored=found.ignored,
    )


@pytest.mark.parametrize("rule", [Atss(), Fcos(), MaxIou(low_quality="none")], ids=lambda r: r.type)
def test_against_a_plain_loop(rule: Assigner, monkeypatch: pytest.MonkeyPatch) -> None:
    objects = batch(random_boxes(6, (128, 160), 1), [], random_boxes(5, (128, 160), 2))
    assignment = soft(rule, objects)
    boxes = PRIORS.boxes + torch.randn(3, len(PRIORS), 4, generator=torch.Generator().manual_seed(1))
    boxes[..., 2:] = torch.maximum(boxes[..., :2], boxes[..., 2:])
    predictions = Predictions(torch.zeros(3, len(PRIORS), 3), boxes)
    whole = treat(PRIORS, objects, assignment, predictions)
    for i, row in enumerate(plain(assignment, objects, predictions)):
        for name, value in row.items():
            assert float(getattr(whole, name)[i]) == pytest.approx(value, abs=1e-4, nan_ok=True), (i, name)
    assert whole.levels.sum(1).tolist() == whole.positives.tolist()
    monkeypatch.setattr("detector.assign.base.PAIRS_AT_ONCE", 2 * len(PRIORS))  # in chunks: the same
    again = treat(PRIORS, objects, assignment, predictions)
    assert all(
        np.array_equal(getattr(whole, n), getattr(again, n), equal_nan=True) for n in Treatment.__dataclass_fields__
    )


def test_no_object() -> None:
    objects = batch([], [])
    treated = treat(PRIORS, objects, Atss()(PRIORS, objects), None)
    assert len(treated) == 0
    assert survey(treated, ["a"])["all"] == {}


def test_survey_by_hand() -> None:
    objects = batch([[0.0, 0, 20, 20], [0, 0, 120, 30]], [[40, 40, 42, 42]])
    treated = treat(PRIORS, objects, MaxIou(low_quality="none")(PRIORS, objects), None)
    treated = concatenate([treated, treated])
    found = survey(treated, ["x", "y", "z"])
    assert found["all"]["all"]["objects"] == 6
    assert found["all"]["all"]["positives_per_object"] == pytest.approx(treated.positives.mean())
    assert found["all"]["all"]["without_positive"] == pytest.approx((treated.positives == 0).mean())
    assert set(found["size"]) == {"below 16", "16 to 32", "32 to 64"}
    assert found["size"]["below 16"]["without_positive"] == 1
    assert set(found["aspect"]) == {"below 1.5", "3 to 6"}
    assert {name: n["objects"] for name, n in found["class"].items()} == {"x": 4, "y": 2}
    assert sum(level["share_of_positives"] for level in found["level"].values()) == pytest.approx(1)
    assert groups(np.array([0, 1, 2, 3, 4, 17]), POSITIVES).tolist() == [0, 1, 2, 2, 3, 5]
    assert groups(np.array([15.9, 16, 1e6]), SIZES).tolist() == [0, 1, 4]


def test_agreement() -> None:
    objects = batch(random_boxes(6, (128, 160), 1))
    one, other = Atss()(PRIORS, objects), Fcos()(PRIORS, objects)
    assert agreement(one, one) == 1
    a, b = one.per_prior(), other.per_prior()
    both = int(((a == b) & (a >= 0)).sum())
    either = int((a >= 0).sum()) + int((b >= 0).sum()) - both
    assert agreement(one, other) == agreement(other, one) == pytest.approx(both / either)
    none = batch([])
    assert agreement(Atss()(PRIORS, none), Fcos()(PRIORS, none)) == 1


def test_flips(tmp_path: Path) -> None:
    files = RunFiles(tmp_path)
    files.assignments.mkdir()
    notes = [([1, 2, 3], [0, 0, 1]), ([1, 2, 4], [0, 0, 1]), ([1, 2, 4], [0, 0, 1])]
    for step, (prior, owner) in enumerate(notes):
        np.savez(files.assignments / f"step-{step:06}.npz", **{"dense/prior": prior, "dense/object": owner})
    assert flips(files) == [(1, 0.5), (2, 0.0)]
    empty = {"dense/prior": np.zeros(0), "dense/object": np.zeros(0)}
    assert flip_rate(empty, empty, "dense") == 0
    (files.assignments / "step-000001.npz").write_bytes(b"broken")
    with pytest.raises(DataError, match=r"step-000001\.npz"):
        flips(files)


def test_files(tmp_path: Path) -> None:
    objects = batch(random_boxes(4, (128, 160), 3))
    treated = treat(PRIORS, objects, Atss()(PRIORS, objects), None)
    treated.save(tmp_path / "t.npz")
    again = Treatment.load(tmp_path / "t.npz")
    assert all(
        np.array_equal(getattr(again, n), getattr(treated, n), equal_nan=True) for n in Treatment.__dataclass_fields__
    )
    (tmp_path / "t.npz").write_bytes(b"PK")
    with pytest.raises(DataError, match=r"t\.npz"):
        Treatment.load(tmp_path / "t.npz")


def test_every_object_once(done: object) -> None:
    """The records of a real cell: an object's annotation, its treatment and whether it was found belong together."""
    from detector.evaluate.truth import Truth
    from detector.lab.grid import cells
    from detector.lab.misses import Seen, worst
    from detector.lab.study import load_study
    from tests.lab.conftest import Place

    assert isinstance(done, Place)
    found: dict[str, list[Seen]] = {}
    for cell in cells(load_study(done.study), done.out):
        annotations, _ = cell.config.data.files("val")
        truth = Truth.load(annotations)
        seen = Seen.of(cell, truth)
        found.setdefault(cell.arm, []).append(seen)
        row = {int(i): k for k, i in enumerate(truth.ids)}
        assert len(set(seen.annotation.tolist())) == len(seen.treatment) == int((~truth.crowd).sum())
        for i, annotation in enumerate(seen.annotation.tolist()):  # 64 x 64 images are not resized
            x, y, w, h = truth.boxes[row[annotation]]
            assert seen.treatment.boxes[i] == pytest.approx([x, y, x + w, y + h], abs=0.01)
            assert seen.treatment.label[i] == truth.category[row[annotation]]
        hit = {int(o) for o in seen.matches.object[0] if o >= 0}
        assert set(np.flatnonzero(seen.score > 0).tolist()) == {
            i for i, a in enumerate(seen.annotation.tolist()) if row[a] in hit
        }  # fmt: skip
        groups_found = seen.recall_by_positives()
        assert sum(n for n, _, _ in groups_found.values()) == len(seen.treatment)
        total = sum(n * recall for n, recall, _ in groups_found.values())
        assert total == pytest.approx((seen.score > 0).sum())
    missed = worst(found["one"], found["two"], 3)
    assert missed == sorted(missed, key=lambda m: -(m.missed - m.elsewhere))
    assert all(m.missed >= 0.5 for m in missed)
