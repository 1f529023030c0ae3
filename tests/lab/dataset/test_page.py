"""The command from files to tables, JSON and page; the page in headless Chromium; wrong requests are told."""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from detector.cli.analyze_data import main
from tests.lab.browsing import shown

Write = Callable[..., Path]

CLASSES = ["round <&> red", "b", "c"]


def images(seed: int, count: int = 8) -> list[tuple[int, int, list[tuple[object, ...]]]]:
    rng = np.random.default_rng(seed)
    made = []
    for i in range(count):
        objects = [(CLASSES[int(rng.integers(2))], *map(int, rng.integers(0, 60, 2)), *map(int, rng.integers(8, 40, 2)))
                   for _ in range(i % 5)]  # fmt: skip
        made.append((96, 128, objects))
    return made


@pytest.fixture
def place(write: Write, tmp_path: Path) -> Path:
    """A train and a val file; val-1 is train-2 encoded anew, val-3 is damaged, val-5 is missing."""
    write("train", images(0), CLASSES, files=True)
    write("val", images(1), CLASSES, files=True, first=100)
    folder = tmp_path / "images"
    copy = cv2.imread(str(folder / "train-2.png"))
    cv2.imwrite(str(folder / "again.jpg"), copy, [cv2.IMWRITE_JPEG_QUALITY, 40])
    (folder / "val-1.png").write_bytes((folder / "again.jpg").read_bytes())
    (folder / "val-3.png").write_bytes(b"\x89PNG\r\n\x1a\nnot much of one")
    (folder / "val-5.png").unlink()
    return tmp_path


def run(place: Path, *more: str) -> int:
    files = [str(place / "train.json"), str(place / "val.json"), "--images", str(place / "images")]
    return main([*files, "--resize", "short_edge", "96", "128", "--strides", "8", "16", *more])


def test_tables_and_json(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(place, "--json", str(place / "out" / "found.json"), "--anchors", "4") == 0
    said = capsys.readouterr().out
    assert "round <&> red" in said
    assert "val: 2 images cannot be read" in said
    assert "val-3.png" in said
    assert "val-5.png" in said
    assert "1 of 8 images of val look like an image of train" in said
    assert "declared, but in no image: 1 class ('c')" in said
    assert "advice: data.resize={type: short_edge" in said
    found = json.loads((place / "out" / "found.json").read_text())
    groups = found["files"]["groups"]
    assert [[m["file_name"] for m in g] for g in groups] == [["train-2.png", "val-1.png"]]
    assert found["files"]["kinds"]["val"] == {"PNG RGB": 5, "JPEG RGB": 1}
    assert found["files"]["twins"] == [{"split": "train", "of": "val", "images": 1},
                                       {"split": "val", "of": "train", "images": 1}]  # fmt: skip
    assert [len(a["sizes"]) for a in found["anchors"]["k_means"]] == [1, 2, 3, 4]
    assert found["splits"][0]["objects"] == sum(len(o) for _, _, o in images(0))
    assert {r["priors"] for r in found["rules"]["found"]} == {
        "points", "9 anchors", "4 k-means anchors", "4 k-medoid anchors",
    }  # fmt: skip
    assert all(0 <= r["recall"] <= 1 for r in found["rules"]["found"])


def test_the_same_twice_and_a_sample(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    outputs = []
    for name in ("a", "b"):
        out = [str(place / f"{name}.json"), "--html", str(place / f"{name}.html")]
        assert run(place, "--max-images", "5", "--seed", "3", "--json", *out) == 0
        outputs.append([(place / f"{name}.{kind}").read_text() for kind in ("json", "html")])
    assert outputs[0] == outputs[1]
    assert "train: 5 of 8 images, drawn with seed 3 (--max-images)" in capsys.readouterr().out
    assert json.loads(outputs[0][0])["splits"][1]["images"] == 5


def test_without_images(place: Path) -> None:
    out = place / "found.json"
    assert main([str(place / "train.json"), "--no-images", "--json", str(out)]) == 0
    assert json.loads(out.read_text())["files"] is None


def test_a_recipe(shared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its splits, resize, strides, priors and rule; also of a two-stage model."""
    out = tmp_path / "found.json"
    root = f"data.root={shared / 'datasets' / 'bccd'}"
    assert main(["bccd/atss_r18.yaml", root, "assigner.topk=5", "--max-images", "20", "--json", str(out)]) == 0
    found = json.loads(out.read_text())
    assert [s["name"] for s in found["splits"]] == ["train", "val", "test"]
    assert found["settings"]["resize"]["short"] == 240
    assert found["settings"]["strides"] == [8, 16, 32, 64]
    assert "atss (recipe's)" in {r["rule"] for r in found["rules"]["found"]}
    chosen = ["--splits", "val", "--no-images", "--max-images", "20", "--json", str(out)]
    assert main(["bccd/faster_rcnn_r18.yaml", root, *chosen]) == 0
    found = json.loads(out.read_text())
    assert [s["name"] for s in found["splits"]] == ["val"]
    assert found["settings"]["strides"] == [4, 8, 16, 32, 64]
    assert found["rules"]["found"][0]["priors"] == "recipe's"
    assert "max_iou (recipe's)" in {r["rule"] for r in found["rules"]["found"]}
    capsys.readouterr()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--resize", "short_edge", "96"], "--resize short_edge 96: expected one of short_edge, letterbox, fixed"),
        (["--resize", "fixed", "0", "96"], "from 1 to 16384"),
        (["--strides", "16", "8"], "--strides 16 8: expected rising numbers"),
        (["--anchors", "1"], "--anchors 1: every level needs one, and there are 2 strides (8, 16)"),
        (["--splits", "one"], "1 names for 2 annotation files"),
        (["--splits", "one", "one"], "two splits are called 'one'"),
        (["--html", "/proc/page.html"], "/proc/page.html: cannot write the file"),
    ],
)
def test_wrong_requests(place: Path, more: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(place, *more) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere.json", "--no-images"], "nowhere.json: cannot read the annotation file"),
        (["nowhere.yaml"], "nowhere.yaml: no such file"),
        (["quickstart", "--splits", "training"], "a recipe has the splits train, val, test"),
        (["quickstart", "word"], "'word': expected key=value"),
        (["coco_tiny.yaml", "--splits", "test"], "data.test is not set"),
    ],
)
def test_wrong_sources(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [["a.json"], ["a.json", "b.yaml"], ["a.json", "--no-images", "--share", "1.5"]])
def test_wrong_usage(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2


@pytest.fixture
def page(place: Path) -> Path:
    path = place / "page.html"
    assert run(place, "--html", str(path)) == 0
    return path


def test_nothing_comes_from_elsewhere(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    sources = re.findall(r'(?:src|href)="([^"#][^"]*)"', text)
    assert sources
    assert all(s.startswith(("data:image/jpeg;base64,", "data:image/png;base64,")) for s in sources)
    assert "@import" not in text
    assert not re.search(r"url\((?!#)", text)
    assert not re.findall(r"https?://(?!www\.w3\.org/)", text)
    for heading in ("Advice", "Classes", "Boxes", "Overlap", "Images", "Anchors", "Rules"):
        assert f"<h2>{heading}</h2>" in text
    assert "round &lt;&amp;&gt; red" in text
    assert "#010203" not in text
    assert "#030201" not in text


@pytest.mark.parametrize(("width", "scheme"), [(1200, "light"), (390, "dark")])
def test_in_a_browser(page: Path, browser: Any, width: int, scheme: str) -> None:
    feature = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", feature)
    shown(browser, page, width)
    assert browser.get_log("browser") == []
    assert browser.execute_script("return document.documentElement.scrollWidth") <= width
    broken = browser.execute_async_script(
        "const done = arguments[0]; Promise.all([...document.images].map(i => { i.loading = 'eager';"
        " return i.decode().then(() => i.naturalWidth > 0, () => false); }))"
        ".then(all => done([all.length, all.filter(x => !x).length]))"
    )
    assert broken == [2, 0]
    plots = browser.execute_script(
        "return [...document.querySelectorAll('svg.plot')].map(s => [s.getBoundingClientRect().width,"
        " s.getBoundingClientRect().height])"
    )
    assert len(plots) >= 12
    assert all(100 < w <= width and h > 30 for w, h in plots)
    # Words of plots have the page's ink, which differs from the paper in either scheme.
    ink, paper = (_luminance(browser, selector, what) for selector, what in
                  (("svg.plot text", "fill"), ("body", "backgroundColor")))  # fmt: skip
    assert (ink < 0.3 and paper > 0.9) if scheme == "light" else (ink > 0.7 and paper < 0.2)
    assert "data.resize=" in browser.find_element("id", "advice").text


def test_it_prints(page: Path, browser: Any) -> None:
    """In dark surroundings too: dark words on white paper."""
    shown(browser, page, 720)
    feature = {"media": "print", "features": [{"name": "prefers-color-scheme", "value": "dark"}]}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", feature)
    assert browser.execute_script("return document.documentElement.scrollWidth") <= 720
    assert _luminance(browser, "svg.plot text", "fill") < 0.3
    assert _luminance(browser, "body", "backgroundColor") > 0.9
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "", "features": []})
    content = base64.b64decode(browser.execute_cdp_cmd("Page.printToPDF", {"printBackground": True})["data"])
    assert content.startswith(b"%PDF")
    assert 2 <= len(re.findall(rb"/Type\s*/Page\b", content)) <= 20


def _luminance(browser: Any, selector: str, what: str) -> float:
    """0 black to 1 white."""
    text = browser.execute_script(f"return getComputedStyle(document.querySelector('{selector}')).{what}")
    numbers = [float(n) for n in re.findall(r"[\d.]+", text)[:3]]
    return sum(numbers) / 3 / 255
