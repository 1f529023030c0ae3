"""The page on augmentation speaks of every step and every order, and its example is a valid one."""

from __future__ import annotations

import re
import runpy
from pathlib import Path
from typing import get_args

import pytest
import yaml
from pydantic import TypeAdapter

from detector.config.plugins import tag_of
from detector.data.order import AnyOrdering
from detector.data.steps import When
from detector.data.transforms import Transform
from detector.pixels import Pixels

DOCS = Path(__file__).resolve().parents[1] / "docs"
PAGE = (DOCS / "augmentation.md").read_text(encoding="utf-8")
MEMBERS = [*get_args(get_args(Transform)[0]), *get_args(get_args(AnyOrdering)[0])]


@pytest.mark.parametrize("member", MEMBERS, ids=lambda m: str(tag_of(m)))
def test_every_step_is_described(member: type) -> None:
    assert re.search(rf"\b{tag_of(member)}\b", PAGE)


def test_the_schedule_is_described_with_its_defaults() -> None:
    for key in When.model_fields:
        assert f"| `{key}` |" in PAGE


def test_examples_are_valid() -> None:
    examples = [yaml.safe_load(text) for text in re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL)]
    steps = [example["augment"] for example in examples if "augment" in example]
    assert [len(TypeAdapter(tuple[Transform, ...]).validate_python(given)) for given in steps][:1] == [6]
    for given in (example["data"]["pixels"] for example in examples if "pixels" in example.get("data", {})):
        Pixels.model_validate(given)


def test_every_picture_is_there_and_made_by_the_command() -> None:
    shown = re.findall(r"!\[\]\((.*?)\)", PAGE)
    made = runpy.run_path(str(DOCS / "augmentation" / "make.py"))["STEPS"]
    assert {Path(name).stem for name in shown} == set(made)
    for name in shown:
        assert 5_000 < (DOCS / name).stat().st_size < 80_000
    for _, text in made.values():
        TypeAdapter(Transform).validate_python(yaml.safe_load(text))
