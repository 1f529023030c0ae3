"""What passes between the parts: small frozen classes, each field with its shape.

Legend: B images of a batch, R priors of one image, N objects of the whole batch, I ignore regions of the whole batch,
K classes, P (prior, object) pairs, L pyramid levels.

Boxes are float32 `x1 y1 x2 y2` in pixels of the network's input, pixel edges (a box over the first pixel is 0 0 1 1).
Objects lie flat over the batch with an image index, so no padding and no Python loop over images is needed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from detector.coders import Coder

BACKGROUND, IGNORED = -1, -2


@dataclass(frozen=True)
class Grid:
    """One pyramid level: `height` x `width` cells of `stride` pixels with the same priors in every cell.

    Priors lie row by row, column by column, then shape by shape.  The centre of all priors of cell (row, column) is
    ((column + offset) * stride, (row + offset) * stride).
    """

    height: int
    width: int
    stride: int
    shapes: tuple[tuple[float, float], ...]  # (width, height) in pixels of each prior of a cell
    offset: float = 0.5

    @property
    def size(self) -> int:
        """How many priors the level has."""
        return self.height * self.width * len(self.shapes)


@dataclass(frozen=True)
class Priors:
    """What gets labelled: anchors or points (as squares), the same for every image, or each image's proposals.

    Proposals are as many for each image: R is a fixed number, and whoever makes them says which are padding.
    """

    boxes: Tensor  # (R, 4) float32 xyxy; (B, R, 4) where every image has its own
    stride: Tensor  # (R,) float32 pixels
    level_sizes: tuple[int, ...]  # L numbers that sum to R
    grids: tuple[Grid, ...] = ()  # L grids; empty where priors lie on no grid (proposals)

    @property
    def per_image(self) -> bool:
        """Whether every image has its own boxes."""
        return self.boxes.dim() == 3

    @cached_property
    def centers(self) -> Tensor:
        """(R, 2) or (B, R, 2) x, y."""
        return (self.boxes[..., :2] + self.boxes[..., 2:]) / 2

    def boxes_of(self, prior: Tensor) -> Tensor:
        """(P,) int64 image * R + prior -> (P, 4)."""
        return self.boxes.flatten(0, 1)[prior] if self.per_image else self.boxes[prior % len(self)]

    def select_image(self, i: int) -> Priors:
        """Those of image `i`, (R, 4)."""
        return replace(self, boxes=self.boxes[i]) if self.per_image else self

    @cached_property
    def level(self) -> Tensor:
        """(R,) int64: the level of each prior."""
        # Not from a list of numbers: sending that to a GPU would wait for it.
        parts = [self.boxes.new_full((n,), i, dtype=torch.int64) for i, n in enumerate(self.level_sizes)]
        return torch.cat(parts)

    def __len__(self) -> int:
        return self.boxes.shape[-2]

    def to(self, device: torch.device | str) -> Priors:
        return replace(self, boxes=self.boxes.to(device), stride=self.stride.to(device))


@dataclass(frozen=True)
class Objects:
    """The annotated truth of a batch, flat over its images (ordered by image)."""

    boxes: Tensor  # (N, 4) float32 xyxy
    labels: Tensor  # (N,) int64 in [0, K)
    image: Tensor  # (N,) int64 in [0, B)
    ignore: Tensor  # (I, 4) float32 xyxy: crowd regions; no prior mostly inside one is a negative
    ignore_image: Tensor  # (I,) int64
    batch_size: int  # B
    sizes: Tensor | None = None  # (B, 2) float32 true height, width of each image without the batch's padding
    weight: Tensor | None = None  # (N,) float32 how much each counts in the losses, 0 or more; None means 1
    proposals: Tensor | None = None  # (B, M, 4) float32 xyxy of a file, by falling score; no area: padding

    def __len__(self) -> int:
        return len(self.boxes)

    @cached_property
    def centers(self) -> Tensor:
        """(N, 2) x, y."""
        return (self.boxes[:, :2] + self.boxes[:, 2:]) / 2

    @classmethod
    def collate(
        cls,
        boxes: Sequence[Tensor],
        labels: Sequence[Tensor],
        ignore: Sequence[Tensor] | None = None,
        sizes: Tensor | None = None,
    ) -> Objects:
        """From one tensor for each image: boxes (n, 4), labels (n,), ignore regions (i, 4)."""
        ignore = [b.new_zeros(0, 4) for b in boxes] if ignore is None else ignore
        return cls(
            boxes=torch.cat([b.reshape(-1, 4).float() for b in boxes]),
            labels=torch.cat([x.reshape(-1).long() for x in labels]),
            image=_image_index([len(b) for b in boxes], boxes[0].device),
            ignore=torch.cat([b.reshape(-1, 4).float() for b in ignore]),
            ignore_image=_image_index([len(b) for b in ignore], boxes[0].device),
            batch_size=len(boxes),
            sizes=sizes,
        )

    def select_image(self, i: int) -> Objects:
        """The objects of image `i` as a batch of one.  Synchronises with the device: for tests, pictures, plug-ins."""
        mine, ignored = self.image == i, self.ignore_image == i
        return Objects(
            boxes=self.boxes[mine],
            labels=self.labels[mine],
            image=torch.zeros_like(self.image[mine]),
            ignore=self.ignore[ignored],
            ignore_image=torch.zeros_like(self.ignore_image[ignored]),
            batch_size=1,
            sizes=None if self.sizes is None else self.sizes[i : i + 1],
            weight=None if self.weight is None else self.weight[mine],
            proposals=None if self.proposals is None else self.proposals[i : i + 1],
        )

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Objects:
        return _move(self, device, non_blocking)


@dataclass(frozen=True)
class Predictions:
    """What the head says now, detached and decoded.  Logits, never probabilities, so that no assigner has to guess."""

    class_logits: Tensor  # (B, R, K)
    boxes: Tensor  # (B, R, 4) xyxy
    quality_logits: Tensor | None = None  # (B, R) centerness, IoU or objectness
    mixture: Tensor | None = None  # (N, L, M, 5) of the model's encoder, where it has one: assign/distribution.py

    def select_image(self, i: int) -> Predictions:
        quality = None if self.quality_logits is None else self.quality_logits[i : i + 1]
        return Predictions(self.class_logits[i : i + 1], self.boxes[i : i + 1], quality)


@dataclass(frozen=True)
class Outputs:
    """What a dense model says about a batch; a graph hangs on it."""

    priors: Priors
    class_logits: Tensor  # (B, R, K)
    box_raw: Tensor  # (B, R, C) in the coder's own units, C its `channels`; (B, R, K, C) where each class has a box
    quality_logits: Tensor | None  # (B, R)
    coder: Coder
    initial: Outputs | None = None  # of a head that refines its boxes: the same, with the boxes before that
    mixture: Tensor | None = None  # (N, L, M, 5) where the model's encoder saw the objects: assign/distribution.py

    @cached_property
    def boxes(self) -> Tensor:
        """(B, R, 4) xyxy, or (B, R, K, 4): every box, decoded once, when somebody asks."""
        if self.box_raw.dim() == 4:
            return self.coder.decode(self.priors.boxes.unsqueeze(-2), self.priors.stride[:, None], self.box_raw)
        return self.coder.decode(self.priors.boxes, self.priors.stride, self.box_raw)

    def priors_of(self, assignment: str) -> Priors:
        """What the assignment of this name labels; all of a dense model's label the same."""
        return self.priors

    def detached(self) -> Predictions:
        """For an assigner: float32, without a graph."""
        with torch.no_grad():
            raw = self.box_raw.detach().float()
            boxes = self.coder.decode(self.priors.boxes, self.priors.stride, raw)
            quality = None if self.quality_logits is None else self.quality_logits.detach().float()
            mixture = None if self.mixture is None else self.mixture.detach().float()
            return Predictions(self.class_logits.detach().float(), boxes, quality, mixture)


@dataclass(frozen=True)
class Assignment:
    """Which prior learns which object.  A prior in no pair of positive weight is background unless it is ignored.

    A rule may pad its pairs to a shape known without asking the device: padding has weight 0, quality 0 and any valid
    indices.
    """

    num_priors: int  # R
    prior: Tensor  # (P,) int64 image * R + prior; may repeat (a prior can serve several objects)
    object: Tensor  # (P,) int64 index into the batch's objects
    quality: Tensor  # (P,) float32 class target of the pair; 1 for hard rules
    weight: Tensor  # (P,) float32 weight of the pair in the losses; 0 for padding
    ignored: Tensor  # (B, R) bool: in no loss
    background_weight: Tensor | None = None  # (B, R, K) weight of "not of this class"; None means 1
    # A rule that gives `background_weight` says whether its weights hold already how wrong the head is (DW: True), so
    # that the class loss leaves its focal factor out, or do not (Gaussian negatives: False).
    modulated: bool | None = None
    object_weight: Tensor | None = None  # (P,) float32 the object's own weight, set by the criterion; None means 1

    def per_prior(self) -> Tensor:
        """(B, R) int64, the exclusive view: an object's index, BACKGROUND or IGNORED.  For tests and pictures."""
        flat = torch.full_like(self.ignored, BACKGROUND, dtype=torch.long).masked_fill_(self.ignored, IGNORED).view(-1)
        kept = self.weight > 0
        flat[self.prior[kept]] = self.object[kept]
        return flat.view_as(self.ignored)


@dataclass(frozen=True)
class Losses:
    """Sums over the batch before division, and the one number that divides them all."""

    sums: dict[str, Tensor]  # scalars, already weighted; every one enters the total
    normalizer: Tensor  # scalar, no gradient: what the batch counts.  Add up micro-batches, then divide by at least 1
    assignments: dict[str, Assignment] = field(default_factory=dict)

    @cached_property
    def parts(self) -> dict[str, Tensor]:
        divisor = self.normalizer.clamp(min=1)
        return {name: value / divisor for name, value in self.sums.items()}

    @cached_property
    def total(self) -> Tensor:
        return torch.stack(list(self.parts.values())).sum()


@dataclass(frozen=True)
class Detections:
    """What was found in one image, by falling score."""

    boxes: Tensor  # (n, 4) float32 xyxy, pixels of the ORIGINAL image once `to_original` has been called
    scores: Tensor  # (n,) float32 in [0, 1]
    labels: Tensor  # (n,) int64

    def __len__(self) -> int:
        return len(self.boxes)

    def to_original(self, scale: Tensor, offset: Tensor, size: Tensor) -> Detections:
        """Back from network input to the original image: x_original = (x - offset) / scale, clipped to the image.

        `scale`, `offset`: (2,) for x and y; `size`: (2,) original height, width.
        """
        boxes = (self.boxes - offset.repeat(2)) / scale.repeat(2)
        limit = size.flip(0).repeat(2).to(boxes)
        return replace(self, boxes=torch.minimum(boxes.clamp(min=0), limit))

    def cpu(self) -> Detections:
        return _move(self, "cpu", False)


@dataclass(frozen=True)
class Batch:
    """What the loader yields: images as read, truth flat over the batch, and the way back to original pixels."""

    images: Tensor  # (B, C, H, W) uint8, or uint16 where the files are; padded at right and bottom
    objects: Objects
    ids: Tensor  # (B,) int64 image ids of the annotation file
    original_sizes: Tensor  # (B, 2) int64 height, width
    scale: Tensor  # (B, 2) float32 x, y:  x_network = x_original * scale + offset
    offset: Tensor  # (B, 2) float32 x, y
    failures: tuple[str, ...] = ()  # one line for each image that could not be read and was replaced by another

    @property
    def sizes(self) -> Tensor:
        """(B, 2) float32 true height, width within the padded batch."""
        assert self.objects.sizes is not None
        return self.objects.sizes

    @property
    def known(self) -> dict[str, Tensor]:
        """What a network may know in detection: `sizes`, and `proposals` where they are given."""
        proposals = self.objects.proposals
        return {"sizes": self.sizes} if proposals is None else {"sizes": self.sizes, "proposals": proposals}

    def __len__(self) -> int:
        return len(self.images)

    def to(self, device: torch.device | str, non_blocking: bool = True) -> Batch:
        return _move(self, device, non_blocking)

    def pin_memory(self) -> Batch:
        """Called by the loader's pinning thread."""
        return _each_tensor(self, Tensor.pin_memory)


def _image_index(counts: list[int], device: torch.device) -> Tensor:
    return torch.arange(len(counts), device=device).repeat_interleave(torch.tensor(counts, device=device))


def _each_tensor(value: Any, change: Any) -> Any:
    """The same frozen class with `change` applied to every tensor in it, nested ones included."""
    changed = {}
    for name in value.__dataclass_fields__:
        old = getattr(value, name)
        if isinstance(old, Tensor):
            changed[name] = change(old)
        elif isinstance(old, Objects):
            changed[name] = _each_tensor(old, change)
    return replace(value, **changed)


def _move(value: Any, device: torch.device | str, non_blocking: bool) -> Any:
    return _each_tensor(value, lambda t: t.to(device, non_blocking=non_blocking))
