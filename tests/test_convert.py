"""torchvision's detectors with our networks: the same detections from the same weights."""

from __future__ import annotations

import importlib.util
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close
from torchvision.models import detection
from torchvision.models.detection.transform import GeneralizedRCNNTransform

from detector.boxes import all_pairs_iou
from detector.cli.convert_weights import main
from detector.convert.common import coco_classes, configuration, rename
from detector.convert.torchvision import ARCHITECTURES, convert, reorder
from detector.decode import decode
from detector.errors import CheckpointError
from detector.models.dense_head import DenseHead
from detector.predict import restore
from detector.structures import Outputs


def peer_state(name: str, classes: int, seed: int) -> dict[str, Tensor]:
    """A small-grained stand-in for trained weights: torchvision's own initialisation, made loud."""
    torch.manual_seed(seed)
    model = getattr(detection, name)(weights=None, weights_backbone=None, num_classes=classes)
    state: dict[str, Tensor] = model.state_dict()
    return state


@pytest.fixture(scope="module")
def filler(shared: Path) -> Any:
    spec = importlib.util.spec_from_file_location("fill_weights", shared / "golden" / "fill_weights.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def golden_state(shared: Path, filler: Any, name: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    about = json.loads((shared / "golden" / "model_state_keys.json").read_text())[name]
    state = {}
    for line in about["state_dict"]:
        key, _, rest = line.partition(" ")
        shape = tuple(int(n) for n in rest.split()[0].split("x")) if rest and rest[0].isdigit() else ()
        state[key] = torch.from_numpy(filler.fill(key, shape, about["weight_seed"]))
    return state, about["kwargs"]


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_torchvisions_detections(golden: Any, shared: Path, filler: Any, name: str) -> None:
    """Boxes to 1e-3 pixels, scores to 1e-5, with torchvision's own resizing and padding.

    Class 0 of the sigmoid models, which training never uses, is kept here: with random weights it is found as well.
    torchvision takes a level's stride to be the padded side over the map's, 56 for 64 where 224 pixels have 4 cells;
    our anchors lie at the true stride, so here they are told otherwise.
    """
    file = golden(f"model_{name}")
    given, expected = file.scenario("in"), file.scenario("eval")
    state, _ = golden_state(shared, filler, name)
    known = ARCHITECTURES[name]
    config = configuration(known.sections, name)
    keep = range(1, 21) if known.softmax else range(21)
    if known.softmax:  # fewer proposals there
        numbers = {"pre_nms": 300, "post_nms": 100}
        rpn = type(config.model.rpn).model_validate({**config.model.rpn.model_dump(), "test": numbers})
        config = config.model_copy(update={"model": config.model.model_copy(update={"rpn": rpn})})
    weights = reorder(rename(state, known, Path("golden")), known, keep, 1e-5)
    model = config.model.build(len(keep), load_weights=False).eval()
    loaded = model.load_state_dict(weights, strict=False)
    assert not loaded.unexpected_keys
    assert all(key.endswith("num_batches_tracked") for key in loaded.missing_keys)

    images = [
        torch.from_numpy(filler.image(*hw, int(seed))).float() / 255
        for hw, seed in zip(given["image_hw"].tolist(), given["image_seeds"].tolist(), strict=True)
    ]
    mean, std = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
    batch, _ = GeneralizedRCNNTransform(160, 256, mean, std)(images)
    sizes = torch.tensor(batch.image_sizes, dtype=torch.float32)
    assert sizes.tolist() == expected["resized_hw"].tolist()
    pixels = (batch.tensors * torch.tensor(std)[:, None, None] + torch.tensor(mean)[:, None, None]) * 255

    head = model.rpn.head if known.softmax else model.head
    assert isinstance(head, DenseHead)
    nominal = head.strides
    head.strides = tuple(224 // -(-224 // s) for s in nominal)
    head.config = _with_shapes(head, nominal)
    with torch.no_grad():
        outputs = model(pixels, sizes=sizes)
    assert isinstance(outputs, Outputs)
    if name.startswith("fcos"):  # its distances are in nominal strides
        level = outputs.priors.level
        outputs = replace(outputs, priors=replace(outputs.priors, stride=torch.tensor(nominal).float()[level]))
    threshold = expected["score_thresh"].item()
    least = threshold**2 if name.startswith("fcos") else threshold
    settings = config.decode.model_copy(update={"score_threshold": least})
    degenerate = 0
    for i, found in enumerate(decode(outputs, sizes, settings)):
        scale = sizes[i] / torch.tensor(images[i].shape[-2:])
        boxes = found.boxes / scale.flip(0).repeat(2)
        above = found.scores > threshold
        boxes, scores, labels = boxes[above], found.scores[above], found.labels[above] + known.softmax
        theirs = {part: expected[f"{part}{i}"] for part in ("boxes", "scores", "labels")}
        # torchvision's one-stage detectors keep boxes from the padding, which clipping leaves without area.
        real = (theirs["boxes"][:, 2:] > theirs["boxes"][:, :2]).all(1)
        degenerate += int((~real).sum())
        assert_close(scores, theirs["scores"][real], atol=1e-5, rtol=0)
        assert torch.equal(labels, theirs["labels"][real].long())
        assert_close(boxes, theirs["boxes"][real], atol=1e-3, rtol=0)
    assert degenerate == {"retinanet_resnet50_fpn": 4, "retinanet_resnet50_fpn_v2": 1}.get(name, 0)


def _with_shapes(head: DenseHead, nominal: tuple[int, ...]) -> Any:
    """The head's configuration with anchors of the nominal strides' sizes on whatever stride the grid has."""
    priors = head.config.priors
    by_stride = {s: priors.shapes(n) for s, n in zip(head.strides, nominal, strict=True)}

    class Told(type(priors)):  # type: ignore[misc]
        def shapes(self, stride: int) -> tuple[tuple[float, float], ...]:
            return by_stride[stride]

    return head.config.model_copy(update={"priors": Told.model_construct(**dict(priors))})


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_file_becomes_a_checkpoint(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    state = peer_state(name, 4, 0)
    torch.save(state, tmp_path / "weights.pth")
    out = tmp_path / "converted" / "model.pt"
    assert (
        main([str(tmp_path / "weights.pth"), "--from", name, "--out", str(out), "--classes", "cat", "dog", "cow"]) == 0
    )
    assert f"{len(state)} tensors" in capsys.readouterr().out
    restored = restore(out)
    assert restored.classes == ("cat", "dog", "cow")
    count = sum(v.numel() for k, v in restored.model.state_dict().items() if "num_batches" not in k)
    # All but the background's numbers came along.
    there = sum(v.numel() for k, v in state.items() if "num_batches" not in k)
    assert 0 <= there - count < 30_000
    outputs = restored.model(torch.zeros(1, 3, 64, 64, dtype=torch.uint8))
    assert outputs.class_logits.shape[-1] == 3


def test_cocos_80_of_91() -> None:
    path = Path("weights.pth")
    known = ARCHITECTURES["retinanet_resnet50_fpn"]
    state = rename(peer_state("retinanet_resnet50_fpn", 91, 0), known, path)
    classes, keep = coco_classes(), coco_classes().ids
    assert (len(classes.names), classes.names[0], classes.names[-1], keep[-1]) == (80, "person", "toothbrush", 90)
    bias = state["head.classes.bias"] = torch.arange(9.0 * 91)
    kept = reorder(state, known, keep, 1e-5)["head.classes.bias"].view(9, 80)
    assert torch.equal(kept, bias.view(9, 91)[:, keep])


def test_norms_without_epsilon() -> None:
    """COCO_V1 of Faster R-CNN and RetinaNet was made without one: variances shrink by ours."""
    known = ARCHITECTURES["retinanet_resnet50_fpn"]
    named = {"backbone.features.bn1.running_var": torch.tensor([0.5, 2e-5])}
    assert (known.coco_eps, ARCHITECTURES["fasterrcnn_resnet50_fpn_v2"].coco_eps) == (0.0, 1e-5)
    found = reorder(named, known, [], 0.0)["backbone.features.bn1.running_var"]
    assert_close(found + 1e-5, named["backbone.features.bn1.running_var"])


def test_what_does_not_fit_is_named(tmp_path: Path) -> None:
    path = tmp_path / "weights.pth"
    state = peer_state("fcos_resnet50_fpn", 4, 0)

    def fails(changed: dict[str, Tensor], match: str, name: str = "fcos_resnet50_fpn", **options: Any) -> None:
        torch.save(changed, path)
        with pytest.raises(CheckpointError, match=match):
            convert(path, name, **{"classes": ["a", "b", "c"], **options})

    fails(state, "head.quality|head.classification_head.conv.10.weight is no part of", "retinanet_resnet50_fpn")
    fails(state, "has 3 classes beside the background, but 2 names", classes=["a", "b"])
    fails(state, "not of COCO: name them with --classes", classes=None)
    fails({k: v for k, v in state.items() if "bn1" not in k}, "is missing")
    fails({**state, "mask_head.weight": torch.zeros(2)}, "mask_head.weight is no part of")
    wrong = {**state, "backbone.fpn.inner_blocks.0.0.weight": torch.zeros(256, 2, 1, 1)}
    fails(wrong, r"neck.lateral.0.weight is \(256, 2, 1, 1\)")
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(CheckpointError, match=r"truncated, or not|not a file of plain"):
        convert(path, "fcos_resnet50_fpn")


def test_whole_pixel_anchors_are_torchvisions(golden: Any) -> None:
    boxes = torch.tensor([[-11.0, -23, 11, 23], [-16, -16, 16, 16], [-23, -11, 23, 11]])
    priors = configuration(ARCHITECTURES["fasterrcnn_resnet50_fpn"].sections, "x").model.rpn.priors
    sides = [(w, h) for w, h in priors.shapes(4)]
    expected = [(float(b[2] - b[0]), float(b[3] - b[1])) for b in boxes]
    assert sorted(sides) == sorted(expected)
    assert all_pairs_iou(boxes, boxes).diagonal().min() == 1
