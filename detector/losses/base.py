"""What every criterion is to the rest: a section that builds a module, and that says which heads it cannot train."""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING, ClassVar

from torch import nn

from detector.coders import Coder
from detector.config.node import Node
from detector.errors import ConfigError
from detector.structures import Objects

if TYPE_CHECKING:
    from detector.assign.base import Assigner


# Box losses on raw numbers do not go with a distribution's, which are no numbers to come near to.
RAW_ARE_LOGITS = (
    "criterion.box compares raw numbers, but those of a 'bins' coder are logits: set criterion.box.type=giou"
)


def refuse_weights(objects: Objects, criterion: str) -> None:
    """
    Raises:
        ConfigError: the objects have weights of their own, which only the criterion `dense` can use.
    """
    if objects.weight is not None:
        raise ConfigError(
            f"criterion.type {criterion!r} does not know weights of single objects, which the annotations give (key"
            " `weight`) or the step mixup (`weights: true`): train with criterion.type=dense, or without such weights"
        )


class CriterionConfig(Node):
    """A criterion is called `criterion(outputs, objects) -> Losses`, and may hold parameters."""

    uses_assigner: ClassVar[bool] = True  # False: the criterion itself says who learns what

    @property
    @abstractmethod
    def uses_quality(self) -> bool:
        """Whether it trains the head's quality branch."""

    @abstractmethod
    def objection(self, coder: Coder) -> str | None:
        """Why it cannot train a head whose boxes are coded like this, and what to do; None: it can."""

    @abstractmethod
    def build(self, assigner: Assigner | None, num_classes: int) -> nn.Module:
        """The module.  Raises `ConfigError` where it needs a rule and gets none, or the other way round."""
