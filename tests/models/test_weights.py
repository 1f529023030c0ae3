"""Backbone weights from local files, good and bad."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file

from detector.errors import CheckpointError
from detector.models.backbones import BackboneConfig


@pytest.fixture(scope="module")
def resnet18() -> dict[str, torch.Tensor]:
    torch.manual_seed(3)
    return timm.create_model("resnet18", pretrained=False).state_dict()


def _build(path: Path, name: str = "resnet18"):  # type: ignore[no-untyped-def]
    return BackboneConfig(name=name, weights=path).build()


@pytest.mark.parametrize("kind", ["pth", "safetensors", "wrapped"])
def test_a_whole_networks_file_loads(resnet18: dict[str, torch.Tensor], tmp_path: Path, kind: str) -> None:
    path = tmp_path / ("w.safetensors" if kind == "safetensors" else "w.pth")
    if kind == "safetensors":
        save_file(resnet18, path)
    else:
        torch.save({"state_dict": resnet18, "epoch": 3} if kind == "wrapped" else resnet18, path)
    backbone = _build(path)
    for key, value in backbone.features.state_dict().items():
        assert torch.equal(value, resnet18[key])
    assert set(backbone.loaded.unused) == {"fc.weight", "fc.bias"}
    assert str(backbone.loaded).endswith("2 not used (fc)")


@pytest.mark.parametrize("name", ["convnext_atto", "swin_tiny_patch4_window7_224"])
def test_names_that_timm_changes_in_extractors_are_found(tmp_path: Path, name: str) -> None:
    whole = timm.create_model(name, pretrained=False).eval()
    torch.save(whole.state_dict(), tmp_path / "w.pth")
    backbone = _build(tmp_path / "w.pth", name).eval()
    image = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        expected = whole.forward_intermediates(image, indices=[2], intermediates_only=True)[0]
        torch.testing.assert_close(backbone(image)[-2], expected, atol=1e-4, rtol=1e-4)


def test_norms_are_frozen_after_loading(resnet18: dict[str, torch.Tensor], tmp_path: Path) -> None:
    state = {k: torch.rand_like(v) + 0.5 if v.is_floating_point() else v for k, v in resnet18.items()}
    torch.save(state, tmp_path / "w.pth")
    plain = _build(tmp_path / "w.pth").eval()
    frozen = BackboneConfig(name="resnet18", weights=tmp_path / "w.pth", norm="frozen_batch").build().train()
    x = torch.randn(1, 3, 32, 32)
    # The convolution's weights are scaled by the norm, so sums round otherwise.
    expected = plain.features.bn1(plain.features.conv1(x))
    torch.testing.assert_close(frozen.features.bn1(frozen.features.conv1(x)), expected, atol=1e-4, rtol=1e-5)


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"w\.pth: no such weights file"):
        _build(tmp_path / "w.pth")


def test_another_architecture(resnet18: dict[str, torch.Tensor], tmp_path: Path) -> None:
    torch.save(resnet18, tmp_path / "w.pth")
    with pytest.raises(CheckpointError, match=r"not the weights of resnet50: .*missing.*another shape"):
        _build(tmp_path / "w.pth", "resnet50")
    with pytest.raises(CheckpointError, match="not the weights of mobilenetv2_100"):
        _build(tmp_path / "w.pth", "mobilenetv2_100")


def test_a_deeper_network_of_the_same_family(resnet18: dict[str, torch.Tensor], tmp_path: Path) -> None:
    """All that ResNet-18 needs is in it, with the same shapes."""
    deeper = resnet18 | {"layer1.2.conv1.weight": torch.zeros(64, 64, 3, 3)}
    torch.save(deeper, tmp_path / "w.pth")
    with pytest.raises(CheckpointError, match=r"1 belong to no part of it \(layer1\.2\.conv1\.weight\)"):
        _build(tmp_path / "w.pth")


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
def test_a_truncated_file(resnet18: dict[str, torch.Tensor], tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"w.{suffix}"
    save_file(resnet18, path) if suffix == "safetensors" else torch.save(resnet18, path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(CheckpointError, match="truncated, or not a weights file"):
        _build(path)


def test_an_empty_file_and_a_text_file(tmp_path: Path) -> None:
    for name, content in (("a.pth", b""), ("b.pth", b"hello"), ("c.safetensors", b"hello")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(CheckpointError, match=name):
            _build(tmp_path / name)


class _Code:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):  # type: ignore[no-untyped-def]
        return os.mkdir, (str(self.marker),)


def test_code_in_a_file_is_refused_and_not_run(tmp_path: Path) -> None:
    torch.save({"conv1.weight": _Code(tmp_path / "was_run")}, tmp_path / "w.pth")
    with pytest.raises(CheckpointError, match="code, which is never run"):
        _build(tmp_path / "w.pth")
    assert not (tmp_path / "was_run").exists()


def test_something_else_than_tensors(tmp_path: Path) -> None:
    for content in ({"epoch": 3}, [torch.zeros(2)], {}):
        torch.save(content, tmp_path / "w.pth")
        with pytest.raises(CheckpointError, match="expected names with tensors"):
            _build(tmp_path / "w.pth")


def test_real_imagenet_weights_recognise_objects(shared: Path) -> None:
    """Nearest neighbour of each crop among crops of other images, by pooled features: far above a random network."""
    cv2, json = pytest.importorskip("cv2"), __import__("json")
    folder, path = shared / "datasets/coco_tiny", shared / "weights/mobilenetv2_100_imagenet.safetensors"
    if not folder.is_dir() or not path.is_file():
        pytest.skip("no data")
    truth = json.loads((folder / "annotations/train.json").read_text())
    files = {image["id"]: image["file_name"] for image in truth["images"]}
    crops, labels, images = [], [], []
    for a in truth["annotations"]:
        if a["area"] < 128 * 128 or a.get("iscrowd"):
            continue
        x, y, w, h = (int(value) for value in a["bbox"])
        pixels = cv2.imread(str(folder / "images" / files[a["image_id"]]))[y : y + h + 1, x : x + w + 1, ::-1]
        crops.append(torch.from_numpy(cv2.resize(pixels, (96, 96), interpolation=cv2.INTER_AREA)))
        labels.append(a["category_id"])
        images.append(a["image_id"])
    input_images = (torch.stack(crops).permute(0, 3, 1, 2).float() - 127.5) / 127.5
    label, image = torch.tensor(labels), torch.tensor(images)

    def agreement(weights: Path | None) -> float:
        torch.manual_seed(0)
        network = BackboneConfig(name="mobilenetv2_100", weights=weights, levels=(3, 4)).build().eval()
        with torch.no_grad():
            pooled = torch.cat([network(part)[1].mean((2, 3)) for part in input_images.split(32)])
        pooled = torch.nn.functional.normalize(pooled - pooled.mean(0), dim=1)
        alike = (pooled @ pooled.T).masked_fill(image[:, None] == image, -9)
        return float((label[alike.argmax(1)] == label).float().mean())

    trained, untrained = agreement(path), agreement(None)
    assert trained > 0.3
    assert trained > 1.5 * untrained
