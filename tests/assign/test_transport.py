"""OTA on an example small enough to be computed by hand, equation by equation of the paper (arXiv:2103.14259)."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from scipy.optimize import linprog
from torch import Tensor

from detector.assign import Ota
from detector.assign.transport import Table
from detector.structures import BACKGROUND, Objects, Predictions, Priors
from tests.assign.make import batch, pyramid

# Eight points, 8 pixels apart: x 4, 12, 20, 28 in the rows y 4 and y 12.
PRIORS = pyramid((16, 32), strides=(8,))
BOXES = [[0.0, 0, 16, 16], [10.0, 0, 32, 16]]  # labels 0 and 1
LOGITS = [[2.0, -1], [1.5, 0.5], [-1, 1], [-2, 2], [0.5, -2], [0.0, 0.0], [-1.5, 0.5], [-1, -0.5]]
SAID = [
    [0.0, 0, 16, 16], [1.0, 0, 16, 15], [12.0, 0, 32, 14], [10.0, 1, 31, 16],
    [0.0, 2, 14, 16], [4.0, 4, 20, 20], [12.0, 4, 30, 16], [24.0, 0, 40, 16],
]  # fmt: skip


def example() -> tuple[Priors, Objects, Predictions]:
    return PRIORS, batch(BOXES), Predictions(torch.tensor([LOGITS]), torch.tensor([SAID]))


def iou(a: list[float], b: list[float]) -> float:
    shared = max(0.0, min(a[2], b[2]) - max(a[0], b[0])) * max(0.0, min(a[3], b[3]) - max(a[1], b[1]))
    return shared / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - shared)


def focal(logit: float, present: bool) -> float:
    p = 1 / (1 + math.exp(-logit))
    return -0.25 * (1 - p) ** 2 * math.log(p) if present else -0.75 * p**2 * math.log(1 - p)


def by_hand() -> tuple[list[list[float | None]], list[float], list[int]]:
    """Costs of each object (None: out of reach) and of background, and what they supply."""
    costs: list[list[float | None]] = []
    supply = []
    for label, box in enumerate(BOXES):
        row: list[float | None] = []
        overlaps = []
        for r in range(8):
            x, y = 4 + 8 * (r % 4), 4 + 8 * (r // 4)
            inside = box[0] < x < box[2] and box[1] < y < box[3]
            near = abs(x - (box[0] + box[2]) / 2) < 20 and abs(y - (box[1] + box[3]) / 2) < 20  # 2.5 strides
            if not (inside and near):
                row.append(None)
                continue
            # Section 3.2, cost of a positive: classification (over both classes) and 1.5 times regression.
            classes = sum(focal(LOGITS[r][k], k == label) for k in range(2))
            row.append(classes - 1.5 * math.log(iou(SAID[r], box) + 1e-7))
            overlaps.append(iou(SAID[r], box))
        costs.append(row)
        supply.append(max(1, int(sum(sorted(overlaps)[-20:]))))  # section 3.3, dynamic k estimation
    background = [sum(focal(x, False) for x in LOGITS[r]) for r in range(8)]  # section 3.2, cost of background
    return costs, background, supply


def table_of(rule: Ota) -> tuple[Table, Tensor, Objects]:
    priors, objects, said = example()
    background = torch.tensor([by_hand()[1]], dtype=torch.float64)
    return rule.table(priors, objects, said, background), background, objects


def test_costs_and_supply() -> None:
    costs, _, supply = by_hand()
    table, _, _ = table_of(Ota())
    assert table.supply.tolist() == supply == [3, 3]
    for i in range(2):
        found = {int(r): float(c) for r, c, ok in zip(table.prior[i], table.cost[i], table.valid[i], strict=True) if ok}
        wanted = {r: c for r, c in enumerate(costs[i]) if c is not None}
        assert found == pytest.approx(wanted, abs=1e-5)
    assert [r for r, c in enumerate(costs[0]) if c is None] == [2, 3, 6, 7]  # beyond the object's side


def plan_of(rule: Ota) -> Tensor:
    """(3, 8): logarithm of each flow over its supplier's largest; -inf where nothing may be shipped."""
    table, background, objects = table_of(rule)
    score, rest = rule.plan(table, background, objects)
    plan = torch.full((3, 8), -torch.inf, dtype=torch.float64)
    for i in range(2):
        plan[i, table.prior[i][table.valid[i]]] = score[i][table.valid[i]]
    plan[2] = rest[0]
    return plan


def scaled(eps: float, iterations: int) -> list[list[float]]:
    """The plan by the paper's own iteration, without logarithms: pi = u K v with K = exp(-cost / eps)."""
    costs, background, supply = by_hand()
    kernel = [[0.0 if c is None else math.exp(-c / eps) for c in row] for row in [*costs, background]]
    s = [x + 1e-8 for x in [*supply, 8 - sum(supply)]]
    u, v = [1.0] * 3, [1.0] * 8
    for _ in range(iterations):
        # u = s / (K v), v = d / (K' u), with demands d of 1.
        u = [s[i] / sum(kernel[i][j] * v[j] for j in range(8)) for i in range(3)]
        v = [(1 + 1e-8) / sum(kernel[i][j] * u[i] for i in range(3)) for j in range(8)]
    return [[u[i] * kernel[i][j] * v[j] for j in range(8)] for i in range(3)]


@pytest.mark.parametrize(("eps", "iterations"), [(0.1, 1), (0.1, 2), (0.1, 50), (0.5, 7)])
def test_the_plan_is_that_of_the_papers_iteration(eps: float, iterations: int) -> None:
    wanted = torch.tensor(scaled(eps, iterations), dtype=torch.float64)
    wanted = wanted / wanted.amax(1, keepdim=True)
    torch.testing.assert_close(plan_of(Ota(eps=eps, iterations=iterations)).exp(), wanted, atol=1e-6, rtol=1e-6)


def test_all_is_shipped_and_every_prior_takes_one() -> None:
    plan = torch.tensor(scaled(0.1, 2000), dtype=torch.float64)
    torch.testing.assert_close(plan.sum(1), torch.tensor([3.0, 3, 2]).double(), atol=1e-3, rtol=0)
    torch.testing.assert_close(plan.sum(0), torch.ones(8).double(), atol=1e-3, rtol=0)


def test_with_little_smoothing_it_is_the_cheapest_plan() -> None:
    """The transport problem of section 3.1 solved as a linear programme."""
    costs, background, supply = by_hand()
    rows = [*costs, background]
    flat = [1e6 if c is None else c for row in rows for c in row]
    equal = [[float(j // 8 == i) for j in range(24)] for i in range(3)]
    equal += [[float(j % 8 == i) for j in range(24)] for i in range(8)]
    best = linprog(flat, A_eq=equal, b_eq=[*supply, 8 - sum(supply), *[1] * 8])
    owner = best.x.reshape(3, 8).argmax(0)
    assert best.x.max() == pytest.approx(1)
    wanted = [BACKGROUND if o == 2 else int(o) for o in owner]
    found = Ota(eps=0.02, iterations=2000)(*example()).per_prior()[0].tolist()
    assert found == wanted
    assert sorted(found).count(0) == 3
    assert sorted(found).count(1) == 3


def test_default_on_the_example() -> None:
    plan = torch.tensor(scaled(0.1, 50), dtype=torch.float64)
    owner = (plan / plan.amax(1, keepdim=True)).argmax(0)
    wanted = torch.where(owner < 2, owner, BACKGROUND)
    found = Ota()(*example())
    assert torch.equal(found.per_prior()[0], wanted)
    assert (found.quality[found.weight > 0] == 1).all()


def test_an_object_without_a_prior_in_reach_changes_nothing() -> None:
    priors, objects, said = example()
    # Between four points: no centre lies in it.
    more = replace(batch([*BOXES, [6.0, 6, 10, 10]]), labels=torch.tensor([0, 1, 1]))
    assert torch.equal(Ota()(priors, more, said).per_prior(), Ota()(priors, objects, said).per_prior())


def test_more_supply_than_priors_still_gives_a_plan() -> None:
    priors, _, said = example()
    objects = replace(batch([BOXES[0]] * 7), labels=torch.tensor([0, 1, 0, 1, 0, 1, 0]))
    found = Ota()(priors, objects, said).per_prior()[0]
    assert (found >= 0).any()
    table = Ota().table(priors, objects, said, torch.zeros(1, 8, dtype=torch.float64))
    assert table.supply.sum() > 8
    score, rest = Ota().plan(table, torch.zeros(1, 8, dtype=torch.float64), objects)
    assert score[table.valid].isfinite().all()
    assert rest.isfinite().all()


def test_loose_and_grid_priors_ship_the_same() -> None:
    priors, objects, said = example()
    loose = Priors(priors.boxes, priors.stride, priors.level_sizes)
    assert torch.equal(Ota()(loose, objects, said).per_prior(), Ota()(priors, objects, said).per_prior())
