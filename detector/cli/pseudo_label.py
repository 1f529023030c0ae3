"""`detector-pseudo-label`: a trained detector annotates images that nobody has annotated, to be trained on."""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from detector.cli.common import run_command

if TYPE_CHECKING:
    from detector.pseudo_labels import Labeller


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="pseudo_label",
        description="Write what a trained detector finds in unlabelled images as a COCO annotation file with a weight"
        " for each object.",
        epilog="Images that cannot be read are named, counted and left out. docs/conversion.md: how to train on it.",
    )
    parser.add_argument("checkpoint", type=Path, help="a .pt file, or a run's folder (its best.pt)")
    parser.add_argument("source", type=Path, help="a folder of images, or a COCO file without annotations")
    parser.add_argument("--image-folder", type=Path, metavar="DIR", help="what a COCO file's names are relative to")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="the COCO file to write")
    parser.add_argument(
        "--threshold",
        nargs="+",
        default=["0.5"],
        metavar="SCORE|CLASS=SCORE",
        help="least score of a label: of all classes (0.5), or by class, with a number for the rest",
    )
    parser.add_argument(
        "--weight",
        default="1",
        metavar="N|score",
        help="with which training counts a label: a number (1), or its score",
    )
    parser.add_argument("--nms-iou", type=float, metavar="IOU", help="default: the checkpoint's decode.nms_iou")
    parser.add_argument("--max-detections", type=int, metavar="N", help="of an image; default: the checkpoint's")
    parser.add_argument(
        "--keep-empty", action="store_true", help="keep images in which nothing is found, as background"
    )
    parser.add_argument("--batch-size", type=int, default=8, metavar="N", help="images at a time (default: 8)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1 ... (default: auto)")
    parser.add_argument("--precision", choices=["fp32", "bf16", "fp16"], help="default: fp16 on a GPU, else fp32")
    parser.add_argument("--raw", action="store_true", help="the raw weights, not the averaged ones")
    parser.add_argument("--force", action="store_true", help="replace a file that is there already")
    options = parser.parse_args(arguments)
    if options.batch_size < 1:
        parser.error("--batch-size: expected at least 1")
    weight = _weight(options.weight)
    if weight is not None and not (math.isfinite(weight) and weight >= 0):
        parser.error(f"--weight {options.weight}: expected a number of 0 or more, or score")
    return run_command(lambda: _run(options, weight))


def _weight(text: str) -> float | None:
    """None: each its score."""
    if text == "score":
        return None
    try:
        return float(text)
    except ValueError:
        return math.nan


def _run(options: argparse.Namespace, weight: float | None) -> None:
    import hashlib

    from rich.console import Console
    from rich.progress import Progress

    from detector import __version__
    from detector.data.formats.coco import as_bytes
    from detector.data.formats.convert import refuse_existing
    from detector.errors import UserError
    from detector.files import write_whole
    from detector.predict import load
    from detector.pseudo_labels import Labeller, by_class, of_coco, of_folder

    refuse_existing([options.out], options.force)
    if options.source.is_dir():
        source = of_folder(options.source)
    elif options.image_folder is None:
        raise UserError(f"{options.source}: is no folder; if it is a COCO file, give its images by --image-folder DIR")
    else:
        source = of_coco(options.source, options.image_folder)
    path = options.checkpoint / "best.pt" if options.checkpoint.is_dir() else options.checkpoint
    given = {"nms_iou": options.nms_iou, "max_detections": options.max_detections}
    overrides = [f"decode.{key}={value}" for key, value in given.items() if value is not None]
    weights = "raw" if options.raw else "ema"
    detector = load(path, options.device, options.precision, weights=weights, overrides=overrides)
    thresholds = by_class(options.threshold, detector.classes)
    # Thresholds are on the final score, which may be above the class score that decoding looks at first.
    lowest = min([detector.decode_config.score_threshold, *thresholds])
    detector.decode_config = detector.decode_config.model_copy(update={"score_threshold": lowest})
    labeller = Labeller(detector, thresholds, weight, options.keep_empty)
    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("images", total=len(source.images))
        labeller.label(source, options.batch_size, lambda done: progress.advance(task, done))
    for message in labeller.failures:
        print(f"{message}: left out", file=sys.stderr)
    with path.open("rb") as file:
        checksum = hashlib.file_digest(file, "sha256").hexdigest()
    write_whole(options.out, as_bytes(labeller.document(options.source, path, checksum, __version__)))
    _show(labeller)
    files = f"annotations: {options.out.resolve()}, images: {source.folder.resolve()}"
    print(f"{options.out}: written; train on it with: data.type=coco data.train={{{files}}}")


def _show(labeller: Labeller) -> None:
    """How many of each class."""
    for name, count, threshold in zip(
        labeller.detector.classes, labeller.counts.tolist(), labeller.thresholds.tolist(), strict=True
    ):
        print(f"  {name}: {count} (score {threshold:g} or more)")
    empty = "kept as background" if labeller.keep_empty else "left out"
    unread = f", {len(labeller.failures)} could not be read" if labeller.failures else ""
    print(
        f"{int(labeller.counts.sum())} objects in {len(labeller.images)} images; {labeller.empty} images in which"
        f" nothing was sure enough are {empty}{unread}"
    )
