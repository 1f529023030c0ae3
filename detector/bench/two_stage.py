"""Faster R-CNN against torchvision's with the same weights: a train step, inference, and where our time goes."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
from torchvision.ops import FrozenBatchNorm2d

from detector.assign import MaxIou
from detector.assign.sample import Random
from detector.bench.measure import Table, Target, Times, seconds_text, take_turns
from detector.bench.networks import NUM_CLASSES, random_images, random_objects
from detector.config.run import RunConfig
from detector.convert import ARCHITECTURES, EPS, configuration, rename, reorder
from detector.decode import decode
from detector.losses.two_stage import TwoStageCriterion
from detector.models.backbones import Backbone
from detector.models.fold import fold_batch_norm
from detector.models.fpn import Fpn
from detector.models.norms import merge_frozen, replace_batch_norms
from detector.models.roi import RoiExtractor
from detector.models.roi_head import BoxHead
from detector.models.rpn import Rpn
from detector.models.stages import TwoStageOutputs
from detector.models.two_stage import TwoStageDetector
from detector.structures import Detections, Outputs

NAME = "fasterrcnn_resnet50_fpn"
BATCH, SIDE, OBJECTS = 2, 512, 7
CANDIDATES = 1000  # (proposal, class) pairs an image above the threshold, as in the one-stage comparison
THRESHOLD = 0.05
MOST_TRAIN, MOST_INFERENCE, MOST_SECOND = 0.85, 0.7, 0.12

PROPOSALS, ASSIGNMENT = "proposals", "assignment and sampling"
# Whose time each call is; what it calls in turn is taken off.
PARTS: tuple[tuple[object, str, str], ...] = (
    (Backbone, "forward", "backbone and neck"),
    (Fpn, "forward", "backbone and neck"),
    (Rpn, "forward", "RPN head"),
    (Rpn, "propose", PROPOSALS),
    (TwoStageDetector, "_learn", ASSIGNMENT),
    (MaxIou, "__call__", ASSIGNMENT),
    (Random, "__call__", ASSIGNMENT),
    (RoiExtractor, "forward", "RoI features"),
    (BoxHead, "forward", "box head"),
    (TwoStageCriterion, "forward", "losses"),
)

METHOD = (
    "ResNet-50, FPN, 80 classes, batch of {batch}, {side}x{side}, {objects} objects an image, float32, {clock}.  Both"
    " sides have the same weights, converted from torchvision's: untrained, but the frozen batch norms have the"
    " statistics of the images, and RPN and box head are scaled so that 1,000 proposals an image are left and"
    " {candidates:,} (proposal, class) pairs an image pass the threshold of 0.05.  The same images at the network's own"
    " size, the same frozen parts (stem, first stage, all batch norms), 2,000 proposals an image in training, of which"
    " 512 are sampled.  torchvision: float images, without its resizing (the conversion is not counted).  Ours: uint8"
    " images; in inference folded as `detector.load` does.  Train step: images to losses to gradients, without the"
    " optimiser.  In turns, {turns} of them after one of warm-up; ratios are medians over the turns, in brackets their"
    " quartiles.  Parts are shares of our own step's time, mean over {turns} further steps."
)


def run(device: torch.device, quick: bool) -> Table:
    side, turns = (128, 2) if quick else (SIDE, 7)
    cpu = device.type == "cpu"
    pair = Pair(device, side)
    clock = time.process_time if cpu else time.perf_counter
    train = take_turns({"ours": pair.step, "peer": pair.peer_step}, device, turns=turns, clock=clock)
    parts = pair.parts(turns, clock)
    infer = take_turns({"ours": pair.find, "peer": pair.peer_find}, device, turns=turns, clock=clock)
    whole = sum(parts.values())
    rows = [_row("train step", train), _row("inference", infer)]
    rows += [(f"of our step: {part}", seconds_text(spent), "", f"{spent / whole:.1%}") for part, spent in parts.items()]
    second = (parts[PROPOSALS] + parts[ASSIGNMENT]) / whole
    targets = [
        Target("train step: share of torchvision's time", train.ratio("ours", "peer"), MOST_TRAIN, True),
        Target("inference: share of torchvision's time", infer.ratio("ours", "peer"), MOST_INFERENCE, True),
    ]
    if cpu:  # on a GPU the host's time says nothing of a part's
        targets.append(Target("proposals, assignment, sampling", second * 100, MOST_SECOND * 100, True, " % of a step"))
    return Table(
        title="Two stages",
        method=METHOD.format(
            batch=BATCH,
            side=side,
            objects=OBJECTS,
            turns=turns,
            candidates=CANDIDATES,
            clock="the process's CPU time" if cpu else "wall time",
        ),
        columns=("what", "ours", "torchvision", "ours over torchvision, or share"),
        rows=rows,
        targets=targets,
        numbers={"train": train.seconds, "inference": infer.seconds, "parts": parts},
    )


def _row(what: str, times: Times) -> tuple[str, ...]:
    ratio = f"{times.ratio('ours', 'peer'):.2f} ({times.spread('ours', 'peer')})"
    return what, seconds_text(times.median("ours")), seconds_text(times.median("peer")), ratio


class Pair:
    """Ours and torchvision's with the same weights, and the same images and objects."""

    def __init__(self, device: torch.device, side: int, depth: int = 50) -> None:
        torch.manual_seed(0)
        self.device = device
        self.images = random_images(BATCH, side).to(device)
        self.floats = list(self.images.float().div(255).contiguous())
        self.objects = random_objects(BATCH, OBJECTS, (side, side)).to(device)
        self.sizes = torch.full((BATCH, 2), float(side), device=device)
        parts = [self.objects.select_image(i) for i in range(BATCH)]
        self.truth = [{"boxes": part.boxes, "labels": part.labels + 1} for part in parts]
        state = calibrated(self.floats, depth)
        self.peer = build_peer(depth, FrozenBatchNorm2d).to(device)
        self.peer.load_state_dict(state)
        self.config, self.ours = build_ours(state, depth)
        self.ours.to(device).to(memory_format=torch.channels_last)
        criterion = self.config.criterion.build(self.config.assigner, NUM_CLASSES)
        assert isinstance(criterion, TwoStageCriterion)
        self.criterion = criterion.to(device)
        self.folded = fold_batch_norm(self.ours)

    def step(self) -> None:
        self.ours.zero_grad(set_to_none=True)
        outputs = self.ours.train()(self.images, self.objects)
        assert isinstance(outputs, TwoStageOutputs)
        self.criterion(outputs, self.objects).total.backward()

    def peer_step(self) -> None:
        self.peer.zero_grad(set_to_none=True)
        losses: dict[str, Tensor] = self.peer.train()(self.floats, self.truth)
        torch.stack(list(losses.values())).sum().backward()

    @torch.inference_mode()
    def find(self) -> list[Detections]:
        outputs = self.folded(self.images, sizes=self.sizes)
        assert isinstance(outputs, Outputs)
        return decode(outputs, self.sizes, self.config.decode)

    @torch.inference_mode()
    def peer_find(self) -> list[dict[str, Tensor]]:
        found: list[dict[str, Tensor]] = self.peer.eval()(self.floats)
        return found

    def parts(self, turns: int, clock: Callable[[], float]) -> dict[str, float]:
        """Seconds of a step of ours by part."""
        watch = Stopwatch(clock)
        for _ in range(turns):
            self.ours.zero_grad(set_to_none=True)
            with watch.watching(), watch.part("rest of the forward pass"):
                outputs = self.ours.train()(self.images, self.objects)
                total = self.criterion(outputs, self.objects).total
            with watch.part("backward pass"):
                total.backward()
        return {part: seconds / turns for part, seconds in watch.seconds.items()}


class Stopwatch:
    """Time of parts that call each other: each has its own alone."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self.clock = clock
        self.seconds: dict[str, float] = {}
        self._inner = [0.0]  # of what the parts under way have called

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        self.seconds.setdefault(name, 0.0)
        start = self.clock()
        self._inner.append(0.0)
        yield
        spent = self.clock() - start
        self.seconds[name] += spent - self._inner.pop()
        self._inner[-1] += spent

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Every call of `PARTS` is timed within."""
        with ExitStack() as stack:
            for owner, method, name in PARTS:
                stack.enter_context(patch.object(owner, method, self._timed(getattr(owner, method), name)))
            yield

    def _timed(self, call: Callable[..., Any], name: str) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            with self.part(name):
                return call(*args, **kwargs)

        return timed


def build_peer(depth: int, norm: Callable[..., nn.Module]) -> Any:
    """torchvision's Faster R-CNN for images of the network's own size; stem and first stage frozen."""
    backbone = resnet_fpn_backbone(backbone_name=f"resnet{depth}", weights=None, norm_layer=norm, trainable_layers=3)
    model = FasterRCNN(backbone, NUM_CLASSES + 1)
    # Its own way to leave the size alone holds in training only.
    model.transform.resize = lambda image, target: (image, target)
    return model


def build_ours(state: dict[str, Tensor], depth: int) -> tuple[RunConfig, TwoStageDetector]:
    """The same network with the same weights, and its configuration."""
    config = configuration(NAME, NAME)
    backbone = config.model.backbone.model_copy(update={"name": f"resnet{depth}", "freeze_stages": 2, "norm": "batch"})
    model = config.model.model_copy(update={"backbone": backbone}).build(NUM_CLASSES, load_weights=False)
    assert isinstance(model, TwoStageDetector)
    named = rename(state, NAME, Path(NAME))
    model.load_state_dict(reorder(named, ARCHITECTURES[NAME], range(1, NUM_CLASSES + 1), EPS), strict=False)
    replace_batch_norms(model.backbone.features, "frozen_batch")
    merge_frozen(model.backbone.features, 3)
    return config, model


@torch.no_grad()
def calibrated(floats: list[Tensor], depth: int) -> dict[str, Tensor]:
    """A state with which the untrained network behaves as a trained one on these images."""
    model = build_peer(depth, nn.BatchNorm2d).to(floats[0].device)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None  # the statistics of what it has seen, and nothing else
    images, _ = model.transform(floats)
    model.backbone.train()(images.tensors)
    model.eval()
    maps = model.backbone(images.tensors)
    logits, raw = model.rpn.head(list(maps.values()))
    _spread(model.rpn.head.cls_logits, logits, 1.5)
    _spread(model.rpn.head.bbox_pred, raw, 0.3)
    proposals, _ = model.rpn(images, maps)
    features = model.roi_heads.box_head(model.roi_heads.box_roi_pool(maps, proposals, images.image_sizes))
    predictor = model.roi_heads.box_predictor
    logits, raw = predictor(features)
    _spread(predictor.cls_score, [logits], 1.5)
    _spread(predictor.bbox_pred, [raw], 0.5)
    odds = predictor(features)[0][:, 1:].exp()
    # A class passes where its odds over all others' and the background's, which is looked for, exceed the threshold.
    most = (odds / THRESHOLD - odds.sum(1, keepdim=True)).flatten().topk(CANDIDATES * len(floats)).values[-1]
    predictor.cls_score.weight[0] = 0
    predictor.cls_score.bias[0] = math.log(max(float(most), 1e-6))
    return {key: value for key, value in model.state_dict().items() if not key.endswith("num_batches_tracked")}


def _spread(layer: Any, outputs: list[Tensor], deviation: float) -> None:
    layer.weight *= deviation / torch.cat([x.flatten() for x in outputs]).std()
    layer.bias.zero_()
