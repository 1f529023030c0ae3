"""Rules that change: a pure function of the step."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from pydantic import TypeAdapter, ValidationError

from detector.assign import Assigner, Atss, Fcos, MaxIou, Rule, SimOta, Switch, TaskAligned
from detector.config.load import dump, load_config
from detector.errors import ConfigError
from detector.train.length import Horizon, Length
from tests.assign.make import batch, pyramid
from tests.assign.test_guarantees import fitting

RULES: TypeAdapter[Rule] = TypeAdapter(Rule)
HORIZON = Horizon(total=60, images=100, batch=10)  # 6 epochs


def rule(**values: object) -> Assigner:
    return RULES.validate_python(values)


def test_a_plain_rule_is_the_same_in_every_step() -> None:
    assert Atss().at(17, HORIZON) == Atss()
    assert Atss().notes(HORIZON) == []


@pytest.mark.parametrize("after", [{"steps": 20}, {"epochs": 2}, {"images": 200}], ids=str)
def test_switch_in_any_unit_of_time(after: dict[str, int]) -> None:
    switch = rule(type="switch", first={"type": "atss", "topk": 5}, then={"type": "simota"}, after=after)
    assert [switch.at(step, HORIZON) for step in (0, 19, 20, 59)] == [Atss(topk=5), Atss(topk=5), SimOta(), SimOta()]


def test_switch_is_toods_by_default() -> None:
    assert Switch().at(39, HORIZON) == Atss()
    assert Switch().at(40, HORIZON) == TaskAligned()


def test_annealed_numbers_glide_and_stay() -> None:
    glide = {"start": 1, "end": 6, "begin": {"epochs": 1}, "until": {"epochs": 5}}
    annealed = rule(type="anneal", rule={"type": "task_aligned", "topk": 7}, parameters={"beta": glide})
    found = [annealed.at(step, HORIZON) for step in range(60)]
    assert all(isinstance(x, TaskAligned) and x.topk == 7 for x in found)
    betas = [x.beta for x in found]  # type: ignore[attr-defined]
    assert betas[:11] == [1] * 11
    assert betas[30] == pytest.approx(3.5)
    assert betas[20] == pytest.approx(2.25)
    assert betas[50:] == [6] * 10
    assert betas == sorted(betas)


def test_cosine_is_slow_at_both_ends() -> None:
    glide = {"start": 0, "end": 1, "shape": "cosine"}
    annealed = rule(type="anneal", rule={"type": "task_aligned"}, parameters={"alpha": glide})
    alpha = [annealed.at(step, HORIZON).alpha for step in (0, 6, 30, 54, 60)]  # type: ignore[attr-defined]
    assert alpha == pytest.approx([0, 0.0245, 0.5, 0.9755, 1], abs=1e-3)


def test_whole_numbers_are_rounded() -> None:
    annealed = rule(type="anneal", rule={"type": "atss"}, parameters={"topk": {"start": 15, "end": 5}})
    topk = [annealed.at(step, HORIZON).topk for step in range(61)]  # type: ignore[attr-defined]
    assert topk[0] == 15
    assert topk[30] == 10
    assert topk[60] == 5
    assert {type(k) for k in topk} == {int}
    assert sorted(set(topk), reverse=True) == list(range(15, 4, -1))


def test_a_long_run_has_few_different_rules() -> None:
    long = Horizon(total=100_000, images=100, batch=10)
    annealed = rule(type="anneal", rule={"type": "fcos"}, parameters={"center_radius": {"start": 3, "end": 1}})
    assert len({annealed.at(step, long) for step in range(0, 100_000, 50)}) <= 101


def test_annealing_inside_a_switch() -> None:
    first = {"type": "anneal", "rule": {"type": "atss"}, "parameters": {"topk": {"start": 20, "end": 8}}}
    switch = rule(type="switch", first=first, then={"type": "fcos"}, after={"steps": 30})
    assert switch.at(15, HORIZON) == Atss(topk=17)
    assert switch.at(30, HORIZON) == Fcos()


def test_without_a_step_it_is_what_it_ends_as() -> None:
    priors, objects = pyramid((128, 160)), batch([[20.0, 20, 85, 84]], [[3.0, 9, 60, 100]])
    said = fitting(priors, 2)
    switch = Switch(first=TaskAligned(), then=Atss())
    assert not switch.uses_predictions
    assert torch.equal(switch(priors, objects).per_prior(), Atss()(priors, objects).per_prior())
    assert Switch().uses_predictions
    annealed = rule(type="anneal", rule={"type": "task_aligned"}, parameters={"topk": {"start": 20, "end": 2}})
    ends = TaskAligned(topk=2)(priors, objects, said)
    assert torch.equal(annealed(priors, objects, said).per_prior(), ends.per_prior())
    assert not torch.equal(TaskAligned()(priors, objects, said).per_prior(), ends.per_prior())


def test_what_does_not_fit_the_run_is_said() -> None:
    assert Switch(after=Length(epochs=6)).notes(HORIZON) == [
        "assigner.after is 6 epochs, so the run ends before the second rule begins"
    ]
    assert Switch().notes(HORIZON) == []
    late = rule(
        type="anneal", rule={"type": "atss"}, parameters={"topk": {"start": 9, "end": 5, "until": {"steps": 61}}}
    )
    assert "topk reaches its end only after 61 steps, the run ends after 60" in late.notes(HORIZON)[0]


def test_a_glide_is_compared_with_the_run() -> None:
    def glide(**when: object) -> Assigner:
        return rule(type="anneal", rule={"type": "atss"}, parameters={"topk": {"start": 9, "end": 5, **when}})

    with pytest.raises(ConfigError, match=r"parameters\.topk: begin is 5 epochs, .* before until, 50 steps"):
        glide(begin={"epochs": 5}, until={"steps": 50}).notes(HORIZON)
    assert glide(begin={"epochs": 5}, until={"steps": 51}).notes(HORIZON) == []
    assert "topk begins only after 60 steps, the run ends after 60" in glide(begin={"epochs": 6}).notes(HORIZON)[0]


def test_numbers_that_cross_on_their_way_are_found_before_the_run() -> None:
    crossing = rule(
        type="anneal",
        rule={"type": "max_iou"},
        parameters={
            "positive_iou": {"start": 0.7, "end": 0.3, "until": {"steps": 10}},
            "negative_iou": {"start": 0.6, "end": 0.2, "begin": {"steps": 50}},
        },
    )
    with pytest.raises(ConfigError, match=r"negative_iou 0\.6 must not exceed positive_iou"):
        crossing.notes(HORIZON)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"type": "anneal", "parameters": {"bata": {"start": 1, "end": 2}}}, "task_aligned has no such number; it has"),
        ({"type": "anneal", "parameters": {"beta": {"start": -1, "end": 2}}}, "at their start: .* greater than or eq"),
        ({"type": "anneal", "rule": {"type": "atss"}, "parameters": {"reachable": {"start": 0, "end": 1}}}, "no such"),
        ({"type": "switch", "keep_one": True}, "keep_one belongs to the rules inside: set it there"),
        ({"type": "switch", "first": {"type": "switch"}}, "does not match any of the expected tags"),
        ({"type": "switch", "after": {}}, "expected one of epochs, steps or images"),
        ({"type": "switch", "after": {"epochs": 0}}, "greater than 0"),
        ({"type": "switch", "first": {"type": "fcos"}, "then": {"type": "fcos"}}, "first and then are the same rule"),
        ({"type": "anneal", "parameters": {}}, "parameters is empty, .*; task_aligned has crowd_coverage, topk, alpha"),
        (
            {
                "type": "anneal",
                "rule": {"type": "center_region"},
                "parameters": {"num_classes": {"start": 3, "end": 5}},
            },
            "num_classes: center_region has no such number",
        ),
        (
            {
                "type": "anneal",
                "parameters": {"beta": {"start": 1, "end": 2, "begin": {"steps": 9}, "until": {"steps": 9}}},
            },
            "begin is 9 steps, which must be before until, 9 steps",
        ),
        (
            {"type": "paa", "first": {"type": "atss", "keep_one": True}},
            r"first\.keep_one would do nothing.*of paa itself",
        ),
        ({"type": "paa", "first": {"type": "fcos", "crowd_coverage": 0.2}}, r"first\.crowd_coverage would do nothing"),
        ({"type": "hungarian", "class_cost": 0, "l1_cost": 0, "giou_cost": 0}, "any matching would do"),
    ],
)
def test_mistakes(values: dict[str, object], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        RULES.validate_python(values)


def test_a_recipe_takes_it_and_comes_back_equal(tmp_path: Path) -> None:
    config = load_config(
        Path("bccd/atss_r18"),
        ["assigner={type: switch, first: {type: atss}, after: {epochs: 2}}", "assigner.first.topk=15"],
    )
    assert config.assigner == Switch(first=Atss(topk=15), after=Length(epochs=2))
    copy = tmp_path / "config.yaml"
    copy.write_text(dump(config))
    assert load_config(copy) == config


PLUGIN = """
from typing import Literal
from detector.assign import Atss

class Mine(Atss):
    type: Literal["mine"] = "mine"
"""


def test_an_own_rule_takes_turns_too(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(PLUGIN)
    config = load_config(
        Path("bccd/atss_r18"),
        [
            f"imports=[{tmp_path / 'mine.py'}]",
            "assigner={type: switch, first: {type: mine, topk: 3}, after: {steps: 7},"
            " then: {type: anneal, rule: {type: mine}, parameters: {topk: {start: 3, end: 1}}}}",
        ],
    )
    assert type(config.assigner.at(0, HORIZON)).__name__ == "Mine"
    assert config.assigner.at(60, HORIZON).topk == 1  # type: ignore[attr-defined]


def test_mixed_limits_of_max_iou_may_glide_together() -> None:
    falling = {"start": 0.7, "end": 0.5}
    annealed = rule(
        type="anneal", rule={"type": "max_iou"}, parameters={"positive_iou": falling, "negative_iou": falling}
    )
    assert annealed.at(30, HORIZON) == MaxIou(positive_iou=0.6, negative_iou=0.6)
    assert annealed.notes(HORIZON) == []
