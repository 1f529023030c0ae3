"""From assignment to miss: what objects got from the rule, beside whether they were found."""

from __future__ import annotations

import json
from dataclasses import dataclass

import numpy as np

from detector.errors import DataError
from detector.evaluate.matches import Matches
from detector.evaluate.survey import POSITIVES, groups
from detector.evaluate.treatment import Treatment
from detector.evaluate.truth import Truth, lookup
from detector.lab.bootstrap import ap_of_some
from detector.lab.cell import ANNOTATIONS, MATCHES, TREATMENT
from detector.lab.grid import Cell
from detector.lab.record import found_at

QUALITIES = ("lowest quarter", "second", "third", "highest quarter")


@dataclass(frozen=True, eq=False)
class Seen:
    """The objects of one cell's split: how each was treated, and the score with which it was found at IoU 0.5."""

    treatment: Treatment
    annotation: np.ndarray  # (N,) int64 ids
    score: np.ndarray  # (N,) 0 where it was missed, NaN where the object is not known
    matches: Matches
    truth: Truth

    @classmethod
    def of(cls, cell: Cell, truth: Truth) -> Seen:
        """Raises DataError where a file of the cell is damaged."""
        matches, treatment = Matches.load(cell.folder / MATCHES), Treatment.load(cell.folder / TREATMENT)
        path = cell.folder / ANNOTATIONS
        try:
            annotation = np.array(json.loads(path.read_text(encoding="utf-8")), dtype=np.int64)
        except (OSError, ValueError, TypeError) as error:
            raise DataError(
                f"{path}: cannot read the objects' ids ({error}); delete the cell's result.json to have it worked out"
                " again"
            ) from None
        return cls(treatment, annotation, found_at(matches, truth, annotation), matches, truth)

    def recall_by_positives(self) -> dict[str, tuple[int, float, float]]:
        """{number of positives: (objects, recall at IoU 0.5, AP)}; groups without an object are left out."""
        return self._by(groups(self.treatment.positives, POSITIVES), list(POSITIVES))

    def recall_by_quality(self) -> dict[str, tuple[int, float, float]]:
        """The same by the mean IoU of the boxes that the positives predict; objects without any positive aside."""
        value = self.treatment.predicted_iou
        known = np.isfinite(value)
        if not known.any():
            return {}
        edges = np.quantile(value[known], [0.25, 0.5, 0.75])
        index = np.where(known, np.searchsorted(edges, np.nan_to_num(value), side="right"), -1)
        return self._by(index, list(QUALITIES))

    def _by(self, index: np.ndarray, names: list[str]) -> dict[str, tuple[int, float, float]]:
        found = {}
        for i, name in enumerate(names):
            mine = (index == i) & np.isfinite(self.score)
            if mine.any():
                found[name] = (int(mine.sum()), float((self.score[mine] > 0).mean()), self._ap(mine))
        return found

    def _ap(self, mine: np.ndarray) -> float:
        order = np.argsort(self.truth.ids)
        place, known = lookup(self.annotation[mine], self.truth.ids[order])
        wanted = np.zeros(len(self.truth), dtype=bool)
        wanted[order[place[known]]] = True
        wanted &= ~self.truth.crowd
        objects = np.zeros_like(self.matches.objects[0])
        np.add.at(objects, (self.truth.image[wanted], self.truth.category[wanted]), 1)
        return ap_of_some(self.matches, wanted, objects)


@dataclass(frozen=True)
class Miss:
    """An object that an arm misses."""

    annotation: int
    missed: float  # share of the arm's seeds
    elsewhere: float  # share of the other arms' runs that miss it, too
    positives: float  # mean over the arm's seeds
    area: float


def worst(arm: list[Seen], others: list[Seen], count: int) -> list[Miss]:
    """What this arm misses and others find comes first; of equals the larger object."""
    if not arm:
        return []
    annotation, area = arm[0].annotation, arm[0].treatment.area
    missed = np.mean([s.score == 0 for s in arm], axis=0)
    alike = [s for s in others if np.array_equal(s.annotation, annotation)]
    elsewhere = np.mean([s.score == 0 for s in alike], axis=0) if alike else np.zeros(len(annotation))
    positives = np.mean([s.treatment.positives for s in arm], axis=0)
    order = np.lexsort((-area, -(missed - elsewhere)))
    chosen = [i for i in order.tolist() if missed[i] >= 0.5 and annotation[i] >= 0][:count]
    return [
        Miss(int(annotation[i]), float(missed[i]), float(elsewhere[i]), float(positives[i]), float(area[i]))
        for i in chosen
    ]
