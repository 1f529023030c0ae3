"""Which cells run beside each other and with what share of the machine; what is asked before the first one starts."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch

from detector.lab.grid import cells
from detector.lab.lock import Busy, locked
from detector.lab.process import Ended
from detector.lab.run import Runner, ThisMachine, prepare
from detector.lab.standing import NEEDED, standing, task_of
from detector.lab.study import load_study
from detector.train.device import gpu_names
from tests.lab.conftest import Place


class Processes:
    """In the place of `CellProcess`: no process, but a note of what was running beside what."""

    def __init__(self, failing: str = "none") -> None:
        self.running: dict[Path, Mapping[str, str]] = {}
        self.seen: list[list[Mapping[str, str]]] = []
        self.failing = failing

    def __call__(self, folder: Path, environment: Mapping[str, str]) -> Processes.One:
        self.running[folder] = environment
        self.seen.append(list(self.running.values()))
        return Processes.One(self, folder)

    class One:
        def __init__(self, all_of_them: Processes, folder: Path) -> None:
            self.all, self.folder, self.looks = all_of_them, folder, 0

        def done(self) -> bool:
            self.looks += 1
            return self.looks > 2

        def ask_to_stop(self) -> None:
            raise AssertionError("nobody asks")

        def ended(self) -> Ended:
            del self.all.running[self.folder]
            if self.all.failing in str(self.folder):
                return Ended(1, ("ZeroDivisionError: of my own",))
            (self.folder / "result.json").write_text("{}")
            return Ended(0, ("AP 0",))


@pytest.mark.parametrize(("jobs", "gpus"), [(1, ()), (3, ()), (2, ("3", "5"))])
def test_jobs_at_a_time_each_with_its_share(
    fresh: Place, monkeypatch: pytest.MonkeyPatch, jobs: int, gpus: tuple[str, ...]
) -> None:
    processes = Processes()
    monkeypatch.setattr("detector.lab.run.CellProcess", processes)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    study = load_study(fresh.study, ["threads=3", "seeds=[0,1,2]"])
    assert Runner(study, ThisMachine(study, jobs, gpus), print)(cells(study, fresh.out)) is None
    assert len(processes.seen) == 6
    assert max(map(len, processes.seen)) == jobs
    for beside in processes.seen:
        assert {environment["OMP_NUM_THREADS"] for environment in beside} == {"3"}
        given = [environment.get("CUDA_VISIBLE_DEVICES") for environment in beside]
        assert set(given) <= ({*gpus} or {None})
        assert not gpus or len(set(given)) == len(given)  # one each


def test_gpus_as_this_process_was_given_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """A study that was started on some of a machine's GPUs leaves the others alone."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert gpu_names() == ("0", "1")
    for given, names in (("5,3", ("5", "3")), ("GPU-a, GPU-b", ("GPU-a", "GPU-b")), ("4,6,-1,7", ("4", "6"))):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", given)
        assert gpu_names() == names
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu_names() == ()


def test_a_failed_cell_does_not_stop_the_rest_and_is_tried_again(fresh: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("detector.lab.run.CellProcess", Processes(failing="two/seed-0"))
    study = load_study(fresh.study)
    grid = cells(study, fresh.out)
    said: list[str] = []
    Runner(study, ThisMachine(study, 2), said.append)(grid)
    assert any(line.startswith("data/two/seed-0: failed: ZeroDivisionError: of my own (see ") for line in said)
    assert said[-1] == "3 of 4 cells finished"
    assert standing(grid[1], task_of(study)).state == "failed"
    for cell in grid:
        if cell.result.is_file():
            cell.result.write_text(json.dumps(dict.fromkeys(NEEDED, 0)))
    monkeypatch.setattr("detector.lab.run.CellProcess", Processes())
    Runner(study, ThisMachine(study, 2), said.append)(grid)
    assert "4 cells: 3 finished, 1 to run, 2 at a time" in said
    assert said[-1] == "4 of 4 cells finished"


def test_what_is_missing_is_said_before_anything_runs(fresh: Place, capsys: pytest.CaptureFixture[str]) -> None:
    files = "{annotations: a.json, images: a}"
    fresh.change("seeds:", "datasets:\n  made: {}\n  far:\n    data: {type: coco, root: some/where, "
                 f"train: {files}, val: {files}}}\nseeds:")  # fmt: skip
    fresh.change("assigner: {type: fcos}", "assigner: {type: fcos}, model.backbone.weights: w.pth")
    assert fresh.compare() == 2
    shown = capsys.readouterr().err
    assert shown.count("\n") == 4
    for message in (
        "datasets.far: data.train.annotations: some/where/a.json: no such file; set data.root",
        "datasets.far: data.val.annotations: ",
        "arms.two on datasets.made: model.backbone.weights: w.pth: no such file",
        "arms.two on datasets.far: model.backbone.weights: w.pth: no such file",
    ):
        assert shown.count(message) == 1
    assert not (fresh.out / "cells").exists()
    assert fresh.compare("--report-only") == 1  # a look needs no data


def test_sources_are_looked_for_one_by_one(fresh: Place, capsys: pytest.CaptureFixture[str]) -> None:
    files = "{annotations: a.json, images: a}"
    fresh.change("seeds:", "datasets:\n  both: {data: {type: several, sources: {made: {type: shapes, root: here}, "
                 f"far: {{type: coco, root: some/where, train: {files}}}}}}}}}\nseeds:")  # fmt: skip
    assert fresh.compare() == 2
    shown = capsys.readouterr().err
    assert "data.sources.far.train.annotations: some/where/a.json: no such file" in shown
    assert shown.count("\n") == 1


def test_a_device_that_is_not_there(fresh: Place, monkeypatch: pytest.MonkeyPatch,
                                    capsys: pytest.CaptureFixture[str]) -> None:  # fmt: skip
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    fresh.change("seeds:", "common: {train.device: cuda}\nseeds:")
    assert fresh.compare() == 2
    assert "every arm on every data set: train.device: device 'cuda': no CUDA GPU" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("result.json", b"", "cannot read the cell's result"),
        ("result.json", b'{"numbers": {"AP"', "cannot read the cell's result"),
        ("result.json", b"\xff\xfe", "cannot read the cell's result"),
        ("result.json", b"[1]", "expected keys and values, found list"),
        ("result.json", b'{"numbers": {}}', "the cell's result has no per_class, seconds_per_step"),
        ("identity.json", b"{", "cannot read which configuration the cell was run with"),
    ],
)
@pytest.mark.parametrize("look", [["--report-only"], []], ids=["report", "run"])
def test_a_damaged_cell_is_named_and_left_as_it_is(
    fresh: Place, capsys: pytest.CaptureFixture[str], name: str, content: bytes, message: str, look: list[str]
) -> None:
    study = load_study(fresh.study)
    prepare(cells(study, fresh.out)[0], task_of(study))
    path = fresh.cell("one", 0) / name
    path.write_bytes(content)
    assert fresh.compare(*look) == 2
    shown = capsys.readouterr().err
    assert f"error: {path.resolve()}: " in shown
    assert message in shown
    assert "delete" in shown
    assert shown.count("\n") == 1
    assert path.read_bytes() == content


@pytest.mark.parametrize("content", [b"", b"{}", b"[1]"])
def test_a_damaged_note_of_a_failure_holds_nothing_up(fresh: Place, content: bytes) -> None:
    study = load_study(fresh.study)
    cell = cells(study, fresh.out)[0]
    cell.folder.mkdir(parents=True)
    cell.failure.write_bytes(content)
    found = standing(cell, task_of(study))
    assert found.state == "failed"
    assert "log.txt" in found.reason


def test_a_full_disk_does_not_keep_a_study_from_being_locked(tmp_path: Path) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full here")
    (tmp_path / "lock").symlink_to("/dev/full")
    with locked(tmp_path):
        pass


def test_the_holder_of_a_lock_is_named_and_gone_when_it_ends(tmp_path: Path) -> None:
    with locked(tmp_path):
        with pytest.raises(Busy, match=f"process {os.getpid()} on"), locked(tmp_path):
            pass
        assert (tmp_path / "lock").read_text().startswith(f"process {os.getpid()} on")
    assert (tmp_path / "lock").read_text() == ""
    with locked(tmp_path):
        pass
