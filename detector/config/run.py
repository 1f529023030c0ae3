"""The whole of a run as one checked, frozen tree: what `configs/*.yaml` spell out.

Each section is declared where its component is; this file only puts them together and checks what concerns several.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import Field, model_validator

from detector.assign import Rule
from detector.assign.atss import Atss
from detector.config.node import Node, default_type
from detector.data.config import Data
from detector.data.transforms import Transform
from detector.decode import DecodeConfig
from detector.evaluate.config import EvaluateConfig
from detector.losses.dense import DenseCriterionConfig
from detector.losses.two_stage import CrossEntropy, TwoStageCriterionConfig
from detector.models import Model
from detector.train.config import TrainConfig

Criterion = Annotated[
    DenseCriterionConfig | TwoStageCriterionConfig, Field(discriminator="type"), default_type("dense")
]


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
    assigner: Rule = Atss()
    criterion: Criterion = DenseCriterionConfig()
    train: TrainConfig
    decode: DecodeConfig = DecodeConfig()
    evaluate: EvaluateConfig = EvaluateConfig()

    @property
    def folder(self) -> Path:
        return self.run.dir if self.run.dir is not None else Path("runs") / self.name

    @model_validator(mode="after")
    def _criterion_fits_the_model(self) -> RunConfig:
        model, criterion = self.model, self.criterion
        kind = "dense" if model.type == "dense" else "two_stage"
        if criterion.type != kind:
            raise ValueError(
                f"model.type {model.type!r} does not go with criterion.type {criterion.type!r}:"
                f" set criterion.type={kind}"
            )
        if model.type == "dense" or criterion.type == "dense":
            return self
        if len(model.stages) != len(criterion.stage_weights):
            raise ValueError(
                f"the model has {len(model.stages)} box heads, but criterion.stage_weights are"
                f" {list(criterion.stage_weights)}: give one for each"
            )
        softmax = isinstance(criterion.classification, CrossEntropy)
        if softmax != (model.head.classifier == "softmax"):
            raise ValueError(
                f"model.head.classifier is {model.head.classifier!r} but criterion.classification is"
                f" {criterion.classification.type!r}: softmax goes with cross_entropy, sigmoid with bce and focal"
            )
        return self

    @model_validator(mode="after")
    def _quality_needs_its_branch(self) -> RunConfig:
        if self.model.type != "dense" or self.criterion.type != "dense":
            return self
        if self.criterion.quality is not None and not self.model.head.quality:
            raise ValueError(
                "criterion.quality is set but model.head.quality is false: set model.head.quality=true, or"
                " criterion.quality=null"
            )
        if self.criterion.quality is None and self.model.head.quality:
            raise ValueError(
                "model.head.quality is true but nothing would train it: set criterion.quality, or"
                " model.head.quality=false"
            )
        return self
