"""`predict`: pictures in a folder, a list on demand, exit codes."""

from __future__ import annotations

import json
from pathlib import Path

import cv2
import numpy as np
import pytest

from detector.cli.predict import main
from tests.trained import checkpoint


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoint(tmp_path_factory.mktemp("run"), classes=("cat", "dog")).parent


def picture(path: Path) -> Path:
    cv2.imwrite(str(path), np.random.default_rng(0).integers(0, 255, (48, 64, 3), dtype=np.uint8))
    return path


def test_pictures_and_list(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture(tmp_path / "a.jpg")
    (tmp_path / "b.jpg").write_bytes(b"broken")
    out, listed = tmp_path / "out", tmp_path / "list.json"
    options = ["--out", str(out), "--json", str(listed), "--raw", "--device", "cpu"]
    assert (
        main([str(run / "best.pt"), str(tmp_path / "a.jpg"), str(tmp_path / "b.jpg"), *options, "--threshold", "0.35"])
        == 0
    )
    captured = capsys.readouterr()
    rows = json.loads(listed.read_text())
    assert [Path(row["file"]).name for row in rows] == ["a.jpg"]
    found = rows[0]["detections"]
    assert found
    assert all(d["score"] >= 0.35 and d["name"] in ("cat", "dog") for d in found)
    assert captured.out.strip() == f"1 image: {len(found)} detections, pictures in {out}; 1 file could not be read"
    assert "b.jpg" in captured.err
    assert "skipped" in captured.err
    assert cv2.imread(str(out / "a.jpg")).shape == (48, 64, 3)


def test_nothing_readable(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "b.jpg").write_bytes(b"broken")
    assert main([str(run), str(tmp_path), "--out", str(tmp_path / "out"), "--device", "cpu"]) == 2
    assert "0 images" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["none.pt", "HERE"], "none.pt: no such checkpoint"),
        (["RUN", "none.jpg"], "none.jpg: no such file or folder"),
        (["RUN", "HERE", "--device", "cuda:77"], "cuda:77"),
    ],
)
def test_mistakes(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    picture(tmp_path / "a.jpg")
    places = {"RUN": str(run), "HERE": str(tmp_path)}
    assert main([places.get(a, a) for a in arguments] + ["--out", str(tmp_path / "out")]) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert "Traceback" not in captured.err


@pytest.mark.parametrize(
    "arguments", [["best.pt"], ["best.pt", "a.jpg", "--threshold", "1"], ["best.pt", "a", "--batch-size", "0"]]
)
def test_usage(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as error:
        main(arguments)
    assert error.value.code == 2
