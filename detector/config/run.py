"""The whole of a run as one checked, frozen tree: what `configs/*.yaml` spell out.

Each section is declared where its component is; this file only puts them together and checks what concerns several.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import Field, model_validator

from detector.assign import Rule
from detector.assign.atss import Atss
from detector.config.node import Node
from detector.data.config import Data
from detector.data.transforms import Transform
from detector.decode import DecodeConfig
from detector.evaluate.config import EvaluateConfig
from detector.losses.criteria import WITHOUT_RULE, AnyCriterion
from detector.losses.dense import DenseCriterionConfig
from detector.models import Model
from detector.train.config import TrainConfig


class RunFolder(Node):
    """Where a run keeps its files."""

    dir: Path | None = Field(None, description="default: runs/<name>")


class RunConfig(Node):
    """Everything that decides a run.  Equal configurations give equal weights on equal machines."""

    name: str = Field(min_length=1, description="default: the recipe's file name")
    seed: int = Field(0, ge=0)
    imports: tuple[str, ...] = Field((), description="Python files of your own whose sections join the slots they fit")
    run: RunFolder = RunFolder()
    data: Data
    augment: tuple[Transform, ...] = Field((), description="training only, in this order, before the resize")
    model: Model
    assigner: Rule | None = Field(Atss(), description="null for criteria that match priors to objects by themselves")
    criterion: AnyCriterion = DenseCriterionConfig()
    train: TrainConfig
    decode: DecodeConfig = DecodeConfig()
    evaluate: EvaluateConfig = EvaluateConfig()

    @property
    def folder(self) -> Path:
        return self.run.dir if self.run.dir is not None else Path("runs") / self.name

    @model_validator(mode="before")
    @classmethod
    def _rule_by_default(cls, values: Any) -> Any:
        """A criterion that does without a rule has none by default."""
        if not isinstance(values, dict) or "assigner" in values or not isinstance(values.get("criterion"), dict):
            return values
        alone = values["criterion"].get("type") in WITHOUT_RULE
        return {**values, "assigner": None} if alone else values

    @model_validator(mode="after")
    def _rule_where_it_counts(self) -> RunConfig:
        kind = self.criterion.type
        if self.criterion.uses_assigner and self.assigner is None:
            raise ValueError(f"criterion.type {kind!r} needs a rule of label assignment: set assigner")
        if not self.criterion.uses_assigner and self.assigner is not None:
            raise ValueError(f"criterion.type {kind!r} matches priors to objects by itself: set assigner=null")
        return self

    @model_validator(mode="after")
    def _quality_needs_its_branch(self) -> RunConfig:
        if self.criterion.uses_quality and not self.model.head.quality:
            dense = self.criterion.type == "dense"
            what = "quality is set" if dense else f"type {self.criterion.type!r} needs an objectness"
            instead = ", or criterion.quality=null" if dense else ""
            raise ValueError(f"criterion.{what} but model.head.quality is false: set model.head.quality=true{instead}")
        if not self.criterion.uses_quality and self.model.head.quality:
            also = "set criterion.quality, or " if self.criterion.type == "dense" else "set "
            raise ValueError(f"model.head.quality is true but nothing would train it: {also}model.head.quality=false")
        return self

    @model_validator(mode="after")
    def _boxes_fit_the_losses(self) -> RunConfig:
        objection = self.criterion.objection(self.model.head.output_coder)
        if objection is not None:
            raise ValueError(objection)
        return self
