"""Whole runs in this process."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import cv2
import pytest
import torch

from detector.config.load import from_snapshot, load_config
from detector.config.run import RunConfig
from detector.errors import CheckpointError, DataError, DeviceError, NonFiniteLoss, UserError
from detector.evaluate.coco import NUMBERS
from detector.train import loop
from detector.train.checkpoint import KEYS, load_checkpoint
from detector.train.loop import train
from detector.train.step import Stepper
from tests.train.compare import assert_same, assert_same_training

Load = Callable[..., RunConfig]


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def stop_after(monkeypatch: pytest.MonkeyPatch, steps: int, number: signal.Signals = signal.SIGTERM) -> None:
    """The process gets a signal in the middle of its step number `steps`."""
    whole = Stepper.__call__
    count = 0

    def step(self: Stepper, *args: Any) -> Any:
        nonlocal count
        count += 1
        if count == steps:
            os.kill(os.getpid(), number)
        return whole(self, *args)

    monkeypatch.setattr(Stepper, "__call__", step)


def stop_and_go(
    config: Load, settings: Sequence[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Six steps in one go and again with a stop after three, which must end alike; the latter's checkpoint then and
    at the end."""
    train(config(*settings))
    stopping = config(*settings, f"run.dir={tmp_path / 'stopped'}")
    with monkeypatch.context() as patch:
        stop_after(patch, 3)
        assert train(stopping).step == 3
    halfway = load_checkpoint(tmp_path / "stopped" / "last.pt")
    assert train(stopping, resume=tmp_path / "stopped").step == 6
    straight, stopped = (load_checkpoint(tmp_path / name / "last.pt") for name in ("run", "stopped"))
    assert_same_training(straight, stopped)
    return halfway, stopped


def test_a_run_leaves_what_it_promises(config: Load, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = config("train.evaluate_every={steps: 3}")
    outcome = train(settings)
    folder = tmp_path / "run"
    assert outcome.step == 6
    assert outcome.best_step in (3, 6)
    assert outcome.interrupted_by is None
    assert tuple(outcome.numbers) == NUMBERS
    assert load_config(folder / "config.yaml") == settings

    best, last = load_checkpoint(folder / "best.pt"), load_checkpoint(folder / "last.pt")
    assert set(best) == set(last) == set(KEYS)
    assert (best["step"], last["step"]) == (outcome.best_step, 6)
    assert best["numbers"] == last["numbers"] == outcome.numbers
    assert from_snapshot(last["config"], "last.pt") == settings
    assert last["classes"]
    assert len(last["category_ids"]) == len(last["classes"])
    assert [step for step, _ in last["scores"]] == [3, 6]
    # The averaged weights are others than the raw ones, under a name of their own.
    assert list(last["model"]) == list(last["ema"])
    assert any(not torch.equal(last["model"][k], last["ema"][k]) for k in last["model"])
    assert last["ema_count"] == 6

    rows = lines(folder)
    assert [r["step"] for r in rows if r["kind"] == "train"] == [1, 2, 3, 4, 5, 6]
    assert [r["step"] for r in rows if r["kind"] == "val"] == [3, 6]
    first = rows[0]
    assert first["loss"] == pytest.approx(first["loss/class"] + first["loss/box"] + first["loss/quality"])
    assert first["lr"] == pytest.approx(0.02 * 0.001)
    assert first["unreadable"] == 0
    assert first["dense/positives_per_object/all"] > 0
    assert set(rows[-1]) >= set(NUMBERS)

    pictures = {p.name for p in (folder / "pictures").iterdir()}
    assert {"train-samples.jpg", "assignment-dense.jpg"} < pictures
    assert len([name for name in pictures if name.startswith("step-")]) == 2
    assert all(cv2.imread(str(folder / "pictures" / name)) is not None for name in pictures)
    assert list((folder / "tensorboard").iterdir())
    shown = capsys.readouterr().out
    assert "learning rate 0.02" in shown
    assert "step 6/6" in shown
    assert "(class " in shown


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_stop_and_go_changes_nothing(
    config: Load, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: signal.Signals
) -> None:
    """Stopped in mid-interval, with evaluations where the straight run has none."""
    before = [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]
    train(config())
    folder = tmp_path / "stopped"
    stopping = config("train.evaluate_every={steps: 2}", f"run.dir={folder}", "train.log_every=2")
    with monkeypatch.context() as patch:
        stop_after(patch, 3, number)
        outcome = train(stopping)
    assert (outcome.step, outcome.interrupted_by) == (3, number.name)
    assert load_checkpoint(folder / "last.pt")["step"] == 3
    assert [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)] == before

    outcome = train(stopping, resume=folder)
    assert (outcome.step, outcome.interrupted_by) == (6, None)
    straight, stopped = load_checkpoint(tmp_path / "run" / "last.pt"), load_checkpoint(folder / "last.pt")
    assert_same_training(straight, stopped)
    assert [s for s, _ in stopped["scores"]] == [2, 4, 6]
    assert stopped["scores"][-1] == straight["scores"][-1]
    steps = [r["step"] for r in lines(folder) if r["kind"] == "train"]
    assert steps == sorted(set(steps))
    assert [r["step"] for r in lines(folder) if r["kind"] == "val"] == [2, 4, 6]


def test_what_was_done_after_the_checkpoint_is_done_again(
    config: Load, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As after a power cut: lines of metrics that the checkpoint does not know, the last one cut short."""
    settings = config("train.evaluate_every={steps: 3}", "train.schedule={type: plateau, warmup: {steps: 2}}")
    train(settings)
    straight = load_checkpoint(tmp_path / "run" / "last.pt")
    rows = lines(tmp_path / "run")
    folder = tmp_path / "run"
    with monkeypatch.context() as patch:

        def crash(*_: Any) -> Any:
            raise SystemError("power cut")

        settings = settings.model_copy()
        whole = Stepper.__call__
        steps = iter(range(10))
        patch.setattr(Stepper, "__call__", lambda *a: whole(*a) if next(steps) < 5 else crash())
        with pytest.raises(SystemError):
            train(settings, overwrite=True)
    assert load_checkpoint(folder / "last.pt")["step"] == 4
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "ki')
    train(settings, resume=folder)
    assert_same(load_checkpoint(folder / "last.pt"), straight)  # scores and numbers too
    timeless = [{k: v for k, v in r.items() if k not in ("images_per_second", "memory_mb")} for r in lines(folder)]
    for found, expected in zip(timeless, rows, strict=True):
        assert found == {k: expected[k] for k in found}


def test_a_run_that_ended_before_its_first_checkpoint_starts_anew(config: Load, tmp_path: Path) -> None:
    train(config("train.length={steps: 1}"))
    straight = load_checkpoint(tmp_path / "run" / "last.pt")
    (tmp_path / "run" / "last.pt").unlink()
    train(config("train.length={steps: 1}"), resume=tmp_path / "run")
    assert_same(load_checkpoint(tmp_path / "run" / "last.pt"), straight)


def test_early_stopping_also_after_a_resume(config: Load, tmp_path: Path) -> None:
    settings = config("train.evaluate_every={steps: 1}", "train.early_stopping={patience: 2, improvement: 1.0}")
    outcome = train(settings)
    assert outcome.step == 3
    assert outcome.best_step is not None
    again = train(settings, resume=tmp_path / "run")
    assert (again.step, again.numbers, again.best_step) == (3, outcome.numbers, outcome.best_step)


def test_a_finished_run_can_be_made_longer_but_not_another(config: Load, tmp_path: Path) -> None:
    train(config("train.length={steps: 2}"))
    with pytest.raises(CheckpointError, match=r"another run: train.batch_size was 4 and is now 2"):
        train(config("train.batch_size=2"), resume=tmp_path / "run")
    with pytest.raises(CheckpointError, match=r"assigner"):
        train(config("assigner.type=max_iou"), resume=tmp_path / "run")
    assert train(config("train.length={steps: 3}"), resume=tmp_path / "run").step == 3


def test_a_run_is_not_overwritten_by_accident(config: Load, tmp_path: Path) -> None:
    train(config("train.length={steps: 1}"))
    kept = (tmp_path / "run" / "last.pt").read_bytes()
    with pytest.raises(UserError, match=r"holds a run already .*--resume .*--overwrite"):
        train(config())
    assert (tmp_path / "run" / "last.pt").read_bytes() == kept
    (tmp_path / "run" / "notes.txt").write_text("mine")
    assert train(config("train.length={steps: 2}"), overwrite=True).step == 2
    assert [r["step"] for r in lines(tmp_path / "run") if r["kind"] == "train"] == [1, 2]
    assert (tmp_path / "run" / "notes.txt").read_text() == "mine"


def test_there_must_be_something_to_resume(config: Load, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such run folder"):
        train(config(), resume=tmp_path / "none")
    with pytest.raises(CheckpointError, match="holds no run"):
        train(config(), resume=tmp_path)


def test_classes_of_the_data_must_be_the_checkpoints(config: Load, tmp_path: Path, shapes_folder: Path) -> None:
    train(config("train.length={steps: 1}"))
    for split in ("train", "val"):
        source = shapes_folder / split / "annotations.json"
        document = json.loads(source.read_text())
        document["categories"][0]["name"] = "pyramid"
        (tmp_path / f"{split}.json").write_text(json.dumps(document))
    other = config(
        f"data={{type: coco, train: {{annotations: {tmp_path}/train.json, images: {shapes_folder}/train/images}},"
        f" val: {{annotations: {tmp_path}/val.json, images: {shapes_folder}/val/images}}}}"
    )
    with pytest.raises(CheckpointError, match="'pyramid' in the data"):
        train(other, resume=tmp_path / "run")


def test_no_gpu(config: Load, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(DeviceError, match="no CUDA GPU"):
        train(config("train.device=cuda"))
    assert not (tmp_path / "run").exists()


def test_divergence_is_named_and_what_was_saved_stays(config: Load, tmp_path: Path) -> None:
    settings = config("train.optimizer.lr=1e30", "train.schedule={type: multi_step, warmup: null}")
    with pytest.raises(NonFiniteLoss, match=r"step \d: training has diverged: .* \(image ids \d+"):
        train(settings)
    assert not (tmp_path / "run" / "last.pt").exists()


def test_unreadable_images_are_counted_up_to_a_limit(config: Load, tmp_path: Path, shapes_folder: Path) -> None:
    folder = tmp_path / "shapes"
    train(config("train.length={steps: 1}", f"data.root={folder}"))
    broken = sorted((folder / "train" / "images").iterdir())[::5]
    whole = [path.read_bytes() for path in broken]
    for path in broken:
        path.write_bytes(b"broken")
    outcome = train(config("train.length={steps: 5}", f"data.root={folder}"), overwrite=True)
    assert outcome.unreadable == 2
    assert lines(tmp_path / "run")[-2]["unreadable"] == 2

    settings = config("train.length={steps: 5}", f"data.root={folder}", "data.max_unreadable=1")
    with pytest.raises(DataError, match=r"2 images could not be read, more than data.max_unreadable=1"):
        train(settings, overwrite=True)
    done = load_checkpoint(tmp_path / "run" / "last.pt")["step"]  # nothing of what was done is lost
    for path, content in zip(broken, whole, strict=True):
        path.write_bytes(content)
    assert done < train(settings, resume=tmp_path / "run").step == 5


def test_a_full_disk_says_so_and_keeps_the_last_checkpoint(
    config: Load, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = loop.save_checkpoint

    def save(path: Path, content: dict[str, Any]) -> None:
        if content["step"] == 4:
            raise UserError("the disk is full")
        whole(path, content)

    monkeypatch.setattr(loop, "save_checkpoint", save)
    with pytest.raises(UserError, match="the disk is full"):
        train(config())
    monkeypatch.undo()
    assert load_checkpoint(tmp_path / "run" / "last.pt")["step"] == 2
    assert train(config(), resume=tmp_path / "run").step == 6


def test_an_evaluation_that_a_signal_interrupts_is_made_up_for(
    config: Load, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = config("train.evaluate_every={steps: 3}")
    train(settings)
    straight = load_checkpoint(tmp_path / "run" / "last.pt")
    with monkeypatch.context() as patch:
        evaluate = loop.Validation.run

        def run(*args: Any) -> Any:
            os.kill(os.getpid(), signal.SIGTERM)
            return evaluate(*args)

        patch.setattr(loop.Validation, "run", run)
        outcome = train(settings, overwrite=True)
    assert (outcome.step, outcome.interrupted_by, outcome.best_step) == (3, "SIGTERM", None)
    train(settings, resume=tmp_path / "run")
    assert_same(load_checkpoint(tmp_path / "run" / "last.pt"), straight)
