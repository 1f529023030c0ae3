"""Times and memory of things that are compared, and the tables that report them.

A shared machine is faster or slower by the minute, so what is compared runs in turns (A B C, B C A, C A B, ...), and a
ratio is the median of the ratios within each turn; seconds are medians and say little beyond this machine and hour.
"""

from __future__ import annotations

import gc
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import cv2
import torch

Call = Callable[[], object]
T = TypeVar("T")


@dataclass(frozen=True)
class Times:
    """Seconds of each candidate in each turn."""

    seconds: dict[str, list[float]]

    def median(self, name: str) -> float:
        return statistics.median(self.seconds[name])

    def ratio(self, name: str, other: str) -> float:
        """Time of `name` over that of `other`: median over the turns."""
        return statistics.median(self._ratios(name, other))

    def spread(self, name: str, other: str) -> str:
        """The same ratio's quartiles over the turns, as text."""
        ratios = self._ratios(name, other)
        if len(ratios) < 2:
            return ""
        low, _, high = statistics.quantiles(ratios, n=4, method="inclusive")
        return f"{low:.3f} to {high:.3f}"

    def _ratios(self, name: str, other: str) -> list[float]:
        return [a / b for a, b in zip(self.seconds[name], self.seconds[other], strict=True)]


def take_turns(
    candidates: Mapping[str, Call],
    device: torch.device,
    *,
    turns: int,
    warm_up: int = 1,
    patience: float = float("inf"),
    clock: Callable[[], float] = time.perf_counter,
) -> Times:
    """Each candidate once a turn, after `warm_up` turns that do not count; who begins changes from turn to turn.

    Ends after `turns` turns, or after the first one that is done more than `patience` seconds after the warm-up.
    `clock` tells seconds.
    """
    names = list(candidates)
    for _ in range(warm_up):
        for name in names:
            candidates[name]()
    seconds: dict[str, list[float]] = {name: [] for name in names}
    start = time.perf_counter()
    for turn in range(turns):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            seconds[name].append(_seconds(candidates[name], device, clock))
        if time.perf_counter() - start > patience:
            break
    return Times(seconds)


def clock_of(device: torch.device) -> Callable[[], float]:
    """On one thread the process's own time, which other jobs do not lengthen as much; else the wall's."""
    return time.process_time if device.type == "cpu" and torch.get_num_threads() == 1 else time.perf_counter


def clock_note(device: torch.device) -> str:
    """A sentence for a table's method, where there is something to say."""
    return "  Seconds are the process's on the processor." if clock_of(device) is time.process_time else ""


@contextmanager
def one_cv2_thread() -> Iterator[None]:
    """OpenCV on one core, as in a data worker."""
    threads = cv2.getNumThreads()
    cv2.setNumThreads(1)
    try:
        yield
    finally:
        cv2.setNumThreads(threads)


def _seconds(call: Call, device: torch.device, clock: Callable[[], float]) -> float:
    gc.collect()
    gc.disable()
    try:
        wait(device)
        start = clock()
        call()
        wait(device)
        return clock() - start
    finally:
        gc.enable()


def wait(device: torch.device) -> None:
    """Until the device has done all that it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak_bytes(call: Callable[[], T], device: torch.device) -> tuple[int, T]:
    """The most memory that tensors made by `call` held at one time, its result included, its inputs not; the result.

    On the CPU the allocator's own record of every allocation and release is added up (torch.profiler), on a GPU its
    high-water mark is read: neither depends on what else the machine does or on what the process held before.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        result = call()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before, result
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        result = call()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text(encoding="utf-8"))["traceEvents"]
    changes = sorted((e["ts"], e["args"]["Bytes"]) for e in events if e.get("name") == "[memory]")
    held = peak = 0
    for _, change in changes:
        held += change
        peak = max(peak, held)
    return peak, result


@dataclass(frozen=True)
class Target:
    """What a number must reach."""

    what: str
    value: float
    limit: float
    at_most: bool
    unit: str = ""

    @property
    def met(self) -> bool:
        return self.value <= self.limit if self.at_most else self.value >= self.limit

    def line(self) -> str:
        sign = "at most" if self.at_most else "at least"
        state = "met" if self.met else "MISSED"
        return f"{self.what}: {self.value:.3g}{self.unit} ({sign} {self.limit:g}{self.unit}: {state})"


@dataclass(frozen=True)
class Table:
    """The results of one subject."""

    title: str
    method: str  # what was compared and how
    columns: tuple[str, ...]
    rows: list[tuple[str, ...]]
    targets: list[Target] = field(default_factory=list)
    numbers: dict[str, Any] = field(default_factory=dict)  # the same for programs, unrounded

    def markdown(self, machine: str) -> str:
        """A section of a document."""
        lines = [f"## {self.title}", "", self.method, "", f"Machine: {machine}.", ""]
        lines += [_row(self.columns), _row(tuple("---" for _ in self.columns))]
        lines += [_row(row) for row in self.rows]
        lines += ["", *(f"- {target.line()}" for target in self.targets)] if self.targets else []
        return "\n".join(lines) + "\n"

    def as_json(self) -> dict[str, Any]:
        targets = [
            {"what": t.what, "value": t.value, "limit": t.limit, "at_most": t.at_most, "met": t.met}
            for t in self.targets
        ]
        return {"numbers": self.numbers, "targets": targets}


def _row(cells: tuple[str, ...]) -> str:
    return "| " + " | ".join(cells) + " |"


def seconds_text(seconds: float) -> str:
    """With the unit that suits it."""
    if seconds >= 1:
        return f"{seconds:.2f} s"
    return f"{seconds * 1e3:.3g} ms"


def bytes_text(count: int) -> str:
    return f"{count / 2**20:.3g} MiB" if count < 2**30 else f"{count / 2**30:.3g} GiB"


def machine(device: torch.device) -> str:
    """Processor, cores, threads and versions; nothing that tells whose machine it is."""
    import torchvision

    parts = [f"{_processor()}, {_cores()} cores, {torch.get_num_threads()} threads"]
    if device.type == "cuda":
        parts.insert(0, torch.cuda.get_device_name(device))
    parts.append(
        f"Python {platform.python_version()}, torch {torch.__version__}, torchvision {torchvision.__version__}"
    )
    return "; ".join(parts)


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _cores() -> int:
    """Those that this process may use, which in a container can be fewer than there are."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
