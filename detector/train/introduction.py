"""What a run says before its first step."""

from __future__ import annotations

import torch

from detector.config.run import RunConfig
from detector.data.coco import CocoData
from detector.train.length import Horizon
from detector.train.step import TrainingModule


def introduction(
    config: RunConfig, data: CocoData, val: CocoData, module: TrainingModule, horizon: Horizon, device: torch.device
) -> list[str]:
    """Lines about data, network, device, length and learning rates."""
    settings = config.train
    parameters = [p for p in module.parameters() if p.requires_grad]
    count = sum(p.numel() for p in parameters) / 1e6
    frozen = sum(p.numel() for p in module.parameters()) / 1e6 - count
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{torch.get_num_threads()} threads"
    parts = f" in {settings.accumulate} parts" if settings.accumulate > 1 else ""
    lines = [
        f"data: {len(data)} training and {len(val)} validation images, {len(data.index.labels)} objects of"
        f" {len(data.index.classes)} classes",
        f"model: {count:.1f} M parameters to train" + (f", {frozen:.1f} M frozen" if frozen else ""),
        f"device: {device} ({name}), {settings.precision}",
        f"length: {horizon.total} steps of {horizon.batch} images{parts}, {horizon.epoch(horizon.total):.4g} epochs",
        settings.optimizer.explain(settings.batch_size),
    ]
    if config.assigner is not None and config.assigner.type == "iqdet" and config.criterion.type != "iqdet":
        lines.append(
            "assigner: iqdet draws around the centres of objects; criterion.type=iqdet and model.encoder={} learn where"
        )
    return lines
