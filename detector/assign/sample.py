"""Samplers: which priors of an assignment the losses see (`Assignment -> Assignment`).  The others become ignored.

Legend: B images, R priors of an image, N objects of the batch, P pairs.

Random numbers come from a generator of each call's own, derived from the seed that the process was given for this step
(the trainer gives every step another): nothing is drawn from a global generator, so a step repeats whatever ran before.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from detector.assign.base import chunks
from detector.boxes import pairwise_iou
from detector.config.node import Node
from detector.seeding import STEP, integer
from detector.structures import Assignment, Objects, Priors


@dataclass(frozen=True)
class Scene:
    """What a sampler may look at; what costs time is computed when it is asked for."""

    priors: Priors
    objects: Objects
    random: Tensor  # (B, R) in [0, 1), of this step and stage alone
    losses: Callable[[], Tensor] | None  # -> (B, R) >= 0: the class loss that each prior would have

    @cached_property
    def iou(self) -> Tensor:
        """(B, R) in [0, 1]: of each prior with the object of its image that it overlaps most."""
        best = torch.zeros_like(self.random)
        for part in chunks(len(self.objects), len(self.priors)):
            image = self.objects.image[part]
            boxes = self.priors.boxes[image] if self.priors.per_image else self.priors.boxes
            iou = pairwise_iou(boxes, self.objects.boxes[part, None])  # (n, R)
            best.scatter_reduce_(0, image[:, None].expand_as(iou), iou, "amax")
        return best


class Sampler(Node):
    """So many priors of each image, at most `positive_fraction` of them positive; background fills up the rest."""

    count: int = Field(512, ge=1, description="priors of an image that the losses see")
    positive_fraction: float = Field(0.25, ge=0, le=1, description="at most this share of `count` is positive")
    negatives_per_positive: float | None = Field(
        None, ge=0, description="at most so many; an image without a positive counts as one with one"
    )

    def __call__(
        self,
        assignment: Assignment,
        priors: Priors,
        objects: Objects,
        *,
        stage: int = 0,
        losses: Callable[[], Tensor] | None = None,
    ) -> Assignment:
        """The same pairs, with weight 0 and `ignored` where a prior was not picked.  Does not wait for the device.

        `stage` keeps the random numbers of a step's stages apart.  `losses` is for those that mine by loss.
        """
        with torch.no_grad():
            positive = paired(assignment)
            negative = ~positive & ~assignment.ignored
            scene = Scene(priors, objects, _random(positive, stage), losses)
            most = min(int(self.count * self.positive_fraction), len(priors))
            picked = _first(self.positives_first(scene, positive), positive, most, None)
            found = picked.sum(1)
            wanted = self.count - found
            if self.negatives_per_positive is not None:
                limit = (self.negatives_per_positive * found.clamp(min=1)).floor().long()
                wanted = torch.minimum(wanted, limit)
            order = self.negatives_first(scene, negative, wanted)
            picked = picked | _first(order, negative, min(self.count, len(priors)), wanted)
            weight = assignment.weight * picked.view(-1)[assignment.prior]
            return replace(assignment, weight=weight, ignored=~picked)

    @abstractmethod
    def positives_first(self, scene: Scene, positive: Tensor) -> Tensor:
        """(B, R) finite scores: of the priors that are `positive` (B, R), the highest are picked."""

    @abstractmethod
    def negatives_first(self, scene: Scene, negative: Tensor, wanted: Tensor) -> Tensor:
        """(B, R) finite scores: of those that are `negative`, the `wanted` (B,) highest of each image are picked."""


class Random(Sampler):
    """All positives, and all negatives, have the same chance (Ren et al., "Faster R-CNN", 2015)."""

    type: Literal["random"] = "random"

    def positives_first(self, scene: Scene, positive: Tensor) -> Tensor:
        return scene.random

    def negatives_first(self, scene: Scene, negative: Tensor, wanted: Tensor) -> Tensor:
        return scene.random


class IouBalanced(Sampler):
    """As many negatives of every range of IoU (Pang et al., "Libra R-CNN", CVPR 2019, section 3.1).

    The ranges are equally wide, from 0 to the highest IoU of the image's negatives.  What a range lacks is filled up
    from all the others, at random.
    """

    type: Literal["iou_balanced"] = "iou_balanced"
    bins: int = Field(3, ge=1, le=100, description="ranges of IoU")

    def positives_first(self, scene: Scene, positive: Tensor) -> Tensor:
        return scene.random

    def negatives_first(self, scene: Scene, negative: Tensor, wanted: Tensor) -> Tensor:
        iou = scene.iou * negative
        highest = iou.amax(1, keepdim=True).clamp(min=1e-6)
        range_of = (iou / highest * self.bins).long().clamp(max=self.bins - 1)
        each = (wanted // self.bins)[:, None]
        score = scene.random
        for i in range(self.bins):
            mine = negative & (range_of == i)
            order = scene.random.where(mine, -1.0).argsort(dim=1, descending=True, stable=True)
            rank = torch.empty_like(order).scatter_(
                1, order, torch.arange(iou.shape[1], device=iou.device).expand_as(order)
            )
            score = torch.where(mine & (rank < each), score + 1, score)
        return score


class Ohem(Sampler):
    """Those with the highest class loss (Shrivastava et al., "OHEM", CVPR 2016), positives and negatives apart.

    Costs one more pass of the head over all priors, without gradient.
    """

    type: Literal["ohem"] = "ohem"

    def positives_first(self, scene: Scene, positive: Tensor) -> Tensor:
        return self._losses(scene)

    def negatives_first(self, scene: Scene, negative: Tensor, wanted: Tensor) -> Tensor:
        return self._losses(scene)

    def _losses(self, scene: Scene) -> Tensor:
        if scene.losses is None:
            raise ValueError("Ohem picks by loss, but none were given: pass `losses` to the sampler.")
        return scene.losses()


AnySampler = Annotated[Random | IouBalanced | Ohem, Field(discriminator="type")]


def paired(assignment: Assignment) -> Tensor:
    """(B, R) bool: the prior is in a pair of positive weight."""
    found = torch.zeros(assignment.ignored.numel(), dtype=torch.uint8, device=assignment.ignored.device)
    found.scatter_reduce_(0, assignment.prior, (assignment.weight > 0).to(torch.uint8), "amax")
    return (found > 0).view_as(assignment.ignored)


def _random(like: Tensor, stage: int) -> Tensor:
    generator = torch.Generator(like.device)
    generator.manual_seed(integer(torch.initial_seed(), STEP, stage))
    return torch.rand(like.shape, generator=generator, device=like.device)


def _first(score: Tensor, candidate: Tensor, most: int, wanted: Tensor | None) -> Tensor:
    """(B, R) bool: the `wanted` (B,), or else `most`, candidates of each row with the highest scores, if there are."""
    best = score.where(candidate, -torch.inf).topk(most, dim=1)
    taken = best.values > -torch.inf
    if wanted is not None:
        taken &= torch.arange(most, device=score.device) < wanted[:, None]
    return torch.zeros_like(candidate).scatter_(1, best.indices, taken)
