"""Draws the pictures of docs/augmentation.md from generated shapes: `python docs/augmentation/make.py`, from the
repository's root.  One picture a step: a training image before and after it, with its boxes."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from detector.cli.browse_data import main

HERE = Path(__file__).resolve().parent
RECIPE = """
data:
  {{type: shapes, suite: {suite}, root: {root}, size: [180, 240], train: 24, val: 1,
    resize: {{type: short_edge, short: 180, long: 240}}}}
augment: [{step}]
model: {{type: dense, backbone: {{type: timm, name: resnet18}}, neck: {{type: fpn}}, head: {{}}}}
train: {{length: {{epochs: 3}}, batch_size: 4, optimizer: {{type: sgd, lr: 0.01}}}}
"""
STEPS = {
    "mosaic": ("plain", "{type: mosaic, size: [180, 240]}"),
    "mosaic9": ("plain", "{type: mosaic, size: [180, 240], tiles: 9}"),
    "mixup": ("plain", "{type: mixup}"),
    "copy_paste": ("crescent", "{type: copy_paste}"),
    "copy_paste_box": ("plain", "{type: copy_paste, by: box}"),
    "small_copy_paste": ("tiny", "{type: small_copy_paste, below: 16, copies: 2}"),
    "large_scale_jitter": ("plain", "{type: large_scale_jitter, size: [180, 240], scale: [0.3, 2]}"),
    "random_perspective": ("elongated", "{type: random_perspective, degrees: 25, tilt: 0.3, scale: [0.9, 1.3]}"),
    "cutout": ("plain", "{type: cutout, holes: [4, 6]}"),
    "grid_mask": ("plain", "{type: grid_mask}"),
}


def draw() -> int:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for step, (suite, text) in STEPS.items():
            recipe = folder / f"{step}.yaml"
            recipe.write_text(RECIPE.format(suite=suite, root=folder / suite, step=text), encoding="utf-8")
            out = HERE / f"{step}.jpg"
            code = main([str(recipe), "--index", "3", "--epoch", "1", "--panel", "200", "--out", str(out)])
            if code:
                return code
    return 0


if __name__ == "__main__":
    sys.exit(draw())
