"""Plots are well-formed SVG with everything that they were given in them."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree

import pytest

from detector.lab import plots
from detector.lab.summary import Spread
from detector.lab.verdict import Estimate, judge

ARMS = ["atss", "fcos & co"]
GROUPS = {f"suite {i}": {arm: Spread(0.2 + 0.1 * i, 0.02, 3) for arm in ARMS[: 1 + i % 2]} for i in range(6)}


def texts(svg: str) -> list[str]:
    root = ElementTree.fromstring(svg)
    assert root.get("viewBox")
    return ["".join(element.itertext()).strip() for element in root.iter("{http://www.w3.org/2000/svg}text")]


def test_every_name_is_there() -> None:
    for svg in (plots.bars(GROUPS, ARMS, "AP", 100), plots.radar(GROUPS, ARMS), plots.heat(GROUPS, ARMS)):
        found = texts(svg)
        for name in (*ARMS, *GROUPS):
            assert name in found
    found = texts(plots.bands({a: [[(1, 2.0), (2, 1.0)], [(1, 2.2), (2, 1.1), (3, 1.0)]] for a in ARMS}, "loss"))
    assert {"loss", "epoch", *ARMS} <= set(found)


def test_differences_with_and_without_an_interval() -> None:
    single = Estimate(0.1, float("nan"), 1e-4, 1, 50)
    many = judge([Estimate(0.05, 1e-4, 1e-6, 5, 500), Estimate(0.0, 0.0, 0.0, 5, 500), single])
    found = texts(plots.differences([(f"arm {i}", c) for i, c in enumerate(many)], "AP", "atss"))
    assert {"arm 0", "arm 1", "arm 2"} <= set(found)


def test_what_cannot_be_seen_does_not_squeeze_the_intervals() -> None:
    blind = judge([Estimate(0.02, 1e-4, 1e-6, 2, 50)] * 16)  # two seeds, 16 comparisons: little can be seen
    assert blind[0].smallest > 4 * max(abs(blind[0].low), blind[0].high)
    ticks = [float(t.replace("\u2212", "-")) for t in texts(plots.differences([("arm", blind[0])], "AP", "atss"))
             if t.lstrip("\u2212").replace(".", "").isdigit()]  # fmt: skip
    assert max(ticks) <= 210 * max(abs(blind[0].low), blind[0].high)


def test_bars_start_at_zero() -> None:
    svg = plots.bars({"large": {"atss": Spread(0.03, 0.06, 3)}}, ["atss"], "AP", 100)
    assert not any(t.startswith("\u2212") for t in texts(svg))


def test_a_heat_map_shades_column_by_column() -> None:
    found = texts(plots.heat({"a": {"x": Spread(0.1, 0, 1), "y": Spread(0.3, 0, 1)}, "b": {"x": Spread(0.5, 0, 1)},
                              "c": {}}, ["x", "y"]))  # fmt: skip
    assert [t for t in found if t[0].isdigit()] == ["10.0", "50.0", "30.0"]


def test_two_plots_on_a_page_share_no_ids() -> None:
    one, other = plots.bars(GROUPS, ARMS, "AP"), plots.bars(GROUPS, ARMS, "AR")
    ids = [{e.get("id") for e in ElementTree.fromstring(svg).iter() if e.get("id")} for svg in (one, other)]
    assert ids[0]
    assert not ids[0] & ids[1]
    assert one == plots.bars(GROUPS, ARMS, "AP"), "the same every time"


@pytest.mark.parametrize("i", range(16))
def test_arms_have_colours_of_their_own(i: int) -> None:
    assert all(0 <= c <= 1 for c in plots.color(i))
    assert plots.color(i) not in [plots.color(k) for k in range(i)]
