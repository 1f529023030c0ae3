"""An analysis as SVG text that follows the page's light or dark colours."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from detector.lab.dataset.advice import FINEST, Advice, relative_side
from detector.lab.dataset.analysis import Analysis, AnchorFits
from detector.lab.dataset.describe import Facts
from detector.lab.dataset.reach import Reach
from detector.lab.plots import color, svg_text

# Stand for what the page decides; no plot uses these colours otherwise.
INK, FAINT = "#010203", "#030201"
MOST_CLASSES = 20
BINS = 40


@dataclass(frozen=True)
class Plot:
    svg: str
    caption: str


def plots(found: Analysis) -> dict[str, list[Plot]]:
    """By the page's sections."""
    first = found.splits[0].name
    sides = {s.name: np.sqrt(s.sides.prod(1)) for s in found.splits}
    resized = {s.name: np.sqrt(s.resized_sides(found.settings.resize).prod(1)) for s in found.splits}
    relative = {s.name: 100 * f for s in found.splits for f in [np.sqrt(_relative_area(s.sides, s.sizes[s.image]))]}
    aspect = {s.name: s.sides[:, 0] / s.sides[:, 1] for s in found.splits}
    made: dict[str, list[Plot]] = {
        "Advice": [
            Plot(_svg(lambda: _within_reach(relative_side(found.splits[0]), found.advice)),
                 f"Objects of {first} within reach of the finest level, by the input's shorter side."),
        ],
        "Classes": [
            Plot(_svg(lambda: _classes(found.facts)), f"Share of each split's objects, most in {first} first."),
        ],
        "Boxes": [
            Plot(_svg(lambda: _histogram(sides, "side, pixels of the original image", log=True, marks=(32, 96))),
                 "Sides in original pixels; lines: COCO's bounds 32 and 96."),
            Plot(_svg(lambda: _histogram(resized, "side, pixels after the resize", log=True,
                                         marks=found.settings.strides)),
                 "Sides after the resize; lines: the strides."),
            Plot(_svg(lambda: _histogram(relative, "side, % of the image's", log=True)), "Sides relative to images."),
            Plot(_svg(lambda: _histogram(aspect, "width / height", log=True, marks=(1,))), "Shapes."),
            Plot(_svg(lambda: _shapes(found)), f"Widths and heights in {first} after the resize, with the anchors."),
        ],
        "Overlap": [
            Plot(_svg(lambda: _per_image(found)), "Objects an image."),
            Plot(_svg(lambda: _overlap(found.facts)), "Share of objects that overlap another by more than an IoU."),
            *(Plot(_svg(partial(_centers, f)), f"Where objects' centres are in the images of {f.name}.")
              for f in found.facts if f.objects),
        ],
        "Images": [Plot(_svg(lambda: _image_sizes(found)), "Sizes of images; the area of a dot is their number.")],
        "Anchors": [Plot(_svg(lambda: _anchors(found.anchors)), "How well k anchors fit.")],
        "Rules": [Plot(_svg(lambda: _reach(found.reach)), "Objects that no prior learns, by rule and priors.")],
    }  # fmt: skip
    if sum(c.objects > 0 for c in found.facts[0].classes) > 1:
        made["Classes"].append(
            Plot(_svg(lambda: _together(found.facts[0])),
                 f"Of the images of {first} with the class of the row, the share that hold that of the column.")
        )  # fmt: skip
    return made


def _svg(draw: Callable[[], Figure]) -> str:
    """Drawn in stand-in colours, which become the page's."""
    style: Any = {
        **dict.fromkeys(("text.color", "axes.labelcolor", "xtick.color", "ytick.color"), INK),
        **dict.fromkeys(("axes.facecolor", "savefig.facecolor"), "none"),
        **dict.fromkeys(("xtick.labelsize", "ytick.labelsize"), 9),
        "axes.edgecolor": FAINT,
    }
    with matplotlib.rc_context(style):
        text = svg_text(draw())
    return text.replace(INK, "currentColor").replace(FAINT, "var(--line)")


def _figure(width: float = 5.2, height: float = 3.2) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _legend(axes: Axes, entries: int) -> None:
    if axes.get_legend_handles_labels()[0]:
        axes.figure.legend(loc="outside upper center", ncols=min(4, entries), frameon=False, fontsize=9)


def _relative_area(sides: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    found: np.ndarray = sides.prod(1) / sizes.prod(1)
    return found


def _log_axis(axes: Axes) -> None:
    """Plain numbers 1, 2, 5, 10, ... on an x axis."""
    axes.set_xscale("log")
    low, high = axes.get_xlim()
    ticks = [m * 10.0**e for e in range(-3, 6) for m in (1, 2, 5) if low <= m * 10.0**e <= high]
    if len(ticks) > 8:
        ticks = [t for t in ticks if f"{t:e}"[0] in "15"]
    axes.set_xticks(ticks, [f"{t:g}" for t in ticks])
    axes.minorticks_off()


def _histogram(
    values: Mapping[str, np.ndarray], label: str, *, log: bool = False, marks: Sequence[float] = ()
) -> Figure:
    figure, axes = _figure()
    filled = {name: v for name, v in values.items() if len(v)}
    every = np.concatenate(list(filled.values()))
    low, high = float(every.min()), float(every.max())
    if low == high:
        low, high = low * 0.9, high * 1.1
    edges = np.geomspace(low, high, BINS + 1) if log else np.linspace(low, high, BINS + 1)
    edges[0], edges[-1] = min(edges[0], low), max(edges[-1], high)
    for i, (name, v) in enumerate(filled.items()):
        count, _ = np.histogram(v, edges)
        axes.stairs(100 * count / len(v), edges, color=color(i), label=name, linewidth=1.6, fill=False)
    for mark in marks:
        if low <= mark <= high:
            axes.axvline(mark, color=INK, linewidth=0.8, linestyle=":")
    if log:
        _log_axis(axes)
    axes.set_xlabel(label)
    axes.set_ylabel("% of the objects")
    if len(filled) > 1:
        _legend(axes, len(filled))
    return figure


def _classes(facts: Sequence[Facts]) -> Figure:
    order = sorted(range(len(facts[0].classes)), key=lambda k: -facts[0].classes[k].objects)[:MOST_CLASSES]
    figure, axes = _figure(5.2, 1.0 + 0.26 * len(order) + 0.1 * len(facts))
    each = 0.8 / len(facts)
    for i, f in enumerate(facts):
        y = np.arange(len(order)) + (i - (len(facts) - 1) / 2) * each
        axes.barh(y, [100 * f.classes[k].share for k in order], each * 0.92, color=color(i), label=f.name)
    axes.set_yticks(range(len(order)), [_short(facts[0].classes[k].name) for k in order])
    axes.invert_yaxis()
    axes.set_xlabel("% of the split's objects")
    if len(facts) > 1:
        _legend(axes, len(facts))
    return figure


def _together(facts: Facts) -> Figure:
    order = sorted((k for k, c in enumerate(facts.classes) if c.objects), key=lambda k: -facts.classes[k].objects)
    order = order[:MOST_CLASSES]
    value = facts.together[np.ix_(order, order)] / np.array([facts.classes[k].images for k in order])[:, None]
    side = 1.6 + 0.26 * len(order)
    figure, axes = _figure(max(4.2, side + 0.6), max(3.0, side))
    axes.spines[:].set_visible(False)
    shown = axes.imshow(value, cmap="viridis", vmin=0, vmax=1)
    names = [_short(facts.classes[k].name) for k in order]
    axes.set_xticks(range(len(order)), names, rotation=60, ha="right")
    axes.set_yticks(range(len(order)), names)
    if len(order) <= 8:
        for (i, j), v in np.ndenumerate(value):
            axes.text(j, i, f"{v:.0%}", ha="center", va="center", fontsize=8, color="black" if v > 0.6 else "white")
    figure.colorbar(shown, ax=axes, shrink=0.8).outline.set_visible(False)
    return figure


def _shapes(found: Analysis) -> Figure:
    figure, axes = _figure(5.2, 4.2)
    sizes = found.splits[0].resized_sides(found.settings.resize)
    high = float(np.quantile(sizes, 0.999)) * 1.05
    count, x, y = np.histogram2d(sizes[:, 0], sizes[:, 1], bins=60, range=[[0, high], [0, high]])
    shade = np.ma.masked_equal(np.log1p(count.T), 0)
    # Even the darkest has to differ from a dark page.
    axes.imshow(
        shade, extent=(0, x[-1], 0, y[-1]), origin="lower", cmap="viridis", aspect="auto", interpolation="nearest",
        vmin=-0.6 * float(shade.max()),
    )  # fmt: skip
    for fits, mark, name, i in ((found.anchors.means, "o", "k-means", 5), (found.anchors.medoids, "s", "k-medoids", 3)):
        w, h = fits[-1].sizes.T
        axes.plot(w, h, mark, color=color(i), markeredgecolor="white", markersize=6, label=name, linestyle="none")
    axes.set_xlim(0, high)
    axes.set_ylim(0, high)
    axes.set_xlabel("width, pixels")
    axes.set_ylabel("height, pixels")
    _legend(axes, 2)
    return figure


def _per_image(found: Analysis) -> Figure:
    figure, axes = _figure()
    most = max(int(s.per_image.max()) for s in found.splits)
    step = max(1, -(-most // BINS))
    edges = np.arange(0, most + 2 * step, step) - 0.5
    for i, s in enumerate(found.splits):
        count, _ = np.histogram(s.per_image, edges)
        axes.stairs(100 * count / len(s.per_image), edges, color=color(i), label=s.name, linewidth=1.6)
    axes.set_xlabel("objects")
    axes.set_ylabel("% of the images")
    if len(found.splits) > 1:
        _legend(axes, len(found.splits))
    return figure


def _overlap(facts: Sequence[Facts]) -> Figure:
    figure, axes = _figure()
    x = np.linspace(0, 1, 51)
    for i, f in enumerate(facts):
        axes.plot(x, [100 * f.crowding.above(t) for t in x], color=color(i), label=f.name)
        axes.plot(x, [100 * f.crowding.above(t, same_class=True) for t in x], color=color(i), linestyle=":",
                  label=f"{f.name}, same class")  # fmt: skip
    axes.set_xlabel("IoU with another object of the image")
    axes.set_ylabel("% of the objects above")
    _legend(axes, len(facts))
    return figure


def _centers(facts: Facts) -> Figure:
    figure, axes = _figure(5.2, 3.6)
    axes.spines[:].set_visible(False)
    axes.imshow(facts.centers, cmap="viridis", extent=(0, 100, 100, 0), interpolation="nearest")
    axes.set_aspect(facts.image_height["median"] / facts.image_width["median"])
    axes.set_xlabel("% of the width")
    axes.set_ylabel("% of the height")
    return figure


def _image_sizes(found: Analysis) -> Figure:
    figure, axes = _figure()
    total = max(f.images for f in found.facts)
    for i, f in enumerate(found.facts):
        size = np.array(f.image_sizes, dtype=np.float64)
        axes.scatter(size[:, 1], size[:, 0], 12 + 500 * size[:, 2] / total, color=color(i), alpha=0.5, label=f.name,
                     linewidths=0)  # fmt: skip
    axes.set_xlim(0, 1.12 * max(f.image_width["most"] for f in found.facts))
    axes.set_ylim(0, 1.12 * max(f.image_height["most"] for f in found.facts))
    axes.set_xlabel("width, pixels")
    axes.set_ylabel("height, pixels")
    if len(found.facts) > 1:
        _legend(axes, len(found.facts))
        for handle in axes.figure.legends[0].legend_handles:
            handle.set_sizes([30])  # type: ignore[union-attr]
    return figure


def _anchors(fits: AnchorFits) -> Figure:
    figure, axes = _figure()
    for i, (name, each) in enumerate((("k-means", fits.means), ("k-medoids", fits.medoids))):
        k = range(1, len(each) + 1)
        axes.plot(k, [f.mean_iou for f in each], color=color(i), label=f"{name}: mean IoU")
        axes.plot(k, [f.recall for f in each], color=color(i), linestyle=":", label=f"{name}: share at 0.5")
    axes.set_xlabel("k")
    axes.set_ylim(0, 1.02)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    _legend(axes, 2)
    return figure


def _reach(found: Sequence[Reach]) -> Figure:
    rules = list(dict.fromkeys(r.rule for r in found))
    sets = list(dict.fromkeys(r.priors for r in found))
    figure, axes = _figure(5.6, 1.2 + 0.42 * len(rules))
    each = 0.84 / len(sets)
    for i, name in enumerate(sets):
        mine = {r.rule: r.recall for r in found if r.priors == name}
        y = np.arange(len(rules)) + (i - (len(sets) - 1) / 2) * each
        axes.barh(y, [100 * (1 - mine[r]) for r in rules], each * 0.92, color=color(i), label=name)
    axes.set_yticks(range(len(rules)), rules)
    axes.invert_yaxis()
    axes.set_xlabel("% of the objects without a prior")
    axes.set_xlim(0, max(1.0, axes.get_xlim()[1]))
    _legend(axes, 2)
    return figure


def _within_reach(relative: np.ndarray, advice: Advice) -> Figure:
    figure, axes = _figure()
    most = 1.3 * max(s.short for s in advice.sizes if s.stride <= 8)
    short = np.linspace(32, most, 120)
    ranked = np.sort(relative)
    for i, stride in enumerate(FINEST):
        needed = advice.cells * stride / short
        share = 1 - np.searchsorted(ranked, needed) / len(ranked)
        axes.plot(short, 100 * share, color=color(i), label=f"finest stride {stride}")
    axes.axhline(100 * advice.wanted, color=INK, linewidth=0.8, linestyle=":")
    axes.plot([advice.chosen.short], [100 * advice.chosen.share], "o", color=INK, label="advised")
    axes.set_xlabel("shorter side of the input, pixels")
    axes.set_ylabel("% of the objects")
    axes.set_ylim(0, 103)
    _legend(axes, 2)
    return figure


def _short(name: str) -> str:
    return name if len(name) <= 22 else name[:21] + "…"
