"""Assigners against the dense way to write them down: time, peak memory, and whether the results are the same."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import detector
from detector.assign import (
    Assigner,
    Atss,
    CenterGaussian,
    CenterRegion,
    DualWeight,
    DynamicSoftLabel,
    Fcos,
    Hungarian,
    IqDet,
    MaxIou,
    Ota,
    Paa,
    PointScale,
    SimOta,
    TaskAligned,
    Uniform,
    YoloBest,
    YoloRatio,
)
from detector.bench.measure import (
    Table,
    Target,
    bytes_text,
    clock_note,
    clock_of,
    peak_bytes,
    seconds_text,
    take_turns,
)
from detector.bench.networks import NUM_CLASSES, random_objects
from detector.models.priors import Anchors, GridPriors, Points
from detector.seeding import SYNTHETIC, generator
from detector.structures import BACKGROUND, Assignment, Objects, Predictions, Priors

BATCH = 8
STRIDES = (8, 16, 32, 64, 128)
SIZES = ((640, 640), (800, 1333))
COUNTS = (10, 100, 1000, 5000)
TARGET_SIZE = (800, 1333)
TARGET_COUNTS = ((1, 1000), (1, 5000), (8, 100))  # images, objects in each
LEAST_SPEED_UP = 10  # of every rule for a batch of 100 objects an image; of the first three also at 1,000
LEAST_MEMORY_RATIO, LEAST_MEMORY_RATIO_OF_FIRST = 10, 20  # at 1,000 objects
MOST_BYTES, OBJECTS_OF_BATCH = 2e9, 5000
# The dense version holds several tensors of objects times priors of an image: beyond this it takes GiB.  Images come
# one after the other, so with more than `FEW` objects in each this bounds the pairs of the whole batch, and the time.
MOST_PAIRS, FEW = 30_000_000, 100
# SimOTA's and RTMDet's also hold every class of every such pair of an image.
MOST_BY_CLASS = 200_000_000

POINTS, NINE = Points(), Anchors()
ONE = Anchors(scale=8, octave_scales=1, ratios=(1.0,))
KINDS: dict[str, GridPriors] = {"points": POINTS, "1 anchor": ONE, "9 anchors": NINE}


@dataclass(frozen=True)
class Rule:
    """What is measured, and against which dense version: a file and its function in `tests/reference`."""

    name: str
    rule: Assigner
    dense: tuple[str, str]
    home: GridPriors | None = None  # measured on these with any number of objects; there more is asked
    predictions: bool = True  # given to the rule
    by_class: bool = False  # the dense version holds every class of every pair


ALL_PRIORS, PREDICTED = ("assign_dense", "dense"), ("assign_predicted", "dense_predicted")
PAIRS = ("rules_dense", "dense_rule")  # for rules of pairs and weights; on the CPU alone

RULES = (
    Rule("FCOS", Fcos(), ALL_PRIORS, POINTS, predictions=False),
    Rule("ATSS", Atss(), ALL_PRIORS, ONE, predictions=False),
    Rule("max-IoU", MaxIou(), ALL_PRIORS, NINE, predictions=False),
    Rule("SimOTA", SimOta(), PREDICTED, by_class=True),
    Rule("dynamic soft label", DynamicSoftLabel(), PREDICTED, by_class=True),
    Rule("task-aligned", TaskAligned(), PREDICTED),
    Rule("OTA", Ota(), PREDICTED),
    Rule("Hungarian", Hungarian(), PREDICTED),
    Rule("YOLO ratio", YoloRatio(), PAIRS),
    Rule("YOLO best", YoloBest(), PAIRS),
    Rule("uniform", Uniform(), PAIRS),
    Rule("point scale", PointScale(), PAIRS),
    Rule("centre Gaussian", CenterGaussian(), PAIRS),
    Rule("centre region", CenterRegion(), PAIRS),
    Rule("PAA", Paa(), PAIRS),
    Rule("DW", DualWeight(), PAIRS),
    Rule("IQDet", IqDet(), PAIRS),
)

NEGLIGIBLE = 1e-12  # weight of a pair

METHOD = (
    "One call for a batch of one or {batch} images with so many objects in each, against the plain dense version in"
    " `tests/reference/assign_dense.py`, which compares every prior with every object of an image, one image after"
    " the other.  Peak memory is the most that tensors made by the call held at one time, its result included, from"
    " the allocator's own record of allocations and releases.  `same`: both give every prior the same object or"
    " label, checked in this run.  Where objects and priors multiply to more than {most:.0f} million the dense"
    " version is left out (those of an image, with up to {few} objects in each; of the batch, with more).  Every rule"
    " is run on points and on 9 anchors a cell at {height}x{width}, as far as its target needs; FCOS, ATSS and"
    " max-IoU on the priors that they are used with, with any number of objects.  Rules that look at predictions get"
    " {classes} class logits a prior and predicted boxes around it; the dense versions of SimOTA and dynamic soft"
    " label compare every class of every pair, as mmdetection does, and are left out beyond {by_class:.0f} million of"
    " these an image; `same` includes soft class targets within 1e-5 for them; PAA's fits each object with"
    " scikit-learn's mixture, as mmdetection does.  IQDet gets a mixture of two Gaussians for each object and"
    " level.{missing}"
)

Dense = Callable[..., Any]  # (rule, priors, objects) -> (B, R); with predictions: -> (B, R) and their class targets


def run(device: torch.device, quick: bool, rules: tuple[str, ...] = ()) -> Table:
    """`rules`: names as in the tables, without the priors; none: all."""
    results = [
        result for case in _cases(device, quick) if not rules or case.rule.name in rules for result in case.results()
    ]
    return Table(
        title="Label assignment",
        method=METHOD.format(
            batch=BATCH,
            most=MOST_PAIRS / 1e6,
            few=FEW,
            height=TARGET_SIZE[0],
            width=TARGET_SIZE[1],
            by_class=MOST_BY_CLASS / 1e6,
            classes=NUM_CLASSES,
            missing="" if load_dense() else "  Run outside a checkout: there is no dense version to compare with.",
        )
        + clock_note(device),
        columns=(
            "rule", "input", "images", "objects in each", "time", "peak memory",
            "dense: time", "peak memory", "times faster", "times less memory", "same",
        ),
        rows=[_row(result) for result in results],
        targets=[target for result in results for target in _targets(result)],
        numbers={"cases": results},
    )  # fmt: skip


def rule_names() -> list[str]:
    return [rule.name for rule in RULES]


@dataclass
class Case:
    """A rule on one kind of priors."""

    rule: Rule
    label: str
    kind: GridPriors
    device: torch.device
    quick: bool

    def inputs(self) -> Iterator[tuple[tuple[int, int], int, int]]:
        """Size of the image, images, objects in each."""
        if self.quick:
            yield from ((SIZES[0], images, COUNTS[0]) for images in (1, BATCH))
        elif self.kind is self.rule.home:
            yield from product(SIZES, (1, BATCH), COUNTS)
        else:
            yield from ((TARGET_SIZE, *counts) for counts in TARGET_COUNTS)

    def results(self) -> Iterator[dict[str, Any]]:
        rule = self.rule.rule
        dense = load_dense(*self.rule.dense) if self.rule.dense is not PAIRS or self.device.type == "cpu" else None
        for size, images, count in self.inputs():
            priors = make_priors(self.kind, size, self.device)
            objects = random_objects(images, count, size).to(self.device)
            said = random_predictions(priors, images) if self.rule.predictions else None
            if isinstance(rule, IqDet) and said is not None:
                said = replace(said, mixture=random_mixture(objects, len(priors.grids)))
            left_out = self.rule.by_class and count * len(priors) * NUM_CLASSES > MOST_BY_CLASS
            patience = 0.1 if self.quick else 3.0
            result = measure(rule, priors, objects, None if left_out else dense, self.device, patience, said)
            name = f"{self.rule.name}, {self.label}"
            case = {"rule": name, "height": size[0], "width": size[1], "images": images, "objects": count}
            yield case | {"first": self.kind is self.rule.home} | result


def _cases(device: torch.device, quick: bool) -> Iterator[Case]:
    """Each rule on points and 9 anchors and on priors of its own, if it has such; in a quick run on one of these."""
    for rule in RULES:
        for label, kind in KINDS.items():
            if kind is (rule.home or POINTS) or (kind is not ONE and not quick):
                yield Case(rule, label, kind, device, quick)


def random_predictions(priors: Priors, images: int) -> Predictions:
    """Logits of a head that has learnt a little, and boxes of objects' sizes about every prior."""
    rng = generator(2, SYNTHETIC)
    device, shape = priors.boxes.device, (images, len(priors))

    def normal(*further: int) -> Tensor:
        return torch.from_numpy(rng.standard_normal((*shape, *further), dtype="float32")).to(device)

    center = priors.centers + priors.stride[:, None] * normal(2)
    half = 4 * priors.stride[:, None] * (normal(2) * 0.5).exp()
    return Predictions(normal(NUM_CLASSES) * 2 - 4, torch.cat([center - half, center + half], -1), normal())


def random_mixture(objects: Objects, levels: int) -> Tensor:
    """(N, L, 2, 5): what an encoder could say of each object."""
    rng = generator(3, SYNTHETIC)
    numbers = torch.from_numpy(rng.random((len(objects), levels, 2, 5), dtype="float32")).to(objects.boxes.device)
    return torch.cat([numbers[..., :2] * 1.6 - 0.8, 0.1 + 0.9 * numbers[..., 2:4], numbers[..., 4:] / 2], -1)


def make_priors(kind: GridPriors, size: tuple[int, int], device: torch.device) -> Priors:
    """Of a pyramid over an input of `size` (height, width)."""
    return kind([(-(-size[0] // s), -(-size[1] // s)) for s in STRIDES], STRIDES, device)


def measure(
    rule: Assigner,
    priors: Priors,
    objects: Objects,
    dense: Dense | None,
    device: torch.device,
    patience: float,
    said: Predictions | None = None,
) -> dict[str, Any]:
    """Seconds and bytes; the dense version's and what it says of ours where it can be had, None otherwise."""

    def ours() -> Assignment:
        return rule(priors, objects, said)

    ours()  # makes tables that are kept, which are no call's own
    peak, found = peak_bytes(ours, device)
    result: dict[str, Any] = {"bytes": peak}
    result |= dict.fromkeys(("dense_seconds", "dense_bytes", "speed_up", "memory_ratio", "same"))
    each = len(objects) // objects.batch_size
    turns = partial(take_turns, device=device, turns=15, warm_up=0, patience=patience, clock=clock_of(device))
    if dense is None or (each if each <= FEW else len(objects)) * len(priors) > MOST_PAIRS:
        times = turns({"ours": ours})
        return result | {"seconds": times.median("ours")}

    def plain() -> Any:
        return dense(rule, priors, objects) if said is None else dense(rule, priors, objects, said)

    result["dense_bytes"], expected = peak_bytes(plain, device)
    result["memory_ratio"] = result["dense_bytes"] / result["bytes"]
    result["same"] = _same(found, expected)
    times = take_turns(
        {"ours": ours, "dense": plain}, device, turns=15, warm_up=0, patience=patience, clock=clock_of(device)
    )
    result["speed_up"] = times.ratio("dense", "ours")
    return result | {"seconds": times.median("ours"), "dense_seconds": times.median("dense")}


def _same(found: Assignment, expected: Tensor | tuple[Tensor, Tensor] | Assignment) -> bool:
    if isinstance(expected, Assignment):
        return _same_pairs(found, expected)
    if isinstance(expected, Tensor):
        return bool(torch.equal(found.per_prior(), expected))
    index, quality = expected
    mine = torch.zeros_like(quality).view(-1)
    kept = found.weight > 0
    mine[found.prior[kept]] = found.quality[kept]
    close = torch.allclose(mine.view_as(quality), quality, atol=1e-5, rtol=1e-5)
    return close and bool(torch.equal(found.per_prior().clamp(min=BACKGROUND), index))


def _same_pairs(found: Assignment, expected: Assignment) -> bool:
    """The same pairs in any order, without those that weigh nothing; all weights within 1e-5."""
    sides = []
    for one in (found, expected):
        kept = one.weight * one.quality > NEGLIGIBLE
        owner, prior = one.object[kept], one.prior[kept]
        order = (prior * (1 << 32) + owner).sort(stable=True).indices
        sides.append((torch.stack([prior, owner], 1)[order], torch.stack([one.quality, one.weight], 1)[kept][order]))
    (pairs, values), (other_pairs, other_values) = sides
    if not torch.equal(pairs, other_pairs) or not torch.equal(found.ignored, expected.ignored):
        return False
    close = torch.allclose(values, other_values, atol=1e-5, rtol=1e-5)
    if found.background_weight is None or expected.background_weight is None:
        return close and found.background_weight is expected.background_weight
    return close and torch.allclose(found.background_weight, expected.background_weight, atol=1e-5, rtol=1e-5)


def load_dense(file: str = "assign_dense", function: str = "dense") -> Dense | None:
    """The dense version, which is part of the tests and so not installed; None where there are no tests."""
    checkout = Path(detector.__file__).parents[1]
    path = checkout / "tests" / "reference" / f"{file}.py"
    if not path.is_file():
        return None
    if str(checkout) not in sys.path:
        sys.path.append(str(checkout))  # one dense version may import from another
    spec = importlib.util.spec_from_file_location(file, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[file] = module
    spec.loader.exec_module(module)
    dense: Dense = getattr(module, function)
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
    images, each = result["images"], result["objects"]
    if (result["height"], result["width"]) != TARGET_SIZE:
        return []
    what = f"{result['rule']}, {images} x {each:,} objects at {result['height']}x{result['width']}"
    found = []
    if images * each >= OBJECTS_OF_BATCH:
        found.append(Target(f"{what}: peak memory", result["bytes"] / 1e9, MOST_BYTES / 1e9, at_most=True, unit=" GB"))
    if result["same"] is None:
        return found
    first = result["first"]
    if (images, each) == (BATCH, 100) or (each == 1000 and first):
        found.append(Target(f"{what}: times faster", result["speed_up"], LEAST_SPEED_UP, at_most=False))
    if each == 1000:
        least = LEAST_MEMORY_RATIO_OF_FIRST if first else LEAST_MEMORY_RATIO
        found.append(Target(f"{what}: times less peak memory", result["memory_ratio"], least, at_most=False))
    if each in (100, 1000):
        found.append(Target(f"{what}: identical results (1: yes)", float(result["same"]), 1, at_most=False))
    return found
