"""How runs are scored."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from detector.config.node import Node


class EvaluateConfig(Node):
    """Validation during training, and the defaults of `tools/eval.py`."""

    engine: Literal["hotcoco", "pycocotools"] = Field(
        "hotcoco", description="same numbers; pycocotools is slower and the reference"
    )
    max_dets: int = Field(100, ge=1, description="detections of one class in one image that count; COCO's is 100")
    batch_size: int | None = Field(None, ge=1, description="images at a time; default: the training batch")
