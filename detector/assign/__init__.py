"""Label assignment: which prior learns which object.  This list is the registry of rules."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from detector.assign.atss import Atss
from detector.assign.base import Assigner, from_index
from detector.assign.center_gaussian import CenterGaussian
from detector.assign.center_region import CenterRegion
from detector.assign.mixture import Paa
from detector.assign.overlap import MaxIou
from detector.assign.point_scale import PointScale
from detector.assign.points import Fcos
from detector.assign.uniform import Uniform
from detector.assign.weights import DualWeight
from detector.assign.yolo import YoloBest, YoloRatio

Rule = Annotated[
    MaxIou
    | Fcos
    | Atss
    | YoloRatio
    | YoloBest
    | Uniform
    | CenterGaussian
    | CenterRegion
    | PointScale
    | Paa
    | DualWeight,
    Field(discriminator="type"),
]

__all__ = [
    "Assigner",
    "Atss",
    "CenterGaussian",
    "CenterRegion",
    "DualWeight",
    "Fcos",
    "MaxIou",
    "Paa",
    "PointScale",
    "Rule",
    "Uniform",
    "YoloBest",
    "YoloRatio",
    "from_index",
]
