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


# What a criterion of a dense head finds wrong with itself.
NO_BACKGROUND = (
    "class_on is 'positives' but nothing would learn the background: set quality={type: objectness}, or class_on=all"
)
# What a criterion of a dense head finds wrong with the head.
NO_DISTRIBUTIONS = (
    "criterion.distribution is set but the head gives no distributions: set model.head.coder={type: bins}, or"
    " criterion.distribution=null"
)
NO_QUALITY = (
    "criterion.quality asks for a quality loss but the head has no quality branch: set model.head.quality=true, or"
    " criterion.quality=null"
)
NOT_REFINED = (
    "criterion.initial_box is set but the head does not refine its boxes: set model.head.type=refined, or"
    " criterion.initial_box=null"
)
# After the name of a rule.
NOT_SAID_WHETHER_MODULATED = (
    " weighs the background but does not say whether its weights hold the focal factor already: it must set"
    " `modulated` of its Assignment to True (as in DW), or to False"
)
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
    def objection(self, coder: Coder, initial: Coder | None = None) -> str | None:
        """Why it cannot train a head whose boxes are coded like this, and what to do; None: it can.

        `initial`: how a head that refines its boxes codes those before it; None: the head does not refine.
        """

    @abstractmethod
    def build(self, assigner: Assigner | None, num_classes: int) -> nn.Module:
        """The module.  Raises `ConfigError` where it needs a rule and gets none, or the other way round."""
