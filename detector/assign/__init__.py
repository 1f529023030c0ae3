"""Label assignment: which prior learns which object.  This list is the registry of rules."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from detector.assign.atss import Atss
from detector.assign.base import Assigner, from_index
from detector.assign.overlap import MaxIou
from detector.assign.points import Fcos

Rule = Annotated[MaxIou | Fcos | Atss, Field(discriminator="type")]

__all__ = ["Assigner", "Atss", "Fcos", "MaxIou", "Rule", "from_index"]
