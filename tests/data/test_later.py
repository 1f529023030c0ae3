"""What the device does to a batch is what the workers would have done to its samples."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
import yaml
from pydantic import ValidationError

from detector.config.run import RunConfig
from detector.data.coco import CocoData, CocoIndex
from detector.data.copy_paste import CopyPaste
from detector.data.later import LaterBatch, finished
from detector.data.loader import train_loader
from detector.data.mosaic import Mixup, Mosaic
from detector.data.resize import Fixed, Letterbox, ShortEdge
from detector.data.shapes import ShapeSet, ensure
from detector.data.steps import Deferrable, When
from detector.data.transforms import Color, Flip, RandomScaleCrop
from detector.pixels import Pixels
from detector.structures import Batch
from detector.train.loop import train
from tests.data import small_coco, test_channels

FLIP = Flip(horizontal=0.5, vertical=0.5)
STRONG = Color(brightness=0.4, contrast=0.4, saturation=0.5, hue=0.2, probability=0.9)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> CocoData:
    folder = tmp_path_factory.mktemp("shapes")
    ensure(folder, ShapeSet("plain", 12, (150, 201)))
    return CocoData(CocoIndex.load(folder / "annotations.json", folder / "images"))


def batches(data: CocoData, defer: bool, **options: Any) -> list[Batch]:
    settings: dict[str, Any] = {
        "batch_size": 4,
        "seed": 3,
        "start_step": 0,
        "stop_step": 4,
        "workers": 0,
        "epochs": 2.0,
    }
    return list(train_loader(data, defer=defer, **{**settings, **options}))


def same_truth(one: Batch, other: Batch, digits: float = 0.0) -> None:
    assert torch.equal(one.ids, other.ids)
    assert torch.equal(one.sizes, other.sizes)
    assert torch.equal(one.objects.labels, other.objects.labels)
    assert torch.equal(one.objects.image, other.objects.image)
    for name in ("boxes", "ignore"):
        a, b = getattr(one.objects, name), getattr(other.objects, name)
        assert torch.allclose(a, b, rtol=0, atol=digits), name
    assert torch.allclose(one.scale, other.scale, rtol=1e-6, atol=0, equal_nan=True)
    assert torch.allclose(one.offset, other.offset, rtol=0, atol=1e-3, equal_nan=True)


@pytest.mark.parametrize("resize", [ShortEdge(short=97, long=400), Letterbox(size=(96, 160)), Fixed(size=(80, 100))],
                         ids=lambda r: r.type)  # fmt: skip
@pytest.mark.parametrize("before", [(), (Mosaic(size=(160, 200)),), (RandomScaleCrop(),)], ids=len)
def test_flips_are_those_of_the_workers_to_the_bit(data: CocoData, resize: Any, before: Any) -> None:
    augment = (*before, FLIP)
    seen = 0
    for late, soon in zip(batches(data, True, augment=augment, resize=resize),
                          batches(data, False, augment=augment, resize=resize), strict=True):  # fmt: skip
        assert isinstance(late, LaterBatch)
        seen += int(late.flip.sum())
        done = finished(late)
        assert type(done) is Batch
        same_truth(done, soon, 1e-4 if before else 0.0)
        if not (before and isinstance(before[0], RandomScaleCrop)):  # where it enlarges, the workers flip before it
            assert torch.equal(done.images, soon.images)
        assert done.images.is_contiguous(memory_format=torch.channels_last)
    assert seen > 4


@pytest.mark.parametrize("augment", [(STRONG,), (STRONG, FLIP), (FLIP, STRONG, Color(probability=1))], ids=len)
def test_colours_are_those_of_the_workers_within_a_level(data: CocoData, augment: Any) -> None:
    apart = []
    for resize in (ShortEdge(short=97, long=400), Letterbox(size=(96, 160))):
        for late, soon in zip(batches(data, True, augment=augment, resize=resize),
                              batches(data, False, augment=augment, resize=resize), strict=True):  # fmt: skip
            done = finished(late)
            same_truth(done, soon)
            assert done.images.dtype == torch.uint8
            apart.append((done.images.int() - soon.images.int()).abs())
    everything = torch.cat([a.flatten() for a in apart])
    # A vertical flip before it changes which rows "every fourth" are, and two colours round twice.
    assert everything.max() <= (1 if len(augment) == 1 else 3)
    assert (everything > 1).float().mean() < 0.02


def test_colour_and_flip_leave_the_padding_alone(data: CocoData) -> None:
    resize = Letterbox(size=(96, 200))
    for late in batches(data, True, augment=(STRONG, FLIP), resize=resize):
        done = finished(late)
        for image, (height, width) in zip(done.images, done.sizes.int().tolist(), strict=True):
            ground = torch.tensor(data.ground, dtype=torch.uint8)[:, None, None]
            assert (image[:, height:] == ground).all()
            assert (image[:, :, width:] == ground).all()


@pytest.mark.parametrize(
    "resize",
    [
        ShortEdge(short=96, long=140, multi_scale=(60, 96, 120)),
        Letterbox(size=(96, 128), multi_scale=(80, 128, 160)),
        Fixed(size=(96, 128), multi_scale=(64, 128, 160)),
        ShortEdge(short=60, long=400, multi_scale=(60, 63, 64)),  # one canvas, other sizes
    ],
    ids=lambda r: f"{r.type}{r.length}",
)
def test_multi_scale_gives_the_workers_sizes_boxes_and_nearly_their_pixels(data: CocoData, resize: Any) -> None:
    shapes = set()
    for late, soon in zip(batches(data, True, augment=(FLIP,), resize=resize, stop_step=6),
                          batches(data, False, augment=(FLIP,), resize=resize, stop_step=6), strict=True):  # fmt: skip
        done = finished(late)
        assert done.images.shape == soon.images.shape
        same_truth(done, soon, 1e-3)
        shapes.add((tuple(done.images.shape), float(done.sizes[0, 0])))
        # The second resampling smooths a little; a shift by a pixel would cost ten times as much.
        apart = (done.images.float() - soon.images.float()).abs()
        assert apart.mean() < 4, apart.mean()
        for image, other, (height, width) in zip(done.images, soon.images, done.sizes.int().tolist(), strict=True):
            assert torch.equal(image[:, height:], other[:, height:])
            assert torch.equal(image[:, :, width:], other[:, :, width:])
    assert len(shapes) > 1


def test_a_resampling_is_opencvs_within_a_level() -> None:
    from detector.data.later import _resized

    image = np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8)
    canvas = torch.full((1, 3, 64, 64), 255, dtype=torch.uint8)
    canvas[0, :, :40, :50] = torch.from_numpy(image).permute(2, 0, 1)
    for size in ((30, 33), (40, 50), (57, 80), (23, 90)):
        found = _resized(canvas, torch.tensor([[40.0, 50.0]]), torch.tensor([list(map(float, size))]), (96, 96))
        expected = cv2.resize(image, size[::-1], interpolation=cv2.INTER_LINEAR)
        apart = found[0, :, : size[0], : size[1]].permute(1, 2, 0).int().numpy() - expected
        assert np.abs(apart).max() <= 1


@pytest.mark.parametrize("workers", [1, 2])
def test_the_number_of_workers_and_where_a_run_starts_change_nothing(data: CocoData, workers: int) -> None:
    options: dict[str, Any] = {
        "augment": (Mosaic(size=(160, 200), when=When(probability=0.5)), STRONG, FLIP),
        "resize": Letterbox(size=(96, 128), multi_scale=(80, 128, 160)),
    }
    alone = [finished(b) for b in batches(data, True, **options)]
    among = [finished(b) for b in batches(data, True, workers=workers, start_step=1, **options)]
    for one, other in zip(alone[1:], among, strict=True):
        assert torch.equal(one.images, other.images)
        same_truth(one, other)


def test_a_sample_does_not_depend_on_its_batch(data: CocoData) -> None:
    options: dict[str, Any] = {"augment": (STRONG, FLIP), "resize": Letterbox(size=(96, 128))}
    four = torch.cat([finished(b).images for b in batches(data, True, **options)])
    eight = torch.cat([finished(b).images for b in batches(data, True, batch_size=8, stop_step=2, **options)])
    assert torch.equal(four, eight)


def test_when_a_step_is_on_holds_on_the_device_too(data: CocoData) -> None:
    augment = (Flip(horizontal=1, when=When(after=1)), Color(probability=1, when=When(probability=0.5)))
    late = batches(data, True, augment=augment, resize=Letterbox(size=(96, 160)), stop_step=6)
    assert not any(b.flip.any() for b in late[:3] if isinstance(b, LaterBatch))
    assert all(b.flip[:, 0].all() for b in late[3:] if isinstance(b, LaterBatch))
    soon = batches(data, False, augment=augment, resize=Letterbox(size=(96, 160)), stop_step=6)
    for one, other in zip(late, soon, strict=True):
        assert (finished(one).images.int() - other.images.int()).abs().max() <= 1


@pytest.mark.parametrize(("channels", "bits"), [(1, 16), (3, 16), (5, 16), (2, 8)])
def test_other_pixels_are_changed_alike(tmp_path: Path, channels: int, bits: int) -> None:
    few, _ = test_channels.opened(tmp_path, Pixels(channels=channels, bits=bits))
    hue = {} if channels == 3 else {"hue": 0, "saturation": 0}
    augment = (Color(probability=1, **hue), Flip(horizontal=1, vertical=0))
    options: dict[str, Any] = {"augment": augment, "resize": Letterbox(size=(32, 64)), "batch_size": 3, "stop_step": 1}
    for late, soon in zip(batches(few, True, **options), batches(few, False, **options), strict=True):
        done = finished(late)
        assert done.images.dtype == soon.images.dtype
        assert (done.images.int() - soon.images.int()).abs().max() <= 1
        same_truth(done, soon)


def test_every_step_that_says_so_can_be_deferred() -> None:
    from typing import get_args

    from detector.data.transforms import Transform

    kinds = get_args(get_args(Transform)[0])
    assert {k.__name__ for k in kinds if k.on_device} == {"Flip", "Color"}
    assert all(issubclass(k, Deferrable) == k.on_device for k in kinds)


RECIPE = """
name: later
data:
  type: shapes
  root: {root}
  size: [64, 96]
  train: 10
  val: 2
  workers: {workers}
  augment_on: device
  resize: {{type: letterbox, size: [64, 64], multi_scale: [48, 64, 80]}}
augment: [{{type: mosaic, size: [64, 96], when: {{probability: 0.7}}}}, {{type: color}}, {{type: flip}}]
model: {{backbone: {{name: test_resnet}}, neck: {{channels: 16, norm: batch}}, head: {{convs: 1, channels: 16}}}}
train:
  length: {{steps: {steps}}}
  batch_size: 4
  optimizer: {{type: sgd, lr: 0.02}}
  schedule: {{type: multi_step, warmup: null}}
  device: cpu
run: {{dir: {run}}}
"""


def recipe(folder: Path, run: str, steps: int = 6, workers: int = 0, **changes: Any) -> RunConfig:
    text = RECIPE.format(root=folder / "shapes", run=folder / run, steps=steps, workers=workers)
    values = yaml.safe_load(text)
    values["data"] |= changes
    return RunConfig.model_validate(values)


def test_a_run_that_was_stopped_goes_on_as_if_it_had_not_been(tmp_path: Path) -> None:
    whole = train(recipe(tmp_path, "whole"))
    train(recipe(tmp_path, "part", steps=3))
    parts = train(recipe(tmp_path, "part", workers=2), resume=tmp_path / "part")
    one, other = (torch.load(o.files.last, weights_only=True) for o in (whole, parts))
    assert one["step"] == other["step"] == 6
    for name, value in one["model"].items():
        assert torch.equal(value, other["model"][name]), name


def test_settings_under_which_the_device_could_not_do_it_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValidationError, match="less than half of 64"):
        recipe(tmp_path, "x", resize={"type": "letterbox", "size": [64, 64], "multi_scale": [31, 64]})
    values = yaml.safe_load(RECIPE.format(root=tmp_path, run=tmp_path, steps=1, workers=0))
    values["augment"] = [{"type": "flip"}, {"type": "mosaic"}]
    RunConfig.model_validate(values)  # multi-scale is left to do
    values["data"]["resize"] = {"type": "letterbox"}
    with pytest.raises(ValidationError, match="nothing that the device could do"):
        RunConfig.model_validate(values)


@pytest.mark.parametrize("before", [(Mosaic(size=(64, 64)),), (Mixup(),), (CopyPaste(),), (CopyPaste(by="box"),)])
@pytest.mark.parametrize("workers", [0, 1])
def test_images_of_one_pixel_go_through_everything(tmp_path: Path, before: Any, workers: int) -> None:
    content = small_coco.document()
    for entry in content["images"]:
        entry["height"] = entry["width"] = 1
    square = [[0.0, 0.0, 1.0, 0.0, 1.0, 1.0, 0.0, 1.0]]
    content["annotations"] = [a | {"bbox": [0, 0, 1, 1], "area": 1, "segmentation": square, "iscrowd": 0}
                              for a in content["annotations"]]  # fmt: skip
    annotations, images = small_coco.write(tmp_path, content)
    for path in images.iterdir():
        cv2.imwrite(str(path), np.full((1, 1, 3), 9, dtype=np.uint8))
    one = CocoData(CocoIndex.load(annotations, images))
    options: dict[str, Any] = {
        "augment": (*before, STRONG, FLIP),
        "resize": Letterbox(size=(32, 64)),
        "workers": workers,
    }
    for defer in (True, False):
        made = [finished(batch) for batch in batches(one, defer, **options)]
        assert len(made) == 4
        for batch in made:
            limit = batch.sizes.flip(1).repeat(1, 2)[batch.objects.image]
            assert (batch.objects.boxes >= 0).all()
            assert (batch.objects.boxes <= limit).all()
            assert torch.isfinite(batch.objects.boxes).all()
