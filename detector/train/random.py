"""Where training's own random numbers come from, and whether a GPU may round differently each time."""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from detector import seeding


def seed_weights(seed: int) -> None:
    """Before the network is built: whatever is drawn outside of `InitialWeights` depends on the seed alone."""
    torch.manual_seed(seeding.integer(seed, seeding.INIT))


class InitialWeights(TorchDispatchMode):
    """`with InitialWeights() as drawn:` build, then `drawn.again(named_parameters, seed)`.

    Draws every random parameter once more, in the way in which it was drawn while the network was built, but from a
    generator of its own that depends on (seed, name).  So a parameter's first value depends on its name and shape and
    not on what was built before it: networks that differ in their heads start with equal backbones, necks and towers.
    What is not random (zeros, ones, loaded weights) stays as it is.

    Watches the in-place operations on each storage from its last random one on, and repeats them: that covers
    initialisation in place (`normal_`, `kaiming_uniform_`, ...) and weights loaded over it.  What is drawn elsewhere
    and copied (`orthogonal_`, `trunc_normal_` where it rejects a draw) is copied again: it depends on the seed and on
    what was drawn before, which for a backbone, being built first, is nothing.
    """

    def __init__(self) -> None:
        super().__init__()
        self._calls: dict[int, list[tuple[Any, Any, Any]]] = {}  # by address; the arguments keep the storage alive

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if func._schema.is_mutable:
            for described, value in zip(func._schema.arguments, args, strict=False):
                if described.is_write and isinstance(value, Tensor):
                    place = value.untyped_storage().data_ptr()
                    if torch.Tag.nondeterministic_seeded in func.tags:
                        self._calls[place] = [(func, args, kwargs)]
                    elif place in self._calls:
                        self._calls[place].append((func, args, kwargs))
        return result

    def again(self, parameters: Iterable[tuple[str, Tensor]], seed: int) -> None:
        """Each random one of these, under its name; the global generator is left as it was."""
        with torch.random.fork_rng([]), torch.no_grad():
            for name, parameter in parameters:
                calls = self._calls.get(parameter.untyped_storage().data_ptr())
                if calls is not None:
                    torch.manual_seed(seeding.integer(seed, seeding.INIT, zlib.crc32(name.encode())))
                    for func, args, kwargs in calls:
                        func(*args, **kwargs)
        self._calls.clear()


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
