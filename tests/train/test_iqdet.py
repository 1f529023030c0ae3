"""IQDet through whole runs: the encoder is trained, saved and resumed with the network and absent from inference."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from detector.config.load import load_config
from detector.config.run import RunConfig
from detector.predict import load
from detector.train.loop import train
from tests.train.test_loop import stop_and_go

Load = Callable[..., RunConfig]
IQDET = ("criterion={type: iqdet}", "assigner={type: iqdet}", "model.encoder={channels: 16}")
POINTS = ("model.head.priors={type: points}", "model.head.coder={type: distances, activation: relu}")


def test_stop_and_go_changes_nothing(config: Load, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bit for bit, the points that are drawn and the notes of the probe included."""
    iqdet = (*IQDET, *POINTS, "train.probe={images: 2, every: {steps: 3}}")
    halfway, stopped = stop_and_go(config, iqdet, tmp_path, monkeypatch)
    encoder = [name for name in stopped["model"] if name.startswith("encoder.")]
    assert len(encoder) == 6
    for name in encoder:
        assert not torch.equal(stopped["model"][name], halfway["model"][name]), f"{name} did not learn after the resume"
    for note in ("step-000003.npz", "step-000006.npz"):
        one, two = ((tmp_path / name / "assignments" / note).read_bytes() for name in ("run", "stopped"))
        assert one == two


def test_inference_does_not_know_of_it(config: Load, tmp_path: Path) -> None:
    """The same first weights with and without an encoder, and the same answers; a checkpoint of it predicts."""
    with_it, without = config(*IQDET), config()
    batch = torch.randint(0, 255, (2, 3, 64, 64), dtype=torch.uint8)
    model = with_it.model.build(3)
    plain = without.model.build(3)
    assert plain.load_state_dict(model.state_dict(), strict=False).unexpected_keys == [
        f"encoder.{layer}.{kind}" for layer in ("first", "second", "last") for kind in ("weight", "bias")
    ]
    calls = []
    model.encoder.register_forward_hook(lambda *_: calls.append(1))  # type: ignore[union-attr]
    with torch.no_grad():
        one, two = (m.eval()(batch) for m in (model, plain))
    assert one.mixture is None
    assert not calls
    assert torch.equal(one.class_logits, two.class_logits)
    assert torch.equal(one.box_raw, two.box_raw)
    train(config(*IQDET))
    assert load(tmp_path / "run" / "last.pt")(torch.zeros(64, 64, 3, dtype=torch.uint8).numpy()) is not None


def test_without_an_encoder_the_run_says_so(config: Load, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train(config("assigner={type: iqdet}", "train.length={steps: 1}"))
    assert "iqdet draws around the centres of objects" in capsys.readouterr().out


HEADS = {
    "points": "{type: points}",
    "one anchor": "{type: anchors, scale: 8, octave_scales: 1, ratios: [1.0]}",
    "nine anchors": "{type: anchors}",
}


@pytest.mark.parametrize("points", ["between", "rounded"])
@pytest.mark.parametrize(
    "priors", ["nine anchors", *(pytest.param(name, marks=pytest.mark.slow) for name in ("points", "one anchor"))]
)
def test_twenty_steps(priors: str, points: str, tmp_path: Path) -> None:
    coder = "{type: distances, activation: relu}" if priors == "points" else "{type: deltas}"
    run = load_config(
        Path("assign/iqdet"),
        [
            f"data={{type: shapes, root: {tmp_path}/data, size: [64, 96], train: 2, val: 1, test: 1, workers: 0}}",
            "data.resize={type: short_edge, short: 64, long: 96}",
            "augment=[]",
            "model.backbone.name=test_resnet",
            "model.backbone.pretrained=false",
            "model.neck.channels=32",
            "model.head.channels=32",
            f"model.head.priors={HEADS[priors]}",
            f"model.head.coder={coder}",
            "model.encoder={channels: 32}",
            f"criterion={{type: iqdet, points: {points}}}",
            "train.length={steps: 20}",
            "train.batch_size=2",
            "train.optimizer={type: adamw, lr: 3e-3, base_batch: null}",
            "train.schedule={type: cosine, warmup: {steps: 2}}",
            "train.evaluate_every=null",
            "train.log_every=1",
            "train.pictures=0",
            "train.ema=null",
            f"run.dir={tmp_path}/run",
        ],
    )
    train(run)
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "loss" in line]
    assert len(steps) == 20
    assert sum(line["loss"] for line in steps[-4:]) < sum(line["loss"] for line in steps[:4])
    # Cross-entropy with an IoU is at least that number's own entropy, which rises while boxes get better.
    losses = [line["loss/class"] + line["loss/box"] for line in steps]
    assert sum(losses[-4:]) < 0.8 * sum(losses[:4])
    assert (tmp_path / "run" / "pictures" / "assignment-dense.jpg").is_file()
