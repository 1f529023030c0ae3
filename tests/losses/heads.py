"""Golden whole heads as our `Outputs` and `Objects`."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from torch import Tensor

from detector.assign.base import Assigner
from detector.coders import Coder, Deltas
from detector.structures import Assignment, Grid, Objects, Outputs, Predictions, Priors


class Given(Assigner):
    """A rule that says what it was told to."""

    type: Literal["given"] = "given"
    uses_predictions: ClassVar[bool] = False
    answer: ClassVar[Assignment]

    def assign(self, priors: Priors, objects: Objects, predictions: Predictions | None) -> Assignment:
        return self.answer


def given(assignment: Assignment) -> Given:
    class One(Given):
        answer: ClassVar[Assignment] = assignment

    return One()


def golden_priors(setup: dict[str, Tensor], side: float, offset: float) -> Priors:
    """Square priors of `side` strides, one a cell, from the fixture's maps."""
    strides, maps = setup["strides"].tolist(), setup["featmaps"].tolist()
    grids = tuple(Grid(h, w, s, ((s * side, s * side),), offset) for s, (h, w) in zip(strides, maps, strict=True))
    sizes = tuple(g.size for g in grids)
    if "anchors" in setup:
        boxes = setup["anchors"]
    else:
        half = torch.cat([torch.full((g.size, 1), g.stride * side / 2) for g in grids])
        boxes = torch.cat([setup["points"] - half, setup["points"] + half], 1)
    stride = torch.cat([torch.full((n,), float(s)) for n, s in zip(sizes, strides, strict=True)])
    return Priors(boxes, stride, sizes, grids)


def golden_objects(s: dict[str, Tensor]) -> Objects:
    """Crowd regions are left out: the peers' heads do not look at them."""
    return Objects.collate([s["gt0"], s["gt1"]], [s["labels0"], s["labels1"]])


def some_outputs(
    *, batch: int = 2, classes: int = 3, quality: bool = True, seed: int = 0, coder: Coder | None = None, cells: int = 4
) -> Outputs:
    """Two levels of one square prior a cell over 32 x 32 pixels, with random logits that hang on a graph."""
    grids = tuple(Grid(n, n, 32 // n, ((64.0 / n, 64.0 / n),)) for n in (cells, cells // 2))
    centers = []
    for g in grids:
        axis = (torch.arange(g.height) + 0.5) * g.stride
        y, x = torch.meshgrid(axis, axis, indexing="ij")
        centers.append(torch.stack([x, y], -1).view(-1, 2))
    half = torch.cat([torch.full((g.size, 1), g.shapes[0][0] / 2) for g in grids])
    center = torch.cat(centers)
    stride = torch.cat([torch.full((g.size,), float(g.stride)) for g in grids])
    priors = Priors(torch.cat([center - half, center + half], 1), stride, tuple(g.size for g in grids), grids)
    generator = torch.Generator().manual_seed(seed)
    count, coder = len(priors), Deltas() if coder is None else coder
    return Outputs(
        priors=priors,
        class_logits=torch.randn(batch, count, classes, generator=generator).requires_grad_(),
        box_raw=(torch.randn(batch, count, coder.channels, generator=generator) * 0.3).requires_grad_(),
        quality_logits=torch.randn(batch, count, generator=generator).requires_grad_() if quality else None,
        coder=coder,
    )


def some_objects(batch: int = 2, empty: bool = False) -> Objects:
    boxes = [torch.tensor([[2.0, 3, 20, 25], [10, 10, 30, 22]]), torch.tensor([[1.0, 1, 14, 30]])][:batch]
    labels = [torch.tensor([0, 2]), torch.tensor([1])][:batch]
    if empty:
        boxes, labels = [torch.zeros(0, 4)] * batch, [torch.zeros(0).long()] * batch
    return Objects.collate(boxes, labels)


def own_objects(
    found: Tensor, boxes: Tensor, labels: Tensor, quality: Tensor | None = None
) -> tuple[Objects, Assignment]:
    """What a peer told its positives to learn, each positive an object of its own.

    found: (B, R) bool, the positives.  boxes (P, 4), labels (P,), quality (P,) of these, in order.
    """
    batch, priors = found.shape
    prior = found.view(-1).nonzero().squeeze(1)
    objects = Objects(
        boxes=boxes,
        labels=labels.long(),
        image=prior // priors,
        ignore=torch.zeros(0, 4),
        ignore_image=torch.zeros(0).long(),
        batch_size=batch,
    )
    ones = torch.ones(len(prior))
    order = torch.arange(len(prior))
    ignored = torch.zeros(batch, priors, dtype=torch.bool)
    return objects, Assignment(priors, prior, order, ones if quality is None else quality, ones, ignored)
