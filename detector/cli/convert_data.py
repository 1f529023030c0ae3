"""`detector-convert-data`: VOC, YOLO, CSV and labelme to COCO, and COCO to YOLO."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from detector.cli.common import run_command

if TYPE_CHECKING:
    from detector.data.formats.convert import Result
    from detector.data.formats.records import Problems, Source


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="convert_data",
        description="Convert a data set: VOC, YOLO, CSV or labelme to COCO, or COCO to YOLO.",
        epilog="docs/conversion.md tells how each format counts pixels, and what it cannot say.",
    )
    formats = parser.add_subparsers(dest="format", required=True, metavar="voc|yolo|csv|labelme|coco-to-yolo")
    voc = _add(formats, "voc", "a folder of VOC's XML files")
    voc.add_argument("--list", type=Path, metavar="FILE", help="the images of the split (ImageSets/Main/train.txt)")
    voc.add_argument(
        "--pixels",
        choices=["inclusive", "edges"],
        default="inclusive",
        help="inclusive: counted from 1, the last one within the box, as VOC has it (default); edges: from 0",
    )
    voc.add_argument(
        "--difficult",
        choices=["keep", "crowd", "drop"],
        default="keep",
        help="objects marked so are objects (default), crowd regions that are not scored, or left out",
    )
    _add(formats, "yolo", "YOLO's data file (yaml)")
    table = _add(formats, "csv", "a table with a row for each object")
    table.add_argument(
        "--columns", nargs="+", default=[], metavar="OURS=THEIRS", help="names of columns, such as x1=xmin label=class"
    )
    table.add_argument("--units", choices=["pixels", "fractions"], default="pixels", help="of boxes (pixels)")
    table.add_argument("--delimiter", default=",", metavar="C", help="between columns (,); tab for a tabulator")
    labelme = _add(formats, "labelme", "a folder of labelme's JSON files")
    to_yolo = _add(formats, "coco-to-yolo", "a COCO annotation file")
    to_yolo.add_argument("--segments", action="store_true", help="write outlines instead of boxes")
    for one in (voc, table, labelme):
        one.add_argument("--classes", nargs="+", metavar="NAME", help="in the order of their ids (default: sorted)")
    options = parser.parse_args(arguments)
    if options.format == "coco-to-yolo" and options.image_folder is None:
        parser.error("give the folder that the file names are relative to by --image-folder DIR")
    if options.format == "csv":
        pairs = [pair.partition("=") for pair in options.columns]
        if not all(ours and theirs for ours, _, theirs in pairs):
            parser.error("--columns: expected OURS=THEIRS, such as x1=xmin")
        options.columns = {ours: theirs for ours, _, theirs in pairs}
        options.delimiter = "\t" if options.delimiter == "tab" else options.delimiter
        if len(options.delimiter) != 1:
            parser.error("--delimiter: expected one character, or tab")
    return run_command(lambda: _run(options))


def _add(formats: argparse._SubParsersAction[argparse.ArgumentParser], name: str, what: str) -> argparse.ArgumentParser:
    one = formats.add_parser(name, help=what, description=f"Convert {what}.")
    one.add_argument("source", type=Path, metavar="SOURCE", help=what)
    one.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder of the result")
    one.add_argument(
        "--split", default="train", metavar="NAME", help="which part this is: train (default), val or test"
    )
    one.add_argument("--image-folder", type=Path, metavar="DIR", help="folder that file names are relative to")
    one.add_argument(
        "--images",
        choices=["copy", "link", "keep"],
        default="copy",
        help="image files are copied to the result (default), linked from it, or left where they are",
    )
    one.add_argument("--force", action="store_true", help="replace files that are there already")
    broken = one.add_mutually_exclusive_group()
    broken.add_argument("--strict", action="store_true", help="end at the first broken record (default)")
    broken.add_argument("--skip", action="store_true", help="leave out broken records, count and name them")
    return one


def _run(options: argparse.Namespace) -> int:
    import cv2

    from detector.data.formats.convert import Target, to_coco, to_yolo
    from detector.data.formats.records import Problems
    from detector.errors import UserError

    cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)  # errors say it, in better words
    if not options.split or set(options.split) & set("/\\:"):
        raise UserError(f"--split {options.split!r}: expected a name such as train")
    problems = Problems(options.skip)
    target = Target(options.out, options.split, options.images, options.force)
    source = _read(options, problems)
    with _Progress(len(source.entries)) as step:
        if options.format == "coco-to-yolo":
            result = to_yolo(source, target, problems, options.segments, step)
        else:
            classes = getattr(options, "classes", None)
            result = to_coco(source, target, problems, options.format, classes, step)
    _show(result, options.format == "coco-to-yolo", options.split)
    return 0


def _read(options: argparse.Namespace, problems: Problems) -> Source:
    folder = options.image_folder
    if folder is not None and not folder.is_dir():
        from detector.errors import DataError

        raise DataError(f"--image-folder {folder}: no such folder")
    if options.format == "voc":
        from detector.data.formats.voc import Voc

        return Voc(options.pixels, options.difficult).read(options.source, folder, options.list, problems)
    if options.format == "yolo":
        from detector.data.formats import yolo

        return yolo.read(options.source, options.split, folder, problems)
    if options.format == "csv":
        from detector.data.formats.table import Table

        return Table(options.columns, options.units, options.delimiter).read(options.source, folder, problems)
    if options.format == "labelme":
        from detector.data.formats import labelme

        return labelme.read(options.source, folder, problems)
    from detector.data.formats import coco

    return coco.read(options.source, folder, problems)


class _Progress:
    """A bar on a terminal, gone when done."""

    def __init__(self, total: int) -> None:
        self.total = total

    def __enter__(self) -> Callable[[], None]:
        from rich.console import Console
        from rich.progress import Progress

        self.bar = Progress(transient=True, console=Console(stderr=True))
        self.bar.start()
        task = self.bar.add_task("images", total=self.total)
        return lambda: self.bar.advance(task)

    def __exit__(self, *_: object) -> None:
        self.bar.stop()


def _show(result: Result, is_yolo: bool, split: str) -> None:
    for line in result.lines:
        print(line, file=sys.stderr)
    print(f"{result.written}: {result.counts}; images in {result.images}")
    if not is_yolo:
        paths = f"annotations: {result.written.resolve()}, images: {result.images.resolve()}"
        print(f"train on it with: data.type=coco data.{split}={{{paths}}}")
