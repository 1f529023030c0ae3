"""The training section of a recipe."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from detector.config.node import Node
from detector.train.device import DEVICES
from detector.train.ema import EmaConfig
from detector.train.history import EarlyStopping
from detector.train.length import Length
from detector.train.optim import AnyOptimizer, Sgd
from detector.train.probe import ProbeConfig
from detector.train.schedule import AnySchedule, MultiStep, Plateau


class TrainConfig(Node):
    """How long, how large steps, how fast, on what, and when to evaluate and save."""

    length: Length = Length(epochs=12)
    batch_size: int = Field(16, ge=1, description="images of one step of the optimiser")
    accumulate: int = Field(
        1, ge=1, description="parts that a step is computed in, one after the other: less memory, same gradient"
    )
    precision: Literal["fp32", "bf16", "fp16"] = Field(
        "fp32", description="of the network's forward pass; losses and weights are always fp32"
    )
    optimizer: AnyOptimizer = Sgd()
    schedule: AnySchedule = MultiStep()
    clip_norm: float | None = Field(None, gt=0, description="longest gradient over all parameters; null: any")
    ema: EmaConfig | None = Field(None, description="average the weights; {} for the default average")
    early_stopping: EarlyStopping | None = Field(None, description="{} for the default patience")
    evaluate_every: Length | None = Field(Length(epochs=1), description="null: only at the end")
    save_every: Length = Field(Length(epochs=1), description="what is lost at most when the machine stops")
    log_every: int = Field(20, ge=1, description="steps between two lines of metrics")
    pictures: int = Field(4, ge=0, description="validation pictures drawn at each evaluation")
    probe: ProbeConfig | None = Field(None, description="note the assignments of some validation images now and then")
    device: str = Field("auto", pattern=DEVICES, description="cpu, cuda, cuda:1, mps; auto: a GPU if there is one")
    deterministic: bool = Field(False, description="bit for bit the same on a GPU too, at some cost; a CPU always is")
    threads: int | None = Field(None, ge=1, description="CPU threads of the main process; null: as torch sees fit")

    @model_validator(mode="after")
    def _consistent(self) -> TrainConfig:
        if self.batch_size % self.accumulate:
            raise ValueError(
                f"batch_size {self.batch_size} cannot be computed in {self.accumulate} equal parts: set accumulate to"
                " a divisor of batch_size"
            )
        if self.evaluate_every is None and self.early_stopping is not None:
            raise ValueError("early_stopping needs scores during training: set evaluate_every")
        if self.evaluate_every is None and isinstance(self.schedule, Plateau):
            raise ValueError("the plateau schedule needs scores during training: set evaluate_every")
        return self
