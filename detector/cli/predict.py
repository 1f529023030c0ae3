"""`detector-predict`: pictures of what a trained detector finds in images, folders and videos, and a list on demand."""

from __future__ import annotations

import argparse
from pathlib import Path

from detector.cli.common import run_command


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="predict",
        description="Draw what a trained detector finds in images, folders (with all below them) and videos.",
        epilog="Files that cannot be read are named, counted and skipped; the exit code is 2 if none could be read.",
    )
    parser.add_argument("checkpoint", type=Path, help="a .pt file, or a run's folder (its best.pt)")
    parser.add_argument("inputs", nargs="+", type=Path, metavar="image|folder|video")
    parser.add_argument("--out", type=Path, default=Path("pictures"), metavar="DIR", help="default: pictures")
    parser.add_argument("--threshold", type=float, default=0.3, help="least score that is shown (default: 0.3)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all that is shown here, too")
    parser.add_argument("--batch-size", type=int, default=8, metavar="N", help="images at a time (default: 8)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1 ... (default: auto)")
    parser.add_argument("--precision", choices=["fp32", "bf16", "fp16"], help="default: fp16 on a GPU, else fp32")
    parser.add_argument("--raw", action="store_true", help="the raw weights, not the averaged ones")
    options = parser.parse_intermixed_args(arguments)
    if not 0 <= options.threshold < 1:
        parser.error("--threshold: expected a score from 0 to below 1")
    if options.batch_size < 1:
        parser.error("--batch-size: expected at least 1")
    return run_command(lambda: _run(options))


def _run(options: argparse.Namespace) -> int:
    import json
    import sys

    from rich.console import Console
    from rich.progress import MofNCompleteColumn, Progress, TextColumn

    from detector.files import write_whole
    from detector.media import Painter, find_sources
    from detector.predict import load

    sources = find_sources(options.inputs, options.out)
    path = options.checkpoint / "best.pt" if options.checkpoint.is_dir() else options.checkpoint
    weights = "raw" if options.raw else "ema"
    detector = load(path, options.device, options.precision, options.threshold, weights)
    painter = Painter(detector, options.batch_size)
    columns = (*Progress.get_default_columns()[:2], MofNCompleteColumn(), TextColumn("{task.fields[unit]}"))
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("files", total=len(sources), unit="files")
        for done in painter.paint(sources):
            progress.advance(task, done)
    for message in painter.failures:
        print(f"{message}: skipped", file=sys.stderr)
    if options.json is not None:
        write_whole(options.json, (json.dumps(painter.records, indent=1) + "\n").encode())
    read = [_count(painter.images, "image")] if painter.images or not painter.videos else []
    if painter.videos:
        read.append(f"{_count(painter.videos, 'video')} ({_count(painter.frames, 'frame')})")
    failed = f"; {_count(len(painter.failures), 'file')} could not be read" if painter.failures else ""
    print(f"{' and '.join(read)}: {_count(painter.found, 'detection')}, pictures in {options.out}{failed}")
    return 0 if painter.images or painter.videos else 2


def _count(n: int, what: str) -> str:
    return f"{n} {what}" + ("" if n == 1 else "s")
