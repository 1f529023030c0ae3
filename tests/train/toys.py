"""A network, a criterion and batches that are small enough to check by hand."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from detector.structures import Batch, Losses, Objects


class ToyModel(nn.Module):
    """(B, 3, 2, 2) -> (B, 2), in the precision that autocast says."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.backbone = nn.Sequential(nn.Flatten(), nn.Linear(12, 8), nn.ReLU())
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(8, 2)

    def forward(self, images: Tensor, objects: Objects | None = None) -> Tensor:
        found: Tensor = self.head(self.dropout(self.backbone(images.to(self.head.weight.dtype) / 255)))
        return found


class ToyCriterion(nn.Module):
    """Sums of squares and of absolute values; the normaliser is the number of objects."""

    def __init__(self) -> None:
        super().__init__()
        self.dtypes: list[torch.dtype] = []

    def forward(self, outputs: Tensor, objects: Objects) -> Losses:
        self.dtypes.append(outputs.dtype)
        outputs = outputs.to(torch.promote_types(outputs.dtype, torch.float32))
        sums = {"square": (outputs - 1).square().sum(), "far": outputs.abs().sum() * 0.1}
        return Losses(sums, torch.tensor(float(len(objects))))


def toy_batch(counts: list[int], seed: int = 0) -> Batch:
    """One image for each number of objects."""
    random = torch.Generator().manual_seed(seed)
    n = len(counts)
    return Batch(
        images=torch.randint(0, 256, (n, 3, 2, 2), generator=random, dtype=torch.uint8),
        objects=Objects.collate(
            [torch.tensor([[0.0, 0, 1, 1]]).expand(c, 4) for c in counts],
            [torch.zeros(c, dtype=torch.long) for c in counts],
            sizes=torch.full((n, 2), 2.0),
        ),
        ids=torch.arange(n) + 100 * seed,
        original_sizes=torch.full((n, 2), 2),
        scale=torch.ones(n, 2),
        offset=torch.zeros(n, 2),
    )


def split(batch: Batch, sizes: list[int]) -> list[Batch]:
    """The same images in parts."""
    parts, first = [], 0
    for size in sizes:
        rows = slice(first, first + size)
        images = range(first, first + size)
        objects = [batch.objects.select_image(i) for i in images]
        parts.append(
            Batch(
                images=batch.images[rows],
                objects=Objects.collate(
                    [o.boxes for o in objects], [o.labels for o in objects], sizes=batch.sizes[rows]
                ),
                ids=batch.ids[rows],
                original_sizes=batch.original_sizes[rows],
                scale=batch.scale[rows],
                offset=batch.offset[rows],
            )
        )
        first += size
    return parts
