"""`detector-compare`: runs a study and says which differences are real."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from detector.cli.common import OTHER, SUCCESS, run_command

if TYPE_CHECKING:
    from detector.lab.grid import Difference
    from detector.lab.standing import Standing
    from detector.lab.study import StudyConfig


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="compare",
        description="Run every cell (arm x seed x data set) of a study, then compare the arms: tables, verdicts and a"
        " report. What is finished is not run again; what was interrupted goes on.",
        epilog="OUT/report.html is the report; beside it lie the tables: tables.md, tables.tex, scores.csv,"
        " verdicts.csv, cells.csv (a line a cell) and summary.json. Exit code: 0 all cells finished, 1 some are not,"
        " 2 a mistake in what was asked for.",
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

    from detector.lab.cluster import connected
    from detector.lab.grid import cells, differences
    from detector.lab.keep import take
    from detector.lab.lock import Busy, locked
    from detector.lab.ready import check_machine
    from detector.lab.run import Place, Runner, ThisMachine
    from detector.lab.standing import standing, task_of
    from detector.lab.study import load_study
    from detector.train.device import gpu_names

    study = load_study(options.study, options.overrides)
    out = options.out or Path("runs") / "studies" / study.name
    grid, task, say = cells(study, out.resolve()), task_of(study), partial(print, flush=True)
    changed = differences(study, grid)
    for difference in changed:
        if not difference.announced:
            say(f"note: arms differ in more than they say: {difference}")
    stopped = None
    with ExitStack() as stack:
        # To the end, as the tables are written, too.  A look at what is finished needs no lock but to put cells there.
        if not options.report_only:
            stack.enter_context(locked(out))
        if options.keep is not None:
            try:
                with ExitStack() if not options.report_only else locked(out):
                    say(f"{options.keep}: {take(grid, options.keep, task)} cells taken over")
            except Busy as busy:
                say(f"note: {options.keep}: no cells taken over: {busy}")
        if not options.report_only:
            if options.ray is None:
                left_alone = ("finished",) if options.retry else ("finished", "diverged")
                check_machine([c for c in grid if standing(c, task).state not in left_alone], study.split)
                place: Place = ThisMachine(study, options.jobs or study.jobs, gpu_names())
            else:
                place = stack.enter_context(connected(study, grid, out.resolve(), options.ray, say, options.jobs))
            stopped = Runner(study, place, say)(grid, options.retry)
        unfinished = _show([standing(cell, task) for cell in grid], study, changed, out, options.keep)
    return SUCCESS if not unfinished and stopped is None else OTHER


def _show(
    standings: list[Standing], study: StudyConfig, changed: list[Difference], out: Path, folder: Path | None
) -> int:
    """Tables and notes on the terminal, and all of them as files; how many cells are not finished.

    `folder`: that of kept cells, which is given what is new.
    """
    from detector.files import write_whole
    from detector.lab.keep import keep
    from detector.lab.report import report, small_pictures
    from detector.lab.summary import summarise
    from detector.lab.tables import files, scores_table, show, verdict_table

    summary = summarise(study, standings, changed)
    for table in (scores_table(summary), verdict_table(summary)):
        show(table)
    for note in summary.notes():
        print(f"note: {note}")
    tables = files(summary)
    for name, text in tables.items():
        write_whole(out / name, text.encode())
    if folder is not None:
        new = keep([s.cell for s in summary.finished], folder)
        kept = {name: tables[name] for name in ("tables.md", "cells.csv")}
        for name, text in {**kept, **small_pictures(summary)}.items():
            # Errors name files of the study's folder, which is of no use on another machine.
            write_whole(folder / name, text.replace(f"{out.resolve()}/", "").encode())
        print(f"{folder}: {new} more cells, and the tables, kept")
    write_whole(out / "report.html", report(summary).encode())
    print(f"{out / 'report.html'}: the report; {', '.join(tables)} beside it")
    return len(summary.unfinished)
