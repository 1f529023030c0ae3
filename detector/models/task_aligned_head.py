"""The task-aligned head, or T-head (Feng et al., "TOOD: Task-aligned One-stage Object Detection", ICCV 2021).

Legend: B images, L levels, R priors, K classes, A priors in a cell, C numbers of a box, T channels, S tower layers.

One tower serves both tasks; each looks at all of its layers, weighted by attention, and then corrects its answer by
what the other needs: class scores by a map of how well a place is aligned, boxes by looking for a better box nearby.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from detector.coders import AnyCoder, Coder, Distances
from detector.models.corrections import SIGNED, geometric_mean, look_up
from detector.models.dense_head import GridHead, TowerLayer, flat
from detector.models.heads import HeadConfig, initialise, say, start_at
from detector.models.layers import conv2d
from detector.structures import Outputs

ATTENTION_WIDTH = 8  # the attention's hidden layer is so many times narrower than the tower's layers together
ALIGNMENT_WIDTH = 4  # the alignment's hidden layer is so many times narrower than the tower


class TaskAlignedHeadConfig(HeadConfig):
    """TOOD's head; any rule, criterion, prior and coder goes with it.  As published: one anchor, 6 layers, exp."""

    type: Literal["task_aligned"] = "task_aligned"
    coder: AnyCoder = Field(Distances(), description="of what the box branch says before alignment")
    convs: int = Field(6, ge=1, description="layers of the tower; both tasks see all of them")
    level_scale: bool = Field(True, description="a learnt factor for the raw boxes of each level (FCOS)")

    @property
    def output_coder(self) -> Coder:
        return SIGNED

    def build(self, in_channels: int, strides: Sequence[int], num_classes: int) -> TaskAlignedHead:
        return TaskAlignedHead(self, in_channels, strides, num_classes)


class Decomposition(nn.Module):
    """What one task takes from the tower: its layers weighted by attention, then mixed (equations 1 to 3)."""

    def __init__(self, config: TaskAlignedHeadConfig, levels: int) -> None:
        super().__init__()
        width = config.convs * config.channels
        hidden = max(1, width // ATTENTION_WIDTH)
        self.layers = config.convs
        self.attention = nn.Sequential(
            nn.Conv2d(width, hidden, 1), nn.ReLU(inplace=True), nn.Conv2d(hidden, config.convs, 1), nn.Sigmoid()
        )
        self.mix = TowerLayer(width, config, levels, kernel_size=1)

    def forward(self, layers: Tensor, average: Tensor, level: int) -> Tensor:
        """(B, S T, H, W), their mean over the map (B, S T, 1, 1) -> (B, T, H, W)."""
        attention = self.attention(average)[:, :, None]
        return self.mix((layers.unflatten(1, (self.layers, -1)) * attention).flatten(1, 2), level)


class TaskAlignedHead(GridHead):
    """List of L maps (B, in_channels, H, W), fine to coarse -> `Outputs`, ordered as those of `DenseHead`.

    Scores are the geometric mean of the class's and the place's probability (equation 5); they leave as logits.  Each
    side of a box is read off the boxes around, bilinearly at a learnt offset (equation 6); what leaves are distances.
    Beyond the map's edge its last boxes count (the authors': zeros), and a box turned inside out stays unaligned.
    """

    def __init__(
        self, config: TaskAlignedHeadConfig, in_channels: int, strides: Sequence[int], num_classes: int
    ) -> None:
        super().__init__(config, strides, num_classes)
        self.config = config
        levels, width, per_cell = len(strides), config.convs * config.channels, config.priors.per_cell
        hidden = max(1, config.channels // ALIGNMENT_WIDTH)

        def predict(numbers: int) -> nn.Module:
            return conv2d(config.channels, per_cell * numbers, 3, kind=config.conv)

        def align(numbers: int) -> nn.Module:
            return nn.Sequential(
                nn.Conv2d(width, hidden, 1),
                nn.ReLU(inplace=True),
                conv2d(hidden, per_cell * numbers, 3, kind=config.conv),
            )

        self.tower = nn.ModuleList(
            TowerLayer(config.channels if i else in_channels, config, levels) for i in range(config.convs)
        )
        self.for_class, self.for_box = Decomposition(config, levels), Decomposition(config, levels)
        self.classes, self.box = predict(num_classes), predict(config.coder.channels)
        self.quality = predict(1) if config.quality else None
        self.alignment, self.offsets = align(1), align(8)
        self.level_scale = nn.Parameter(torch.ones(levels)) if config.level_scale else None
        initialise(self)
        say(config.prior_probability, self.classes)
        say(config.prior_probability, self.alignment)
        start_at(self.box, config, self.strides[0])

    def forward(self, maps: Sequence[Tensor]) -> Outputs:
        priors = self.priors(maps)
        classes, boxes, qualities = [], [], []
        start = 0
        for level, x in enumerate(maps):
            outputs = []
            for layer in self.tower:
                x = layer(x, level)
                outputs.append(x)
            layers = torch.cat(outputs, 1)
            average = layers.mean((2, 3), keepdim=True)
            for_class, for_box = (task(layers, average, level) for task in (self.for_class, self.for_box))

            classes.append(
                geometric_mean(flat(self.classes(for_class), self.num_classes), flat(self.alignment(layers), 1))
            )
            raw = self.box(for_box)
            raw = flat(raw if self.level_scale is None else raw * self.level_scale[level], self.config.coder.channels)
            part = slice(start, start + raw.shape[1])
            start = part.stop
            decoded = self.config.coder.decode(priors.boxes[part], priors.stride[part], raw)
            aligned = look_up(decoded, self.offsets(layers))
            boxes.append(SIGNED.encode(priors.boxes[part], priors.stride[part], aligned))
            if self.quality is not None:
                qualities.append(flat(self.quality(for_box), 1))
        return Outputs(
            priors=priors,
            class_logits=torch.cat(classes, dim=1),
            box_raw=torch.cat(boxes, dim=1),
            quality_logits=torch.cat(qualities, dim=1).squeeze(-1) if qualities else None,
            coder=SIGNED,
        )
