"""Studies from YAML to finished cells: what is checked, what is run, and what is never counted."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from detector.config.load import load_config
from detector.data.loader import train_loader
from detector.errors import ConfigError, UserError
from detector.lab.grid import cells, differences, settings_text
from detector.lab.lock import locked
from detector.lab.run import Runner, ThisMachine
from detector.lab.standing import standing, task_of
from detector.lab.study import flat, keys_of, load_study
from detector.train.checkpoint import load_checkpoint
from detector.train.device import find_device
from detector.train.state import TrainingState
from tests.lab.conftest import Place

Copy = Callable[[], Place]


def test_a_study_leaves_what_it_promises(done: Place) -> None:
    for arm in ("one", "two"):
        for seed in (0, 1):
            folder = done.cell(arm, seed)
            result = json.loads((folder / "result.json").read_text())
            last = load_checkpoint(folder / "run" / "last.pt")
            assert result["step"] == last["step"] == 15
            assert result["numbers"] == last["numbers"]  # one evaluation, at the end, so best is last
            assert last["config"]["assigner"]["type"] == {"one": "atss", "two": "fcos"}[arm]
            assert last["config"]["seed"] == seed
            assert result["seconds_per_step"] > 0
            assert result["memory_mb"] > 0
            assert [step for step, _ in result["flips"]] == [3, 6, 9, 12, 15]
    assert {p.name for p in done.out.iterdir()} == {
        "cells", "lock", "cells.csv", "report.html", "scores.csv", "summary.json", "tables.md", "tables.tex",
        "verdicts.csv",
    }  # fmt: skip


def test_arms_of_a_seed_are_paired(fresh: Place) -> None:
    """Same first weights where shapes are equal, same batches; another head does not shift what it is not."""
    fresh.change("  two: {assigner: {type: fcos}}", "  two: {assigner: {type: fcos}}\n"
                 "  anchors: {model.head.priors: {type: anchors}, model.head.convs: 2, model.head.quality: false,"
                 " criterion.quality: null}")  # fmt: skip
    grid = {(c.arm, c.seed): c for c in cells(load_study(fresh.study), fresh.out)}
    states, batches = {}, {}
    for key, cell in grid.items():
        data = cell.config.data.open("train")
        state = TrainingState.build(cell.config, data.index, find_device("cpu"), load_weights=True)
        states[key] = dict(state.module.model.named_parameters())
        loader = train_loader(data, augment=cell.config.augment, resize=cell.config.data.resize, batch_size=4,
                              seed=cell.config.seed, start_step=0, stop_step=4, workers=0)  # fmt: skip
        batches[key] = [(b.images.clone(), b.objects.boxes, b.ids) for b in loader]
    for arm in ("two", "anchors"):
        names = [n for n, p in states["one", 0].items() if n in states[arm, 0] and states[arm, 0][n].shape == p.shape]
        assert len(names) > 20
        assert any("class_tower.0" in n for n in names)
        for name in names:
            assert torch.equal(states["one", 0][name], states[arm, 0][name]), name
        for one, other in zip(batches["one", 0], batches[arm, 0], strict=True):
            assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
    # Another seed, other weights and batches; and parameters of one shape do not share their values.
    weights = {n: p for n, p in states["one", 0].items() if p.dim() > 1}
    assert all(not torch.equal(p, states["one", 1][n]) for n, p in weights.items())
    assert not torch.equal(batches["one", 0][0][0], batches["one", 1][0][0])
    same = [(a, b) for a in weights for b in weights if a < b and torch.equal(weights[a], weights[b])]
    assert not same


def test_first_weights_keep_their_distribution(fresh: Place) -> None:
    config = load_config(fresh.folder / "tiny.yaml", ["model.head.channels=64", "model.neck.channels=64"])
    index = config.data.open("train").index
    found = dict(
        TrainingState.build(config, index, find_device("cpu"), load_weights=True).module.model.named_parameters()
    )
    torch.manual_seed(0)
    plain = dict(config.model.build(len(index.classes)).named_parameters())
    for name, parameter in plain.items():
        if parameter.numel() > 2000:
            assert found[name].std().item() == pytest.approx(parameter.std().item(), rel=0.1), name
        elif parameter.unique().numel() == 1:
            assert torch.equal(found[name], parameter), name


def test_a_second_call_runs_nothing_again(copy: Copy, capsys: pytest.CaptureFixture[str]) -> None:
    here = copy()
    before = {p: p.stat().st_mtime_ns for p in here.out.rglob("result.json")}
    capsys.readouterr()
    assert here.compare() == 0
    assert "4 cells: 4 finished, 0 to run" in capsys.readouterr().out
    assert {p: p.stat().st_mtime_ns for p in here.out.rglob("result.json")} == before


def test_what_was_interrupted_goes_on(copy: Copy, done: Place, capsys: pytest.CaptureFixture[str]) -> None:
    """Killed in the middle: the study goes on from the last checkpoint to the same weights and numbers."""
    here = copy()
    cell = here.cell("two", 1)
    expected = json.loads((cell / "result.json").read_text())
    for path in (cell / "result.json", cell / "run" / "last.pt", cell / "run" / "best.pt"):
        path.unlink()
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen([sys.executable, "-m", "detector.lab.cell", str(cell)], env=environment,
                               stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)  # fmt: skip
    while process.poll() is None and not (cell / "run" / "last.pt").exists():
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (cell / "result.json").exists()
    assert here.compare() == 0
    assert "data/two/seed-1: going on" in capsys.readouterr().out
    result = json.loads((cell / "result.json").read_text())
    for key in ("numbers", "step", "flips", "assignment"):
        assert json.dumps(result[key]) == json.dumps(expected[key]), key
    weights = [load_checkpoint(p.cell("two", 1) / "run" / "last.pt")["model"] for p in (here, done)]
    assert all(torch.equal(a, b) for a, b in zip(weights[0].values(), weights[1].values(), strict=True))


def test_a_cell_that_diverges_is_named_and_the_rest_goes_on(copy: Copy, capsys: pytest.CaptureFixture[str]) -> None:
    here = copy()
    here.change("seeds: [0, 1]", "seeds: [0]")
    here.change("  two:", "  wild: {train.optimizer.lr: 1e30, train.schedule: {type: cosine, warmup: null}}\n  two:")
    assert here.compare() == 1
    shown = capsys.readouterr().out
    assert "data/wild/seed-0: failed: step" in shown
    assert "training has diverged" in shown
    summary = json.loads((here.out / "summary.json").read_text())
    assert {c["name"]: c["state"] for c in summary["cells"]} == {
        "data/one/seed-0": "finished", "data/wild/seed-0": "diverged", "data/two/seed-0": "finished"
    }  # fmt: skip
    wild = next(r for r in summary["rows"] if r["arm"] == "wild")
    assert wild["seeds"] == []
    assert wild["missing"] == [0]
    assert wild["scores"]["AP"]["mean"] is None
    assert "data/wild/seed-0: diverged: step" in (here.out / "report.html").read_text()
    # It is a result: the next call leaves it alone unless asked to try again.
    assert here.compare() == 1
    assert "0 to run" in capsys.readouterr().out


@pytest.mark.slow
def test_a_full_disk_is_said_and_nothing_is_lost(copy: Copy, monkeypatch: pytest.MonkeyPatch,
                                                 capsys: pytest.CaptureFixture[str]) -> None:  # fmt: skip
    """A real cell under a limit on the size of files, which the system reports like a full disk."""
    here = copy()
    (here.cell("two", 1) / "result.json").unlink()
    for path in (here.cell("two", 1) / "run").glob("*.pt"):
        path.unlink()
    limited = here.folder / "limited"
    limited.write_text(f'#!/bin/sh\nulimit -f 40\nexec {sys.executable} "$@"\n')
    limited.chmod(0o755)
    with monkeypatch.context() as patch:
        patch.setattr("detector.lab.process.sys.executable", str(limited))
        assert here.compare() == 1
    shown = capsys.readouterr().out
    assert "data/two/seed-1: failed:" in shown
    assert "disk is full" in shown or "cannot" in shown
    summary = json.loads((here.out / "summary.json").read_text())
    assert [c["state"] for c in summary["cells"]].count("finished") == 3
    assert here.compare() == 0  # with room again it goes on


def test_a_log_that_cannot_be_written_does_not_hide_the_reason(fresh: Place) -> None:
    study = load_study(fresh.study, ["seeds=[0]"])
    grid = cells(study, fresh.out)
    fresh.out.mkdir()
    (fresh.out / "cells").write_text("a file in the way")
    said: list[str] = []
    Runner(study, ThisMachine(study, 1), said.append)(grid[:1])
    assert any(line.startswith("data/one/seed-0: failed:") and "cannot write" in line for line in said)


def test_one_process_at_a_time(copy: Copy, capsys: pytest.CaptureFixture[str]) -> None:
    here = copy()
    with locked(here.out):
        assert here.compare() == 2
        shown = capsys.readouterr().err
        assert f"{here.out}: process {os.getpid()} on " in shown
        assert "--report-only" in shown
        assert shown.count("\n") == 1
        assert here.compare("--report-only") == 0


def test_a_cell_of_another_configuration_is_not_counted(copy: Copy, capsys: pytest.CaptureFixture[str]) -> None:
    here = copy()
    recipe = here.folder / "tiny.yaml"
    recipe.write_text(recipe.read_text().replace("lr: 2e-3", "lr: 1e-3"))
    assert here.compare("--report-only") == 2
    shown = capsys.readouterr().err
    assert "train.optimizer.lr was 0.002 and is now 0.001" in shown
    assert "--out" in shown


def test_half_finished(copy: Copy, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """A report of what is there: each finished cell once, the others by name, pairs only where both are finished."""
    here = copy()
    (here.cell("two", 1) / "result.json").unlink()
    (here.cell("one", 0) / "result.json").unlink()
    stray = here.out / "cells" / "data" / "gone" / "seed-0"
    stray.mkdir(parents=True)
    (stray / "result.json").write_text((here.cell("one", 1) / "result.json").read_text())
    assert here.compare("--report-only") == 1
    shown = capsys.readouterr().out
    assert "note: 2 of 4 cells are not finished" in shown
    assert "note: started: data/one/seed-0, data/two/seed-1\n" in shown
    summary = json.loads((here.out / "summary.json").read_text())
    assert [(r["arm"], r["seeds"], r["missing"]) for r in summary["rows"]] == [("one", [1], [0]), ("two", [0], [1])]
    assert [r["scores"]["AP"]["count"] for r in summary["rows"]] == [1, 1]
    assert all(not r["comparisons"] for r in summary["rows"])  # no seed in common
    assert len((here.out / "cells.csv").read_text().splitlines()) == 3
    monkeypatch.setattr("detector.lab.summary.NAMED", 1)  # of a large study a few names must do
    assert here.compare("--report-only") == 1
    assert "note: started: data/one/seed-0 and 1 more\n" in capsys.readouterr().out


@pytest.mark.slow
def test_a_stopped_study_stops_its_cells(fresh: Place) -> None:
    """SIGTERM to the study: the running cell saves and ends, the next call goes on."""
    fresh.change("seeds: [0, 1]", "seeds: [0]")
    recipe = fresh.folder / "tiny.yaml"
    recipe.write_text(recipe.read_text().replace("steps: 15", "steps: 100000"))
    tool = Path(__file__).resolve().parents[2] / "tools" / "compare.py"
    process = subprocess.Popen([sys.executable, str(tool), str(fresh.study), "--out", str(fresh.out), "--jobs", "1"],
                               stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)  # fmt: skip
    last = fresh.cell("one", 0) / "run" / "last.pt"
    while process.poll() is None and not last.exists():
        time.sleep(0.05)
    process.terminate()
    shown = process.communicate()[0]
    assert process.returncode == 1, shown
    assert "data/one/seed-0: stopped; the next call goes on with it" in shown
    assert "two/seed-0: started" not in shown
    assert not (fresh.cell("one", 0) / "failure.json").exists()
    study = load_study(fresh.study)
    states = [standing(c, task_of(study)).state for c in cells(study, fresh.out)]
    assert states == ["started", "open"]


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (
            "atss}",
            "atsss}",
            "arms.one on datasets.data: assigner.type: unknown type 'atsss' (did you mean",
        ),
        ("seeds: [0, 1]", "seeds: [0, 0]", "seeds names 0 twice"),
        ("seeds: [0, 1]", "seeds: [0, 1]\nbaseline: three", "baseline 'three' is none of the arms: one, two"),
        ("metrics: [AP, AP50]", "metrics: [AP, mAP]", "'AR_large', found 'mAP' (did you mean 'AP'?)"),
        ("metrics: [AP, AP50]", "metrics: [AP, APs, AP_small]", "metrics names AP_small twice"),
        ("seeds: [0, 1]", "seeds: 3", "seeds: expected a list, such as [a, b], found 3"),
        ("seeds: [0, 1]", "seeds: []", "seeds: expected at least one, found []"),
        ("{assigner.type: atss}", "", "arms.one: expected {key: value}, found None"),
        ("{assigner.type: atss}", "{asigner.topk: 3}", "asigner: unknown key (did you mean 'assigner'?)"),
        ("{assigner.type: atss}", "{recipe: 3}", "arms.one: recipe: expected a file's name, found 3"),
        ("seeds:", "common: {recipe: tiny.yaml}\nseeds:", "common: recipe: only the study itself and its arms"),
        ("seeds:", "datasets: {a: {recipe: tiny.yaml}}\nseeds:", "datasets.a: recipe: only the study itself"),
        ("tiny.yaml", "''", "no such file; expected a recipe such as quickstart.yaml"),
        ("jobs: 2", "jobs: 0", "jobs: should be greater than or equal to 1, found 0"),
        ("arms:", "arms: [", "not valid YAML"),
        ("resamples", "resample", "resample: unknown key (did you mean 'resamples'?)"),
        ("tiny.yaml", "none.yaml", "none.yaml: no such file"),
        ("{assigner.type: atss}", "{seed: 3}", "arms.one: seed is set by the study"),
        ("{assigner.type: atss}", "{train: {threads: 3}}", "arms.one: train.threads is set by the study"),
        ("  one:", "  a/b:", "arms"),
        (
            "seeds:",
            "common: {evaluate.max_dets: 300}\nseeds:",
            "evaluate.max_dets is 300: a study scores with COCO's 100",
        ),
    ],
)
def test_mistakes_are_said_before_anything_runs(
    fresh: Place, capsys: pytest.CaptureFixture[str], old: str, new: str, message: str
) -> None:
    fresh.change(old, new)
    assert fresh.compare() == 2
    assert message in capsys.readouterr().err
    assert not fresh.out.exists()


def test_metrics_as_the_tables_call_them(fresh: Place) -> None:
    assert load_study(fresh.study, ["metrics=[APs,APm,APl,AR,AP]"]).metrics == (
        "AP_small", "AP_medium", "AP_large", "AR_100", "AP"
    )  # fmt: skip


@pytest.mark.parametrize(("jobs", "message"), [("0", "--jobs: expected at least 1"), ("two", "invalid int value")])
def test_jobs_that_are_no_number(fresh: Place, capsys: pytest.CaptureFixture[str], jobs: str, message: str) -> None:
    with pytest.raises(SystemExit) as ended:
        fresh.compare("--jobs", jobs)
    assert ended.value.code == 2
    assert message in capsys.readouterr().err


def test_no_such_study(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such study file"):
        load_study(tmp_path / "none.yaml")


def test_arms_that_differ_in_more_than_they_say_are_shown(copy: Copy, capsys: pytest.CaptureFixture[str]) -> None:
    here = copy()
    here.change("seeds: [0, 1]", "seeds: [0, 1]\nvaries: [assigner]")
    here.change("{type: fcos}}", "{type: fcos}, decode.nms_iou: 0.7}")
    (here.folder / "out").rename(here.folder / "old")
    assert here.compare("--report-only") == 1
    shown = capsys.readouterr().out
    assert "note: arms differ in more than they say: two: decode.nms_iou: 0.6 -> 0.7" in shown
    assert "decode.nms_iou: 0.6 -&gt; 0.7" in (here.out / "report.html").read_text()


def test_what_an_arm_says(fresh: Place) -> None:
    """By another recipe an arm says nothing, by keys just these."""
    (fresh.folder / "other.yaml").write_text("base: tiny.yaml\nassigner: {type: fcos}\ndecode: {nms_iou: 0.5}\n")
    fresh.change("{assigner: {type: fcos}}", "{recipe: other.yaml, assigner.center_radius: 2.5}")
    study = load_study(fresh.study)
    found = {d.key: d.announced for d in differences(study, cells(study, fresh.out))}
    assert found["assigner.type"]  # the baseline's own key
    assert not found["decode.nms_iou"]
    assert keys_of({"assigner": {"type": "a", "x": 1}, "train": {"length": {"steps": 3}}, "decode.nms_iou": 1}) == [
        "assigner", "train.length.steps", "decode.nms_iou"
    ]  # fmt: skip
    assert flat({"a": {"b": 1, "c": [2]}, "d": {}}) == {"a.b": 1, "a.c": [2], "d": {}}


def test_an_arm_may_bring_a_rule_of_its_own(fresh: Place) -> None:
    """A file beside the study; the cell's process is given all that it needs to find it."""
    (fresh.folder / "own.py").write_text(
        "from typing import Literal\nfrom detector.assign import Fcos\n\n"
        "class Mine(Fcos):\n    type: Literal['mine'] = 'mine'  # type: ignore\n    extra: int = 3\n"
    )
    fresh.change("{assigner: {type: fcos}}", "{imports: [own.py], assigner: {type: mine, extra: 4}}")
    study = load_study(fresh.study)
    cell = cells(study, fresh.out)[1]
    cell.folder.mkdir(parents=True)
    cell.settings.write_text(settings_text(cell))
    assert load_config(cell.settings).assigner.model_dump() == {**cell.config.assigner.model_dump(), "extra": 4}
    assert cell.config.assigner.type == "mine"


def test_a_lock_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write the study's folder"), locked(tmp_path / "file"):
        pass
