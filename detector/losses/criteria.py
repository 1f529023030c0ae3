"""The criteria.  This list is the registry of what `criterion.type` takes."""

from __future__ import annotations

from typing import Annotated, get_args

from pydantic import Field

from detector.config.node import default_type
from detector.losses.auto_assign import AutoAssignConfig
from detector.losses.dense import DenseCriterionConfig
from detector.losses.free_anchor import FreeAnchorConfig
from detector.losses.iqdet import IqDetCriterionConfig
from detector.losses.two_stage import TwoStageCriterionConfig

AnyCriterion = Annotated[
    DenseCriterionConfig | FreeAnchorConfig | AutoAssignConfig | IqDetCriterionConfig | TwoStageCriterionConfig,
    Field(discriminator="type"),
    default_type("dense"),
]

# Types of those that match priors to objects by themselves.
WITHOUT_RULE = tuple(c.model_fields["type"].default for c in get_args(get_args(AnyCriterion)[0]) if not c.uses_assigner)
