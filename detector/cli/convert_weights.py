"""`detector-convert-weights`: a checkpoint of ours from the weights of one of torchvision's detectors."""

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
KNOWN = TORCHVISION


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="convert_weights",
        description="Turn a state dict of torchvision's detectors into a checkpoint of ours.",
    )
    parser.add_argument("weights", type=Path, help=".pth or .safetensors file of the state dict")
    parser.add_argument("--from", dest="architecture", choices=KNOWN, required=True, help="torchvision's name")
    parser.add_argument("--out", type=Path, required=True, help="the checkpoint to write")
    parser.add_argument("--classes", nargs="+", metavar="NAME", help="names of classes 1, 2, ...; default: COCO's 80")
    parser.add_argument(
        "--norm-eps",
        type=float,
        default=1e-5,
        help="epsilon of the batch norms: 0 for torchvision's COCO_V1 files of Faster R-CNN and RetinaNet",
    )
    options = parser.parse_args(arguments)
    return run_command(lambda: _convert(options))


def _convert(options: argparse.Namespace) -> None:
    from detector.convert.torchvision import convert
    from detector.train.checkpoint import save_checkpoint

    content, said = convert(options.weights, options.architecture, options.classes, options.norm_eps)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    save_checkpoint(options.out, content)
    print("\n".join([*said, f"written: {options.out}"]))
