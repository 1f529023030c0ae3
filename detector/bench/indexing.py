"""Reading a large annotation file, in a process of its own, so that its memory is that of the reading."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from detector.seeding import SYNTHETIC, generator

IMAGES, BOXES = 120_000, 860_000  # as many as COCO's training split
CORNERS = 12  # of each polygon
MOST_SECONDS, MOST_MEGABYTES = 8, 600

_CODE = """
import sys, time
from pathlib import Path
from detector.bench.indexing import peak_mebibytes
from detector.data.index import CocoIndex
wall, busy = time.perf_counter(), time.process_time()
index = CocoIndex.load(Path(sys.argv[1]), Path(sys.argv[2]))
wall, busy = time.perf_counter() - wall, time.process_time() - busy
assert (len(index), len(index.boxes)) == (int(sys.argv[3]), int(sys.argv[4]))
print(wall, busy, peak_mebibytes())
"""


@dataclass(frozen=True)
class Reading:
    """What reading a generated annotation file took."""

    seconds: float
    busy_seconds: float  # of the processor: what the seconds are on a machine with nothing else to do
    mebibytes: float  # the most that the process held, the interpreter included
    file_megabytes: float


def measure(images: int = IMAGES, boxes: int = BOXES) -> Reading:
    """Reads it in a process of its own.  Workers are forked afterwards and share what was read."""
    with tempfile.TemporaryDirectory() as name:
        path = Path(name) / "annotations.json"
        write(path, images, boxes)
        command = [sys.executable, "-c", _CODE, str(path), name, str(images), str(boxes)]
        run = subprocess.run(command, capture_output=True, text=True, check=True)
        seconds, busy, mebibytes = map(float, run.stdout.split())
        return Reading(seconds, busy, mebibytes, path.stat().st_size / 1e6)


def peak_mebibytes() -> float:
    """The most memory that this process ever held."""
    status = Path("/proc/self/status")
    if status.is_file():
        peak = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(peak.split()[1]) / 2**10
    # Elsewhere; on Linux this would count what the parent held when it started this process.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


def write(path: Path, images: int, boxes: int) -> None:
    """A COCO annotation file of images of 640x480 and boxes with one polygon each, in no order."""
    rng = generator(3, SYNTHETIC)
    of = rng.integers(1, images + 1, boxes).tolist()
    corner, side = rng.uniform(0, 300, (boxes, 2)).round(2), rng.uniform(4, 170, (boxes, 2)).round(2)
    category = rng.integers(1, 81, boxes).tolist()
    with path.open("w", encoding="utf-8") as file:
        file.write('{"images": [')
        for i in range(1, images + 1):
            image = {"license": 1, "file_name": f"{i:012}.jpg", "height": 480, "width": 640}
            image |= {"date_captured": "2013-11-14 11:18:45", "id": i}
            file.write((", " if i > 1 else "") + json.dumps(image))
        file.write('], "annotations": [')
        for k in range(boxes):
            polygon = (corner[k] + side[k] * rng.random((CORNERS, 2))).round(2)
            annotation = {"segmentation": [polygon.ravel().tolist()], "area": float(np.prod(side[k])), "iscrowd": 0}
            annotation |= {"image_id": of[k], "bbox": [*corner[k].tolist(), *side[k].tolist()]}
            file.write((", " if k else "") + json.dumps(annotation | {"category_id": category[k], "id": k + 1}))
        categories = [{"id": c, "name": f"class {c}"} for c in range(1, 81)]
        file.write(f'], "categories": {json.dumps(categories)}}}')
