"""Checkpoints: plain tensors and data in one file, written whole or not at all, read without executing anything."""

from __future__ import annotations

import errno
import os
import pickle
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO

import torch

from detector.errors import CheckpointError, UserError

# What `load_checkpoint` promises to be there.
KEYS = (
    "model",  # the raw weights' state dict
    "ema",  # the averaged weights' state dict, or None
    "ema_count",  # updates of the average
    "criterion",  # state dict: losses and normalisers can have state
    "optimizer",
    "scaler",  # of the gradients in half precision; {} where there is none
    "step",  # steps of the optimiser that are done
    "seed",
    "scores",  # (step, AP) of each evaluation so far
    "numbers",  # COCO's numbers of the best of them, {} before the first
    "config",  # the run's configuration as plain data
    "classes",  # class names by label
    "category_ids",  # the annotation file's id of each label
    "versions",
)
Checkpoint = dict[str, Any]


def save_checkpoint(path: Path, content: Checkpoint) -> None:
    """Replaces `path` in one step, so that whatever happens either the old or the new file is there, whole.

    Raises:
        UserError: the file cannot be written, for instance because the disk is full; the old file is as it was.
    """
    assert set(content) == set(KEYS), f"keys differ: {set(content) ^ set(KEYS)}"
    part = path.with_name(path.name + ".part")
    try:
        with part.open("wb") as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
        _sync_folder(path.parent)
    except (OSError, RuntimeError) as error:
        part.unlink(missing_ok=True)
        cause = _os_error(error)
        if cause is None:
            raise
        kept = f"; the one before it is intact: {path}" if path.exists() else ""
        reason = "the disk is full" if cause.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG) else cause.strerror
        raise UserError(
            f"{path}: cannot save the checkpoint: {reason or cause}{kept}. Make room and go on with --resume"
        ) from None


def load_checkpoint(path: Path) -> Checkpoint:
    """What `save_checkpoint` wrote, on the CPU; nothing in the file is executed.

    Raises:
        CheckpointError: missing, truncated, damaged, holding code, or not a checkpoint of training.
    """
    try:
        with path.open("rb") as file:
            content = _read(path, file)
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such checkpoint") from None
    except OSError as error:
        raise CheckpointError(f"{path}: cannot read the checkpoint ({error.strerror or error})") from None
    missing = [key for key in KEYS if key not in content] if isinstance(content, dict) else list(KEYS)
    if missing:
        raise CheckpointError(
            f"{path}: not a checkpoint of training: {missing[0]!r} is missing; a backbone's weights go into"
            " model.backbone.weights, those of another toolkit's detector through convert_weights first"
        )
    return content


def check_classes(content: Checkpoint, classes: Sequence[str], path: Path) -> None:
    """Raises `CheckpointError` unless the checkpoint was trained for exactly these classes in this order."""
    known, given = list(content["classes"]), list(classes)
    if known == given:
        return
    if len(known) != len(given):
        raise CheckpointError(
            f"{path}: trained for {len(known)} classes, the data have {len(given)}: use the data it was trained on, or"
            " train anew"
        )
    label = next(i for i, (a, b) in enumerate(zip(known, given, strict=True)) if a != b)
    raise CheckpointError(
        f"{path}: label {label} is {known[label]!r} there, {given[label]!r} in the data: use the data it was trained"
        " on, or train anew"
    )


def _read(path: Path, file: BinaryIO) -> Any:
    damaged = (
        f"{path}: damaged or truncated, or not a checkpoint; use another one, such as last.pt or best.pt beside it"
    )
    try:
        with zipfile.ZipFile(file) as archive:  # torch itself does not look at the checksums
            if archive.testzip() is not None:
                raise CheckpointError(damaged)
        file.seek(0)
        return torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if "unsupported global" not in str(error).lower():
            raise CheckpointError(damaged) from None
        raise CheckpointError(
            f"{path}: holds code or objects, which are not loaded because they could do anything; expected a"
            " checkpoint of this program, which holds only tensors and plain data"
        ) from None
    except CheckpointError:
        raise
    except Exception:  # whatever the zip reader and torch's unpickler raise on arbitrary bytes
        raise CheckpointError(damaged) from None


def _os_error(error: BaseException) -> OSError | None:
    """The operating system's error behind `error`, which torch hides in a RuntimeError of its zip writer."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, OSError):
            return seen
        seen = seen.__cause__ or seen.__context__
    return None


def _sync_folder(folder: Path) -> None:
    """Makes the renaming itself last through a power cut, where folders can be synced."""
    if os.name != "posix":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
