"""A study's plots as SVG text: no global state, the reader's own fonts, colours for any kind of colour vision."""

from __future__ import annotations

import io
import math
import re
import zlib
from collections.abc import Mapping, Sequence

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from detector import canvas
from detector.lab.summary import Spread
from detector.lab.verdict import Comparison

Series = Mapping[str, Sequence[tuple[float, float]]]  # of each seed: x and y


def color(i: int) -> tuple[float, float, float]:
    """Of arm `i`; the palest of the palette is left out, which a line on white would not show."""
    order = (4, 0, 2, 6, 1, 5, 11, 7, 9, 13, 8, 12, 14, 16, 18, 20)
    red, green, blue = canvas.color(order[i % len(order)])
    return red / 255, green / 255, blue / 255


def differences(rows: Sequence[tuple[str, Comparison]], metric: str, reference: str) -> str:
    """A line for each comparison: the difference with its interval, and in grey what could not have been seen."""
    figure, axes = _figure(6.4, 0.9 + 0.42 * max(1, len(rows)))
    for i, (_, c) in enumerate(rows):
        shade = {"better": color(2), "worse": color(5)}.get(c.verdict, (0.35, 0.35, 0.35))
        if math.isfinite(c.smallest):
            axes.barh(i, 200 * c.smallest, left=-100 * c.smallest, height=0.7, color="0.92")
        if math.isfinite(c.low):
            axes.plot([100 * c.low, 100 * c.high], [i, i], color=shade, linewidth=2)
        axes.plot([100 * c.difference], [i], "o", color=shade)
    axes.axvline(0, color="0.3", linewidth=1)
    # As wide as the intervals ask for: what could not have been seen may be many times that, and runs off the edge.
    reach = max((abs(v) for _, c in rows for v in (c.low, c.high, c.difference) if math.isfinite(v)), default=0)
    unseen = max((c.smallest for _, c in rows if math.isfinite(c.smallest)), default=0)
    limit = 105 * max(reach, min(unseen, 2 * reach), 1e-3)
    axes.set_xlim(-limit, limit)
    axes.set_yticks(range(len(rows)), [name for name, _ in rows])
    axes.invert_yaxis()
    axes.set_xlabel(f"{metric} minus that of {reference}, points of 100\ngrey: smaller than the study can see")
    return svg_text(figure)


def bands(curves: Mapping[str, Sequence[Sequence[tuple[float, float]]]], label: str, log: bool = False) -> str:
    """For each arm the mean over its seeds, in a band of one standard deviation; x is the epoch."""
    figure, axes = _figure(5.2, 3.2)
    for i, (arm, seeds) in enumerate(curves.items()):
        tables = [dict(curve) for curve in seeds if curve]
        if not tables:
            continue
        x = sorted(set.intersection(*(set(t) for t in tables)))
        values = np.array([[t[e] for e in x] for t in tables])
        mean = values.mean(0)
        axes.plot(x, mean, color=color(i), label=arm, linewidth=1.6, marker="o" if len(x) < 4 else None)
        if len(tables) > 1:
            spread = values.std(0, ddof=1)
            axes.fill_between(x, mean - spread, mean + spread, color=color(i), alpha=0.2, linewidth=0)
    if log:
        axes.set_yscale("log")
    axes.set_xlabel("epoch")
    axes.set_ylabel(label)
    _legend(axes, len(curves))
    return svg_text(figure)


def bars(
    groups: Mapping[str, Mapping[str, Spread]], arms: Sequence[str], label: str, factor: float = 1.0, width: float = 6.4
) -> str:
    """`groups`: name below the axis -> arm -> value, with the deviation as a whisker."""
    figure, axes = _figure(width, 3.2)
    each = 0.8 / max(1, len(arms))
    for i, arm in enumerate(arms):
        found = [values.get(arm, Spread(math.nan, math.nan, 0)) for values in groups.values()]
        x = np.arange(len(found)) + (i - (len(arms) - 1) / 2) * each
        heights = np.nan_to_num(np.array([factor * v.mean for v in found]))
        errors = np.nan_to_num(np.array([factor * v.deviation for v in found]))
        axes.bar(x, heights, each * 0.92, color=color(i), label=arm)
        axes.errorbar(x, heights, np.where(errors > 0, errors, np.nan), fmt="none", ecolor="0.2", elinewidth=1)
    axes.set_ylim(bottom=0)  # no value is below, though a deviation may reach there
    names = list(groups)
    axes.set_xticks(
        range(len(names)), names, rotation=35 if len(names) > 6 else 0, ha="right" if len(names) > 6 else "center"
    )
    axes.set_ylabel(label)
    _legend(axes, len(arms))
    return svg_text(figure)


def radar(groups: Mapping[str, Mapping[str, Spread]], arms: Sequence[str], factor: float = 100.0) -> str:
    """A profile: one spoke for each data set, one outline for each arm."""
    figure = Figure(figsize=(5.2, 4.6), layout="constrained")
    axes = figure.add_subplot(projection="polar")
    names = list(groups)
    angles = np.arange(len(names)) * 2 * np.pi / len(names)
    for i, arm in enumerate(arms):
        radius = np.array([factor * groups[n][arm].mean if arm in groups[n] else np.nan for n in names])
        axes.plot([*angles, angles[0]], [*radius, radius[0]], color=color(i), label=arm, linewidth=1.6, marker="o")
    axes.set_xticks(angles, names)
    axes.set_ylim(bottom=0)
    figure.legend(loc="outside lower center", ncols=4, frameon=False, fontsize=9)
    return svg_text(figure)


def heat(groups: Mapping[str, Mapping[str, Spread]], arms: Sequence[str], factor: float = 100.0) -> str:
    """A profile of many arms: a row each, a column for each data set, shaded from the column's least to its most."""
    values = np.array([[factor * g[a].mean if a in g else np.nan for g in groups.values()] for a in arms])
    known = np.where(np.isnan(values).all(0), 0.0, values)
    low, high = np.nanmin(known, axis=0), np.nanmax(known, axis=0)
    shade = (values - low) / np.where(high > low, high - low, 1)
    figure, axes = _figure(1.6 + 0.85 * len(groups), 0.7 + 0.3 * len(arms))
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0, top=True, labeltop=True, bottom=False, labelbottom=False)
    axes.imshow(np.ma.masked_invalid(shade), cmap="cividis", vmin=-0.3, vmax=1, aspect="auto")
    for (row, column), value in np.ndenumerate(values):
        if np.isfinite(value):
            dark = shade[row, column] < 0.45
            axes.text(column, row, f"{value:.1f}", ha="center", va="center", fontsize=9,
                      color="white" if dark else "black")  # fmt: skip
    axes.set_xticks(range(len(groups)), list(groups))
    axes.set_yticks(range(len(arms)), list(arms))
    return svg_text(figure)


def _figure(width: float, height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=9)
    return figure, axes


def _legend(axes: Axes, arms: int) -> None:
    if axes.get_legend_handles_labels()[0]:
        axes.figure.legend(loc="outside upper center", ncols=min(5, arms), frameon=False, fontsize=9)


def svg_text(figure: Figure) -> str:
    """To be put into a page: no XML header, ids that no other plot has, as wide as there is room."""
    out = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "detector", "font.family": "sans-serif"}):
        figure.savefig(out, format="svg", metadata={"Date": None, "Creator": None})
    text = out.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    mark = f"p{zlib.crc32(text.encode()):08x}-"  # two plots that share it are equal, and so are their parts
    text = re.sub(r'id="', f'id="{mark}', text)
    text = re.sub(r"url\(#", f"url(#{mark}", text)
    text = re.sub(r'xlink:href="#', f'xlink:href="#{mark}', text)
    return re.sub(r'<svg [^>]*viewBox="([^"]*)"[^>]*>', r'<svg class="plot" viewBox="\1" xmlns="http://www.w3.org/2000/svg"'
                  r' xmlns:xlink="http://www.w3.org/1999/xlink">', text, count=1)  # fmt: skip
