"""The strong training pipeline against a straightforward build of the same steps from albumentations calls, and what
copy-paste by mask adds to a sample."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch

from detector.bench.loading import make_images
from detector.bench.measure import Table, Target, Times, one_cv2_thread, take_turns
from detector.data.cache import open_cache
from detector.data.coco import CocoData, CocoIndex
from detector.data.copy_paste import CopyPaste
from detector.data.loader import TrainSource
from detector.data.mosaic import Mixup, Mosaic
from detector.data.perspective import RandomPerspective
from detector.data.resize import Letterbox, ShortEdge, Sizing
from detector.data.sample import Sample
from detector.data.sampler import Key
from detector.data.shapes import ShapeSet, ensure
from detector.data.steps import Combination, Step
from detector.data.transforms import Color, Flip

SIDE = 640
LEAST_FASTER, LEAST_A_SECOND, MOST_ADDED = 1.5, 60.0, 0.40
STRONG: tuple[Step, ...] = (
    Mosaic(size=(SIDE, SIDE)),
    Mixup(),
    RandomPerspective(degrees=10, scale=(0.5, 1.5), shear=2, translate=0.1),
    Color(probability=1.0),
    Flip(),
)

METHOD = (
    "{images} generated JPEGs of 640x480 with 7 objects each, one thread, in the main process.  Strong: mosaic of four,"
    " mixup, rotation, scale, shear and shift, colour, flip, to 640x640.  Ours: `TrainSource.sample`.  albumentations"
    " {version}: `Mosaic`; mixup, which it lacks, as a weighted sum of the result and an image from `LongestMaxSize`,"
    " `PadIfNeeded` and `HorizontalFlip`; then `Affine`, `ColorJitter` and `HorizontalFlip`.  With cache: both find all"
    " images decoded in memory.  Without: both decode each image when it is needed.  Copy-paste: `{set}`, {pasted}"
    " images, short edge 240 and flip, with and without the step `copy_paste`, images kept in memory as by default"
    " (without it none is, so each is decoded)."
    "  data.cache=file: the strong pipeline on the same set with and without the cache; partners are not kept besides"
    " (a set this small would lie there whole).  In turns, {turns} of them after one of warm-up; ratios are medians"
    " over the turns, in brackets their quartiles."
)


def run(device: torch.device, quick: bool) -> Table:
    count, turns = (8, 2) if quick else (48, 9)
    with one_cv2_thread(), tempfile.TemporaryDirectory() as name:
        return _measure(Path(name), count, turns)


def _measure(folder: Path, count: int, turns: int) -> Table:
    data = make_images(folder, count)
    decoded = _Decoded(data.index)
    pasted, title = _masked(folder / "masked", count)
    candidates: dict[str, Callable[[], object]] = {
        "ours": _ours(decoded, STRONG, Letterbox(size=(SIDE, SIDE))),
        "theirs": _Albumentations(decoded),
        "ours, decoding": _ours(data, STRONG, Letterbox(size=(SIDE, SIDE))),
        "theirs, decoding": _Albumentations(data),
        "plain": _ours(pasted, (Flip(),), ShortEdge(short=240, long=360)),
        "copy-paste": _ours(pasted, (CopyPaste(), Flip()), ShortEdge(short=240, long=360)),
    }
    stored = CocoData(pasted.index, cache=open_cache(pasted.index, None, "file", folder / "cache"))
    sizing = Letterbox(size=(SIDE, SIDE))
    candidates |= {
        "not stored": _ours(pasted, STRONG, sizing, 0),
        "stored": _ours(stored, STRONG, sizing, 0),
        "decoding an image": lambda: [pasted.reduced(i) for i in range(len(pasted))],
        "finding an image": lambda: [stored.reduced(i) for i in range(len(stored))],
    }
    times = take_turns(candidates, torch.device("cpu"), turns=turns)
    stages = _stages(decoded)
    return _table(times, count, len(pasted), title, turns, stages)


def _table(times: Times, count: int, pasted: int, title: str, turns: int, stages: dict[str, float]) -> Table:
    import albumentations

    rows: list[tuple[str, ...]] = []
    faster = {}
    for label, suffix in (("with cache", ""), ("decoding", ", decoding")):
        faster[label] = times.ratio("theirs" + suffix, "ours" + suffix)
        spread = times.spread("theirs" + suffix, "ours" + suffix)
        speeds = [f"{count / times.median(who + suffix):.0f}" for who in ("ours", "theirs")]
        rows.append((f"strong, {label}", *speeds, f"{faster[label]:.2f} times ({spread})"))
    added = times.ratio("copy-paste", "plain") - 1
    speeds = [f"{pasted / times.median(name):.0f}" for name in ("copy-paste", "plain")]
    rows.append(
        ("copy-paste by mask, with (without)", *speeds, f"{added:+.0%} ({times.spread('copy-paste', 'plain')})")
    )
    for name, (one, other) in {
        f"strong on {title}, data.cache=file (none)": ("stored", "not stored"),
        f"an image of {title} read, data.cache=file (none)": ("finding an image", "decoding an image"),
    }.items():
        speeds = [f"{pasted / times.median(candidate):.0f}" for candidate in (one, other)]
        rows.append((name, *speeds, f"{times.ratio(other, one):.2f} times ({times.spread(other, one)})"))
    whole = sum(stages.values())
    for name, seconds in stages.items():
        rows.append(
            (f"of the strong pipeline: {name}", f"{seconds / count * 1e3:.2f} ms", "", f"{seconds / whole:.0%}")
        )
    a_second, photographs = count / times.median("ours"), pasted / times.median("stored")
    return Table(
        title="Augmentation",
        method=METHOD.format(images=count, version=albumentations.__version__, set=title, pasted=pasted, turns=turns),
        columns=("what", "images a second", "albumentations (without the step)", "ratio"),
        rows=rows,
        targets=[
            Target(
                "strong pipeline with cache: times as fast as albumentations", faster["with cache"], LEAST_FASTER, False
            ),
            Target("strong pipeline with cache: images a second and core", a_second, LEAST_A_SECOND, False),
            Target(
                f"strong pipeline on {title} with data.cache=file: images a second and core",
                photographs,
                LEAST_A_SECOND,
                False,
            ),
            Target(f"copy-paste by mask on {title}: share of a sample's time added", added, MOST_ADDED, True),
        ],
        numbers={"seconds": times.seconds, "images": count, "faster": faster, "added": added, "stages": stages},
    )


class _Decoded(CocoData):
    """A set whose images lie in memory."""

    def __init__(self, index: CocoIndex) -> None:
        super().__init__(index)
        self._samples = [CocoData.__getitem__(self, i) for i in range(len(self))]

    def __getitem__(self, i: int) -> Sample:
        return self._samples[i]


def _source(data: CocoData, augment: tuple[Step, ...], resize: Sizing, keep: int) -> TrainSource:
    return TrainSource(
        data, augment=augment, resize=resize, seed=0, epochs=1, pad_multiple=32, max_unreadable=0, partner_cache=keep
    )


def _ours(data: CocoData, augment: tuple[Step, ...], resize: Sizing, keep: int | None = None) -> Callable[[], None]:
    # Without partners' cache for the strong pipeline, which is compared with one that has none; copy-paste by default.
    if keep is None:
        keep = 128 if isinstance(augment[0], CopyPaste) else 0
    source = _source(data, augment, resize, keep)

    def run() -> None:
        for i in range(len(data)):
            source.sample(Key(0, i, None), [])

    return run


class _Albumentations:
    """The same steps as one would write them down with albumentations."""

    def __init__(self, data: CocoData) -> None:
        os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")
        import albumentations as A

        boxes = A.BboxParams("pascal_voc", label_fields=["labels"], min_width=1, min_height=1, min_visibility=0.3)
        self.data = data
        self.rng = np.random.default_rng(0)
        shape = (SIDE, SIDE)
        ground = (124, 116, 104)
        self.mosaic = A.Compose(
            [A.Mosaic((2, 2), target_size=shape, cell_shape=shape, fit_mode="contain", fill=ground, p=1)],
            bbox_params=boxes,
        )
        self.other = A.Compose(
            [A.LongestMaxSize(SIDE), A.PadIfNeeded(SIDE, SIDE, fill=ground), A.HorizontalFlip()], bbox_params=boxes
        )
        self.rest = A.Compose(
            [
                A.Affine((0.5, 1.5), translate_percent=(-0.1, 0.1), rotate=(-10, 10), shear=(-2, 2), fill=ground, p=1),
                A.ColorJitter((0.8, 1.2), (0.8, 1.2), (0.8, 1.2), (-0.02, 0.02), p=1),
                A.HorizontalFlip(),
            ],
            bbox_params=boxes,
        )

    def __call__(self) -> None:
        for i in range(len(self.data)):
            self.sample(i)

    def sample(self, i: int) -> dict[str, Any]:
        drawn = [self._read(int(k)) for k in self.rng.integers(len(self.data), size=4)]
        partners = [{"image": d["image"], "bboxes": d["bboxes"], "labels": d["labels"]} for d in drawn[:3]]
        first = self.mosaic(**self._read(i), mosaic_metadata=partners)
        other = self.other(**drawn[3])
        share = float(self.rng.beta(1.5, 1.5))
        image = cv2.addWeighted(first["image"], share, other["image"], 1 - share, 0)
        boxes = np.concatenate([np.reshape(d["bboxes"], (-1, 4)) for d in (first, other)])
        labels = np.concatenate([np.reshape(d["labels"], -1) for d in (first, other)])
        out: dict[str, Any] = self.rest(image=image, bboxes=boxes, labels=labels)
        return out

    def _read(self, i: int) -> dict[str, Any]:
        sample = self.data[i]
        return {"image": sample.image, "bboxes": sample.boxes, "labels": sample.labels}


def _stages(data: CocoData) -> dict[str, float]:
    """Seconds for all images of each step of the strong pipeline, the best of three."""
    from detector import seeding
    from detector.data.pool import Pool

    best: dict[str, float] = {}
    reader = _source(data, STRONG, Letterbox(size=(SIDE, SIDE)), 0).reader
    for _ in range(3):
        samples = [reader.read(i, []) for i in range(len(data))]
        for step in STRONG:
            name = str(step.model_dump()["type"]).replace("_", " ")
            rngs = [seeding.generator(0, seeding.SYNTHETIC, i) for i in range(len(data))]
            start = time.perf_counter()
            for i, sample in enumerate(samples):
                if isinstance(step, Combination):
                    samples[i] = step(sample, rngs[i], Pool(reader, i, []))
                else:
                    samples[i] = step(sample, rngs[i])  # type: ignore[operator]
            best[name] = min(best.get(name, float("inf")), time.perf_counter() - start)
    return best


def _masked(folder: Path, count: int) -> tuple[CocoData, str]:
    """Photographs with masks where they are at hand, else generated shapes; and what they are called."""
    root = Path(os.environ.get("DETECTOR_SHARED", "")) / "datasets" / "coco_tiny"
    if root.is_dir():
        return CocoData(CocoIndex.load(root / "annotations" / "train.json", root / "images")), "coco_tiny"
    ensure(folder, ShapeSet("plain", count, (360, 480)))
    return CocoData(CocoIndex.load(folder / "annotations.json", folder / "images")), "generated shapes"
