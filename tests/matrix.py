"""Every rule on every kind of head: one small network trains for 20 steps, then meets the batches that break codes.

    python -m pytest tests/test_matrix.py -m "slow or not slow" --matrix docs/matrix.md

writes the page as well.  Rules come from the union, so a new one is in the matrix by being a rule.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from detector.assign import Assigner, Rule
from detector.coders import Deltas, Distances
from detector.losses.base import CriterionConfig
from detector.losses.criteria import AnyCriterion
from detector.losses.dense import DenseCriterionConfig
from detector.losses.quality import QualityBce
from detector.losses.regression import Giou
from detector.losses.soft import QualityFocal
from detector.losses.two_stage import TwoStageCriterionConfig
from detector.models.backbones import BackboneConfig
from detector.models.dense import DenseConfig
from detector.models.dense_head import DenseHeadConfig
from detector.models.fpn import FpnConfig
from detector.models.priors import Anchors, AnyPriors, Points
from detector.models.two_stage import TwoStageConfig
from detector.structures import Batch, Objects
from detector.train.length import Horizon
from detector.train.random import seed_step
from detector.train.step import Stepper, TrainingModule, set_assigner

Head = Literal["nine anchors", "one anchor", "points", "RPN"]
Trial = Literal["no object", "one object", "2,000 objects", "only crowds", "bf16", "fp16"]
HEADS: tuple[Head, ...] = get_args(Head)
TRIALS: tuple[Trial, ...] = get_args(Trial)
STEPS, SIDE, CLASSES, LR = 20, 64, 3, 2e-3
FALL = 0.9  # the loss of the last three steps is at most this share of that of the first three
ENDS = 3
OF_OBJECTS = ("box", "rpn_box", "positive")  # terms that only objects bring
NONE = "—"
COMMAND = 'python -m pytest tests/test_matrix.py -m "slow or not slow" --matrix docs/matrix.md'
PAGE = """# Every rule on every head

Written by the test run itself, which fails where a rule or a head is missing here:

```
{command}
```

One small network (timm's `test_resnet`, an FPN of 16 channels, one convolution a tower) on two images of 64 x 64 pixels
with five objects. With anchors the boxes are coded as deltas, with points as distances; losses are those of
`configs/assign/base.yaml`. *RPN* is a whole two-stage model in which the rule assigns the RPN's anchors. A criterion
that matches by itself takes the place of both rule and losses; an RPN has its own.

A field says how the loss (of the RPN: its own two terms) fell in {steps} steps, as means of the first and of the last
{ends}; at most {share} of the first may be left. Rules weigh pairs differently, so numbers of different rows say little
about each other. Then how many of these the trained network lived through, one step of the optimiser each:

{trials}

Losses, gradients and weights must stay finite, and the box term must be exactly 0 where there is no object, and not
where there is one.

{table}
"""

RULES: dict[str, Assigner] = {rule.type: rule for rule in (kind() for kind in get_args(get_args(Rule)[0]))}
# Criteria that match by themselves: rows of their own.
ALONE: dict[str, CriterionConfig] = {
    kind.model_fields["type"].default: kind() for kind in get_args(get_args(AnyCriterion)[0]) if not kind.uses_assigner
}
ROWS = (*RULES, *ALONE)

COMPARISON = DenseCriterionConfig(  # configs/assign/base.yaml
    classification=QualityFocal(),
    box=Giou(weight=2),
    box_weighting="assignment",
    quality=QualityBce(target="iou"),
    normalizer="quality",
)
# One extra level, of one cell: in bf16 on CPUs, torch 2.14 gives a stride-2 convolution of a single cell NaN gradients.
NECK = {"channels": 16, "norm": "batch", "extra_levels": 1}


@dataclass(frozen=True)
class Trained:
    """One field of the matrix after its 20 steps."""

    module: TrainingModule
    stepper: Stepper
    losses: tuple[float, ...]  # of each step, divided by its normaliser

    @property
    def first(self) -> float:
        return sum(self.losses[:ENDS]) / ENDS

    @property
    def last(self) -> float:
        return sum(self.losses[-ENDS:]) / ENDS


def possible(row: str, head: Head) -> bool:
    """An RPN has a criterion of its own, which one that matches by itself cannot replace."""
    return head != "RPN" or row in RULES


def build(row: str, head: Head) -> TrainingModule:
    """The network and the criterion that a recipe with this rule would have."""
    torch.manual_seed(0)
    rule = RULES.get(row)
    if head == "RPN":
        two_stage = TwoStageConfig.model_validate(
            {
                "backbone": {"name": "test_resnet", "levels": [2, 3, 4, 5]},
                "neck": {**NECK, "extra": "pool"},
                "rpn": {"channels": 16, "train": {"pre_nms": 50, "post_nms": 20}},
                "head": {"channels": 16},
                "rules": {"sampler": {"type": "random", "count": 16}},
            }
        )
        return TrainingModule(two_stage.build(CLASSES), TwoStageCriterionConfig().build(rule, CLASSES))
    criterion = ALONE.get(row, COMPARISON)
    priors: AnyPriors = Points() if head == "points" else Anchors()
    if head == "one anchor":
        priors = Anchors(scale=8, octave_scales=1, ratios=(1,))
    coder = Distances() if head == "points" else Deltas()
    dense = DenseHeadConfig(
        priors=priors, coder=coder, channels=16, convs=1, norm="batch", quality=criterion.uses_quality
    )
    model = DenseConfig(backbone=BackboneConfig(name="test_resnet"), neck=FpnConfig.model_validate(NECK), head=dense)
    return TrainingModule(model.build(CLASSES), criterion.build(rule, CLASSES))


def batch_of(boxes: list[Tensor], crowds: list[Tensor] | None = None) -> Batch:
    """Noise with a plain rectangle of its class's colour for each object, drawn in order."""
    count = len(boxes)
    images = torch.randint(60, 120, (count, 3, SIDE, SIDE), generator=torch.Generator().manual_seed(0)).byte()
    labels = [torch.arange(len(b)) % CLASSES for b in boxes]
    for image, mine, kinds in zip(images, boxes, labels, strict=True):
        for (x1, y1, x2, y2), kind in zip(mine.round().long().tolist(), kinds.tolist(), strict=True):
            image[:, y1:y2, x1:x2] = 20
            image[kind, y1:y2, x1:x2] = 240
    sizes = torch.full((count, 2), float(SIDE))
    objects = Objects.collate(boxes, labels, crowds, sizes)
    scale = torch.ones(count, 2)
    return Batch(images, objects, torch.arange(count), sizes.long(), scale, torch.zeros_like(scale))


def scene() -> Batch:
    """What the 20 steps learn: five objects, from 12 to 44 pixels."""
    one = torch.tensor([[6.0, 8, 30, 34], [36, 30, 60, 62], [40, 4, 52, 18]])
    return batch_of([one, torch.tensor([[10.0, 12, 54, 52], [2, 48, 16, 60]])])


def trial(name: Trial) -> Batch:
    none = torch.zeros(0, 4)
    if name == "no object":
        return batch_of([none, none])
    if name == "one object":
        return batch_of([torch.tensor([[12.0, 14, 54, 50]]), none])
    if name == "only crowds":
        return batch_of([none, none], [torch.tensor([[0.0, 0, SIDE, SIDE]]), torch.tensor([[8.0, 8, 40, 40]])])
    if name == "2,000 objects":
        random = torch.Generator().manual_seed(0)
        corner = torch.rand(2000, 2, generator=random) * (SIDE - 3)
        far = (corner + 2 + torch.rand(2000, 2, generator=random) * 46).clamp(max=SIDE)
        return batch_of([torch.cat([corner, far], 1), none])
    return scene()


def run(row: str, head: Head) -> Trained:
    """One field of the matrix.  An AssertionError, or whatever else is raised, says what it did not live through."""
    trained = train(row, head)
    assert all(map(math.isfinite, trained.losses)), trained.losses
    assert trained.last <= FALL * trained.first, f"the loss did not fall: {trained.losses}"
    weights = copy.deepcopy(trained.module.state_dict())
    for name in TRIALS:
        trained.module.load_state_dict(weights)
        survive(row, trained, name)
    return trained


def train(row: str, head: Head) -> Trained:
    """20 steps on one batch, as the trainer does them: the rule of the step, the step's seed, one optimiser step."""
    module = build(row, head)
    stepper = Stepper(module, torch.optim.AdamW(module.parameters(), lr=LR), torch.amp.GradScaler(enabled=False), 10.0)
    losses = [float(sum(step(row, module, stepper, scene(), index).values())) for index in range(STEPS)]
    return Trained(module, stepper, tuple(losses))


def survive(row: str, trained: Trained, name: Trial) -> None:
    """One more step: finite in everything, and boxes learn exactly if there is an object."""
    module = trained.module
    module.precision = name if name in ("bf16", "fp16") else "fp32"
    batch = trial(name)
    terms = step(row, module, trained.stepper, batch, STEPS)
    assert all(value.isfinite() for value in terms.values()), f"{name}: {terms}"
    for which, parameter in module.named_parameters():
        assert parameter.grad is None or parameter.grad.isfinite().all(), f"{name}: the gradient of {which}"
        assert parameter.isfinite().all(), f"{name}: {which}"
    (of_objects,) = (value for term, value in terms.items() if term in OF_OBJECTS)
    assert bool(of_objects > 0) == bool(len(batch.objects)), f"{name}: {terms}"


def step(row: str, module: TrainingModule, stepper: Stepper, batch: Batch, index: int) -> dict[str, Tensor]:
    """The terms of step `index`, from 0; of a two-stage model the RPN's, on which alone the rule acts."""
    if row in RULES:
        set_assigner(module, RULES[row].at(index, Horizon(total=STEPS, images=len(batch), batch=len(batch))))
    seed_step(0, index, 0)
    return {name: value for name, value in stepper([batch]).terms.items() if not name.startswith("stage")}


def field(trained: Trained) -> str:
    return f"{trained.first:.2f} → {trained.last:.2f}, {len(TRIALS)}/{len(TRIALS)}"


def label(row: str) -> str:
    return f"`{row}`" if row in RULES else f"criterion `{row}`"


def document(fields: dict[tuple[str, Head], str]) -> str:
    """The page of docs/; what is not in `fields` was not run."""
    lines = ["| | " + " | ".join(HEADS) + " |", "|---|" + "---|" * len(HEADS)]
    for row in ROWS:
        cells = [fields.get((row, head), "not run") if possible(row, head) else NONE for head in HEADS]
        lines.append(f"| {label(row)} | " + " | ".join(cells) + " |")
    return PAGE.format(
        table="\n".join(lines), command=COMMAND, steps=STEPS, trials="; ".join(TRIALS), share=f"{FALL:.0%}", ends=ENDS
    )


def table(page: str) -> dict[str, dict[str, str]]:
    """Of the page's table: row label -> head -> field."""
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in page.splitlines() if line.startswith("|")]
    head, _, *body = rows
    return {name: dict(zip(head[1:], cells, strict=True)) for name, *cells in body}
