"""Training, one function to read from top to bottom: what is built, and then what happens in which order."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from detector.config.load import dump
from detector.config.run import RunConfig
from detector.data.coco import CocoData
from detector.data.later import finished
from detector.data.loader import Loader, train_loader
from detector.errors import DataError
from detector.train.checkpoint import load_checkpoint, save_checkpoint
from detector.train.device import find_device
from detector.train.distributed import rank, world_size
from detector.train.finite import FiniteCheck
from detector.train.folder import RunFiles
from detector.train.history import is_best
from detector.train.introduction import introduction
from detector.train.length import Horizon
from detector.train.log import Log
from detector.train.pictures import draw_first_batch
from detector.train.probe import Probe
from detector.train.random import seed_step, set_determinism
from detector.train.signals import StopRequest
from detector.train.state import TrainingState
from detector.train.step import Stepper, set_assigner, set_lr
from detector.train.validation import Interrupted, Validation


@dataclass(frozen=True)
class Outcome:
    """How a run ended."""

    files: RunFiles
    step: int  # steps that were done, in all
    best_step: int | None  # None: there was no evaluation
    numbers: dict[str, float]  # COCO's, of best.pt
    interrupted_by: str | None  # a signal's name
    unreadable: int  # images that could not be read


def train(config: RunConfig, resume: Path | None = None, overwrite: bool = False) -> Outcome:
    """Trains, evaluates and saves as the configuration says; `resume`: goes on with the run in this folder.

    The weights after a step depend on the configuration and that step alone: stopping and going on, evaluations in
    between and the number of workers do not change a bit (on a GPU with `train.deterministic`).

    Raises:
        UserError: of one kind or another, for every mistake of the user's.
    """
    settings = config.train
    device = find_device(settings.device)
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    set_determinism(settings.deterministic, equal_shapes=config.data.resize.canvas() is not None)

    files = RunFiles(config.folder if resume is None else resume)
    saved = None
    if resume is not None:
        files.check_resumable()
        saved = load_checkpoint(files.last) if files.last.exists() else None  # it may have ended before the first
    elif not overwrite:
        files.check_free()

    data = config.data.open("train", cached=True)
    val = config.data.open("val", data.index.classes, cached=True)
    horizon = Horizon(settings.length.count(len(data), settings.batch_size), len(data), settings.batch_size)
    state = TrainingState.build(config, data.index, device, load_weights=saved is None)
    rule = config.assigner  # None where the criterion matches by itself
    notes = settings.schedule.notes(horizon) + ([] if rule is None else rule.notes(horizon))
    if saved is not None:
        notes += state.restore(saved, files.last)
        files.truncate_metrics(state.step)
    loader = _loader(config, data, state.step, horizon.total, horizon.epoch(horizon.total))
    validation = Validation(config, val, device)
    stepper = Stepper(state.module, state.optimizer, state.scaler, settings.clip_norm)
    finite = FiniteCheck(device, scaled=state.scaler.is_enabled())
    if saved is None:
        files.start(dump(config))

    def unreadable() -> int:
        return len(loader.unreadable | validation.loader.unreadable)

    def report() -> None:
        """What the steps since the last report were like; waits for the device."""
        finite.check()
        further = {"lr": settings.optimizer.scaled_lr(settings.batch_size) * factor, "unreadable": float(unreadable())}
        for name, statistics in state.module.statistics.items():
            further |= {f"{name}/{key}": value for key, value in statistics.result().items()}
        state.module.statistics.clear()
        log.write(state.step, further)

    def save() -> None:
        report()
        save_checkpoint(files.last, state.checkpoint())
        log.restart()

    probe = None if settings.probe is None else Probe(settings.probe, val, config.data.resize, config.data.pad_multiple)
    probe_every = 0 if settings.probe is None else horizon.steps(settings.probe.every)
    evaluate_every = horizon.total if settings.evaluate_every is None else horizon.steps(settings.evaluate_every)
    save_every = horizon.steps(settings.save_every)
    past = [score for _, score in state.scores]
    factor = settings.schedule.factor(state.step, horizon, past)
    complete = False

    with StopRequest() as stop, Log(files, horizon, state.step, device) as log:
        for line in (*introduction(config, data, val, state.module, horizon, device), *state.started_from):
            log.say(line)
        for note in notes:
            log.say(f"note: {note}")
        if resume is not None:
            log.say(f"going on after step {state.step}")
        batches = iter(loader)
        try:
            while True:
                # What is due after the steps so far.
                due = state.step > 0 and (state.step % evaluate_every == 0 or state.step == horizon.total)
                if due and state.step not in dict(state.scores):
                    report()
                    model = state.module.model if state.ema is None else state.ema.model
                    result = validation.run(model, stop)
                    past.append(result.numbers["AP"])
                    state.scores.append((state.step, past[-1]))
                    if is_best(past):
                        state.numbers = result.numbers
                        save_checkpoint(files.best, state.checkpoint())
                    log.scores(state.step, result.numbers, is_best(past))
                    validation.pictures.draw(files, log, state.step)
                    log.restart()
                if probe is not None and (state.step % probe_every == 0 or state.step == horizon.total):
                    seed_step(config.seed, state.step, rank())  # what a rule draws for it is the same after a resume
                    log.noted(state.step, probe.note(state.module, files, state.step))
                if settings.early_stopping is not None and settings.early_stopping.stops(past):
                    log.say(f"stopped early: no better AP in {settings.early_stopping.patience} evaluations")
                    complete = True
                complete = complete or state.step >= horizon.total
                if complete or stop.name is not None:
                    break
                if state.step > 0 and state.step % save_every == 0:
                    save()

                # One step.
                parts = [next(batches) for _ in range(settings.accumulate)]
                ids = torch.cat([part.ids for part in parts])
                parts = [finished(part.to(device)) for part in parts]
                if rule is not None:
                    set_assigner(state.module, rule.at(state.step, horizon))
                if state.step == 0:
                    draw_first_batch(files, state.module, parts[0], data.index.classes)
                    log.restart()
                factor = settings.schedule.factor(state.step, horizon, past)
                set_lr(state.optimizer, factor)
                seed_step(config.seed, state.step, rank())
                try:
                    done = stepper(parts, state.ema)
                except RuntimeError as error:
                    finite.explain(error, state.step + 1, ids)
                    raise
                state.step += 1
                finite.add(state.step, done, ids)
                log.add(done)
                if state.step % settings.log_every == 0:
                    report()
        except Interrupted:
            pass
        except DataError:
            if stop.name is None:  # otherwise it was a worker that the signal has ended too
                save()  # the weights are good
                raise
        save()

    best = max(state.scores, key=lambda pair: pair[1])[0] if state.scores else None
    return Outcome(files, state.step, best, state.numbers, None if complete else stop.name, unreadable())


def _loader(config: RunConfig, data: CocoData, start: int, stop: int, epochs: float) -> Loader:
    """The parts of the steps from `start` to before `stop`, of a run of `epochs` in all."""
    settings = config.train
    return train_loader(
        data,
        augment=config.augment,
        resize=config.data.resize,
        batch_size=settings.batch_size // (settings.accumulate * world_size()),
        seed=config.seed,
        start_step=start * settings.accumulate,
        stop_step=stop * settings.accumulate,
        workers=config.data.workers,
        pad_multiple=config.data.pad_multiple,
        max_unreadable=config.data.max_unreadable,
        rank=rank(),
        world=world_size(),
        epochs=epochs,
        partner_cache=config.data.partner_cache,
        order=config.data.order,
        defer=config.data.augment_on == "device",
    )
