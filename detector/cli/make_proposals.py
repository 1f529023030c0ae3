"""`detector-make-proposals`: a file of proposals, from a trained RPN or by selective search."""

from __future__ import annotations

import argparse
from pathlib import Path

from detector.cli.common import run_command


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="make_proposals",
        description="Write boxes that may hold an object, for detectors that are given them (docs/two_stage.md).",
    )
    parser.add_argument(
        "source", type=Path, help="a two-stage checkpoint or its run's folder; with --selective-search a recipe"
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="of the configuration: data.root=DIR")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE.npz")
    parser.add_argument("--split", choices=["train", "val", "test"], default="val")
    parser.add_argument("--most", type=int, default=300, metavar="N", help="of an image (default: 300)")
    parser.add_argument("--selective-search", action="store_true", help="needs OpenCV's contrib modules; slow")
    parser.add_argument("--batch-size", type=int, default=8, metavar="N", help="images at a time (default: 8)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1 ... (default: auto)")
    parser.add_argument("--raw", action="store_true", help="the raw weights, not the averaged ones")
    options = parser.parse_intermixed_args(arguments)
    if options.most < 1 or options.batch_size < 1:
        parser.error("--most and --batch-size: expected at least 1")
    if options.out.suffix != ".npz":
        parser.error(f"--out {options.out}: expected a name that ends in .npz")
    return run_command(lambda: _run(options))


def _run(options: argparse.Namespace) -> None:
    from rich.console import Console
    from rich.progress import Progress

    from detector.config.load import load_config
    from detector.predict import restore
    from detector.proposals import of_rpn, of_selective_search, write
    from detector.train.device import find_device

    if options.selective_search:
        data = load_config(options.source, options.overrides).data.model_copy(update={"proposals": None})
        images = data.open(options.split)
        rows = of_selective_search(images, options.most)
    else:
        path = options.source / "best.pt" if options.source.is_dir() else options.source
        restored = restore(path, "raw" if options.raw else "ema", options.overrides)
        images = restored.config.data.open(options.split)
        rows = of_rpn(restored, images, find_device(options.device), options.batch_size, options.most)
    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("images", total=len(images))
        count, seen = write(options.out, rows, lambda done: progress.update(task, completed=done))
    print(
        f"{options.out}: {count} proposals of {seen} images; use it with: data.proposals.{options.split}={options.out}"
    )
