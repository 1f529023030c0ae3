"""A study as one page: opens from the disk, needs no network, fits a phone, prints."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment

from detector.evaluate.survey import POSITIVES, SIZES
from detector.lab import gallery, plots
from detector.lab.grid import Cell
from detector.lab.logged import curve
from detector.lab.misses import QUALITIES, Seen
from detector.lab.summary import Spread, Summary
from detector.lab.tables import Table, scores_table, verdict_table
from detector.train.folder import RunFiles

TEMPLATE = Path(__file__).with_name("report.html")
MOST_CLASSES = 12
PROFILE_FROM = 3  # data sets
OUTLINES = 6  # more arms than these are a tangle


@dataclass(frozen=True)
class Plot:
    svg: str
    caption: str


def report(summary: Summary) -> str:
    """The page.

    Raises:
        DataError: a cell's file is damaged, or the annotations are gone.
    """
    study = summary.study
    cells = [s.cell for s in summary.finished]
    by_dataset = {d: [c for c in cells if c.dataset == d] for d in study.datasets}
    scenes, misses, notes = [], {}, summary.notes()
    miss_plots: list[Plot] = []
    for dataset, mine in by_dataset.items():
        prefix = f"{dataset}: " if len(by_dataset) > 1 else ""
        seen = gallery.seen(mine, study.split)
        miss_plots += _miss_plots(seen, list(study.arms), prefix)
        for arm, pictures in gallery.misses(study, mine, seen).items():
            misses[f"{prefix}{arm}"] = pictures
        found, missing = gallery.scenes(study, mine, dataset)
        scenes += found
        notes += missing
    template = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True).from_string(
        TEMPLATE.read_text(encoding="utf-8")
    )
    return template.render(
        study=study,
        arms=list(study.arms),
        cells=len(summary.standings),
        finished=len(summary.finished),
        notes=notes,
        scores=scores_table(summary),
        verdicts=verdict_table(summary),
        verdict_plots=_verdict_plots(summary),
        score_plots=_score_plots(summary),
        profile=_profile(summary),
        curves=[p for d, mine in by_dataset.items() for p in _curves(summary, mine, d)],
        statistics=_statistics(summary),
        statistics_plots=[p for d in by_dataset for p in _statistics_plots(summary, d)],
        agreement=_agreement(by_dataset),
        miss_plots=miss_plots,
        scenes=scenes,
        misses=misses,
        differences=_differences(summary),
    )


def small_pictures(summary: Summary) -> dict[str, str]:
    """File name -> SVG of what the study comes to: the profile over data sets, or the first metric's differences."""
    profile = _profile(summary)
    if profile:
        return {"profile.svg": profile[0].svg}
    differences = _verdict_plots(summary)
    return {"differences.svg": differences[0].svg} if differences else {}


def _verdict_plots(summary: Summary) -> list[Plot]:
    found = []
    for metric in summary.study.metrics:
        several = len(summary.study.datasets) > 1
        rows = [(f"{r.dataset}: {r.arm}" if several else r.arm, r.comparisons[metric])
                for r in summary.rows if metric in r.comparisons]  # fmt: skip
        if rows:
            svg = plots.differences(rows, metric, summary.study.reference)
            found.append(Plot(svg, f"{metric}: differences with their intervals of 95 %."))
    return found


def _score_plots(summary: Summary) -> list[Plot]:
    found = []
    for dataset in summary.study.datasets:
        rows = [r for r in summary.rows if r.dataset == dataset and r.seeds]
        where = f" on {dataset}" if len(summary.study.datasets) > 1 else ""
        sizes = {size: {r.arm: r.scores[f"AP_{size}"] for r in rows if r.scores[f"AP_{size}"].count}
                 for size in ("small", "medium", "large")}  # fmt: skip
        sizes = {size: values for size, values in sizes.items() if values}
        if sizes:
            found.append(
                Plot(
                    plots.bars(sizes, list(summary.study.arms), "AP, points of 100", 100),
                    f"AP by size of object{where}.",
                )
            )
        classes = _by_class(summary, dataset)
        if classes:
            note = f", the {MOST_CLASSES} most frequent" if len(classes) == MOST_CLASSES else ""
            found.append(
                Plot(
                    plots.bars(classes, list(summary.study.arms), "AP, points of 100", 100),
                    f"AP by class{note}{where}.",
                )
            )
    return found


def _by_class(summary: Summary, dataset: str) -> dict[str, dict[str, Spread]]:
    values: dict[str, dict[str, list[float]]] = {}
    objects: dict[str, int] = {}
    for s in summary.finished:
        if s.cell.dataset == dataset and s.result is not None:
            for name, numbers in s.result["per_class"].items():
                if numbers["objects"]:
                    values.setdefault(name, {}).setdefault(s.cell.arm, []).append(numbers["AP"])
                    objects[name] = numbers["objects"]
    most = sorted(values, key=lambda name: -objects[name])[:MOST_CLASSES]
    return {name: {arm: Spread.of(v) for arm, v in values[name].items()} for name in most}


def _profile(summary: Summary) -> list[Plot]:
    metric = summary.study.metrics[0]
    groups = {d: {r.arm: r.scores[metric] for r in summary.rows if r.dataset == d and r.seeds and metric in r.scores}
              for d in summary.study.datasets}  # fmt: skip
    groups = {d: values for d, values in groups.items() if values}
    if len(groups) < PROFILE_FROM:
        return []
    arms = [a for a in summary.study.arms if any(a in values for values in groups.values())]
    drawn = plots.radar(groups, arms) if len(arms) <= OUTLINES else plots.heat(groups, arms)
    return [
        Plot(drawn, f"Profile: mean {metric} on each data set, points of 100."),
        Plot(
            plots.bars(groups, list(summary.study.arms), f"{metric}, points of 100", 100),
            "The same with the deviation over seeds.",
        ),
    ]


def _curves(summary: Summary, cells: Sequence[Cell], dataset: str) -> list[Plot]:
    where = f" on {dataset}" if len(summary.study.datasets) > 1 else ""
    band = ", mean over seeds in a band of one standard deviation."
    found = []

    def add(label: str, caption: str, read: Callable[[Cell], list[tuple[float, float]]], log: bool = False) -> None:
        curves = {arm: [read(c) for c in cells if c.arm == arm] for arm in summary.study.arms}
        if any(len(seed) > 1 for seeds in curves.values() for seed in seeds):
            found.append(Plot(plots.bands(curves, label, log), f"{caption}{where}{band}"))

    add("training loss", "Training loss", lambda c: curve(RunFiles(c.run), "loss", "train"), log=True)
    add("AP (val)", "AP", lambda c: curve(RunFiles(c.run), "AP", "val"))
    add("positives an object", "Positives an object while training",
        lambda c: _positives(RunFiles(c.run)))  # fmt: skip
    results = {s.cell: s.result for s in summary.finished}

    def flips(cell: Cell) -> list[tuple[float, float]]:
        result = results[cell]
        rows = curve(RunFiles(cell.run), "loss", "train")
        if result is None or not rows:
            return []
        per_step = rows[-1][0] / result["step"]
        return [(round(step * per_step, 3), share) for step, share in result["flips"]]

    add("share of pairs", "Flip rate: pairs that changed since the epoch before", flips)
    return found


def _positives(files: RunFiles) -> list[tuple[float, float]]:
    """Of the criterion's first assignment, whatever its name."""
    rows = [row for row in files.rows() if row["kind"] == "train"]
    keys = [key for row in rows[:1] for key in row if key.endswith("positives_per_object/all")]
    return curve(files, keys[0], "train") if keys else []


_COLUMNS = {
    "positives_per_object": "positives/object", "without_positive": "without any", "contested": "contested",
    "shared": "shared", "quality": "quality", "iou_of_positives": "IoU of positives",
    "predicted_iou": "predicted IoU", "best_unassigned_iou": "best unassigned IoU", "entropy": "entropy",
}  # fmt: skip


def _mean(summary: Summary, dataset: str, arm: str, kind: str, group: str, key: str) -> Spread:
    results = [s.result for s in summary.finished if s.cell.dataset == dataset and s.cell.arm == arm]
    return Spread.of([r["assignment"][kind].get(group, {}).get(key) for r in results if r is not None])


def _statistics(summary: Summary) -> Table:
    several = len(summary.study.datasets) > 1
    rows = []
    for r in summary.rows:
        if not r.seeds:
            continue
        cells = [*((r.dataset,) if several else ()), r.arm]
        for key in _COLUMNS:
            value = _mean(summary, r.dataset, r.arm, "all", "all", key)
            cells.append(f"{value.mean:.3f}" if value.count else "–")
        results = [s.result for s in summary.finished if s.cell.dataset == r.dataset and s.cell.arm == r.arm]
        late = [share for x in results if x is not None for _, share in x["flips"][len(x["flips"]) // 2 :]]
        cells.append(f"{Spread.of(late).mean:.3f}" if late else "–")
        rows.append(tuple(cells))
    return Table(
        "Means over objects, then over seeds",
        (*(("data",) if several else ()), "arm", *_COLUMNS.values(), "flips"),
        tuple(rows),
    )


def _statistics_plots(summary: Summary, dataset: str) -> list[Plot]:
    where = f", on {dataset}" if len(summary.study.datasets) > 1 else ""
    found = []
    for kind, names, what in (
        ("size", list(SIZES), "side of a square of equal area in pixels"),
        ("aspect", None, "longer side over shorter side"),
        ("class", None, "class"),
        ("level", None, "pyramid level, fine to coarse"),
    ):
        key = "share_of_positives" if kind == "level" else "positives_per_object"
        known = dict.fromkeys(g for s in summary.finished if s.cell.dataset == dataset and s.result is not None
                              for g in s.result["assignment"][kind])  # fmt: skip
        order = [n for n in names if n in known] if names else list(known)[:MOST_CLASSES]
        groups = {
            g: {a: v for a in summary.study.arms if (v := _mean(summary, dataset, a, kind, g, key)).count}
            for g in order
        }
        if groups and (kind in ("size", "level") or len(groups) > 1):
            label = "share of positives" if kind == "level" else "positives an object"
            found.append(
                Plot(plots.bars(groups, list(summary.study.arms), label), f"{label.capitalize()} by {what}{where}.")
            )
    return found


def _agreement(by_dataset: dict[str, list[Cell]]) -> Table:
    rows = []
    for dataset, cells in by_dataset.items():
        for (a, b), value in gallery.agreements(cells).items():
            rows.append((dataset, f"{a} and {b}", f"{value:.1%}"))
    return Table("Agreement: pairs that both rules make, of those that either makes, at the end of training",
                 ("data", "arm", "agreement"), tuple(rows))  # fmt: skip


def _miss_plots(seen: dict[str, list[Seen]], arms: Sequence[str], prefix: str) -> list[Plot]:
    found = []
    for what, read in (
        ("positives", Seen.recall_by_positives),
        ("the mean IoU of the boxes that the positives predict", Seen.recall_by_quality),
    ):
        tables = {arm: [read(s) for s in each] for arm, each in seen.items()}
        names = [n for t in tables.values() for x in t for n in x]
        order = [n for n in (*POSITIVES, *QUALITIES) if n in names]
        for column, label in ((1, "recall at IoU 0.5"), (2, "AP, points of 100")):
            groups = {n: {arm: Spread.of([x[n][column] for x in each if n in x]) for arm, each in tables.items()
                          if any(n in x for x in each)} for n in order}  # fmt: skip
            if groups:
                factor = 100.0 if column == 2 else 1.0
                short = "AP" if column == 2 else "Recall"
                found.append(Plot(plots.bars(groups, arms, label, factor), f"{prefix}{short} by {what}."))
    return found


def _differences(summary: Summary) -> Table:
    rows = [(d.arm, d.key, _text(d.baseline), _text(d.value), "yes" if d.announced else "no")
            for d in summary.differences]  # fmt: skip
    return Table(
        "Keys whose resolved value is not the baseline's",
        ("arm", "key", summary.study.reference, "the arm's", "the study says so"),
        tuple(rows),
    )


def _text(value: Any) -> str:
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "–"
    text = str(value)
    return text if len(text) < 60 else text[:57] + "..."
