"""The command itself: killed and gone on with, stopped by a signal, and asked for what cannot be."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
from multiprocessing.context import ForkServerProcess
from pathlib import Path

import pytest

from detector.cli.train import main
from detector.train.checkpoint import load_checkpoint
from tests.train.compare import assert_same_training

STEPS = 14
EVALUATING = ("train.evaluate_every={steps: 4}",)


def command(arguments: list[str]) -> None:
    import torch

    torch.set_num_threads(1)
    sys.exit(main(arguments))


def start(recipe: Path, *arguments: str) -> ForkServerProcess:
    """The command in a process of its own, forked from one that has the imports behind it."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["detector.train.loop"])
    process = context.Process(target=command, args=([str(recipe), f"train.length={{steps: {STEPS}}}", *arguments],))
    process.start()
    return process


def done(folder: Path) -> int:
    """Steps whose line is in the metrics."""
    try:
        rows = [
            json.loads(x) for x in (folder / "metrics.jsonl").read_text().splitlines(keepends=True) if x[-1] == "\n"
        ]
    except FileNotFoundError:
        return 0
    return max((row["step"] for row in rows), default=0)


def kill_at(process: ForkServerProcess, folder: Path, step: int) -> None:
    """SIGKILL as soon as `step` steps are done."""
    while process.is_alive() and done(folder) < step:
        time.sleep(0.005)
    process.kill()
    process.join()


def finish(process: ForkServerProcess) -> int | None:
    process.join()
    return process.exitcode


def kill_and_go_on(recipe: Path, folder: Path, kills: int, *arguments: str) -> None:
    rng = random.Random(kills)
    arguments = (f"run.dir={folder}", *arguments)
    kill_at(start(recipe, *arguments), folder, 1 + rng.randrange(3))
    for _ in range(kills - 1):
        # At a random step: before the next checkpoint, just after it, in the middle of an evaluation or of a save.
        kill_at(start(recipe, *arguments, "--resume", str(folder)), folder, done(folder) + rng.randrange(3))
        time.sleep(rng.random() * 0.1)
    assert finish(start(recipe, *arguments, "--resume", str(folder))) == 0


def test_killed_at_random_steps_ends_with_the_same_weights(recipe: Path, tmp_path: Path) -> None:
    """Against a run that was never stopped, that never evaluated, and that had no workers."""
    assert finish(start(recipe)) == 0
    folder = tmp_path / "killed"
    kill_and_go_on(recipe, folder, 2, "data.workers=2", *EVALUATING)
    assert_same_training(load_checkpoint(tmp_path / "run" / "last.pt"), load_checkpoint(folder / "last.pt"))


@pytest.mark.slow
@pytest.mark.parametrize("evaluate", [(), EVALUATING], ids=["without evaluation", "with evaluation"])
@pytest.mark.parametrize("workers", [0, 2])
def test_killed_ten_times(recipe: Path, tmp_path: Path, workers: int, evaluate: tuple[str, ...]) -> None:
    assert finish(start(recipe)) == 0
    folder = tmp_path / "killed"
    kill_and_go_on(recipe, folder, 10, f"data.workers={workers}", *evaluate)
    assert_same_training(load_checkpoint(tmp_path / "run" / "last.pt"), load_checkpoint(folder / "last.pt"))


def test_sigterm_finishes_the_step_and_saves(recipe: Path, tmp_path: Path) -> None:
    """Sent to the whole process group, data workers too, as schedulers do."""
    tool = Path(__file__).resolve().parents[2] / "tools" / "train.py"
    run = subprocess.Popen(
        [sys.executable, str(tool), str(recipe), "data.workers=2", "train.length={steps: 100000}"],
        env={**os.environ, "PYTHONPATH": str(tool.parents[1])},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    folder = tmp_path / "run"
    while run.poll() is None and done(folder) < 3:
        time.sleep(0.01)
    os.killpg(run.pid, signal.SIGTERM)
    shown = run.communicate()[0]
    assert run.returncode == 1, shown
    step = load_checkpoint(folder / "last.pt")["step"]
    assert step == done(folder) >= 3
    assert f"SIGTERM: step {step} was finished and saved in {folder / 'last.pt'}; go on with --resume {folder}" in shown
    assert "Traceback" not in shown


def test_ends_with_the_twelve_numbers(recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(recipe), "train.length={steps: 1}"]) == 0
    shown = capsys.readouterr().out.splitlines()
    numbers = load_checkpoint(tmp_path / "run" / "best.pt")["numbers"]
    assert shown[-12:] == [f"{name} {value:.3f}" for name, value in numbers.items()]
    assert str(tmp_path / "run") in shown[-13]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train.lenght={steps: 1}"], "train.lenght: unknown key (did you mean 'length'?)"),
        (["train.length={steps: 1, images: 5}"], "train.length: gives steps and images"),
        (["data.root=/dev/null/none"], "/dev/null/none"),
        (["--resume", "no/such/run"], "no/such/run: no such run folder"),
    ],
)
def test_mistakes_end_in_one_sentence(
    recipe: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert main([str(recipe), *arguments]) == 2
    shown = capsys.readouterr().err
    assert message in shown
    assert shown.startswith("error: ")
    assert shown.count("\n") == 1
