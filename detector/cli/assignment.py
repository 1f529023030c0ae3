"""`detector-assignment`: what rules do, as numbers and as pictures, without training."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from detector.cli.common import run_command

if TYPE_CHECKING:
    from detector.config.run import RunConfig
    from detector.lab.offline import RuleStatistics


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="assignment", description="What rules of label assignment do.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    stats = commands.add_parser("stats", help="numbers over many images: positives by size, class, level; agreement")
    stats.add_argument("recipe", type=Path, help="a recipe file or name: data, sizes, priors")
    stats.add_argument("overrides", nargs="*", metavar="key=value")
    stats.add_argument("--images", type=int, default=100, metavar="N", help="of the split, evenly spaced (100)")
    stats.add_argument("--json", type=Path, metavar="FILE", help="write all numbers here")
    show = commands.add_parser("show", help="a picture: the priors that learn each object, by rule and level")
    show.add_argument("image", help="file or id of an image of the recipe's data")
    show.add_argument("overrides", nargs="*", metavar="key=value")
    show.add_argument("--recipe", type=Path, default=Path("quickstart"), help="data, sizes, priors (quickstart)")
    show.add_argument("--annotations", type=Path, metavar="FILE", help="COCO file of the image, in place of the data's")
    show.add_argument("--out", type=Path, default=Path("assignment.png"), metavar="FILE", help="(assignment.png)")
    show.add_argument("--panel", type=int, default=300, metavar="PIXELS", help="width of a panel (300)")
    for command in (stats, show):
        command.add_argument("--rules", metavar="A,B,...", help="names of rules (default: the recipe's)")
        command.add_argument("--split", choices=["train", "val", "test"], default="val")
        command.add_argument(
            "--checkpoint", type=Path, action="append", default=[], metavar="FILE",
            help="network for rules that look at predictions; `stats` takes several, for the share of pairs that change"
            " from one to the next",
        )  # fmt: skip
    # Overrides may also come after options, which argparse does not allow below subcommands.
    options, rest = parser.parse_known_args(arguments)
    unknown = [text for text in rest if text.startswith("-") or "=" not in text]
    if unknown:
        parser.error(f"unrecognized argument: {unknown[0]}")
    options.overrides = [*options.overrides, *rest]
    for name in ("images", "panel"):
        if getattr(options, name, 1) < 1:
            parser.error(f"--{name}: expected at least 1")
    if options.command == "show" and len(options.checkpoint) > 1:
        parser.error("show takes one --checkpoint")
    return run_command(lambda: _stats(options) if options.command == "stats" else _show(options))


def _names(options: argparse.Namespace, config: RunConfig) -> list[str]:
    from detector.errors import ConfigError

    own = config.assigner
    if own is None:
        raise ConfigError(
            f"{options.recipe}: criterion {config.criterion.type!r} matches priors to objects by itself, so there is no"
            " rule to look at: name a recipe with a rule"
        )
    names = [name.strip() for name in (options.rules or own.type).split(",") if name.strip()]
    if not names:
        raise ConfigError(f"--rules {options.rules!r}: names no rule; give names such as --rules {own.type},fcos")
    return list(dict.fromkeys(names))


def _stats(options: argparse.Namespace) -> int:
    import json

    import numpy as np
    from rich.console import Console

    from detector.config.load import load_config
    from detector.evaluate.treatment import agreement
    from detector.files import write_whole
    from detector.lab.offline import RuleStatistics, assign, network, rules_of, scenes

    config = load_config(options.recipe, options.overrides)
    rules = rules_of(options.recipe, options.overrides, _names(options, config))
    data = config.data.open(options.split)
    images = np.linspace(0, len(data) - 1, min(options.images, len(data))).round().astype(int).tolist()
    classes = data.index.classes
    statistics = RuleStatistics(rules)
    for scene in scenes(*network(config, classes, next(iter(options.checkpoint[-1:]), None)), config, data, images):
        statistics.add(scene)
    changes: dict[str, list[float]] = {name: [] for name in rules}
    for before, after in zip(options.checkpoint, options.checkpoint[1:], strict=False):
        sets = [scenes(*network(config, classes, path), config, data, images) for path in (before, after)]
        shares: dict[str, list[float]] = {name: [] for name in rules}
        for one, other in zip(*sets, strict=True):
            found = assign(rules, one), assign(rules, other)
            for name in rules:
                shares[name].append(1 - agreement(found[0][name], found[1][name]))
        for name, values in shares.items():
            changes[name].append(float(np.mean(values)))
    console = Console()
    console = console if console.is_terminal else Console(width=160)
    _print(statistics, classes, console)
    for name, flips in changes.items():
        if flips:
            print(f"{name}: pairs that change from checkpoint to checkpoint: " + ", ".join(f"{f:.3f}" for f in flips))
    if options.json is not None:
        content = {
            "images": len(images),
            "rules": statistics.result(classes),
            "agreement": {f"{a},{b}": value for (a, b), value in statistics.agreement().items()},
            "flips": changes,
        }
        write_whole(options.json, (json.dumps(content, indent=1) + "\n").encode())
    return 0


def _print(statistics: RuleStatistics, classes: tuple[str, ...], console: object) -> None:
    from rich.table import Table

    result = statistics.result(classes)
    columns = {
        "positives_per_object": "positives/object", "without_positive": "without any", "contested": "contested",
        "shared": "shared", "quality": "quality", "iou_of_positives": "IoU of positives",
        "best_unassigned_iou": "best unassigned IoU", "entropy": "entropy",
    }  # fmt: skip
    for kind in ("all", "size", "aspect", "class"):
        table = Table(title=f"by {kind}" if kind != "all" else "all objects", title_justify="left")
        for name in ("rule", kind, "objects", *columns.values()):
            table.add_column(name, justify="left" if name in ("rule", kind) else "right")
        for rule, groups in result.items():
            for group, numbers in groups[kind].items():
                cells = [f"{numbers[key]:.3f}" for key in columns]
                table.add_row(rule, group, f"{numbers['objects']:.0f}", *cells)
        console.print(table)  # type: ignore[attr-defined]
    for rule, groups in result.items():
        shares = ", ".join(f"{numbers['share_of_positives']:.1%}" for numbers in groups["level"].values())
        print(f"{rule}: share of positives by level, fine to coarse: {shares}")
    for (one, other), value in statistics.agreement().items():
        print(f"{one} and {other}: {value:.1%} of the pairs that either makes are made by both")


def _show(options: argparse.Namespace) -> int:
    from detector import draw
    from detector.config.load import load_config
    from detector.lab.offline import assign, find_image, network, rules_of, scenes
    from detector.lab.pictures import rule_sheet

    config = load_config(options.recipe, options.overrides)
    rules = rules_of(options.recipe, options.overrides, _names(options, config))
    data, image = find_image(options.image, config, options.split, options.annotations)
    model, trained = network(config, data.index.classes, next(iter(options.checkpoint), None))
    scene = next(scenes(model, trained, config, data, [image]))
    found = assign(rules, scene)
    draw.write(options.out, rule_sheet(scene.batch, scene.priors, found, data.index.classes, options.panel))
    for name, assignment in found.items():
        print(f"{name}: {int((assignment.weight > 0).sum())} pairs for {len(scene.batch.objects)} objects")
    print(f"{options.out}: written")
    return 0
