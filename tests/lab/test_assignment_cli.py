"""Numbers and pictures of rules without training."""

from __future__ import annotations

import json
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from detector import canvas
from detector.assign.base import from_index
from detector.cli.assignment import main
from detector.lab.pictures import crop, jpeg, rule_row
from detector.structures import Batch, Objects
from tests.assign.make import pyramid
from tests.lab.conftest import Place

OWN = """
from typing import Literal
import torch
from detector.assign import Assigner, from_index

class Best(Assigner):
    type: Literal["best"] = "best"
    uses_predictions = True

    def assign_image(self, priors, objects, predictions):
        index = torch.full((len(priors),), -1)
        index[predictions.class_logits[0].amax(1).topk(len(objects)).indices] = torch.arange(len(objects))
        return from_index(index)
"""


def run(*arguments: str | Path) -> int:
    return main([str(a) for a in arguments])


def test_stats(done: Place, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "stats.json"
    assert run("stats", done.folder / "tiny.yaml", "--rules", "atss,fcos,max_iou", "--json", out, "data.val=6") == 0
    shown = capsys.readouterr().out
    assert "atss and fcos:" in shown
    found = json.loads(out.read_text())
    assert found["images"] == 6
    assert set(found["agreement"]) == {"atss,fcos", "atss,max_iou", "fcos,max_iou"}
    for rule in ("atss", "fcos", "max_iou"):
        groups = found["rules"][rule]
        assert sum(g["objects"] for g in groups["size"].values()) == groups["all"]["all"]["objects"]
        assert sum(g["share_of_positives"] for g in groups["level"].values()) == pytest.approx(1)
    # What the study has recorded of the same rule on the same images.
    recorded = json.loads((done.cell("one", 0) / "result.json").read_text())["assignment"]
    for key, value in recorded["all"]["all"].items():
        if key != "predicted_iou":
            assert found["rules"]["atss"]["all"]["all"][key] == pytest.approx(value, abs=1e-5), key


def test_show(done: Place, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture = tmp_path / "a.png"
    arguments = ("--recipe", done.folder / "tiny.yaml", "--out", picture, "--panel", "200")
    assert run("show", "1", "--rules", "atss,fcos", *arguments) == 0
    two = cv2.imread(str(picture))
    assert run("show", "000001.png", "--rules", "atss", *arguments) == 0
    one = cv2.imread(str(picture))
    assert two.shape[1] == one.shape[1] >= 4 * 200
    assert 1.8 < two.shape[0] / one.shape[0] < 2.2
    assert "pairs for" in capsys.readouterr().out


def test_rules_that_look_at_predictions_need_a_checkpoint(done: Place, tmp_path: Path,
                                                          capsys: pytest.CaptureFixture[str]) -> None:  # fmt: skip
    (tmp_path / "own.py").write_text(OWN)
    recipe = ("--recipe", done.folder / "tiny.yaml", "--out", tmp_path / "a.png", f"imports=[{tmp_path}/own.py]")
    assert run("show", "1", "--rules", "best", *recipe) == 2
    assert "rule 'best' looks at the network's predictions: give --checkpoint" in capsys.readouterr().err
    last = [done.cell("one", seed) / "run" / "last.pt" for seed in (0, 1)]
    assert run("show", "1", "--rules", "best,atss", *recipe, "--checkpoint", last[0]) == 0
    out = tmp_path / "s.json"
    stats = (done.folder / "tiny.yaml", f"imports=[{tmp_path}/own.py]")
    checkpoints = ("--checkpoint", last[0], "--checkpoint", last[1])
    assert run("stats", *stats, "--rules", "best,atss", "--json", out, *checkpoints) == 0
    flips = json.loads(out.read_text())["flips"]
    assert flips["atss"] == [0.0]  # geometry does not move
    assert flips["best"][0] > 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("show", "1", "--rules", "atsss"), "assigner.type: unknown type 'atsss' (did you mean 'atss'?)"),
        (("show", "1", "--rules", ","), "--rules ',': names no rule"),
        (("show", "nothing.png"), "nothing.png: is no image of"),
        (("show", "1", "--checkpoint", "none.pt"), "none.pt: no such checkpoint"),
        (("stats", "none"), "none: no such file"),
    ],
)
def test_mistakes(done: Place, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...],
                  message: str) -> None:  # fmt: skip
    recipe = ("--recipe", done.folder / "tiny.yaml", "--out", tmp_path / "a.png") if arguments[0] == "show" else ()
    assert run(*arguments, *recipe) == 2
    assert message in capsys.readouterr().err


def test_unknown_arguments(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        run("show", "1", "--what")
    assert "--what" in capsys.readouterr().err


def scene() -> tuple[Batch, Objects]:
    objects = Objects.collate([torch.tensor([[8.0, 8, 40, 40], [48, 48, 60, 60]])], [torch.tensor([0, 1])],
                              sizes=torch.tensor([[64.0, 64]]))  # fmt: skip
    images = torch.full((1, 3, 64, 64), 128, dtype=torch.uint8)
    return Batch(
        images, objects, torch.tensor([7]), torch.tensor([[64, 64]]), torch.ones(1, 2), torch.zeros(1, 2)
    ), objects


def test_dots_have_the_colour_of_their_object_and_the_size_of_their_weight() -> None:
    batch, _ = scene()
    priors = pyramid((64, 64), strides=(8, 16))
    index = torch.full((1, len(priors)), -1)
    index[0, 2 * 8 + 2], index[0, 4 * 8 + 4] = 0, 0  # centres (20, 20) and (36, 36)
    assignment = from_index(index, torch.ones(1, len(priors)))
    assignment.weight[4 * 8 + 4] = 0.05
    picture = rule_row(batch, priors, assignment, ["a", "b"], "rule", panel=256)
    colour = np.array(canvas.color(0))
    dots = (picture == colour).all(2)
    left = dots[:, : picture.shape[1] // 2]
    assert left.any()
    assert not dots[:, picture.shape[1] // 2 :].any()  # nothing on the second level
    count, _, stats, _ = cv2.connectedComponentsWithStats(left.astype(np.uint8))
    areas = sorted(stats[1:, cv2.CC_STAT_AREA].tolist())
    heavy, light = areas[-1], [a for a in areas[:-1] if a > 8]
    assert count >= 3
    assert heavy > 100
    assert any(a < heavy / 3 for a in light)


def test_a_row_without_any_pair_and_a_crop_at_the_edge() -> None:
    batch, _ = scene()
    priors = pyramid((64, 64), strides=(8,))
    picture = rule_row(batch, priors, from_index(torch.full((1, len(priors)), -1)), ["a", "b"], "rule", panel=128)
    assert picture.shape[2] == 3
    assert len(jpeg(picture)) > 100
    image = batch.images[0].permute(1, 2, 0).numpy()
    for box in ([0.0, 0, 3, 3], [60, 60, 64, 64], [0, 0, 64, 64]):
        assert max(crop(image, np.array(box)).shape[:2]) == 160
