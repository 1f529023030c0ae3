"""The steps that a recipe may list under `augment:`; those of one image that need no mask are here.

Every random number comes from the sample's own generator, so the result is a function of (seed, epoch, index).

Flip, colour and crop call cv2 and numpy directly: an albumentations `Compose` of flip and `ColorJitter` takes 3.2 ms
for 640x480, longer than decoding the JPEG (1.9 ms); this takes 0.3 ms.  Everything else within one image is
albumentations' by name.
"""

from __future__ import annotations

import difflib
import math
import os
import warnings
from dataclasses import replace
from functools import cached_property
from typing import Annotated, Any, Literal, Self

import cv2
import numpy as np
from pydantic import Field, model_validator

from detector.data.copy_paste import CopyPaste, SmallCopyPaste
from detector.data.erase import Cutout, GridMask
from detector.data.geometry import clip, follow, keep_visible
from detector.data.mosaic import Mixup, Mosaic
from detector.data.outlines import Outlines
from detector.data.perspective import LargeScaleJitter, RandomPerspective
from detector.data.resize import like
from detector.data.sample import Sample
from detector.data.steps import Augmentation as Augmentation
from detector.data.steps import Deferrable, Share
from detector.data.windows import canvas, milder
from detector.errors import ConfigError
from detector.pixels import Pixels


class Flip(Deferrable):
    """Mirrors left and right, or top and bottom, with these probabilities."""

    type: Literal["flip"] = "flip"
    horizontal: Share = 0.5
    vertical: Share = 0.0

    def mirrors(self, rng: np.random.Generator) -> tuple[bool, bool]:
        return rng.random() < self.horizontal, rng.random() < self.vertical

    def __call__(self, sample: Sample, rng: np.random.Generator) -> Sample:
        horizontal, vertical = self.mirrors(rng)
        if not (horizontal or vertical):
            return sample
        height, width = sample.image.shape[:2]
        image = like(cv2.flip(sample.image, -1 if horizontal and vertical else int(horizontal)), sample.image)
        scale = (-1.0 if horizontal else 1.0, -1.0 if vertical else 1.0)
        return follow(sample, image, scale, (width if horizontal else 0.0, height if vertical else 0.0))


class Color(Deferrable):
    """Brightness, contrast, saturation and hue, each drawn evenly from 1 - x to 1 + x (hue: -x to x turns).

    The four are one linear map of RGB and cost one pass over the image; hue and saturation turn and stretch the colour
    plane of YIQ, so grey stays grey.  Images that are not RGB have no colour: all of their channels are changed alike.
    """

    type: Literal["color"] = "color"
    brightness: Share = 0.2
    contrast: Share = 0.2
    saturation: Share = 0.2
    hue: float = Field(0.02, ge=0, le=0.5, description="in full turns of the colour circle")
    probability: Share = 0.8

    def objection(self, pixels: Pixels) -> str | None:
        if pixels.channels == 3 or not (self.saturation or self.hue):
            return None
        return (
            f"color: saturation and hue need RGB, but data.pixels.channels is {pixels.channels}: set saturation: 0 and"
            " hue: 0"
        )

    def weaker(self, strength: float) -> Self:
        amounts = {name: getattr(self, name) * strength for name in ("brightness", "contrast", "saturation", "hue")}
        return self.model_copy(update=amounts)

    def __call__(self, sample: Sample, rng: np.random.Generator) -> Sample:
        drawn = self._draw(rng)
        if drawn is None:
            return sample
        brightness, contrast, saturation, hue = drawn
        matrix = brightness * contrast * _turn_colors(hue, saturation)
        if sample.image.shape[2] != 3:
            return replace(sample, image=_relit(sample.image, brightness, contrast))
        grey = float(np.dot(_YIQ[0], cv2.mean(sample.image[::4])[:3]))  # every fourth row is enough
        offset = np.full((3, 1), (1 - contrast) * brightness * grey)
        image = cv2.transform(sample.image, np.concatenate([matrix, offset], 1).astype(np.float32))
        return replace(sample, image=image)

    def _draw(self, rng: np.random.Generator) -> tuple[float, float, float, float] | None:
        """Factors of brightness, contrast and saturation, and turns of the hue; None: nothing is changed."""
        if rng.random() >= self.probability:
            return None
        draw = rng.uniform(-1, 1, size=4)
        brightness, contrast, saturation = 1 + draw[:3] * (self.brightness, self.contrast, self.saturation)
        return brightness, contrast, saturation, draw[3] * self.hue

    def colors(self, rng: np.random.Generator, channels: int) -> np.ndarray | None:
        drawn = self._draw(rng)
        if drawn is None:
            return None
        brightness, contrast, saturation, hue = drawn
        rgb = channels == 3
        matrix = brightness * contrast * (_turn_colors(hue, saturation) if rgb else np.eye(channels))
        grey = _YIQ[0] if rgb else np.full(channels, 1 / channels)
        return np.concatenate([matrix, np.tile((1 - contrast) * brightness * grey, (channels, 1))], 1)


class RandomScaleCrop(Augmentation):
    """A window of the image's own shape: `scale` 2 shows half its width and height, 0.5 the image on a larger ground.

    No pixel is resampled here: the resize to the network's input does that, so objects become `scale` times larger
    there.  Objects of which less than the share `visible` remains are dropped.
    """

    type: Literal["random_scale_crop"] = "random_scale_crop"
    scale: tuple[Annotated[float, Field(ge=0.1, le=10)], Annotated[float, Field(ge=0.1, le=10)]] = (0.7, 1.5)
    visible: Share = 0.3
    probability: Share = 0.5

    @model_validator(mode="after")
    def _ordered(self) -> RandomScaleCrop:
        if self.scale[0] > self.scale[1]:
            raise ValueError(f"scale: expected the smaller number first, found {list(self.scale)}")
        return self

    def weaker(self, strength: float) -> Self:
        return self.model_copy(update={"scale": milder(self.scale, strength)})

    def __call__(self, sample: Sample, rng: np.random.Generator) -> Sample:
        if rng.random() >= self.probability:
            return sample
        scale = math.exp(rng.uniform(math.log(self.scale[0]), math.log(self.scale[1])))
        old = sample.image.shape[:2]
        new = [max(1, round(length / scale)) for length in old]
        # Where the window's corner lies in the image (negative: the image's corner lies in the window).
        top, left = (int(rng.integers(min(0, o - n), max(0, o - n) + 1)) for o, n in zip(old, new, strict=True))
        image = _window(sample, top, left, new[0], new[1])
        return keep_visible(follow(sample, image, (1.0, 1.0), (-left, -top)), self.visible)


class FromAlbumentations(Augmentation):
    """Any transform of one image from albumentations, by name, with its arguments: blur, noise, rotation, ...

    Boxes follow; objects and crowd regions of which less than the share `visible` remains are dropped.  Masks do not
    follow where boxes move: steps after it that use masks take the boxes in their place.
    """

    type: Literal["albumentations"] = "albumentations"
    name: str = Field(description="such as GaussianBlur")
    arguments: dict[str, Any] = Field({}, description="such as {blur_limit: 5, p: 0.2}")
    visible: Share = 0.3

    @model_validator(mode="after")
    def _can_be_built(self) -> FromAlbumentations:
        _ = self._pipeline
        return self

    def objection(self, pixels: Pixels) -> str | None:
        """Tried on a small picture, since albumentations nowhere says which channels a transform takes."""
        if pixels.channels == 3 and pixels.bits == 8:
            return None
        always = _build(self.name, {**self.arguments, "p": 1.0}, self.visible)
        noise = np.random.default_rng(0)
        as_usual, shape = noise.integers(0, 256, (64, 64, 3), dtype=np.uint8), (64, 64, pixels.channels)
        if _failure(always, as_usual) is not None:  # whatever it needs, it is not RGB
            return None
        problem = _failure(always, noise.integers(0, 2**pixels.bits, shape, dtype=pixels.dtype))
        if problem is None:
            return None
        return (
            f"albumentations {self.name}: does not work on images of {pixels.channels} channels of {pixels.bits} bits"
            f" ({problem}): take the step out"
        )

    @cached_property
    def _pipeline(self) -> Any:
        return _build(self.name, self.arguments, self.visible)

    def __call__(self, sample: Sample, rng: np.random.Generator) -> Sample:
        pipeline = self._pipeline
        pipeline.set_random_seed(int(rng.integers(2**32)))
        if "bboxes" not in pipeline.processors:
            return replace(sample, image=self._run(image=sample.image)["image"])
        boxes = np.concatenate([sample.boxes, sample.crowd])
        out = self._run(image=sample.image, bboxes=boxes, place=np.arange(len(boxes)))
        image = out["image"]
        boxes = clip(np.asarray(out["bboxes"], dtype=np.float32).reshape(-1, 4), image)
        place = np.asarray(out["place"], dtype=np.int64)
        objects = place < len(sample.boxes)
        return replace(
            sample,
            image=image,
            boxes=boxes[objects],
            labels=sample.labels[place[objects]],
            rows=sample.rows[place[objects]],
            weight=None if sample.weight is None else sample.weight[place[objects]],
            crowd=boxes[~objects],
            # Such a change need not be a scaling and a shift, so nothing leads back to original pixels.
            scale=np.full(2, np.nan, dtype=np.float32),
            offset=np.full(2, np.nan, dtype=np.float32),
            outlines=None if sample.outlines is None else Outlines.boxes(boxes[objects]),  # masks are not passed on
        )

    def _run(self, **targets: np.ndarray) -> dict[str, Any]:
        """albumentations' own call, which takes its targets by name."""
        try:
            out: dict[str, Any] = self._pipeline(**targets)
        except Exception as error:  # each transform has its own
            size = targets["image"].shape[:2]
            raise ConfigError(f"augment: albumentations {self.name}: fails on an image of {size}: {error}") from error
        image, given = out["image"], targets["image"]
        if not _same_kind(image, given):
            expected = "uint8 RGB" if given.dtype == np.uint8 and given.shape[2] == 3 else _kind(given)
            raise ConfigError(
                f"augment: albumentations {self.name}: gives {image.dtype} of shape {image.shape}, expected {expected}"
                " (the model normalises by itself)"
            )
        out["image"] = np.ascontiguousarray(image)
        return out


Transform = Annotated[
    Flip
    | Color
    | RandomScaleCrop
    | LargeScaleJitter
    | RandomPerspective
    | Mosaic
    | Mixup
    | CopyPaste
    | SmallCopyPaste
    | Cutout
    | GridMask
    | FromAlbumentations,
    Field(discriminator="type"),
]


_YIQ = np.array([[0.299, 0.587, 0.114], [0.595716, -0.274453, -0.321263], [0.211456, -0.522591, 0.311135]])
_RGB = np.linalg.inv(_YIQ)
# RGB to RGB by way of YIQ: its first axis alone, its colour plane alone, that plane turned by a quarter.
_LUMA = np.outer(_RGB[:, 0], _YIQ[0])
_PLANE = _RGB[:, 1:] @ _YIQ[1:]
_TURN = _RGB[:, 1:] @ np.array([[0, -1], [1, 0]]) @ _YIQ[1:]


def _turn_colors(hue: float, saturation: float) -> np.ndarray:
    """(3, 3): RGB to RGB with the colour plane of YIQ turned by `hue` full turns and stretched."""
    angle = 2 * math.pi * hue
    return _LUMA + math.cos(angle) * saturation * _PLANE + math.sin(angle) * saturation * _TURN


def _window(sample: Sample, top: int, left: int, height: int, width: int) -> np.ndarray:
    """(height, width, C): the image from `top`, `left` on, ground colour where there is no image."""
    inside = sample.image[max(top, 0) : top + height, max(left, 0) : left + width]
    if inside.shape[:2] == (height, width):
        return inside
    above, before = max(-top, 0), max(-left, 0)
    image = canvas((height, width), sample)
    image[above : above + inside.shape[0], before : before + inside.shape[1]] = inside
    return image


def _build(name: str, arguments: dict[str, Any], visible: float) -> Any:
    """An albumentations pipeline of one transform; ValueError says what is wrong with the name or an argument."""
    os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")  # or else the import asks the network for a newer version
    import albumentations

    kind = getattr(albumentations, name, None)
    usable = (albumentations.ImageOnlyTransform, albumentations.DualTransform)
    if not (isinstance(kind, type) and issubclass(kind, usable)):
        known = [n for n, k in vars(albumentations).items() if isinstance(k, type) and issubclass(k, usable)]
        near = difflib.get_close_matches(name, known, 1, 0.5)
        raise ValueError(
            f"albumentations has no transform {name!r}" + (f" (did you mean {near[0]!r}?)" if near else "")
        )
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # unknown arguments are only warned of
        try:
            transform = kind(**arguments)
        except Exception as error:  # each transform has its own
            raise ValueError(f"albumentations {name}: {_one_line(error)}") from None
        if transform.targets_as_params:
            needed = ", ".join(transform.targets_as_params)
            raise ValueError(f"albumentations {name}: needs {needed} beside the image and boxes")
        if isinstance(transform, albumentations.ImageOnlyTransform):
            return albumentations.Compose([transform])
        if "bboxes" not in transform.targets:
            raise ValueError(f"albumentations {name}: does not say where boxes go")
        box_parameters = albumentations.BboxParams(
            format="pascal_voc", label_fields=["place"], min_width=1, min_height=1, min_visibility=visible
        )
        return albumentations.Compose([transform], bbox_params=box_parameters)


def _same_kind(image: np.ndarray, given: np.ndarray) -> bool:
    return image.dtype == given.dtype and image.ndim == 3 and image.shape[2] == given.shape[2]


def _kind(image: np.ndarray) -> str:
    return f"{image.dtype} of {image.shape[2]} channels" if image.ndim == 3 else f"{image.dtype} of {image.shape}"


def _failure(pipeline: Any, image: np.ndarray) -> str | None:
    """Why the pipeline does not give an image of the same kind; None: it does."""
    boxes = {"bboxes": np.array([[8, 8, 40, 40]], dtype=np.float32), "place": np.zeros(1, dtype=np.int64)}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # some only warn that they do nothing
            out = pipeline(image=image, **(boxes if "bboxes" in pipeline.processors else {}))["image"]
    except Exception as error:  # each transform has its own
        return _one_line(error)
    return None if _same_kind(out, image) else f"it gives {_kind(out)}"


def _relit(image: np.ndarray, brightness: float, contrast: float) -> np.ndarray:
    """(H, W, C) of any kind: stretched about its mean, of every fourth row, and made brighter."""
    ground = (1 - contrast) * brightness * float(image[::4].mean())
    changed = image * np.float32(contrast * brightness) + np.float32(ground)
    return np.rint(changed.clip(0, np.iinfo(image.dtype).max)).astype(image.dtype)


def _one_line(error: Exception) -> str:
    """Of pydantic's report, which albumentations passes on as text, the first argument and what is wrong with it."""
    lines = [line.strip() for line in str(error).splitlines()]
    if len(lines) >= 3 and "validation error" in lines[0]:
        return f"{lines[1]}: {lines[2].partition(' [type=')[0]}"
    return " ".join(lines)
