"""The benchmark measures what it says; how fast anything is, is not tested."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from detector.bench import assignment, inference, loading, scoring, step_share, train_step, two_stage
from detector.bench.document import update
from detector.bench.measure import Table, Target, Times, peak_bytes, take_turns
from detector.bench.networks import NUM_CLASSES, methods, precisions, random_images, random_objects
from detector.cli.benchmark import main
from detector.models.layers import Precision

CPU = torch.device("cpu")


def test_turns_begin_with_each_candidate_in_turn() -> None:
    calls: list[str] = []
    times = take_turns({name: lambda name=name: calls.append(name) for name in "abc"}, CPU, turns=3, warm_up=1)
    assert "".join(calls) == "abc" + "abc" + "bca" + "cab"
    assert [len(times.seconds[name]) for name in "abc"] == [3, 3, 3]


def test_turns_end_when_patience_does() -> None:
    calls: list[str] = []
    take_turns({"a": lambda: calls.append("a")}, CPU, turns=9, warm_up=0, patience=0)
    assert calls == ["a"]


def test_a_ratio_is_the_median_within_turns() -> None:
    """The second turn was slow for both, the third for one of them."""
    times = Times({"a": [1.0, 10.0, 9.0], "b": [2.0, 20.0, 2.0]})
    assert times.ratio("a", "b") == 0.5
    assert times.median("b") == 2.0
    assert times.spread("a", "b") == "0.500 to 2.500"


def test_peak_memory_counts_what_is_held_at_one_time() -> None:
    given = torch.zeros(1 << 20)  # 4 MiB that are not the call's

    def call() -> torch.Tensor:
        first = given + 1
        second = torch.cat([first, first])  # the peak: 4 + 8 MiB
        del first
        return second[: 1 << 18] + 1  # 8 + 1

    peak, result = peak_bytes(call, CPU)
    assert peak == 12 << 20
    assert result.numel() == 1 << 18


def rules(*dense: str) -> pytest.MarkDecorator:
    """Parametrize by the rules that are compared with this dense version."""
    chosen = [rule for rule in assignment.RULES if rule.dense == dense]
    assert chosen
    return pytest.mark.parametrize("rule", chosen, ids=[rule.name for rule in chosen])


@rules("assign_dense", "dense")
def test_assigners_equal_the_dense_version(rule: assignment.Rule) -> None:
    assert rule.home is not None
    priors = assignment.make_priors(rule.home, (128, 160), CPU)
    objects = random_objects(2, 5, (128, 160))
    result = assignment.measure(rule.rule, priors, objects, assignment.load_dense(), CPU, patience=0)
    assert result["same"] is True
    assert result["dense_bytes"] / result["bytes"] == result["memory_ratio"]
    alone = assignment.measure(rule.rule, priors, objects, None, CPU, patience=0)
    assert (alone["bytes"], alone["same"], alone["dense_seconds"]) == (result["bytes"], None, None)


@pytest.mark.parametrize("kind", assignment.KINDS)
@rules("assign_predicted", "dense_predicted")
def test_rules_that_look_at_predictions_equal_the_dense_version(rule: assignment.Rule, kind: str) -> None:
    priors = assignment.make_priors(assignment.KINDS[kind], (128, 160), CPU)
    objects, said = random_objects(2, 5, (128, 160)), assignment.random_predictions(priors, 2)
    dense = assignment.load_dense(*rule.dense)
    assert dense is not None
    result = assignment.measure(rule.rule, priors, objects, dense, CPU, 0, said)
    assert result["same"] is True
    index, quality = dense(rule.rule, priors, objects, said)
    assert (index >= 0).any()
    found = rule.rule(priors, objects, said)
    assert assignment._same(found, (index, quality))
    assert not assignment._same(found, (index, quality + 0.001))
    assert not assignment._same(found, (index.roll(1), quality))


@pytest.mark.parametrize("kind", assignment.KINDS)
@rules("rules_dense", "dense_rule")
def test_rules_of_pairs_equal_the_dense_version(rule: assignment.Rule, kind: str) -> None:
    priors = assignment.make_priors(assignment.KINDS[kind], (128, 160), CPU)
    objects, said = random_objects(2, 5, (128, 160)), assignment.random_predictions(priors, 2)
    said = replace(said, mixture=assignment.random_mixture(objects, len(priors.grids)))
    dense = assignment.load_dense(*rule.dense)
    assert dense is not None
    assert assignment.measure(rule.rule, priors, objects, dense, CPU, 0, said)["same"] is True
    expected = dense(rule.rule, priors, objects, said)
    found = rule.rule(priors, objects, said)
    assert assignment._same(found, expected)
    assert not assignment._same(found, replace(expected, weight=expected.weight * 1.001))
    assert not assignment._same(found, replace(expected, object=9 - expected.object))
    assert not assignment._same(found, replace(expected, ignored=~expected.ignored))
    if expected.background_weight is not None:
        assert not assignment._same(found, replace(expected, background_weight=expected.background_weight + 0.001))
    else:
        assert not assignment._same(found, replace(expected, background_weight=torch.ones(2, len(priors), 80)))


def test_a_wrong_assigner_is_found_out() -> None:
    rule, kind = assignment.RULES[1], assignment.ONE
    priors, objects = assignment.make_priors(kind, (128, 160), CPU), random_objects(1, 5, (128, 160))

    def wrong(rule, priors, objects) -> torch.Tensor:  # type: ignore[no-untyped-def]
        return torch.zeros(1, len(priors), dtype=torch.long)

    assert assignment.measure(rule.rule, priors, objects, wrong, CPU, patience=0)["same"] is False


def test_target_of_assignment_is_one_size_and_count() -> None:
    case = {"rule": "FCOS, points", "first": True, "height": 800, "width": 1333, "images": 1, "objects": 1000}
    numbers = {"speed_up": 11.0, "memory_ratio": 19.0, "same": True}
    assert [target.met for target in assignment._targets(case | numbers)] == [True, False, True]
    other = assignment._targets(case | numbers | {"first": False, "bytes": 3e9})
    assert [target.met for target in other] == [True, True]  # a tenth of the memory is enough; speed is for many images
    assert assignment._targets(case | numbers | {"objects": 10}) == []
    assert assignment._targets(case | numbers | {"same": None}) == []
    (most,) = assignment._targets(case | {"objects": 5000, "same": None, "bytes": 3e9})
    assert not most.met


@pytest.mark.parametrize("name", list(methods()))
def test_so_many_candidates_pass_the_threshold(name: str) -> None:
    torch.manual_seed(0)
    method = methods("resnet18", 32)[name]
    model = method.model.build(NUM_CLASSES).eval()
    images = random_images(2, 128)
    with torch.inference_mode():
        inference.prepare_ours(model, images)
        scores = model(images).class_logits.sigmoid()
    assert int((scores > inference.THRESHOLD).sum()) == pytest.approx(2 * inference.CANDIDATES, rel=0.05)


@pytest.mark.parametrize("precision", precisions(CPU))
def test_all_sides_of_a_train_step_run(precision: Precision) -> None:
    times = train_step.compare(methods("resnet18", 32)["FCOS"], CPU, side=64, turns=1, precision=precision)
    assert set(times.seconds) == {"ours", "bare", "peer"}


def test_a_rule_is_set_against_the_step_that_it_is_part_of() -> None:
    seconds = {"network fp32": [8.0, 7.0], "network bf16": [3.0, 1.0], "rule x": [0.5, 1.0], "criterion x": [2.0, 3.0]}
    assert step_share.shares(Times(seconds), "x") == {"fp32": (0.05 + 0.1) / 2, "bf16": (0.1 + 0.25) / 2}


def test_every_rule_has_its_share() -> None:
    names = step_share.rules()
    assert {"fcos", "hungarian", "dw"} < set(names)
    times = step_share.compare(methods("resnet18", 32)["FCOS"].model, CPU, side=64, turns=1)
    assert set(times.seconds) == {
        *(f"network {p}" for p in precisions(CPU)),
        *(f"{part} {name}" for part in ("rule", "criterion") for name in names),
    }


@pytest.mark.parametrize("precision", precisions(CPU))
def test_all_sides_of_inference_run(precision: Precision) -> None:
    times, found = inference.compare(methods("resnet18", 32)["RetinaNet"], CPU, side=64, turns=1, precision=precision)
    assert set(times.seconds) == {"ours", "network", "peer"}
    assert min(found) > 0


def test_faster_rcnn_and_torchvisions_are_asked_the_same() -> None:
    """From the same weights: the same boxes; and the parts of a step are all there."""
    pair = two_stage.Pair(CPU, 96)
    pair.mode(training=False)
    for ours, theirs in zip(pair.find(), pair.peer_find(), strict=True):
        assert len(ours) > 0
        torch.testing.assert_close(ours, theirs, atol=1e-3, rtol=0)
    pair.mode(training=True)
    parts = two_stage.split(pair, "train", 1)
    assert set(two_stage.CHOOSING) < set(parts["ours"])
    assert {"backbone", "RoI features", "box head", "losses", "backward"} < set(parts["ours"])
    trained = {n for n, p in pair.model.named_parameters() if p.grad is not None}
    assert len(trained) == sum(p.grad is not None for p in pair.peer.parameters())


def test_a_clock_leaves_out_what_others_count() -> None:
    clock = two_stage.Clock(CPU)
    ticks = iter([0.0, 1.0, 4.0, 10.0])
    clock.now = lambda: next(ticks)
    clock.timed("outer", clock.timed("inner", lambda: None))()
    assert clock.seconds == {"outer": 7.0, "inner": 3.0}


def test_evaluation_gives_the_numbers_of_pycocotools() -> None:
    table = scoring.run(CPU, quick=True)
    assert table.numbers["ours"] == table.numbers["pycocotools"]
    assert 0.1 < table.numbers["ours"]["AP"] < 0.9
    assert min(table.numbers["ours"].values()) > 0


def test_generated_images_are_as_large_as_photographs(tmp_path: Path) -> None:
    data = loading.make_images(tmp_path, 2)
    assert data[0].image.shape == (480, 640, 3)
    assert len(data[1].boxes) == loading.OBJECTS
    assert 80_000 < data.index.image_path(0).stat().st_size < 200_000


def test_every_rule_is_measured_on_points_and_nine_anchors() -> None:
    """Where its targets are; and on its own priors, where it has such, with any number of objects."""
    cases = list(assignment._cases(CPU, quick=False))
    names = assignment.rule_names()
    assert {(c.rule.name, c.label) for c in cases} >= {(n, k) for n in names for k in ("points", "9 anchors")}
    targets = {(assignment.TARGET_SIZE, *count) for count in assignment.TARGET_COUNTS}
    for case in cases:
        inputs = set(case.inputs())
        assert inputs >= targets
        assert (inputs == targets) is (case.kind is not case.rule.home)
    assert {(c.rule.name, c.label) for c in cases if c.kind is c.rule.home} == {
        ("FCOS", "points"), ("ATSS", "1 anchor"), ("max-IoU", "9 anchors"),
    }  # fmt: skip
    kinds = {type(c.rule.rule).model_fields["type"].default for c in cases}
    assert kinds == set(step_share.rules()) - {"switch", "anneal"}, "a rule of label assignment is not measured"


def test_rules_are_chosen_by_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["assign", "--quick", "--rules", "IQDet,point scale", "--json", str(tmp_path / "out.json")]) == 0
    cases = json.loads((tmp_path / "out.json").read_text())["assign"]["numbers"]["cases"]
    assert {case["rule"] for case in cases} == {"IQDet, points", "point scale, points"}
    assert all(case["same"] for case in cases)
    assert main(["assign", "--quick", "--rules", "iqdet"]) != 0
    assert "--rules: 'iqdet': expected some of FCOS, ATSS, max-IoU, SimOTA" in capsys.readouterr().err


def test_update_replaces_sections_and_keeps_the_rest() -> None:
    old = "# Benchmarks\n\nProse.\n\n## A\n\nold\n\n### still A\n\n## B\n\nkept\n"
    new = update(old, {"A": "## A\n\nnew\n", "C": "## C\n\nadded\n"})
    assert new == "# Benchmarks\n\nProse.\n\n## A\n\nnew\n\n## B\n\nkept\n\n## C\n\nadded\n"
    assert update(new, {"A": "## A\n\nnew\n"}) == new
    assert update("", {"A": "## A\n\nnew\n"}) == "## A\n\nnew\n"


def test_a_table_says_whether_targets_are_met() -> None:
    targets = [Target("share", 0.5, 0.75, at_most=True), Target("speed", 9, 10, at_most=False, unit=" x")]
    text = Table("T", "How.", ("a", "b"), [("1", "2")], targets).markdown("a machine")
    assert text.startswith("## T\n\nHow.\n\nMachine: a machine.\n\n| a | b |\n| --- | --- |\n| 1 | 2 |\n")
    assert "- share: 0.5 (at most 0.75: met)" in text
    assert "- speed: 9 x (at least 10 x: MISSED)" in text


def test_command_writes_numbers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["load", "--quick", "--json", str(tmp_path / "out.json")]) == 0
    content = json.loads((tmp_path / "out.json").read_text())
    assert set(content) == {"machine", "quick", "load"}
    assert len(content["load"]["numbers"]["seconds"]["bare"]) == 2
    assert content["load"]["numbers"]["index"]["mebibytes"] > 10
    assert content["load"]["targets"] == []
    assert "## Data loading" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["speed"],
            "'speed': expected one or several of train, infer, assign, load, evaluate, augment, share, two_stage",
        ),
        (["--threads", "0"], "--threads: expected at least 1"),
        (["--quick", "--markdown", "x.md"], "--markdown: the times of a --quick run say nothing"),
    ],
)
def test_wrong_arguments(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(arguments)
    assert end.value.code == 2
    assert message in capsys.readouterr().err
