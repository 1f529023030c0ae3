"""`detector-convert-weights`: a checkpoint of ours from a detector that another toolkit trained."""

from __future__ import annotations

import argparse
from pathlib import Path

from detector.cli.common import run_command

TORCHVISION = (
    "fasterrcnn_resnet50_fpn",
    "fasterrcnn_resnet50_fpn_v2",
    "retinanet_resnet50_fpn",
    "retinanet_resnet50_fpn_v2",
    "fcos_resnet50_fpn",
)
KNOWN = (
    *TORCHVISION,
    "mmdetection/faster_rcnn",
    "mmdetection/cascade_rcnn",
    "mmdetection/retinanet",
    "mmdetection/fcos",
    "mmdetection/atss",
    "mmdetection/gfl",
    "detectron2/faster_rcnn",
    "detectron2/retinanet",
)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="convert_weights",
        description="Turn a detector that torchvision, mmdetection or detectron2 trained into a checkpoint of ours.",
    )
    parser.add_argument("weights", type=Path, help=".pth, .safetensors or (detectron2) .pkl file")
    parser.add_argument(
        "--from", dest="source", choices=KNOWN, required=True, metavar="NETWORK", help=f"one of {', '.join(KNOWN)}"
    )
    parser.add_argument("--out", type=Path, required=True, help="the checkpoint to write")
    parser.add_argument(
        "--classes", nargs="+", metavar="NAME", help="names of the classes; default: the file's own, or COCO's 80"
    )
    parser.add_argument(
        "--norm-eps",
        type=float,
        help="epsilon of the batch norms of a torchvision file, default 1e-5; 0 for its COCO_V1 files of Faster R-CNN"
        " and RetinaNet",
    )
    parser.add_argument(
        "--style",
        choices=("pytorch", "caffe"),
        help="of the backbone of an mmdetection file that does not tell; default: what its published files have",
    )
    options = parser.parse_args(arguments)
    if options.norm_eps is not None and options.source not in TORCHVISION:
        parser.error("--norm-eps is for torchvision's files alone")
    if options.style is not None and not options.source.startswith("mmdetection/"):
        parser.error("--style is for mmdetection's files alone")
    return run_command(lambda: _convert(options))


def _convert(options: argparse.Namespace) -> None:
    from detector.convert import detectron2, mmdetection, torchvision
    from detector.train.checkpoint import save_checkpoint

    path, source, classes = options.weights, options.source, options.classes
    if source in TORCHVISION:
        eps = torchvision.EPS if options.norm_eps is None else options.norm_eps
        content, said = torchvision.convert(path, source, classes, eps)
    elif source.startswith("mmdetection/"):
        content, said = mmdetection.convert(path, source, classes, options.style)
    else:
        content, said = detectron2.convert(path, source, classes)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    save_checkpoint(options.out, content)
    print("\n".join([*said, f"written: {options.out}"]))
