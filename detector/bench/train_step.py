"""A train step against the bare network and against torchvision."""

from __future__ import annotations

from itertools import product

import torch
from torch import Tensor

from detector.bench.measure import Table, Target, Times, seconds_text, take_turns
from detector.bench.networks import (
    NUM_CLASSES,
    Method,
    build_peer,
    methods,
    precisions,
    random_images,
    random_objects,
)
from detector.models.layers import Precision, autocast
from detector.structures import Objects, Outputs

BATCH, SIDE, OBJECTS = 4, 512, 7
MOST_OVERHEAD, MOST_OF_PEER = 0.08, 0.85

METHOD = (
    "ResNet-50, FPN and full-size head (80 classes, 256 channels, 4 convolutions), all layers trained with batch norm;"
    " batch of {batch}, {side}x{side}, {objects} objects an image; the forward pass of all three in float32 and, where"
    " the device has instructions for it, under autocast to bfloat16.  Ours: uint8 images to losses to gradients."
    "  Bare: forward and backward of the same backbone, neck and head from normalised images, in the same memory order,"
    " with the gradient of the sum of all outputs as loss.  torchvision: its detector as it is built by default, from"
    " float images (their conversion is not counted), with the same layers and norms; its FCOS stands beside our ATSS,"
    " whose network is the same.  The optimiser's step is left out everywhere.  In turns, {turns} of them after one of"
    " warm-up; ratios are medians over the turns, in brackets their quartiles."
)


def run(device: torch.device, quick: bool) -> Table:
    side, turns = (128, 2) if quick else (SIDE, 5)
    rows, targets, numbers = [], [], {}
    for (title, method), precision in product(methods().items(), precisions(device)):
        name = f"{title}, {precision}"
        times = compare(method, device, side, turns, precision)
        bare, peer = times.ratio("ours", "bare"), times.ratio("ours", "peer")
        rows.append(
            (
                name,
                *(seconds_text(times.median(each)) for each in ("ours", "bare", "peer")),
                f"{bare - 1:+.1%} ({times.spread('ours', 'bare')})",
                f"{peer:.2f} of {method.peer_name} ({times.spread('ours', 'peer')})",
            )
        )
        targets.append(
            Target(f"{name}: overhead over the bare network", (bare - 1) * 100, MOST_OVERHEAD * 100, True, " %")
        )
        targets.append(Target(f"{name}: share of torchvision's time", peer, MOST_OF_PEER, True))
        numbers[name] = {"seconds": times.seconds, "over_bare": bare, "over_torchvision": peer}
    return Table(
        title="Train step",
        method=METHOD.format(batch=BATCH, side=side, objects=OBJECTS, turns=turns),
        columns=("method", "ours", "bare network", "torchvision", "ours over bare", "ours over torchvision"),
        rows=rows,
        targets=targets,
        numbers=numbers,
    )


def compare(method: Method, device: torch.device, side: int, turns: int, precision: Precision) -> Times:
    torch.manual_seed(0)
    images, objects = random_images(BATCH, side).to(device), random_objects(BATCH, OBJECTS, (side, side)).to(device)
    ours, peer = (
        method.model.build(NUM_CLASSES).to(device).to(memory_format=torch.channels_last),
        build_peer(method, side).to(device),
    )
    criterion = method.criterion.build(method.assigner, NUM_CLASSES).to(device)

    def step() -> None:
        ours.zero_grad(set_to_none=True)
        with autocast(device, precision):
            outputs = ours(images)
        criterion(outputs, objects).total.backward()

    normalised = torch.addcmul(ours.shift, images.float(), ours.scale)

    def bare_step() -> None:
        ours.zero_grad(set_to_none=True)
        with autocast(device, precision):
            found = ours.head(ours.neck(ours.backbone(normalised)))
        _backward(found)

    floats = list(images.float().div(255).contiguous())
    truth = _per_image(objects)

    def peer_step() -> None:
        peer.zero_grad(set_to_none=True)
        with autocast(device, precision):
            losses: dict[str, Tensor] = peer(floats, truth)
        torch.stack(list(losses.values())).sum().backward()

    return take_turns({"ours": step, "bare": bare_step, "peer": peer_step}, device, turns=turns)


def _backward(found: Outputs) -> None:
    """With the gradient of the sum of all outputs, given as full tensors.

    Calling `sum().backward()` would expand a single 1 without memory, from which autograd loses the channels_last order
    on the way back: the convolutions would then be slower than in any real step, and the bound flattering.
    """
    outputs = [x for x in (found.class_logits, found.box_raw, found.quality_logits) if x is not None]
    torch.autograd.backward(outputs, [torch.ones_like(x) for x in outputs])


def _per_image(objects: Objects) -> list[dict[str, Tensor]]:
    parts = [objects.select_image(i) for i in range(objects.batch_size)]
    return [{"boxes": part.boxes, "labels": part.labels} for part in parts]
