"""The refined head: class and box towers, and a second look at the boxes, of whichever kind.

Legend: B images, L levels, R priors, K classes, A priors in a cell, T channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from detector.coders import AnyCoder, Coder, Distances
from detector.models.corrections import SIGNED, product
from detector.models.dense_head import GridHead, TowerLayer, flat
from detector.models.heads import HeadConfig, initialise, say, start_at
from detector.models.layers import conv2d
from detector.models.priors import AnyPriors, Points
from detector.models.refinement import AnyRefinement, Star
from detector.structures import Outputs

EVEN = 0.5  # a place's objectness before training, as long as the class's probability can make up for it


class RefinedHeadConfig(HeadConfig):
    """Towers as the dense head's, then boxes and their refinement; any rule, criterion and coder goes with it.

    VarifocalNet: points, 3 convolutions, star, start 8.  DW: points, 4 convolutions, boundary, objectness, start 4.
    """

    type: Literal["refined"] = "refined"
    priors: AnyPriors = Points()
    coder: AnyCoder = Field(Distances(), description="of what the box branch says before refinement")
    convs: int = Field(4, ge=1, description="convolutions of a tower before the one that predicts")
    level_scale: bool = Field(True, description="a learnt factor for the raw boxes of each level (FCOS)")
    refine: AnyRefinement = Field(Star(), description="the second look: boundary (DW) or star (VarifocalNet)")
    objectness: bool = Field(
        False, description="class scores are products of a class's and a place's probability, as in DW"
    )

    @model_validator(mode="after")
    def _one_prior_where_needed(self) -> RefinedHeadConfig:
        if self.refine.one_prior_a_cell and self.priors.per_cell > 1:
            raise ValueError(
                f"refine {self.refine.type!r} looks at one box a cell, but the priors have {self.priors.per_cell}: set"
                " priors={type: points}, or refine={type: boundary}"
            )
        return self

    @property
    def output_coder(self) -> Coder:
        return SIGNED

    @property
    def initial_coder(self) -> Coder:
        return self.coder

    def build(self, in_channels: int, strides: Sequence[int], num_classes: int) -> RefinedHead:
        return RefinedHead(self, in_channels, strides, num_classes)


class RefinedHead(GridHead):
    """List of L maps (B, in_channels, H, W), fine to coarse -> `Outputs`, ordered as those of `DenseHead`.

    The boxes are the refined ones, as signed distances; `initial` are the same outputs with the boxes before.
    """

    def __init__(self, config: RefinedHeadConfig, in_channels: int, strides: Sequence[int], num_classes: int) -> None:
        super().__init__(config, strides, num_classes)
        self.config = config
        levels = len(strides)

        def tower() -> nn.ModuleList:
            return nn.ModuleList(
                TowerLayer(config.channels if i else in_channels, config, levels) for i in range(config.convs)
            )

        def predict(numbers: int) -> nn.Module:
            return conv2d(config.channels, config.priors.per_cell * numbers, 3, kind=config.conv)

        self.class_tower, self.box_tower = tower(), tower()
        self.classes, self.box = predict(num_classes), predict(config.coder.channels)
        self.quality = predict(1) if config.quality else None
        self.objectness = predict(1) if config.objectness else None
        self.refine = config.refine.build(config, levels)
        self.level_scale = nn.Parameter(torch.ones(levels)) if config.level_scale else None
        initialise(self)
        probability = config.prior_probability
        if self.objectness is not None:
            place = max(EVEN, probability**0.5)
            probability = probability / place
            say(place, self.objectness)
        say(probability, self.classes)
        start_at(self.box, config, self.strides[0])

    def forward(self, maps: Sequence[Tensor]) -> Outputs:
        coder, priors = self.config.coder, self.priors(maps)
        classes, first, refined, qualities = [], [], [], []
        start = 0
        for level, x in enumerate(maps):
            for_class = for_box = x
            for layer, other in zip(self.class_tower, self.box_tower, strict=True):
                for_class, for_box = layer(for_class, level), other(for_box, level)
            raw = self.box(self.refine.before(for_box, level))
            first.append(flat(raw if self.level_scale is None else raw * self.level_scale[level], coder.channels))
            part = slice(start, start + first[-1].shape[1])
            start = part.stop
            boxes, stride = priors.boxes[part], priors.stride[part]
            initial = SIGNED.encode(boxes, stride, coder.decode(boxes, stride, first[-1]))
            for_class, distances = self.refine(for_class, for_box, initial, level)
            refined.append(distances)
            logits = flat(self.classes(for_class), self.num_classes)
            if self.objectness is not None:
                logits = product(logits, flat(self.objectness(for_box), 1))
            classes.append(logits)
            if self.quality is not None:
                qualities.append(flat(self.quality(for_box), 1))
        class_logits = torch.cat(classes, dim=1)
        quality_logits = torch.cat(qualities, dim=1).squeeze(-1) if qualities else None
        return Outputs(
            priors=priors,
            class_logits=class_logits,
            box_raw=torch.cat(refined, dim=1),
            quality_logits=quality_logits,
            coder=SIGNED,
            initial=Outputs(priors, class_logits, torch.cat(first, dim=1), quality_logits, coder),
        )
