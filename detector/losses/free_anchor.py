"""FreeAnchor (Zhang et al., "FreeAnchor: Learning to Match Anchors for Visual Object Detection", NeurIPS 2019).

Legend: B images, R priors of an image, N objects of the batch, K classes, S priors of a bag.

No prior is told its object.  Every object has a bag of priors that overlap it, and some prior of the bag should find
it; a prior that finds no object should be silent.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from detector.assign.base import chunks
from detector.boxes import full_precision, pairwise_iou
from detector.coders import Bins
from detector.errors import ConfigError
from detector.losses import AnyBoxLoss
from detector.losses.base import RAW_ARE_LOGITS, CriterionConfig, refuse_weights
from detector.losses.likelihood import LEAST, check_classes, left_out, negative_sum, report
from detector.losses.normalizer import mean_over_processes
from detector.losses.regression import SmoothL1
from detector.structures import Losses, Objects, Outputs, Priors

if TYPE_CHECKING:
    from detector.assign.base import Assigner
    from detector.coders import Coder


class FreeAnchorConfig(CriterionConfig):
    """FreeAnchor's parameters with the paper's values; it decides by itself which prior learns which object."""

    uses_assigner: ClassVar[bool] = False
    type: Literal["free_anchor"] = "free_anchor"
    bag: int = Field(50, ge=1, description="priors of highest IoU that form an object's bag")
    positive_weight: float = Field(0.5, ge=0, description="factor of the bags' term, the paper's w1 alpha")
    negative_weight: float = Field(0.5, ge=0, description="factor of the background's term, 1 - alpha in the paper")
    gamma: float = Field(2.0, ge=0, description="how much priors of low score count less as background")
    box_iou: float = Field(0.6, ge=0, lt=1, description="a prediction up to this IoU does not belong to its object")
    box: AnyBoxLoss = Field(
        SmoothL1(beta=0.11, weight=0.75), description="a box's likelihood is exp(-weight * loss): the paper's beta"
    )
    crowd_coverage: float = Field(0.5, ge=0, le=1, description="a prior with more of its area in a crowd is left out")

    @property
    def uses_quality(self) -> bool:
        return False

    def objection(self, coder: Coder, initial: Coder | None = None) -> str | None:
        return RAW_ARE_LOGITS if self.box.on == "raw" and isinstance(coder, Bins) else None

    def build(self, assigner: Assigner | None, num_classes: int) -> FreeAnchor:
        if assigner is not None:
            raise ConfigError("criterion.type 'free_anchor' matches priors by itself: set assigner=null")
        return FreeAnchor(config=self, num_classes=num_classes)


class FreeAnchor(nn.Module):
    """`criterion(outputs, objects) -> Losses` with sums `positive` and `negative`, divided by the number of objects.

    The reported assignment holds the priors of each bag that weigh at least half as much as its heaviest.
    """

    def __init__(self, *, config: FreeAnchorConfig, num_classes: int) -> None:
        super().__init__()
        self.config = config
        self.num_classes = num_classes

    def forward(self, outputs: Outputs, objects: Objects) -> Losses:
        """Raises `ConfigError` where the head does not fit."""
        check_classes(outputs, self.num_classes)
        refuse_weights(objects, "free_anchor")
        config = self.config
        with torch.autocast(outputs.class_logits.device.type, enabled=False):
            bag = bags(outputs.priors, objects, config.bag)
            joint = self._joint_likelihood(outputs, objects, bag)
            # Mean-max: near the mean while all are unlikely, near the maximum once some are likely.
            share = 1 / (1 - joint).clamp(min=LEAST)
            share = share / share.sum(1, keepdim=True)
            found = (share * joint).sum(1).clamp(min=LEAST)

            ignored = left_out(outputs.priors, objects, config.crowd_coverage)
            belonging = belongs(outputs, objects, config.box_iou)
            negative = negative_sum(outputs.class_logits, None, belonging, (~ignored).float(), config.gamma)
            return Losses(
                sums={
                    "positive": config.positive_weight * -found.log().sum(),
                    # The authors divide it by objects times bag.
                    "negative": config.negative_weight / config.bag * negative,
                },
                normalizer=mean_over_processes(found.new_full((), len(objects))),
                assignments={"dense": report(outputs.priors, objects, ignored, bag, share)},
            )

    def _joint_likelihood(self, outputs: Outputs, objects: Objects, bag: Tensor) -> Tensor:
        """(N, S) of the object's class and of its box, with graph."""
        box, priors = self.config.box, outputs.priors
        image = objects.image[:, None]
        raw = full_precision(outputs.box_raw[image, bag])
        prior_boxes, stride = priors.boxes[bag], priors.stride[bag]
        target = objects.boxes[:, None].expand(*bag.shape, 4)
        if box.on == "raw":
            loss = box(raw, outputs.coder.encode(prior_boxes, stride, target))
        else:
            loss = box(outputs.coder.decode(prior_boxes, stride, raw), target)
        score = full_precision(outputs.class_logits[image, bag, objects.labels[:, None]]).sigmoid()
        return score * (-box.weight * loss).exp()


@torch.no_grad()
def bags(priors: Priors, objects: Objects, size: int) -> Tensor:
    """(N, S) the `size` priors (all, if fewer) of highest IoU with each object, then the nearest."""
    found = [objects.image.new_zeros(0, min(size, len(priors)))]
    for part in chunks(len(objects), len(priors)):
        iou = pairwise_iou(objects.boxes[part, None], priors.boxes)
        away = (objects.centers[part, None] - priors.centers).square().sum(-1)
        found.append(torch.where(iou > 0, iou, -away).topk(min(size, len(priors)), 1).indices)
    return torch.cat(found)


@torch.no_grad()
def belongs(outputs: Outputs, objects: Objects, threshold: float) -> Tensor:
    """(B, R, K) in [0, 1]: how likely a prior's box now is that of an object of the class.

    0 up to `threshold` of IoU, 1 for the object's best box, linear between (section 3.2).
    """
    shape = outputs.class_logits.shape
    decoded = outputs.coder.decode(outputs.priors.boxes, outputs.priors.stride, outputs.box_raw.detach())
    found = decoded.new_zeros(shape[0] * shape[2], shape[1])  # image and class, then prior
    for part in chunks(len(objects), shape[1]):
        iou = pairwise_iou(objects.boxes[part, None], decoded[objects.image[part]])
        highest = iou.amax(1, keepdim=True).clamp(min=threshold + LEAST)
        share = ((iou - threshold) / (highest - threshold).clamp(min=LEAST)).clamp(0, 1)
        row = (objects.image[part] * shape[2] + objects.labels[part])[:, None].expand_as(share)
        found.scatter_reduce_(0, row, share, "amax")
    return found.view(shape[0], shape[2], shape[1]).transpose(1, 2)
