"""`detector-check-data`: what is wrong with a COCO annotation file and its images, and a corrected file; or with all
data of a recipe, and how the classes of several sources go together."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from detector.cli.common import Progress, run_command

if TYPE_CHECKING:
    from detector.data.findings import Report
    from detector.data.several import SeveralIndex

_WIDE = 100_000  # columns for a table in a file or a pipe: it takes what it needs, and no message is broken up


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="check_data",
        description="Check a COCO annotation file and its images, or all that a recipe's data section names; report"
        " everything that is wrong, with examples.",
        epilog="Exit code: 0 without errors (warnings and notices do not count) or when --fix has mended all of them, "
        "2 with errors.",
    )
    parser.add_argument("annotations", type=Path, help="COCO annotation file (json), or a recipe (yaml)")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="of the recipe, such as data.root=DIR")
    parser.add_argument("--images", type=Path, metavar="DIR", help="folder that the file names are relative to")
    parser.add_argument("--no-images", action="store_true", help="check the annotation file alone")
    parser.add_argument("--quick", action="store_true", help="read only header and end of each image; do not decode it")
    parser.add_argument("--fix", type=Path, metavar="FILE", help="write a corrected annotation file here")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the report here, for scripts")
    options = parser.parse_intermixed_args(arguments)
    if options.annotations.suffix in (".yaml", ".yml"):
        if options.images is not None or options.fix is not None:
            parser.error("--images and --fix go with an annotation file; a recipe names its own")
        return run_command(lambda: _check_recipe(options))
    if options.overrides:
        parser.error(f"{options.overrides[0]}: overrides go with a recipe")
    if options.images is None and not options.no_images:
        parser.error("give the image folder by --images DIR, or --no-images")
    return run_command(lambda: _check_file(options))


def _look(annotations: Path, images: Path | None, options: argparse.Namespace) -> tuple[Report, dict[str, Any] | None]:
    """Checks one file and shows what was found."""
    import cv2

    from detector.data.check import check
    from detector.data.check_images import Depth

    cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)  # the report says it, in better words
    depth = Depth.NONE if options.no_images else Depth.QUICK if options.quick else Depth.FULL
    with Progress() as progress:
        report, document = check(annotations, images, depth, progress.start)
    _show(report)
    return report, document


def _check_recipe(options: argparse.Namespace) -> int:
    """All splits of all sources, and what becomes of their classes."""
    from detector.config.load import load_config
    from detector.data.places import PARTS
    from detector.data.several import SeveralIndex

    data = load_config(options.annotations, options.overrides).data
    summaries, wrong = [], False
    for split in PARTS:
        for source, (path, images) in data.parts(split).items() if data.gives(split) else ():
            print(f"{f'{source}, ' if source else ''}{split}: {path}")
            report, _ = _look(path, images, options)
            wrong = wrong or bool(report.errors)
            summary = {"source": source or None, "split": split, "annotations": str(path)}
            summaries.append(summary | report.as_json())
    if options.json is not None:
        options.json.write_text(json.dumps(summaries, indent=1) + "\n", encoding="utf-8")
    if not wrong:  # or else that is to be mended first
        index = data.open("train").index
        if isinstance(index, SeveralIndex):
            _show_classes(index)
    return 2 if wrong else 0


def _show_classes(index: SeveralIndex) -> None:
    """Of each class of the training split how many objects each source has; in brackets its own name for it."""
    import numpy as np
    from rich.console import Console
    from rich.table import Table

    table = Table("label", "class", *index.sources, header_style="bold")
    counts = []
    for part, labels in zip(index.parts, index.label_maps, strict=True):
        kept = labels[part.labels[~part.crowd]]
        counts.append(np.bincount(kept[kept >= 0], minlength=len(index.classes)))
    for k, name in enumerate(index.classes):
        row = []
        for part, labels, count in zip(index.parts, index.label_maps, counts, strict=True):
            own = [part.classes[j] for j in np.flatnonzero(labels == k)]
            other = f" ({', '.join(own)})" if own and own != [name] else ""
            row.append(f"{count[k]}{other}" if own else "not labelled")
        table.add_row(str(k), name, *row)
    console = Console()
    (console if console.is_terminal else Console(width=_WIDE)).print(table)


def _check_file(options: argparse.Namespace) -> int:
    from detector.data.check import write_fixed

    report, document = _look(options.annotations, options.images, options)
    fixed = False
    if options.fix is not None and document is not None and not report.beyond_repair:
        fixed = True
        write_fixed(document, options.fix, options.annotations)
        _say_what_changed(report, options.fix)
    elif options.fix is not None:
        print(f"{options.fix}: not written: {report.beyond_repair[0].kind.meaning}; only a person can mend that")
    if options.json is not None:
        summary = {"annotations": str(options.annotations), "fixed": str(options.fix) if fixed else None}
        options.json.write_text(json.dumps(summary | report.as_json(), indent=1) + "\n", encoding="utf-8")
    return 2 if report.errors and not fixed else 0


def _show(report: Report) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from detector.data.findings import Severity

    colours = {Severity.ERROR: "red", Severity.WARNING: "yellow", Severity.NOTICE: "blue"}
    table = Table(show_header=True, header_style="bold", show_lines=True)
    for column, justify in (("", "left"), ("found", "right"), ("what", "left"), ("first of them", "left")):
        table.add_column(column, justify=justify, overflow="fold")  # type: ignore[arg-type]
    for severity in Severity:
        for finding in report.of(severity):
            name = f"[{colours[severity]}]{severity.name.lower()}[/]"
            what = f"{escape(finding.kind.meaning)}\n[dim]{finding.name}[/]"
            table.add_row(name, str(finding.count), what, escape("\n".join(finding.examples)))
    console = Console()
    if not console.is_terminal:
        console = Console(width=_WIDE)
    if table.row_count:
        console.print(table)
    counts = ", ".join(f"{count} {name}" for name, count in report.counts.items())
    totals = [(s, sum(f.count for f in report.of(s))) for s in Severity]
    found = ", ".join(f"{count} {s.name.lower()}{'' if count == 1 else 's'}" for s, count in totals)
    print(f"{counts}: {found}" if counts else found)


def _say_what_changed(report: Report, target: Path) -> None:
    repaired = [f for f in report.found.values() if f.kind.repair is not None]
    print(f"{target}: written, " + ("with these changes:" if repaired else "nothing had to be changed"))
    for finding in repaired:
        print(f"  {finding.count} times {finding.kind.meaning}: {finding.kind.repair}")
