"""Networks: images in, `Outputs` out.  `Model` is the union of all of them."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from detector.config.node import default_type
from detector.models.cascade import CascadeConfig
from detector.models.dense import DenseConfig, DenseDetector
from detector.models.r_cnn import RCnnConfig
from detector.models.two_stage import TwoStageConfig, TwoStageDetector

Model = Annotated[
    DenseConfig | TwoStageConfig | CascadeConfig | RCnnConfig, Field(discriminator="type"), default_type("dense")
]
Network = DenseDetector | TwoStageDetector
