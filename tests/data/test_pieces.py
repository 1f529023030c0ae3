"""An annotation file read in pieces is the same as read whole; what is odd about it is left to the latter."""

from __future__ import annotations

import json
import subprocess
import sys
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from detector.data import pieces
from detector.data.index import CocoIndex
from detector.data.pieces import Document, Unusual, read_in_pieces, read_whole
from detector.errors import DataError

Entry = dict[str, Any]
polygons = st.lists(st.lists(st.floats(0, 99).map(lambda v: round(v, 2)), min_size=6, max_size=8), max_size=2)
run_lengths = st.fixed_dictionaries({"size": st.just([9, 9]), "counts": st.sampled_from(["0X", "ab[]1", [3, 78]])})
texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=9) | st.sampled_from(
    ['"segmentation": [', "}]{", "é"]
)


def content(count: int = 3) -> Entry:
    images = [{"id": i, "file_name": f"{i}.jpg", "height": 40, "width": 50} for i in range(1, 4)]
    annotations = [
        {"id": i + 1, "image_id": i % 3 + 1, "category_id": 1, "bbox": [1.0, 2.0, 3.5, 4.0], "area": 14, "iscrowd": 0}
        | {"segmentation": [[1.0, 2.0, 3.0, 4.0, 5.0, i]]}
        for i in range(count)
    ]
    return {"images": images, "annotations": annotations, "categories": [{"id": 1, "name": "a"}]}


def flat(document: Document) -> tuple[list[Entry], list[Entry], list[Entry]]:
    """The used keys of all objects."""
    keys = {"id", "height", "width", "file_name", "image_id", "category_id", "bbox", "area", "iscrowd", "segmentation"}
    lists = (document.images, document.annotations, document.categories)
    images, annotations, categories = (
        [{k: v for k, v in item.items() if k in keys | {"name"}} for item in chain.from_iterable(each)]
        for each in lists
    )
    return images, annotations, categories


@settings(max_examples=150, deadline=None)
@given(
    entries=st.lists(
        st.fixed_dictionaries(
            {"id": st.integers(0, 2**63 - 1), "bbox": st.lists(st.floats(0, 1e6), max_size=4)},
            optional={"segmentation": polygons | run_lengths, "area": st.none() | st.floats(0, 1e9), "note": texts}
            | {"attributes": st.dictionaries(texts, st.integers(), max_size=2)},
        ),
        max_size=12,
    ),
    names=st.lists(texts, max_size=4),
    block=st.integers(1, 200),
    piece=st.integers(1, 5),
    indent=st.none() | st.just(1),
    ascii=st.booleans(),
    mark=st.booleans(),
)
def test_pieces_are_the_whole(
    tmp_path_factory: pytest.TempPathFactory,
    entries: list[Entry],
    names: list[str],
    block: int,
    piece: int,
    indent: int | None,
    ascii: bool,
    mark: bool,
) -> None:
    path = tmp_path_factory.getbasetemp() / "pieces.json"
    images = [{"id": i, "file_name": name, "license": 3} for i, name in enumerate(names)]
    document = {"info": {"year": 1}, "images": images, "annotations": entries, "categories": [{"id": 1, "name": "a"}]}
    text = json.dumps(document, indent=indent, ensure_ascii=ascii)
    path.write_bytes(("\ufeff" if mark else "").encode() + text.encode())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pieces, "_BLOCK", block)
        patch.setattr(pieces, "_PIECE", piece)
        try:
            found = read_in_pieces(path)
        except Unusual:  # one object is longer than several such blocks
            assert block < 100
            return
        mine = flat(found)
    expected = read_whole(path)
    assert mine == flat(expected)
    assert np.array_equal(found.spans, expected.spans)
    assert found.annotated
    segmentations = [e["segmentation"] for e in entries if "segmentation" in e]
    assert [json.loads(path.read_bytes()[a:b]) for a, b in found.spans] == segmentations


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("bbox", [1, 2, 3], r"annotation id 3: bbox is \[1, 2, 3\], expected \[x, y, width, height\]"),
        ("bbox", [1, 2, 3, "4"], r"annotation id 3: bbox is "),
        ("id", "3", r"annotations\[2\]: id is '3', expected a whole number"),
        ("id", 2.0, r"annotations\[2\]: id is 2.0, expected a whole number"),
        ("id", 2**64, r"annotations\[2\]: id is 18446744073709551616, expected a whole number"),
        ("id", 1, "annotation id 1 occurs more than once"),
        ("image_id", 77, "annotation id 3: image_id 77 is not among `images`"),
        ("iscrowd", 2, "annotation id 3: iscrowd is 2"),
        ("segmentation", "x", "annotation id 3: segmentation is 'x'"),
    ],
)
def test_a_mistake_in_any_piece_is_told_as_of_the_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, key: str, value: object, message: str
) -> None:
    monkeypatch.setattr(pieces, "_PIECE", 2)
    document = content()
    document["annotations"][2][key] = value
    (tmp_path / "a.json").write_text(json.dumps(document))
    with pytest.raises(DataError, match=message):
        CocoIndex.load(tmp_path / "a.json", tmp_path)


@pytest.mark.parametrize("odd", ["nan", "no list", "no object", "cut", "latin", "no annotations"])
def test_odd_files_are_left_to_the_reading_of_the_whole(tmp_path: Path, odd: str) -> None:
    document, path = content(), tmp_path / "a.json"
    if odd == "nan":
        document["annotations"][1]["area"] = float("nan")
    elif odd == "no list":
        document["annotations"] = None
    elif odd == "no object":
        document["images"][1] = 3
    elif odd == "no annotations":
        del document["annotations"], document["categories"]
    text = json.dumps(document).encode()
    path.write_bytes(text[:-30] if odd == "cut" else text.replace(b"2.jpg", b"\xe9.jpg") if odd == "latin" else text)
    if odd == "no annotations":
        assert not read_in_pieces(path).annotated
        assert not CocoIndex.load(path, tmp_path).annotated
        return
    with pytest.raises(Unusual):
        flat(read_in_pieces(path))
    if odd == "nan":
        assert CocoIndex.load(path, tmp_path).area[1] == 14
        return
    with pytest.raises(DataError, match=r"a\.json: "):
        CocoIndex.load(path, tmp_path)


def test_a_large_file_takes_little_memory(tmp_path: Path) -> None:
    count = 60_000
    document = content(0)
    document["annotations"] = [
        {"segmentation": [[1.25] * 200], "id": i, "image_id": 1, "category_id": 1, "bbox": [1.5, 2.5, 3.5, 4.5]}
        | {"area": 9.5, "iscrowd": 0}
        for i in range(count)
    ]
    path = tmp_path / "a.json"
    path.write_text(json.dumps(document))
    code = (
        "import sys; from pathlib import Path; from detector.data.index import CocoIndex\n"
        "from detector.bench.indexing import peak_mebibytes\n"
        "before = peak_mebibytes(); index = CocoIndex.load(Path(sys.argv[1]), Path(sys.argv[2]))\n"
        f"assert len(index.boxes) == {count}; print(peak_mebibytes() - before)"
    )
    run = subprocess.run([sys.executable, "-c", code, path, tmp_path], capture_output=True, text=True, check=True)
    mebibytes = float(run.stdout)
    assert path.stat().st_size > 79e6
    assert 1 < mebibytes < 70, "less than the file itself"
