from __future__ import annotations

import pytest
import torch
from torch import nn

from detector.train.ema import EmaConfig


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))


def test_decay_warms_up() -> None:
    ema = EmaConfig(decay=0.9, warmup=10).build(network())
    found = []
    for _ in range(200):
        found.append(ema.decay())
        ema.update()
    assert found[0] == pytest.approx(1 / 10)
    assert found[9] == pytest.approx(10 / 19)
    assert found == sorted(found)
    assert found[-1] == 0.9
    assert EmaConfig(decay=0.5, warmup=1).build(network()).decay() == 0.5


def test_averages_weights_and_statistics_by_the_formula() -> None:
    model = network()
    ema = EmaConfig(decay=0.99).build(model)
    expected = {k: v.clone().double() for k, v in model.state_dict().items()}
    for step in range(5):
        for p in model.parameters():
            p.data += torch.randn_like(p)
        model(torch.randn(8, 3))
        decay = min(0.99, (1 + step) / (10 + step))
        for name, value in model.state_dict().items():
            expected[name] = expected[name] * decay + value.double() * (1 - decay)
        ema.update()
    found = ema.model.state_dict()
    assert found["1.num_batches_tracked"] == 5  # counts are copied, not averaged
    for name in expected:
        if name != "1.num_batches_tracked":
            torch.testing.assert_close(found[name].double(), expected[name])
    assert ema.count == 5


def test_is_not_the_model_and_takes_no_gradient() -> None:
    model = network()
    ema = EmaConfig().build(model)
    model[0].weight.data += 1
    assert not torch.equal(model[0].weight, ema.model[0].weight)  # type: ignore[index]
    assert not any(p.requires_grad for p in ema.model.parameters())
    assert not ema.model.training
    assert model.training


def test_frozen_weights_stay_equal() -> None:
    model = network()
    model[0].requires_grad_(False)
    ema = EmaConfig().build(model)
    ema.update()
    assert torch.equal(model[0].weight, ema.model[0].weight)  # type: ignore[index]


def test_goes_on_from_a_checkpoint() -> None:
    model = network()
    one = EmaConfig().build(model)
    for _ in range(3):
        model[0].weight.data += 1
        one.update()
    other = EmaConfig().build(network())
    other.load(one.model.state_dict(), one.count)
    assert other.decay() == one.decay()
    for a, b in zip(one.model.state_dict().values(), other.model.state_dict().values(), strict=True):
        assert torch.equal(a, b)
