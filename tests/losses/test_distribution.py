"""Distribution focal loss: golden values, by hand, and through the criterion."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

from detector.coders import Bins
from detector.losses.distribution import DistributionFocal


@pytest.mark.parametrize("scenario", ["extreme", "all_background", "one"])
def test_golden(golden, scenario: str) -> None:  # type: ignore[no-untyped-def]
    """The fixture has one row a side, ours are boxes of four sides: each side is put in all four."""
    s = golden("cls_losses").scenario(scenario)
    logits, target = s["dfl_logits"].requires_grad_(), s["dfl_target"]
    each = DistributionFocal()(logits.repeat(1, 4), target[:, None].expand(-1, 4), Bins())
    assert_close(each.detach(), s["dfl_none/loss"], rtol=1e-5, atol=1e-5)
    (gradient,) = torch.autograd.grad(each.sum(), logits, retain_graph=True)
    assert_close(gradient, s["dfl_none/grad"], rtol=1e-4, atol=1e-6)
    weighted = (each * s["dfl_weight"]).sum() * 0.25 / 4  # the weight of the term, and its four sides
    (gradient,) = torch.autograd.grad(weighted, logits)
    assert_close(weighted.detach(), s["dfl_weighted/loss"].squeeze(), rtol=1e-5, atol=1e-5)
    assert_close(gradient, s["dfl_weighted/grad"], rtol=1e-4, atol=1e-6)


def test_by_hand() -> None:
    """Distance 2.25 of three quarters to bin 2, one quarter to bin 3; a distance on a bin and one past the last."""
    coder = Bins(reg_max=4)
    logits = torch.tensor([[0.1, 0.2, 0.9, -0.3, 0.0]])
    log_share = logits.log_softmax(-1)[0]
    distances = torch.tensor([[2.25, 1.0, 4.0, 0.0]])
    expected = -torch.stack(
        [
            0.75 * log_share[2] + 0.25 * log_share[3],
            log_share[1],
            0.1 * log_share[3] + 0.9 * log_share[4],
            log_share[0],
        ]
    ).mean()
    assert_close(DistributionFocal()(logits.repeat(1, 4), distances, coder)[0], expected)
    without = -(0.75 * log_share[2] + 0.25 * log_share[3] + log_share[1] + log_share[4] + log_share[0]) / 4
    assert_close(DistributionFocal(margin=0)(logits.repeat(1, 4), distances, coder)[0], without)
