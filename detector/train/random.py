"""Where training's own random numbers come from, and whether a GPU may round differently each time."""

from __future__ import annotations

import os

import torch

from detector import seeding


def seed_weights(seed: int) -> None:
    """Before the network is built: its first weights depend on the seed and on the network alone."""
    torch.manual_seed(seeding.integer(seed, seeding.INIT))


def seed_step(seed: int, step: int, rank: int) -> None:
    """Before each step: dropout and the like depend on nothing that ran before."""
    torch.manual_seed(seeding.integer(seed, seeding.STEP, step, rank))


def set_determinism(deterministic: bool, equal_shapes: bool) -> None:
    """Settings of this process.  `equal_shapes`: whether all batches have one shape, so trying kernels pays off."""
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when CUDA starts
    torch.use_deterministic_algorithms(deterministic)
    torch.backends.cudnn.deterministic = deterministic
    torch.backends.cudnn.benchmark = equal_shapes and not deterministic
