"""Lengths, schedules, and what follows from scores."""

from __future__ import annotations

import math

import pytest
import torch
from pydantic import ValidationError

from detector.train.config import TrainConfig
from detector.train.history import EarlyStopping, is_best
from detector.train.length import Horizon, Length
from detector.train.schedule import AnySchedule, Cosine, MultiStep, OneCycle, Plateau

HORIZON = Horizon(total=60, images=100, batch=10)


def torch_factors(make, steps: int, scores: list[float] | None = None) -> list[float]:  # type: ignore[no-untyped-def]
    """The learning rates that one of torch's schedulers gives, for a rate of 1."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0, momentum=0.9)
    scheduler = make(optimizer)
    found = []
    for step in range(steps):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step(*([] if scores is None else [scores[step]]))
    return found


def factors(schedule: AnySchedule) -> list[float]:
    return [schedule.factor(step, HORIZON) for step in range(HORIZON.total)]


def test_lengths_in_steps() -> None:
    assert Length(steps=7).count(images=100, batch=16) == 7
    assert Length(epochs=12).count(images=100, batch=16) == 75
    assert Length(epochs=1).count(images=100, batch=16) == 7  # part of a step counts
    assert Length(epochs=0.1).count(images=30, batch=3) == 1  # although 0.1 * 30 / 3 is more than 1 in floats
    assert Length(images=33).count(images=100, batch=16) == 3
    assert Length(images=1).count(images=100, batch=16) == 1
    assert HORIZON.epoch(25) == 2.5


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "one of epochs, steps or images"),
        ({"epochs": 1, "steps": 5}, "gives epochs and steps"),
        ({"steps": 0}, "greater than or equal to 1"),
        ({"epochs": -1}, "greater than 0"),
    ],
)
def test_a_length_has_exactly_one_unit(given: dict[str, float], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        Length.model_validate(given)


def test_multi_step_with_warmup_is_torchs() -> None:
    schedule = MultiStep(milestones=(Length(epochs=3), Length(steps=50)), warmup=Length(steps=8), warmup_start=0.1)

    def make(optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LRScheduler:
        warmup = torch.optim.lr_scheduler.LinearLR(optimizer, 0.1, total_iters=8)
        return torch.optim.lr_scheduler.ChainedScheduler(
            [warmup, torch.optim.lr_scheduler.MultiStepLR(optimizer, [30, 50])], optimizer
        )

    assert factors(schedule) == pytest.approx(torch_factors(make, 60))


def test_cosine_is_torchs() -> None:
    schedule = Cosine(warmup=None, end=0.05)
    make = lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, T_max=60, eta_min=0.05)  # noqa: E731
    assert factors(schedule) == pytest.approx(torch_factors(make, 60))
    warmed = Cosine(warmup=Length(steps=20))
    assert warmed.factor(0, HORIZON) == pytest.approx(0.001)
    assert warmed.factor(20, HORIZON) == 1
    assert warmed.factor(40, HORIZON) == pytest.approx(0.5)
    assert warmed.factor(60, HORIZON) == pytest.approx(0)


def test_one_cycle_is_torchs() -> None:
    make = lambda o: torch.optim.lr_scheduler.OneCycleLR(o, max_lr=1.0, total_steps=60, cycle_momentum=False)  # noqa: E731
    assert factors(OneCycle()) == pytest.approx(torch_factors(make, 60))


def test_plateau_is_torchs() -> None:
    scores = [0.1, 0.2, 0.2, 0.2005, 0.19, 0.3, 0.3, 0.3, 0.3, 0.1, 0.1, 0.1, 0.1, 0.1]

    def make(optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.ReduceLROnPlateau:
        return torch.optim.lr_scheduler.ReduceLROnPlateau(
            optimizer, "max", factor=0.1, patience=2, threshold=1e-3, threshold_mode="abs", min_lr=1e-3, eps=0
        )

    schedule = Plateau(warmup=None, patience=2, improvement=1e-3)
    found = [schedule.factor(0, HORIZON, scores[:n]) for n in range(len(scores))]
    assert found == pytest.approx(torch_factors(make, len(scores), scores))
    assert len(set(found)) > 2


def test_what_does_not_fit_the_run_is_said() -> None:
    late = MultiStep(milestones=(Length(epochs=3), Length(epochs=8)), warmup=Length(steps=60))
    warmup, milestone = late.notes(HORIZON)
    assert "the warm-up takes 60 steps but the whole run only 60" in warmup
    assert "8 epochs are never reached" in milestone
    assert MultiStep(warmup=Length(steps=59)).notes(HORIZON) == []
    assert OneCycle().notes(HORIZON) == []


def test_one_step_is_enough() -> None:
    for schedule in (MultiStep(), Cosine(), OneCycle(), Plateau()):
        assert math.isfinite(schedule.factor(0, Horizon(1, 100, 10)))


def test_early_stopping_counts_evaluations_without_improvement() -> None:
    rule = EarlyStopping(patience=2)
    assert not rule.stops([])
    assert not rule.stops([0.3, 0.2])
    assert rule.stops([0.3, 0.2, 0.3])
    assert not rule.stops([0.3, 0.2, 0.31])
    assert EarlyStopping(patience=2, improvement=0.05).stops([0.3, 0.2, 0.31])


def test_of_equal_scores_the_first_is_the_best() -> None:
    assert is_best([0.0])
    assert is_best([0.1, 0.2])
    assert not is_best([0.2, 0.2])


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"batch_size": 10, "accumulate": 4}, "batch_size 10 cannot be computed in 4 equal parts"),
        ({"evaluate_every": None, "early_stopping": {}}, "early_stopping needs scores"),
        ({"evaluate_every": None, "schedule": {"type": "plateau"}}, "plateau schedule needs scores"),
        ({"device": "gpu"}, "device"),
    ],
)
def test_settings_that_do_not_fit_together(given: dict[str, object], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        TrainConfig.model_validate(given)
