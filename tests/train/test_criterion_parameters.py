"""Criteria that learn, through whole runs: their parameters are optimised, saved and resumed like the network's."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from detector.config.run import RunConfig
from detector.train.checkpoint import load_checkpoint
from detector.train.loop import train
from tests.train.test_loop import stop_and_go

Load = Callable[..., RunConfig]
AUTO = ("criterion={type: auto_assign}", "assigner=null")
FREE = ("criterion={type: free_anchor}", "assigner=null", "model.head.quality=false")


def test_the_centre_prior_learns_and_is_in_the_checkpoint(config: Load, tmp_path: Path) -> None:
    train(config(*AUTO, "train.optimizer.weight_decay=0.5"))
    folder = tmp_path / "run"
    content = load_checkpoint(folder / "last.pt")
    assert set(content["criterion"]) == {"center_prior.mean", "center_prior.sigma"}
    mean, sigma = (content["criterion"][f"center_prior.{name}"] for name in ("mean", "sigma"))
    assert mean.any()
    assert (sigma != 1).any()
    # Decay of 0.5 at this rate would have taken a hundredth a step; the centre prior is spared.
    assert (sigma - 1).abs().max() < 0.02
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    steps = [record for record in records if record["kind"] == "train"]
    assert len(steps) == 6
    for record in steps:
        text = json.dumps(record)
        assert all(f'"{name}"' in text or f"/{name}" in text for name in ("positive", "negative", "center"))
        assert "positives_per_object/all" in text
    assert (folder / "pictures" / "assignment-dense.jpg").is_file()


@pytest.mark.parametrize("criterion", [AUTO, FREE], ids=["auto_assign", "free_anchor"])
def test_stop_and_go_changes_nothing(
    criterion: tuple[str, ...], config: Load, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit for bit, the centre prior and what the optimiser knows of it included."""
    halfway, stopped = stop_and_go(config, criterion, tmp_path, monkeypatch)
    for name, value in stopped["criterion"].items():
        assert not torch.equal(value, halfway["criterion"][name]), f"{name} did not learn after the resume"
