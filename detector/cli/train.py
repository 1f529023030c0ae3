"""`detector-train`: from a recipe to a trained detector."""

from __future__ import annotations

import argparse
from pathlib import Path

from detector.cli.common import OTHER, SUCCESS, run_command


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="train",
        description="Train a detector as a recipe says; ends with COCO's twelve numbers of the best checkpoint.",
        epilog="Ctrl-C or SIGTERM: the step is finished and saved; --resume goes on as if nothing had happened. Exit"
        " code: 0 done, 2 a mistake in what was asked for, 1 interrupted or a fault of the program.",
    )
    parser.add_argument("recipe", type=Path, help="a recipe file, or the name of one that ships with the package")
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="such as train.batch_size=8 run.dir=runs/mine"
    )
    start = parser.add_mutually_exclusive_group()
    start.add_argument("--resume", type=Path, metavar="RUN_DIR", help="go on with the run in this folder")
    start.add_argument("--overwrite", action="store_true", help="delete the run that is in the folder")
    options = parser.parse_intermixed_args(arguments)
    return run_command(lambda: _train(options))


def _train(options: argparse.Namespace) -> int:
    from detector.config.load import load_config

    config = load_config(options.recipe, options.overrides)

    from detector.train.loop import train

    outcome = train(config, options.resume, options.overwrite)
    files = outcome.files
    if outcome.unreadable:
        print(f"note: {outcome.unreadable} images could not be read")
    if outcome.interrupted_by is not None:
        print(
            f"{outcome.interrupted_by}: step {outcome.step} was finished and saved in {files.last};"
            f" go on with --resume {files.folder}"
        )
        return OTHER
    print(
        f"{files.folder}: best.pt (step {outcome.best_step}), last.pt (step {outcome.step}), metrics.jsonl, pictures/"
    )
    for name, value in outcome.numbers.items():
        print(f"{name} {value:.3f}")
    return SUCCESS
