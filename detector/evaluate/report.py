"""The scores of each class as a table."""

from __future__ import annotations

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from detector.evaluate.coco import CocoResult


def print_table(result: CocoResult, console: Console | None = None) -> None:
    """A line for each class that has objects; how many have none is said below.  Nothing where classes were ignored."""
    console = Console() if console is None else console
    scored = [c for c in result.per_class if c.objects]
    if scored:
        table = Table(title="per class")
        table.add_column("class")
        for name in ("objects", "AP", "AP50", f"AR_{result.max_dets}"):
            table.add_column(name, justify="right")
        for c in scored:
            table.add_row(escape(c.name), str(c.objects), f"{c.ap:.3f}", f"{c.ap50:.3f}", f"{c.ar:.3f}")
        console.print(table)
    absent = len(result.per_class) - len(scored)
    if absent:
        console.print(f"{absent} of {len(result.per_class)} classes have no objects here and do not count")
