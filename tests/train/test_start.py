"""A training that starts from a whole detector's weights."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torchvision.models import detection

from detector.config.load import load_config
from detector.config.run import RunConfig
from detector.convert import hub
from detector.convert.common import configuration
from detector.convert.torchvision import ARCHITECTURES
from detector.errors import CheckpointError, ConfigError
from detector.models import Network
from detector.train.checkpoint import load_checkpoint, save_checkpoint
from detector.train.loop import train
from detector.train.start import start_from
from tests.train.compare import assert_same_training

Load = Callable[..., RunConfig]
SHAPES = ("ellipse", "rectangle", "triangle")  # of generated data

TWO_STAGE = """
model:
  type: {type}
  backbone: {{name: test_resnet, levels: [2, 3, 4, 5]}}
  neck: {{channels: 16, extra: pool, extra_levels: 1}}
  rpn: {{channels: 16, train: {{pre_nms: 50, post_nms: 30}}, test: {{pre_nms: 50, post_nms: 30}}}}
  head: {{channels: 16, {head}}}
criterion: {{type: two_stage, {weights}}}
assigner: {{type: max_iou}}
"""


def noisy(network: Network, seed: int) -> dict[str, Tensor]:
    """Other weights for the network, each number another; returns them."""
    generator = torch.Generator().manual_seed(seed)
    for value in network.state_dict().values():
        if value.is_floating_point():
            value.copy_(torch.rand(value.shape, generator=generator) + 0.5)
    return {k: v.clone() for k, v in network.state_dict().items()}


@pytest.fixture
def given(config: Load, tmp_path: Path) -> Callable[..., tuple[str, dict[str, Tensor]]]:
    """Writes a checkpoint of a configuration for these classes, with weights that no initialisation gives."""

    def write(classes: tuple[str, ...], *overrides: str, loaded: RunConfig | None = None) -> Any:
        settings = loaded or config(*overrides)
        with torch.no_grad():
            state = noisy(settings.network(len(classes), load_weights=False), 1)
        path = tmp_path / "given.pt"
        content: dict[str, Any] = dict.fromkeys(
            ("ema", "ema_count", "criterion", "optimizer", "scaler", "step", "seed", "scores", "numbers", "versions")
        )
        ids = list(range(1, len(classes) + 1))
        content |= {"model": state, "config": settings.model_dump(mode="json")}
        save_checkpoint(path, content | {"classes": list(classes), "category_ids": ids})
        return str(path), state

    return write


def started(source: str, config: RunConfig, classes: tuple[str, ...]) -> tuple[Network, Network, list[str]]:
    """The network that started from `source`, one that did not, and what was said."""
    networks = []
    for _ in range(2):
        torch.manual_seed(0)
        networks.append(config.network(len(classes), load_weights=False))
    before = torch.get_rng_state()
    said = start_from(source, networks[0], config, classes)
    assert torch.equal(torch.get_rng_state(), before)  # what is drawn later does not depend on it
    return networks[0], networks[1], said


def test_the_same_classes_take_everything(given: Any, config: Load) -> None:
    source, state = given(("cat", "dog"))
    network, _, said = started(source, config(), ("cat", "dog"))
    assert all(torch.equal(value, state[key]) for key, value in network.state_dict().items())
    assert said == [f"weights: {source}: {len(state)} of {len(state)} tensors loaded whole"]


def test_averaged_weights_come_first(given: Any, config: Load) -> None:
    source, state = given(("cat",))
    content = load_checkpoint(Path(source))
    content["ema"] = {k: v + 1 for k, v in state.items()}
    save_checkpoint(Path(source), content)
    network, _, _ = started(source, config(), ("cat",))
    assert all(torch.equal(value, state[key] + 1) for key, value in network.state_dict().items())


@pytest.mark.parametrize("separable", [False, True])
def test_rows_of_known_classes_by_name(separable: bool, given: Any, config: Load) -> None:
    """Three priors in a cell, two classes of which one is known, under another label."""
    overrides = ["model.head.priors={type: anchors, octave_scales: 1}"] + ["model.head.conv=separable"] * separable
    source, state = given(("cat", "dog"), *overrides)
    network, fresh, said = started(source, config(*overrides), ("bird", "cow", "cat"))
    last = "head.classes.1" if separable else "head.classes"
    for key, value in network.state_dict().items():
        if key.startswith(last):
            assert torch.equal(value.unflatten(0, (3, 3))[:, 2], state[key].unflatten(0, (3, 2))[:, 0])
            untouched = fresh.state_dict()[key].unflatten(0, (3, 3))[:, :2]
            assert torch.equal(value.unflatten(0, (3, 3))[:, :2], untouched)
        else:
            assert torch.equal(value, state[key]), key
    assert said[0].endswith(f"{len(state) - 2} of {len(state)} tensors loaded whole")
    assert f"in {last}.weight, {last}.bias the rows of cat were loaded, those of bird, cow are freshly" in said[1]
    assert "(2 classes there, 3 here)" in said[1]


@pytest.mark.parametrize("kind", ["two_stage", "cascade"])
def test_rows_of_two_stage_heads(kind: str, given: Any, recipe: Path) -> None:
    text = recipe.read_text()
    start, rest = text.split("model:")[0], text.split("\ntrain:")[1]
    options = {
        "two_stage": {"head": "linear: 1", "weights": "stage_weights: [1]"},
        "cascade": {"head": "linear: 1, class_agnostic: true", "weights": "stage_weights: [1, 0.5, 0.25]"},
    }
    recipe.write_text(start + TWO_STAGE.format(type=kind, **options[kind]) + "train:" + rest)
    config = load_config(recipe)
    source, state = given(("cat", "dog"), loaded=config)
    network, fresh, said = started(source, config, ("bird", "dog", "cow"))
    parts = network.state_dict()
    for stage in range(1 if kind == "two_stage" else 3):
        classes = parts[f"heads.{stage}.classes.bias"]
        old = state[f"heads.{stage}.classes.bias"]
        assert classes[[1, 3]].tolist() == old[[1, 2]].tolist()  # dog and background
        assert torch.equal(classes[[0, 2]], fresh.state_dict()[f"heads.{stage}.classes.bias"][[0, 2]])
    box = state["heads.0.box.weight"]
    if kind == "two_stage":
        assert torch.equal(parts["heads.0.box.weight"][4:8], box[4:])
        unchanged = [0, 1, 2, 3, 8, 9, 10, 11]
        assert torch.equal(parts["heads.0.box.weight"][unchanged], fresh.state_dict()["heads.0.box.weight"][unchanged])
    else:
        assert torch.equal(parts["heads.0.box.weight"], box)
    assert "rows of dog" in said[1]
    # Nothing in common: nothing of these layers is taken, the background neither.
    network, fresh, said = started(source, config, ("bird", "cow"))
    assert torch.equal(network.state_dict()["heads.0.classes.bias"], fresh.state_dict()["heads.0.classes.bias"])
    assert (
        "freshly initialised, since no class is the same (2 classes there, 2 here): heads.0.classes.weight" in said[1]
    )


def test_frozen_norms_take_up_the_batch_norms(given: Any, config: Load) -> None:
    source, _ = given(("cat",))
    plain, _, _ = started(source, config(), ("cat",))
    frozen, _, _ = started(source, config("model.backbone.norm=frozen_batch"), ("cat",))
    image = torch.rand(1, 3, 64, 64) * 255
    found, expected = frozen.eval().backbone(image), plain.eval().backbone(image)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4 * float(b.detach().abs().max()))


def test_settings_that_shapes_do_not_show_are_said(given: Any, config: Load) -> None:
    source, _ = given(("cat",), "model.head.priors={type: anchors, offset: 0}", "model.backbone.std=[1, 1, 1]")
    _, _, said = started(source, config("model.backbone.freeze_stages=2"), ("cat",))
    assert said[2] == "weights: made with model.head.priors.offset 0.0, the recipe has 0.5: they have to adapt to it"
    assert said[1].startswith("weights: made with model.backbone.std [1.0, 1.0, 1.0], the recipe has [127.5")
    assert len(said) == 3


def test_whatever_else_differs_is_an_error(given: Any, config: Load, tmp_path: Path) -> None:
    source, _ = given(("cat", "dog"))

    def fails(match: str, *overrides: str, path: str = source) -> None:
        with pytest.raises(CheckpointError, match=match):
            started(path, config(*overrides), ("cat",))

    fails(r"head.class_tower.0.convs.0.weight \(16, 16, 3, 3\) instead of \(8, 16, 3, 3\)", "model.head.channels=8")
    fails(r"6 tensors of the recipe's model are not there \(head.class_tower.1", "model.head.convs=2")
    fails(r"have no place in it \(head.quality.weight", "model.head.quality=false", "criterion.quality=null")
    fails("no such checkpoint", path=str(tmp_path / "none.pt"))
    Path(source).write_bytes(Path(source).read_bytes()[:4000])
    fails("damaged or truncated")
    torch.save({"weight": torch.zeros(2)}, tmp_path / "plain.pth")
    fails("convert_weights", path=str(tmp_path / "plain.pth"))
    frozen, _ = given(("cat",), "model.backbone.norm=frozen_batch")
    fails("tensors of the recipe's model are not there", path=frozen)
    with pytest.raises(ConfigError, match=r"weights and model\.backbone\.weights are both set"):
        config("weights=a.pt", "model.backbone.weights=b.pth")
    with pytest.raises(ConfigError, match="did you mean 'weights'"):
        config("weigths=a.pt")


def test_a_run_starts_and_goes_on_without_the_file(
    given: Any, config: Load, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The file is read once: afterwards the checkpoint has everything, and going on equals never having stopped."""
    source, state = given(("cat", "triangle"))
    straight = config(f"weights={source}", "train.length={steps: 6}")
    train(straight)
    stopping = config(f"weights={source}", "train.length={steps: 2}", f"run.dir={tmp_path / 'stopped'}")
    train(stopping)
    assert "tensors loaded whole" in capsys.readouterr().out
    Path(source).unlink()
    whole = config(f"weights={source}", "train.length={steps: 6}", f"run.dir={tmp_path / 'stopped'}")
    train(whole, resume=tmp_path / "stopped")
    a, b = (load_checkpoint(tmp_path / name / "last.pt") for name in ("run", "stopped"))
    assert_same_training(a, b)
    moved = (a["model"]["neck.lateral.0.0.weight"] - state["neck.lateral.0.0.weight"]).abs().max()
    assert 0 < moved < 0.5
    with pytest.raises(CheckpointError, match=r"weights was .* and is now None"):
        train(config(f"run.dir={tmp_path / 'stopped'}"), resume=tmp_path / "stopped")


def test_torchvisions_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the folder where torch keeps downloads; without network and file, where to get it and put it."""
    name = "retinanet_resnet50_fpn"
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    data = f"data={{type: shapes, root: {tmp_path}, size: [64, 64], train: 2, val: 2, workers: 0}}"
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(json.dumps({**ARCHITECTURES[name].sections, "weights": f"torchvision://{name}", "train": {}}))
    config = load_config(recipe, [data])
    network = config.network(3, load_weights=False)
    assert config.weights is not None

    monkeypatch.setattr(torch.hub, "download_url_to_file", no_network)
    place = tmp_path / "hub" / "checkpoints" / "retinanet_resnet50_fpn_coco-eeacb38b.pth"
    with pytest.raises(CheckpointError, match=r"\(no route\).*fetch https://download.pytorch.org/.* put it at .*eeacb"):
        start_from(config.weights, network, config, ("cat", "person", "dog"))
    torch.manual_seed(0)
    state = detection.retinanet_resnet50_fpn(weights=None, weights_backbone=None).state_dict()
    state["backbone.body.bn1.running_var"].fill_(2.0)
    torch.save(state, place)
    said = start_from(config.weights, network, config, ("cat", "person", "wolf"))
    parts = network.state_dict()
    theirs = state["head.classification_head.cls_logits.bias"].view(9, 91)
    ours = parts["head.classes.bias"].view(9, 3)
    assert torch.equal(ours[:, :2], theirs[:, [17, 1]])
    assert torch.equal(parts["neck.output.2.weight"], state["backbone.fpn.layer_blocks.2.0.weight"])
    assert parts["backbone.features.bn1.running_var"][0] == 2 - 1e-5  # their own file was made without epsilon
    assert (
        "rows of cat, person were loaded, those of wolf are freshly initialised (80 classes there, 3 here)" in said[1]
    )
    assert len(said) == 2
    place.write_bytes(place.read_bytes()[:9000])
    with pytest.raises(CheckpointError, match="truncated"):
        start_from(config.weights, network, config, ("cat",))
    with pytest.raises(CheckpointError, match=r"did you mean 'retinanet_resnet50_fpn'"):
        hub.from_torchvision("torchvision://retinanet_resnet50")


@pytest.mark.parametrize("recipe", ["faster_rcnn_r50_torchvision", "retinanet_r50_torchvision"])
def test_recipes_for_fine_tuning_compute_what_the_weights_were_made_with(recipe: str) -> None:
    config = load_config(Path("finetune") / recipe)
    assert config.weights is not None
    known = ARCHITECTURES[config.weights.removeprefix(hub.SCHEME)]
    theirs, ours = (c.model.model_dump(mode="json") for c in (configuration(known.sections, "x"), config))
    assert theirs.pop("rules", None) == ours.pop("rules", None)
    for values in (theirs, ours):
        for key in ("pretrained", "freeze_stages", "norm"):
            del values["backbone"][key]
        for key in ("train", "test"):
            values.get("rpn", {}).pop(key, None)
    assert theirs == ours


def no_network(*_: object, **__: object) -> None:
    raise OSError("no route")
