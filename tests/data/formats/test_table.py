from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from detector.data.formats.records import Problems
from detector.data.formats.table import Table
from tests.data.formats.make import HEIGHT, WIDTH, convert, image, load, things


def table(folder: Path, text: str) -> Path:
    for name in ("a.png", "b.png"):
        image(folder / name)
    (folder / "table.csv").write_text(text, encoding="utf-8")
    return folder / "table.csv"


def test_corners(tmp_path: Path) -> None:
    source = table(
        tmp_path,
        'image,label,x1,y1,x2,y2,crowd,weight,note\na.png,"cat, black",1,2,11.5,22,,0.5,"two\nlines"\n'
        "a.png,dog,0,0,60,40,1,,\nb.png,,,,,,,,\n",
    )
    assert convert("csv", source, "--out", tmp_path / "out") == 0
    document = load(tmp_path / "out" / "annotations" / "train.json", tmp_path / "out" / "images")
    assert things(document) == [
        ("a.png", "cat, black", (1, 2, 10.5, 20), "[]"),
        ("a.png", "dog", (0, 0, 60, 40), "[]"),
    ]
    assert [a["iscrowd"] for a in document["annotations"]] == [0, 1]
    assert document["annotations"][0]["weight"] == 0.5
    assert len(document["images"]) == 2


def test_other_names_units_and_delimiter(tmp_path: Path) -> None:
    source = table(tmp_path, "File;Class;left;top;wide;high;width\na.png;cat;0.5;0.5;0.25;0.1;7\n")
    names = ("image=File", "label=Class", "x=left", "y=top", "w=wide", "h=high")
    options = ("--columns", *names, "--units", "fractions", "--delimiter", ";")
    assert convert("csv", source, "--out", tmp_path / "out", *options) == 0
    document = load(tmp_path / "out" / "annotations" / "train.json", tmp_path / "out" / "images")
    assert things(document) == [("a.png", "cat", (30, 20, 15, 4), "[]")]


@pytest.mark.parametrize(
    ("header", "said"),
    [
        ("file,label,x1,y1,x2,y2", "no column for image, found file"),
        ("image,label,x1,y1,x2,h", "no column for x1, y1, x2, y2"),
        ("image;label;x1;y1;x2;y2", "no column for image, label"),
        ("image,label,x1,y1,x2,y2,label", "occurs more than once"),
    ],
)
def test_a_header_that_lacks_a_column(tmp_path: Path, capsys: Any, header: str, said: str) -> None:
    source = table(tmp_path, f"{header}\na.png,cat,1,2,3,4\n")
    assert convert("csv", source, "--out", tmp_path / "out", "--skip") == 2
    message = capsys.readouterr().err
    assert said in message
    assert f"{source}: line 1" in message


def test_a_mapping_to_no_column(tmp_path: Path, capsys: Any) -> None:
    source = table(tmp_path, "image,label,x1,y1,x2,y2\na.png,cat,1,2,3,4\n")
    assert convert("csv", source, "--out", tmp_path / "out", "--columns", "label=class") == 2
    assert "no column 'class' for label" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ("a.png,cat,1,2,3", "5 cells, expected at least 7"),
        ("a.png,cat,1,2,three,4,", "x2 is 'three', expected a number"),
        ("a.png,,1,2,3,4,", "label is empty"),
        (",cat,1,2,3,4,", "image is empty"),
        ("a.png,cat,5,2,3,4,", "has no area"),
        ("a.png,cat,1,2,3,4,yes", "crowd is 'yes', expected 0 or 1"),
        ("c.png,cat,1,2,3,4,", "c.png: no such file"),
    ],
)
def test_a_broken_row_is_named(tmp_path: Path, capsys: Any, row: str, said: str) -> None:
    source = table(tmp_path, f"image,label,x1,y1,x2,y2,crowd\na.png,cat,1,2,3,4,\n{row}\n")
    assert convert("csv", source, "--out", tmp_path / "out") == 2
    message = capsys.readouterr().err
    assert said in message
    assert f"{source}: line 3" in message
    assert convert("csv", source, "--out", tmp_path / "out", "--skip") == 0
    assert "left out 1 " in capsys.readouterr().err


numbers = st.floats(0, 30, allow_subnormal=False)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(numbers, numbers, st.floats(0.001, 30), st.floats(0.001, 10)), min_size=1, max_size=5))
def test_both_ways_of_writing_boxes_agree(tmp_path_factory: Any, boxes: list[tuple[float, ...]]) -> None:
    folder = tmp_path_factory.mktemp("table")
    corners = "".join(f"a.png,cat,{x!r},{y!r},{x + w!r},{y + h!r}\n" for x, y, w, h in boxes)
    sides = "".join(f"a.png,cat,{x!r},{y!r},{w!r},{h!r}\n" for x, y, w, h in boxes)
    found = []
    for header, rows in (("x1,y1,x2,y2", corners), ("x,y,w,h", sides)):
        source = table(folder, f"image,label,{header}\n{rows}")
        problems = Problems(skip=False)
        (entry,) = Table().read(source, None, problems).entries
        found.append([thing.box for thing in entry.objects((HEIGHT, WIDTH), problems)])
    assert found[0] == found[1]
    assert found[0] == [tuple(round(c, 9) for c in (x, y, x + w, y + h)) for x, y, w, h in boxes]
