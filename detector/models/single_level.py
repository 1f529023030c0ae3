"""Two stages on one map: without a neck, and with the backbone's last stage as the box head's first part.

Legend: B images, M proposals of all images, C channels, H W cells of a map, h w bins of a proposal.

That is Faster R-CNN as published for residual networks: the RPN and the RoI operator look at C4, the map of stride 16,
and the stage that would make C5 of it works on the proposals' bins instead (Ren et al. 2015 with He et al., "Deep
Residual Learning", CVPR 2016, section 5; "C4" in detectron2).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from detector.errors import ConfigError
from detector.models.backbones import Backbone, BackboneConfig
from detector.models.fpn import FpnConfig
from detector.models.roi_head import BoxHeadConfig
from detector.pixels import Pixels


class NoNeck(nn.Module):
    """The backbone's one map as it is."""

    def __init__(self, channels: int, stride: int) -> None:
        super().__init__()
        self.channels, self.strides = channels, (stride,)

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        return list(maps)


def check_levels(backbone: BackboneConfig, neck: FpnConfig | None, head: BoxHeadConfig) -> None:
    """Raises `ValueError` where neck or head want a single level and there are several."""
    levels = backbone.levels
    if neck is None and len(levels) > 1:
        raise ValueError(
            f"neck is null, but backbone.levels are {list(levels)}: without a neck there is one map for everything; set"
            " model.backbone.levels=[4], or give the neck"
        )
    if not head.backbone_stage:
        return
    if neck is not None:
        raise ValueError(
            "head.backbone_stage goes on where the backbone's map ends, but a neck changes that map: set"
            " model.neck=null and model.backbone.levels=[4], or model.head.backbone_stage=false"
        )
    if levels[-1] == 5:
        raise ValueError(
            "head.backbone_stage is what follows the backbone's map, but nothing follows level 5: set"
            " model.backbone.levels=[4], or model.head.backbone_stage=false"
        )
    if backbone.freeze_stages > levels[-1]:
        raise ValueError(
            f"backbone.freeze_stages is {backbone.freeze_stages}, which would freeze the stage that is the head's"
            f" (head.backbone_stage): at most {levels[-1]}"
        )


def with_next_stage(config: BackboneConfig, load_weights: bool, pixels: Pixels) -> tuple[Backbone, nn.Sequential, int]:
    """The backbone up to its level, the stage after that (weights and norms as in the whole), and its channels.

    Raises `ConfigError` for networks whose stages cannot be told apart.
    """
    whole = config.model_copy(update={"levels": (config.levels[-1], config.levels[-1] + 1)})
    backbone = whole.build(load_weights=load_weights, pixels=pixels)
    features: Any = backbone.features
    if not isinstance(features, nn.ModuleDict) or backbone.channels_last_output:
        raise ConfigError(
            f"head.backbone_stage: the stages of {config.name} do not follow one another as modules of channels-first"
            " maps: use a network such as resnet50, regnety_016 or convnext_tiny, or model.head.backbone_stage=false"
        )
    names = list(features)
    info: Any = features.feature_info
    last = info.module_name(backbone.picks[0]).replace(".", "_")
    stage = nn.Sequential(*[features.pop(name) for name in names[names.index(last) + 1 :]])
    if not any(True for _ in stage.parameters()):
        raise ConfigError(
            f"head.backbone_stage: after level {config.levels[-1]}, {config.name} has nothing to learn: set"
            " model.head.backbone_stage=false"
        )
    channels = backbone.channels[1]
    backbone.picks, backbone.channels, backbone.strides = (
        backbone.picks[:1],
        backbone.channels[:1],
        backbone.strides[:1],
    )
    return backbone, stage, channels
