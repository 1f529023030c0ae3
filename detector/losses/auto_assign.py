"""AutoAssign (Zhu et al., "AutoAssign: Differentiable Label Assignment for Dense Object Detection", arXiv:2007.03496).

Legend: B images, R priors of an image, N objects of the batch, n of a part of them, K classes, S priors reported.

Every prior inside an object may learn it, as much as a centre prior of the object's class, whose place and width are
learnt, and the prior's own confidence say.  There is no background label either: how well a prior's box fits decides
how little it counts as background.  All pairs of objects and priors take part, so they are handled a part of the
objects at a time, and where that takes several parts each is computed again for its gradient: memory stays bounded.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, ClassVar, Literal, NamedTuple

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from detector.assign.base import chunks
from detector.boxes import full_precision, pairwise_iou
from detector.coders import Bins
from detector.errors import ConfigError
from detector.losses import AnyBoxLoss
from detector.losses.base import RAW_ARE_LOGITS, CriterionConfig, refuse_weights
from detector.losses.likelihood import LEAST, LEAST_TO_LOG, check_classes, left_out, negative_sum, report
from detector.losses.normalizer import mean_over_processes
from detector.losses.regression import Giou
from detector.structures import Losses, Objects, Outputs, Priors

if TYPE_CHECKING:
    from detector.assign.base import Assigner
    from detector.coders import Coder

REPORTED = 50  # heaviest priors of an object that statistics and pictures look at


class AutoAssignConfig(CriterionConfig):
    """AutoAssign's parameters with the paper's values; it decides by itself which prior learns which object."""

    uses_assigner: ClassVar[bool] = False
    type: Literal["auto_assign"] = "auto_assign"
    positive_weight: float = Field(0.25, ge=0, description="factor of the objects' term")
    negative_weight: float = Field(0.75, ge=0, description="factor of the background's term")
    center_weight: float = Field(0.75, ge=0, description="factor of the term that keeps the centre priors wide")
    sharpness: float = Field(3.0, ge=0, description="of a prior's confidence in its weight: the paper's 1 / tau")
    gamma: float = Field(2.0, ge=0, description="how much priors of low score count less as background")
    box: AnyBoxLoss = Field(
        Giou(weight=5.0), description="a box's likelihood is exp(-weight * loss): the paper's lambda"
    )
    nearest: int = Field(0, ge=0, description="an object that no prior lies in takes so many by centre prior; 0: none")
    crowd_coverage: float = Field(0.5, ge=0, le=1, description="a prior with more of its area in a crowd is left out")

    @property
    def uses_quality(self) -> bool:
        return True

    def objection(self, coder: Coder, initial: Coder | None = None) -> str | None:
        return RAW_ARE_LOGITS if self.box.on == "raw" and isinstance(coder, Bins) else None

    def build(self, assigner: Assigner | None, num_classes: int) -> AutoAssign:
        if assigner is not None:
            raise ConfigError("criterion.type 'auto_assign' matches priors by itself: set assigner=null")
        return AutoAssign(config=self, num_classes=num_classes)


class CenterPrior(nn.Module):
    """Where in objects of a class the priors that learn them lie: a Gaussian around a shifted centre."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        # x and y of class 0, of class 1, ...  One dimension, so that the optimiser knows them for factors: no decay.
        self.mean = nn.Parameter(torch.zeros(2 * num_classes))  # strides
        self.sigma = nn.Parameter(torch.ones(2 * num_classes))  # strides

    def forward(self, offset: Tensor, labels: Tensor) -> Tensor:
        """(n, R, 2) strides from the object's centre to the prior's, (n,) -> (n, R) in (0, 1]."""
        mean, sigma = (p.view(-1, 2)[labels][:, None] for p in (self.mean, self.sigma))
        return (-((offset - mean) ** 2) / (2 * sigma**2)).exp().prod(-1)


class _Terms(NamedTuple):
    """Of each of n objects."""

    log_likelihood: Tensor  # (n,) that some prior finds it, 0 where no prior lies in it
    center: Tensor  # (n,) how much centre prior lies in it
    prior: Tensor  # (n, S) its heaviest priors
    share: Tensor  # (n, S) what they weigh


class AutoAssign(nn.Module):
    """`criterion(outputs, objects) -> Losses` with sums `positive`, `negative` and `center`.

    The head's quality branch is the objectness of the paper; no label trains it.  The normaliser is the sum of all
    centre priors in objects, a soft count of positives, by which the authors divide `negative`; they divide `positive`
    by the objects and `center` by the images, and so do we, with the numbers of this (micro-)batch.  The reported
    assignment holds the priors that weigh at least half as much as the heaviest of their object.
    """

    def __init__(self, *, config: AutoAssignConfig, num_classes: int) -> None:
        super().__init__()
        self.config = config
        self.num_classes = num_classes
        self.center_prior = CenterPrior(num_classes)

    def forward(self, outputs: Outputs, objects: Objects) -> Losses:
        """Raises `ConfigError` where the head does not fit."""
        check_classes(outputs, self.num_classes)
        refuse_weights(objects, "auto_assign")
        if outputs.quality_logits is None:
            raise ConfigError("criterion.type 'auto_assign' needs an objectness: set model.head.quality=true")
        config = self.config
        with torch.autocast(outputs.class_logits.device.type, enabled=False):
            terms = self._of_objects(outputs, objects)
            with torch.no_grad():
                belonging = belongs(outputs, objects, lambda part: self._candidates(outputs.priors, objects, part)[1])
                # Whoever lies in an object belongs to it a little at least.
                ignored = left_out(outputs.priors, objects, config.crowd_coverage) & (belonging.amax(-1) == 0)
            negative = negative_sum(
                outputs.class_logits, outputs.quality_logits, belonging, (~ignored).float(), config.gamma
            )
            count = mean_over_processes(terms.center.detach().sum())
            number = mean_over_processes(count.new_full((), len(objects)))
            images = belonging.shape[0]
            return Losses(
                sums={
                    "positive": config.positive_weight
                    * -terms.log_likelihood.sum()
                    * (count.clamp(min=1) / number.clamp(min=1)),
                    "negative": config.negative_weight * negative,
                    "center": config.center_weight * _narrowness(terms.center, objects) * (count.clamp(min=1) / images),
                },
                normalizer=count,
                assignments={"dense": report(outputs.priors, objects, ignored, terms.prior, terms.share)},
            )

    def _of_objects(self, outputs: Outputs, objects: Objects) -> _Terms:
        parts = list(chunks(len(objects), len(outputs.priors))) or [slice(0, 0)]
        if len(parts) == 1:
            return self._of_some(outputs, objects, parts[0])
        found = [
            checkpoint(self._of_some, outputs, objects, part, use_reentrant=False, preserve_rng_state=False)
            for part in parts
        ]
        return _Terms(*(torch.cat(each) for each in zip(*found, strict=True)))

    def _of_some(self, outputs: Outputs, objects: Objects, part: slice) -> _Terms:
        image, label = objects.image[part], objects.labels[part]
        priors, box = outputs.priors, self.config.box
        assert outputs.quality_logits is not None

        center, inside = self._candidates(priors, objects, part)
        every = torch.arange(len(priors), device=image.device)
        score = full_precision(outputs.class_logits[image[:, None], every, label[:, None]]).sigmoid()
        score = score * full_precision(outputs.quality_logits[image]).sigmoid()
        raw = full_precision(outputs.box_raw[image])
        target = objects.boxes[part, None].expand(-1, len(priors), -1)
        if box.on == "raw":
            loss = box(raw, outputs.coder.encode(priors.boxes, priors.stride, target))
        else:
            loss = box(outputs.coder.decode(priors.boxes, priors.stride, raw), target)
        confidence = score * (-box.weight * loss).exp()

        # The mean confidence of all inside, in which the confident and central ones weigh more.
        weight = (self.config.sharpness * confidence).exp() * center
        weight = weight / weight.sum(1, keepdim=True).clamp(min=LEAST)
        likelihood = (confidence * weight).sum(1)
        heaviest = weight.detach().topk(min(REPORTED, len(priors)), 1)
        return _Terms(
            log_likelihood=likelihood.clamp(min=LEAST_TO_LOG).log() * inside.any(1),
            center=center.sum(1),
            prior=heaviest.indices,
            share=heaviest.values,
        )

    def _candidates(self, priors: Priors, objects: Objects, part: slice) -> tuple[Tensor, Tensor]:
        """(n, R) centre prior, 0 where a prior is no candidate, with graph; (n, R) bool: is it one."""
        offset = (priors.centers - objects.centers[part, None]) / priors.stride[:, None]
        center = self.center_prior(offset, objects.labels[part])
        inside = in_boxes(priors, objects.boxes[part])
        if self.config.nearest:
            first = center.topk(min(self.config.nearest, len(priors)), 1).indices
            best = torch.zeros_like(inside).scatter_(1, first, True)
            inside = inside | (best & ~inside.any(1, keepdim=True))
        return center * inside, inside


def in_boxes(priors: Priors, boxes: Tensor) -> Tensor:
    """(n, 4) -> (n, R) bool: the prior's centre lies inside the box, not on its edge."""
    return ((priors.centers > boxes[:, None, :2]) & (priors.centers < boxes[:, None, 2:])).all(-1)


def belongs(outputs: Outputs, objects: Objects, candidates: Callable[[slice], Tensor]) -> Tensor:
    """(B, R, K) in [0, 1]: how little a prior inside an object of the class counts as background.

    candidates: from a part of the objects to (n, R) bool, the priors inside them.

    f(1 / (1 - IoU)) with the prior's best IoU now, f scaling linearly from the object's worst to its best prior.  Of
    several objects of one class the largest counts (the authors: the last one).
    """
    batch, count, classes = outputs.class_logits.shape
    decoded = outputs.coder.decode(outputs.priors.boxes, outputs.priors.stride, outputs.box_raw)
    best = decoded.new_zeros(batch, count)
    for part in chunks(len(objects), count):
        image = objects.image[part]
        iou = pairwise_iou(objects.boxes[part, None], decoded[image])
        best.scatter_reduce_(0, image[:, None].expand_as(iou), iou, "amax")
    fit = 1 / (1 - best).clamp(min=LEAST)
    found = decoded.new_zeros(batch * classes, count)  # image and class, then prior
    for part in chunks(len(objects), count):
        image = objects.image[part]
        inside, mine = candidates(part), fit[image]
        low = mine.where(inside, torch.inf).amin(1, keepdim=True)
        high = mine.where(inside, -torch.inf).amax(1, keepdim=True)
        share = ((mine - low + LEAST) / (high - low + LEAST)).where(inside, 0.0)
        row = (image * classes + objects.labels[part])[:, None].expand_as(share)
        found.scatter_reduce_(0, row, share, "amax")
    return found.view(batch, classes, count).transpose(1, 2)


def _narrowness(center: Tensor, objects: Objects) -> Tensor:
    """Sum over the images of objects over centre prior in them, 0 for an image without any."""
    number = center.new_zeros(objects.batch_size).index_add(0, objects.image, torch.ones_like(center))
    mass = center.new_zeros(objects.batch_size).index_add(0, objects.image, center)
    return torch.where(mass > 0, number / mass.clamp(min=LEAST), 0 * mass).sum()
