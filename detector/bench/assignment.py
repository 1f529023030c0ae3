"""Assigners against the dense way to write them down: time, peak memory, and whether the results are the same."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import detector
from detector.assign import Assigner, Atss, Fcos, MaxIou
from detector.bench.measure import Table, Target, bytes_text, peak_bytes, seconds_text, take_turns
from detector.bench.networks import random_objects
from detector.models.priors import Anchors, GridPriors, Points
from detector.structures import Assignment, Objects, Priors

BATCH = 8
STRIDES = (8, 16, 32, 64, 128)
SIZES = ((640, 640), (800, 1333))
COUNTS = (10, 100, 1000, 5000)
LEAST_SPEED_UP, LEAST_MEMORY_RATIO = 10, 20
TARGET = (800, 1333, 1000)
# The dense version holds several tensors of objects times priors of an image: beyond this it takes GiB and minutes.
MOST_PAIRS = 30_000_000

CASES: tuple[tuple[str, Assigner, GridPriors], ...] = (
    ("FCOS, points", Fcos(), Points()),
    ("ATSS, 1 anchor", Atss(), Anchors(scale=8, octave_scales=1, ratios=(1.0,))),
    ("max-IoU, 9 anchors", MaxIou(), Anchors()),
)

METHOD = (
    "One call for a batch of one or {batch} images with so many objects in each, against the plain dense version in"
    " `tests/reference/assign_dense.py`, which compares every prior with every object of an image, one image after the"
    " other.  Peak memory is the most that tensors made by the call held at one time, its result included, from the"
    " allocator's own record of allocations and releases.  `same`: both give every prior the same object or label,"
    " checked in this run.  Where images, objects and priors multiply to more than {most:.0f} million the dense version"
    " is left out.{missing}"
)

Dense = Callable[[Assigner, Priors, Objects], Tensor]


def run(device: torch.device, quick: bool) -> Table:
    dense = load_dense()
    results = []
    for size in SIZES[:1] if quick else SIZES:
        for name, rule, kind in CASES:
            priors = make_priors(kind, size, device)
            for images in (1, BATCH):
                for count in COUNTS[:1] if quick else COUNTS:
                    objects = random_objects(images, count, size).to(device)
                    result = measure(rule, priors, objects, dense, device, 0.1 if quick else 3.0)
                    case = {"rule": name, "height": size[0], "width": size[1], "images": images, "objects": count}
                    results.append(case | result)
    return Table(
        title="Label assignment",
        method=METHOD.format(
            batch=BATCH,
            most=MOST_PAIRS / 1e6,
            missing="" if dense else "  Run outside a checkout: there is no dense version to compare with.",
        ),
        columns=(
            "rule", "input", "images", "objects in each", "time", "peak memory",
            "dense: time", "peak memory", "times faster", "times less memory", "same",
        ),
        rows=[_row(result) for result in results],
        targets=[target for result in results for target in _targets(result)],
        numbers={"cases": results},
    )  # fmt: skip


def make_priors(kind: GridPriors, size: tuple[int, int], device: torch.device) -> Priors:
    """Of a pyramid over an input of `size` (height, width)."""
    return kind([(-(-size[0] // s), -(-size[1] // s)) for s in STRIDES], STRIDES, device)


def measure(
    rule: Assigner, priors: Priors, objects: Objects, dense: Dense | None, device: torch.device, patience: float
) -> dict[str, Any]:
    """Seconds and bytes; the dense version's and what it says of ours where it can be had, None otherwise."""

    def ours() -> Assignment:
        return rule(priors, objects)

    ours()
    result: dict[str, Any] = {"bytes": peak_bytes(ours, device)[0]}
    result |= dict.fromkeys(("dense_seconds", "dense_bytes", "speed_up", "memory_ratio", "same"))
    if dense is None or len(objects) * len(priors) > MOST_PAIRS:
        return result | {"seconds": take_turns({"ours": ours}, device, turns=15, patience=patience).median("ours")}

    def plain() -> Tensor:
        return dense(rule, priors, objects)

    result["dense_bytes"], expected = peak_bytes(plain, device)
    result["memory_ratio"] = result["dense_bytes"] / result["bytes"]
    result["same"] = bool(torch.equal(ours().per_prior(), expected))
    times = take_turns({"ours": ours, "dense": plain}, device, turns=15, warm_up=0, patience=patience)
    result["speed_up"] = times.ratio("dense", "ours")
    return result | {"seconds": times.median("ours"), "dense_seconds": times.median("dense")}


def load_dense() -> Dense | None:
    """The dense version, which is part of the tests and so not installed; None where there are no tests."""
    path = Path(detector.__file__).parents[1] / "tests" / "reference" / "assign_dense.py"
    if not path.is_file():
        return None
    spec = importlib.util.spec_from_file_location("assign_dense", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["assign_dense"] = module
    spec.loader.exec_module(module)
    dense: Dense = module.dense
    return dense


def _row(result: dict[str, Any]) -> tuple[str, ...]:
    ours = (
        result["rule"],
        f"{result['height']}x{result['width']}",
        str(result["images"]),
        f"{result['objects']:,}",
        seconds_text(result["seconds"]),
        bytes_text(result["bytes"]),
    )
    if result["same"] is None:
        return (*ours, *[""] * 5)
    return (
        *ours,
        seconds_text(result["dense_seconds"]),
        bytes_text(result["dense_bytes"]),
        f"{result['speed_up']:.3g}",
        f"{result['memory_ratio']:.3g}",
        "yes" if result["same"] else "NO",
    )


def _targets(result: dict[str, Any]) -> list[Target]:
    if (result["height"], result["width"], result["objects"]) != TARGET or result["same"] is None:
        return []
    what = f"{result['rule']}, {result['objects']:,} objects at {result['height']}x{result['width']}"
    return [
        Target(f"{what}: times faster", result["speed_up"], LEAST_SPEED_UP, at_most=False),
        Target(f"{what}: times less peak memory", result["memory_ratio"], LEAST_MEMORY_RATIO, at_most=False),
        Target(f"{what}: identical results (1: yes)", float(result["same"]), 1, at_most=False),
    ]
