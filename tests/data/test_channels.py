"""Images that are not 8-bit RGB: what is read, how it is normalised, and that every step takes them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import albumentations
import cv2
import numpy as np
import pytest
import tifffile
import torch
from pydantic import TypeAdapter, ValidationError

from detector.canvas import visible
from detector.cli.measure_data import main as measure_command
from detector.config.run import RunConfig
from detector.data.cache import open_cache
from detector.data.channels import read_pixels, stretched
from detector.data.check_images import Depth, look_at
from detector.data.coco import CocoData, CocoIndex
from detector.data.loader import TrainSource, eval_loader, train_loader
from detector.data.measure import measure
from detector.data.resize import Letterbox, ShortEdge
from detector.data.sample import Sample
from detector.data.steps import Augmentation, Combination
from detector.data.transforms import Color, Flip, FromAlbumentations, Transform
from detector.errors import DataError
from detector.models.backbones import BackboneConfig
from detector.pixels import PADDING, FixedRange, Percentile, Pixels, Statistics
from detector.predict import Detector, as_array
from tests.data import drawn, small_coco

STATISTICS = "{{type: statistics, mean: [{}], std: [{}]}}"
SIZE = (small_coco.HEIGHT, small_coco.WIDTH)
KINDS = [(1, 8), (1, 16), (2, 8), (3, 16), (4, 16), (5, 8), (7, 16)]


def noise(channels: int, bits: int, seed: int = 0) -> np.ndarray:
    dtype = np.uint8 if bits == 8 else np.uint16
    return np.random.default_rng(seed).integers(0, 2**bits, (*SIZE, channels), dtype=dtype)


def save(path: Path, image: np.ndarray, **options: Any) -> None:
    """A TIFF file whose pixels hold their channels together."""
    planes = {"planarconfig": "contig"} if image.shape[2] > 1 else {}
    tifffile.imwrite(path, image, photometric="minisblack", **planes, **options)


def written(folder: Path, channels: int, bits: int) -> tuple[Path, Path, dict[str, np.ndarray]]:
    """The small set with TIFF files of noise: annotations, folder, images by file name."""
    document = small_coco.document()
    images = {}
    for entry in document["images"]:
        entry["file_name"] = f"{entry['id']}.tiff"
        images[entry["file_name"]] = noise(channels, bits, entry["id"])
    annotations, where = small_coco.write(folder, json.dumps(document))
    for name, image in images.items():
        save(where / name, image)
    return annotations, where, images


def opened(folder: Path, pixels: Pixels) -> tuple[CocoData, dict[str, np.ndarray]]:
    annotations, where, images = written(folder, pixels.channels, pixels.bits)
    return CocoData(CocoIndex.load(annotations, where), pixels=pixels), images


@pytest.mark.parametrize(("channels", "bits"), KINDS)
@pytest.mark.parametrize("layout", ["contig", "separate", "pages", "deflate", "lzw", "big"])
def test_tiffs_come_back_as_they_were(tmp_path: Path, channels: int, bits: int, layout: str) -> None:
    image, path = noise(channels, bits), tmp_path / "x.tif"
    if layout == "pages":
        tifffile.imwrite(path, image.transpose(2, 0, 1), photometric="minisblack")
    elif layout == "separate" and channels > 1:
        tifffile.imwrite(path, image.transpose(2, 0, 1), photometric="minisblack", planarconfig="separate")
    else:
        options: dict[str, Any] = {"compression": layout} if layout in ("deflate", "lzw") else {}
        save(path, image, bigtiff=layout == "big", **options)
    found = read_pixels(path, Pixels(channels=channels, bits=bits), SIZE)
    assert found.dtype == image.dtype
    if (channels, bits) not in ((1, 8), (3, 8)):  # these are cv2's
        assert found.flags.c_contiguous
    assert np.array_equal(found, image)
    assert look_at(path, Depth.FULL).size == SIZE


@pytest.mark.parametrize(("channels", "bits"), [(1, 16), (3, 16), (4, 8), (4, 16)])
def test_pngs_come_back_in_rgb_order(tmp_path: Path, channels: int, bits: int) -> None:
    image, path = noise(channels, bits), tmp_path / "x.png"
    stored = image[..., [2, 1, 0, 3][:channels]] if channels > 1 else image
    assert cv2.imwrite(str(path), stored)
    assert np.array_equal(read_pixels(path, Pixels(channels=channels, bits=bits)), image)


def test_grey_and_rgb_stand_for_each_other(tmp_path: Path) -> None:
    grey = noise(1, 16)
    cv2.imwrite(str(tmp_path / "g.png"), grey)
    assert np.array_equal(read_pixels(tmp_path / "g.png", Pixels(channels=3, bits=16)), np.repeat(grey, 3, 2))
    for bits in (8, 16):
        same = np.repeat(noise(1, bits), 3, 2)
        cv2.imwrite(str(tmp_path / "c.png"), same)
        assert np.array_equal(read_pixels(tmp_path / "c.png", Pixels(channels=1, bits=bits)), same[..., :1])


def test_what_does_not_fit_is_named(tmp_path: Path) -> None:
    save(tmp_path / "x.tif", noise(5, 16))
    with pytest.raises(DataError, match=r"x\.tif: the image has 5 channels, but data\.pixels\.channels is 4"):
        read_pixels(tmp_path / "x.tif", Pixels(channels=4, bits=16))
    with pytest.raises(DataError, match=r"uint16 numbers, but data\.pixels\.bits is 8"):
        read_pixels(tmp_path / "x.tif", Pixels(channels=5))
    with pytest.raises(DataError, match="annotations say 9, 9"):
        read_pixels(tmp_path / "x.tif", Pixels(channels=5, bits=16), (9, 9))
    tifffile.imwrite(
        tmp_path / "f.tif", noise(5, 8).astype(np.float32), photometric="minisblack", planarconfig="contig"
    )
    with pytest.raises(DataError, match="float32 numbers"):
        read_pixels(tmp_path / "f.tif", Pixels(channels=5, bits=16))
    (tmp_path / "b.tif").write_bytes((tmp_path / "x.tif").read_bytes()[:200])
    with pytest.raises(DataError, match=r"b\.tif: cannot read the TIFF"):
        read_pixels(tmp_path / "b.tif", Pixels(channels=5, bits=16))
    assert look_at(tmp_path / "b.tif", Depth.FULL).problem is not None
    (tmp_path / "e.png").write_bytes(b"")
    with pytest.raises(DataError, match=r"e\.png: damaged"):
        read_pixels(tmp_path / "e.png", Pixels(channels=4))
    with pytest.raises(DataError, match="cannot read the image"):
        read_pixels(tmp_path / "none.tif", Pixels(bits=16))


@pytest.mark.parametrize("each", [True, False])
@pytest.mark.parametrize(("channels", "bits"), KINDS)
def test_percentiles_become_the_ends_of_the_range(channels: int, bits: int, each: bool) -> None:
    image = (noise(channels, bits) // 5 + 20 * np.arange(channels)).astype(np.uint8 if bits == 8 else np.uint16)
    rule = Percentile(low=2, high=95, each_channel=each)
    found = stretched(image, Pixels(channels=channels, bits=bits, normalize=rule))
    top = 2**bits - 1
    assert found.dtype == image.dtype
    for c in range(channels):
        values = image[..., c] if each else image
        low, high = (np.percentile(values, q, method="inverted_cdf") for q in (2, 95))
        expected = ((image[..., c].astype(float) - low) / (high - low)).clip(0, 1) * top
        assert np.abs(found[..., c] - expected).max() <= 0.5


def test_a_flat_image_has_no_percentiles_and_stays_finite() -> None:
    flat = np.full((4, 4, 2), 700, dtype=np.uint16)
    assert (stretched(flat, Pixels(channels=2, bits=16, normalize=Percentile())) == 0).all()


def test_plain_images_are_read_as_ever(tmp_path: Path) -> None:
    index = CocoIndex.load(*small_coco.write(tmp_path))
    plain, given = CocoData(index)[0], CocoData(index, pixels=Pixels())[0]
    assert np.array_equal(plain.image, given.image)
    assert given.ground == plain.ground == PADDING == Pixels().ground


@pytest.mark.parametrize(
    ("rule", "mean", "std"),
    [
        (FixedRange(low=1000, high=5000), [1000 + 110 / 255 * 4000] * 2, [50 / 255 * 4000] * 2),
        (FixedRange(), [110 * 257] * 2, [50 * 257] * 2),
        (Percentile(), [110 * 257] * 2, [50 * 257] * 2),
        (Statistics(mean=(300, 70), std=(9, 8)), [300, 70], [9, 8]),
    ],
    ids=str,
)
def test_the_model_subtracts_and_divides_in_the_images_numbers(rule: Any, mean: list[float], std: list[float]) -> None:
    pixels = Pixels(channels=2, bits=16, normalize=rule)
    found = pixels.standard([100, 110, 120], [40, 50, 60])
    assert found[0] == pytest.approx(mean)
    assert found[1] == pytest.approx(std)
    given = BackboneConfig(name="test_resnet", mean=None if isinstance(rule, Statistics) else (100, 110, 120),
                           std=None if isinstance(rule, Statistics) else (40, 50, 60))  # fmt: skip
    backbone = given.build(pixels=pixels)
    assert backbone.mean == pytest.approx(mean)
    maps = backbone(torch.zeros(1, 2, 64, 64))
    assert maps[0].shape[1] == backbone.channels[0]
    ground = (np.array(pixels.ground) - found[0]) / found[1]
    assert np.abs(ground).max() < 0.5  # padding looks like nothing


def test_weights_of_a_local_file_are_adapted(tmp_path: Path) -> None:
    rgb = BackboneConfig(name="test_resnet").build()
    import timm

    torch.save(timm.create_model("test_resnet", pretrained=False).state_dict(), tmp_path / "w.pth")
    config = BackboneConfig(name="test_resnet", weights=tmp_path / "w.pth", freeze_stages=2)
    grey = config.build(pixels=Pixels(channels=1))
    first = "features.conv1.0.weight" if "features.conv1.0.weight" in rgb.state_dict() else "features.conv1.weight"
    stored = torch.load(tmp_path / "w.pth", weights_only=True)[first.removeprefix("features.")]
    assert torch.allclose(grey.state_dict()[first], stored.sum(1, keepdim=True))
    many = config.build(pixels=Pixels(channels=6))
    assert torch.allclose(many.state_dict()[first], stored.repeat(1, 2, 1, 1) / 2)


# Every step of one image, of several, and of albumentations.
STEPS: list[dict[str, Any]] = [
    {"type": "flip", "horizontal": 1, "vertical": 1},
    {"type": "color", "saturation": 0, "hue": 0, "probability": 1},
    {"type": "random_scale_crop", "probability": 1},
    {"type": "large_scale_jitter", "size": [64, 64]},
    {"type": "random_perspective", "tilt": 0.2},
    {"type": "random_perspective"},
    {"type": "mosaic", "size": [64, 64]},
    {"type": "mixup"},
    {"type": "copy_paste"},
    {"type": "copy_paste", "by": "box", "edge": 4},
    {"type": "copy_paste", "edge": 2, "flip": 1},
    {"type": "small_copy_paste", "below": 100, "edge": 1},
    {"type": "cutout"},
    {"type": "grid_mask"},
    {"type": "albumentations", "name": "Transpose", "arguments": {"p": 1}},
]


@pytest.mark.parametrize("step", STEPS, ids=lambda s: "-".join(str(v) for v in s.values()))
@pytest.mark.parametrize(("channels", "bits"), KINDS)
def test_every_step_takes_them_and_does_to_each_channel_what_it_does_to_rgb(
    channels: int, bits: int, step: dict[str, Any]
) -> None:
    change: Any = TypeAdapter(Transform).validate_python(step)
    assert change.objection(Pixels(channels=channels, bits=bits)) is None
    dtype = np.uint8 if bits == 8 else np.uint16
    by = 1 if bits == 8 else 257

    def made(n: int, kind: Any, times: int, colors: tuple[int, ...]) -> Sample:
        """All channels alike, so that RGB's first one shows what each must be."""
        rng = np.random.default_rng(5)
        samples = [drawn.make((48, 64), 5, 10 * i, rng) for i in range(4)]
        pictures = [np.repeat(s.image[..., :1].astype(kind) * times, n, axis=2) for s in samples]
        given = [replace(s, image=p, ground=colors) for s, p in zip(samples, pictures, strict=True)]
        again = np.random.default_rng(9)
        if isinstance(change, Combination):
            return change(given[0], again, drawn.Hand(given[1:]))  # type: ignore[arg-type]
        assert isinstance(change, Augmentation)
        return change(given[0], again)

    found = made(channels, dtype, by, (100 * by,) * channels)
    expected = made(3, np.uint8, 1, (100,) * 3)
    assert found.image.dtype == dtype
    assert found.image.shape == (*expected.image.shape[:2], channels)
    apart = np.abs(found.image.astype(float) / by - expected.image[..., :1])
    # 16 bits are rounded later.  OpenCV resamples 8 bits with coefficients of fewer digits, and two channels at places
    # rounded to 1/32 of a pixel.
    assert apart.max() <= (8 if (channels, bits) == (2, 8) else 3 if bits == 16 else 1)
    assert np.array_equal(found.boxes, expected.boxes)
    assert np.array_equal(found.labels, expected.labels)


def test_a_one_pixel_image_of_one_channel_is_resized() -> None:
    sample = drawn.make((1, 1), 0, 0, np.random.default_rng(0), crowd=False)
    sample = replace(sample, image=np.ones((1, 1, 1), np.uint16), ground=(0,))
    assert Letterbox(size=(32, 64))(sample).image.shape == (32, 32, 1)


@pytest.mark.parametrize(("channels", "bits"), [(1, 16), (5, 16), (4, 8)])
@pytest.mark.parametrize("resize", [Letterbox(size=(64, 64)), ShortEdge(short=48, long=96)], ids=lambda r: r.type)
def test_batches_hold_them_with_any_number_of_workers(tmp_path: Path, channels: int, bits: int, resize: Any) -> None:
    data, _ = opened(tmp_path, Pixels(channels=channels, bits=bits, normalize=FixedRange(low=100)))
    made = {}
    for workers in (0, 2):
        loader = train_loader(
            data, augment=(Flip(),), resize=resize, batch_size=2, seed=0, start_step=0, stop_step=3, workers=workers
        )
        made[workers] = list(loader)
    for one, other in zip(made[0], made[2], strict=True):
        assert one.images.dtype == (torch.uint8 if bits == 8 else torch.uint16)
        assert one.images.shape[1] == channels
        assert torch.equal(one.images, other.images)
        height = int(one.sizes[0, 0])
        ground = np.array(data.ground)[:, None]
        assert (one.images[0, :, height:, 0].numpy() == ground).all()
        assert one.images.is_contiguous(memory_format=torch.channels_last)
    whole = next(iter(eval_loader(data, resize=resize, batch_size=3, workers=0)))
    assert whole.images.shape[1] == channels


def test_an_image_that_cannot_be_read_is_a_plain_one_of_the_same_kind(tmp_path: Path) -> None:
    data, _ = opened(tmp_path, Pixels(channels=5, bits=16))
    (tmp_path / "images" / "7.tiff").unlink()
    batch = next(iter(eval_loader(data, resize=Letterbox(size=(64, 64)), batch_size=3, workers=0)))
    assert (batch.images[0].numpy() == np.array(data.ground)[:, None, None]).all()
    assert "7.tiff" in batch.failures[0]


def test_percentiles_are_of_the_file_and_not_of_the_batch(tmp_path: Path) -> None:
    pixels = Pixels(channels=1, bits=16, normalize=Percentile())
    data, images = opened(tmp_path, pixels)
    assert np.array_equal(data[0].image, stretched(images["7.tiff"], pixels))


def test_the_measured_statistics_are_exact(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pixels = Pixels(channels=5, bits=16)
    data, images = opened(tmp_path, pixels)
    found = measure(data, pixels)
    mean, std = found.statistics()
    everything = np.concatenate([i.reshape(-1, 5) for i in images.values()]).astype(np.longdouble)
    assert np.allclose(mean, everything.mean(0).astype(float), rtol=1e-12)
    assert np.allclose(std, everything.std(0).astype(float), rtol=1e-12)
    assert found.pixels == 3 * SIZE[0] * SIZE[1]
    assert found.percentile(0) == everything.min(0).astype(int).tolist()
    assert found.percentile(100) == everything.max(0).astype(int).tolist()
    recipe = tmp_path / "r.yaml"
    recipe.write_text(text_of(tmp_path, "{channels: 5, bits: 16, normalize: {type: percentile}}"))
    assert measure_command([str(recipe)]) == 0
    printed = capsys.readouterr().out
    section = Pixels.model_validate(__import__("yaml").safe_load(printed)["data"]["pixels"])
    assert isinstance(section.normalize, Statistics)
    assert section.normalize.mean == pytest.approx(mean, rel=1e-5)
    assert section.normalize.std == pytest.approx(std, rel=1e-5)
    assert section.channels == 5


def test_a_channel_without_deviation_and_a_set_without_images_are_told(tmp_path: Path) -> None:
    pixels = Pixels(channels=5, bits=16)
    data, images = opened(tmp_path, pixels)
    for name, image in images.items():
        image[..., 3] = 9
        save(tmp_path / "images" / name, image)
    with pytest.raises(DataError, match="channel 3 has the value 9 in all images"):
        measure(data, pixels).as_yaml(pixels)
    for name in images:
        (tmp_path / "images" / name).unlink()
    with pytest.raises(DataError, match="no image to measure"):
        measure(data, pixels)


def text_of(folder: Path, pixels: str, augment: str = "[{type: flip}]", more: str = "") -> str:
    return f"""
name: few
data:
  type: coco
  root: {folder}
  train: {{annotations: annotations.json, images: images}}
  val: {{annotations: annotations.json, images: images}}
  pixels: {pixels}
  resize: {{type: letterbox, size: [64, 64]}}
  workers: 0
augment: {augment}
model:
  backbone: {{name: test_resnet, levels: [3, 4]{more}}}
  neck: {{channels: 16, norm: batch}}
  head: {{convs: 1, channels: 16}}
train: {{length: {{steps: 3}}, batch_size: 2, optimizer: {{type: sgd, lr: 0.01}}, device: cpu}}
run: {{dir: {folder}/run}}
"""


def config_of(*parts: Any) -> RunConfig:
    import yaml

    return RunConfig.model_validate(yaml.safe_load(text_of(*parts)))


@pytest.mark.parametrize(
    ("channels", "name"), [(1, "HueSaturationValue"), (5, "ToGray"), (4, "RGBShift"), (1, "ChannelShuffle")]
)
def test_a_colour_transform_that_needs_rgb_is_refused_with_the_configuration(
    tmp_path: Path, channels: int, name: str
) -> None:
    step = FromAlbumentations(name=name)
    objection = step.objection(Pixels(channels=channels))
    if objection is None:  # then it has to work
        image = noise(channels, 8)
        out = albumentations.Compose([getattr(albumentations, name)(p=1)])(image=image)["image"]
        assert out.shape == image.shape
        return
    with pytest.raises(ValidationError, match=rf"augment\.0: albumentations {name}: does not work on .* {channels}"):
        config_of(tmp_path, f"{{channels: {channels}}}", f"[{{type: albumentations, name: {name}}}]")
    config_of(tmp_path, "{}", f"[{{type: albumentations, name: {name}}}]")


def test_hue_of_grey_is_refused_at_once(tmp_path: Path) -> None:
    assert FromAlbumentations(name="HueSaturationValue").objection(Pixels(channels=5)) is not None
    with pytest.raises(ValidationError, match=r"augment\.1: color: saturation and hue need RGB.*channels is 1"):
        config_of(tmp_path, "{channels: 1}", "[{type: flip}, {type: color}]")
    assert Color(saturation=0, hue=0).objection(Pixels(channels=1)) is None


def test_settings_that_contradict_each_other_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValidationError, match=r"normalize\.mean has 3 numbers, expected 2"):
        Pixels(channels=2, normalize=Statistics(mean=(1, 2, 3), std=(1, 1)))
    with pytest.raises(ValidationError, match="expected less than high"):
        Pixels(normalize=FixedRange(low=300))
    with pytest.raises(ValidationError, match="expected less than high"):
        Percentile(low=50, high=50)
    with pytest.raises(ValidationError, match="leave one out"):
        config_of(tmp_path, f"{{normalize: {STATISTICS.format('1, 1, 1', '1, 1, 1')}}}", "[]", ", mean: [1, 1, 1]")
    with pytest.raises(ValidationError, match="makes RGB of 8 bits"):
        RunConfig.model_validate({"name": "x", "data": {"type": "shapes", "pixels": {"channels": 1}}, "model": {},
                                  "train": {}})  # fmt: skip


@pytest.mark.parametrize(
    "rule",
    [
        "{type: fixed, low: 50, high: 60000}",
        "{type: percentile}",
        STATISTICS.format("9e3, 9e3, 9e3, 9e3, 9e3", "5e3, 5e3, 5e3, 5e3, 5e3"),
    ],
)
def test_a_run_on_five_channels_trains_is_scored_and_predicts_alike(tmp_path: Path, rule: str) -> None:
    import detector
    from detector.evaluate.runner import inference
    from detector.train.loop import train

    annotations, where, images = written(tmp_path, 5, 16)
    config = config_of(tmp_path, f"{{channels: 5, bits: 16, normalize: {rule}}}")
    outcome = train(config)
    assert outcome.step == 3
    assert (outcome.files.pictures / "train-samples.jpg").is_file()
    find = detector.load(outcome.files.last, device="cpu", threshold=0.0)
    assert find.pixels == config.data.pixels
    path = where / "7.tiff"
    from_file, from_array = find(path), find(images["7.tiff"])
    assert torch.equal(from_file.boxes, from_array.boxes)
    # What evaluation sees of the image is what prediction sees of it.
    data = config.data.open("val")
    batch = next(iter(eval_loader(data, resize=config.data.resize, batch_size=1, workers=0)))
    seen: list[torch.Tensor] = []
    handle = find._model.register_forward_pre_hook(lambda _, given: seen.append(given[0].clone()))
    find(path)
    handle.remove()
    assert torch.equal(seen[0], batch.images)
    half = detector.load(outcome.files.last, device="cpu", precision="fp16", threshold=0.0)
    got: list[torch.Tensor] = []
    half._model.backbone.register_forward_pre_hook(lambda _, given: got.append(given[0]))  # type: ignore[union-attr]
    half(path)
    with inference(find._model):
        find._model.backbone.register_forward_pre_hook(lambda _, given: got.append(given[0]))  # type: ignore[union-attr]
        find(path)
    assert torch.isfinite(got[0]).all()
    assert (got[0].float() - got[1]).abs().max() < 0.01 * max(1.0, float(got[1].abs().max()))
    assert isinstance(find, Detector)
    with pytest.raises(DataError, match=r"expected uint16 \(height, width, 5\)"):
        find(np.zeros((9, 9, 3), dtype=np.uint8))
    assert annotations.is_file()


def test_pillow_images_become_grey_or_are_refused() -> None:
    from PIL import Image

    image = Image.fromarray(noise(3, 8))
    assert as_array(image, Pixels(channels=1)).shape == (*SIZE, 1)
    with pytest.raises(DataError, match="Pillow image holds 8 bits"):
        as_array(image, Pixels(channels=4))


@pytest.mark.parametrize(("channels", "bits"), KINDS)
def test_anything_can_be_looked_at(channels: int, bits: int) -> None:
    shown = visible(noise(channels, bits))
    assert shown.shape == (*SIZE, 3)
    assert shown.dtype == np.uint8
    assert int(shown.max()) - int(shown.min()) > 200


def test_reduced_decoding_leaves_other_images_whole(tmp_path: Path) -> None:
    annotations, where, images = written(tmp_path, 1, 16)
    data = CocoData(CocoIndex.load(annotations, where), lambda size: (8, 8), pixels=Pixels(channels=1, bits=16))
    assert np.array_equal(data.reduced(0).image, images["7.tiff"])
    source = TrainSource(data, augment=(), resize=Letterbox(size=(32, 32)), seed=0, epochs=1, pad_multiple=1,
                         max_unreadable=0, partner_cache=1)  # fmt: skip
    assert source.reader.read(0, []).image.dtype == np.uint16


@pytest.mark.parametrize(("channels", "bits"), [(1, 8), (3, 16), (5, 16)])
@pytest.mark.parametrize("rule", [FixedRange(), Percentile()])
def test_the_cache_changes_no_number(tmp_path: Path, channels: int, bits: int, rule: Any) -> None:
    pixels = Pixels(channels=channels, bits=bits, normalize=rule)  # type: ignore[arg-type]
    plain, _ = opened(tmp_path, pixels)
    for _ in range(2):  # filled, then found by another run
        cached = CocoData(
            plain.index, cache=open_cache(plain.index, None, "file", tmp_path / "cache", pixels), pixels=pixels
        )
        for _ in range(2):
            for i in range(len(plain)):
                np.testing.assert_array_equal(cached.reduced(i).image, plain[i].image)
                assert cached.reduced(i).image.dtype == plain[i].image.dtype
        assert cached.cache is not None
        assert cached.cache.filled == len(plain)
