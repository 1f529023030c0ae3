from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from detector.cli.check_data import main
from tests.data.small_coco import document, write


def run(*arguments: object) -> int:
    return main([str(a) for a in arguments])


def test_a_clean_file_leaves_with_0(tmp_path: Path, capsys: Any) -> None:
    path, images = write(tmp_path)
    assert run(path, "--images", images) == 0
    assert "3 images, 5 annotations, 2 categories: 0 errors, 0 warnings, 1 notice" in capsys.readouterr().out


def test_errors_leave_with_2_and_are_shown_with_examples(tmp_path: Path, capsys: Any) -> None:
    content = document()
    content["annotations"][1]["bbox"] = [1, 2, 0, 4]
    path, images = write(tmp_path, content)
    (images / "3.png").unlink()
    assert run(path, "--images", images, "--json", tmp_path / "report.json") == 2
    out = capsys.readouterr().out
    for text in ("without width or height", "box-no-area", "image-missing", "102", "2 errors"):
        assert text in out
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["errors"] == 2
    assert report["fixed"] is None
    assert {(f["kind"], f["count"]) for f in report["findings"] if f["severity"] == "error"} == {
        ("box-no-area", 1),
        ("image-missing", 1),
    }
    assert run(path, "--no-images") == 2
    assert "1 error," in capsys.readouterr().out


def test_fix_writes_a_clean_file_and_says_what_was_changed(tmp_path: Path, capsys: Any) -> None:
    content = document()
    content["annotations"][1]["bbox"] = [1, 2, 0, 4]
    path, images = write(tmp_path, content)
    before = path.read_bytes()
    fixed = tmp_path / "new" / "fixed.json"
    assert run(path, "--images", images, "--fix", fixed) == 0
    assert "1 times a box without width or height: left out" in capsys.readouterr().out
    assert path.read_bytes() == before
    assert run(fixed, "--images", images, "--quick") == 0
    assert run(fixed, "--images", images, "--fix", tmp_path / "again.json") == 0
    assert "nothing had to be changed" in capsys.readouterr().out
    assert json.loads(fixed.read_text()) == json.loads((tmp_path / "again.json").read_text())
    assert run(path, "--images", images, "--fix", path) == 2
    assert path.read_bytes() == before


def test_what_cannot_be_mended_is_not_written(tmp_path: Path, capsys: Any) -> None:
    """However long the path is, no message is broken up where it goes into a file or a pipe."""
    folder = tmp_path / ("long" * 50)
    folder.mkdir()
    path, images = write(folder, '{"images": [')
    assert run(path, "--images", images, "--fix", tmp_path / "fixed.json", "--json", tmp_path / "report.json") == 2
    out = capsys.readouterr().out
    assert str(path) in out
    assert "cut off" in out
    assert "not written" in out
    assert not (tmp_path / "fixed.json").exists()
    assert json.loads((tmp_path / "report.json").read_text())["findings"][0]["kind"] == "file"


def test_the_image_folder_must_be_given(tmp_path: Path, capsys: Any) -> None:
    with pytest.raises(SystemExit) as left:
        run(tmp_path / "a.json")
    assert left.value.code == 2
    assert "--no-images" in capsys.readouterr().err


def test_help_and_check_need_no_torch() -> None:
    code = (
        "import sys\nfrom detector.cli.check_data import main\n"
        "try: main(['--help'])\nexcept SystemExit: pass\n"
        "assert not {'torch', 'cv2', 'numpy', 'rich'} & set(sys.modules), 'slow imports'"
    )
    root = Path(__file__).resolve().parents[2]
    subprocess.run([sys.executable, "-c", code], check=True, cwd=root, stdout=subprocess.DEVNULL)
