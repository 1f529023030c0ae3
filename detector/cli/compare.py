"""`detector-compare`: runs a study and says which differences are real."""

from __future__ import annotations

import argparse
from pathlib import Path

from detector.cli.common import OTHER, SUCCESS, run_command


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="compare",
        description="Run every cell (arm x seed x data set) of a study, then compare the arms: tables, verdicts and a"
        " report. What is finished is not run again; what was interrupted goes on.",
        epilog="OUT/report.html is the report; tables.md, tables.tex, cells.csv and summary.json lie beside it. Exit"
        " code: 0 all cells finished, 1 some are not, 2 a mistake in what was asked for.",
    )
    parser.add_argument("study", type=Path, help="a study file, such as configs/studies/quick.yaml")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="of the study, such as seeds=[0,1,2,3,4]")
    parser.add_argument(
        "--jobs", type=int, metavar="N", help="cells at a time (default: the study's `jobs`; with --ray, all that fit)"
    )
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder of the study (default: runs/studies/<name>)")
    parser.add_argument(
        "--keep",
        type=Path,
        metavar="DIR",
        help="a folder to go into a repository: holds finished cells without their weights, and the tables; what it"
        " holds at the start is not run again",
    )
    parser.add_argument("--report-only", action="store_true", help="run nothing; say what the finished cells show")
    parser.add_argument(
        "--ray",
        nargs="?",
        const="auto",
        metavar="HOST:PORT",
        help="run the cells on all machines of the Ray cluster with this head; without an address (put it last then) of"
        " the one that this machine is part of",
    )
    parser.add_argument("--retry", action="store_true", help="also run again what has diverged")
    options = parser.parse_intermixed_args(arguments)
    if options.jobs is not None and options.jobs < 1:
        parser.error("--jobs: expected at least 1")
    return run_command(lambda: _run(options))


def _run(options: argparse.Namespace) -> int:
    from contextlib import ExitStack
    from functools import partial

    from rich.console import Console

    from detector.files import write_whole
    from detector.lab.cluster import connected
    from detector.lab.grid import cells, differences
    from detector.lab.keep import keep, take
    from detector.lab.lock import locked
    from detector.lab.report import report, small_pictures
    from detector.lab.run import Place, Runner, ThisMachine, standing, task_of
    from detector.lab.study import load_study
    from detector.lab.summary import summarise
    from detector.lab.tables import files, rich, scores_table, verdict_table
    from detector.train.device import count_gpus

    study = load_study(options.study, options.overrides)
    out = options.out or Path("runs") / "studies" / study.name
    grid = cells(study, out.resolve())
    changed = differences(study, grid)
    for difference in changed:
        if not difference.announced:
            print(f"note: arms differ in more than they say: {difference}", flush=True)
    if options.keep is not None:
        print(f"{options.keep}: {take(grid, options.keep)} cells taken over", flush=True)
    stopped = None
    if not options.report_only:
        say = partial(print, flush=True)
        with locked(out), ExitStack() as stack:
            if options.ray is None:
                place: Place = ThisMachine(study, options.jobs or study.jobs, count_gpus())
            else:
                place = stack.enter_context(connected(study, grid, out.resolve(), options.ray, say, options.jobs))
            stopped = Runner(study, place, say)(grid, options.retry)
    summary = summarise(study, [standing(cell, task_of(study)) for cell in grid], changed)
    console = Console()
    console = console if console.is_terminal else Console(width=200)
    for table in (scores_table(summary), verdict_table(summary)):
        if table.rows:
            console.print(rich(table))
    for note in summary.notes():
        print(f"note: {note}")
    tables = files(summary)
    for name, text in tables.items():
        write_whole(out / name, text.encode())
    if options.keep is not None:
        new = keep([s.cell for s in summary.finished], options.keep)
        kept = {name: tables[name] for name in ("tables.md", "cells.csv")}
        for name, text in {**kept, **small_pictures(summary)}.items():
            # Errors name files of the study's folder, which is of no use on another machine.
            write_whole(options.keep / name, text.replace(f"{out.resolve()}/", "").encode())
        print(f"{options.keep}: {new} more cells, and the tables, kept")
    write_whole(out / "report.html", report(summary).encode())
    print(f"{out / 'report.html'}: the report; tables.md, tables.tex, cells.csv and summary.json beside it")
    return SUCCESS if not summary.unfinished and stopped is None else OTHER
