"""Backbones: any network of timm that gives feature maps."""

from __future__ import annotations

import difflib
import logging
from pathlib import Path
from typing import Annotated, Any, Literal

import timm
import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from detector.config.node import Node
from detector.errors import CheckpointError, ConfigError
from detector.models.freeze import freeze
from detector.models.layers import BackboneNorm
from detector.models.norms import merge_frozen, replace_batch_norms
from detector.models.strides import stride_first
from detector.models.weights import LoadedWeights, load_weights
from detector.pixels import RGB, Pixels

log = logging.getLogger(__name__)

Level = Annotated[int, Field(ge=1, le=5)]
Pixel = Annotated[float, Field(ge=0, le=255)]


class BackboneConfig(Node):
    """A classification network as feature extractor; level n is its last map of stride 2**n."""

    type: Literal["timm"] = "timm"
    name: str = Field("resnet50", min_length=1, description="timm's name of the network")
    pretrained: bool = Field(False, description="start from timm's ImageNet weights (downloaded once)")
    weights: Path | None = Field(None, description="start from this .safetensors or .pth file with timm's names")
    levels: tuple[Level, ...] = Field((3, 4, 5), min_length=1, description="maps of stride 2**level for the neck")
    output_stride: Literal[8, 16, 32] | None = Field(
        None,
        description="no map is coarser: deeper stages are dilated (16 and level 4: DC5), if the network can",
    )
    freeze_stages: int = Field(
        0, ge=0, le=5, description="fixed: all up to the map of stride 2**n (2: stem and stage 1)"
    )
    norm: BackboneNorm | None = Field(None, description="what its batch norms become; null leaves the network as it is")
    stride_in: Literal["3x3", "1x1"] = Field(
        "3x3",
        description="the convolution of a ResNet's bottleneck that halves the map: 1x1 in Caffe's and Detectron's",
    )
    mean: tuple[Pixel, Pixel, Pixel] | None = Field(None, description="RGB in 0..255; null: what timm's weights expect")
    std: tuple[Pixel, Pixel, Pixel] | None = Field(None, description="RGB in 0..255; null: what timm's weights expect")

    @model_validator(mode="after")
    def _consistent(self) -> BackboneConfig:
        if list(self.levels) != sorted(set(self.levels)):
            raise ValueError(f"levels {list(self.levels)} must rise, each once: write {sorted(set(self.levels))}")
        if self.pretrained and self.weights is not None:
            raise ValueError("pretrained and weights are both set: leave one out")
        if self.norm == "group" and (self.pretrained or self.weights is not None):
            raise ValueError(
                "norm 'group' would discard the statistics that the given weights need: choose another norm"
            )
        if self.std is not None and min(self.std) <= 0:
            raise ValueError(f"std {list(self.std)} must be positive")
        return self

    def build(self, *, load_weights: bool = True, pixels: Pixels = RGB) -> Backbone:
        """The network; without `load_weights` it is left random, for a checkpoint that follows.

        Raises `ConfigError` for a network or a level that timm does not have, `CheckpointError` where weights cannot be
        had or do not fit.
        """
        return Backbone(self, load_weights=load_weights, pixels=pixels)


class Backbone(nn.Module):
    """(B, C, H, W) normalised images -> one (B, C, ~H / stride, ~W / stride) map for each configured level.

    `channels` and `strides` say what the maps are, `mean` and `std` (in the images' own numbers) what input is
    wanted, `loaded` what came from a local file.  Frozen stages take no gradient and stay in evaluation mode.
    """

    def __init__(self, config: BackboneConfig, *, load_weights: bool = True, pixels: Pixels = RGB) -> None:
        super().__init__()
        pretrained = config.pretrained and load_weights
        features = _create(config, pretrained, pixels.channels)
        reductions = list(features.feature_info.reduction())
        self.picks = [_index(config, reductions, level) for level in config.levels]
        frozen = _index(config, reductions, config.freeze_stages) if config.freeze_stages else None
        depth = max(self.picks[-1], frozen or 0) + 1
        if depth < len(reductions):  # deeper stages would be parameters without a gradient
            features = _create(config, pretrained, pixels.channels, tuple(range(depth)))
        local = config.weights if load_weights else None
        self.loaded = None if local is None else _load(features, config.name, local, pixels.channels)
        if config.stride_in == "1x1" and stride_first(features) == 0:
            raise ConfigError(f"backbone.stride_in: {config.name} has no bottlenecks of a ResNet: leave it at '3x3'")
        if config.norm == "frozen_batch" and load_weights and not pretrained and self.loaded is None:
            log.warning("backbone.norm: the frozen batch norms of a random network do nothing; give it weights")
        # Found before the norms change: a frozen batch norm has no parameters to find it by.
        self._frozen = [] if frozen is None else freeze(features, frozen, pixels.channels)
        if config.norm is not None and replace_batch_norms(features, config.norm) == 0:
            raise ConfigError(f"backbone.norm: {config.name} has no batch norm to become {config.norm!r}; use null")
        if config.norm == "frozen_batch":
            merge_frozen(features, pixels.channels)
        for name in self._frozen:
            features.get_submodule(name).requires_grad_(False)
        self.features = features
        self.channels = tuple(features.feature_info.channels()[i] for i in self.picks)
        self.strides = tuple(reductions[i] for i in self.picks)
        self.channels_last_output = str(getattr(features, "output_fmt", "NCHW")).endswith("NHWC")
        expected = timm.get_pretrained_cfg(config.name)
        mean, std = ([255 * value for value in values] for values in (expected.mean, expected.std))
        self.mean, self.std = pixels.standard(config.mean or mean, config.std or std)
        self.train()

    def forward(self, images: Tensor) -> list[Tensor]:
        maps = self.features(images)
        picked = [maps[i] for i in self.picks]
        return [x.permute(0, 3, 1, 2) for x in picked] if self.channels_last_output else picked

    def train(self, mode: bool = True) -> Backbone:
        super().train(mode)
        for name in self._frozen:
            self.features.get_submodule(name).eval()
        return self


def _create(config: BackboneConfig, pretrained: bool, channels: int, out_indices: tuple[int, ...] | None = None) -> Any:
    name = config.name
    if not timm.is_model(name):
        near = difflib.get_close_matches(name.split(".")[0], timm.list_models(), n=1)
        raise ConfigError(
            f"backbone.name: timm has no network {name!r}{f' (did you mean {near[0]!r}?)' if near else ''}"
        )
    options: dict[str, Any] = {"in_chans": channels} | ({} if out_indices is None else {"out_indices": out_indices})
    if config.output_stride is not None:
        options["output_stride"] = config.output_stride
    is_swin = timm.model_entrypoint(name).__module__ == "timm.models.swin_transformer"
    if is_swin:
        # Any image size, and shifted windows in the last stage too, which timm leaves out for 224 pixels.
        options |= {"strict_img_size": False, "always_partition": True}
    try:
        features = timm.create_model(name, pretrained=pretrained, features_only=True, **options)
    except (TypeError, NotImplementedError, AssertionError) as error:
        if config.output_stride is None:
            raise
        raise ConfigError(f"backbone.output_stride: {name} cannot be dilated ({error}); use null") from error
    except Exception as error:  # whatever the hub, its network library or a damaged download raises
        if not pretrained:
            raise
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise CheckpointError(
            f"backbone.pretrained: cannot get the weights of {name} ({reason}); without a network, name a local file"
            " with backbone.weights and set backbone.pretrained=false"
        ) from error
    if is_swin:
        features.patch_embed.dynamic_img_pad = True  # sizes that are no multiple of a patch
    return features


def _index(config: BackboneConfig, reductions: list[int], level: int) -> int:
    if 2**level not in reductions:
        has = ", ".join(str(r.bit_length() - 1) for r in reductions)
        raise ConfigError(
            f"backbone: {config.name} has no map of level {level} (stride {2**level}); it has levels {has}"
        )
    return len(reductions) - 1 - reductions[::-1].index(2**level)


def _load(features: nn.Module, name: str, path: Path, channels: int) -> LoadedWeights:
    with torch.device("meta"):  # the names alone
        known = set(timm.create_model(name, pretrained=False).state_dict())
    loaded = load_weights(features, path, name=name, known=known, channels=channels)
    log.info("%s: %s", path, loaded)
    return loaded
