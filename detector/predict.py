"""A trained detector as a function from images to what is in them.

import detector
find = detector.load("runs/quickstart/best.pt")
found = find("image.jpg")
found.boxes, found.scores, found.labels, found.names
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor, nn

from detector.config.load import from_snapshot
from detector.config.run import RunConfig
from detector.data.batch import collate
from detector.data.channels import read_pixels, stretched
from detector.data.resize import Resize
from detector.data.sample import Sample
from detector.decode import DecodeConfig, decode
from detector.errors import CheckpointError, DataError
from detector.evaluate.runner import to_original
from detector.models.fold import fold_batch_norm
from detector.models.layers import DTYPES, Precision
from detector.models.two_stage import TwoStageDetector
from detector.pixels import RGB, Pixels
from detector.structures import Detections
from detector.train.checkpoint import load_checkpoint
from detector.train.device import find_device

if TYPE_CHECKING:
    from detector.models import Network

# A path, an array (H, W, C) as the images of the training set (uint8 RGB unless that says otherwise), a Pillow image.
AnyImage = str | PathLike[str] | np.ndarray | Image.Image
AnyBoxes = np.ndarray | Tensor


@dataclass(frozen=True)
class Found(Detections):
    """What was found in one image, by falling score, on the CPU; boxes in pixels of the given image."""

    names: tuple[str, ...] = ()  # the class of each detection

    def as_json(self) -> list[dict[str, object]]:
        """Plain data: xyxy box, score, label and name of each."""
        rows = zip(self.boxes.tolist(), self.scores.tolist(), self.labels.tolist(), self.names, strict=True)
        return [
            {"box": [round(c, 2) for c in box], "score": round(score, 4), "label": label, "name": name}
            for box, score, label, name in rows
        ]


class Detector:
    """Calls a network on images of any size: resized as in its training, detections in their own pixels.

    Convolutions take up the batch norms after them, and weights and activations are of `precision`.  `pixels`: what
    images hold and how they are normalised, as in training.
    """

    def __init__(
        self,
        *,
        model: Network,
        classes: Sequence[str],
        resize: Resize,
        pad_multiple: int,
        decode_config: DecodeConfig,
        device: torch.device,
        precision: Precision,
        category_ids: Sequence[int] | None = None,
        pixels: Pixels = RGB,
    ) -> None:
        self.classes, self.pixels = tuple(classes), pixels
        self.category_ids = tuple(range(1, len(classes) + 1) if category_ids is None else category_ids)
        self.device, self.precision = device, precision
        self.decode_config = decode_config
        self._resize, self._pad_multiple = resize, pad_multiple
        folded = fold_batch_norm(model)
        # 16 bits are more than half precision has: such images are normalised before they become it, not by the model.
        self._normalize = pixels.bits == 16 and precision != "fp32"
        self._scale, self._shift = folded.scale.clone().to(device), folded.shift.clone().to(device)
        if self._normalize:
            folded.scale.fill_(1), folded.shift.zero_()
        self._takes_proposals = isinstance(model, TwoStageDetector) and model.rpn is None
        self._model: nn.Module = folded.to(device=device, dtype=DTYPES[precision])

    @overload
    def __call__(self, images: AnyImage, proposals: AnyBoxes | None = None) -> Found: ...

    @overload
    def __call__(
        self, images: list[AnyImage] | list[np.ndarray], proposals: Sequence[AnyBoxes] | None = None
    ) -> list[Found]: ...

    def __call__(
        self,
        images: AnyImage | list[AnyImage] | list[np.ndarray],
        proposals: AnyBoxes | Sequence[AnyBoxes] | None = None,
    ) -> Found | list[Found]:
        """One image, or a list of them, which is one batch.

        `proposals`: (n, 4) xyxy in pixels of the image, of a list one for each; for detectors that have no RPN.

        Raises:
            DataError: an image cannot be read, or holds other channels or bits than the training set; or proposals are
                no such boxes, missing where they are needed, or given where they would not be looked at.
        """
        several = images if isinstance(images, list) else [images]
        if (proposals is None) == self._takes_proposals and several:
            raise DataError(
                "this detector has no RPN: give proposals, detector(image, proposals), or evaluate it with"
                " data.proposals"
                if proposals is None
                else "this detector makes its own proposals: leave them out"
            )
        each: Any = proposals if isinstance(images, list) else [proposals]
        given: list[Any] = [None] * len(several) if proposals is None else list(each)
        if len(given) != len(several):
            raise DataError(f"{len(given)} lists of proposals for {len(several)} images: give one for each")
        boxes = [None if one is None else _as_boxes(one) for one in given]
        found = self._detect([as_array(image, self.pixels) for image in several], boxes) if several else []
        return found if isinstance(images, list) else found[0]

    @torch.inference_mode()
    def _detect(self, images: list[np.ndarray], proposals: list[np.ndarray | None]) -> list[Found]:
        ground = self.pixels.ground
        samples = [
            self._resize(replace(_sample(stretched(image, self.pixels), ground), proposals=boxes))
            for image, boxes in zip(images, proposals, strict=True)
        ]
        batch = collate(samples, pad_multiple=self._pad_multiple, canvas=self._resize.canvas()).to(self.device)
        pixels = batch.images
        if self._normalize:
            pixels = torch.addcmul(self._shift, pixels.float(), self._scale).to(DTYPES[self.precision])
        outputs = self._model(pixels, **batch.known)
        outputs = replace(outputs, box_raw=outputs.box_raw.float())  # coordinates need more digits than half has
        found = to_original(decode(outputs, batch.sizes, self.decode_config), batch)
        return [self._named(detections.cpu()) for detections in found]

    def _named(self, found: Detections) -> Found:
        names = tuple(self.classes[label] for label in found.labels.tolist())
        return Found(found.boxes, found.scores, found.labels, names)


def load(
    path: str | PathLike[str],
    device: str | torch.device = "auto",
    precision: Precision | None = None,
    threshold: float | None = None,
    weights: str = "ema",
    overrides: Sequence[str] = (),
) -> Detector:
    """A detector from a checkpoint of training.

    `device`: "auto" takes a GPU where there is one.  `precision`: fp32, bf16 or fp16; by default fp16 on a GPU and fp32
    elsewhere.  `threshold`: the least score of a detection; by default the configuration's `decode.score_threshold`.
    `weights`: "ema", the averaged ones where training averaged, or "raw".  `overrides`: `key=value` of the
    configuration, such as decode.nms_iou=0.5.

    Raises:
        CheckpointError: the file is missing, damaged, or not a checkpoint of this program.
        ConfigError: an override is wrong.
        DeviceError: this machine does not have the device.
    """
    place = find_device(str(device))
    restored = restore(Path(path), weights, overrides)
    config = restored.config
    scores = config.decode
    if threshold is not None:
        scores = scores.model_validate({**scores.model_dump(), "score_threshold": threshold})
    return Detector(
        model=restored.model,
        classes=restored.classes,
        resize=config.data.resize,
        pad_multiple=config.data.pad_multiple,
        decode_config=scores,
        device=place,
        precision=precision or ("fp16" if place.type == "cuda" else "fp32"),
        category_ids=restored.category_ids,
        pixels=config.data.pixels,
    )


@dataclass(frozen=True)
class Restored:
    """A trained network with what belongs to it."""

    model: Network  # on the CPU, in evaluation mode
    classes: tuple[str, ...]
    config: RunConfig
    averaged: bool  # whether these are the averaged weights
    category_ids: tuple[int, ...] | None = None  # of the annotation file, by label; None where the file tells none


def restore(path: Path, weights: str = "ema", overrides: Sequence[str] = ()) -> Restored:
    """The network of a checkpoint.  Code that the checkpoint's configuration names is not executed.

    `weights`: "ema" or "raw"; a run without averaging has only raw ones.  `overrides`: `key=value` of the
    configuration, for instance where the data now are.

    Raises:
        CheckpointError: the file is missing, damaged, or not a checkpoint of this program.
        ConfigError: an override is wrong.
    """
    if weights not in ("ema", "raw"):
        raise CheckpointError(f"weights {weights!r}: expected 'ema' or 'raw'")
    content = load_checkpoint(path)
    config = from_snapshot(content["config"], str(path), overrides, plugins=False)
    classes = tuple(content["classes"])
    averaged = weights == "ema" and bool(content["ema"])
    model = config.network(len(classes), load_weights=False)
    state: dict[str, Tensor] = content["ema"] if averaged else content["model"]
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        reason = str(error).splitlines()[1].strip() if "\n" in str(error) else str(error)
        raise CheckpointError(
            f"{path}: its weights do not fit the network of its configuration ({reason}); was it changed, or written by"
            " another version?"
        ) from None
    ids = content["category_ids"]
    return Restored(model.eval(), classes, config, averaged, None if ids is None else tuple(ids))


def as_array(image: AnyImage, pixels: Pixels = RGB) -> np.ndarray:
    """(H, W, C), as `pixels` say but not normalised, of any image that a detector takes.

    Raises:
        DataError: the file cannot be read, or the array is of another shape or type.
    """
    if isinstance(image, np.ndarray):
        if image.dtype != pixels.dtype or image.ndim != 3 or image.shape[2] != pixels.channels or 0 in image.shape:
            order = " in RGB order" if pixels.channels == 3 else ""
            raise DataError(
                f"the image is {image.dtype} {image.shape}, expected {pixels.dtype} (height, width, {pixels.channels})"
                + order
            )
        return image
    if isinstance(image, Image.Image):
        if pixels.bits != 8 or pixels.channels not in (1, 3):
            raise DataError(
                f"a Pillow image holds 8 bits and at most RGB, but this detector takes {pixels.channels} channels of"
                f" {pixels.bits} bits: give the file's path or an array"
            )
        upright = np.asarray(ImageOps.exif_transpose(image).convert("RGB" if pixels.channels == 3 else "L"))
        return upright if pixels.channels == 3 else upright[..., None]
    return read_pixels(Path(image), pixels)


def _as_boxes(boxes: AnyBoxes) -> np.ndarray:
    """(n, 4) float32."""
    array = np.asarray(boxes, dtype=np.float32)
    if array.size == 0:
        return np.zeros((0, 4), dtype=np.float32)
    if array.ndim != 2 or array.shape[1] != 4 or not np.isfinite(array).all():
        raise DataError(f"proposals of shape {array.shape}: expected (n, 4) finite numbers, x1 y1 x2 y2 in pixels")
    return array


def _sample(image: np.ndarray, ground: tuple[int, ...]) -> Sample:
    none = np.zeros((0, 4), dtype=np.float32)
    return Sample(
        image=image,
        boxes=none,
        labels=np.zeros(0, dtype=np.int64),
        rows=np.zeros(0, dtype=np.int64),
        crowd=none,
        image_id=0,
        original_size=(image.shape[0], image.shape[1]),
        scale=np.ones(2, dtype=np.float32),
        offset=np.zeros(2, dtype=np.float32),
        ground=ground,
    )
