"""All that changes while a run goes on, and how it goes into a checkpoint and comes back."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.optim import Optimizer

import detector
from detector.config.run import RunConfig
from detector.config.yaml import flat
from detector.data.coco import CocoIndex
from detector.data.places import place_key
from detector.errors import CheckpointError
from detector.train.checkpoint import Checkpoint, check_classes
from detector.train.ema import Ema
from detector.train.random import InitialWeights, seed_weights
from detector.train.start import start_from
from detector.train.step import TrainingModule

# What may differ when a run goes on: where things are, how fast, what is reported, and how long the run is.
FREE = (
    "name",
    "run",
    "imports",
    "data.root",
    "data.workers",
    "data.cache",
    "data.cache_dir",
    "data.max_unreadable",
    "train.length",
    "train.early_stopping",
    "train.evaluate_every",
    "train.save_every",
    "train.log_every",
    "train.pictures",
    "train.probe",
    "train.device",
    "train.threads",
    "evaluate",
    "decode",
)


@dataclass
class TrainingState:
    """The state after `step` steps."""

    config: RunConfig
    index: CocoIndex  # of the training images
    module: TrainingModule
    ema: Ema | None
    optimizer: Optimizer
    scaler: torch.amp.GradScaler
    step: int = 0
    scores: list[tuple[int, float]] = field(default_factory=list)  # (step, AP) of each evaluation
    numbers: dict[str, float] = field(default_factory=dict)  # COCO's, of the best evaluation
    started_from: tuple[str, ...] = ()  # lines that say what was loaded of a whole detector's weights

    @classmethod
    def build(cls, config: RunConfig, index: CocoIndex, device: torch.device, load_weights: bool) -> TrainingState:
        """The state before the first step; `load_weights=False` leaves the network random, for `restore`."""
        settings, whole = config.train, config.weights if load_weights else None
        seed_weights(config.seed)
        with InitialWeights() as drawn:
            model = config.network(len(index.classes), load_weights=load_weights and whole is None)
            criterion = config.criterion.build(config.assigner, len(index.classes))
            module = TrainingModule(model, criterion, settings.precision)
        drawn.again(module.named_parameters(), config.seed)
        lines = [] if whole is None else start_from(whole, model, config, index.classes)
        # The order that convolutions are fastest in: on GPUs in half precision, on CPUs with AVX-512.  Only now, since
        # weights that move into new memory while `drawn` watches would not be known to it any more.
        module = module.to(device).to(memory_format=torch.channels_last).train()
        return cls(
            config=config,
            index=index,
            module=module,
            ema=settings.ema.build(module.model) if settings.ema is not None else None,
            optimizer=settings.optimizer.build(module, settings.batch_size),
            scaler=torch.amp.GradScaler(device.type, enabled=settings.precision == "fp16"),
            started_from=tuple(lines),
        )

    def checkpoint(self) -> Checkpoint:
        return {
            "model": self.module.model.state_dict(),
            "ema": None if self.ema is None else self.ema.model.state_dict(),
            "ema_count": 0 if self.ema is None else self.ema.count,
            "criterion": self.module.criterion.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "step": self.step,
            "seed": self.config.seed,
            "scores": [list(pair) for pair in self.scores],
            "numbers": self.numbers,
            "config": self.config.model_dump(mode="json"),
            "classes": list(self.index.classes),
            "category_ids": self.index.category_ids.tolist(),
            "versions": {"detector": detector.__version__, "torch": str(torch.__version__)},
        }

    def restore(self, content: Checkpoint, path: Path) -> list[str]:
        """Puts everything back as it was; returns a line for each setting that differs and may do so.

        Raises:
            CheckpointError: the data have other classes, a setting differs that makes it another run, or the state does
                not fit although the configuration is the same.
        """
        check_classes(content, self.index.classes, path)
        changes = check_same_run(content, self.config.model_dump(mode="json"), path)
        try:
            self.module.model.load_state_dict(content["model"])
            self.module.criterion.load_state_dict(content["criterion"])
            self.optimizer.load_state_dict(content["optimizer"])
            self.scaler.load_state_dict(content["scaler"])
            if self.ema is not None:
                self.ema.load(content["ema"], content["ema_count"])
        except (RuntimeError, ValueError, KeyError) as error:
            reason = str(error).splitlines()[-1].strip()
            versions = ", ".join(f"{name} {version}" for name, version in content["versions"].items())
            raise CheckpointError(
                f"{path}: its state does not fit ({reason}); it was written with {versions}: install these, or start"
                " anew"
            ) from None
        self.step, self.numbers = content["step"], content["numbers"]
        self.scores = [(step, score) for step, score in content["scores"]]
        return changes


def check_same_run(content: Checkpoint, config: dict[str, Any], path: Path) -> list[str]:
    """One line for each key that differs from the checkpoint's configuration and may do so.

    Raises:
        CheckpointError: a key differs that makes it another run.
    """
    before, now = flat(content["config"]), flat(config)
    lines = []
    for key in [*now, *(k for k in before if k not in now)]:
        if before.get(key) == now.get(key):
            continue
        change = f"{key} was {before.get(key)!r} and is now {now.get(key)!r}"
        if not any(f"{place_key(key)}.".startswith(f"{free}.") for free in FREE):
            raise CheckpointError(
                f"{path}: cannot go on, because that would be another run: {change}; use the configuration that it was"
                f" started with ({path.with_name('config.yaml')}), or start a new run"
            )
        lines.append(change)
    return lines
