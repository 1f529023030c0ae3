"""`detector-make-shapes`: writes a generated COCO-format set."""

from __future__ import annotations

import argparse
from pathlib import Path

from detector.cli.common import run_command


def main(arguments: list[str] | None = None) -> int:
    from detector.data.shape_suites import SUITES  # numpy only

    about = "\n".join(f"  {name:10s} {suite.about}" for name, suite in SUITES.items())
    parser = argparse.ArgumentParser(
        prog="make_shapes",
        description="Write a COCO-format set of generated pictures: OUT/annotations.json and OUT/images/.",
        epilog=f"suites:\n{about}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--suite", choices=list(SUITES), default="plain", help="what the pictures hold (plain)")
    parser.add_argument("--out", type=Path, required=True, help="folder of the set; an older generated one gives way")
    parser.add_argument("--images", type=_count, default=200, help="how many (200)")
    parser.add_argument("--size", type=_size, default=(240, 320), metavar="HxW", help="height x width (240x320)")
    parser.add_argument("--seed", type=_seed, default=0, help="equal settings and seed give equal bytes (0)")
    parser.add_argument(
        "--part",
        type=_seed,
        default=0,
        help="sets of one seed but different parts share no picture (0)",
    )
    options = parser.parse_args(arguments)
    return run_command(lambda: _write(options))


def _write(options: argparse.Namespace) -> int:
    from detector.data.shapes import ShapeSet, ensure

    ensure(options.out, ShapeSet(options.suite, options.images, options.size, options.seed, options.part))
    print(f"{options.out}: {options.images} images of suite {options.suite}")
    return 0


def _count(text: str) -> int:
    if (number := int(text)) < 1:
        raise argparse.ArgumentTypeError("expected at least 1")
    return number


def _seed(text: str) -> int:
    if (number := int(text)) < 0:
        raise argparse.ArgumentTypeError("expected at least 0")
    return number


def _size(text: str) -> tuple[int, int]:
    from detector.data.shapes import SMALLEST_IMAGE

    try:
        height, width = (int(number) for number in text.lower().split("x"))
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected HEIGHTxWIDTH such as 240x320, found {text!r}") from None
    if min(height, width) < SMALLEST_IMAGE:
        raise argparse.ArgumentTypeError(f"expected at least {SMALLEST_IMAGE} pixels either way, found {text!r}")
    return height, width
