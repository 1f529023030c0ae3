from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.data.formats.make import HEIGHT, WIDTH, convert, image, load, things

HEAD = "<annotation><folder>VOC</folder><filename>{name}</filename>{size}"
SIZE = f"<size><width>{WIDTH}</width><height>{HEIGHT}</height><depth>3</depth></size>"
CAT = """<object><name>cat</name><pose>Left</pose><truncated>1</truncated><difficult>0</difficult>
<bndbox><xmin>1</xmin><ymin>1</ymin><xmax>60</xmax><ymax>40</ymax></bndbox>
<part><name>head</name><bndbox><xmin>3</xmin><ymin>3</ymin><xmax>5</xmax><ymax>5</ymax></bndbox></part></object>"""
DOG = """<object><name>dog</name><difficult>1</difficult>
<bndbox><ymin>6</ymin><xmin>11</xmin><xmax>11</xmax><ymax>10.5</ymax></bndbox></object>"""


def voc(folder: Path, *texts: str, size: str = SIZE) -> Path:
    """A folder in VOC's own layout; image k is of the k-th text's objects."""
    (folder / "Annotations").mkdir(parents=True)
    for k, text in enumerate(texts):
        image(folder / "JPEGImages" / f"{k}.jpg")
        whole = HEAD.format(name=f"{k}.jpg", size=size) + text + "</annotation>"
        (folder / "Annotations" / f"{k}.xml").write_text(whole, encoding="utf-8")
    return folder / "Annotations"


def test_first_and_last_pixels_become_edges(tmp_path: Path, capsys: Any) -> None:
    assert convert("voc", voc(tmp_path / "voc", CAT + DOG, ""), "--out", tmp_path / "out") == 0
    document = load(tmp_path / "out" / "annotations" / "train.json", tmp_path / "out" / "images")
    assert things(document) == [("0.jpg", "cat", (0, 0, 60, 40), "[]"), ("0.jpg", "dog", (10, 5, 1, 5.5), "[]")]
    cat, dog = document["annotations"]
    assert (cat["truncated"], cat["pose"], cat["difficult"], dog["difficult"]) == (1, "Left", 0, 1)
    assert [i["file_name"] for i in document["images"]] == ["0.jpg", "1.jpg"]
    assert "2 images, 2 objects, 2 classes" in capsys.readouterr().out


def test_edges_and_difficult(tmp_path: Path) -> None:
    source = voc(
        tmp_path / "voc",
        CAT + DOG.replace("<xmax>11", "<xmax>12"),
        size="<size><width>0</width><height>0</height></size>",
    )
    assert convert("voc", source, "--out", tmp_path / "a", "--pixels", "edges", "--difficult", "crowd") == 0
    document = load(tmp_path / "a" / "annotations" / "train.json", tmp_path / "a" / "images")
    assert things(document)[0][2] == (1, 1, 59, 39)
    assert [a["iscrowd"] for a in document["annotations"]] == [0, 1]
    assert convert("voc", source, "--out", tmp_path / "b", "--difficult", "drop") == 0
    assert len(load(tmp_path / "b" / "annotations" / "train.json", tmp_path / "b" / "images")["annotations"]) == 1


def test_subfolders_and_names_without_suffix(tmp_path: Path) -> None:
    source = voc(tmp_path / "voc", CAT, DOG)
    images = tmp_path / "voc" / "JPEGImages"
    for k in (0, 1):
        (source / f"{k}").mkdir()
        (source / f"{k}.xml").rename(source / f"{k}" / "a.xml")
        image(images / f"{k}" / "a.png")
        text = (source / f"{k}" / "a.xml").read_text()
        (source / f"{k}" / "a.xml").write_text(text.replace(f"{k}.jpg", "a"))
    assert convert("voc", source, "--out", tmp_path / "out") == 0
    document = load(tmp_path / "out" / "annotations" / "train.json", tmp_path / "out" / "images")
    assert [(t[0], t[1]) for t in things(document)] == [("0/a.png", "cat"), ("1/a.png", "dog")]


def test_a_list_names_the_split(tmp_path: Path, capsys: Any) -> None:
    source = voc(tmp_path / "voc", CAT, DOG, CAT)
    listed = tmp_path / "val.txt"
    listed.write_text("1 1\n2  -1\n")
    out = tmp_path / "out"
    classes = ("--classes", "dog", "cat", "cow")
    assert convert("voc", source, "--out", out, "--list", listed, "--split", "val", *classes) == 0
    document = load(out / "annotations" / "val.json", out / "images")
    assert [i["file_name"] for i in document["images"]] == ["1.jpg", "2.jpg"]
    assert [c["name"] for c in document["categories"]] == ["dog", "cat", "cow"]
    listed.write_text("1\n7\n")
    assert convert("voc", source, "--out", out, "--list", listed, "--split", "test") == 2
    assert "7.xml: no such file" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("<xmin>11</xmin>", "", "object 2: <xmin> is missing"),
        ("<xmin>11</xmin>", "<xmin>left</xmin>", "object 2: xmin is 'left', expected a number"),
        ("<xmin>11</xmin>", "<xmin>nan</xmin>", "object 2 (dog): the box nan"),
        ("<xmin>11</xmin>", "<xmin>30</xmin>", "object 2 (dog): the box x1 y1 x2 y2 = 29 5 11 10.5 has no area"),
        ("<xmin>11</xmin><xmax>11", "<xmin>71</xmin><xmax>75", "outside of its image"),
        ("<name>dog</name>", "<name> </name>", "object 2: <name> is missing or empty"),
        ("<difficult>1", "<difficult>maybe", "object 2: difficult is 'maybe', expected 0 or 1"),
        ("<width>60", "<width>61", "height, width are 40, 61, expected those of"),
        ("<width>60", "<width>6.5", "size: height, width are 40, 6.5"),
        ("</annotation>", "", "not valid XML"),
        ("annotation>", "notes>", "<notes>, expected <annotation>"),
        ("<annotation>", '<!DOCTYPE a [<!ENTITY e "x">]><annotation>', "declares entities"),
    ],
)
def test_what_is_broken_is_named(tmp_path: Path, capsys: Any, old: str, new: str, said: str) -> None:
    source = voc(tmp_path / "voc", CAT + DOG, CAT)
    path = source / "0.xml"
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))
    out = tmp_path / "out"
    assert convert("voc", source, "--out", out) == 2
    message = capsys.readouterr().err
    assert said in message
    assert str(path) in message
    assert not out.exists()
    assert convert("voc", source, "--out", out, "--skip") == 0
    said_too = capsys.readouterr().err
    assert said in said_too
    assert "left out 1 " in said_too
    document = load(out / "annotations" / "train.json", out / "images")
    assert len(document["annotations"]) == (2 if "1 object" in said_too else 1)


def test_nothing_to_read(tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "empty").mkdir()
    assert convert("voc", tmp_path / "empty", "--out", tmp_path / "out") == 2
    assert "holds no .xml file" in capsys.readouterr().err
    assert convert("voc", tmp_path / "none", "--out", tmp_path / "out") == 2
    assert "no such folder" in capsys.readouterr().err
    source = voc(tmp_path / "voc", CAT)
    (tmp_path / "voc" / "JPEGImages" / "0.jpg").unlink()
    assert convert("voc", source, "--out", tmp_path / "out", "--skip") == 2
    message = capsys.readouterr().err
    assert "no image is left" in message
    assert "no such file" in message
