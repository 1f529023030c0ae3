"""The union of criteria in a configuration: its default, its override, and what does not go together."""

from __future__ import annotations

from pathlib import Path

import pytest

from detector.assign import Atss
from detector.config.load import dump, from_snapshot, load_config
from detector.errors import ConfigError
from detector.losses.auto_assign import AutoAssignConfig
from detector.losses.criteria import WITHOUT_RULE
from detector.losses.dense import DenseCriterionConfig
from detector.losses.free_anchor import FreeAnchorConfig

START = "data: {type: shapes}\ntrain: {}\n"
QUALITY = "model: {head: {quality: true}}\n"


def write(folder: Path, text: str) -> Path:
    path = folder / "mine.yaml"
    path.write_text(START + text)
    return path


def test_dense_is_the_default(tmp_path: Path) -> None:
    plain = load_config(write(tmp_path, "model: {}\n"))
    assert isinstance(plain.criterion, DenseCriterionConfig)
    assert plain.assigner == Atss()
    some = load_config(write(tmp_path, "model: {}\ncriterion: {box: {type: ciou}}\n"))
    assert some.criterion == DenseCriterionConfig(box={"type": "ciou"})


def test_criteria_that_match_by_themselves_have_no_rule(tmp_path: Path) -> None:
    assert WITHOUT_RULE == ("free_anchor", "auto_assign")
    config = load_config(write(tmp_path, "model: {}\ncriterion: {type: free_anchor, bag: 20}\n"))
    assert config.criterion == FreeAnchorConfig(bag=20)
    assert config.assigner is None
    copy = tmp_path / "copy.yaml"
    copy.write_text(dump(config))
    assert load_config(copy) == config
    for plugins in (True, False):
        assert from_snapshot(config.model_dump(mode="json"), "best.pt", plugins=plugins) == config
    config = load_config(write(tmp_path, QUALITY + "criterion: {type: auto_assign}\n"))
    assert (config.criterion, config.assigner) == (AutoAssignConfig(), None)


def test_one_line_exchanges_the_criterion() -> None:
    config = load_config(Path("assign/base"), ["criterion={type: auto_assign}", "assigner=null"])
    assert config.criterion == AutoAssignConfig()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "model: {}\ncriterion: {type: free_anker}\n",
            "criterion.type: unknown type 'free_anker' (did you mean 'free_",
        ),
        ("model: {}\ncriterion: {type: free_anchor, bga: 3}\n", "criterion.bga: unknown key (did you mean 'bag'?)"),
        ("model: {}\ncriterion: {bga: 3}\n", "criterion.bga: unknown key"),
        ("model: {}\ncriterion: {type: free_anchor}\nassigner: {type: atss}\n", "set assigner=null"),
        ("model: {}\nassigner: null\n", "needs a rule of label assignment: set assigner"),
        (
            "model: {}\ncriterion: {type: auto_assign}\n",
            "needs an objectness but model.head.quality is false: set model",
        ),
        (QUALITY + "criterion: {type: free_anchor}\n", "nothing would train it: set model.head.quality=false"),
        ("model: {}\ncriterion: {distribution: {type: dfl}}\n", "set model.head.coder={type: bins}, or"),
        (
            "model: {head: {coder: {type: bins}}}\ncriterion: {box: {type: l1}}\n",
            "those of a 'bins' coder are logits: set criterion.box.type=giou",
        ),
        (
            "model: {head: {type: task_aligned, coder: {type: bins}}}\ncriterion: {distribution: {type: dfl}}\n",
            "the head gives no distributions",
        ),
        (QUALITY + "criterion: {class_on: positives, quality: {type: bce}}\n", "set quality={type: objectness}"),
        (QUALITY + "criterion: {type: iqdet}\nassigner: {type: iqdet}\n", "set model.encoder={}"),
        ("model: {encoder: {}}\n", "nothing would train it: set criterion.type=iqdet, or model.encoder=null"),
        (
            "model: {encoder: {}}\ncriterion: {type: iqdet}\nassigner: {type: iqdet}\n",
            "criterion.dense.quality is set but model.head.quality is false",
        ),
        (
            "model: {encoder: {}, head: {quality: true}}\ncriterion: {type: iqdet, dense: {quality: null}}\n",
            "nothing would train it: set criterion.dense.quality, or model.head.quality=false",
        ),
        (
            "model: {encoder: {}, head: {quality: true}}\ncriterion: {type: iqdet, dense: {quality: {type: bce},"
            " distribution: {type: dfl}}}\n",
            "criterion.dense.distribution is set but the head gives no distributions",
        ),
        ("model: {head: {type: tood}}\n", "model.head.type: unknown type 'tood'; known: dense, task_aligned"),
        ("model: {head: {type: task_aligned, shared_tower: true}}\n", "model.head.shared_tower: unknown key"),
    ],
)
def test_a_mistake_is_one_line(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        load_config(write(tmp_path, text))
    assert message in str(error.value)
    assert "\n" not in str(error.value)
