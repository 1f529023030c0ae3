from __future__ import annotations

import pytest
import torch
from torch import Tensor

from detector.errors import NonFiniteLoss
from detector.structures import Batch
from detector.train.ema import EmaConfig
from detector.train.finite import FiniteCheck
from detector.train.step import Stepper, StepResult, TrainingModule
from tests.train.toys import ToyCriterion, ToyModel, split, toy_batch


def off(device: str = "cpu") -> torch.amp.GradScaler:
    return torch.amp.GradScaler(device, enabled=False)


def gradients(parts: list[Batch], dtype: torch.dtype = torch.float64) -> tuple[list[Tensor], StepResult]:
    torch.manual_seed(0)
    module = TrainingModule(ToyModel(), ToyCriterion()).to(dtype)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    result = Stepper(module, optimizer, off(), None)(parts)
    return [p.grad for p in module.parameters() if p.grad is not None], result


@pytest.mark.parametrize("counts", [[3, 1, 2, 5], [0, 0, 2, 5], [2, 1, 0, 0], [0, 0, 0, 0]])
@pytest.mark.parametrize("sizes", [[2, 2], [1, 1, 1, 1]])
def test_a_step_in_parts_is_the_whole_step(counts: list[int], sizes: list[int]) -> None:
    """Although the parts have different numbers of objects, or none."""
    batch = toy_batch(counts)
    whole, one = gradients([batch])
    parts, several = gradients(split(batch, sizes))
    for a, b in zip(whole, parts, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-9)  # the normaliser is float32
    for name in one.terms:
        torch.testing.assert_close(one.terms[name], several.terms[name])
    torch.testing.assert_close(one.gradient_norm, several.gradient_norm)
    assert one.positives == several.positives == sum(counts)


def test_the_loss_is_all_terms_over_the_normaliser() -> None:
    batch = toy_batch([3, 1])
    torch.manual_seed(0)
    module = TrainingModule(ToyModel(), ToyCriterion())
    losses = module(batch)
    losses.total.backward()
    expected = [p.grad for p in module.parameters()]
    found, result = gradients([batch], torch.float32)
    for a, b in zip(expected, found, strict=True):
        torch.testing.assert_close(a, b)
    torch.testing.assert_close(sum(result.terms.values()), losses.total.detach())


def test_clipping_keeps_the_direction() -> None:
    batch = toy_batch([1, 1])
    free, result = gradients([batch])
    torch.manual_seed(0)
    module = TrainingModule(ToyModel(), ToyCriterion()).double()
    clipped = Stepper(module, torch.optim.SGD(module.parameters(), lr=0.1), off(), clip_norm=0.01)([batch])
    assert clipped.gradient_norm == result.gradient_norm  # before clipping
    norm = torch.stack([p.grad.square().sum() for p in module.parameters() if p.grad is not None]).sum().sqrt()
    assert float(norm) == pytest.approx(0.01, rel=1e-4)
    for p, whole in zip(module.parameters(), free, strict=True):
        torch.testing.assert_close(p.grad, whole * (norm / result.gradient_norm))


@pytest.mark.parametrize(("precision", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16)])
def test_only_the_network_runs_under_autocast(precision, dtype: torch.dtype) -> None:  # type: ignore[no-untyped-def]
    module = TrainingModule(ToyModel(), ToyCriterion(), precision)
    losses = module(toy_batch([1]))
    assert module.criterion.dtypes == [dtype]
    assert all(value.dtype == torch.float32 for value in losses.sums.values())


def test_half_precision_with_a_scaler_gives_the_same_gradient() -> None:
    batch = toy_batch([3, 1, 2, 2])
    expected, _ = gradients([batch], torch.float32)
    torch.manual_seed(0)
    module = TrainingModule(ToyModel(), ToyCriterion())
    scaler = torch.amp.GradScaler("cpu")
    result = Stepper(module, torch.optim.SGD(module.parameters(), lr=0.1), scaler, None)(split(batch, [2, 2]))
    assert float(result.gradient_norm) == pytest.approx(float(torch.cat([g.flatten() for g in expected]).norm()))
    for p, whole in zip(module.parameters(), expected, strict=True):
        torch.testing.assert_close(p.grad, whole)


class TestFiniteCheck:
    def result(self, **terms: float) -> StepResult:
        return StepResult({k: torch.tensor(v) for k, v in terms.items()}, torch.tensor(1.0), torch.tensor(1.0))

    def test_names_step_term_and_images(self) -> None:
        check = FiniteCheck(torch.device("cpu"), scaled=False)
        check.add(1, self.result(a=1.0, b=2.0), torch.tensor([5, 6]))
        with pytest.raises(NonFiniteLoss, match=r"step 2: training has diverged: b is nan \(image ids 7, 8\)"):
            check.add(2, self.result(a=1.0, b=float("nan")), torch.tensor([7, 8]))

    def test_the_first_bad_step_is_named(self) -> None:
        check = FiniteCheck(torch.device("cpu"), scaled=True)
        with pytest.raises(NonFiniteLoss, match="step 3"):
            check.add(3, self.result(a=float("inf")), torch.tensor([1]))
        with pytest.raises(NonFiniteLoss, match=r"step 3.*a is inf.*precision=bf16"):
            check.add(4, self.result(a=float("nan")), torch.tensor([2]))

    def test_terms_may_change(self) -> None:
        check = FiniteCheck(torch.device("cpu"), scaled=False)
        check.add(1, self.result(a=1.0), torch.tensor([1]))
        check.add(2, self.result(a=1.0, b=1.0), torch.tensor([1]))
        check.check()
        with pytest.raises(NonFiniteLoss, match="c is inf"):
            check.add(3, self.result(a=1.0, c=float("inf")), torch.tensor([1]))

    @pytest.mark.parametrize("scaled", [False, True])
    def test_infinite_gradients_count_unless_they_are_scaled(self, scaled: bool) -> None:
        check = FiniteCheck(torch.device("cpu"), scaled)
        step = StepResult({"a": torch.tensor(1.0)}, torch.tensor(float("inf")), torch.tensor(1.0))
        if scaled:
            check.add(1, step, torch.tensor([1]))
        else:
            with pytest.raises(NonFiniteLoss, match="gradient is inf"):
                check.add(1, step, torch.tensor([1]))

    def test_an_assigner_that_refuses_predictions_is_understood(self) -> None:
        check = FiniteCheck(torch.device("cpu"), scaled=False)
        check.explain(RuntimeError("something else"), 4, torch.tensor([9]))
        with pytest.raises(NonFiniteLoss, match=r"step 4.*predictions are NaN \(image ids 9\)"):
            check.explain(RuntimeError("the predictions hold NaN: nothing can be assigned"), 4, torch.tensor([9]))


def test_the_optimiser_steps_and_then_the_average_follows() -> None:
    module = TrainingModule(ToyModel(), ToyCriterion())
    ema = EmaConfig(decay=0.5, warmup=1).build(module.model)
    before = [p.detach().clone() for p in module.parameters()]
    Stepper(module, torch.optim.SGD(module.parameters(), lr=0.1), off(), None)([toy_batch([1])], ema)
    for old, new, average in zip(before, module.model.parameters(), ema.model.parameters(), strict=True):
        assert not torch.equal(old, new)
        torch.testing.assert_close(average, (old + new.detach()) / 2)
