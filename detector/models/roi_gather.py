"""RoIAlign as a weighted sum of rows: on a CPU several times faster than the kernel, which reads channel by channel.

Legend: B images, M boxes of all images, C channels, H W cells of a map, h w bins of a box, n samples of a bin per axis.

Bilinear samples are products of one axis's weights and the other's (He et al., "Mask R-CNN", ICCV 2017), so a bin is
the sum of (2 n)^2 cells.  In channels_last a cell is a row of C numbers, and such sums are what embedding bags compute.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def gathers(x: Tensor) -> bool:
    """Whether this is the faster way for a map: in full precision, on a CPU, and not for an exporter."""
    return x.device.type == "cpu" and x.dtype in (torch.float32, torch.float64) and not torch.compiler.is_compiling()


def gather_align(
    maps: Sequence[Tensor],
    rois: Tensor,
    level: Tensor,
    strides: Sequence[int],
    size: tuple[int, int],
    samples: int,
    aligned: bool,
) -> Tensor:
    """Maps (B, C, H, W), (M, 5) image index and xyxy pixels, (M,) which map -> (M, C, h, w) in channels_last.

    All levels at once, without waiting.  The gradient flows to the maps alone, as in the kernel.
    """
    batch, channels = maps[0].shape[:2]
    with torch.no_grad():
        shapes = [(*x.shape[-2:], 1 / stride) for x, stride in zip(maps, strides, strict=True)]
        height, width, scale = rois.new_tensor(shapes)[level].unbind(1)
        starts = [0]
        for h, w, _ in shapes[:-1]:
            starts.append(starts[-1] + batch * h * w)
        corners = rois[:, 1:] * scale[:, None] - (0.5 if aligned else 0.0)
        column, across = _taps(corners[:, 0], corners[:, 2], width, size[1], samples, aligned)
        row, down = _taps(corners[:, 1], corners[:, 3], height, size[0], samples, aligned)
        width_of, cells = width.long(), (height * width).long()
        first = level.new_tensor(starts)[level] + rois[:, 0].long() * cells
        row = first[:, None, None] + row * width_of[:, None, None]
        cell = (row[:, :, None, :, None] + column[:, None, :, None, :]).int()  # (M, h, w, 2 n, 2 n)
        weight = down[:, :, None, :, None] * across[:, None, :, None, :]
    table = torch.cat([x.permute(0, 2, 3, 1).reshape(-1, channels) for x in maps])
    bins = len(rois) * size[0] * size[1]
    taps = (2 * samples) ** 2
    found = F.embedding_bag(
        cell.view(bins, taps), table, per_sample_weights=weight.view(bins, taps).to(table.dtype), mode="sum"
    )
    return found.view(len(rois), *size, channels).permute(0, 3, 1, 2)


def _taps(start: Tensor, end: Tensor, cells: Tensor, bins: int, samples: int, aligned: bool) -> tuple[Tensor, Tensor]:
    """(M,) ends of boxes and (M,) number of cells along an axis -> (M, bins, 2 n) int64 cells and their weights.

    A sample more than a cell outside of the map is 0; between there and the outermost cell's middle, that cell's value.
    """
    length = end - start if aligned else (end - start).clamp(min=1)
    place = (torch.arange(bins * samples, device=start.device) + 0.5) / (bins * samples)
    place = start[:, None] + length[:, None] * place
    last = (cells - 1)[:, None]
    inside = (place >= -1) & (place <= cells[:, None])
    place = torch.minimum(place.where(inside, 0.0).clamp(min=0), last)  # a NaN is nowhere either
    low = place.floor()
    share = place - low
    cell = torch.stack([low, torch.minimum(low + 1, last)], -1).long()
    weight = torch.stack([1 - share, share], -1) * inside[..., None] / samples
    return cell.view(len(start), bins, 2 * samples), weight.view(len(start), bins, 2 * samples)
