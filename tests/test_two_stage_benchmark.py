"""The comparison with torchvision's Faster R-CNN compares the same work; how fast anything is, is not tested."""

from __future__ import annotations

import time

import torch
from torch.testing import assert_close

from detector.bench.two_stage import ASSIGNMENT, PROPOSALS, Pair, Stopwatch


def test_both_sides_do_the_same() -> None:
    """The same weights and images: the same detections, and the same gradient-bearing parameters."""
    pair = Pair(torch.device("cpu"), 128, depth=18)
    for ours, theirs in zip(pair.find(), pair.peer_find(), strict=True):
        assert len(ours) == 100
        assert_close(ours.scores, theirs["scores"], atol=1e-5, rtol=0)
        assert_close(ours.boxes, theirs["boxes"], atol=1e-3, rtol=0)
        assert torch.equal(ours.labels + 1, theirs["labels"])
    pair.step()
    pair.peer_step()
    trained = [sum(p.numel() for p in m.parameters() if p.grad is not None) for m in (pair.ours, pair.peer)]
    background_boxes = 4 * 1025  # torchvision has a box for the background, which nothing trains
    assert trained[0] == trained[1] - background_boxes
    assert not any(p.grad is not None for p in pair.ours.backbone.features.layer1.parameters())
    parts = pair.parts(1, time.process_time)
    assert {PROPOSALS, ASSIGNMENT, "RoI features", "box head", "backward pass"} <= set(parts)
    assert min(parts.values()) > 0


def test_a_part_has_its_own_time_alone() -> None:
    ticks = iter([0.0, 1.0, 4.0, 10.0])
    watch = Stopwatch(lambda: next(ticks))
    with watch.part("outer"), watch.part("inner"):
        pass
    assert watch.seconds == {"outer": 7.0, "inner": 3.0}
