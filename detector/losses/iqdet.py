"""IQDet's criterion (Ma et al., "IQDet: Instance-wise Quality Distribution Sampling for Object Detection", CVPR 2021).

Legend: B images, R priors of an image, N objects of the batch, L levels, M components, S points of an object, T cells
looked at along an axis, P = N * S points in all.

The dense criterion of any losses, with two additions.  The model's encoder learns where in an object the head's boxes
are good: cross-entropy of its distribution with their IoU (the paper's L_IQ).  And where the rule is `iqdet`,
predictions are interpolated at the points that it draws, between the cells, and learn the object there.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Literal

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from detector.assign.distribution import Distribution
from detector.assign.geometry import kinds
from detector.assign.iqdet import Drawn, IqDet, best_kinds, halves, place_in, prior_at
from detector.assign.sample import paired
from detector.boxes import full_precision, pairwise_iou
from detector.errors import ConfigError
from detector.losses.base import CriterionConfig
from detector.losses.dense import DenseCriterion, DenseCriterionConfig
from detector.losses.quality import QualityBce
from detector.structures import Assignment, Losses, Objects, Outputs, Predictions, Priors

if TYPE_CHECKING:
    from detector.assign.base import Assigner
    from detector.coders import Coder

LEAST = 1e-6  # probabilities are at least this far from 0 and 1 where their logarithm is taken


class IqDetCriterionConfig(CriterionConfig):
    """The head's losses, and the encoder's."""

    type: Literal["iqdet"] = "iqdet"
    dense: DenseCriterionConfig = Field(
        DenseCriterionConfig(quality=QualityBce(target="iou")), description="the head's own losses, at the points"
    )
    points: Literal["between", "rounded"] = Field(
        "between",
        description="where the head learns: predictions interpolated at the points that assigner.type=iqdet draws, or"
        " the cells that they are rounded to, as under any other criterion",
    )
    encoder_weight: float = Field(1.0, ge=0, description="factor of the encoder's term; the paper's lambda_IQ, 1")
    cells: int = Field(
        7, ge=1, le=64, description="the encoder looks at so many cells of an object along each axis of a level"
    )

    @model_validator(mode="after")
    def _background_is_learnt(self) -> IqDetCriterionConfig:
        if self.points == "between" and self.dense.quality is not None and self.dense.quality.type == "objectness":
            raise ValueError(
                "dense.quality 'objectness' learns from every prior, but with points 'between' it would see the points"
                " alone: set points=rounded, or dense.quality={type: bce, target: iou}"
            )
        return self

    @property
    def uses_quality(self) -> bool:
        return self.dense.uses_quality

    def objection(self, coder: Coder, initial: Coder | None = None) -> str | None:
        objection = self.dense.objection(coder, initial)
        return None if objection is None else objection.replace("criterion.", "criterion.dense.")

    def build(self, assigner: Assigner | None, num_classes: int) -> IqDetCriterion:
        if assigner is None:
            raise ConfigError("criterion.type 'iqdet' needs a rule of label assignment: set assigner.type=iqdet")
        dense = self.dense.build(assigner, num_classes)
        return IqDetCriterion(config=self, dense=dense, assigner=assigner)


class IqDetCriterion(nn.Module):
    """`criterion(outputs, objects) -> Losses`: the sums of the dense criterion, and `encoder`.

    With another rule (`assigner: {type: switch, first: ..., then: {type: iqdet}}`) the head learns what that says and
    the encoder learns all the same.  The reported assignment is the rule's, on the priors: rounded points.

    Of an object, `encoder` is the mean cross-entropy over the cells that were looked at, times the number of its
    positives; so divided by the positives of the batch it is a mean over objects, and parts of a batch add up.
    """

    def __init__(self, *, config: IqDetCriterionConfig, dense: DenseCriterion, assigner: Assigner) -> None:
        super().__init__()
        self.config, self.dense, self.assigner = config, dense, assigner

    def forward(self, outputs: Outputs, objects: Objects) -> Losses:
        """Raises `ConfigError` where the model has no encoder, or its head does not fit the losses."""
        if outputs.mixture is None:
            raise ConfigError("criterion.type 'iqdet' trains an encoder, but the model has none: set model.encoder={}")
        self.dense.check(outputs)
        predictions = outputs.detached()
        found = self.assigner(outputs.priors, objects, predictions)
        with torch.autocast(outputs.class_logits.device.type, enabled=False):
            if self.config.points == "between" and isinstance(self.assigner, IqDet) and len(objects):
                with torch.no_grad():
                    drawn = self.assigner.points(outputs.priors, objects, predictions)
                learnt = everyone(drawn, objects)
                losses = self.dense.losses(interpolated(outputs, objects, drawn), objects, learnt)
                background = replace(found, weight=0 * found.weight, ignored=found.ignored | paired(found))
                negative = self.dense.class_sum(outputs, objects, background)
                sums = {**losses.sums, "class": losses.sums["class"] + negative}
            else:
                learnt, losses = found, self.dense.losses(outputs, objects, found)
                sums = dict(losses.sums)
            own = torch.zeros(len(objects), device=learnt.weight.device)
            own = own.index_add(0, learnt.object, (learnt.weight > 0).float())
            wrong = encoder_losses(outputs.mixture, outputs.priors, objects, predictions, self.config.cells)
            sums["encoder"] = self.config.encoder_weight * (wrong * own).sum()
        return Losses(sums, losses.normalizer, {"dense": found})


def everyone(drawn: Drawn, objects: Objects) -> Assignment:
    """The points as P priors of one image: each learns its object; those of an object without area are padding."""
    count = drawn.quality.numel()
    each = drawn.quality.shape[1]
    real = (objects.boxes[:, 2:] > objects.boxes[:, :2]).all(-1).float()
    weight = real.repeat_interleave(each)
    return Assignment(
        num_priors=count,
        prior=torch.arange(count, device=weight.device),
        object=torch.arange(len(objects), device=weight.device).repeat_interleave(each),
        quality=drawn.quality.view(-1) * weight,
        weight=weight,
        ignored=torch.zeros(1, count, dtype=torch.bool, device=weight.device),
    )


def interpolated(outputs: Outputs, objects: Objects, drawn: Drawn) -> Outputs:
    """What the head says at the points, (1, P, ...): bilinear between the four cells around each, with graph.

    Class logits, raw boxes and quality logits are interpolated as they are, before any activation; distances and deltas
    are linear in the prior's place, so four boxes that agree give the same box.  The prior is the cell's, moved to the
    point.  Beyond the outermost centres the map goes on as it ends.
    """
    table = kinds(outputs.priors.grids, drawn.center.device)
    kind = drawn.kind
    stride, count = table.stride[kind], torch.stack([table.columns, table.rows], 1)[kind]
    place = drawn.center / stride.double()[..., None] - table.offset.double()[kind][..., None]
    place = torch.minimum(place.clamp(min=0), (count - 1).double())
    low = place.floor()
    share = (place - low).float()  # (N, S, 2) of the higher cell
    low = low.long()
    high = torch.minimum(low + 1, count - 1)
    start = (objects.image * len(outputs.priors))[:, None]
    corner, weight = [], []
    for x, across in ((low[..., 0], 1 - share[..., 0]), (high[..., 0], share[..., 0])):
        for y, down in ((low[..., 1], 1 - share[..., 1]), (high[..., 1], share[..., 1])):
            corner.append(prior_at(table, kind, torch.stack([x, y], -1)) + start)
            weight.append(across * down)
    near, by = torch.stack(corner, -1).flatten(0, 1), torch.stack(weight, -1).flatten(0, 1)  # (P, 4)

    def at_points(values: Tensor) -> Tensor:
        """(B, R, X) -> (1, P, X)."""
        return (full_precision(values.flatten(0, 1)[near]) * by[..., None]).sum(1)[None]

    center, half = drawn.center.float(), table.size[kind] / 2
    quality = outputs.quality_logits
    return Outputs(
        priors=Priors(
            torch.cat([center - half, center + half], -1).flatten(0, 1), stride.flatten(), (drawn.quality.numel(),)
        ),
        class_logits=at_points(outputs.class_logits),
        box_raw=at_points(outputs.box_raw),
        quality_logits=None if quality is None else at_points(quality[..., None]).squeeze(-1),
        coder=outputs.coder,
        initial=None if outputs.initial is None else interpolated(outputs.initial, objects, drawn),
    )


def encoder_losses(mixture: Tensor, priors: Priors, objects: Objects, predictions: Predictions, cells: int) -> Tensor:
    """(N,) with graph: mean over an object's cells of the cross-entropy of the distribution there with the IoU now.

    mixture: (N, L, M, 5) with graph.  On each level, the cells whose centres lie in the object, or where those are more
    than `cells` along an axis, so many of them, evenly spaced: memory does not grow with the size of objects.  Of a
    cell's priors the one whose shape suits the object best.  An object that no cell's centre lies in has loss 0.
    """
    with torch.no_grad():
        prior, place, valid = _looked_at(priors, objects, cells)
        row = prior + (objects.image * len(priors))[:, None, None]
        said = predictions.boxes.flatten(0, 1)[row]
        iou = pairwise_iou(said, objects.boxes[:, None, None].expand_as(said)).clamp(0, 1)
    distribution = Distribution.unpack(full_precision(mixture).unsqueeze(2))  # (N, L, 1, M, ...)
    value = distribution.value(place).clamp(LEAST, 1 - LEAST)
    wrong = F.binary_cross_entropy(value, iou, reduction="none") * valid
    return wrong.flatten(1).sum(1) / valid.flatten(1).sum(1).clamp(min=1)


def _looked_at(priors: Priors, objects: Objects, cells: int) -> tuple[Tensor, Tensor, Tensor]:
    """prior (N, L, T * T), place (N, L, T * T, 2) float32 in the object, valid (N, L, T * T) bool."""
    table, kind = kinds(priors.grids, priors.boxes.device), best_kinds(priors, objects)  # (N, L)
    stride, offset = table.stride.double()[kind][..., None], table.offset.double()[kind][..., None]
    last = torch.stack([table.columns, table.rows], 1)[kind] - 1
    boxes = objects.boxes.double()[:, None]
    first = (boxes[..., :2] / stride - offset).ceil().long().clamp(min=0)  # (N, L, 2)
    end = torch.minimum((boxes[..., 2:] / stride - offset).floor().long(), last)
    count = (end - first + 1).clamp(min=0)[..., None]  # (N, L, 2, 1) centres inside
    t = torch.arange(cells, device=count.device)
    step = torch.where(count <= cells, t, ((2 * t + 1) * count).div(2 * cells, rounding_mode="floor"))
    index = torch.minimum((first[..., None] + step).clamp(min=0), last[..., None])
    exists = t < count
    x, y = (index[:, :, axis] for axis in (0, 1))
    cell = torch.stack([x[:, :, None].expand(*x.shape[:2], cells, cells), y[..., None].expand(*y.shape, cells)], -1)
    cell = cell.flatten(2, 3)  # (N, L, T * T, 2)
    valid = (exists[:, :, 0, None] & exists[:, :, 1, :, None]).flatten(2)
    center = (cell + offset[..., None]) * stride[..., None]
    place = place_in(objects, center.flatten(1, 2)).view_as(center).float()
    return prior_at(table, kind[..., None], cell), place, valid & (halves(objects) > 1e-3).all(-1)[:, None, None]
