"""The heads of one-stage detectors.  This list is the registry of what `model.head.type` takes."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from detector.config.node import default_type
from detector.models.dense_head import DenseHeadConfig
from detector.models.refined_head import RefinedHeadConfig
from detector.models.task_aligned_head import TaskAlignedHeadConfig

AnyHead = Annotated[
    DenseHeadConfig | TaskAlignedHeadConfig | RefinedHeadConfig, Field(discriminator="type"), default_type("dense")
]
