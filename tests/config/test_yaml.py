"""Reading, merging and overriding, with what a user sees when it goes wrong."""

from __future__ import annotations

from pathlib import Path

import pytest

from detector.config import yaml as files
from detector.errors import ConfigError


def write(folder: Path, name: str, text: str) -> Path:
    path = folder / name
    path.write_text(text)
    return path


def test_numbers_in_scientific_notation_are_numbers(tmp_path: Path) -> None:
    values = files.read(write(tmp_path, "a.yaml", "lr: 1e-3\nbig: 2E5\nneg: -1e-8\nword: e5\n")).values
    assert values == {"lr": 1e-3, "big": 2e5, "neg": -1e-8, "word": "e5"}


def test_a_base_is_merged_deeply_and_remembers_who_said_what(tmp_path: Path) -> None:
    write(tmp_path, "base.yaml", "assigner: {type: atss, topk: 9}\nseed: 1\n")
    document = files.read(write(tmp_path, "mine.yaml", "base: base.yaml\nassigner: {topk: 15}\n"), ["seed=4"])
    assert document.values == {"assigner": {"type": "atss", "topk": 15}, "seed": 4}
    assert document.source_of("assigner.type").endswith("base.yaml")
    assert document.source_of("assigner.topk").endswith("mine.yaml")
    assert document.source_of("seed") == "command line"


def test_another_type_replaces_the_whole_section(tmp_path: Path) -> None:
    path = write(tmp_path, "a.yaml", "assigner: {type: atss, topk: 9}\n")
    assert files.read(path, ["assigner.type=max_iou"]).values["assigner"] == {"type": "max_iou"}
    both = files.read(path, ["assigner.type=max_iou", "assigner.positive_iou=0.6"]).values["assigner"]
    assert both == {"type": "max_iou", "positive_iou": 0.6}
    assert files.read(path, ["assigner.type=atss"]).values["assigner"] == {"type": "atss", "topk": 9}


def test_a_length_in_another_unit_replaces_the_old_one(tmp_path: Path) -> None:
    path = write(tmp_path, "a.yaml", "train: {length: {epochs: 12}, batch_size: 4}\n")
    for override in ("train.length={steps: 20}", "train.length.steps=20"):
        assert files.read(path, [override]).values == {"train": {"length": {"steps": 20}, "batch_size": 4}}


def test_an_override_reaches_into_lists(tmp_path: Path) -> None:
    path = write(tmp_path, "a.yaml", "augment: [{type: flip, probability: 0.5}, {type: color}]\n")
    assert files.read(path, ["augment.0.probability=1"]).values["augment"][0] == {"type": "flip", "probability": 1}
    with pytest.raises(ConfigError, match=r"augment\.7\.x: expected a list index below 2, found '7'"):
        files.read(path, ["augment.7.x=1"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\na: 2\n", r"a\.yaml:2: key 'a' is given twice"),
        ("x: {b: 1, b: 2}\n", r"a\.yaml:1: key 'b' is given twice"),
        ("a: [1, 2\n", r"a\.yaml:2: not valid YAML"),
        ("- 1\n- 2\n", "expected sections with keys, found list"),
        ("1: 2\n", "key 1 is not text"),
        ("base: [x, y]\n", "expected the name of one file"),
        ("base: missing.yaml\n", r"missing\.yaml: no such file"),
    ],
)
def test_a_broken_file_is_named_with_the_line(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        files.read(write(tmp_path, "a.yaml", text))


def test_only_one_level_of_base(tmp_path: Path) -> None:
    write(tmp_path, "one.yaml", "base: two.yaml\n")
    write(tmp_path, "two.yaml", "seed: 1\n")
    with pytest.raises(ConfigError, match="only one level"):
        files.read(write(tmp_path, "top.yaml", "base: one.yaml\n"))


@pytest.mark.parametrize("text", ["novalue", "=3"])
def test_an_override_without_key_or_value(tmp_path: Path, text: str) -> None:
    with pytest.raises(ConfigError, match="expected key=value"):
        files.read(write(tmp_path, "a.yaml", "seed: 1\n"), [text])


def test_an_override_that_is_not_yaml(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="command line: seed: not valid YAML"):
        files.read(write(tmp_path, "a.yaml", "seed: 1\n"), ["seed=[1"])
