"""Every rule x every head trains and survives; the page about it in docs/ names what there is today."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.matrix import HEADS, NONE, ROWS, RULES, STEPS, TRIALS, Head, document, field, label, possible, run, table

DOCS = Path(__file__).resolve().parents[1] / "docs" / "matrix.md"
Fields = dict[tuple[str, Head], str]
FIELDS = [(row, head) for row in ROWS for head in HEADS if possible(row, head)]
# In the default suite each rule on one head, and each head with several rules; the page needs them all.
HEADS_OF = [[head for head in HEADS if possible(row, head)] for row in ROWS]
QUICK = {(row, heads[i % len(heads)]) for i, (row, heads) in enumerate(zip(ROWS, HEADS_OF, strict=True))}
EVERY = [
    pytest.param(row, head, id=f"{row}-{head}", marks=[] if (row, head) in QUICK else [pytest.mark.slow])
    for row, head in FIELDS
]


@pytest.fixture(scope="module")
def fields(request: pytest.FixtureRequest) -> Iterator[Fields]:
    """What comes of each field, written to the file that `--matrix` names."""
    found: Fields = {}
    yield found
    path = request.config.getoption("--matrix")
    if path is not None:
        Path(path).write_text(document(found), encoding="utf-8")


@pytest.mark.parametrize(("row", "head"), EVERY)
def test_trains_and_survives(row: str, head: Head, fields: Fields) -> None:
    fields[row, head] = "failed"
    fields[row, head] = field(run(row, head))


def test_the_page_lists_todays_rules_and_heads_and_no_failure(request: pytest.FixtureRequest) -> None:
    if request.config.getoption("--matrix") is not None:
        pytest.skip("the page is being written")
    page = DOCS.read_text(encoding="utf-8")
    assert f"in {STEPS} steps" in page
    assert "; ".join(TRIALS) in page
    found = table(page)
    assert list(found) == [label(row) for row in ROWS], "write the page anew: see its first lines"
    for row in ROWS:
        assert list(found[label(row)]) == list(HEADS)
        for head, text in found[label(row)].items():
            if text == NONE:
                assert row not in RULES
                continue
            numbers = re.fullmatch(r"(\d+\.\d\d) → (\d+\.\d\d), (\d+)/(\d+)", text)
            assert numbers, f"{row} on {head}: {text}"
            first, last, survived, trials = map(float, numbers.groups())
            assert last < first
            assert survived == trials == len(TRIALS)


def test_what_failed_or_was_not_run_shows() -> None:
    page = document({(ROWS[0], HEADS[0]): "failed"})
    shown = table(page)[label(ROWS[0])]
    assert list(shown.values()) == ["failed"] + ["not run"] * (len(HEADS) - 1)
