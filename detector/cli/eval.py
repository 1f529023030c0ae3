"""`detector-eval`: COCO's numbers of a checkpoint, or of a file of detections without any model."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from detector.cli.common import run_command

if TYPE_CHECKING:
    from detector.evaluate.coco import CocoResult
    from detector.evaluate.engines import Engine


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="eval",
        description="COCO's numbers: of a trained detector on its data, or of given detections without any model.",
        epilog="The last lines printed are the numbers, one a line, as `AP 0.512`.",
    )
    parser.add_argument("checkpoint", nargs="?", type=Path, help="a .pt file, or a run's folder (its best.pt)")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="of the run's configuration: data.root=DIR")
    parser.add_argument("--annotations", type=Path, help="a COCO annotation file, with --detections")
    parser.add_argument("--detections", type=Path, help="a COCO results file")
    parser.add_argument("--split", choices=["train", "val", "test"], default="val")
    parser.add_argument("--engine", choices=["hotcoco", "pycocotools"], help="default: the run's, or hotcoco (faster)")
    parser.add_argument("--iou-type", choices=["bbox", "segm"], help="default: boxes, unless there are only masks")
    parser.add_argument("--ignore-classes", action="store_true", help="a detection of any class finds an object")
    parser.add_argument(
        "--max-dets",
        type=int,
        metavar="N",
        help="detections of a class in an image that count (COCO: 100); AP and the recalls by size are taken at N, and"
        " N > 100 adds AR_N",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers here in full precision")
    parser.add_argument("--detections-out", type=Path, metavar="FILE", help="write the detections as COCO results")
    parser.add_argument("--batch-size", type=int, metavar="N", help="images at a time")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1 ... (default: auto)")
    parser.add_argument(
        "--precision",
        choices=["fp32", "bf16", "fp16"],
        help="default: the run's on a GPU, as while training; else fp32",
    )
    parser.add_argument("--raw", action="store_true", help="the raw weights, not the averaged ones")
    options = parser.parse_intermixed_args(arguments)
    if (options.checkpoint is None) == (options.annotations is None):
        parser.error("give a checkpoint, or --annotations and --detections")
    if (options.annotations is None) != (options.detections is None):
        parser.error("--annotations and --detections go together")
    if options.annotations is not None:
        needless = [
            f"--{name.replace('_', '-')}"
            for name in ("split", "detections_out", "batch_size", "device", "precision", "raw")
            if getattr(options, name) != parser.get_default(name)
        ]
        if needless:
            parser.error(f"{', '.join(needless)}: without a checkpoint there is no model to run")
    elif options.iou_type == "segm":
        parser.error("--iou-type segm: this detector finds boxes, not masks")
    for name in ("max_dets", "batch_size"):
        if getattr(options, name) is not None and getattr(options, name) < 1:
            parser.error(f"--{name.replace('_', '-')}: expected at least 1")
    return run_command(lambda: _score_file(options) if options.annotations else _score_checkpoint(options))


def _score_file(options: argparse.Namespace) -> int:
    """Without torch, whose import alone would take longer."""
    from detector.evaluate.coco import score_file

    engine: Engine = options.engine or "hotcoco"
    limit = options.max_dets or 100
    result = score_file(
        options.annotations, options.detections, engine, limit, options.iou_type, not options.ignore_classes
    )
    return _report(result, options)


def _score_checkpoint(options: argparse.Namespace) -> int:
    from rich.console import Console
    from rich.progress import MofNCompleteColumn, Progress, TimeRemainingColumn

    from detector.data.loader import eval_loader
    from detector.evaluate.coco import CocoEvaluator
    from detector.evaluate.runner import evaluate
    from detector.predict import restore
    from detector.train.checkpoint import check_classes
    from detector.train.device import find_device

    device = find_device(options.device)
    path = options.checkpoint / "best.pt" if options.checkpoint.is_dir() else options.checkpoint
    restored = restore(path, "raw" if options.raw else "ema", options.overrides)
    config = restored.config
    limit = options.max_dets or config.evaluate.max_dets
    # The detector must be allowed to find as many as shall count.
    decode = config.decode.model_copy(update={"max_detections": max(config.decode.max_detections, limit)})
    data = config.data.open(options.split)
    check_classes({"classes": restored.classes}, data.index.classes, path)
    loader = eval_loader(
        data,
        resize=config.data.resize,
        batch_size=options.batch_size or config.evaluate.batch_size or config.train.batch_size,
        workers=config.data.workers,
        pad_multiple=config.data.pad_multiple,
        max_unreadable=config.data.max_unreadable,
    )
    evaluator = CocoEvaluator(
        data.index, options.engine or config.evaluate.engine, limit, use_classes=not options.ignore_classes
    )
    model = restored.model.to(device)
    precision = options.precision or (config.train.precision if device.type == "cuda" else "fp32")
    columns = (*Progress.get_default_columns()[:2], MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(f"{options.split}: {len(data)} images", total=len(loader))
        result = evaluate(model, loader, decode, evaluator, device, precision, lambda *_: progress.advance(task))
    if options.detections_out is not None:
        evaluator.write_detections(options.detections_out)
    averaged = "averaged" if restored.averaged else "raw"
    print(f"{path} ({averaged} weights) on {data.index.annotations}: {len(data)} images")
    return _report(result, options)


def _report(result: CocoResult, options: argparse.Namespace) -> int:
    import json

    from detector.evaluate.report import print_table
    from detector.files import write_whole

    if options.json is not None:
        write_whole(options.json, (json.dumps(result.as_json(), indent=1) + "\n").encode())
    print_table(result)
    for note in result.notes:
        print(f"note: {note}")
    print("\n".join(result.lines()))
    return 0
