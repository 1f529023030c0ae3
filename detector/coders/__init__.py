"""How a head's raw numbers mean a box.  This list is the registry of coders."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from detector.coders.base import Coder
from detector.coders.bins import Bins
from detector.coders.deltas import Deltas
from detector.coders.distances import LEAST_STRIDES, MOST_STRIDES, Distances

AnyCoder = Annotated[Deltas | Distances | Bins, Field(discriminator="type")]

__all__ = ["LEAST_STRIDES", "MOST_STRIDES", "AnyCoder", "Bins", "Coder", "Deltas", "Distances"]
