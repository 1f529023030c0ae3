"""torchvision's own files, converted as they are read: `torchvision://fasterrcnn_resnet50_fpn`."""

from __future__ import annotations

import difflib
from pathlib import Path

import torch

from detector.convert.torchvision import ARCHITECTURES, convert
from detector.errors import CheckpointError
from detector.train.checkpoint import Checkpoint

SCHEME = "torchvision://"


def from_torchvision(source: str) -> Checkpoint:
    """The checkpoint of torchvision://NAME: trained on COCO, from torch hub's folder, downloaded if it is not there.

    Raises:
        CheckpointError: there is no such network, the file cannot be had, or it is damaged.
    """
    name = source.removeprefix(SCHEME)
    if name not in ARCHITECTURES:
        near = difflib.get_close_matches(name, ARCHITECTURES, 1)
        meant = f" (did you mean {near[0]!r}?)" if near else ""
        raise CheckpointError(f"{source}: no network of torchvision's that we know{meant}: {', '.join(ARCHITECTURES)}")
    from torchvision.models import get_model_weights

    url = next(iter(get_model_weights(name))).url
    path = Path(torch.hub.get_dir()) / "checkpoints" / url.rpartition("/")[2]
    if not path.is_file():
        _download(url, path, source)
    return convert(path, name, norm_eps=ARCHITECTURES[name].coco_eps)[0]


def _download(url: str, path: Path, source: str) -> None:
    """Whole or not at all; its name holds the start of its checksum."""
    checksum = path.stem.rpartition("-")[2]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(url, str(path), checksum, progress=False)
    except Exception as error:  # whatever the network, the disk or the checksum has to say
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise CheckpointError(
            f"{source}: cannot get the weights ({reason}); without a network, fetch {url} elsewhere and put it at"
            f" {path}"
        ) from None
