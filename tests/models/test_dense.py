"""The whole network: input, batch independence, folding, half precision, export."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

from detector.models.dense import DenseConfig, DenseDetector
from detector.models.fold import fold_batch_norm

LIGHT = {
    "backbone": {"name": "mobilenetv2_100", "levels": [3, 4, 5]},
    "neck": {"channels": 32, "norm": "batch", "extra_levels": 1},
    "head": {
        "channels": 32,
        "convs": 2,
        "norm": "batch",
        "conv": "separable",
        "quality": True,
        "priors": {"type": "points"},
    },
}


def _build(**backbone) -> DenseDetector:  # type: ignore[no-untyped-def]
    torch.manual_seed(0)
    config = DenseConfig.model_validate(LIGHT | {"backbone": LIGHT["backbone"] | backbone})
    model = config.build(5)
    # Norms with the statistics of their inputs, and outputs that depend visibly on the image, as after training.
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d | nn.SyncBatchNorm):
            nn.init.uniform_(module.weight, 0.8, 1.5)
            nn.init.normal_(module.bias, std=0.1)
            module.momentum = 1.0
    for module in (model.head.classes, model.head.box, model.head.quality):
        nn.init.normal_(module[1].weight, std=0.2)
    model.train()(torch.cat([_images(4), _images(4).flip(0, 3) // 2]))
    return model.eval()


def _images(batch: int = 1, height: int = 97, width: int = 130) -> torch.Tensor:
    return torch.randint(0, 256, (batch, 3, height, width), generator=torch.Generator().manual_seed(1)).byte()


def test_retinanet_is_the_default() -> None:
    outputs = DenseConfig().build(80)(_images(2, 64, 96))
    assert outputs.class_logits.shape == (2, len(outputs.priors), 80)
    assert [grid.stride for grid in outputs.priors.grids] == [8, 16, 32, 64, 128]
    assert len(outputs.priors.grids[0].shapes) == 9


@pytest.mark.parametrize("size", [(64, 64), (97, 130), (33, 250)])
def test_any_size(size: tuple[int, int]) -> None:
    outputs = _build()(_images(1, *size))
    assert [(grid.height, grid.width) for grid in outputs.priors.grids] == [
        (-(-size[0] // s), -(-size[1] // s)) for s in (8, 16, 32, 64)
    ]
    assert outputs.boxes.isfinite().all()


def test_images_are_normalised_to_what_the_backbone_expects() -> None:
    seen = []
    model = _build(mean=[100, 110, 120], std=[50, 60, 70])
    model.backbone.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    images = _images()
    model(images)
    model(images.float())
    expected = (images.float() - torch.tensor([100.0, 110, 120])[:, None, None]) / torch.tensor([50.0, 60, 70])[
        :, None, None
    ]
    torch.testing.assert_close(seen[0], expected)
    torch.testing.assert_close(seen[1], expected)
    torch.testing.assert_close(torch.tensor(_build().backbone.mean), 255 * torch.tensor([0.485, 0.456, 0.406]))


def test_an_image_alone_is_an_image_in_a_batch() -> None:
    model, images = _build(), _images(4)
    with torch.no_grad():
        together = model(images)
        for i in range(4):
            alone = model(images[i : i + 1])
            torch.testing.assert_close(alone.class_logits[0], together.class_logits[i], atol=1e-4, rtol=1e-4)
            torch.testing.assert_close(alone.boxes[0], together.boxes[i], atol=1e-2, rtol=1e-3)


@pytest.mark.parametrize("name", ["mobilenetv2_100", "resnet18"])
@pytest.mark.parametrize("norm", ["batch", "frozen_batch", "sync_batch"])
def test_folded_batch_norms_change_nothing(name: str, norm: str) -> None:
    model = _build(name=name, norm=norm)
    before = copy.deepcopy(model.state_dict())
    folded = fold_batch_norm(model)
    assert not [m for m in folded.modules() if "BatchNorm" in type(m).__name__]
    with torch.no_grad():
        a, b = model(_images(2)), folded(_images(2))
    assert a.class_logits.std() > 0.05
    torch.testing.assert_close(a.class_logits, b.class_logits, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(a.box_raw, b.box_raw, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(a.quality_logits, b.quality_logits, atol=1e-4, rtol=1e-4)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_networks_without_batch_norm_fold_to_themselves() -> None:
    model = DenseConfig.model_validate(
        {"backbone": {"name": "convnext_tiny"}, "neck": {"channels": 16}, "head": {"channels": 16, "convs": 1}}
    ).build(3)
    with torch.no_grad():
        a, b = model.eval()(_images()), fold_batch_norm(model)(_images())
    torch.testing.assert_close(a.class_logits, b.class_logits)


def test_memory_order_changes_nothing() -> None:
    model, images = _build(), _images(2)
    with torch.no_grad():
        ours = model(images)
        from_hwc = model(images.contiguous(memory_format=torch.channels_last))
        other = copy.deepcopy(model).to(memory_format=torch.channels_last)(images)
    torch.testing.assert_close(ours.class_logits, other.class_logits, atol=1e-4, rtol=1e-4)
    assert torch.equal(ours.class_logits, from_hwc.class_logits)


@pytest.mark.parametrize("norm", ["batch", "frozen_batch"])
@pytest.mark.parametrize("fold", [False, True])
def test_half_precision_inference(norm: str, fold: bool) -> None:
    model = _build(norm=norm)
    with torch.no_grad():
        exact = model(_images())
        half = (fold_batch_norm(model) if fold else copy.deepcopy(model)).to(torch.bfloat16)(_images())
    assert half.class_logits.dtype == torch.bfloat16
    assert half.boxes.dtype == torch.float32
    assert torch.corrcoef(torch.stack([half.class_logits.float().flatten(), exact.class_logits.flatten()]))[0, 1] > 0.93


def test_autocast_keeps_frozen_norms_in_half_precision() -> None:
    model = _build(norm="frozen_batch")
    seen = []
    model.backbone.features.blocks[1].register_forward_hook(lambda m, i, output: seen.append(output.dtype))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        model(_images())
    assert seen == [torch.bfloat16]


def test_copies_and_pickles_after_use() -> None:
    model = _build()
    model(_images())
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        torch.testing.assert_close(other(_images()).class_logits, model(_images()).class_logits)


class _Tensors(nn.Module):
    def __init__(self, model: DenseDetector) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        outputs = self.model(images)
        return outputs.class_logits, outputs.boxes


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("how", ["trace", "export"])
def test_exports(how: str) -> None:
    module, images = _Tensors(_build(name="resnet18", levels=[3, 4])), _images()
    with torch.no_grad():
        exported = (
            torch.jit.trace(module, images, check_trace=False)
            if how == "trace"
            else torch.export.export(module, (images,)).module()
        )
        for a, b in zip(exported(images), module(images), strict=True):
            torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)
