"""`detector-measure-data`: mean and deviation of a set's pixels, as YAML for a recipe."""

from __future__ import annotations

import argparse
from pathlib import Path

from detector.cli.common import run_command


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="measure_data",
        description="Measure mean and deviation of every channel over a recipe's training images, exactly, and print"
        " the section that normalises by them.",
        epilog="What goes to standard output is YAML to paste into the recipe; the rest goes to standard error.",
    )
    parser.add_argument("recipe", type=Path, help="a recipe file, or the name of one that ships with the package")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="data.pixels.channels=5 data.pixels.bits=16")
    parser.add_argument("--split", choices=["train", "val", "test"], default="train", help="(train)")
    options = parser.parse_intermixed_args(arguments)
    return run_command(lambda: _run(options))


def _run(options: argparse.Namespace) -> int:
    from rich.console import Console
    from rich.progress import track

    from detector.config.load import load_config
    from detector.data.measure import measure

    config = load_config(options.recipe, options.overrides)
    pixels = config.data.pixels
    console = Console(stderr=True)
    found = measure(
        config.data.open(options.split),
        pixels,
        lambda places: track(places, f"{options.split}: measuring", console=console, transient=True),
    )
    for line in found.unreadable:
        console.print(f"left out: {line}", highlight=False, soft_wrap=True)
    low, high = found.percentile(0), found.percentile(100)
    console.print(
        f"{found.images} images, {found.pixels} pixels of {pixels.channels} channels; least values {low}, 1st"
        f" percentiles {found.percentile(1)}, 99th {found.percentile(99)}, largest {high}",
        highlight=False,
        soft_wrap=True,
    )
    print(found.as_yaml(pixels), end="")
    return 0
