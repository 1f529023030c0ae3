"""What an assignment does to objects of each size and on each level, summed up on the device for the log.

Legend: N objects, L levels, P pairs, R priors of one image.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from detector.assign.base import constant
from detector.structures import Assignment, Objects, Priors

SIZES = {"small": 32.0**2, "medium": 96.0**2, "large": math.inf}  # COCO's upper bounds of area, square pixels


class AssignmentStatistics:
    """Collects over steps without waiting for the device; only `result` does.

    Sizes go by the area of the box in pixels of the network's input (COCO: of the mask in the original image), so they
    say what the rule saw.
    """

    def __init__(self) -> None:
        self.by_size: Tensor | None = None  # (3, 3) int64: for each size objects, those without a positive, positives
        self.by_level: Tensor | None = None  # (L,) int64 positives

    def add(self, priors: Priors, objects: Objects, assignment: Assignment) -> None:
        """One batch.  Raises ValueError where the number of levels has changed since the last."""
        device, levels = priors.boxes.device, len(priors.level_sizes)
        if self.by_size is None or self.by_level is None:
            self.by_size = torch.zeros(len(SIZES), 3, dtype=torch.int64, device=device)
            self.by_level = torch.zeros(levels, dtype=torch.int64, device=device)
        if len(self.by_level) != levels:
            raise ValueError(f"the priors have {levels} levels, those before had {len(self.by_level)}: start anew.")
        positive = (assignment.weight > 0).long()
        ends = constant(_ends(priors.level_sizes), torch.int64, device)
        level = torch.bucketize(assignment.prior % assignment.num_priors, ends, right=True)
        self.by_level.scatter_add_(0, level, positive)
        count = torch.zeros(len(objects), dtype=torch.int64, device=device)
        count.scatter_add_(0, assignment.object, positive)
        area = (objects.boxes[:, 2:] - objects.boxes[:, :2]).prod(1)
        size = torch.bucketize(area, constant(tuple(SIZES.values())[:-1], torch.float32, device), right=True)
        rows = torch.stack([torch.ones_like(count), (count == 0).long(), count], 1)
        self.by_size.scatter_add_(0, size[:, None].expand_as(rows), rows)

    def result(self) -> dict[str, float]:
        """Positives an object and share of objects without any, over all and by size; share of positives by level.

        A size that no object had is left out.  Waits for the device.
        """
        if self.by_size is None or self.by_level is None:
            return {}
        sizes = dict(zip(SIZES, self.by_size.tolist(), strict=True))
        sizes = {"all": [sum(column) for column in zip(*sizes.values(), strict=True)], **sizes}
        numbers: dict[str, float] = {}
        for name, (objects, without, positives) in sizes.items():
            if objects:
                numbers[f"positives_per_object/{name}"] = positives / objects
                numbers[f"objects_without_positive/{name}"] = without / objects
        levels = self.by_level.tolist()
        for i, positives in enumerate(levels):
            numbers[f"share_of_positives/level_{i}"] = positives / max(1, sum(levels))
        return numbers


def _ends(sizes: tuple[int, ...]) -> tuple[int, ...]:
    """Index after the last prior of each level but the last."""
    return tuple(sum(sizes[: i + 1]) for i in range(len(sizes) - 1))
