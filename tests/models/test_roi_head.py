"""The box head's layers beside plain ones of torch."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.testing import assert_close

from detector.models.roi_head import AS_CONVOLUTION, BoxHead, BoxHeadConfig


@pytest.mark.parametrize("proposals", [AS_CONVOLUTION, AS_CONVOLUTION - 1, 1, 0])
@pytest.mark.parametrize("memory", [torch.channels_last, torch.contiguous_format])
def test_many_proposals_have_the_same_layers_as_few(proposals: int, memory: torch.memory_format) -> None:
    torch.manual_seed(0)
    head = BoxHeadConfig(channels=24).build(6, (3, 2), 4)
    features = torch.randn(proposals, 6, 3, 2).to(memory_format=memory).requires_grad_()
    wanted = features.detach().clone().requires_grad_()

    with torch.no_grad():
        inferred = head(features)
    found = head(features)
    assert [x.shape for x in found] == [(proposals, 5), (proposals, 4, 4)]
    plain = _plainly(head, wanted)
    assert_close(found, plain, rtol=1e-5, atol=1e-5)
    assert_close(inferred, plain, rtol=1e-5, atol=1e-5)

    parameters = list(head.parameters())
    ours, theirs = (
        torch.autograd.grad(classes.sin().sum() + boxes.cos().sum(), [x, *parameters])
        for x, (classes, boxes) in ((features, found), (wanted, plain))
    )
    assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def _plainly(head: BoxHead, features: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    x = features.flatten(1)
    for layer in head.linear:
        assert isinstance(layer, nn.Linear)
        x = F.linear(x, layer.weight, layer.bias).relu()
    return head.classes(x), head.box(x).view(len(x), 4, 4)
