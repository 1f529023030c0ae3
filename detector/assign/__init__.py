"""Label assignment: which prior learns which object.  This list is the registry of rules."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from detector.assign.aligned import TaskAligned
from detector.assign.atss import Atss
from detector.assign.base import Assigner, from_index
from detector.assign.center_gaussian import CenterGaussian
from detector.assign.center_region import CenterRegion
from detector.assign.dynamic import DynamicSoftLabel, SimOta
from detector.assign.hungarian import Hungarian
from detector.assign.iqdet import IqDet
from detector.assign.mixture import Paa
from detector.assign.overlap import MaxIou
from detector.assign.point_scale import PointScale
from detector.assign.points import Fcos
from detector.assign.schedule import Anneal, Switch
from detector.assign.transport import Ota
from detector.assign.uniform import Uniform
from detector.assign.weights import DualWeight
from detector.assign.yolo import YoloBest, YoloRatio

Geometric = MaxIou | Fcos | Atss | YoloRatio | YoloBest | CenterGaussian | CenterRegion | PointScale
Predicted = SimOta | TaskAligned | DynamicSoftLabel | Ota | Hungarian | Uniform | Paa | DualWeight | IqDet
Constant = Geometric | Predicted

ConstantRule = Annotated[Constant, Field(discriminator="type")]
GlidingRule = Annotated[Constant | Anneal, Field(discriminator="type")]
Rule = Annotated[Constant | Anneal | Switch, Field(discriminator="type")]

Anneal.model_rebuild(_types_namespace={"ConstantRule": ConstantRule})
Switch.model_rebuild(_types_namespace={"GlidingRule": GlidingRule})

__all__ = [
    "Anneal",
    "Assigner",
    "Atss",
    "CenterGaussian",
    "CenterRegion",
    "DualWeight",
    "DynamicSoftLabel",
    "Fcos",
    "Hungarian",
    "IqDet",
    "MaxIou",
    "Ota",
    "Paa",
    "PointScale",
    "Rule",
    "SimOta",
    "Switch",
    "TaskAligned",
    "Uniform",
    "YoloBest",
    "YoloRatio",
    "from_index",
]
