"""A study over several machines: two nodes of a local Ray cluster, with and without a folder that they share."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from detector.lab import node
from detector.lab.cluster import INSTALL, Cluster, needed
from detector.lab.grid import Cell, cells
from detector.lab.process import Ended
from detector.lab.run import TRIES, Runner, Work
from detector.lab.study import load_study
from detector.train.checkpoint import load_checkpoint
from tests.lab.conftest import Place, place

MEMORY = 100 * 2**20  # bytes of a node's object store
KEYS = ("numbers", "step", "flips", "assignment")


def test_without_ray(fresh: Place, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    assert fresh.compare("--ray") == 2
    assert capsys.readouterr().err == f"error: {INSTALL}\n"
    assert "pip install ray" in INSTALL


def test_what_is_no_address(fresh: Place, capsys: pytest.CaptureFixture[str]) -> None:
    assert fresh.compare("--ray", "seeds=[0]") == 2
    assert "'seeds=[0]' is no address: expected HOST:PORT; to leave it out, put --ray last" in capsys.readouterr().err


def test_other_versions_and_missing_data_are_objections(fresh: Place) -> None:
    splits = "train: {annotations: a.json, images: a}, val: {annotations: b.json, images: b}"
    fresh.change(
        "  two: {", f"  two: {{data: {{type: coco, root: some/where, {splits}}}, model.backbone.weights: w.pth, "
    )
    one, two = (cell.config for cell in cells(load_study(fresh.study, ["seeds=[0]"]), fresh.out))
    assert needed(one, "val") == ()  # generated where they are not
    wanted = dict(needed(two, "val"))
    assert wanted["data.train.annotations"] == str(Path.cwd() / "some/where/a.json")
    files = {f"data.{split}.{kind}" for split in ("train", "val") for kind in ("annotations", "images")}
    assert set(wanted) == {*files, "model.backbone.weights"}
    cluster = Cluster(None, load_study(fresh.study), fresh.out / "token", print, None)  # type: ignore[arg-type]
    same = node.look(str(fresh.study), ())
    assert same.shares
    assert not node.look(str(fresh.out / "token"), ()).shares
    assert cluster.objections(same) == []
    other = node.look(str(fresh.study), needed(two, "val"))
    other.versions["torch"] = "1.0"
    wrong = cluster.objections(other)
    assert len(wrong) == 6
    assert wrong[0].startswith(f"--ray: {same.name}: torch is 1.0, here it is {same.versions['torch']}")
    assert f"--ray: {same.name}: data.val.images: {Path.cwd() / 'some/where/b'}: not there" in wrong[4]


def test_the_code_is_part_of_the_versions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = node.versions()["detector's code"]
    assert before == node.versions()["detector's code"]
    (tmp_path / "a.py").write_text("x = 1\n")
    monkeypatch.setattr(node, "CODE", tmp_path)
    one = node.versions()["detector's code"]
    (tmp_path / "a.py").write_text("x = 2\n")
    assert len({before, one, node.versions()["detector's code"]}) == 3


def test_files_travel(tmp_path: Path) -> None:
    files = {"result.json": b"{}", "run/last.pt": b"1", "run/metrics.jsonl": b"2"}
    node.put(tmp_path, files)
    (tmp_path / "lock").write_text("me")
    (tmp_path / "run" / "best.pt.part").write_text("half")
    names = list(node.stamps(tmp_path))
    assert names[0] == "run/last.pt"  # what is read after it is at least as new
    assert node.content(tmp_path, [*names, "gone"]) == files
    actor = node.CellOnNode()
    assert actor.changed() == {}
    actor._folder, actor._known = tmp_path, node.stamps(tmp_path)
    assert actor.changed() == {}
    (tmp_path / "run" / "metrics.jsonl").write_bytes(b"23")
    assert actor.changed() == {"run/metrics.jsonl": b"23"}
    assert actor.changed() == {}


class Lost:
    """Work whose machine is gone, `times` times."""

    def __init__(self, times: int) -> None:
        self.times = times

    def room(self) -> int:
        return 1

    def start(self, cell: Cell, slot: int) -> Work:
        self.times -= 1
        gone = self.times >= 0
        if not gone:
            cell.folder.mkdir(parents=True, exist_ok=True)
            cell.result.write_text("{}")

        class Gone:
            def done(self) -> bool:
                return True

            def ask_to_stop(self) -> None:
                pass

            def ended(self) -> Ended | None:
                return None if gone else Ended(0, ("AP 0",))

        return Gone()


@pytest.mark.parametrize("times", [1, TRIES])
def test_a_lost_cell_is_tried_again_but_not_for_ever(fresh: Place, times: int) -> None:
    study = load_study(fresh.study, ["seeds=[0]"])
    said: list[str] = []
    Runner(study, Lost(times), said.append)(cells(study, fresh.out)[:1])
    assert sum("the machine that worked on it was lost; it is tried again" in line for line in said) == min(times, 2)
    if times < TRIES:
        assert said[-1] == "1 of 1 cells finished"
    else:
        assert f"data/one/seed-0: failed: the machines that worked on it were lost, {TRIES} times" in said[-2]
        assert fresh.cell("one", 0).joinpath("failure.json").is_file()


def test_a_cell_ends_with_its_parent(done: Place, tmp_path: Path) -> None:
    """The machine's worker is killed: the cell's process saves and goes, and takes a folder nobody will fetch along."""
    folder = tmp_path / "cell"
    folder.mkdir()
    settings = json.loads((done.cell("one", 0) / "cell.json").read_text())
    settings["train"]["length"] = {"epochs": None, "steps": 100_000, "images": None}
    (folder / "cell.json").write_text(json.dumps(settings))
    (folder / "task.json").write_text((done.cell("one", 0) / "task.json").read_text())
    code = (
        "import os, subprocess, sys, time\n"
        "command = [sys.executable, '-m', 'detector.lab.node', str(os.getpid()), 'delete']\n"
        f"child = subprocess.Popen([*command, {str(folder)!r}])\n"
        "print(child.pid, flush=True)\n"
        "time.sleep(1000)\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    child = int(parent.stdout.readline())
    until((folder / "run" / "last.pt").exists)
    parent.kill()
    parent.wait()
    until(lambda: not Path(f"/proc/{child}").exists() or "Z" in Path(f"/proc/{child}/stat").read_text().split()[2])
    assert not folder.exists()


def until(true: Callable[[], bool], seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.05)


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A head and another node of one CPU each; `cluster.second` is the latter."""
    pytest.importorskip("ray", reason="Ray is not installed: pip install 'detector[ray]'")
    from ray.cluster_utils import Cluster as LocalCluster

    for name, value in (("OMP_NUM_THREADS", "1"), ("RAY_USAGE_STATS_ENABLED", "0"), ("PYTHONPATH", os.getcwd())):
        monkeypatch.setenv(name, value)
    node = {"num_cpus": 1, "num_gpus": 0, "object_store_memory": MEMORY}
    made = LocalCluster(initialize_head=True, head_node_args={**node, "include_dashboard": False})
    made.second = made.add_node(**node)
    yield made
    made.shutdown()


@pytest.fixture
def apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if the nodes had no folder in common: the file by which they would know is not written."""
    monkeypatch.setattr("detector.lab.cluster.write_whole", lambda path, content: None)


def same(one: Path, other: Path) -> None:
    """Two cells with the same results, weights, and way there, to the bit."""
    results = [json.loads((p / "result.json").read_text()) for p in (one, other)]
    for key in KEYS:
        assert json.dumps(results[0][key]) == json.dumps(results[1][key]), key
    saved = [load_checkpoint(p / "run" / "last.pt") for p in (one, other)]
    for part in ("model", "ema"):
        assert all(torch.equal(a, saved[1][part][k]) for k, a in saved[0][part].items() if isinstance(a, torch.Tensor))
    rows = [[json.loads(line) for line in (p / "run" / "metrics.jsonl").read_text().splitlines()] for p in (one, other)]
    assert [r["step"] for r in rows[0]] == [r["step"] for r in rows[1]]
    assert [r.get("loss") for r in rows[0]] == [r.get("loss") for r in rows[1]]


def scratch_folders() -> set[Path]:
    return set(Path(tempfile.gettempdir()).glob("detector-cell-*"))


@pytest.mark.slow
def test_two_nodes_with_no_folder_in_common(
    fresh: Place, done: Place, cluster: Any, apart: None, capsys: pytest.CaptureFixture[str]
) -> None:
    """Both work at once; everything comes back, and is what this machine alone has."""
    before = scratch_folders()
    assert fresh.compare("seeds=[0]", "--ray", cluster.address) == 0
    shown = capsys.readouterr().out
    assert "Ray: 2 machines, 0 share the study's folder" in shown
    assert "2 cells: 0 finished, 2 to run, 2 at a time" in shown
    for arm in ("one", "two"):
        assert f"data/{arm}/seed-0: on " in shown
        same(fresh.cell(arm, 0), done.cell(arm, 0))
        names = [{str(p.relative_to(c)) for p in c.rglob("*") if "tfevents" not in p.name} - {"lock"}
                 for c in (fresh.cell(arm, 0), done.cell(arm, 0))]  # fmt: skip
        assert names[0] == names[1]
    assert scratch_folders() == before
    assert not list(fresh.out.glob("shared-*"))
    assert fresh.compare("seeds=[0]", "--ray", cluster.address) == 0
    assert "2 cells: 2 finished, 0 to run" in capsys.readouterr().out


@pytest.mark.slow
def test_a_cell_that_fails_and_one_that_does_not(
    fresh: Place, done: Place, cluster: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    """In a folder that all share.  `wild` diverges; `broken` has a rule of its own that raises."""
    (fresh.folder / "own.py").write_text(
        "from typing import Literal\nfrom detector.assign import Fcos\n\n"
        "class Mine(Fcos):\n    type: Literal['mine'] = 'mine'  # type: ignore\n\n"
        "    def assign(self, *_):\n        raise ZeroDivisionError('of my own')\n"
    )
    fresh.change("  one:", "  wild: {train.optimizer.lr: 1e30, train.schedule: {type: cosine, warmup: null}}\n"
                 "  broken: {imports: [own.py], assigner: {type: mine}}\n  one:")  # fmt: skip
    fresh.change("seeds: [0, 1]", "seeds: [0]")
    fresh.change("metrics", "baseline: one\nmetrics")
    assert fresh.compare("--ray", cluster.address) == 1
    shown = capsys.readouterr().out
    assert "Ray: 2 machines, all share the study's folder" in shown
    assert "data/wild/seed-0: failed: step" in shown
    assert "data/broken/seed-0: failed: ZeroDivisionError: of my own" in shown
    assert "Traceback" in (fresh.cell("broken", 0) / "log.txt").read_text()
    for arm in ("one", "two"):
        same(fresh.cell(arm, 0), done.cell(arm, 0))
    states = {c["name"]: c["state"] for c in json.loads((fresh.out / "summary.json").read_text())["cells"]}
    assert states["data/wild/seed-0"] == "diverged"
    assert states["data/broken/seed-0"] == "failed"


@pytest.mark.slow
@pytest.mark.parametrize("shared", [True, False], ids=["shared", "apart"])
def test_a_killed_node(
    fresh: Place, done: Place, cluster: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    shared: bool,
) -> None:  # fmt: skip
    """Its cell goes on elsewhere from the last checkpoint, to the same end; a second study cannot interfere."""
    if not shared:
        monkeypatch.setattr("detector.lab.cluster.write_whole", lambda path, content: None)
    monkeypatch.setattr("detector.lab.cluster.MIRROR_EVERY", 0.2)
    seen: dict[str, bool] = {}

    def kill() -> None:
        until(lambda: all((fresh.cell(arm, 0) / "run" / "last.pt").exists() for arm in ("one", "two")))
        seen["unfinished"] = not any((fresh.cell(arm, 0) / "result.json").exists() for arm in ("one", "two"))
        seen["locked"] = fresh.compare("seeds=[0]", "--ray", cluster.address) == 2
        cluster.remove_node(cluster.second, allow_graceful=False)

    thread = threading.Thread(target=kill)
    thread.start()
    assert fresh.compare("seeds=[0]", "--ray", cluster.address) == 0
    thread.join()
    assert seen == {"unfinished": True, "locked": True}
    shown = capsys.readouterr().out
    assert shown.count("the machine that worked on it was lost; it is tried again") == 1
    assert shown.count(": going on") == 1
    logs = [(fresh.cell(arm, 0) / "log.txt").read_text() for arm in ("one", "two")]
    assert sum("going on after step" in log for log in logs) == 1
    for arm in ("one", "two"):
        same(fresh.cell(arm, 0), done.cell(arm, 0))


@pytest.mark.slow
@pytest.mark.usefixtures("apart")
def test_stopped_cells_come_back_and_go_on(
    tmp_path: Path, lab_shapes: Path, done: Place, cluster: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    """Ctrl-C with cells on machines that share nothing: each saves, its files come back; here they go on."""
    here = place(tmp_path, lab_shapes)

    def interrupt() -> None:
        until(lambda: len(scratch_with_checkpoint()) >= 1)
        os.kill(os.getpid(), signal.SIGINT)

    before = scratch_folders()

    def scratch_with_checkpoint() -> list[Path]:
        return [p for p in scratch_folders() - before if (p / "run" / "last.pt").exists()]

    thread = threading.Thread(target=interrupt)
    thread.start()
    assert here.compare("seeds=[0]", "--ray", cluster.address) == 1
    thread.join()
    shown = capsys.readouterr().out
    assert "stopped; the next call goes on with it" in shown
    came_back = [arm for arm in ("one", "two") if (here.cell(arm, 0) / "run" / "last.pt").exists()]
    assert came_back
    assert not any((here.cell(arm, 0) / "failure.json").exists() for arm in ("one", "two"))
    assert here.compare("seeds=[0]") == 0
    shown = capsys.readouterr().out
    for arm in came_back:
        assert f"data/{arm}/seed-0: going on" in shown
    for arm in ("one", "two"):
        same(here.cell(arm, 0), done.cell(arm, 0))


@pytest.mark.slow
def test_no_cluster_and_none_large_enough(fresh: Place, cluster: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert fresh.compare("threads=4", "--ray", cluster.address) == 2
    assert "no machine of the cluster can take a cell of 4 threads" in capsys.readouterr().err
    fresh.change("{assigner.type: atss}", "{model.backbone.weights: none.safetensors}")
    assert fresh.compare("--ray", cluster.address) == 2
    shown = capsys.readouterr().err
    assert "model.backbone.weights: " in shown
    assert "none.safetensors: not there; put it at the same path on every machine" in shown
    cluster.shutdown()
    assert fresh.compare("--ray") == 2
    shown = capsys.readouterr().err
    assert "no Ray cluster could be joined" in shown
    assert "ray start --head" in shown
