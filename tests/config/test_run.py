"""Whole configurations: every recipe loads, every mistake is one line with file and key, snapshots come back equal."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, get_args

import pytest

from detector.assign import Rule
from detector.cli.config import main
from detector.config.load import dump, find_recipe, from_snapshot, load_config, recipe_folders, schema
from detector.errors import CheckpointError, ConfigError

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
RECIPES = sorted(p for p in CONFIGS.rglob("*.yaml") if p.parent.name != "studies")


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_a_recipe_loads_and_its_snapshot_is_equal(path: Path, tmp_path: Path) -> None:
    config = load_config(path)
    copy = tmp_path / "config.yaml"
    copy.write_text(dump(config))
    assert load_config(copy) == config
    stored = json.loads(json.dumps(config.model_dump(mode="json")))  # what a checkpoint holds
    assert from_snapshot(stored, "best.pt") == config


def test_one_line_exchanges_the_rule() -> None:
    base = load_config(Path("bccd/atss_r18"))
    swapped = load_config(Path("bccd/atss_r18"), ["assigner.type=fcos"])
    assert swapped.assigner.type == "fcos"
    assert swapped.model_copy(update={"assigner": base.assigner}) == base


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("assigner.tpok=3", "command line: assigner.tpok: unknown key (did you mean 'topk'?)"),
        ("assigner.type=atsz", "command line: assigner.type: unknown type 'atsz' (did you mean 'atss'?)"),
        ("assigner={topk: 3, type: null}", "assigner"),
        ("train.batch_size=many", "command line: train.batch_size: should be a valid integer"),
        ("train.batch_size=0", "command line: train.batch_size: should be greater than or equal to 1, found 0"),
        ("model.head.quality=false", "set model.head.quality=true, or criterion.quality=null"),
        ("criterion.quality=null", "set criterion.quality, or model.head.quality=false"),
        ("train.length={epochs: 1, steps: 2}", "gives epochs and steps, expected one of them"),
        ("augment.0.horizontal=3", "command line: augment.0.horizontal: should be less than or equal to 1, found 3"),
        ("seed=-1", "command line: seed: should be greater than or equal to 0"),
        ("colour=red", "command line: colour: unknown key"),
    ],
)
def test_a_mistake_is_one_line_with_source_and_key(override: str, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        load_config(Path("quickstart"), [override])
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_every_mistake_of_a_file_is_told_at_once(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("data: {type: shapes, siut: tiny}\nmodel: {}\nassigner: {topk: 3}\ntrain: {lenght: {epochs: 3}}\n")
    with pytest.raises(ConfigError) as error:
        load_config(path)
    rules = ", ".join(rule.model_fields["type"].default for rule in get_args(get_args(Rule)[0]))
    assert str(error.value).splitlines() == [
        f"{path}: data.siut: unknown key (did you mean 'suite'?)",
        f"{path}: assigner: needs a `type`, one of: {rules}",
        f"{path}: train.lenght: unknown key (did you mean 'length'?)",
    ]


def test_a_missing_recipe_suggests_one() -> None:
    with pytest.raises(ConfigError, match=r"quikstart.*no such file.*did you mean the recipe 'quickstart\.yaml'"):
        find_recipe(Path("quikstart"))


def test_a_recipe_is_found_by_name_from_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert load_config(Path("quickstart")).name == "quickstart"
    assert load_config(Path("configs/quickstart.yaml")).name == "quickstart"


def test_the_schema_of_the_repository_is_current() -> None:
    written = json.loads((CONFIGS / "schema.json").read_text())
    assert written == json.loads(json.dumps(schema())), "run: python tools/config.py schema --out configs/schema.json"


def test_a_snapshot_of_another_version_is_explained() -> None:
    stored: dict[str, Any] = load_config(Path("quickstart")).model_dump(mode="json")
    stored["model"]["neck"]["colour"] = "red"
    with pytest.raises(CheckpointError, match=r"best\.pt: model\.neck\.colour: unknown key.*another version"):
        from_snapshot(stored, "best.pt")


def test_the_command(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["show", "quickstart", "assigner.topk=15"]) == 0
    shown = tmp_path / "shown.yaml"
    shown.write_text(capsys.readouterr().out)
    assert load_config(shown) == load_config(Path("quickstart"), ["assigner.topk=15"])
    assert main(["validate", *map(str, RECIPES)]) == 0
    capsys.readouterr()
    broken = tmp_path / "broken.yaml"
    broken.write_text("seeed: 1\n")
    assert main(["validate", str(broken), str(RECIPES[0])]) == 2
    assert "seeed: unknown key (did you mean 'seed'?)" in capsys.readouterr().out
    assert main(["show", "quickstart", "nonsense"]) == 2
    assert capsys.readouterr().err.startswith("error: command line: 'nonsense': expected key=value")
    assert main(["schema", "--out", str(tmp_path / "schema.json")]) == 0
    assert "assigner" in json.loads((tmp_path / "schema.json").read_text())["properties"]
    capsys.readouterr()
    assert main(["list"]) == 0
    assert "quickstart.yaml" in capsys.readouterr().out.split()
    assert CONFIGS in recipe_folders()
