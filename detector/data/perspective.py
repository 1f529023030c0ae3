"""The whole image at another scale or seen from another place: large-scale jitter (Ghiasi et al., arXiv:2012.07177)
and random perspective."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Literal, Self

import numpy as np
from pydantic import Field

from detector.data.frames import move, shift, warp
from detector.data.geometry import clip, follow, keep_visible
from detector.data.outlines import Outlines
from detector.data.sample import Sample
from detector.data.steps import Augmentation, Extent, ScaleRange, Share
from detector.data.windows import canvas, choose, draw_scale, fitting, milder, show


class LargeScaleJitter(Augmentation):
    """The image at a drawn scale in a frame of fixed size: a part of it, or all of it on the ground colour."""

    type: Literal["large_scale_jitter"] = "large_scale_jitter"
    size: tuple[Extent, Extent] = Field((640, 640), description="height, width of the result")
    scale: ScaleRange = Field((0.1, 2.0), description="1: the image just fits into the result")
    visible: Share = Field(0.3, description="share of an object's box below which it is dropped where it is cut")

    def weaker(self, strength: float) -> Self:
        return self.model_copy(update={"scale": milder(self.scale, strength)})

    def __call__(self, sample: Sample, rng: np.random.Generator) -> Sample:
        size = sample.image.shape[:2]
        scale = fitting(size, self.size) * draw_scale(self.scale, rng)
        down, across = (choose(size[i], self.size[i], scale, rng) for i in (0, 1))
        part = show(sample, down, across, self.visible)
        image = canvas(self.size, sample)
        image[down.at : down.at + down.size, across.at : across.at + across.size] = part.image
        return follow(part, image, (1.0, 1.0), (across.at, down.at))


class RandomPerspective(Augmentation):
    """Turned, scaled, sheared, shifted and tilted about the image's middle, all in one resampling.

    Boxes are those of the moved masks, as far as they lie within the image; where there is no mask, of the box's moved
    corners, which is larger than the object where the image is turned.
    """

    type: Literal["random_perspective"] = "random_perspective"
    degrees: float = Field(10, ge=0, le=180, description="of turning, either way")
    scale: ScaleRange = (0.5, 1.5)
    shear: float = Field(2, ge=0, le=45, description="degrees, either way, in x and in y")
    translate: Share = Field(0.1, description="shift either way, as a share of the image's width and height")
    tilt: float = Field(0.0, ge=0, le=0.4, description="the image's near side is drawn larger by up to this share")
    size: tuple[Extent, Extent] | None = Field(None, description="height, width of the result; default: the image's")
    visible: Share = Field(0.3, description="share of an object's box below which it is dropped where it is cut")

    @property
    def uses_masks(self) -> bool:
        return True

    def weaker(self, strength: float) -> Self:
        amounts = {name: getattr(self, name) * strength for name in ("degrees", "shear", "translate", "tilt")}
        return self.model_copy(update=amounts | {"scale": milder(self.scale, strength)})

    def __call__(self, sample: Sample, rng: np.random.Generator) -> Sample:
        before, after = sample.image.shape[:2], self.size or sample.image.shape[:2]
        matrix = self.matrix((before[0], before[1]), (after[0], after[1]), rng)
        image = warp(sample.image, matrix, (after[0], after[1]), sample.ground)
        return _follow_map(sample, image, matrix, self.visible)

    def matrix(self, before: tuple[int, int], after: tuple[int, int], rng: np.random.Generator) -> np.ndarray:
        """(3, 3) from an image of the size `before`, height and width, to one of `after`."""
        angle, shear_x, shear_y = np.deg2rad(rng.uniform(-1, 1, 3) * (self.degrees, self.shear, self.shear))
        scale = draw_scale(self.scale, rng) * fitting(before, after)
        move_x, move_y, tilt_x, tilt_y = rng.uniform(-1, 1, 4)
        turn = scale * np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
        linear = np.eye(3)
        linear[:2, :2] = turn @ np.array([[1, math.tan(shear_x)], [math.tan(shear_y), 1]])
        # The third coordinate is 1 at the middle and 1 - tilt at the nearest corner: nothing comes near the horizon.
        tilted = np.eye(3)
        tilted[2, :2] = self.tilt * tilt_x / before[1], self.tilt * tilt_y / before[0]
        middle = (after[1] * (0.5 + self.translate * move_x), after[0] * (0.5 + self.translate * move_y))
        return np.asarray(shift(*middle) @ linear @ tilted @ shift(-before[1] / 2, -before[0] / 2))


def _follow_map(sample: Sample, image: np.ndarray, matrix: np.ndarray, visible: float) -> Sample:
    """The sample's truth behind any map that leaves straight lines straight, on its new image."""
    outlines = sample.outlines
    if outlines is None:
        boxes = _hulls(sample.boxes, matrix)
        if (clip(boxes, image) != boxes).any():  # of a turned box that the border cuts, what is left of it
            outlines = Outlines.boxes(sample.boxes).mapped(matrix)
    else:
        outlines = outlines.mapped(matrix)
        boxes = np.array([outlines.extent(i) for i in range(len(outlines))], dtype=np.float32).reshape(-1, 4)
    moved = replace(
        sample,
        image=image,
        boxes=boxes,
        crowd=_hulls(sample.crowd, matrix),
        # Not a scaling and a shift, so nothing leads back to original pixels.
        scale=np.full(2, np.nan, dtype=np.float32),
        offset=np.full(2, np.nan, dtype=np.float32),
        outlines=outlines,
    )
    kept = keep_visible(moved, visible)
    return replace(kept, outlines=None) if sample.outlines is None else kept


def _hulls(boxes: np.ndarray, matrix: np.ndarray) -> np.ndarray:
    """(n, 4) float32 xyxy around the moved corners of (n, 4) boxes."""
    corners = move(boxes[:, [0, 1, 2, 1, 2, 3, 0, 3]].reshape(-1, 2).astype(np.float64), matrix).reshape(-1, 4, 2)
    return np.concatenate([corners.min(1), corners.max(1)], 1).astype(np.float32)
