"""The loader against nothing but decoding the same files; reading a large annotation file."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch

from detector.bench import indexing
from detector.bench.measure import Table, Target, one_cv2_thread, take_turns
from detector.data.coco import CocoData, CocoIndex
from detector.data.loader import train_loader
from detector.data.resize import Letterbox, ShortEdge, Sizing
from detector.data.transforms import Color, Flip
from detector.seeding import SYNTHETIC, generator

HEIGHT, WIDTH, OBJECTS, BATCH = 480, 640, 7, 8
LEAST_SHARE = 0.85

SIZINGS: tuple[tuple[str, Sizing], ...] = (
    ("letterbox to 512x512", Letterbox(size=(512, 512))),
    ("letterbox to 640x640", Letterbox(size=(640, 640))),
    ("short edge to 800", ShortEdge(short=800, long=1333)),
)

METHOD = (
    "{images} generated JPEGs of 640x480 (quality 90, {size:.0f} kB each) with {objects} objects each, in the file"
    " cache.  Ours: the training loader with flip and colour on, resized, batches of {batch}, in the main process"
    " (`workers=0`).  Bare: `cv2.imread` of the same files and nothing else.  One thread for both, so the ratio is that"
    " of one core.  In turns, {turns} of them after one of warm-up; ratios are medians over the turns, in brackets"
    " their quartiles."
)


def run(device: torch.device, quick: bool) -> Table:
    count, turns = (8, 2) if quick else (64, 15)
    with one_cv2_thread(), tempfile.TemporaryDirectory() as name:
        data = make_images(Path(name), count)
        paths = [str(data.index.image_path(i)) for i in range(count)]
        size = sum(Path(path).stat().st_size for path in paths) / count / 1e3

        def bare() -> None:
            for path in paths:
                cv2.imread(path, cv2.IMREAD_COLOR)

        candidates = {"bare": bare} | {label: _loading(data, sizing) for label, sizing in SIZINGS}
        times = take_turns(candidates, torch.device("cpu"), turns=turns)
    rows: list[tuple[str, ...]] = [("bare decoding", f"{count / times.median('bare'):.0f}", "")]
    shares = {}
    for label, _ in SIZINGS:
        shares[label] = times.ratio("bare", label)
        rows.append(
            (label, f"{count / times.median(label):.0f}", f"{shares[label]:.2f} ({times.spread('bare', label)})")
        )
    label = SIZINGS[0][0]
    images, boxes = (120, 860) if quick else (indexing.IMAGES, indexing.BOXES)
    reading = indexing.measure(images, boxes)
    what = f"reading an annotation file of {images:,} images and {boxes:,} boxes"
    rows.append((what, f"{reading.seconds:.1f} s, {reading.mebibytes:.0f} MiB", ""))
    return Table(
        title="Data loading",
        method=METHOD.format(images=count, size=size, objects=OBJECTS, batch=BATCH, turns=turns)
        + f"  The annotation file ({reading.file_megabytes:.0f} MB) is generated and read once in a process of its"
        " own, whose peak memory is given; workers share what was read.  Its seconds on the processor:"
        f" {reading.busy_seconds:.1f}.",
        columns=("what", "images a second", "share of bare decoding's throughput"),
        rows=rows,
        targets=[
            Target(f"flip, colour, {label}: share of bare decoding", shares[label], LEAST_SHARE, False),
            Target(f"{what}: time", reading.seconds, indexing.MOST_SECONDS, True, " s"),
            Target(f"{what}: memory", reading.mebibytes, indexing.MOST_MEGABYTES, True, " MiB"),
        ],
        numbers={
            "seconds": times.seconds,
            "images": count,
            "shares": shares,
            "index": asdict(reading),
        },
    )


def _loading(data: CocoData, sizing: Sizing) -> Callable[[], None]:
    def load() -> None:
        loader = train_loader(
            data,
            augment=(Flip(), Color(probability=1.0)),
            resize=sizing,
            batch_size=BATCH,
            seed=0,
            start_step=0,
            stop_step=len(data) // BATCH,
            workers=0,
        )
        for _ in loader:
            pass

    return load


def make_images(folder: Path, count: int) -> CocoData:
    """A COCO set of JPEGs with the spectrum of photographs: detail at every scale, less the finer it is."""
    rng = generator(2, SYNTHETIC)
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for i in range(1, count + 1):
        picture = np.zeros((HEIGHT, WIDTH, 3), np.float32)
        for scale in (1, 2, 4, 8, 16, 32, 64):
            noise = rng.standard_normal((HEIGHT // scale + 1, WIDTH // scale + 1, 3), np.float32) * scale**0.5
            picture += cv2.resize(noise, (WIDTH, HEIGHT), interpolation=cv2.INTER_CUBIC)
        pixels = (128 + 7 * picture).clip(0, 255).astype(np.uint8)
        cv2.imwrite(str(folder / f"{i}.jpg"), pixels, [cv2.IMWRITE_JPEG_QUALITY, 90])
        images.append({"id": i, "file_name": f"{i}.jpg", "width": WIDTH, "height": HEIGHT})
        for _ in range(OBJECTS):
            box = [float(v) for v in (*rng.uniform(0, 300, 2), *rng.uniform(20, 160, 2))]
            annotations.append(
                {"id": len(annotations) + 1, "image_id": i, "category_id": 1, "bbox": box, "area": box[2] * box[3]}
                | {"iscrowd": 0}
            )
    content = {"images": images, "annotations": annotations, "categories": [{"id": 1, "name": "thing"}]}
    path = folder / "annotations.json"
    path.write_text(json.dumps(content), encoding="utf-8")
    return CocoData(CocoIndex.load(path, folder))
