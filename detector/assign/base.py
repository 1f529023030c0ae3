"""What holds for every rule of label assignment, settled once.

Legend: B images, R priors of one image, N objects and I ignore regions of the whole batch, P pairs, K classes.

An own rule needs a `type` and one method for one image; the base class loops and does the rest:

    class Nearest(Assigner):
        type: Literal["nearest"] = "nearest"

        def assign_image(self, priors, objects, predictions):
            distance = torch.cdist(priors.centers, objects.centers)       # (R, n); n is at least 1
            near, index = distance.min(1)
            return from_index(torch.where(near < 16, index, BACKGROUND))
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from detector.config.node import Node
from detector.structures import IGNORED, Assignment, Objects, Predictions, Priors

if TYPE_CHECKING:
    from detector.train.length import Horizon

PAIRS_AT_ONCE = 1 << 18  # (object, prior) pairs looked at together where all of them must be; bounds the memory


class Assigner(Node):
    """A rule: which prior learns which object.  No gradient flows through it and it keeps no state.

    A subclass writes `assign` for the whole batch (ours do), or `assign_image` for one image.  Calling it guarantees,
    whatever the rule: no graph; float32 with autocast off; images without objects; no prior in a pair is ignored;
    priors in crowd regions and outside the image are ignored unless they are in a pair.
    """

    uses_predictions: ClassVar[bool] = False  # False: labels can be made, cached and drawn without a model
    soft_quality: ClassVar[bool] = False  # True: class targets say how good the pair is, False: all are 1
    synchronises: ClassVar[bool] = False  # True: waits for the device
    shares: ClassVar[bool] = False  # True: a prior may learn several objects
    takes_proposals: ClassVar[bool] = False  # `assign` knows priors that differ by image; if not, images go one by one

    # A prior with more of its own area in one crowd region is ignored.
    crowd_coverage: float = Field(default=0.5, ge=0, le=1)
    keep_one: bool = Field(default=False, description="give objects left without a prior the best one near (keep.py)")

    def __call__(self, priors: Priors, objects: Objects, predictions: Predictions | None = None) -> Assignment:
        """Assign a whole batch.

        priors: R priors, the same for all images, or each image's own.  objects: N objects of B images.  predictions:
        logits (B, R, K) and boxes (B, R, 4) in any float type, needed where `uses_predictions`.

        Raises ValueError where shapes, types or devices do not fit together.  Values are checked without waiting for
        the device (`torch._assert_async`): NaN predictions, and boxes that are not x1 y1 x2 y2, raise RuntimeError at
        once on the CPU, and on a GPU at the next point where the host waits for it.
        """
        _check(priors, objects, predictions, self)
        with torch.no_grad(), _full_precision(priors.boxes.device):
            said = None if predictions is None else _to_float(predictions)
            if len(objects):
                one_by_one = priors.per_image and not self.takes_proposals
                found = (self._assign_images if one_by_one else self.assign)(priors, objects, said)
                if self.keep_one:
                    from detector.assign.keep import keep_one  # which is built on this file

                    looks = said if self.uses_predictions else None
                    found = keep_one(found, priors, objects, looks, self.soft_quality)
            else:
                found = self.without_objects(priors, objects, said)
            ignored = found.ignored
            if len(objects.ignore):
                ignored = ignored | crowded(priors, objects, self.crowd_coverage)
            if objects.sizes is not None:
                ignored = ignored | outside(priors, objects.sizes)
            paired = torch.zeros(ignored.numel(), dtype=torch.uint8, device=ignored.device)
            paired.scatter_reduce_(0, found.prior, (found.weight > 0).to(torch.uint8), "amax")
            return replace(found, ignored=ignored & (paired == 0).view_as(ignored))

    def at(self, step: int, horizon: Horizon) -> Assigner:
        """The rule as it is in step `step` (from 0) of a run: a pure function, for rules that change (schedule.py)."""
        return self

    def notes(self, horizon: Horizon) -> list[str]:
        """Sentences about what in the rule does not fit the run's length."""
        return []

    def assign(self, priors: Priors, objects: Objects, predictions: Predictions | None) -> Assignment:
        """The whole batch, N > 0; predictions are finite float32.  Unless overridden: one image after the other."""
        return self._assign_images(priors, objects, predictions)

    def _assign_images(self, priors: Priors, objects: Objects, predictions: Predictions | None) -> Assignment:
        parts = []
        for i in range(objects.batch_size):
            mine = (objects.image == i).nonzero().squeeze(1)
            said = None if predictions is None else predictions.select_image(i)
            if not len(mine):
                parts.append(self.without_objects(priors, objects.select_image(i), said))
                continue
            single = self.assign_image if type(self).assign is Assigner.assign else self.assign
            one = single(priors.select_image(i), objects.select_image(i), said)
            parts.append(replace(one, prior=one.prior + i * len(priors), object=mine[one.object]))
        weights = [one.background_weight for one in parts]
        full = next((w for w in weights if w is not None), None)
        names = ("prior", "object", "quality", "weight", "ignored")
        whole: dict[str, Any] = {name: torch.cat([getattr(one, name) for one in parts]) for name in names}
        if full is not None:
            whole["background_weight"] = torch.cat([torch.ones_like(full) if w is None else w for w in weights])
        modulated = next((one.modulated for one in parts if one.modulated is not None), None)
        return replace(parts[0], **whole, modulated=modulated)

    def without_objects(self, priors: Priors, objects: Objects, predictions: Predictions | None) -> Assignment:
        """A batch in which nothing is to be found; a rule that weighs the background of such images says so here."""
        return nothing(priors, objects)

    def assign_image(self, priors: Priors, objects: Objects, predictions: Predictions | None) -> Assignment:
        """One image with at least one object, as a batch of one; for rules where speed does not matter."""
        raise NotImplementedError(f"{type(self).__name__} must define `assign` (a batch) or `assign_image` (one image)")


def from_index(index: Tensor, quality: Tensor | None = None) -> Assignment:
    """From one number for each prior, (R,) or (B, R): an object's index, BACKGROUND or IGNORED; `quality` likewise.

    All R or B * R priors become pairs, those without an object as padding, so that no device is waited for.
    """
    index = index.view(-1, index.shape[-1])
    taken = (index >= 0).view(-1)
    weight = taken.float()
    return Assignment(
        num_priors=index.shape[1],
        prior=torch.arange(index.numel(), device=index.device),
        object=index.reshape(-1).clamp(min=0),
        quality=weight if quality is None else quality.reshape(-1).float() * weight,
        weight=weight,
        ignored=index == IGNORED,
    )


def nothing(priors: Priors, objects: Objects) -> Assignment:
    """No pair at all: everything is background."""
    none, zero = objects.image.new_zeros(0), priors.boxes.new_zeros(0)
    ignored = torch.zeros(objects.batch_size, len(priors), dtype=torch.bool, device=priors.boxes.device)
    return Assignment(len(priors), prior=none, object=none, quality=zero, weight=zero, ignored=ignored)


def crowded(priors: Priors, objects: Objects, coverage: float) -> Tensor:
    """(B, R) bool: more than `coverage` of the prior's own area lies in one crowd region of its image."""
    found = torch.zeros(objects.batch_size, len(priors), dtype=torch.uint8, device=priors.boxes.device)
    for part in chunks(len(objects.ignore), len(priors)):
        boxes = priors.boxes[objects.ignore_image[part]] if priors.per_image else priors.boxes
        low, high = boxes[..., :2], boxes[..., 2:]
        own = (high - low).prod(-1)
        region = objects.ignore[part, None]
        shared = torch.minimum(high, region[..., 2:]) - torch.maximum(low, region[..., :2])
        covered = shared.clamp(min=0).prod(-1) > coverage * own
        image = objects.ignore_image[part, None].expand_as(covered)
        found.scatter_reduce_(0, image, covered.to(torch.uint8), "amax")
    return found > 0


def outside(priors: Priors, sizes: Tensor) -> Tensor:
    """(B, R) bool: the prior's centre lies half a stride or more beyond the true edge of the image.

    sizes: (B, 2) height, width.  The cell that the edge runs through still counts as inside.
    """
    half = priors.stride[:, None] / 2
    limit = sizes.to(priors.boxes.dtype).flip(1)[:, None]  # (B, 1, 2) width, height
    return ((priors.centers <= -half) | (priors.centers >= limit + half)).any(-1)


def chunks(count: int, each: int) -> Iterator[slice]:
    """Slices of `count` rows of `each` pairs, so many rows at once as memory allows."""
    rows = max(1, PAIRS_AT_ONCE // max(1, each))
    for start in range(0, count, rows):
        yield slice(start, min(start + rows, count))


@lru_cache(maxsize=1024)
def constant(values: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """A tensor of numbers known beforehand, sent to the device once: sending anew would wait for the device."""
    return torch.tensor(values, dtype=dtype, device=device)


def _full_precision(device: torch.device) -> AbstractContextManager[object]:
    if not torch.amp.is_autocast_available(device.type):
        return nullcontext()
    return torch.autocast(device.type, enabled=False)


def _to_float(predictions: Predictions) -> Predictions:
    return replace(predictions, **{k: x.detach().float() for k, x in vars(predictions).items() if x is not None})


def _check(priors: Priors, objects: Objects, predictions: Predictions | None, rule: Assigner) -> None:
    count, images, who = len(priors), objects.batch_size, type(rule).__name__
    expected: list[tuple[str, Tensor, tuple[int | None, ...], torch.dtype | None]] = [
        ("priors.boxes", priors.boxes, (images, None, 4) if priors.per_image else (None, 4), torch.float32),
        ("priors.stride", priors.stride, (count,), torch.float32),
        ("objects.boxes", objects.boxes, (None, 4), torch.float32),
        ("objects.labels", objects.labels, (len(objects),), torch.int64),
        ("objects.image", objects.image, (len(objects),), torch.int64),
        ("objects.ignore", objects.ignore, (None, 4), torch.float32),
        ("objects.ignore_image", objects.ignore_image, (len(objects.ignore),), torch.int64),
    ]
    if objects.sizes is not None:
        expected.append(("objects.sizes", objects.sizes, (images, 2), None))
    if predictions is not None:
        expected.append(("predictions.class_logits", predictions.class_logits, (images, count, None), None))
        expected.append(("predictions.boxes", predictions.boxes, (images, count, 4), None))
        if predictions.quality_logits is not None:
            expected.append(("predictions.quality_logits", predictions.quality_logits, (images, count), None))
    elif rule.uses_predictions:
        raise ValueError(f"{who} looks at the predictions, but none were given: pass `outputs.detached()`.")
    for name, tensor, shape, dtype in expected:
        if tensor.dim() != len(shape) or any(s not in (None, t) for s, t in zip(shape, tensor.shape, strict=True)):
            wanted = ", ".join("any" if s is None else str(s) for s in shape)
            raise ValueError(f"{who}: {name} has shape {tuple(tensor.shape)}, expected ({wanted}).")
        if dtype is not None and tensor.dtype != dtype:
            raise ValueError(f"{who}: {name} is {tensor.dtype}, expected {dtype}: coordinates lose pixels in less.")
        if tensor.device != priors.boxes.device:
            raise ValueError(f"{who}: {name} is on {tensor.device}, but the priors are on {priors.boxes.device}.")
    if sum(priors.level_sizes) != count:
        raise ValueError(f"{who}: priors.level_sizes {priors.level_sizes} do not sum to the {count} priors.")
    if priors.grids and tuple(grid.size for grid in priors.grids) != tuple(priors.level_sizes):
        raise ValueError(
            f"{who}: priors.grids have {[g.size for g in priors.grids]} priors, but level_sizes {priors.level_sizes}."
        )
    _check_values(priors, objects, predictions)


@torch.no_grad()
def _check_values(priors: Priors, objects: Objects, predictions: Predictions | None) -> None:
    """Without waiting for the device."""
    for name, boxes in (("priors", priors.boxes), ("objects", objects.boxes)):
        torch._assert_async((boxes[..., 2:] >= boxes[..., :2]).all(), f"{name}.boxes are not x1 y1 x2 y2 (or hold NaN)")
    if predictions is not None:
        said = (predictions.class_logits, predictions.boxes, predictions.quality_logits)
        # The highest number is NaN where any is, and is found without a second tensor of the logits' size.
        nan = torch.stack([x.amax().isnan() for x in said if x is not None and x.numel()]).any()
        torch._assert_async(~nan, "the predictions hold NaN: nothing can be assigned (the training has diverged)")
