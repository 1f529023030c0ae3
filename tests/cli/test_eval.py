"""`eval`: the numbers on the last lines, files on demand, exit codes."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from detector.cli.eval import main
from detector.evaluate.coco import NUMBERS
from tests.trained import checkpoint

CASES = [
    ("cocoapi_val2014_100", "bbox"),
    ("cocoapi_val2014_100", "segm"),
    ("fastestdet_coco_val", "bbox"),
    ("stress", "bbox"),
    ("hotcoco_basic", "bbox"),
    ("hotcoco_edge", "bbox"),
    ("hotcoco_zero_ids", "bbox"),
]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoint(tmp_path_factory.mktemp("run")).parent


def numbers(output: str) -> dict[str, float]:
    lines = output.rstrip().splitlines()[-12:]
    assert all(re.fullmatch(r"\w+ -?\d\.\d{3}", line) for line in lines)
    return {name: float(value) for name, value in map(str.split, lines)}


@pytest.mark.parametrize("engine", ["hotcoco", "pycocotools"])
@pytest.mark.parametrize(("name", "iou_type"), CASES)
def test_known_scores(
    shared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, iou_type: str, engine: str
) -> None:
    folder = shared / "eval_fixtures" / name
    known = json.loads((folder / "expected.json").read_text())[iou_type]
    files = ["--annotations", str(folder / "gt.json"), "--detections", str(folder / f"dt_{iou_type}.json")]
    out = tmp_path / "out.json"
    for more, expected in (([], "stats"), (["--ignore-classes"], "stats_classes_ignored")):
        if expected not in known:
            continue
        assert main([*files, "--engine", engine, "--json", str(out), *more]) == 0
        written = json.loads(out.read_text())
        scores = {name: written[name] for name in NUMBERS}
        if name == "hotcoco_zero_ids" and engine == "hotcoco":
            assert written["AP"] == pytest.approx(1, abs=1e-6)  # pycocotools overlooks the annotation of id 0
        else:
            assert scores == pytest.approx(known[expected], abs=1e-6)
        printed = capsys.readouterr().out
        assert numbers(printed) == pytest.approx(scores, abs=0.00051)
        assert list(numbers(printed)) == list(NUMBERS)


def test_checkpoint(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The written detections score the same, by either engine."""
    out, again, found = tmp_path / "out.json", tmp_path / "again.json", tmp_path / "found.json"
    assert main([str(run / "best.pt"), "--raw", "--json", str(out), "--detections-out", str(found)]) == 0
    printed = capsys.readouterr().out
    assert "raw weights" in printed
    assert "5 images" in printed
    assert "circle" in printed  # the table of classes
    assert "note: " in printed
    assert len(json.loads(found.read_text())) > 100
    annotations = str(run / "data" / "val" / "annotations.json")
    for engine in ("hotcoco", "pycocotools"):
        files = ["--annotations", annotations, "--detections", str(found), "--engine", engine]
        assert main([*files, "--json", str(again)]) == 0
        assert json.loads(again.read_text()) == json.loads(out.read_text())
        assert numbers(capsys.readouterr().out) == numbers(printed)


def test_options_of_a_checkpoint(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out.json"
    arguments = [str(run), "--split", "test", "--max-dets", "200", "--batch-size", "1", "--engine", "pycocotools"]
    assert main([*arguments, "--raw", "--json", str(out), f"data.root={tmp_path / 'elsewhere'}"]) == 0
    printed = capsys.readouterr().out
    assert "3 images" in printed
    assert str(tmp_path / "elsewhere") in printed
    assert json.loads(out.read_text())["max_dets"] == 200
    assert "AR_200 " in printed.splitlines()[-1]
    assert main([str(run)]) == 0
    averaged = capsys.readouterr().out
    assert "averaged weights" in averaged
    assert numbers(averaged)["AR_100"] == 0  # these find nothing


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["none.pt"], "none.pt: no such checkpoint"),
        (["RUN", "data.rot=x"], r"data.rot: unknown key \(did you mean 'root'"),
        (["RUN", "--device", "cuda:77"], "cuda:77"),
        (["--annotations", "none.json", "--detections", "none.json"], "none.json: cannot read the detections"),
    ],
)
def test_mistakes(run: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str) -> None:
    assert main([str(run) if a == "RUN" else a for a in arguments]) == 2
    captured = capsys.readouterr()
    assert re.search(message, captured.err)
    assert "Traceback" not in captured.err
    assert captured.out == ""


@pytest.mark.parametrize(
    ("classes", "message"),
    [
        (("circle", "square"), "trained for 2 classes, the data have 3"),
        (("circle", "cross", "triangle"), "label 1 is 'cross' there, 'triangle' in the data"),
    ],
)
def test_other_classes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], classes: tuple[str, ...], message: str
) -> None:
    assert main([str(checkpoint(tmp_path, classes=classes))]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["best.pt", "--annotations", "a.json", "--detections", "b.json"],
        ["--annotations", "a.json"],
        ["best.pt", "--detections", "b.json"],
        ["best.pt", "--max-dets", "0"],
        ["best.pt", "--batch-size", "-1"],
        ["best.pt", "--iou-type", "segm"],
        ["--annotations", "a.json", "--detections", "b.json", "--split", "test"],
    ],
)
def test_usage(arguments: list[str], capsys: pytest.CaptureFixture[Any]) -> None:
    with pytest.raises(SystemExit) as error:
        main(arguments)
    assert error.value.code == 2
    assert "usage" in capsys.readouterr().err
