"""Tables in all their kinds, from a finished study."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable

import numpy as np
import pytest
from rich.console import Console

from detector.evaluate.matches import Matches
from detector.lab.bootstrap import draw, resampled
from detector.lab.summary import Spread
from detector.lab.tables import Table, chance, latex, markdown, pieces, points, rich, show, spread, width_of
from detector.lab.verdict import Estimate, judge
from tests.lab.conftest import Place

Copy = Callable[[], Place]

TABLE = Table("Title, 95 %", ("arm", "AP_x", "verdict"), (("a_1", "1.0 ± 0.2", "better"), ("b|c", "–", "worse")))


def test_kinds_of_tables() -> None:
    assert markdown(TABLE).splitlines() == [
        "**Title, 95 %**", "", "| arm | AP_x | verdict |", "|---|---|---|", "| a_1 | 1.0 ± 0.2 | better |",
        "| b\\|c | – | worse |",
    ]  # fmt: skip
    text = latex(TABLE)
    assert r"a\_1 & 1.0 $\pm$ 0.2 & better \\" in text
    assert text.count(r"\\") == 3
    assert r"\begin{tabular}{lll}" in text
    console = Console(width=80, file=io.StringIO())
    console.print(rich(TABLE))
    assert "better" in console.file.getvalue()  # type: ignore[attr-defined]


WIDE = Table(
    "Scores",
    ("data", "arm", "seeds", *(f"metric {i}" for i in range(9)), "MB"),
    tuple((f"data {i}", f"arm {i}", "3/3", *(f"{i}{j}.0 ± 0.{j}" for j in range(9)), f"{i}") for i in range(3)),
)


@pytest.mark.parametrize("width", [80, 120, 400])
def test_a_wide_table_comes_in_pieces_that_fit(width: int) -> None:
    """Every value on one line with what its row is about, none left out, none twice."""
    found = pieces(WIDE, width)
    assert (len(found) == 1) == (width == 400)
    columns = [c for piece in found for c in piece.columns if c not in ("data", "arm")]
    assert columns == list(WIDE.columns[2:])
    for piece in found:
        assert piece.columns[:2] == ("data", "arm")
        console = Console(width=width, file=io.StringIO())
        console.print(rich(piece))
        lines = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
        assert max(map(len, lines)) == width_of(piece) <= width
        for row in piece.rows:
            assert sum(all(value in line for value in row) for line in lines) == 1
    assert len(pieces(WIDE, 10)) == len(WIDE.columns) - 2  # a column each where none fits


def test_in_a_pipe_a_row_is_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    table = Table("T", ("arm", "x", "y"), (("a" * 150, "b" * 150, "c" * 150),))
    show(table)
    assert sum("a" * 150 in line and "c" * 150 in line for line in capsys.readouterr().out.splitlines()) == 1
    show(Table("T", ("arm",), ()))
    assert capsys.readouterr().out == ""


def test_numbers_as_texts() -> None:
    assert (points(0.0123), points(-0.2, sign=False), points(float("inf"))) == ("+1.2", "-20.0", "–")
    assert (chance(0.0001), chance(0.0456)) == ("< 0.001", "0.046")
    assert Spread.of([1.0, None, 3.0]) == Spread(2.0, pytest.approx(2**0.5), 2)  # type: ignore[arg-type]
    assert Spread.of([]).count == 0
    assert [spread(Spread.of(v), 100, 1) for v in ([0.1, 0.3], [0.25], [])] == ["20.0 ± 14.1", "25.0", "–"]


def test_a_studys_tables(done: Place) -> None:
    summary = json.loads((done.out / "summary.json").read_text())
    rows = list(csv.DictReader(io.StringIO((done.out / "cells.csv").read_text())))
    assert [(r["arm"], r["seed"]) for r in rows] == [("one", "0"), ("two", "0"), ("one", "1"), ("two", "1")]
    for row in summary["rows"]:
        own = [float(r["AP"]) for r in rows if r["arm"] == row["arm"]]
        assert row["scores"]["AP"]["mean"] == pytest.approx(np.mean(own))
        assert row["scores"]["AP"]["deviation"] == pytest.approx(np.std(own, ddof=1))
        assert row["scores"]["AP_large"]["mean"] is None  # no such object
    text = (done.out / "tables.md").read_text()
    assert "| one (baseline) | 2/2 |" in text
    assert "not distinguishable" in text
    assert r"\toprule" in (done.out / "tables.tex").read_text()


def test_scores_and_verdicts_as_csv(done: Place) -> None:
    summary = json.loads((done.out / "summary.json").read_text())
    scores, verdicts = (
        list(csv.DictReader(io.StringIO((done.out / name).read_text()))) for name in ("scores.csv", "verdicts.csv")
    )
    for row, written in zip(summary["rows"], scores, strict=True):
        assert (written["arm"], written["seeds"], written["missing"]) == (row["arm"], "2", "0")
        assert written["baseline"] == str(int(row["baseline"]))
        for name, value in {**row["scores"], "step_ms": row["step_ms"], "memory_mb": row["memory_mb"]}.items():
            assert (float(written[name]) if written[name] else None) == value["mean"]
            assert (float(written[f"{name}_std"]) if written[f"{name}_std"] else None) == value["deviation"]
    assert [(v["arm"], v["baseline"], v["metric"]) for v in verdicts] == [("two", "one", "AP"), ("two", "one", "AP50")]
    expected = summary["rows"][1]["comparisons"]
    for written in verdicts:
        for name in ("difference", "low", "high", "corrected_p", "smallest"):
            assert float(written[name]) == expected[written["metric"]][name]
        assert written["verdict"] == expected[written["metric"]]["verdict"]


def test_what_cannot_be_compared_is_said(copy: Copy, capsys: pytest.CaptureFixture[str]) -> None:
    """There is no large object among the images."""
    assert copy().compare("--report-only", "metrics=[AP,APl]") == 0
    assert "note: AP_large: nothing of the kind to be found, not compared: two on data\n" in capsys.readouterr().out


def test_the_comparison_is_the_one_of_the_cells_matches(done: Place) -> None:
    summary = json.loads((done.out / "summary.json").read_text())
    matches = {(a, s): Matches.load(done.cell(a, s) / "matches.npz") for a in ("one", "two") for s in (0, 1)}
    for (arm, seed), m in matches.items():
        result = json.loads((done.cell(arm, seed) / "result.json").read_text())
        images = m.objects.shape[1]
        for metric in ("AP", "AP50", "AP_small", "AR_100"):
            assert resampled(m, metric, np.ones((1, images)))[0] == pytest.approx(result["numbers"][metric], abs=1e-12)
    weights = draw(6, 100, seed=0)
    scores = {k: resampled(m, "AP", np.ones((1, 6)))[0] for k, m in matches.items()}
    drawn = {k: resampled(m, "AP", weights) for k, m in matches.items()}
    one, two = (np.array([scores[a, 0], scores[a, 1]]) for a in ("one", "two"))
    (expected,) = judge([Estimate.paired(two, one, np.stack([drawn["two", 0], drawn["two", 1]]),
                                         np.stack([drawn["one", 0], drawn["one", 1]]), 6)])  # fmt: skip
    found = summary["rows"][1]["comparisons"]["AP"]
    assert found["difference"] == pytest.approx(expected.difference)
    assert found["low"] == pytest.approx(expected.low)
    assert found["verdict"] == expected.verdict == "not distinguishable"
