"""Where in an object its predictions are good: a mixture of Gaussians on each level (IQDet).

Ma et al., "IQDet", CVPR 2021, arXiv:2104.06936, whose authors call it the quality distribution.

Legend: N objects, L levels, M components, S points drawn for an object.

Places are in halves of the object's width and height around its centre: the box is the square from -1 to 1.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from detector.seeding import STEP, integer
from detector.structures import Objects

DRAW = 1 << 16  # keeps these random numbers apart from those of samplers (sample.py counts its stages from 0)
GRAIN = 8  # sides are rounded to so many parts of a pixel where they decide random numbers
WORD = (1 << 32) - 1
LEAST_SIDE = 1e-6  # pixels


class Distribution(NamedTuple):
    """The value at a place is the sum of share * exp(-(x - mean)^2 / (2 deviation^2)) over components; in [0, 1]."""

    mean: Tensor  # (..., M, 2) x, y in [-1, 1]
    deviation: Tensor  # (..., M, 2) > 0
    share: Tensor  # (..., M) >= 0, at most 1 in all: the value that the component has at its mean

    @classmethod
    def unpack(cls, mixture: Tensor) -> Distribution:
        """From (..., M, 5), as the encoder gives it: mean x, y, deviation x, y, share."""
        return cls(mixture[..., :2], mixture[..., 2:4], mixture[..., 4])

    def of_level(self, level: Tensor) -> Distribution:
        """(N, S) -> those of each object's levels, (N, S, M, ...)."""
        row = torch.arange(len(level), device=level.device)[:, None]
        return Distribution(self.mean[row, level], self.deviation[row, level], self.share[row, level])

    def of_rows(self, row: Tensor) -> Distribution:
        """(n,) int64: some of the first dimension."""
        return Distribution(self.mean[row], self.deviation[row], self.share[row])

    def value(self, place: Tensor) -> Tensor:
        """(..., 2) -> (...)."""
        away = (place.unsqueeze(-2) - self.mean) / self.deviation
        return (self.share * (away.square().sum(-1) / -2).exp()).sum(-1)

    def value_at(self, x: Tensor, y: Tensor) -> Tensor:
        """Of (n, M, ...), at places (n, C) each -> (n, C): as `value`, component by component."""
        found = torch.zeros_like(x)
        for m in range(self.share.shape[1]):
            away = (x - self.mean[:, m, :1]).div_(self.deviation[:, m, :1]).square_()
            away += (y - self.mean[:, m, 1:]).div_(self.deviation[:, m, 1:]).square_()
            found += away.div_(-2).exp_().mul_(self.share[:, m, None])
        return found

    def draw(self, random: Tensor) -> tuple[Tensor, Tensor]:
        """Points of each object over all of its levels, as densely as the value says, all inside the object.

        Of (N, L, M, ...); random: (N, S, 3) float64 in (0, 1) -> level (N, S) int64, place (N, S, 2) float64.

        A component on a level is chosen by how much of it lies inside, share * deviations * probability of the square;
        then each axis by the inverse of the normal distribution cut off at the box.  Float64 throughout.
        """
        mean, deviation, share = (x.double() for x in self)
        low, high = (torch.special.ndtr((end - mean) / deviation) for end in (-1.0, 1.0))
        inside = (share * (deviation * (high - low)).prod(-1)).flatten(1)  # (N, L * M)
        upto = inside.cumsum(1)
        reached = random[..., :1] * upto[:, None, -1:] >= upto[:, None]  # (N, S, L * M)
        chosen = reached.sum(-1).clamp(max=inside.shape[1] - 1)
        row = torch.arange(len(chosen), device=chosen.device)[:, None]
        mean, deviation, low, high = (x.flatten(1, 2)[row, chosen] for x in (mean, deviation, low, high))
        place = mean + deviation * torch.special.ndtri(low + (high - low) * random[..., 1:])
        return chosen // share.shape[-1], place.clamp(-1, 1)


def random_numbers(objects: Objects, count: int) -> Tensor:
    """(N, `count`, 3) float64 in (0, 1), of this step and each object alone.

    A hash of the seed that the process was given for the step, the object's width and height and the place in the list:
    no generator is touched, every device has the same numbers, and neither the order of objects, nor what else is in
    the batch, nor where the object lies changes them.  Objects of equal size get equal numbers.
    """
    seed = integer(torch.initial_seed(), STEP, DRAW)
    sides = ((objects.boxes[:, 2:] - objects.boxes[:, :2]).double() * GRAIN).round().long() & WORD
    key = _scramble(_scramble(sides[:, 0] ^ seed) ^ sides[:, 1])
    place = torch.arange(count * 3, device=key.device)
    word = _scramble(_scramble(key[:, None] ^ _scramble(place)) ^ seed)
    return ((word.double() + 0.5) / (WORD + 1)).view(-1, count, 3)


def _scramble(word: Tensor) -> Tensor:
    """int64 in [0, 2^32) -> the same, every bit depending on every bit: multiply and shift, twice."""
    for _ in range(2):
        word = ((word >> 16) ^ word) * 0x45D9F3B & WORD
    return (word >> 16) ^ word
