"""An analysis as tables, the same for the terminal and for the page."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from rich.markup import escape
from rich.table import Table as RichTable

from detector.evaluate.survey import ASPECTS, SIZES
from detector.lab.dataset.analysis import Analysis
from detector.lab.dataset.describe import Facts, Numbers
from detector.lab.dataset.overlap import THRESHOLDS
from detector.lab.tables import Table

MOST_CLASSES = 30
MOST_PAIRS = 12
SHOWN = ("least", "1 %", "5 %", "25 %", "median", "75 %", "95 %", "99 %", "most", "mean")


def overview(found: Analysis) -> Table:
    rows = []
    for facts in found.facts:
        of = f" of {facts.images_in_file}" if facts.images < facts.images_in_file else ""
        rows.append(
            (facts.name, f"{facts.images}{of}", str(facts.empty_images), str(facts.objects), str(facts.crowd_regions),
             _number(facts.per_image.get("mean", 0.0)), _number(facts.per_image.get("median", 0.0)),
             _number(facts.per_image.get("most", 0.0)))
        )  # fmt: skip
    columns = ("split", "images", "without objects", "objects", "crowd regions", "an image: mean", "median", "most")
    return Table("Images and objects", columns, tuple(rows))


def classes(found: Analysis) -> Table:
    """By falling number of objects in the first split; the rest in the JSON document."""
    first = found.facts[0]
    order = sorted(range(len(first.classes)), key=lambda k: -first.classes[k].objects)
    rows = []
    for k in order[:MOST_CLASSES]:
        mine = first.classes[k]
        shares = [f"{f.classes[k].objects} ({f.classes[k].share:.1%})" for f in found.facts]
        rows.append((mine.name, *shares, f"{mine.images} ({mine.image_share:.0%})", _number(mine.per_image),
                     _number(mine.side), _number(mine.aspect)))  # fmt: skip
    note = f", the {MOST_CLASSES} most frequent of {len(order)}" if len(order) > MOST_CLASSES else ""
    columns = ("class", *(f"{f.name}: objects" for f in found.facts), "images", "in one that has it", "median side",
               "median w/h")  # fmt: skip
    return Table(f"Classes (images and what follows: {first.name}){note}", columns, tuple(rows))


def together(facts: Facts) -> Table:
    pairs = [
        (int(facts.together[a, b]), a, b)
        for a in range(len(facts.classes))
        for b in range(a + 1, len(facts.classes))
        if facts.together[a, b]
    ]
    rows = []
    for count, a, b in sorted(pairs, key=lambda p: (-p[0], p[1], p[2]))[:MOST_PAIRS]:
        one, other = facts.classes[a], facts.classes[b]
        of = (f"{count / one.images:.0%}", f"{count / other.images:.0%}")
        rows.append((f"{one.name}, {other.name}", str(count), *of))
    columns = ("classes", "images with both", "of those with the first", "of those with the second")
    return Table(f"{facts.name}: classes that occur together most", columns, tuple(rows))


def sizes(found: Analysis) -> Table:
    rows = []
    for f in found.facts:
        numbers = {
            "side": f.side,
            "width": f.width,
            "height": f.height,
            "side after the resize": f.resized_side,
            "side, % of the image's": _times(f.relative_side, 100),
            "width / height": f.aspect,
            "objects an image": f.per_image,
        }
        for name, values in numbers.items():
            if values:
                rows.append((f"{f.name}: {name}", *(_number(values[key]) for key in SHOWN)))
    return Table("Boxes: side is the square root of the area, in pixels", ("what", *SHOWN), tuple(rows))


def shares(found: Analysis) -> Table:
    names = {"small": "small", "medium": "medium", "large": "large"} | {n: f"long/short {n}" for n in ASPECTS}
    rows = []
    for f in found.facts:
        counts = f.coco | f.elongation
        rows.append((f.name, *(f"{counts[n]} ({counts[n] / max(1, f.objects):.1%})" for n in names)))
    title = "COCO's sizes (by annotated area: below 32², below 96², above), and shapes"
    return Table(title, ("split", *names.values()), tuple(rows))


def overlap(found: Analysis) -> Table:
    rows = []
    for f in found.facts:
        c = f.crowding
        rows.append((f.name, *(f"{c.above(t):.1%}" for t in THRESHOLDS),
                     *(f"{c.above(t, same_class=True):.1%}" for t in THRESHOLDS[1:]), f"{c.contested:.1%}",
                     f"{c.pairs_per_image:.2f}", f"{f.at_edge:.1%}"))  # fmt: skip
    columns = ("split", *(f"IoU > {t}" for t in THRESHOLDS), *(f"same class > {t}" for t in THRESHOLDS[1:]),
               "centre in another", "pairs an image", "at the edge")  # fmt: skip
    return Table("Overlap: share of objects by the highest IoU with another of their image", columns, tuple(rows))


def images(found: Analysis) -> Table:
    rows = []
    for f in found.facts:
        shown = [f"{w}x{h} ({n})" for h, w, n in f.image_sizes[:4]]
        more = len(f.image_sizes) - 4
        kinds = {} if found.seen is None else found.seen.kinds[f.name]
        rows.append(
            (f.name, _range(f.image_width), _range(f.image_height),
             ", ".join(shown) + (f" and {more} more" if more > 0 else ""),
             ", ".join(f"{k} ({n})" for k, n in kinds.items()) or "–",
             "–" if found.seen is None else str(len(found.seen.unreadable[f.name])))
        )  # fmt: skip
    columns = ("split", "widths", "heights", "most frequent, width x height", "kinds", "unreadable")
    return Table("Images", columns, tuple(rows))


def duplicates(found: Analysis) -> Table | None:
    """How many images of each split look like one of each (of another image, within the split)."""
    if found.seen is None:
        return None
    rows = []
    for s, split in enumerate(found.splits):
        cells = [str(found.seen.within[s]) if s == o else str(found.seen.twins.get((s, o), 0))
                 for o in range(len(found.splits))]  # fmt: skip
        rows.append((split.name, str(len(split.images)), *cells))
    return Table("Images that look like another one (within their own split: like an earlier one)",
                 ("split", "images", *(f"like one of {s.name}" for s in found.splits)), tuple(rows))  # fmt: skip


def anchors(found: Analysis) -> Table:
    rows = []
    for k, (means, medoids) in enumerate(zip(found.anchors.means, found.anchors.medoids, strict=True), 1):
        rows.append((str(k), f"{means.mean_iou:.3f}", f"{means.recall:.1%}", f"{medoids.mean_iou:.3f}",
                     f"{medoids.recall:.1%}"))  # fmt: skip
    return Table("Anchors by number: IoU with the best, both boxes centred; share of objects at 0.5 or more",
                 ("k", "k-means: mean IoU", "at 0.5", "k-medoids: mean IoU", "at 0.5"), tuple(rows))  # fmt: skip


def anchor_sizes(found: Analysis) -> Table:
    rows = []
    for stride, means, medoids in zip(
        found.settings.strides, *(_by_level(f[-1].sizes, len(found.settings.strides)) for f in
                                  (found.anchors.means, found.anchors.medoids)), strict=True
    ):  # fmt: skip
        rows.append((str(stride), means, medoids))
    return Table(f"The {found.settings.k} anchors, width x height in pixels after the resize, spread over the strides",
                 ("stride", "k-means", "k-medoids"), tuple(rows))  # fmt: skip


def reach(found: Analysis) -> Table:
    names = [n for n in SIZES if any(n in r.by_size for r in found.reach)]
    rows = []
    for r in found.reach:
        by_size = [f"{r.by_size[n]:.1%}" if n in r.by_size else "–" for n in names]
        rows.append((r.priors, r.rule, f"{r.recall:.1%}", *by_size, _number(r.positives)))
    columns = ("priors", "rule", "all", *names, "positives an object")
    return Table("The same by the objects' side after the resize, and how many priors learn each", columns, tuple(rows))


def reach_by_rule(found: Analysis) -> Table:
    sets = list(dict.fromkeys(r.priors for r in found.reach))
    recall = {(r.rule, r.priors): f"{r.recall:.1%}" for r in found.reach}
    rules = dict.fromkeys(r.rule for r in found.reach)
    return Table(f"Best possible recall: share of the objects in {found.reach_images} images of {found.splits[0].name}"
                 " that some prior learns", ("rule", *sets),
                 tuple((rule, *(recall[rule, name] for name in sets)) for rule in rules))  # fmt: skip


def advised(found: Analysis) -> Table:
    a = found.advice
    rows = [
        (str(s.stride), f"{s.short} / {s.long}", f"x {s.enlargement:.2f}", f"{s.megapixels:.2f}", f"{s.share:.1%}")
        for s in a.sizes
    ]
    return Table(
        f"Input at which {a.wanted:.0%} of the objects have a side of at least {a.cells:g} cells of the finest level",
        ("finest stride", "short / long", "enlarges", "megapixels", "objects within reach"),
        tuple(rows),
    )


def advice_text(found: Analysis) -> str:
    a = found.advice
    reach = f"{a.chosen.share:.0%} of the objects have a side of at least {a.cells * a.chosen.stride:g} pixels"
    return (
        f"data.resize={a.resize} with strides {', '.join(map(str, a.strides))}: {reach} there ({a.cells:g} cells of"
        f" stride {a.chosen.stride}), and {a.wanted:.0%} one of at most {a.largest:.0f} ({8 * a.strides[-1]} is 8"
        " strides of the coarsest level)."
    )


def rich(table: Table, text_columns: int = 1) -> RichTable:
    shown = RichTable(title=table.title, title_justify="left")
    for i, column in enumerate(table.columns):
        shown.add_column(column, justify="left" if i < text_columns else "right", overflow="fold")
    for row in table.rows:
        shown.add_row(*map(escape, row))
    return shown


def text_columns(table: Table) -> int:
    """How many columns from the left hold words."""
    count = 0
    while count < len(table.columns) and table.columns[count] in ("split", "class", "classes", "what", "priors", "rule",
                                                                  "stride", "k-means", "k-medoids"):  # fmt: skip
        count += 1
    return count


def sections(found: Analysis) -> dict[str, list[Table]]:
    """All tables by the page's sections, in its order."""
    pairs = together(found.facts[0])
    like = duplicates(found)
    every: list[tuple[str, list[Callable[[], Table]]]] = [
        ("Advice", [lambda: advised(found)]),
        ("Classes", [lambda: classes(found)]),
        ("Boxes", [lambda: sizes(found), lambda: shares(found)]),
        ("Overlap", [lambda: overlap(found)]),
        ("Images", [lambda: images(found)]),
        ("Anchors", [lambda: anchors(found), lambda: anchor_sizes(found)]),
        ("Rules", [lambda: reach_by_rule(found), lambda: reach(found)]),
    ]
    made = {"Splits": [overview(found)]} | {name: [make() for make in makers] for name, makers in every}
    if pairs.rows:
        made["Classes"].append(pairs)
    if like is not None:
        made["Images"].append(like)
    return made


def _by_level(sizes: np.ndarray, levels: int) -> list[str]:
    parts = np.array_split(sizes, levels)
    return [", ".join(f"{w:.0f} x {h:.0f}" for w, h in part) for part in parts]


def _number(value: float) -> str:
    return f"{value:.0f}" if abs(value) >= 100 or value == int(value) else f"{value:.3g}"


def _times(values: Numbers, factor: float) -> Numbers:
    return {name: factor * value for name, value in values.items()}


def _range(values: Numbers) -> str:
    return (
        f"{values['least']:.0f} to {values['most']:.0f}"
        if values["least"] < values["most"]
        else f"{values['most']:.0f}"
    )


def resize_text(found: Analysis) -> str:
    resize = found.settings.resize
    if resize is None:
        return "none"
    values = resize.model_dump(mode="json", exclude={"type", "multi_scale"})
    return f"{resize.type} {', '.join(str(v) for v in values.values())}"
