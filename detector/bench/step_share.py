"""What share of a train step each rule of label assignment takes."""

from __future__ import annotations

from typing import Any, get_args

import torch

from detector.assign import Assigner, Constant
from detector.bench.assignment import random_predictions
from detector.bench.measure import Call, Table, Target, Times, clock_note, clock_of, seconds_text, take_turns
from detector.bench.networks import NUM_CLASSES, methods, precisions, random_images, random_objects
from detector.losses.dense import DenseCriterionConfig
from detector.losses.quality import QualityBce
from detector.losses.regression import Giou
from detector.losses.soft import QualityFocal
from detector.models.dense import DenseConfig
from detector.models.layers import autocast
from detector.structures import Objects, Outputs

BATCH, SIDE, OBJECTS = 4, 512, 10
MOST_SHARE = 0.05

# One for all rules: their quality is the class target and weights the box, and its sum divides both.
CRITERION = DenseCriterionConfig(
    classification=QualityFocal(),
    box=Giou(weight=2.0),
    box_weighting="assignment",
    quality=QualityBce(target="iou"),
    normalizer="quality",
)

METHOD = (
    "ResNet-50, FPN and the full-size head of FCOS and ATSS on points (80 classes, 256 channels, 4 convolutions), all"
    " layers trained with batch norm; batch of {batch}, {side}x{side}, {objects} objects an image.  `rule`: one call"
    " for the batch, with the decoding of predictions where it looks at them.  `step`: forward and backward pass of the"
    " network, which all rules share, plus the criterion's with this rule, the same losses for all; the optimiser's"
    " step is left out.  Rule and criterion work in float32 in either case.  The head's answers are drawn as if it had"
    " learnt a little.  In turns, {turns} of them after one of warm-up; shares are medians over the turns."
)


def rules() -> dict[str, Assigner]:
    """Every rule as it is by default, by type.  Those that change over time are at each step one of these."""
    return {rule.model_fields["type"].default: rule() for rule in get_args(Constant)}


def run(device: torch.device, quick: bool) -> Table:
    (side, turns), each = (128, 1) if quick else (SIDE, 5), precisions(device)
    times = compare(methods()["FCOS"].model, device, side, turns)
    rows, numbers = [], {}
    for name in rules():
        found = shares(times, name)
        cells = [name, str(OBJECTS), seconds_text(times.median(f"rule {name}"))]
        for precision in each:
            step = times.median(f"network {precision}") + times.median(f"criterion {name}")
            cells += [seconds_text(step), f"{found[precision]:.2%}"]
        rows.append(tuple(cells))
        numbers[name] = found
    targets = []
    for precision in each:
        name = max(numbers, key=lambda rule: numbers[rule][precision])
        what = f"largest share of a step, {precision} ({name})"
        targets.append(Target(what, numbers[name][precision] * 100, MOST_SHARE * 100, True, " %"))
    return Table(
        title="Share of a train step that a rule takes",
        method=METHOD.format(batch=BATCH, side=side, objects=OBJECTS, turns=turns) + clock_note(device),
        columns=("rule", "objects in each", "rule", *(c for p in each for c in (f"step, {p}", "share"))),
        rows=rows,
        targets=targets,
        numbers={"shares": numbers, "seconds": times.seconds},
    )


def shares(times: Times, name: str) -> dict[str, float]:
    """By precision: the rule's time over that of a step with it, median over the turns."""
    found: dict[str, float] = {}
    for precision in (key.split()[1] for key in times.seconds if key.startswith("network ")):
        parts = (times.seconds[key] for key in (f"network {precision}", f"criterion {name}"))
        steps = [network + criterion for network, criterion in zip(*parts, strict=True)]
        both = Times({"rule": times.seconds[f"rule {name}"], "step": steps})
        found[precision] = both.ratio("rule", "step")
    return found


def compare(model: DenseConfig, device: torch.device, side: int, turns: int) -> Times:
    """Seconds of `network fp32`, ..., and of `rule NAME` and `criterion NAME` for each rule."""
    torch.manual_seed(0)
    images, objects = random_images(BATCH, side).to(device), random_objects(BATCH, OBJECTS, (side, side)).to(device)
    network = model.build(NUM_CLASSES).to(device).to(memory_format=torch.channels_last)

    def pass_through(precision: Any) -> None:
        network.zero_grad(set_to_none=True)
        with autocast(device, precision):
            found = network(images)
        said = [x for x in (found.class_logits, found.box_raw, found.quality_logits) if x is not None]
        torch.autograd.backward(said, [torch.ones_like(x) for x in said])

    with torch.no_grad():
        outputs = as_if_learnt(network(images))
    calls: dict[str, Call] = {f"network {p}": lambda p=p: pass_through(p) for p in precisions(device)}  # type: ignore[misc]
    for name, rule in rules().items():
        calls |= calls_of(name, rule, outputs, objects)
    return take_turns(calls, device, turns=turns, clock=clock_of(device))


def as_if_learnt(outputs: Outputs) -> Outputs:
    """For the same priors, with boxes of objects' sizes, from which gradients can be asked."""
    priors, coder = outputs.priors, outputs.coder
    said = random_predictions(priors, BATCH)
    assert said.quality_logits is not None
    raw = coder.encode(priors.boxes, priors.stride, said.boxes)
    for leaf in (said.class_logits, raw, said.quality_logits):
        leaf.requires_grad_()
    return Outputs(priors, said.class_logits, raw, said.quality_logits, coder)


def calls_of(name: str, rule: Assigner, outputs: Outputs, objects: Objects) -> dict[str, Call]:
    """The rule alone, and the criterion with it up to the gradients of the head's answers."""
    criterion = CRITERION.build(rule, NUM_CLASSES).to(outputs.box_raw.device)
    leaves = [x for x in (outputs.class_logits, outputs.box_raw, outputs.quality_logits) if x is not None]
    return {
        f"rule {name}": lambda: rule(outputs.priors, objects, outputs.detached() if rule.uses_predictions else None),
        f"criterion {name}": lambda: torch.autograd.grad(criterion(outputs, objects).total, leaves),
    }
