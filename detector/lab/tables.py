"""A study's summary as tables: terminal, Markdown, CSV, JSON, LaTeX."""

from __future__ import annotations

import csv
import io
import json
import math
from dataclasses import asdict, dataclass, fields
from typing import Any

from rich.cells import cell_len
from rich.console import Console
from rich.markup import escape
from rich.table import Table as RichTable

from detector.lab.study import SHORT
from detector.lab.summary import SHOWN, Spread, Summary
from detector.lab.verdict import Comparison

NAMES = ("data", "arm", "metric")  # columns that say what a row is about


@dataclass(frozen=True)
class Table:
    """Texts in columns."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


def scores_table(summary: Summary) -> Table:
    """Mean and standard deviation over seeds, in percent of AP; time a step and peak memory."""
    several = len(summary.study.datasets) > 1
    head = (*(("data",) if several else ()), "arm", "seeds", *(SHORT.get(n, n) for n in SHOWN), "ms/step", "MB")
    rows = []
    for row in summary.rows:
        cells = [f"{row.arm} (baseline)" if row.is_baseline else row.arm]
        cells.append(f"{len(row.seeds)}/{len(row.seeds) + len(row.missing)}")
        cells += [spread(row.scores[name], 100, 1) for name in SHOWN]
        cells += [spread(row.step_ms, 1, 0), spread(row.memory_mb, 1, 0)]
        rows.append((*((row.dataset,) if several else ()), *cells))
    return Table("Scores: mean ± standard deviation over seeds, in points of 100", head, tuple(rows))


def verdict_table(summary: Summary) -> Table:
    """Difference to the baseline for every metric of the study."""
    several = len(summary.study.datasets) > 1
    head = (*(("data",) if several else ()), "arm", "metric", "difference", "95 % interval", "p (Holm)", "verdict",
            "smallest seen", "seeds to settle")  # fmt: skip
    rows = []
    for row in summary.rows:
        for metric, c in row.comparisons.items():
            cells = (row.arm, SHORT.get(metric, metric), points(c.difference), interval(c), chance(c.corrected_p),
                     c.verdict, points(c.smallest, sign=False), settle(c))  # fmt: skip
            rows.append((*((row.dataset,) if several else ()), *cells))
    return Table(f"Difference to {summary.study.reference}, paired by seed, in points of 100", head, tuple(rows))


def points(value: float, sign: bool = True) -> str:
    if not math.isfinite(value):
        return "–"
    return f"{100 * value:+.1f}" if sign else f"{100 * value:.1f}"


def interval(c: Comparison) -> str:
    return f"{points(c.low)} to {points(c.high)}" if math.isfinite(c.low) else "–"


def chance(p: float) -> str:
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


def settle(c: Comparison) -> str:
    """Seeds that would show a difference of the size now seen with a power of 0.8."""
    if c.seeds < 2:
        return "–"
    return "no number" if c.seeds_needed is None else str(c.seeds_needed)


def spread(value: Spread, factor: float, digits: int) -> str:
    if value.count == 0:
        return "–"
    text = f"{factor * value.mean:.{digits}f}"
    if math.isfinite(value.deviation):
        text += f" ± {factor * value.deviation:.{digits}f}"
    return text


def show(table: Table) -> None:
    """On the terminal, in pieces that fit; into a file or a pipe as wide as it is, a row a line."""
    if not table.rows:
        return
    console = Console()
    if not console.is_terminal:
        console = Console(width=max(width_of(table), cell_len(table.title)))
    for piece in pieces(table, console.width):
        console.print(rich(piece))


def pieces(table: Table, width: int) -> list[Table]:
    """The table, or several with some of its columns each, none wider than `width` where a single column fits.

    Each repeats what its rows are about.
    """
    names = [i for i, column in enumerate(table.columns) if column in NAMES]
    parts, part = [], list(names)
    for i in range(len(table.columns)):
        if i in names:
            continue
        if part != names and width_of(_of_columns(table, [*part, i])) > width:
            parts.append(part)
            part = list(names)
        part.append(i)
    return [
        _of_columns(table, part, "(continued)" if number else table.title) for number, part in enumerate([*parts, part])
    ]


def width_of(table: Table) -> int:
    """Characters of a line of the table on a terminal, with its frame."""
    each = (max(map(cell_len, column)) for column in zip(table.columns, *table.rows, strict=True))
    return sum(each) + 3 * len(table.columns) + 1


def _of_columns(table: Table, which: list[int], title: str = "") -> Table:
    rows = tuple(tuple(row[i] for i in which) for row in table.rows)
    return Table(title, tuple(table.columns[i] for i in which), rows)


def rich(table: Table) -> RichTable:
    shown = RichTable(title=table.title, title_justify="left")
    for column in table.columns:
        shown.add_column(column, justify="left" if column in (*NAMES, "verdict") else "right")
    colours = {"better": "green", "worse": "red"}
    for row in table.rows:
        cells = [f"[{colours[cell]}]{cell}[/]" if cell in colours else escape(cell) for cell in row]
        shown.add_row(*cells)
    return shown


def markdown(table: Table) -> str:
    def line(cells: tuple[str, ...]) -> str:
        return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"

    return "\n".join([f"**{table.title}**", "", line(table.columns), "|" + "---|" * len(table.columns),
                      *map(line, table.rows)]) + "\n"  # fmt: skip


def latex(table: Table) -> str:
    """A `tabular` with the booktabs package's rules."""
    head = " & ".join(map(_tex, table.columns)) + r" \\"
    body = [" & ".join(map(_tex, row)) + r" \\" for row in table.rows]
    columns = "l" * len(table.columns)
    return "\n".join([f"% {table.title}", rf"\begin{{tabular}}{{{columns}}}", r"\toprule", head, r"\midrule",
                      *body, r"\bottomrule", r"\end{tabular}"]) + "\n"  # fmt: skip


def cells_csv(summary: Summary) -> str:
    """A line for each finished cell, in full precision."""
    names = list(SHOWN)
    rows = [
        [s.cell.dataset, s.cell.arm, s.cell.seed, *(s.result["numbers"].get(name) for name in names),
         s.result["seconds_per_step"], s.result["memory_mb"]]
        for s in summary.finished if s.result is not None
    ]  # fmt: skip
    return _csv(["dataset", "arm", "seed", *names, "seconds_per_step", "memory_mb"], rows)


def scores_csv(summary: Summary) -> str:
    """A line for each arm and data set: mean and standard deviation over seeds, of 1, not of 100."""
    names = [*SHOWN, "step_ms", "memory_mb"]
    head = ["dataset", "arm", "baseline", "seeds", "missing", *(f"{n}{what}" for n in names for what in ("", "_std"))]
    rows = []
    for row in summary.rows:
        values = [*(row.scores[name] for name in SHOWN), row.step_ms, row.memory_mb]
        numbers = [number for value in values for number in (value.mean, value.deviation)]
        rows.append([row.dataset, row.arm, int(row.is_baseline), len(row.seeds), len(row.missing), *numbers])
    return _csv(head, rows)


def verdicts_csv(summary: Summary) -> str:
    """A line for each comparison, differences of 1, not of 100; empty where there is no such number."""
    names = [field.name for field in fields(Comparison)]
    rows = [
        [row.dataset, row.arm, summary.study.reference, metric, *(getattr(c, name) for name in names)]
        for row in summary.rows
        for metric, c in row.comparisons.items()
    ]
    return _csv(["dataset", "arm", "baseline", "metric", *names], rows)


def _csv(head: list[str], rows: list[list[Any]]) -> str:
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(head)
    writer.writerows([_plain(row) for row in rows])
    return out.getvalue()


def as_json(summary: Summary) -> dict[str, Any]:
    """Everything as plain data; what is not a number is null."""
    rows = [
        {
            "dataset": row.dataset,
            "arm": row.arm,
            "baseline": row.is_baseline,
            "seeds": list(row.seeds),
            "missing": list(row.missing),
            "scores": {name: asdict(value) for name, value in row.scores.items()},
            "step_ms": asdict(row.step_ms),
            "memory_mb": asdict(row.memory_mb),
            "comparisons": {name: asdict(value) for name, value in row.comparisons.items()},
        }
        for row in summary.rows
    ]
    content = {
        "study": summary.study.model_dump(mode="json"),
        "rows": rows,
        "cells": [{"name": s.cell.name, "state": s.state, "reason": s.reason} for s in summary.standings],
        "differences": [asdict(d) for d in summary.differences],
        "notes": summary.notes(),
    }
    plain: dict[str, Any] = _plain(content)
    return plain


def files(summary: Summary) -> dict[str, str]:
    """File name -> content."""
    tables = [scores_table(summary), verdict_table(summary)]
    notes = "".join(f"\n{note}" if note.startswith(" ") else f"\n- {note}" for note in summary.notes())
    return {
        "tables.md": "\n".join(markdown(t) for t in tables) + (f"{notes}\n" if notes else ""),
        "tables.tex": "\n".join(latex(t) for t in tables),
        "scores.csv": scores_csv(summary),
        "verdicts.csv": verdicts_csv(summary),
        "cells.csv": cells_csv(summary),
        "summary.json": json.dumps(as_json(summary), indent=1, allow_nan=False) + "\n",
    }


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _tex(text: str) -> str:
    for plain, escaped in (("\\", r"\textbackslash{}"), ("&", r"\&"), ("%", r"\%"), ("_", r"\_"), ("#", r"\#"),
                           ("±", r"$\pm$"), ("–", "--"), ("<", "$<$")):  # fmt: skip
        text = text.replace(plain, escaped)
    return text
