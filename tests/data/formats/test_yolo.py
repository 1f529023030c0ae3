from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.data import small_coco
from tests.data.formats.make import HEIGHT, WIDTH, convert, image, load, things


def dataset(folder: Path, *labels: str | None, names: Any = ("cat", "dog")) -> Path:
    """In YOLO's layout; None: an image without a label file."""
    for k, text in enumerate(labels):
        image(folder / "images" / "train" / f"{k}.png")
        path = folder / "labels" / "train" / f"{k}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        if text is not None:
            path.write_text(text)
    given = {"path": ".", "train": "images/train", "names": names if isinstance(names, dict) else list(names)}
    (folder / "data.yaml").write_text(yaml.safe_dump(given))
    return folder / "data.yaml"


def test_boxes_and_outlines(tmp_path: Path, capsys: Any) -> None:
    labels = ("1 0.5 0.25 0.1 0.5\n\n0 0.1 0.1 0.5 0.1 0.5 0.5\n", "", None)
    source = dataset(tmp_path / "yolo", *labels, names={0: "cat", 1: "dog", 2: "cow"})
    assert convert("yolo", source, "--out", tmp_path / "out") == 0
    assert "1 image without a label file" in capsys.readouterr().err
    document = load(tmp_path / "out" / "annotations" / "train.json", tmp_path / "out" / "images")
    assert [c["name"] for c in document["categories"]] == ["cat", "dog", "cow"]
    assert things(document) == [
        ("0.png", "cat", (6, 4, 24, 16), "[[6.0, 4.0, 30.0, 4.0, 30.0, 20.0]]"),
        ("0.png", "dog", (27, 0, 6, 20), "[]"),
    ]
    assert len(document["images"]) == 3


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("2 0.5 0.5 0.1 0.1", "class is '2', expected a whole number from 0 to 1"),
        ("-1 0.5 0.5 0.1 0.1", "class is '-1'"),
        ("0 0.5 0.5 0.1", "4 numbers, expected 5"),
        ("0 0.5 0.5 0.1 0.1 0.9", "6 numbers, expected 5"),
        ("0 0.5 0.5 0.1 0.1 0.9 0.2 0.1", "8 numbers, expected 5"),
        ("0 0.5 0.5 0.1 wide", "expected numbers"),
        ("0 30 20 10 10", "30 is no fraction of the image"),
        ("0 0.5 0.5 0 0.1", "has no area"),
        ("0 0.5 nan 0.1 0.1", "no fraction"),
    ],
)
def test_a_broken_line_is_named(tmp_path: Path, capsys: Any, line: str, said: str) -> None:
    source = dataset(tmp_path / "yolo", f"1 0.5 0.5 0.5 0.5\n{line}\n")
    out = tmp_path / "out"
    assert convert("yolo", source, "--out", out) == 2
    message = capsys.readouterr().err
    assert said in message
    assert "0.txt: line 2" in message
    assert not out.exists()
    assert convert("yolo", source, "--out", out, "--skip") == 0
    assert "left out 1 object" in capsys.readouterr().err
    assert len(load(out / "annotations" / "train.json", out / "images")["annotations"]) == 1


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"names": {0: "cat", 2: "dog"}}, "names: "),
        ({"names": ["cat", "cat"]}, "occurs more than once"),
        ({"nc": 3}, "nc is 3, expected 2"),
        ({"train": None, "val": "images/train"}, "has no split 'train', expected one of val"),
        ({"train": "images/none"}, "no such folder or file"),
        ({"path": "labels", "train": "train"}, "holds no image"),
    ],
)
def test_a_wrong_data_file(tmp_path: Path, capsys: Any, change: dict[str, Any], said: str) -> None:
    source = dataset(tmp_path / "yolo", "")
    source.write_text(yaml.safe_dump(yaml.safe_load(source.read_text()) | change))
    assert convert("yolo", source, "--out", tmp_path / "out") == 2
    message = capsys.readouterr().err
    assert said in message
    assert str(source) in message


def test_data_file_that_is_no_yaml(tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "data.yaml").write_text("train: images\nnames: [cat")
    assert convert("yolo", tmp_path / "data.yaml", "--out", tmp_path / "out") == 2
    assert "not valid YAML" in capsys.readouterr().err


def rings(draw: Any) -> list[float]:
    count = draw(st.integers(3, 6))
    return [round(draw(st.floats(0, (WIDTH, HEIGHT)[i % 2])), 3) for i in range(2 * count)]


@st.composite
def coco_documents(draw: Any) -> dict[str, Any]:
    """Boxes, masks of one ring and of several, in two images."""
    document = small_coco.document()
    document["annotations"] = []
    for number in range(1, draw(st.integers(1, 6)) + 1):
        x, y = draw(st.floats(0, WIDTH - 2)), draw(st.floats(0, HEIGHT - 2))
        w, h = draw(st.floats(1, WIDTH - x)), draw(st.floats(1, HEIGHT - y))
        box = [round(v, 4) for v in (x, y, w, h)]
        polygons = [rings(draw) for _ in range(draw(st.integers(0, 3)))]
        document["annotations"].append(
            {
                "id": number,
                "image_id": draw(st.sampled_from([7, 3])),
                "category_id": draw(st.sampled_from([5, 2])),
                "bbox": box,
                "area": box[2] * box[3],
                "iscrowd": 0,
                "segmentation": polygons,
            }
        )
    return document


def there_and_back(folder: Path, document: dict[str, Any], *options: str) -> dict[str, Any]:
    path, images = small_coco.write(folder, document)
    assert convert("coco-to-yolo", path, "--image-folder", images, "--out", folder / "yolo", *options) == 0
    assert convert("yolo", folder / "yolo" / "data.yaml", "--out", folder / "back") == 0
    back: dict[str, Any] = json.loads((folder / "back" / "annotations" / "train.json").read_text())
    return back


def unless_clipped(box: tuple[float, ...]) -> list[float]:
    x, y, w, h = box
    return [x, y, min(x + w, WIDTH) - x, min(y + h, HEIGHT) - y]


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(coco_documents())
def test_boxes_survive_there_and_back(document: dict[str, Any]) -> None:
    with tempfile.TemporaryDirectory() as name:
        back = there_and_back(Path(name), document)
    before, after = things(document), things(back)
    assert [a[:2] for a in after] == [b[:2] for b in before]
    for b, a in zip(before, after, strict=True):
        assert a[2] == pytest.approx(unless_clipped(b[2]), abs=2e-9)
    assert [i["file_name"] for i in back["images"]] == ["12.png", "3.png", "7.png"]
    assert [c["name"] for c in back["categories"]] == ["cat", "dog"]


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(coco_documents())
def test_outlines_survive_there_and_back(document: dict[str, Any]) -> None:
    """The digits of every corner, and rings as rings."""
    for a in document["annotations"]:
        a["segmentation"] = [
            r for r in a["segmentation"] if max(r[0::2]) > min(r[0::2]) and max(r[1::2]) > min(r[1::2])
        ]
    document["annotations"] = [a for a in document["annotations"] if a["segmentation"]]
    if not document["annotations"]:
        return
    with tempfile.TemporaryDirectory() as name:
        back = there_and_back(Path(name), document, "--segments")
    before = sorted((b[0], b[1], b[3]) for b in things(document))
    after = sorted((a[0], a[1], a[3]) for a in things(back))
    for b, a in zip(before, after, strict=True):
        assert a[:2] == b[:2]
        wanted, found = json.loads(b[2]), json.loads(a[2])
        if any(list(ring[:2]) == ring[i : i + 2] for ring in wanted for i in range(2, len(ring), 2)):
            continue  # a ring that comes back to its first corner cannot be told from two
        assert found == wanted


def test_what_yolo_cannot_say_is_counted(tmp_path: Path, capsys: Any) -> None:
    path, images = small_coco.write(tmp_path)
    assert convert("coco-to-yolo", path, "--image-folder", images, "--out", tmp_path / "yolo", "--segments") == 0
    said = capsys.readouterr().err
    assert "1 times: a crowd region" in said
    assert "3 times: an object without a usable outline" in said
    assert (tmp_path / "yolo" / "labels" / "train" / "12.txt").read_text() == ""


@pytest.mark.parametrize("where", ["copy", "link", "keep"])
def test_images_copied_linked_or_kept(tmp_path: Path, where: str) -> None:
    path, images = small_coco.write(tmp_path)
    out = tmp_path / "yolo"
    arguments = ("coco-to-yolo", path, "--image-folder", images, "--out", out, "--images", where)
    assert convert(*arguments) == 0
    settings = yaml.safe_load((out / "data.yaml").read_text())
    assert settings["names"] == {0: "cat", 1: "dog"}
    placed = out / "images" / "train" / "3.png"
    if where == "keep":
        assert not (out / "images").exists()
        assert (tmp_path / "labels" / "3.txt").is_file()
    else:
        assert placed.read_bytes() == (images / "3.png").read_bytes()
        assert placed.is_symlink() == (where == "link")
    assert convert("yolo", out / "data.yaml", "--out", tmp_path / "back", "--images", where) == 0
    document = json.loads((tmp_path / "back" / "annotations" / "train.json").read_text())
    assert len(document["annotations"]) == 4
    folder = {"keep": images, "copy": tmp_path / "back" / "images", "link": tmp_path / "back" / "images"}[where]
    load(tmp_path / "back" / "annotations" / "train.json", folder)


def test_splits_share_a_data_file(tmp_path: Path, capsys: Any) -> None:
    path, images = small_coco.write(tmp_path)
    out = tmp_path / "yolo"
    for split in ("train", "val"):
        assert convert("coco-to-yolo", path, "--image-folder", images, "--out", out, "--split", split) == 0
    settings = yaml.safe_load((out / "data.yaml").read_text())
    assert (settings["train"], settings["val"]) == ("images/train", "images/val")
    other = small_coco.document()
    other["categories"][0]["name"] = "cow"
    path.write_text(json.dumps(other))
    capsys.readouterr()
    assert convert("coco-to-yolo", path, "--image-folder", images, "--out", out, "--split", "test") == 2
    assert "has other classes" in capsys.readouterr().err
    assert not (out / "labels" / "test").exists()


def test_nothing_is_overwritten_without_force(tmp_path: Path, capsys: Any) -> None:
    path, images = small_coco.write(tmp_path)
    arguments = ("coco-to-yolo", path, "--image-folder", images, "--out", tmp_path / "yolo")
    assert convert(*arguments) == 0
    label = tmp_path / "yolo" / "labels" / "train" / "7.txt"
    label.write_text("mine")
    assert convert(*arguments) == 2
    assert "exists already" in capsys.readouterr().err
    assert label.read_text() == "mine"
    assert convert(*arguments, "--force") == 0
    assert label.read_text() != "mine"

    back = ("yolo", tmp_path / "yolo" / "data.yaml", "--out", tmp_path / "back")
    assert convert(*back) == 0
    image(tmp_path / "back" / "images" / "7.png", value=1)
    (tmp_path / "back" / "annotations" / "train.json").unlink()
    assert convert(*back) == 2
    assert "7.png: exists already" in capsys.readouterr().err.replace("\n", " ")
    assert not (tmp_path / "back" / "annotations" / "train.json").exists()
    assert convert(*back, "--force") == 0
    assert (tmp_path / "back" / "images" / "7.png").read_bytes() == (images / "7.png").read_bytes()


def test_labels_that_would_share_a_file(tmp_path: Path, capsys: Any) -> None:
    document = small_coco.document()
    document["images"][0]["file_name"] = "3.jpg"
    path, images = small_coco.write(tmp_path, document)
    image(images / "3.jpg")
    assert convert("coco-to-yolo", path, "--image-folder", images, "--out", tmp_path / "yolo") == 2
    assert "would share one label file" in capsys.readouterr().err


def test_a_broken_coco_file(tmp_path: Path, capsys: Any) -> None:
    document = small_coco.document()
    document["annotations"][0]["category_id"] = 77
    path, images = small_coco.write(tmp_path, document)
    arguments = ("coco-to-yolo", path, "--image-folder", images, "--out", tmp_path / "yolo")
    assert convert(*arguments) == 2
    assert "category_id 77" in capsys.readouterr().err
    assert convert(*arguments, "--skip") == 0
    assert "not listed: left out" in capsys.readouterr().err
    assert (tmp_path / "yolo" / "labels" / "train" / "3.txt").read_text().count("\n") == 1


@pytest.mark.parametrize("name", ["coco_tiny", "bccd", "balloon"])
def test_real_sets_survive(shared: Path, tmp_path: Path, name: str) -> None:
    folder = shared / "datasets" / name
    path, images = folder / "annotations" / "val.json", folder / "images"
    before = json.loads(path.read_text())
    options = ["--segments"] if name == "balloon" else []
    linked = ("--split", "val", "--images", "link")
    assert convert("coco-to-yolo", path, "--image-folder", images, "--out", tmp_path / "yolo", *linked, *options) == 0
    assert convert("yolo", tmp_path / "yolo" / "data.yaml", "--out", tmp_path / "back", *linked) == 0
    after = load(tmp_path / "back" / "annotations" / "val.json", tmp_path / "back" / "images")
    before["annotations"] = [a for a in before["annotations"] if not a["iscrowd"]]
    wanted, found = things(before), things(after)
    assert [f[:2] for f in found] == [w[:2] for w in wanted]
    if options:
        assert [json.loads(f[3]) for f in found] == [json.loads(w[3]) for w in wanted]
    for f, w in zip(found, wanted, strict=True):
        assert f[2] == pytest.approx(w[2], abs=0.051 if options else 1e-8)
    assert {i["file_name"] for i in after["images"]} == {i["file_name"] for i in before["images"]}
