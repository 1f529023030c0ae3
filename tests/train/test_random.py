"""The first weights: by name and seed, in the way in which they were drawn, and nothing else is touched."""

from __future__ import annotations

import torch
from torch import nn

from detector.train.random import InitialWeights


def build(first: int, seed: int = 0, loaded: torch.Tensor | None = None) -> nn.Module:
    """A network whose parts are drawn one after the other from the global generator."""
    torch.manual_seed(3)
    with InitialWeights() as drawn:
        module = nn.ModuleDict({"first": nn.Linear(4, first), "second": nn.Linear(5, 6), "norm": nn.BatchNorm1d(6)})
        with torch.no_grad():
            module["second"].weight.normal_(std=0.02).clamp_(-0.03, 0.03)
            module["second"].bias.uniform_().mul_(2).add_(10)
            if loaded is not None:
                module["second"].weight.copy_(loaded)
    drawn.again(module.named_parameters(), seed)
    return module


def test_a_larger_neighbour_shifts_nothing() -> None:
    one, other = build(3), build(700)
    assert torch.equal(one["second"].weight, other["second"].weight)
    assert torch.equal(one["second"].bias, other["second"].bias)
    assert not torch.equal(one["second"].weight, build(3, seed=1)["second"].weight)
    assert torch.equal(one["first"].weight, build(3)["first"].weight)


def test_what_came_after_the_draw_is_repeated() -> None:
    weight, bias = build(3)["second"].weight, build(3)["second"].bias
    assert weight.abs().max() <= 0.03  # clamped as before
    assert 10 <= float(bias.detach().min()) <= float(bias.detach().max()) <= 12


def test_what_is_drawn_elsewhere_stays_as_it_was_built() -> None:
    torch.manual_seed(3)
    plain = nn.Linear(30, 40)
    nn.init.orthogonal_(plain.weight)
    torch.manual_seed(3)
    with InitialWeights() as drawn:
        module = nn.Linear(30, 40)
        nn.init.orthogonal_(module.weight)
    drawn.again(module.named_parameters(), 0)
    assert torch.equal(module.weight, plain.weight)


def test_constants_and_loaded_weights_stay() -> None:
    loaded = torch.arange(30.0).view(6, 5)
    module = build(3, loaded=loaded)
    assert torch.equal(module["second"].weight, loaded)
    assert torch.equal(module["norm"].weight, torch.ones(6))
    assert torch.equal(module["norm"].bias, torch.zeros(6))


def test_the_global_generator_goes_on_as_if_nothing_had_happened() -> None:
    module = nn.Linear(2, 2)
    with InitialWeights() as drawn:
        nn.init.normal_(module.weight)
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    drawn.again(module.named_parameters(), 0)
    assert torch.equal(torch.rand(3), expected)
