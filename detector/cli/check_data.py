"""`detector-check-data`: what is wrong with a COCO annotation file and its images, and a corrected file."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING

from detector.cli.common import Progress, run_command

if TYPE_CHECKING:
    from detector.data.findings import Report

_WIDE = 200  # columns of the table in a file or a pipe


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="check_data",
        description="Check a COCO annotation file and its images; report everything that is wrong, with examples.",
        epilog="Exit code: 0 without errors (warnings and notices do not count) or when --fix has mended all of them, "
        "2 with errors.",
    )
    parser.add_argument("annotations", type=Path, help="COCO annotation file (json)")
    parser.add_argument("--images", type=Path, metavar="DIR", help="folder that the file names are relative to")
    parser.add_argument("--no-images", action="store_true", help="check the annotation file alone")
    parser.add_argument("--quick", action="store_true", help="read only header and end of each image; do not decode it")
    parser.add_argument("--fix", type=Path, metavar="FILE", help="write a corrected annotation file here")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the report here, for scripts")
    options = parser.parse_args(arguments)
    if options.images is None and not options.no_images:
        parser.error("give the image folder by --images DIR, or --no-images")
    return run_command(lambda: _run(options))


def _run(options: argparse.Namespace) -> int:
    import cv2

    from detector.data.check import check, write_fixed
    from detector.data.check_images import Depth

    cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)  # the report says it, in better words
    depth = Depth.NONE if options.no_images else Depth.QUICK if options.quick else Depth.FULL
    with Progress() as progress:
        report, document = check(options.annotations, options.images, depth, progress.start)
    _show(report)
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
