"""mmdetection's and detectron2's files: their detections, and what is wrong with a file."""

from __future__ import annotations

import pickle
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from detector.cli.convert_weights import KNOWN, main
from detector.convert import detectron2, mmdetection, torchvision
from detector.convert.reading import assignments, read_arrays, read_mmdetection
from detector.decode import decode
from detector.errors import CheckpointError
from detector.predict import restore
from detector.structures import Outputs
from detector.train.checkpoint import save_checkpoint
from tests import peers

NAMES = ["a", "b", "c", "d", "e"]
CAFFE = ("retinanet", "fcos")  # of which the kept detections are

CONFIG = """model = dict(
    type='{type}',
    data_preprocessor=dict(
        type='DetDataPreprocessor', mean={mean}, std={std}, bgr_to_rgb={rgb}, pad_size_divisor=32),
    backbone=dict(type='ResNet', depth=50, style='{style}', init_cfg=dict(type='Pretrained', checkpoint='x')),
    neck=dict(type='FPN', relu_before_extra_convs={relu}),
    bbox_head=dict({head}))
launcher = 'none'
"""


def mmdetection_state(kind: str) -> dict[str, Tensor]:
    return {k: peers.fill(k, s, kind in CAFFE) for k, s in peers.mmdetection(kind, len(NAMES)).items()}


def mmdetection_config(kind: str = "RetinaNet", style: str = "caffe", head: str = "", relu: bool = False) -> str:
    caffe = style == "caffe"
    mean = "[103.53, 116.28, 123.675]" if caffe else "[123.675, 116.28, 103.53]"
    std = "[1.0, 1.0, 1.0]" if caffe else "[58.395, 57.12, 57.375]"
    return CONFIG.format(type=kind, mean=mean, std=std, rgb=not caffe, style=style, head=head, relu=relu)


@pytest.fixture(scope="module")
def states() -> dict[str, dict[str, Tensor]]:
    """Filled once; not to be changed."""
    return {}


def state_of(states: dict[str, dict[str, Tensor]], kind: str) -> dict[str, Tensor]:
    if kind not in states:
        states.clear()
        states[kind] = mmdetection_state(kind)
    return dict(states[kind])


def saved(state: Any, path: Path, **meta: Any) -> Path:
    torch.save({"meta": meta, "state_dict": state} if meta else state, path)
    return path


@pytest.mark.parametrize("kind", [name.rpartition("/")[2] for name in mmdetection.ARCHITECTURES])
def test_mmdetections_detections(kind: str, tmp_path: Path, states: Any) -> None:
    """Boxes to 1e-3 pixels, scores to 1e-5 of what mmdetection 3.3 gives for the same weights and image."""
    state = state_of(states, kind)
    path = saved(state, tmp_path / "weights.pth")
    content, said = mmdetection.convert(path, f"mmdetection/{kind}", NAMES, "caffe" if kind in CAFFE else "pytorch")
    assert said[0].startswith(f"{len(state)} tensors")
    save_checkpoint(tmp_path / "model.pt", content)
    restored = restore(tmp_path / "model.pt")
    pixels = peers.image(128, 160)[None]
    with torch.no_grad():
        outputs = restored.model(pixels)
    assert isinstance(outputs, Outputs)
    found = decode(outputs, torch.tensor([[128.0, 160.0]]), restored.config.decode)[0]
    with np.load(Path(peers.__file__).with_name("mmdetection.npz")) as file:
        theirs = {part: torch.from_numpy(file[f"{kind}/{part}"]) for part in ("boxes", "scores", "labels")}
    order = theirs["scores"].argsort(descending=True, stable=True)
    assert_close(found.scores, theirs["scores"][order], atol=1e-5, rtol=0)
    assert torch.equal(found.labels, theirs["labels"][order])
    assert_close(found.boxes, theirs["boxes"][order], atol=1e-3, rtol=0)
    assert len(found.scores) > 5
    assert len(found.labels.unique()) > 1


def test_the_file_says_its_classes_and_style(tmp_path: Path, states: Any) -> None:
    state = state_of(states, "retinanet")
    path = saved(state, tmp_path / "weights.pth", CLASSES=tuple(NAMES), config=mmdetection_config())
    content, said = mmdetection.convert(path, "mmdetection/retinanet")
    assert content["classes"] == NAMES
    backbone = content["config"]["model"]["backbone"]
    assert (backbone["stride_in"], backbone["mean"], backbone["std"]) == ("1x1", [123.675, 116.28, 103.53], [1, 1, 1])
    assert torch.equal(content["model"]["backbone.features.conv1.weight"], state["backbone.conv1.weight"].flip(1))
    assert said[2].startswith("backbone of style caffe, images in BGR with mean [103.53,")
    # Version 3 says it elsewhere; of the other style.
    meta = {"dataset_meta": {"classes": NAMES}, "cfg": mmdetection_config(style="pytorch")}
    content, said = mmdetection.convert(saved(state, path, **meta), "mmdetection/retinanet")
    assert content["classes"] == NAMES
    assert content["config"]["model"]["backbone"]["stride_in"] == "3x3"
    assert torch.equal(content["model"]["backbone.features.conv1.weight"], state["backbone.conv1.weight"])
    assert said[2].endswith("as its configuration says")
    # As version 2 wrote them.
    old = "img_norm_cfg = dict(mean=[1.5, 2.5, 3.5], std=[1.0, 2.0, 4.0], to_rgb=False)\nmodel = dict(type='RetinaNet')"
    content, said = mmdetection.convert(saved(state, path, CLASSES=NAMES, config=old), "mmdetection/retinanet")
    backbone = content["config"]["model"]["backbone"]
    assert (backbone["mean"], backbone["std"]) == ([3.5, 2.5, 1.5], [4.0, 2.0, 1.0])
    assert "which the file does not say" in said[2]


@pytest.mark.parametrize(
    ("name", "text", "match"),
    [
        ("retinanet", mmdetection_config("FCOS"), "a FCOS by its own configuration, not mmdetection's RetinaNet"),
        ("retinanet", mmdetection_config(relu=True), "its model.neck.relu_before_extra_convs is True; only False"),
        ("retinanet", mmdetection_config(head="anchor_generator=dict(center_offset=0.5)"), "center_offset is 0.5"),
        ("retinanet", mmdetection_config().replace("depth=50", "depth=101"), "backbone.depth is 101; only 50"),
        ("retinanet", mmdetection_config().replace("[1.0, 1.0, 1.0]", "'none'"), "normalises images by 'none'"),
        ("fcos", mmdetection_config("FCOS", relu=True), "bbox_head.norm_on_bbox is False; only True"),
    ],
)
def test_settings_that_are_not_ours(name: str, text: str, match: str, tmp_path: Path) -> None:
    path = saved({"a": torch.zeros(1)}, tmp_path / "weights.pth", config=text)
    if "normalises" in match:
        path = saved(mmdetection_state("retinanet"), path, config=text)
    with pytest.raises(CheckpointError, match=match):
        mmdetection.convert(path, f"mmdetection/{name}", NAMES)


def test_what_does_not_fit_is_named(tmp_path: Path, states: Any) -> None:
    path = tmp_path / "weights.pth"
    state = state_of(states, "retinanet")

    def fails(changed: Any, match: str, name: str = "retinanet", **options: Any) -> None:
        with pytest.raises(CheckpointError, match=match):
            mmdetection.convert(saved(changed, path), f"mmdetection/{name}", **{"classes": NAMES, **options})

    fails(state, "has 45 classes beside the background, but 5", "atss")
    fails({**state, "bbox_head.retina_cls.bias": torch.zeros(5)}, "ATSS R50 FPN: head.", "atss")
    fails(state, "neck.fpn_convs.4.conv.weight is no part|bbox_head.cls_convs.0.conv.weight is no part", "faster_rcnn")
    fails(state, "has 5 classes beside the background, but 2 names", classes=["a", "b"])
    fails(state, "not of COCO: name them with --classes", classes=None)
    fails({k: v for k, v in state.items() if "layer1.0.bn1.weight" not in k}, "layer1.0.bn1.weight is missing")
    fails({**state, "mask_head.weight": torch.zeros(2)}, "mask_head.weight is no part of")
    wrong = {**state, "neck.lateral_convs.0.conv.weight": torch.zeros(256, 2, 1, 1)}
    fails(wrong, r"neck.lateral.0.weight is \(256, 2, 1, 1\) instead of \(256, 512, 1, 1\)")
    wrong = {**state, "bbox_head.retina_reg.weight": torch.zeros(12, 256, 3, 3)}
    fails(wrong, r"head.box.weight is \(12, 256, 3, 3\) instead of \(36,")
    fails({k: v for k, v in state.items() if "retina_cls" not in k}, "head.classes.bias is missing")
    biasless = {k: v for k, v in mmdetection_state("fcos").items() if not k.endswith("convs.0.conv.bias")}
    fails(biasless, "take the file whose name holds center-normbbox-centeronreg-giou", "fcos")
    fails({}, "expected a state_dict")
    fails({"meta": 3, "state_dict": "x"}, "expected a state_dict")
    saved(state, path)
    path.write_bytes(path.read_bytes()[:100_000])
    with pytest.raises(CheckpointError, match=r"truncated, or not|damaged"):
        mmdetection.convert(path, "mmdetection/retinanet", NAMES)
    with pytest.raises(CheckpointError, match="no such weights file"):
        mmdetection.convert(tmp_path / "none.pth", "mmdetection/retinanet", NAMES)
    told = saved(state, path, config=mmdetection_config())
    with pytest.raises(CheckpointError, match="has a backbone of style caffe: leave --style out"):
        mmdetection.convert(told, "mmdetection/retinanet", NAMES, "pytorch")


class Evil:
    """Would run a command where a pickle is loaded carelessly."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return Path.touch, (self.mark,)


def test_nothing_is_executed(tmp_path: Path) -> None:
    mark = tmp_path / "was_run"
    state = {"weight": torch.zeros(1)}
    torch.save({"state_dict": state, "meta": {"hook": Evil(mark)}}, tmp_path / "evil.pth")
    with pytest.raises(CheckpointError, match=r"pathlib\.\S*Path\S*.*save the tensors alone"):
        read_mmdetection(tmp_path / "evil.pth")
    for content in ({"model": {"weight": Evil(mark)}}, {"model": {}, "note": [Evil(mark)]}):
        (tmp_path / "evil.pkl").write_bytes(pickle.dumps(content))
        with pytest.raises(CheckpointError, match="holds code or objects, which are never run"):
            read_arrays(tmp_path / "evil.pkl")
    (tmp_path / "evil.pkl").write_bytes(pickle.dumps({"w": np.array([Evil(mark), None], dtype=object)}))
    with pytest.raises(CheckpointError, match="never run"):
        read_arrays(tmp_path / "evil.pkl")
    assert not mark.exists()
    assert assignments("__import__('pathlib').Path('was_run').touch()\nx = dict(a=open('was_run', 'w'))") == {
        "x": {"a": None}
    }
    assert assignments("not python: at all") == {}


def test_notes_of_a_training_are_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Version 3 keeps histories of losses, which are objects of mmengine's with numpy arrays and methods in them."""
    module = ModuleType("mmengine.logging.history_buffer")

    class HistoryBuffer:
        def __init__(self) -> None:
            self.history = np.arange(3.0)
            self.last = np.float64(2.0)
            self.methods = {"mean": HistoryBuffer.mean}

        def mean(self) -> float:
            return float(self.history.mean())

    HistoryBuffer.__module__, HistoryBuffer.__qualname__ = module.__name__, "HistoryBuffer"
    HistoryBuffer.mean.__module__, HistoryBuffer.mean.__qualname__ = module.__name__, "HistoryBuffer.mean"
    module.HistoryBuffer = HistoryBuffer  # type: ignore[attr-defined]
    for name in ("mmengine", "mmengine.logging"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    content = {"state_dict": {"w": torch.ones(2)}, "meta": {"epoch": 12}, "message_hub": {"loss": HistoryBuffer()}}
    torch.save(content, tmp_path / "weights.pth")
    for name in ("mmengine", "mmengine.logging", module.__name__):
        monkeypatch.delitem(sys.modules, name)
    state, meta = read_mmdetection(tmp_path / "weights.pth")
    assert torch.equal(state["w"], torch.ones(2))
    assert meta == {"epoch": 12}


def detectron2_state(kind: str) -> dict[str, Tensor]:
    state = {k: peers.fill(k + ".weight" * ("cell_anchors" in k), s) for k, s in peers.detectron2(kind, 5).items()}
    mean = torch.tensor([103.53, 116.28, 123.675])[:, None, None]
    return state | {"pixel_mean": mean, "pixel_std": torch.ones(3, 1, 1)}


@pytest.mark.parametrize("kind", ["faster_rcnn", "retinanet"])
def test_detectron2(kind: str, tmp_path: Path) -> None:
    """Every number in its place, from the pickle of its model zoo and from its own checkpoints alike."""
    state = detectron2_state(kind)
    zoo = tmp_path / "model_final.pkl"
    content = {"model": {k: v.numpy() for k, v in state.items()}, "__author__": "Detectron2 Model Zoo"}
    zoo.write_bytes(pickle.dumps(content, protocol=2 if kind == "retinanet" else 4))
    out = tmp_path / "model.pt"
    assert main([str(zoo), "--from", f"detectron2/{kind}", "--out", str(out), "--classes", *NAMES]) == 0
    weights = restore(out).model.state_dict()
    torch.save({"model": state, "iteration": 9}, tmp_path / "model.pth")
    other, _ = detectron2.convert(tmp_path / "model.pth", f"detectron2/{kind}", NAMES)
    assert all(torch.equal(value, weights[key]) for key, value in other["model"].items())
    assert restore(out).config.model.backbone.stride_in == "1x1"

    body = "backbone.bottom_up."
    same = {
        "backbone.features.bn1.running_var": f"{body}stem.conv1.norm.running_var",
        "backbone.features.layer3.5.conv2.weight": f"{body}res4.5.conv2.weight",
        "backbone.features.layer4.0.downsample.1.bias": f"{body}res5.0.shortcut.norm.bias",
        "backbone.features.layer1.2.bn3.weight": f"{body}res2.2.conv3.norm.weight",
        "neck.lateral.0.weight": f"backbone.fpn_lateral{2 if kind == 'faster_rcnn' else 3}.weight",
    }
    if kind == "faster_rcnn":
        same |= {"rpn.head.box.weight": "proposal_generator.rpn_head.anchor_deltas.weight"}
        same |= {"heads.0.box.weight": "roi_heads.box_predictor.bbox_pred.weight"}
        same |= {"heads.0.linear.1.weight": "roi_heads.box_head.fc2.weight"}
    else:
        same |= {"neck.extra.1.bias": "backbone.top_block.p7.bias"}
        same |= {"head.box_tower.3.convs.0.weight": "head.bbox_subnet.6.weight"}
        # There (size, shape, class), here (shape, size, class).
        theirs = state["head.cls_score.weight"].view(3, 3, 5, 256, 3, 3)
        ours = weights["head.classes.weight"].view(3, 3, 5, 256, 3, 3)
        assert torch.equal(ours[2, 1], theirs[1, 2])
        assert torch.equal(
            weights["head.box.bias"].view(3, 3, 4)[0, 2], state["head.bbox_pred.bias"].view(3, 3, 4)[2, 0]
        )
    for own, key in same.items():
        assert torch.equal(weights[own], state[key]), own
    assert torch.equal(weights["backbone.features.conv1.weight"], state[f"{body}stem.conv1.weight"].flip(1))


def test_detectron2_files_that_do_not_fit(tmp_path: Path) -> None:
    path = tmp_path / "model.pkl"
    state = detectron2_state("retinanet")

    def fails(changed: dict[str, Any], match: str, name: str = "retinanet", **options: Any) -> None:
        path.write_bytes(pickle.dumps({k: v.numpy() if isinstance(v, Tensor) else v for k, v in changed.items()}))
        with pytest.raises(CheckpointError, match=match):
            detectron2.convert(path, f"detectron2/{name}", **{"classes": NAMES, **options})

    fails(state, "is no part of detectron2's Faster R-CNN", "faster_rcnn")
    fails({**state, "pixel_std": torch.full((3,), 58.0)}, "only one that is converted")
    fails({k: v for k, v in state.items() if "res4.1.conv1.norm.bias" not in k}, "layer3.1.bn1.bias is missing")
    fails({**state, "head.bbox_pred.bias": torch.zeros(4)}, r"head.box.bias is \(4,\) instead of \(36,\)")
    fails(state, "has 5 classes", classes=["a"])
    fails({**state, "head.bbox_pred.bias": "text"}, "head.bbox_pred.bias is str, expected an array")
    path.write_bytes(path.read_bytes()[:100_000])
    with pytest.raises(CheckpointError, match=r"truncated|damaged"):
        detectron2.convert(path, "detectron2/retinanet", NAMES)
    with pytest.raises(CheckpointError, match="no such weights file"):
        detectron2.convert(tmp_path / "none.pkl", "detectron2/retinanet", NAMES)


def test_arrays_keep_order_and_kind(tmp_path: Path) -> None:
    arrays = {
        "fortran": np.asfortranarray(np.arange(6.0).reshape(2, 3)),
        "big_endian": np.arange(4, dtype=">f4"),
        "whole": np.arange(3),
        "empty": np.zeros((0, 4), np.float32),
    }
    for protocol in (2, 4, 5):
        (tmp_path / "a.pkl").write_bytes(pickle.dumps(arrays, protocol=protocol))
        found = read_arrays(tmp_path / "a.pkl")
        for key, value in arrays.items():
            assert np.array_equal(found[key].numpy(), value), (key, protocol)
    assert np.dtype("f4").isnative  # numpy's own descriptions are as they were


def test_the_command_knows_all() -> None:
    every = (*torchvision.ARCHITECTURES, *mmdetection.ARCHITECTURES, *detectron2.ARCHITECTURES)
    assert set(KNOWN) == set(every)
    for options in (["--norm-eps", "0"], ["--style", "caffe"]):
        with pytest.raises(SystemExit):
            main(["x.pkl", "--from", "detectron2/retinanet", "--out", "y.pt", *options])
