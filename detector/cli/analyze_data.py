"""`detector-analyze-data`: what is in a data set, and which input size, strides and anchors suit it."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from detector.cli.common import Progress, run_command

if TYPE_CHECKING:
    from detector.config.run import RunConfig
    from detector.data.config import Resize
    from detector.lab.dataset.analysis import Analysis, Settings
    from detector.lab.dataset.split import Split

_WIDE = 200  # columns of the tables in a file or a pipe
_PARTS = ("train", "val", "test")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="analyze_data",
        description="Classes, boxes, overlap, images that look alike, anchors with the best recall each rule of label"
        " assignment could have, advised input size and strides: as tables and as one HTML page.",
        epilog="Sources: one COCO file for each split, the one that is trained on first, with --images; or a recipe,"
        " whose data, resize, strides, priors and rule are taken (with key=value after it).",
    )
    parser.add_argument("sources", nargs="+", metavar="FILE.json|RECIPE", help="annotation files, or one recipe")
    parser.add_argument("--images", type=Path, nargs="+", metavar="DIR", help="image folder, of all or of each file")
    parser.add_argument("--no-images", action="store_true", help="leave image files alone: no kinds, no copies")
    parser.add_argument("--splits", nargs="+", metavar="NAME", help="names of the files; of a recipe: which to take")
    parser.add_argument(
        "--resize", nargs="+", metavar="X", help="'short_edge 800 1333', 'letterbox 640 640' or 'fixed 640 640' (height"
        " width), or 'none'; default: the recipe's, or short_edge 800 1333",
    )  # fmt: skip
    parser.add_argument("--strides", type=_positive, nargs="+", metavar="S", help="default: the recipe's, or 8 to 128")
    parser.add_argument("--anchors", type=_positive, metavar="K", help="default: three for each stride")
    parser.add_argument("--share", type=_share, default=0.95, help="of objects that the advised size is for (0.95)")
    parser.add_argument("--cells", type=_factor, default=2.0, help="of the finest level, that their side spans (2)")
    parser.add_argument("--max-images", type=_positive, metavar="N", help="of each split, drawn at random")
    parser.add_argument("--rule-images", type=_positive, default=100, metavar="N", help="for the rules' recall (100)")
    parser.add_argument("--distance", type=int, choices=range(17), default=8, metavar="BITS",
                        help="of 64, by which hashes of images that look alike may differ, at most 16 (8)")  # fmt: skip
    parser.add_argument("--seed", type=int, default=0, help="of what is drawn: images, anchors (0)")
    parser.add_argument("--html", type=Path, metavar="FILE", help="write the page here")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all numbers here")
    options = parser.parse_intermixed_args(arguments)
    files = [s for s in options.sources if s.endswith(".json")]
    if files and len(files) < len(options.sources):
        parser.error("give annotation files (.json) or one recipe with key=value, not both")
    if files and options.images is None and not options.no_images:
        parser.error("give the image folder by --images DIR, or --no-images")
    if not files and options.images is not None:
        parser.error("--images goes with annotation files; a recipe says where its images are")
    if options.seed < 0:
        parser.error("--seed: expected at least 0")
    return run_command(lambda: _run(options, [Path(f) for f in files]))


def _run(options: argparse.Namespace, files: list[Path]) -> int:
    import json

    import cv2

    from detector.files import write_whole
    from detector.lab.dataset.analysis import analyse

    cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)  # the report says it, in better words
    title, splits, settings = _of_files(options, files) if files else _of_recipe(options)
    with Progress() as progress:
        found = analyse(title, splits, settings, progress.start)
    _show(found)
    if options.html is not None:
        from detector.lab.dataset.page import page

        write_whole(options.html, page(found).encode())
        print(f"{options.html}: written")
    if options.json is not None:
        write_whole(options.json, (json.dumps(found.as_json(), indent=1, allow_nan=False) + "\n").encode())
        print(f"{options.json}: written")
    return 0


def _of_files(options: argparse.Namespace, files: list[Path]) -> tuple[str, list[Split], Settings]:
    from detector.data.config import ShortEdge
    from detector.data.index import CocoIndex
    from detector.errors import ConfigError
    from detector.lab.dataset.analysis import Settings
    from detector.lab.dataset.split import Split

    names = options.splits or [f.stem for f in files]
    if len(names) != len(files):
        raise ConfigError(f"--splits: {len(names)} names for {len(files)} annotation files, expected one for each")
    if len(set(names)) < len(names):
        twice = next(n for n in names if names.count(n) > 1)
        raise ConfigError(f"two splits are called {twice!r}: name them by --splits, one name for each file")
    folders = options.images or [f.parent for f in files]
    if len(folders) not in (1, len(files)):
        raise ConfigError(
            f"--images: {len(folders)} folders for {len(files)} annotation files, expected one or as many"
        )
    folders = folders * len(files) if len(folders) == 1 else folders
    splits = [
        Split.of(name, CocoIndex.load(file, folder), options.max_images, options.seed)
        for name, file, folder in zip(names, files, folders, strict=True)
    ]
    resize = ShortEdge() if options.resize is None else _resize(options.resize)
    strides = tuple(options.strides or (8, 16, 32, 64, 128))
    title = f"{files[0].parent.parent.name or files[0].parent.name}: {', '.join(names)}"
    return title, splits, _settings(options, Settings(resize=resize, strides=_rising(strides)))


def _of_recipe(options: argparse.Namespace) -> tuple[str, list[Split], Settings]:
    from detector.config.load import load_config
    from detector.data.config import CocoFiles
    from detector.errors import ConfigError
    from detector.lab.dataset.analysis import Settings
    from detector.lab.dataset.split import Split

    recipe, overrides = Path(options.sources[0]), options.sources[1:]
    wrong = next((o for o in overrides if "=" not in o), None)
    if wrong is not None:
        raise ConfigError(f"{wrong!r}: expected key=value after the recipe {recipe}")
    config = load_config(recipe, overrides)
    lacking = isinstance(config.data, CocoFiles) and config.data.test is None
    names = options.splits or [p for p in _PARTS if not (p == "test" and lacking)]
    for name in names:
        if name not in _PARTS:
            raise ConfigError(f"--splits {name}: a recipe has the splits {', '.join(_PARTS)}")
    splits = [Split.of(n, config.data.open(n).index, options.max_images, options.seed) for n in dict.fromkeys(names)]
    resize = config.data.resize if options.resize is None else _resize(options.resize)
    own, priors = _grid(config)
    settings = Settings(
        resize=resize,
        strides=_rising(tuple(options.strides or own)),
        priors=priors,  # type: ignore[arg-type]
        rule=config.assigner,
        pad_multiple=config.data.pad_multiple,
    )
    return config.name, splits, _settings(options, settings)


def _grid(config: RunConfig) -> tuple[tuple[int, ...], object]:
    """Strides and priors of the recipe's dense head or RPN; the network's weights stay random."""
    from detector.errors import ConfigError
    from detector.models.dense import DenseDetector

    model = config.model.build(1, load_weights=False)
    if isinstance(model, DenseDetector):
        return tuple(model.head.strides), model.head.config.priors
    if model.rpn is None:
        raise ConfigError(
            "model.rpn is null: a detector on given proposals has no grid of priors; take a recipe with an RPN, or a"
            " dense one"
        )
    head = model.rpn.head
    return tuple(head.strides), head.config.priors


def _settings(options: argparse.Namespace, base: Settings) -> Settings:
    from dataclasses import replace

    return replace(
        base,
        anchors=options.anchors,
        images_for_rules=options.rule_images,
        distance=options.distance,
        share=options.share,
        cells=options.cells,
        seed=options.seed,
        look_at_images=not options.no_images,
    )


def _resize(words: list[str]) -> Resize | None:
    """
    Raises:
        ConfigError: it is not written as expected.
    """
    from detector.data.config import ShortEdge
    from detector.data.resize import Fixed, Letterbox
    from detector.errors import ConfigError

    kinds = ("short_edge", "letterbox", "fixed")
    numbers = [int(w) for w in words[1:] if w.isdigit()]
    if words == ["none"]:
        return None
    if words[0] not in kinds or len(words) != 3 or len(numbers) != 2 or not all(1 <= n <= 16384 for n in numbers):
        raise ConfigError(
            f"--resize {' '.join(words)}: expected one of {', '.join(kinds)} and two numbers of pixels from 1 to 16384,"
            " such as 'short_edge 800 1333', or 'none'"
        )
    first, second = numbers
    if words[0] == "short_edge":
        return ShortEdge(short=first, long=second)
    return Letterbox(size=(first, second)) if words[0] == "letterbox" else Fixed(size=(first, second))


def _rising(strides: tuple[int, ...]) -> tuple[int, ...]:
    from detector.errors import ConfigError

    if list(strides) != sorted(set(strides)):
        raise ConfigError(f"--strides {' '.join(map(str, strides))}: expected rising numbers, fine to coarse")
    return strides


def _show(found: Analysis) -> None:
    from rich.console import Console

    from detector.lab.dataset import tables

    console = Console()
    if not console.is_terminal:
        console = Console(width=_WIDE)
    for every in tables.sections(found).values():
        for table in every:
            console.print(tables.rich(table, tables.text_columns(table)))
    for note in found.notes():
        print(f"note: {note}")
    print(f"advice: {tables.advice_text(found)}")


def _positive(text: str) -> int:
    if (number := int(text)) < 1:
        raise argparse.ArgumentTypeError("expected at least 1")
    return number


def _share(text: str) -> float:
    if not 0 < (number := float(text)) < 1:
        raise argparse.ArgumentTypeError("expected a number between 0 and 1")
    return number


def _factor(text: str) -> float:
    if not 0 < (number := float(text)) <= 100:
        raise argparse.ArgumentTypeError("expected a number above 0, at most 100")
    return number
