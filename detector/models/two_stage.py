"""Two-stage detectors: proposals, then one box head or a cascade of them, each on its own sample of proposals.

Legend: B images, M proposals of an image, N objects of the batch, R = M + N candidates of an image in training, S of
them that a stage learns from, K classes, P (proposal, object) pairs.

This is the one model that takes the truth in its forward pass: in training the second stage computes features only for
the proposals that its sampler picked, and hands the assignment on inside its outputs.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import torch
from pydantic import Field, field_validator, model_validator
from torch import Tensor, nn

from detector.assign import MaxIou, Rule
from detector.assign.sample import AnySampler, Random, paired
from detector.boxes import clip
from detector.config.node import Node
from detector.errors import ConfigError
from detector.models.backbones import Backbone, BackboneConfig
from detector.models.fpn import Fpn, FpnConfig
from detector.models.roi import Align, AnyRoi, RoiExtractor
from detector.models.roi_head import BoxHead, BoxHeadConfig, class_losses, scores_as_logits
from detector.models.rpn import ProposalNumbers, Proposals, Rpn, RpnConfig
from detector.models.single_level import NoNeck, check_levels, with_next_stage
from detector.models.stages import Stage, TwoStageOutputs
from detector.pixels import RGB, Pixels
from detector.structures import Assignment, Objects, Outputs, Priors


class StageRules(Node):
    """Which proposals a stage learns from, and what."""

    assigner: Rule = MaxIou(positive_iou=0.5, negative_iou=0.5, low_quality="none")
    sampler: AnySampler = Random()
    add_objects: bool = Field(True, description="the objects' own boxes are proposals too, in training")

    @field_validator("assigner")
    @classmethod
    def _without_predictions(cls, rule: Rule) -> Rule:
        if rule.uses_predictions:
            raise ValueError(
                f"type {rule.type!r} looks at predictions, which proposals have none of before they are sampled: use"
                " max_iou or another rule of boxes alone"
            )
        return rule


class TwoStageConfig(Node):
    """Faster R-CNN (Ren et al. 2015), with FPN (Lin et al., CVPR 2017) or on one map."""

    type: Literal["two_stage"] = "two_stage"
    backbone: BackboneConfig = Field(default_factory=lambda: BackboneConfig(levels=(2, 3, 4, 5)))
    neck: FpnConfig | None = Field(
        default_factory=lambda: FpnConfig(extra="pool", extra_levels=1), description="null: the backbone's one map"
    )
    rpn: RpnConfig | None = Field(
        default_factory=RpnConfig, description="null: proposals are given, by data.proposals (Fast R-CNN)"
    )
    roi: AnyRoi = Align()
    rules: StageRules = Field(default_factory=StageRules)
    head: BoxHeadConfig = Field(default_factory=BoxHeadConfig)

    @model_validator(mode="after")
    def _levels_fit(self) -> TwoStageConfig:
        check_levels(self.backbone, self.neck, self.head)
        return self

    @property
    def stages(self) -> tuple[tuple[BoxHeadConfig, StageRules], ...]:
        return ((self.head, self.rules),)

    def build(self, num_classes: int, *, load_weights: bool = True, pixels: Pixels = RGB) -> TwoStageDetector:
        """The network; `load_weights=False` leaves the backbone random, for a checkpoint that follows."""
        return assemble(self.backbone, self.neck, self.rpn, self.roi, self.stages, num_classes, load_weights, pixels)


def assemble(
    backbone_config: BackboneConfig,
    neck_config: FpnConfig | None,
    rpn: RpnConfig | None,
    roi: AnyRoi,
    stages: Sequence[tuple[BoxHeadConfig, StageRules]],
    num_classes: int,
    load_weights: bool,
    pixels: Pixels = RGB,
) -> TwoStageDetector:
    """The second stage looks at the backbone's own levels; the neck's extra ones are the RPN's alone."""
    first: nn.Module | None = None
    if stages[0][0].backbone_stage:
        backbone, first, width = with_next_stage(backbone_config, load_weights, pixels)
    else:
        backbone = backbone_config.build(load_weights=load_weights, pixels=pixels)
    if neck_config is None:
        neck: Fpn | NoNeck = NoNeck(backbone.channels[0], backbone.strides[0])
    else:
        neck = neck_config.build(backbone.channels, backbone.strides)
    extractor = RoiExtractor(roi, neck.channels, backbone.strides)
    heads = []
    for i, (head, _) in enumerate(stages):
        own = copy.deepcopy(first) if i else first
        heads.append(head.build(extractor.channels if own is None else width, roi.size, num_classes, own))
    return TwoStageDetector(
        backbone=backbone,
        neck=neck,
        rpn=None if rpn is None else rpn.build(neck.channels, neck.strides),
        extractor=extractor,
        heads=heads,
        rules=[rules for _, rules in stages],
    )


class TwoStageDetector(nn.Module):
    """(B, C, H, W), any H and W -> with `objects` `TwoStageOutputs`, without `Outputs` of the last stage.

    The plain `Outputs` have each image's proposals as priors; the class logits are those whose sigmoid is the class
    probability, averaged over the stages (Cascade R-CNN); padded proposals have -inf.
    """

    scale: Tensor
    shift: Tensor
    average: Literal["probabilities", "logits"] = "probabilities"  # of the stages' classes

    def __init__(
        self,
        *,
        backbone: Backbone,
        neck: Fpn | NoNeck,
        rpn: Rpn | None,
        extractor: nn.Module,
        heads: Sequence[BoxHead],
        rules: Sequence[StageRules],
    ) -> None:
        super().__init__()
        self.backbone, self.neck, self.rpn, self.extractor = backbone, neck, rpn, extractor
        self.heads, self.rules = nn.ModuleList(heads), tuple(rules)
        mean, std = torch.tensor(backbone.mean), torch.tensor(backbone.std)
        self.register_buffer("scale", (1 / std)[:, None, None], persistent=False)
        self.register_buffer("shift", (-mean / std)[:, None, None], persistent=False)

    def forward(
        self,
        images: Tensor,
        objects: Objects | None = None,
        sizes: Tensor | None = None,
        proposals: Tensor | None = None,
    ) -> Outputs | TwoStageOutputs:
        """`sizes`: (B, 2) height, width of the images without padding, where `objects` do not tell.

        Proposals end there, without either at the batch's edge.  `proposals`: (B, M, 4), of no area where padded, for a
        network without an RPN, where `objects` do not bring them.

        Raises:
            ConfigError: there is no RPN and nobody gives proposals.
        """
        if objects is not None and objects.sizes is not None:
            sizes = objects.sizes
        if sizes is None:
            height, width = images.shape[-2:]
            sizes = torch.stack([self.scale.new_full((len(images),), float(n)) for n in (height, width)], 1)
        sizes = sizes.float()
        maps = self._maps(images, sizes)
        rpn = None if self.rpn is None else self.rpn(maps)
        if self.rpn is None or rpn is None:
            looked_at = _given(proposals if objects is None else objects.proposals)
        else:
            config = self.rpn.config
            looked_at = self.rpn.propose(rpn, sizes, config.test if objects is None else config.train)
        if objects is None:
            return self._detect(maps, looked_at, sizes)
        stages: list[Stage] = []
        for i in range(len(self.heads)):
            if stages:
                looked_at = _refined(stages[-1], sizes)
            stages.append(self._learn(i, maps, looked_at, objects))
        return TwoStageOutputs(rpn, tuple(stages))

    def propose(self, images: Tensor, sizes: Tensor, numbers: ProposalNumbers) -> Proposals:
        """The RPN's proposals alone, of a network that has one."""
        assert self.rpn is not None
        return self.rpn.propose(self.rpn(self._maps(images, sizes)), sizes.float(), numbers)

    def _maps(self, images: Tensor, sizes: Tensor) -> list[Tensor]:
        """What boxes are looked up in; here the padding beyond `sizes` is seen as the backbone sees it."""
        images = images.contiguous(memory_format=torch.channels_last).to(self.scale.dtype)
        maps: list[Tensor] = self.neck(self.backbone(torch.addcmul(self.shift, images, self.scale)))
        return maps

    def _head(self, stage: int) -> BoxHead:
        head = self.heads[stage]
        assert isinstance(head, BoxHead)
        return head

    def _look(self, stage: int, maps: Sequence[Tensor], boxes: Tensor) -> tuple[Tensor, Tensor]:
        """The stage's class logits (B, S, K [+ 1]) and raw boxes (B, S, [K,] 4) of (B, S, 4) boxes."""
        logits, raw = self._head(stage)(self.extractor(maps, boxes))
        return logits.unflatten(0, boxes.shape[:2]), raw.unflatten(0, boxes.shape[:2])

    def _detect(self, maps: Sequence[Tensor], proposals: Proposals, sizes: Tensor) -> Outputs:
        boxes, valid = proposals
        # Outside of training the host may wait: proposals that no image has are left away.
        most = max(1, int(valid.sum(1).max()))
        boxes, valid = boxes[:, :most], valid[:, :most]
        scores = []
        for i in range(len(self.heads)):
            head = self._head(i)
            logits, raw = self._look(i, maps, boxes)
            scores.append(head.probabilities(logits) if self.average == "probabilities" else logits.float())
            outputs = Outputs(_priors(boxes), logits, raw, None, head.config.coder)
            if i + 1 < len(self.heads):
                boxes = clip(outputs.boxes, sizes[:, None]).where(valid[..., None], 0.0)
        mean = torch.stack(scores).mean(0)
        logits = scores_as_logits(mean if self.average == "probabilities" else self._head(-1).probabilities(mean))
        return replace(outputs, class_logits=logits.where(valid[..., None], -torch.inf))

    def _learn(self, stage: int, maps: Sequence[Tensor], proposals: Proposals, objects: Objects) -> Stage:
        boxes, found = self.choose(stage, maps, proposals, objects)
        logits, raw = self._look(stage, maps, boxes)
        return Stage(Outputs(_priors(boxes), logits, raw, None, self._head(stage).config.coder), found)

    def choose(
        self, stage: int, maps: Sequence[Tensor], proposals: Proposals, objects: Objects
    ) -> tuple[Tensor, Assignment]:
        """(B, S, 4) the boxes that the stage learns from, and what: assigned and sampled by its rules."""
        rules, head = self.rules[stage], self._head(stage)
        boxes, valid = _with_objects(proposals, objects) if rules.add_objects else proposals
        priors = _priors(boxes)

        def losses() -> Tensor:
            target = _labels(found, objects, head.num_classes)
            return class_losses(head.config.classifier, self._look(stage, maps, boxes)[0], target)

        found = _only(rules.assigner(priors, objects), valid)
        found = rules.sampler(found, priors, objects, stage=stage + 1, losses=losses)
        slots, found = compact(found, min(rules.sampler.count, boxes.shape[1]))
        return boxes.gather(1, slots[..., None].expand(-1, -1, 4)), found


def _given(boxes: Tensor | None) -> Proposals:
    if boxes is None:
        raise ConfigError(
            "the network has no RPN (model.rpn is null) and no proposals were given: set data.proposals, or pass them"
            " to the detector with the images"
        )
    return Proposals(boxes, (boxes[..., 2:] > boxes[..., :2]).all(-1))


def _priors(boxes: Tensor) -> Priors:
    """Proposals (B, S, 4) as priors; they lie on no grid, and deltas need no stride."""
    return Priors(boxes, boxes.new_ones(boxes.shape[1]), (boxes.shape[1],))


def _with_objects(proposals: Proposals, objects: Objects) -> Proposals:
    """The objects after the proposals: all N of the batch for every image, those of other images as padding.

    So the number is known without asking the device.
    """
    boxes = objects.boxes.expand(objects.batch_size, -1, -1)
    own = objects.image == torch.arange(objects.batch_size, device=boxes.device)[:, None]
    own = own & (objects.boxes[:, 2:] > objects.boxes[:, :2]).all(1)
    return Proposals(
        torch.cat([proposals.boxes, boxes.where(own[..., None], 0.0)], 1), torch.cat([proposals.valid, own], 1)
    )


def _only(assignment: Assignment, valid: Tensor) -> Assignment:
    """Padding is ignored and in no pair."""
    weight = assignment.weight * valid.view(-1)[assignment.prior]
    return replace(assignment, weight=weight, ignored=assignment.ignored | ~valid)


def _labels(assignment: Assignment, objects: Objects, num_classes: int) -> Tensor:
    """(B, R) the class of each prior's object (of several, the last class); `num_classes` for background."""
    label = torch.full((assignment.ignored.numel() + 1,), -1, device=assignment.ignored.device)
    nowhere = assignment.ignored.numel()
    prior = torch.where(assignment.weight > 0, assignment.prior, nowhere)
    label.scatter_reduce_(0, prior, objects.labels[assignment.object], "amax")
    label = label[:-1].view_as(assignment.ignored)
    return label.where(label >= 0, num_classes)


def compact(assignment: Assignment, count: int) -> tuple[Tensor, Assignment]:
    """The sampled priors of each image moved together: (B, count) which they are, positives first; their assignment.

    Where an image has fewer, the rest is padding, `ignored` and in no pair.
    """
    rank = paired(assignment).long() * 2 + (~assignment.ignored).long()
    order = rank.argsort(dim=1, descending=True, stable=True)
    slots = order[:, :count]
    priors = assignment.num_priors
    place = torch.empty_like(order).scatter_(1, order, torch.arange(priors, device=order.device).expand_as(order))
    place = place.view(-1)[assignment.prior]
    image = assignment.prior // priors
    background = assignment.background_weight
    if background is not None:
        background = background.gather(1, slots[..., None].expand(-1, -1, background.shape[-1]))
    return slots, replace(
        assignment,
        num_priors=count,
        prior=image * count + place.clamp(max=count - 1),
        weight=assignment.weight * (place < count),
        ignored=assignment.ignored.gather(1, slots),
        background_weight=background,
    )


@torch.no_grad()
def _refined(stage: Stage, sizes: Tensor) -> Proposals:
    """The stage's boxes as the next one's proposals, clipped to the images; without those that shrank to nothing."""
    raw = stage.outputs.box_raw.detach()
    boxes = clip(replace(stage.outputs, box_raw=raw).boxes, sizes[:, None])
    valid = ~stage.assignment.ignored & (boxes[..., 2:] > boxes[..., :2]).all(-1)
    return Proposals(boxes.where(valid[..., None], 0.0), valid)
