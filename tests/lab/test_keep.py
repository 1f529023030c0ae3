"""A study that goes on from what a repository keeps of it."""

from __future__ import annotations

import json
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from detector.evaluate.matches import Matches
from detector.evaluate.treatment import Treatment
from detector.lab.grid import cells
from detector.lab.lock import locked
from detector.lab.study import load_study
from tests.lab.conftest import Place

Copy = Callable[[], Place]


@pytest.fixture
def kept(copy: Copy, tmp_path: Path) -> tuple[Place, Path]:
    here, folder = copy(), tmp_path / "kept"
    assert here.compare("--report-only", "--keep", str(folder)) == 0
    return here, folder


def test_kept_cells_say_the_same(kept: tuple[Place, Path], capsys: pytest.CaptureFixture[str]) -> None:
    """Elsewhere nothing is run again, and every number is the same; only pictures need weights."""
    here, folder = kept
    assert {p.suffix for p in folder.rglob("*") if p.is_file()} == {".zip", ".md", ".csv", ".svg"}
    before = {name: (here.out / name).read_bytes() for name in ("tables.md", "cells.csv", "tables.tex")}
    matches = Matches.load(here.cell("two", 1) / "matches.npz")
    treatment = Treatment.load(here.cell("two", 1) / "treatment.npz")
    shutil.rmtree(here.out)
    capsys.readouterr()
    assert here.compare("--keep", str(folder)) == 0
    said = capsys.readouterr().out
    assert "4 cells taken over" in said
    assert "4 cells: 4 finished, 0 to run" in said
    assert "0 more cells" in said
    for name, content in before.items():
        assert (here.out / name).read_bytes() == content
    again = Matches.load(here.cell("two", 1) / "matches.npz")
    for name, value in vars(matches).items():
        np.testing.assert_array_equal(value, getattr(again, name))
    for name, value in vars(treatment).items():
        np.testing.assert_array_equal(value, getattr(Treatment.load(here.cell("two", 1) / "treatment.npz"), name))
    assert not (here.cell("two", 1) / "run").exists()
    assert "no pictures" in (here.out / "report.html").read_text(encoding="utf-8")


@pytest.mark.usefixtures("cells_here")
def test_what_is_missing_is_run(kept: tuple[Place, Path], capsys: pytest.CaptureFixture[str]) -> None:
    here, folder = kept
    (folder / "cells" / "data" / "two" / "seed-1.zip").unlink()
    shutil.rmtree(here.out)
    capsys.readouterr()
    assert here.compare("--keep", str(folder)) == 0
    said = capsys.readouterr().out
    assert "3 cells taken over" in said
    assert "4 cells: 3 finished, 1 to run" in said
    assert "1 more cells" in said
    assert (folder / "cells" / "data" / "two" / "seed-1.zip").is_file()


def test_another_configuration_is_not_counted(kept: tuple[Place, Path], capsys: pytest.CaptureFixture[str]) -> None:
    here, folder = kept
    shutil.rmtree(here.out)
    here.change("resamples", "common: {train.clip_norm: 3}\nresamples")
    assert here.compare("--keep", str(folder)) == 2
    shown = capsys.readouterr().err
    assert "was run with another configuration: train.clip_norm" in shown
    assert str(folder / "cells" / "data" / "one" / "seed-0.zip") in shown
    assert "--keep" in shown
    assert not (here.out / "cells").exists()  # none was put there


def test_kept_cells_give_way_to_none_of_another_configuration(
    kept: tuple[Place, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    """Finished cells here, and kept ones of another configuration: these may be all that is left of it."""
    here, folder = kept
    path = folder / "cells" / "data" / "one" / "seed-0.zip"
    with zipfile.ZipFile(path) as archive:
        files = {name: archive.read(name) for name in archive.namelist()}
    known = json.loads(files["identity.json"])
    files["identity.json"] = json.dumps({**known, "train.clip_norm": 3}).encode()
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    before = path.read_bytes()
    assert here.compare("--report-only", "--keep", str(folder)) == 2
    assert f"{path}: was run with another configuration: train.clip_norm was 3" in capsys.readouterr().err
    assert path.read_bytes() == before


def test_nothing_is_put_where_another_process_works(
    kept: tuple[Place, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    here, folder = kept
    shutil.rmtree(here.out)
    with locked(here.out):
        assert here.compare("--keep", str(folder)) == 2
        assert "is working on this study" in capsys.readouterr().err
        assert not (here.out / "cells").exists()
        assert here.compare("--report-only", "--keep", str(folder)) == 1
        shown = capsys.readouterr().out
        assert "no cells taken over: " in shown
        assert "is working on this study" in shown
        assert not (here.out / "cells").exists()
    assert here.compare("--report-only", "--keep", str(folder)) == 0
    assert "4 cells taken over" in capsys.readouterr().out


def test_a_folder_that_cannot_be_made_is_said_before_anything_runs(
    fresh: Place, capsys: pytest.CaptureFixture[str]
) -> None:
    assert fresh.compare("--keep", str(fresh.study)) == 2
    assert f"error: --keep {fresh.study}: cannot make this folder" in capsys.readouterr().err
    assert not (fresh.out / "cells").exists()


def test_a_setting_newer_than_the_cell(copy: Copy, capsys: pytest.CaptureFixture[str]) -> None:
    """Cells from before a setting came are counted where it is left as it comes, and refused where it is not."""
    here = copy()
    for path in here.out.rglob("identity.json"):
        known = json.loads(path.read_text())
        del known["train.clip_norm"], known["data.pad_multiple"]
        path.write_text(json.dumps(known))
    assert here.compare("--report-only") == 0
    here.change("resamples", "common: {train.clip_norm: 3}\nresamples")
    assert here.compare("--report-only") == 2
    assert "train.clip_norm was None and is now 3" in capsys.readouterr().err


def test_kept_tables_name_no_place_of_this_machine(kept: tuple[Place, Path]) -> None:
    here, folder = kept
    cell = here.cell("two", 1)
    (cell / "result.json").unlink()
    failure = {"kind": "failed", "reason": f"{cell.resolve()}/run/last.pt: damaged"}
    (cell / "failure.json").write_text(json.dumps(failure))
    assert here.compare("--report-only", "--keep", str(folder)) == 1
    note = "failed: cells/data/two/seed-1/run/last.pt: damaged"
    assert note in (folder / "tables.md").read_text(encoding="utf-8")
    assert str(here.out.resolve()) not in (folder / "tables.md").read_text(encoding="utf-8")


def test_a_damaged_file_is_named(kept: tuple[Place, Path], capsys: pytest.CaptureFixture[str]) -> None:
    here, folder = kept
    broken = folder / "cells" / "data" / "one" / "seed-0.zip"
    whole = broken.read_bytes()
    broken.write_bytes(whole[:100] + bytes(200) + whole[300:])  # within what is packed
    assert here.compare("--report-only", "--keep", str(folder)) == 0
    assert "1 more cells" in capsys.readouterr().out
    assert broken.read_bytes() == whole
    shutil.rmtree(here.out)
    broken.write_bytes(whole[:100] + bytes(200) + whole[300:])
    assert here.compare("--keep", str(folder)) == 2
    assert str(broken) in capsys.readouterr().err
    broken.write_bytes(whole[:500])
    assert here.compare("--keep", str(folder)) == 2
    assert str(broken) in capsys.readouterr().err
    with zipfile.ZipFile(broken, "w") as archive:
        archive.writestr("identity.json", "[")
    assert here.compare("--keep", str(folder)) == 2
    assert str(broken) in capsys.readouterr().err
    with zipfile.ZipFile(broken, "w") as archive:
        archive.writestr("identity.json", "{}")
    assert here.compare("--keep", str(folder)) == 2
    assert str(broken) in capsys.readouterr().err


def test_weights_count_by_what_they_hold(fresh: Place, tmp_path: Path) -> None:
    """The same file elsewhere is the same run; another file under the same name is not."""
    grid = cells(load_study(fresh.study), fresh.out)
    one, two = tmp_path / "one.safetensors", tmp_path / "two.safetensors"
    one.write_bytes(b"weights")
    two.write_bytes(b"weights")

    def identity(path: Path) -> str:
        backbone = grid[0].config.model.backbone.model_copy(update={"weights": str(path)})  # type: ignore[union-attr]
        model = grid[0].config.model.model_copy(update={"backbone": backbone})
        config = grid[0].config.model_copy(update={"model": model})
        found = type(grid[0])("one", "data", 0, config, fresh.out).identity()
        return str(found["model.backbone.weights"])

    assert identity(one) == identity(two)
    two.write_bytes(b"other weights")
    assert identity(one) != identity(two)


def test_a_mistake_of_every_arm_is_said_once(fresh: Place, capsys: pytest.CaptureFixture[str]) -> None:
    fresh.change("resamples", "common: {train.clip_nrom: 3}\nresamples")
    assert fresh.compare() == 2
    said = capsys.readouterr().err
    assert said.count("clip_nrom") == 1
    assert "every arm on every data set" in said
