"""Backbones: shapes, strides, freezing, norms."""

from __future__ import annotations

import copy
import logging

import pytest
import timm
import torch
from pydantic import ValidationError
from torch import nn

from detector.errors import CheckpointError, ConfigError
from detector.models.backbones import BackboneConfig
from detector.models.layers import FrozenBatchNorm2d
from detector.models.norms import activation_of, affine_of, merge_frozen, replace_batch_norms

NETWORKS = (
    "resnet18",
    "resnet50",
    "resnet101",
    "mobilenetv3_large_100",
    "mobilenetv2_100",
    "convnext_tiny",
    "swin_tiny_patch4_window7_224",
)


@pytest.mark.parametrize("name", NETWORKS)
def test_maps_have_the_stated_channels_and_strides(name: str) -> None:
    backbone = BackboneConfig(name=name).build().eval()
    assert backbone.strides == (8, 16, 32)
    for height, width in ((64, 96), (101, 75)):  # not a multiple of a patch or of a window
        with torch.no_grad():
            maps = backbone(torch.randn(1, 3, height, width))
        for x, channels, stride in zip(maps, backbone.channels, backbone.strides, strict=True):
            assert x.shape[:2] == (1, channels)
            assert x.shape[2] in (height // stride, -(-height // stride))
            assert x.shape[3] in (width // stride, -(-width // stride))


def test_swin_shifts_windows_in_its_last_stage_and_sees_no_padding_of_the_batch_size() -> None:
    backbone = BackboneConfig(name="swin_tiny_patch4_window7_224").build().eval()
    images = torch.randn(2, 3, 96, 64)
    with torch.no_grad():
        both, alone = backbone(images), backbone(images[1:])
    for x, y in zip(both, alone, strict=True):
        torch.testing.assert_close(x[1:], y, atol=1e-4, rtol=1e-4)
    assert any(backbone.features.layers_3.blocks[1].shift_size)


def test_only_the_needed_stages_are_built() -> None:
    shallow = BackboneConfig(name="resnet18", levels=(2, 3)).build()
    assert shallow.strides == (4, 8)
    assert not hasattr(shallow.features, "layer3")
    loss = sum(x.sum() for x in shallow(torch.randn(2, 3, 64, 64)))
    loss.backward()
    assert all(p.grad is not None for p in shallow.parameters())


@pytest.mark.parametrize("name", ["resnet18", "mobilenetv2_100", "convnext_tiny", "swin_tiny_patch4_window7_224"])
def test_frozen_stages_take_no_gradient_and_do_not_drift(name: str) -> None:
    backbone = BackboneConfig(name=name, freeze_stages=2).build().train()
    frozen = {key for key, value in backbone.named_parameters() if not value.requires_grad}
    last = {"resnet18": "layer1", "mobilenetv2_100": "blocks.1", "convnext_tiny": "stages_0"}.get(name, "layers_0")
    assert any(key.startswith(f"features.{last}.") for key in frozen)
    after = {"resnet18": "layer2", "mobilenetv2_100": "blocks.2", "convnext_tiny": "stages_1"}.get(name, "layers_1")
    assert not any(key.startswith(f"features.{after}.") for key in frozen)
    before = {key: value.clone() for key, value in backbone.state_dict().items()}
    optimizer = torch.optim.SGD([p for p in backbone.parameters() if p.requires_grad], lr=0.1)
    for _ in range(2):
        sum(x.square().mean() for x in backbone(torch.randn(2, 3, 64, 64))).backward()
        optimizer.step()
    changed = {key for key, value in backbone.state_dict().items() if not torch.equal(value, before[key])}
    assert all(value.grad is None for key, value in backbone.named_parameters() if key in frozen)
    stem = tuple(f"features.{part}" for part in ("conv1", "bn1", "conv_stem", "stem_", "patch_embed", last))
    assert not any(key.startswith(stem) for key in changed), "norm statistics included"
    assert any(key.startswith(f"features.{after}.") for key in changed)


def test_frozen_stages_stay_in_evaluation_mode() -> None:
    backbone = BackboneConfig(name="resnet18", freeze_stages=2).build()
    for mode in (True, False, True):
        backbone.train(mode)
        assert not backbone.features.bn1.training
        assert not backbone.features.layer1[0].bn2.training
        assert backbone.features.layer2[0].bn1.training == mode


@pytest.mark.parametrize("name", ["resnet18", "mobilenetv3_large_100"])
def test_norm_choices(name: str) -> None:
    kinds = {}
    for norm in ("batch", "frozen_batch", "sync_batch", "group"):
        backbone = BackboneConfig(name=name, norm=norm).build().train()
        assert all(x.isfinite().all() for x in backbone(torch.randn(2, 3, 64, 64)))
        kinds[norm] = {type(m) for m in backbone.modules() if "Norm" in type(m).__name__}
    assert all(issubclass(kind, nn.BatchNorm2d) for kind in kinds["batch"])
    assert kinds["frozen_batch"] == {FrozenBatchNorm2d}
    assert all(issubclass(kind, nn.SyncBatchNorm) for kind in kinds["sync_batch"])
    assert all(issubclass(kind, nn.GroupNorm) for kind in kinds["group"])


@pytest.mark.parametrize("name", ["resnet18", "mobilenetv3_large_100"])
def test_a_frozen_batch_norm_is_the_batch_norm_of_evaluation(name: str) -> None:
    features = timm.create_model(name, pretrained=False, features_only=True)
    for module in features.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean, std=0.3)
            nn.init.uniform_(module.running_var, 0.5, 2)
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.3)
            frozen = FrozenBatchNorm2d(*affine_of(module), activation_of(module)).float().train()
            x = torch.randn(2, module.num_features, 5, 4)
            torch.testing.assert_close(frozen(x), module.eval()(x), atol=1e-5, rtol=1e-5)
    assert not list(frozen.parameters())


@pytest.mark.parametrize("name", ["resnet18", "mobilenetv3_large_100"])
def test_convolutions_do_the_work_of_frozen_norms(name: str) -> None:
    """The same maps and gradients as with norms that work by themselves, the same state, and copies stand alone."""
    apart = timm.create_model(name, pretrained=False, features_only=True)
    for module in apart.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean, std=0.3)
            nn.init.uniform_(module.running_var, 0.5, 2)
            nn.init.normal_(module.bias, std=0.3)
    replace_batch_norms(apart, "frozen_batch")
    merged = copy.deepcopy(apart)
    merge_frozen(merged, 3)
    assert list(merged.state_dict()) == list(apart.state_dict())
    norms = [m for m in merged.modules() if isinstance(m, FrozenBatchNorm2d)]
    assert norms
    assert all(norm.merged for norm in norms)
    other = copy.deepcopy(merged)
    for norm in norms:  # the copy's convolutions look at the copy's norms
        norm.scale.zero_()
    x = torch.randn(2, 3, 64, 64)
    maps, expected = other.train()(x), apart.train()(x)
    torch.testing.assert_close(maps, expected, atol=1e-4, rtol=1e-4)
    gradients, wanted = (
        torch.autograd.grad(found[-1].square().mean(), list(m.parameters()))
        for found, m in ((maps, other), (expected, apart))
    )
    for ours, theirs in zip(gradients, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-3 * float(theirs.abs().max()), rtol=1e-3)


def test_strides_in_the_first_convolution() -> None:
    """As in Caffe's ResNets: the same maps' sizes and weights, other numbers (mmdetection's: see elsewhere)."""
    torch.manual_seed(0)
    late = BackboneConfig(name="resnet50", levels=(3,)).build().eval()
    early = BackboneConfig(name="resnet50", levels=(3,), stride_in="1x1").build().eval()
    nn.init.ones_(late.get_parameter("features.layer2.0.bn3.weight"))  # 0 at first: a block that does nothing
    early.load_state_dict(late.state_dict())
    block = early.features.get_submodule("layer2.0")
    assert (block.conv1.stride, block.conv2.stride) == ((2, 2), (1, 1))
    image = torch.rand(1, 3, 64, 96)
    with torch.no_grad():
        (a,), (b,) = late(image), early(image)
    assert a.shape == b.shape
    assert (a - b).abs().max() > 1e-3
    with pytest.raises(ConfigError, match="resnet18 has no bottlenecks of a ResNet: leave it at '3x3'"):
        BackboneConfig(name="resnet18", stride_in="1x1").build()


def test_frozen_norms_without_weights_are_warned_about(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        BackboneConfig(name="resnet18", norm="frozen_batch").build()
    assert "random network" in caplog.text


def test_mistakes_are_named() -> None:
    with pytest.raises(ConfigError, match=r"backbone.name: timm has no network 'resnet5'.*did you mean"):
        BackboneConfig(name="resnet5").build()
    with pytest.raises(ConfigError, match="no map of level 1"):
        BackboneConfig(name="convnext_tiny", levels=(1, 2)).build()
    with pytest.raises(ConfigError, match="no batch norm"):
        BackboneConfig(name="convnext_tiny", norm="frozen_batch").build()
    with pytest.raises(ValidationError, match="must rise"):
        BackboneConfig(levels=(4, 3))
    with pytest.raises(ValidationError, match="leave one out"):
        BackboneConfig(pretrained=True, weights="x.pth")
    with pytest.raises(ValidationError, match="choose another norm"):
        BackboneConfig(pretrained=True, norm="group")


def test_pretrained_without_a_network_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*args: object, **kwargs: object) -> None:
        raise ConnectionError("no route to host\nand more")

    monkeypatch.setattr(timm, "create_model", offline)
    with pytest.raises(CheckpointError, match=r"weights of resnet18 \(no route to host\).*backbone\.weights"):
        BackboneConfig(name="resnet18", pretrained=True).build()


def test_weights_are_not_asked_for_where_a_checkpoint_follows() -> None:
    BackboneConfig(name="resnet18", weights="missing.pth").build(load_weights=False)
    BackboneConfig(name="resnet18", pretrained=True).build(load_weights=False)
