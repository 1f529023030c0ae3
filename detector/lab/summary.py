"""What a study found so far: means and spreads of every arm, differences to the baseline, and verdicts.

Counts finished cells of the study's own grid, each once; what is missing is named.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from detector.evaluate.matches import Matches
from detector.lab.bootstrap import draw, resampled
from detector.lab.cell import MATCHES
from detector.lab.grid import Cell, Difference
from detector.lab.standing import Standing
from detector.lab.study import StudyConfig
from detector.lab.verdict import Comparison, Estimate, judge

SHOWN = ("AP", "AP50", "AP75", "AP_small", "AP_medium", "AP_large", "AR_100")
NAMED = 8  # cells that are not finished and of which there is nothing else to say


@dataclass(frozen=True)
class Spread:
    """Of some numbers: NaN deviation for a single one."""

    mean: float
    deviation: float
    count: int

    @classmethod
    def of(cls, values: Sequence[float | None]) -> Spread:
        known = [v for v in values if v is not None and math.isfinite(v)]
        if not known:
            return cls(math.nan, math.nan, 0)
        return cls(float(np.mean(known)), float(np.std(known, ddof=1)) if len(known) > 1 else math.nan, len(known))


@dataclass(frozen=True)
class ArmRow:
    """One arm on one data set, over its finished seeds."""

    dataset: str
    arm: str
    seeds: tuple[int, ...]
    missing: tuple[int, ...]  # seeds whose cell is not finished
    scores: dict[str, Spread]  # of `SHOWN`
    step_ms: Spread
    memory_mb: Spread
    comparisons: dict[str, Comparison]  # of the study's metrics; empty for the baseline and without a common seed
    is_baseline: bool
    paired: bool = False  # whether it has a seed in common with the baseline, from which it is another arm


@dataclass(frozen=True)
class Summary:
    """All that the tables and the report say."""

    study: StudyConfig
    rows: tuple[ArmRow, ...]
    standings: tuple[Standing, ...]
    differences: tuple[Difference, ...]

    @property
    def finished(self) -> list[Standing]:
        return [s for s in self.standings if s.state == "finished"]

    @property
    def unfinished(self) -> list[Standing]:
        return [s for s in self.standings if s.state != "finished"]

    def notes(self) -> list[str]:
        """A sentence for whatever makes a number mean less than it seems to."""
        study, notes = self.study, []
        if self.unfinished:
            notes.append(f"{len(self.unfinished)} of {len(self.standings)} cells are not finished and count nowhere")
        notes += [f"{s.cell.name}: {s.state}: {s.reason}" for s in self.unfinished if s.reason]
        quiet = [s for s in self.unfinished if not s.reason]
        for state in sorted({s.state for s in quiet}):
            names = [s.cell.name for s in quiet if s.state == state]
            more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
            notes.append(f"{state}: {', '.join(names[:NAMED])}{more}")
        unannounced = [d for d in self.differences if not d.announced]
        if unannounced:
            arms = sorted({d.arm for d in unannounced})
            notes.append(f"{', '.join(arms)}: differ from {study.reference} in more than they say:")
            notes += [f"  {d}" for d in unannounced]
        for metric in study.metrics:
            without = [f"{r.arm} on {r.dataset}" for r in self.rows if r.paired and metric not in r.comparisons]
            if without:
                more = f" and {len(without) - NAMED} more" if len(without) > NAMED else ""
                notes.append(
                    f"{metric}: nothing of the kind to be found, not compared: {', '.join(without[:NAMED])}{more}"
                )
        if len(study.seeds) < 2 and len(study.arms) > 1:
            notes.append("one seed tells nothing about chance: every arm is `not distinguishable`; give several")
        if study.checkpoint == "best":
            notes.append("checkpoint: best: the weights were chosen on the images that they are scored on")
        return notes


def summarise(study: StudyConfig, standings: Sequence[Standing], differences: Sequence[Difference]) -> Summary:
    """Reads the matches of all finished cells.

    Raises:
        DataError: a cell's file is damaged.
    """
    done = {(s.cell.dataset, s.cell.arm, s.cell.seed): s for s in standings if s.state == "finished"}
    comparisons = _compare(study, {key: s.cell for key, s in done.items()})
    rows = []
    for dataset in study.datasets:
        for arm in study.arms:
            seeds = tuple(seed for seed in study.seeds if (dataset, arm, seed) in done)
            results = [r for seed in seeds if (r := done[dataset, arm, seed].result) is not None]
            rows.append(
                ArmRow(
                    dataset=dataset,
                    arm=arm,
                    seeds=seeds,
                    missing=tuple(seed for seed in study.seeds if seed not in seeds),
                    scores={name: Spread.of([_defined(r["numbers"].get(name)) for r in results]) for name in SHOWN},
                    step_ms=Spread.of([_times(1000, r["seconds_per_step"]) for r in results]),
                    memory_mb=Spread.of([r["memory_mb"] for r in results]),
                    comparisons=comparisons.get((dataset, arm), {}),
                    is_baseline=arm == study.reference,
                    paired=arm != study.reference and any((dataset, study.reference, s) in done for s in seeds),
                )
            )
    return Summary(study, tuple(rows), tuple(standings), tuple(differences))


def _compare(
    study: StudyConfig, done: dict[tuple[str, str, int], Cell]
) -> dict[tuple[str, str], dict[str, Comparison]]:
    found: dict[tuple[str, str], dict[str, Comparison]] = {}
    estimates: dict[str, dict[tuple[str, str], Estimate]] = {metric: {} for metric in study.metrics}
    for dataset in study.datasets:
        scores: dict[tuple[str, str, int], np.ndarray] = {}
        weights: np.ndarray | None = None
        for (where, arm, seed), cell in done.items():
            if where != dataset:
                continue
            matches = Matches.load(cell.folder / MATCHES)
            if weights is None:
                images = matches.objects.shape[1]
                # The images themselves come first, then the resamples, the same for every cell.
                weights = np.concatenate([np.ones((1, images)), draw(images, study.resamples, seed=0)])
            for metric in study.metrics:
                scores[arm, metric, seed] = resampled(matches, metric, weights)
        for arm in study.arms:
            seeds = [s for s in study.seeds if (dataset, arm, s) in done and (dataset, study.reference, s) in done]
            if arm == study.reference or not seeds or weights is None:
                continue
            for metric in study.metrics:
                mine = np.stack([scores[arm, metric, s] for s in seeds])
                base = np.stack([scores[study.reference, metric, s] for s in seeds])
                if np.isfinite(mine[:, 0]).all() and np.isfinite(base[:, 0]).all():
                    estimates[metric][dataset, arm] = Estimate.paired(
                        mine[:, 0], base[:, 0], mine[:, 1:], base[:, 1:], weights.shape[1]
                    )
    for name, family in estimates.items():
        for key, comparison in zip(family, judge(list(family.values())), strict=True):
            found.setdefault(key, {})[name] = comparison
    return found


def _defined(value: float | None) -> float | None:
    """COCO's -1 stands for nothing to be found."""
    return None if value is None or value < 0 else value


def _times(factor: float, value: float | None) -> float | None:
    return None if value is None else factor * value
