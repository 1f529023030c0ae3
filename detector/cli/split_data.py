"""`detector-split-data`: one COCO file to train, val and test files, stratified by class and grouped by a key."""

from __future__ import annotations

import argparse
import math
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from detector.cli.common import run_command

if TYPE_CHECKING:
    from detector.data.formats.split import Split

_WIDE = 200  # columns of the table in a file or a pipe


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="split_data",
        description="Part a COCO file so that every part has its share of every class.",
        epilog="Equal file, shares, grouping and seed give equal parts. Image files stay where they are.",
    )
    parser.add_argument("annotations", type=Path, help="COCO annotation file (json)")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="for train.json, val.json and so on")
    parser.add_argument(
        "--shares",
        nargs="+",
        default=["train=0.8", "val=0.1", "test=0.1"],
        metavar="NAME=SHARE",
        help="parts and their shares, which add up to 1 (train=0.8 val=0.1 test=0.1)",
    )
    together = parser.add_mutually_exclusive_group()
    together.add_argument(
        "--group",
        metavar="REGEX",
        help="images stay together whose file names give the same match (of the first parentheses, if there are any),"
        " such as '^clip[0-9]+'",
    )
    together.add_argument("--group-field", metavar="KEY", help="images of equal KEY stay together, such as video_id")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="where several divisions are as good (0)")
    parser.add_argument("--force", action="store_true", help="replace files that are there already")
    options = parser.parse_args(arguments)
    shares = _shares(options.shares)
    if shares is None:
        parser.error(
            "--shares: expected two or more NAME=SHARE, all above 0 and together 1, found " + " ".join(options.shares)
        )
    if options.seed < 0:
        parser.error("--seed: expected at least 0")
    return run_command(lambda: _run(options, shares))


def _shares(texts: list[str]) -> dict[str, float] | None:
    """None where they are not what is expected."""
    pairs = [re.fullmatch(r"(\w[\w.-]*)=([0-9.]+)", text) for text in texts]
    try:
        shares = {pair[1]: float(pair[2]) for pair in pairs if pair is not None}
    except ValueError:
        return None
    good = (
        len(shares) == len(texts) > 1
        and min(shares.values()) > 0
        and math.isclose(sum(shares.values()), 1, abs_tol=1e-6)
    )
    return shares if good else None


def _run(options: argparse.Namespace, shares: dict[str, float]) -> int:
    from detector.data.formats import coco
    from detector.data.formats.convert import refuse_existing
    from detector.data.formats.split import group_keys, split
    from detector.errors import DataError
    from detector.files import write_whole

    document = coco.read_document(options.annotations)
    if not document.get("annotations"):
        raise DataError(f"{options.annotations}: has no annotations, expected some to stratify by")
    keys = group_keys(document["images"], options.group, options.group_field)
    try:
        result = split(document, shares, keys, options.seed)
    except DataError as error:
        raise DataError(f"{options.annotations}: {error}") from None
    targets = [options.out / f"{name}.json" for name in result.parts]
    if any(target.exists() and target.samefile(options.annotations) for target in targets):
        raise DataError(f"{options.annotations}: would be replaced by a part of itself; choose another --out")
    refuse_existing(targets, options.force)
    for s, target in enumerate(targets):
        grouping = options.group or options.group_field
        origin = {"file": options.annotations.name, "part": result.parts[s], "shares": shares, "seed": options.seed}
        write_whole(target, coco.as_bytes(result.document(document, s, {"split": {**origin, "grouped_by": grouping}})))
    _show(result)
    for sentence in result.small:
        print(f"warning: {sentence}", file=sys.stderr)
    print("\n".join(f"{target}: written" for target in targets))
    return 0


def _show(result: Split) -> None:
    """Of each class: in how many images and objects of each part, and the share of its objects there."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table(header_style="bold")
    table.add_column("class", overflow="fold")
    for name, share in zip(result.parts, result.shares, strict=True):
        table.add_column(f"{escape(name)} ({100 * share:g} %)\nimages", justify="right")
        table.add_column("\nobjects", justify="right")
        table.add_column("\nshare", justify="right")
    totals = [int((result.part == s).sum()) for s in range(len(result.parts))]
    rows = [("all images", [(n, int(result.objects[s].sum())) for s, n in enumerate(totals)])]
    for k, name in enumerate(result.classes):
        rows.append((name, [(int(result.images[s, k]), int(result.objects[s, k])) for s in range(len(totals))]))
    for name, cells in rows:
        whole = max(1, sum(images for images, _ in cells))
        shown = [c for n, objects in cells for c in (str(n), str(objects), f"{100 * n / whole:.1f} %")]
        table.add_row(escape(name), *shown, end_section=name == "all images")
    console = Console()
    (console if console.is_terminal else Console(width=_WIDE)).print(table)
    groups = ", ".join(f"{name} {n}" for name, n in zip(result.parts, result.groups.tolist(), strict=True))
    print(f"groups: {groups}; the share is that of the images that hold the class")
