from __future__ import annotations

import pytest
import torch
from torch import nn

from detector.models.dense import DenseConfig
from detector.train.optim import AdamW, Sgd, parameter_groups
from detector.train.step import TrainingModule, set_lr


def training_module(**backbone: object) -> TrainingModule:
    config = DenseConfig.model_validate(
        {
            "backbone": {"name": "test_resnet", **backbone},
            "neck": {"channels": 16},
            "head": {"channels": 16, "convs": 1, "level_scale": True, "quality": True},
        }
    )
    criterion = nn.Module()
    criterion.prior = nn.Parameter(torch.zeros(2, 2))
    return TrainingModule(config.build(num_classes=3), criterion)


def test_every_parameter_is_in_exactly_one_group() -> None:
    module = training_module()
    groups = parameter_groups(module, lr=0.1, backbone_lr_scale=0.1, weight_decay=0.01)
    listed = [id(p) for group in groups for p in group["params"]]
    assert sorted(listed) == sorted(id(p) for p in module.parameters())
    assert len(groups) == 4

    names = {id(p): name for name, p in module.named_parameters()}
    modules = dict(module.named_modules())
    for group in groups:
        for parameter in group["params"]:
            name = names[id(parameter)]
            assert group["lr"] == pytest.approx(0.01 if name.startswith("model.backbone.") else 0.1)
            owner = modules[name.rpartition(".")[0]]
            is_weight = isinstance(owner, nn.Conv2d) and name.endswith(".weight")
            assert group["weight_decay"] == (0.01 if is_weight or name == "criterion.prior" else 0), name


def test_frozen_parameters_are_left_out() -> None:
    module = training_module(freeze_stages=3)
    frozen = {id(p) for p in module.parameters() if not p.requires_grad}
    listed = {id(p) for group in parameter_groups(module, 0.1, 1.0, 0.0) for p in group["params"]}
    assert frozen
    assert not frozen & listed
    assert len(frozen) + len(listed) == len(list(module.parameters()))


def test_position_biases_of_transformers_do_not_decay() -> None:
    module = nn.Module()
    module.relative_position_bias_table = nn.Parameter(torch.zeros(9, 2))
    module.pos_embed = nn.Parameter(torch.zeros(1, 9, 2))
    module.weight = nn.Parameter(torch.zeros(9, 2))
    decays = {len(g["params"]): g["weight_decay"] for g in parameter_groups(module, 0.1, 1.0, 0.5)}
    assert decays == {2: 0.0, 1: 0.5}


def test_learning_rate_scales_with_the_batch_and_says_so() -> None:
    assert Sgd(lr=0.01, base_batch=16).scaled_lr(4) == pytest.approx(0.0025)
    assert Sgd(lr=0.01, base_batch=None).scaled_lr(4) == 0.01
    text = Sgd(lr=0.01, base_batch=16, backbone_lr_scale=0.1).explain(4)
    assert text.startswith("learning rate 0.0025 = 0.01 * 4/16")
    assert text.endswith("backbone 0.00025")
    assert AdamW(lr=1e-3, base_batch=4).explain(4) == "learning rate 0.001"


@pytest.mark.parametrize("config", [Sgd(lr=0.16, momentum=0.8), AdamW(lr=0.16)])
def test_builds_torchs_optimiser_with_rates_of_the_batch(config: Sgd | AdamW) -> None:
    module = training_module()
    optimizer = config.build(module, batch=4)
    assert type(optimizer).__name__.lower() == config.type
    assert {round(g["lr"], 9) for g in optimizer.param_groups} == {0.04}
    set_lr(optimizer, 0.5)
    set_lr(optimizer, 0.25)  # of the full rate, not of the last one
    assert {round(g["lr"], 9) for g in optimizer.param_groups} == {0.01}
