"""Faster R-CNN against torchvision's, with the very same weights: train step, inference, memory, and where time goes.

With the same weights both have the same proposals and detections, on which most of the time after the pyramid depends.
"""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torchvision.models import resnet50
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.backbone_utils import _resnet_fpn_extractor
from torchvision.ops.misc import FrozenBatchNorm2d

from detector.bench.measure import (
    Table,
    Target,
    bytes_text,
    clock_note,
    clock_of,
    peak_bytes,
    seconds_text,
    take_turns,
    wait,
)
from detector.bench.networks import NUM_CLASSES, random_images, random_objects
from detector.config.run import RunConfig
from detector.convert.common import configuration, rename
from detector.convert.torchvision import ARCHITECTURES, reorder
from detector.decode import decode
from detector.losses.two_stage import TwoStageCriterion
from detector.models.fold import fold_batch_norm
from detector.models.norms import merge_frozen, replace_batch_norms
from detector.models.two_stage import TwoStageDetector
from detector.structures import Detections, Objects, Outputs

NAME = "fasterrcnn_resnet50_fpn"
BATCH, SIDE, OBJECTS = 2, 800, 7
CANDIDATES, THRESHOLD = 1000, 0.05  # (proposal, class) pairs of the batch's images above the score threshold, an image
TRAIN, INFERENCE, SHARE = 0.85, 0.7, 0.12
CHOOSING = ("proposals", "RPN assignment and sampling", "second assignment and sampling")

METHOD = (
    "Faster R-CNN ResNet-50 FPN, {classes} classes, batch of {batch}, {side}x{side}, {objects} objects an image,"
    " float32.  Both have the same weights (ours converted from torchvision's), so the same proposals and detections:"
    " 2,000 boxes of a level before NMS and 1,000 of an image after it in training, 1,000 and 1,000 in inference;"
    " stem and first stage frozen, all batch norms frozen.  The weights are random, but objectness and classes are"
    " scaled so that {candidates:,} (proposal, class) pairs an image pass the threshold of 0.05.  Ours: uint8 images;"
    " torchvision: float images of the final size (their conversion is not counted).  Train: forward, losses, backward;"
    " the optimiser's step is left out.  Inference: images to boxes, ours with batch norms folded, as `detector.load`"
    " does.{clock}  In turns, {turns} of them after one of warm-up; ratios are medians over the turns, in brackets"
    " their quartiles.  Memory is the most that a call's tensors held.  The parts are medians of turns of their own."
)


def run(device: torch.device, quick: bool) -> Table:
    side, turns = (128, 1) if quick else (SIDE, 5)
    return compare(device, side, turns)


def compare(device: torch.device, side: int, turns: int) -> Table:
    pair = Pair(device, side)
    rows, targets, numbers = [], [], {}
    for task, ours, peer, limit in (
        ("train", pair.train, pair.peer_train, TRAIN),
        ("inference", pair.find, pair.peer_find, INFERENCE),
    ):
        pair.mode(training=task == "train")
        times = take_turns({"ours": ours, "peer": peer}, device, turns=turns, clock=clock_of(device))
        memory = [peak_bytes(call, device)[0] for call in (ours, peer)]
        ratio = times.ratio("ours", "peer")
        cells = [seconds_text(times.median(name)) for name in ("ours", "peer")]
        memory_cells = [bytes_text(count) for count in memory]
        rows.append((task, *cells, f"{ratio:.2f} ({times.spread('ours', 'peer')})", *memory_cells))
        targets.append(Target(f"{task}: share of torchvision's time", ratio, limit, True))
        targets.append(Target(f"{task}: share of torchvision's memory", memory[0] / memory[1], 1.0, True))
        parts = split(pair, task, turns)
        for name in dict.fromkeys([*parts["ours"], *parts["peer"]]):
            both = [parts[whose].get(name, 0.0) for whose in ("ours", "peer")]
            rows.append((f"{task}: {name}", *(seconds_text(each) for each in both), "", "", ""))
        if task == "train":
            share = sum(parts["ours"].get(name, 0.0) for name in CHOOSING) / sum(parts["ours"].values())
            what = "train: proposals, assignment and sampling of both stages"
            targets.append(Target(what, share * 100, SHARE * 100, True, " %"))
        numbers[task] = {"seconds": times.seconds, "memory": memory, "parts": parts}
    return Table(
        title="Faster R-CNN",
        method=METHOD.format(
            classes=NUM_CLASSES,
            batch=BATCH,
            side=side,
            objects=OBJECTS,
            candidates=CANDIDATES,
            clock=clock_note(device),
            turns=turns,
        ),
        columns=("what", "ours", "torchvision", "ours over torchvision", "our memory", "torchvision's"),
        rows=rows,
        targets=targets,
        numbers=numbers,
    )


class Pair:
    """Ours and torchvision's, and what both are asked to do."""

    def __init__(self, device: torch.device, side: int) -> None:
        torch.manual_seed(0)
        self.device = device
        self.images = random_images(BATCH, side).to(device)
        self.objects = random_objects(BATCH, OBJECTS, (side, side)).to(device)
        self.floats = list(self.images.float().div(255).contiguous())
        self.sizes = torch.full((BATCH, 2), float(side), device=device)
        self.peer = build_peer(side).to(device)
        spread(self.peer, self.floats)
        self.model, self.criterion, config = build_ours(self.peer, device)
        self.decode = config.decode
        self.folded = fold_batch_norm(self.model)
        self.truth = [{"boxes": part.boxes, "labels": part.labels + 1} for part in _each(self.objects)]

    def mode(self, *, training: bool) -> None:
        self.model.train(training)
        self.peer.train(training)

    def train(self) -> float:
        self.model.zero_grad(set_to_none=True)
        total = self.criterion(self.model(self.images, self.objects), self.objects).total
        self.backward(total)
        return float(total.detach())

    def peer_train(self) -> float:
        self.peer.zero_grad(set_to_none=True)
        losses: dict[str, Tensor] = self.peer(self.floats, self.truth)
        total = torch.stack(list(losses.values())).sum()
        self.backward(total)
        return float(total.detach())

    def backward(self, total: Tensor) -> None:
        total.backward()

    @torch.inference_mode()
    def find(self) -> list[Tensor]:
        outputs = self.folded(self.images, sizes=self.sizes)
        return [found.boxes for found in self.decoded(outputs)]

    def decoded(self, outputs: Outputs) -> list[Detections]:
        return decode(outputs, self.sizes, self.decode)

    @torch.inference_mode()
    def peer_find(self) -> list[Tensor]:
        return [found["boxes"] for found in self.peer(self.floats)]


def build_peer(side: int) -> FasterRCNN:
    """As `fasterrcnn_resnet50_fpn` is built for given weights, with random ones whose maps neither grow nor vanish."""
    body = resnet50(weights=None, norm_layer=FrozenBatchNorm2d)
    for name, buffer in body.named_buffers():
        if name.endswith("bn3.weight"):
            buffer.fill_(0.25)
    return FasterRCNN(
        _resnet_fpn_extractor(body, 3),
        num_classes=NUM_CLASSES + 1,
        min_size=side,
        max_size=side,
        rpn_post_nms_top_n_train=1000,
    )


def build_ours(peer: nn.Module, device: torch.device) -> tuple[TwoStageDetector, TwoStageCriterion, RunConfig]:
    """With the weights of `peer`."""
    known = ARCHITECTURES[NAME]
    named = rename(peer.state_dict(), known, Path(NAME))
    weights = reorder(named, known, range(1, NUM_CLASSES + 1), 1e-5)
    config = configuration(known.sections, NAME)
    section = config.model.model_dump()
    section["backbone"]["freeze_stages"] = 2
    section["rpn"]["train"]["post_nms"] = 1000
    config = RunConfig.model_validate({**config.model_dump(), "model": section})
    model = config.model.build(NUM_CLASSES, load_weights=False)
    assert isinstance(model, TwoStageDetector)
    model.load_state_dict({k: weights.get(k, torch.zeros_like(v)) for k, v in model.state_dict().items()})
    replace_batch_norms(model.backbone.features, "frozen_batch")
    merge_frozen(model.backbone.features, 3)
    criterion = config.criterion.build(config.assigner, NUM_CLASSES)
    assert isinstance(criterion, TwoStageCriterion)
    return model.to(device).to(memory_format=torch.channels_last), criterion.to(device), config


@torch.no_grad()
def spread(peer: FasterRCNN, floats: list[Tensor]) -> None:
    """Gives an untrained network objectness and class scores that differ, `CANDIDATES` an image above the threshold."""
    peer.eval()
    seen: list[Tensor] = []
    hooks = [
        module.register_forward_hook(lambda _, __, output: seen.append(output))
        for module in (peer.rpn.head.cls_logits, peer.roi_heads.box_predictor.cls_score)
    ]
    peer.rpn.head.cls_logits.weight.mul_(2 / _deviation(peer, floats, seen, slice(0, -1)))
    classes = peer.roi_heads.box_predictor.cls_score
    classes.weight.mul_(2 / _deviation(peer, floats, seen, slice(-1, None)))
    # The background's logit is what lets through as many as wanted.
    peer(floats)
    logits = seen[-1]
    low, high = -10.0, 30.0
    for _ in range(40):
        middle = (low + high) / 2
        logits[:, 0] = middle
        passing = int((logits.softmax(1)[:, 1:] > THRESHOLD).sum())
        low, high = (middle, high) if passing > CANDIDATES * len(floats) else (low, middle)
    classes.weight[0] = 0
    classes.bias[0] = high
    for hook in hooks:
        hook.remove()


def _deviation(peer: FasterRCNN, floats: list[Tensor], seen: list[Tensor], which: slice) -> Tensor:
    seen.clear()
    peer(floats)
    return torch.cat([logits.flatten() for logits in seen[which]]).std()


def _each(objects: Objects) -> list[Objects]:
    return [objects.select_image(i) for i in range(objects.batch_size)]


class Clock:
    """Seconds of named calls, those of other named calls inside them left out."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.now = device, clock_of(device)
        self.seconds: dict[str, float] = defaultdict(float)
        self._inside = [0.0]  # of the calls that are running, what named calls inside took

    def timed(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            wait(self.device)
            self._inside.append(0.0)
            start = self.now()
            found = call(*args, **kwargs)
            wait(self.device)
            took = self.now() - start
            self.seconds[name] += took - self._inside.pop()
            self._inside[-1] += took
            return found

        return run


def split(pair: Pair, task: str, turns: int) -> dict[str, dict[str, float]]:
    """Of `ours` and `peer`, the seconds of each part: medians over the turns."""
    found: dict[str, dict[str, float]] = {}
    for whose in ("ours", "peer"):
        name = {"train": "train", "inference": "find"}[task]
        call = getattr(pair, name if whose == "ours" else f"peer_{name}")
        seen: list[dict[str, float]] = []
        for _ in range(turns):
            clock = Clock(pair.device)
            places = _ours(pair, task) if whose == "ours" else _theirs(pair)
            with ExitStack() as stack:
                for owner, method, label in places:
                    stack.enter_context(patch.object(owner, method, clock.timed(label, getattr(owner, method))))
                clock.timed("other", call)()
            seen.append(clock.seconds)
        found[whose] = {label: statistics.median(each[label] for each in seen) for label in seen[0]}
    return found


def _ours(pair: Pair, task: str) -> list[tuple[Any, str, str]]:
    model: Any = pair.model if task == "train" else pair.folded
    return [
        (model.backbone, "forward", "backbone"),
        (model.neck, "forward", "neck"),
        (model.rpn, "forward", "RPN head"),
        (model.rpn, "propose", "proposals"),
        (model, "choose", "second assignment and sampling"),
        (model.extractor, "forward", "RoI features"),
        (model.heads[0], "forward", "box head"),
        (pair.criterion, "assign_rpn", "RPN assignment and sampling"),
        (pair.criterion, "forward", "losses"),
        (pair, "backward", "backward"),
        (pair, "decoded", "decoding"),
    ]


def _theirs(pair: Pair) -> list[tuple[Any, str, str]]:
    peer: Any = pair.peer
    return [
        (peer.backbone.body, "forward", "backbone"),
        (peer.backbone.fpn, "forward", "neck"),
        (peer.rpn.head, "forward", "RPN head"),
        (peer.rpn, "forward", "proposals"),
        (peer.rpn, "assign_targets_to_anchors", "RPN assignment and sampling"),
        (peer.rpn, "fg_bg_sampler", "RPN assignment and sampling"),
        (peer.rpn, "compute_loss", "losses"),
        (peer.roi_heads, "select_training_samples", "second assignment and sampling"),
        (peer.roi_heads.box_roi_pool, "forward", "RoI features"),
        (peer.roi_heads.box_head, "forward", "box head"),
        (peer.roi_heads.box_predictor, "forward", "box head"),
        (peer.roi_heads, "forward", "losses"),
        (peer.roi_heads, "postprocess_detections", "decoding"),
        (pair, "backward", "backward"),
    ]
