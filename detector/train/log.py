"""What a run says: a line on the terminal, one in metrics.jsonl and points on TensorBoard's curves."""

from __future__ import annotations

import json
import resource
import sys
import time
from types import TracebackType

import numpy as np
import torch
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from detector.errors import UserError
from detector.train.folder import RunFiles
from detector.train.length import Horizon
from detector.train.step import StepResult

Numbers = dict[str, float]


class Log:
    """Collects steps on the device without waiting for it; `write` fetches the means since the last line at once."""

    def __init__(self, files: RunFiles, horizon: Horizon, start: int, device: torch.device) -> None:
        self.horizon, self.device = horizon, device
        self.console = Console(file=sys.stdout, soft_wrap=True, highlight=False)
        self._path = files.metrics
        try:
            self._file = files.metrics.open("a", encoding="utf-8")
            self._curves = SummaryWriter(str(files.curves), purge_step=start + 1)
        except OSError as error:
            raise UserError(f"{files.folder}: cannot write the run's folder ({error.strerror or error})") from None
        self._noted = {row["step"] for row in files.rows() if row["kind"] == "probe"}
        self._sums: dict[str, Tensor] = {}
        self._steps = 0
        self._since = time.perf_counter()
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[text]}"),
            console=self.console,
            disable=not self.console.is_terminal,
        )
        self._training = self._progress.add_task("training", total=horizon.total, completed=start, text="")

    def __enter__(self) -> Log:
        self._progress.start()
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self._progress.stop()
        self._file.close()
        self._curves.close()

    def say(self, text: str) -> None:
        """A line for people."""
        self.console.print(escape(text))

    def add(self, result: StepResult) -> None:
        """A step that was done."""
        values = {f"loss/{name}": value for name, value in result.terms.items()}
        values |= {"gradient_norm": result.gradient_norm, "positives": result.positives}
        for name, value in values.items():
            self._sums[name] = self._sums[name] + value if name in self._sums else value
        self._steps += 1
        self._progress.advance(self._training)

    def write(self, step: int, further: Numbers) -> None:
        """One line of means since the last one, if there were steps; `step` steps are done.  Waits for the device.

        Raises:
            UserError: the file cannot be written.
        """
        if self._steps == 0:
            return
        means = dict(zip(self._sums, (torch.stack(list(self._sums.values())) / self._steps).tolist(), strict=True))
        seconds = max(time.perf_counter() - self._since, 1e-9)
        row: Numbers = {
            "loss": sum(value for name, value in means.items() if name.startswith("loss/")),
            **means,
            "images_per_second": self._steps * self.horizon.batch / seconds,
            "memory_mb": _memory(self.device),
            **further,
        }
        self._record(step, "train", row)
        left = (self.horizon.total - step) * seconds / self._steps
        terms = " ".join(
            f"{name.removeprefix('loss/')} {means[name]:.3f}" for name in means if name.startswith("loss/")
        )
        text = f"loss {row['loss']:.3f} ({terms})  {row['images_per_second']:.1f} images/s  {row['memory_mb']:.0f} MB"
        self._progress.update(self._training, text=text)
        if not self.console.is_terminal:
            self.say(f"step {step}/{self.horizon.total}  {text}  lr {further['lr']:.3g}  {_clock(left)} left")
        self.restart()

    def scores(self, step: int, numbers: Numbers, best: bool) -> None:
        """The result of an evaluation after `step` steps."""
        self._record(step, "val", numbers)
        main = "  ".join(f"{name} {numbers[name]:.3f}" for name in ("AP", "AP50", "AP75"))
        place = f"step {step}/{self.horizon.total}  epoch {self.horizon.epoch(step):.2f}"
        self.say(f"{place}  val {main}" + ("  best so far" if best else ""))

    def noted(self, step: int, numbers: Numbers) -> None:
        """What the probe has seen after `step` steps; a step that was noted before a resume is not said twice."""
        if numbers and step not in self._noted:
            self._record(step, "probe", numbers)

    def picture(self, step: int, name: str, image: np.ndarray) -> None:
        """(H, W, 3) uint8 RGB, into TensorBoard."""
        self._curves.add_image(name, image, step, dataformats="HWC")

    def restart(self) -> None:
        """Forgets the steps since the last line, and does not count the time until now."""
        self._sums, self._steps, self._since = {}, 0, time.perf_counter()

    def _record(self, step: int, kind: str, row: Numbers) -> None:
        full = {"step": step, "epoch": round(self.horizon.epoch(step), 4), "kind": kind, **row}
        try:
            self._file.write(json.dumps(full) + "\n")
            self._file.flush()
            for name, value in row.items():
                self._curves.add_scalar(f"{kind}/{name}", value, step)
        except OSError as error:
            raise UserError(f"{self._path}: cannot write the metrics ({error.strerror or error})") from None


def _memory(device: torch.device) -> float:
    """MB: most that was allocated on a GPU, or most that this process took of the machine's memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
