"""Memory of the loader's processes does not grow with the epochs."""

from __future__ import annotations

import gc
import sys
from pathlib import Path
from typing import Literal

import pytest

from detector.data.cache import open_cache
from detector.data.coco import CocoData, CocoIndex
from detector.data.loader import train_loader
from detector.data.mosaic import Mosaic
from detector.data.resize import ShortEdge
from detector.data.shapes import ShapeSet, ensure
from detector.data.steps import Step
from detector.data.transforms import Color, Flip, RandomScaleCrop

EPOCHS, BATCH = 10, 8
STEPS = (Flip(), Color(), RandomScaleCrop())


def private_megabytes(process: int | str) -> float:
    """What a process holds for itself: the index and the batches are shared."""
    lines = Path(f"/proc/{process}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) / 1024


def check_flat(data: CocoData, resize: ShortEdge, augment: tuple[Step, ...] = STEPS) -> None:
    steps = len(data) // BATCH
    loader = train_loader(
        data,
        augment=augment,
        resize=resize,
        batch_size=BATCH,
        seed=0,
        start_step=0,
        stop_step=EPOCHS * steps + 10,  # the workers are to be alive at the last look
        workers=2,
    )
    batches = iter(loader)
    found: list[list[float]] = []
    for _ in range(EPOCHS):
        for _ in range(steps):
            next(batches)
        gc.collect()
        workers = loader._loader._iterator._workers  # type: ignore[union-attr]
        found.append([private_megabytes(p) for p in ("self", *(w.pid for w in workers))])
    early, late = ([max(each) for each in zip(*epochs, strict=True)] for epochs in (found[:5], found[5:]))
    for before, after in zip(early, late, strict=True):
        assert after <= 1.02 * before, f"megabytes of main process and workers by epoch: {found}"


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_memory_is_flat_over_the_epochs(tmp_path: Path) -> None:
    ensure(tmp_path / "set", ShapeSet("plain", 4 * BATCH, (240, 320), seed=1))
    data = CocoData(CocoIndex.load(tmp_path / "set" / "annotations.json", tmp_path / "set" / "images"))
    check_flat(data, ShortEdge(short=360, long=480))


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_memory_is_flat_on_photographs(shared: Path) -> None:
    folder = shared / "datasets" / "coco_tiny"
    data = CocoData(CocoIndex.load(folder / "annotations" / "train.json", folder / "images"))
    check_flat(data, ShortEdge(short=480, long=800))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["memory", "file"])
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_memory_is_flat_with_a_cache(shared: Path, tmp_path: Path, kind: Literal["memory", "file"]) -> None:
    """What is cached is shared, so it counts for no process."""
    folder = shared / "datasets" / "coco_tiny"
    index = CocoIndex.load(folder / "annotations" / "train.json", folder / "images")
    cache = open_cache(index, None, kind, tmp_path)
    data = CocoData(index, cache=cache)
    check_flat(data, ShortEdge(short=480, long=800), (Mosaic(size=(320, 320)), *STEPS))
    assert cache.filled == len(data)
