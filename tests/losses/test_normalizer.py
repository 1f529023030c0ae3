"""The one divisor: what each kind counts, its state, and its mean over processes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.testing import assert_close

from detector.losses.normalizer import Normalizer
from detector.structures import Assignment, Objects

OBJECTS = Objects.collate([torch.tensor([[0.0, 0, 8, 8], [4, 4, 9, 9]])], [torch.tensor([0, 1])])


def assignment(pairs: int = 4) -> Assignment:
    """Pairs of priors 0, 1, 2, 3; the third is padding and the prior of the fourth is ignored."""
    return Assignment(
        num_priors=4,
        prior=torch.arange(4)[:pairs],
        object=torch.zeros(4).long()[:pairs],
        quality=torch.tensor([0.5, 0.25, 0.0, 1.0])[:pairs],
        weight=torch.tensor([1.0, 2.0, 0.0, 1.0])[:pairs],
        ignored=torch.tensor([[False, False, False, True]]),
    )


def test_what_each_kind_counts() -> None:
    assert Normalizer("positives")(assignment(), OBJECTS) == 2
    assert Normalizer("quality")(assignment(), OBJECTS) == 1.0
    assert Normalizer("objects")(assignment(), OBJECTS) == 2
    for kind in ("positives", "quality"):
        assert Normalizer(kind)(assignment(0), OBJECTS) == 0


def test_moving_average_by_hand() -> None:
    normalizer = Normalizer("ema", momentum=0.9, start=100)
    assert_close(normalizer(assignment(), OBJECTS), torch.tensor(90.2))
    assert_close(normalizer(assignment(), OBJECTS), torch.tensor(81.38))
    normalizer.eval()
    for _ in range(3):
        assert_close(normalizer(assignment(), OBJECTS), torch.tensor(81.38))


def test_moving_average_survives_a_checkpoint() -> None:
    first, second = Normalizer("ema"), Normalizer("ema")
    before = first(assignment(), OBJECTS)
    second.load_state_dict(first.state_dict())
    after = first(assignment(), OBJECTS)
    assert torch.equal(second(assignment(), OBJECTS), after)
    assert not torch.equal(before, after)  # what was given out before does not move along


def test_only_the_moving_average_has_a_state() -> None:
    assert not Normalizer("positives").state_dict()
    assert set(Normalizer("ema").state_dict()) == {"average"}


def _count(rank: int, file: str, out: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=2)
    value = Normalizer("positives")(assignment(2 * rank), OBJECTS)
    torch.save(value, f"{out}.{rank}")
    dist.destroy_process_group()


@pytest.mark.skipif(not dist.is_available(), reason="torch without distributed")
def test_mean_over_processes(tmp_path: Path) -> None:
    """One process has two positives, the other none: 1 for both, whose gradients are averaged."""
    mp.spawn(_count, args=(str(tmp_path / "meet"), str(tmp_path / "out")), nprocs=2)
    assert [torch.load(tmp_path / f"out.{rank}").item() for rank in range(2)] == [1.0, 1.0]
