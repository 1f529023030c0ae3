"""Cascade R-CNN (Cai and Vasconcelos, CVPR 2018): box heads in a row, each stricter and finer than the one before.

Every head refines the boxes of the one before; in detection the class probabilities of all are averaged.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from detector.assign import MaxIou
from detector.assign.sample import AnySampler, Random
from detector.config.node import Node
from detector.models.backbones import BackboneConfig
from detector.models.fpn import FpnConfig
from detector.models.roi import Align, AnyRoi
from detector.models.roi_head import BoxHeadConfig
from detector.models.rpn import RpnConfig
from detector.models.single_level import check_levels
from detector.models.two_stage import StageRules, TwoStageDetector, assemble
from detector.pixels import RGB, Pixels

Positive = Annotated[float, Field(gt=0)]


class CascadeStage(Node):
    """What distinguishes a stage."""

    positive_iou: float = Field(0.5, gt=0, le=1, description="from which on a proposal learns an object")
    std: tuple[Positive, Positive, Positive, Positive] = Field(
        (0.1, 0.1, 0.2, 0.2), description="of the deltas, which shrink from stage to stage"
    )


# Section 5.1 of the paper and the authors' code.
PUBLISHED = (
    CascadeStage(positive_iou=0.5, std=(0.1, 0.1, 0.2, 0.2)),
    CascadeStage(positive_iou=0.6, std=(0.05, 0.05, 0.1, 0.1)),
    CascadeStage(positive_iou=0.7, std=(0.033, 0.033, 0.067, 0.067)),
)


class CascadeConfig(Node):
    """Cascade R-CNN, with FPN or on one map."""

    type: Literal["cascade"] = "cascade"
    backbone: BackboneConfig = Field(default_factory=lambda: BackboneConfig(levels=(2, 3, 4, 5)))
    neck: FpnConfig | None = Field(
        default_factory=lambda: FpnConfig(extra="pool", extra_levels=1), description="null: the backbone's one map"
    )
    rpn: RpnConfig | None = Field(default_factory=RpnConfig, description="null: proposals are given, by data.proposals")
    roi: AnyRoi = Align()
    head: BoxHeadConfig = Field(default_factory=lambda: BoxHeadConfig(class_agnostic=True))
    cascade: tuple[CascadeStage, ...] = Field(PUBLISHED, min_length=1, description="in order")
    average: Literal["probabilities", "logits"] = Field(
        "probabilities", description="of the stages, for the classes: probabilities in the paper, logits in mmdetection"
    )
    sampler: AnySampler = Random()
    add_objects: bool = Field(True, description="the objects' own boxes are proposals of every stage, in training")

    @model_validator(mode="after")
    def _levels_fit(self) -> CascadeConfig:
        check_levels(self.backbone, self.neck, self.head)
        return self

    @field_validator("head")
    @classmethod
    def _one_box(cls, head: BoxHeadConfig) -> BoxHeadConfig:
        if not head.class_agnostic:
            raise ValueError("a cascade passes one box for each proposal on: set model.head.class_agnostic=true")
        return head

    @property
    def stages(self) -> tuple[tuple[BoxHeadConfig, StageRules], ...]:
        return tuple(
            (
                self.head.model_copy(update={"coder": self.head.coder.model_copy(update={"std": stage.std})}),
                StageRules(
                    assigner=MaxIou(
                        positive_iou=stage.positive_iou, negative_iou=stage.positive_iou, low_quality="none"
                    ),
                    sampler=self.sampler,
                    add_objects=self.add_objects,
                ),
            )
            for stage in self.cascade
        )

    def build(self, num_classes: int, *, load_weights: bool = True, pixels: Pixels = RGB) -> TwoStageDetector:
        """The network; `load_weights=False` leaves the backbone random, for a checkpoint that follows."""
        detector = assemble(
            self.backbone, self.neck, self.rpn, self.roi, self.stages, num_classes, load_weights, pixels
        )
        detector.average = self.average
        return detector
