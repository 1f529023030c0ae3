"""Images to final boxes against torchvision."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn

from detector.bench.measure import Table, Target, Times, seconds_text, take_turns
from detector.bench.networks import NUM_CLASSES, Method, build_peer, methods, precisions, random_images
from detector.decode import decode
from detector.models.dense import DenseDetector
from detector.models.fold import fold_batch_norm
from detector.models.layers import DTYPES, Precision, autocast

BATCH, SIDE = 2, 512
CANDIDATES = 1000  # (prior, class) pairs an image above the threshold
THRESHOLD = 0.05
MOST_OF_PEER = 0.75

METHOD = (
    "The same networks, batch of {batch}, {side}x{side}, images to boxes after NMS, at most 100 an image.  Ours: uint8"
    " images, batch norms folded into convolutions and weights in the precision asked for, as `detector.load` does."
    "  torchvision: float images (their conversion is not counted), in bf16 under autocast, its only way there."
    "  Untrained weights, but the class logits of both are scaled and shifted so that {candidates:,} (prior, class)"
    " pairs an image pass the score threshold of 0.05; thresholds, candidates of a level and NMS are the same.  In"
    " turns, {turns} of them after two of warm-up; ratios are medians over the turns, in brackets their quartiles."
)


def run(device: torch.device, quick: bool) -> Table:
    side, turns = (128, 2) if quick else (SIDE, 9)
    rows, targets, numbers = [], [], {}
    for (title, method), precision in product(methods().items(), precisions(device)):
        name = f"{title}, {precision}"
        times, found = compare(method, device, side, turns, precision)
        peer = times.ratio("ours", "peer")
        rows.append(
            (
                name,
                *(seconds_text(times.median(each)) for each in ("ours", "network", "peer")),
                f"{peer:.2f} of {method.peer_name} ({times.spread('ours', 'peer')})",
                f"{found[0]}, {found[1]}",
            )
        )
        targets.append(Target(f"{name}: share of torchvision's time", peer, MOST_OF_PEER, True))
        numbers[name] = {"seconds": times.seconds, "over_torchvision": peer, "boxes": found}
    return Table(
        title="Inference",
        method=METHOD.format(batch=BATCH, side=side, turns=turns, candidates=CANDIDATES),
        columns=("method", "ours", "its network alone", "torchvision", "ours over torchvision", "boxes found by each"),
        rows=rows,
        targets=targets,
        numbers=numbers,
    )


def compare(
    method: Method, device: torch.device, side: int, turns: int, precision: Precision
) -> tuple[Times, tuple[int, int]]:
    torch.manual_seed(0)
    images = random_images(BATCH, side).to(device)
    sizes = torch.full((BATCH, 2), float(side), device=device)
    trained = method.model.build(NUM_CLASSES).to(device).to(memory_format=torch.channels_last).eval()
    peer = build_peer(method, side).to(device).eval()
    floats = list(images.float().div(255).contiguous())
    with torch.inference_mode():
        prepare_ours(trained, images)
        prepare_peer(peer, floats, method)
    ours = fold_batch_norm(trained).to(DTYPES[precision])

    @torch.inference_mode()
    def find() -> int:
        return sum(len(found) for found in decode(ours(images), sizes, method.decode))

    @torch.inference_mode()
    def network() -> object:
        return ours(images)

    @torch.inference_mode()
    def peer_find() -> int:
        with autocast(device, precision):
            return sum(len(found["boxes"]) for found in peer(floats))

    times = take_turns({"ours": find, "network": network, "peer": peer_find}, device, turns=turns, warm_up=2)
    return times, (find(), peer_find())


def prepare_ours(model: DenseDetector, images: Tensor) -> None:
    """Gives an untrained network of ours the scores of a trained one, and FCOS boxes of eight strides."""
    spread_scores(model.head.classes, lambda: model(images).class_logits)
    if model.head.config.coder.type == "distances":
        _bias(model.head.box).fill_(4.0)


def prepare_peer(model: Any, floats: list[Tensor], method: Method) -> None:
    """The same for torchvision's."""
    head = model.head
    features = list(model.backbone(model.transform(floats)[0].tensors).values())
    spread_scores(head.classification_head.cls_logits, lambda: head(features)["cls_logits"])
    model.score_thresh, model.nms_thresh = THRESHOLD, method.decode.nms_iou
    model.topk_candidates, model.detections_per_img = method.decode.pre_nms_topk, method.decode.max_detections
    if method.peer_name == "FCOS":
        _bias(head.regression_head.bbox_reg).fill_(4.0)
        # Its threshold is on sqrt(class * centerness), and an untrained centerness is about one half.
        model.score_thresh = math.sqrt(THRESHOLD / 2)


def spread_scores(conv: nn.Module, logits: Callable[[], Tensor]) -> None:
    """Changes the convolution that makes `logits()` (B, R, K) so that `CANDIDATES` an image are above the threshold."""
    assert isinstance(conv, nn.Conv2d)
    bias = _bias(conv).zero_()  # beside a bias, the small numbers of an untrained network would be rounded
    values = logits()
    factor = 1.5 / values.std()
    passing = min(CANDIDATES * len(values), values.numel() // 2)
    least = (values.flatten() * factor).topk(passing).values[-1]
    conv.weight.mul_(factor)
    bias.fill_(math.log(THRESHOLD / (1 - THRESHOLD)) - float(least))


def _bias(conv: nn.Module) -> Tensor:
    assert isinstance(conv.bias, Tensor)
    return conv.bias
