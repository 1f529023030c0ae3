"""Derived randomness: a random number depends on (seed, what it is for, where we are), never on what ran before.

    order of an epoch            generator(seed, ORDER, epoch)
    augmentation of one sample   generator(seed, SAMPLE, epoch, index)
    dropout and the like         integer(seed, STEP, step)
    first values of a parameter  integer(seed, INIT, checksum of its name)

So nothing about randomness has to be saved: workers, evaluation in between and resuming change nothing.
"""

from __future__ import annotations

import numpy as np

# The first word of every derivation says what the numbers are for, so that no two uses share a stream.
ORDER, SAMPLE, STEP, SIZE, INIT, SYNTHETIC, ANALYSIS = range(7)


def generator(seed: int, *words: int) -> np.random.Generator:
    """A numpy generator that depends on `seed` and `words` alone (all non-negative integers)."""
    return np.random.default_rng((seed, *words))


def integer(seed: int, *words: int) -> int:
    """A 32-bit seed for libraries that want one number, such as `torch.manual_seed`."""
    return int(np.random.SeedSequence((seed, *words)).generate_state(1)[0])
