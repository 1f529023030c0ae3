"""The base of every configuration section.

A component's parameters are declared where the component is.  Rules, coders and losses that keep no state of their own
*are* their section: an `Atss(topk=9)` is both the checked parameters and the thing one calls.  Parts that hold weights
are built by their section's `build`.
"""

from __future__ import annotations

from pydantic import BaseModel, BeforeValidator, ConfigDict


class Node(BaseModel):
    """Unknown keys are errors, values cannot be changed after loading, defaults are checked like anything else."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, validate_default=True, allow_inf_nan=False, ser_json_inf_nan="constants"
    )


def default_type(name: str) -> BeforeValidator:
    """For a slot's union: a section that gives no `type` means this one."""
    return BeforeValidator(lambda value: {"type": name, **value} if isinstance(value, dict) else value)
